// How much memory this process takes, from Linux's /proc.

#pragma once

#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <string>
#include <string_view>
#include <thread>

namespace mvlm {

// The value of a field like "RssAnon:     1234 kB" in the text of /proc/self/status, in bytes; 0
// if there is none.
int64_t StatusFieldBytes(std::string_view status, std::string_view field);

struct MemoryUse {
  int64_t peak_rss_bytes = 0;        // all resident pages, mapped files included
  int64_t peak_anonymous_bytes = 0;  // of them, those that are in no file and cannot be evicted
};

// What is resident at one moment.
struct MemoryNow {
  int64_t rss_bytes = 0;
  int64_t anonymous_bytes = 0;  // of them, in no file
  int64_t file_bytes = 0;       // of them, of mapped files
};

// All 0 where there is no /proc.
MemoryNow ReadMemory();

// Watches the peaks. The kernel keeps the first one (VmHWM: not getrusage()'s ru_maxrss, which
// begins with what the parent had at fork); the second it does not keep, so it is sampled: by
// Sample() and, from construction to destruction, by a thread of its own every few milliseconds.
class MemoryMeter {
 public:
  MemoryMeter();
  ~MemoryMeter();
  MemoryMeter(const MemoryMeter&) = delete;
  MemoryMeter& operator=(const MemoryMeter&) = delete;

  // Takes a sample and returns the peaks so far. Thread-safe. All 0 where there is no /proc.
  MemoryUse Sample();

 private:
  void Run();

  std::mutex mutex_;
  std::condition_variable stopping_;
  bool stop_ = false;
  MemoryUse peak_;
  std::thread thread_;  // last, so that it starts when the rest is there
};

}  // namespace mvlm
