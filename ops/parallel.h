// Cutting work into ranges for ExecuTorch's thread pool.
#pragma once

#include <executorch/runtime/kernel/thread_parallel_interface.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace mvlm {

// A thread that has less to do than this is not woken. Waking one cost 3 to 30 microseconds, if it
// had slept, on two cores of an AMD EPYC (Zen 3), and half of one if it had not.
constexpr int64_t kMinNanosecondsPerWorker = 20000;

// Calls body(begin, end) for disjoint ranges that cover 0 .. units - 1, on as many threads as the
// work is worth, and returns when all are done. `nanoseconds` is roughly what all of it takes one
// core of a phone or a laptop. Returns false if the thread pool failed.
//
// Ranges are handed out one after another, four per thread, because cores of a phone differ in
// speed and other programs use them, too.
template <typename Body>
bool RunRanges(int64_t units, int64_t nanoseconds, const Body& body) {
  const int64_t workers = std::min(
      {executorch::extension::get_thread_count(), units, nanoseconds / kMinNanosecondsPerWorker});
  if (workers <= 1) {
    body(0, units);
    return true;
  }
  const int64_t range = std::max<int64_t>(1, units / (4 * workers));
  std::atomic<int64_t> next{0};
  return executorch::extension::parallel_for(0, workers, 1, [&](int64_t first, int64_t last) {
    for (int64_t worker = first; worker < last; ++worker) {
      for (int64_t begin = next.fetch_add(range); begin < units; begin = next.fetch_add(range)) {
        body(begin, std::min(units, begin + range));
      }
    }
  });
}

}  // namespace mvlm
