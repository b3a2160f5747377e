#include "runner/threads.h"

#include <algorithm>
#include <cstddef>
#include <thread>

#include "runner/executorch_log.h"
#include "runner/str_cat.h"

// libexecutorch_threadpool.so of the 1.5.1 wheel exports these, but the wheel does not carry the
// headers that declare them (extension/threadpool/{threadpool,cpuinfo_utils}.h).
namespace executorch::extension {
namespace threadpool {

class ThreadPool {
 public:
  size_t get_thread_count() const;
  // "Unsafe" only while something runs in the pool.
  bool _unsafe_reset_threadpool(uint32_t num_threads);
};

ThreadPool* get_threadpool();

}  // namespace threadpool
namespace cpuinfo {

uint32_t get_num_performant_cores();

}  // namespace cpuinfo
}  // namespace executorch::extension

namespace mvlm {

int64_t DefaultThreads() {
  CatchExecuTorchLog();
  int64_t cores = executorch::extension::cpuinfo::get_num_performant_cores();
  if (cores == 0) {
    // It knows big and little Arm cores only; elsewhere all cores are alike. That is also the size
    // with which the pool begins.
    cores = static_cast<int64_t>(
        executorch::extension::threadpool::get_threadpool()->get_thread_count());
  }
  // What taskset and cpusets leave to this process; 0 if unknown.
  const int64_t allowed = std::thread::hardware_concurrency();
  return std::max<int64_t>(1, allowed > 0 ? std::min(cores, allowed) : cores);
}

Result<int64_t> SetThreads(std::optional<int64_t> threads) {
  CatchExecuTorchLog();
  const int64_t wanted = threads.has_value() ? *threads : DefaultThreads();
  auto* pool = executorch::extension::threadpool::get_threadpool();
  if (static_cast<int64_t>(pool->get_thread_count()) != wanted &&
      !pool->_unsafe_reset_threadpool(static_cast<uint32_t>(wanted))) {
    return Failure(StrCat("ExecuTorch cannot make a pool of ", wanted, " threads"));
  }
  return static_cast<int64_t>(pool->get_thread_count());
}

}  // namespace mvlm
