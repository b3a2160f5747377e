#include "runner/memory.h"

#include <algorithm>
#include <chrono>
#include <fstream>
#include <iterator>

namespace mvlm {
namespace {

// A sample takes some 30 microseconds.
constexpr std::chrono::milliseconds kInterval(20);

std::string ReadProcStatus() {
  std::ifstream file("/proc/self/status");
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

}  // namespace

int64_t StatusFieldBytes(std::string_view status, std::string_view field) {
  const std::string line_start = std::string(field) + ":";
  size_t at = 0;
  while (at < status.size()) {
    const size_t end = std::min(status.find('\n', at), status.size());
    const std::string_view line = status.substr(at, end - at);
    if (line.substr(0, line_start.size()) == line_start) {
      int64_t kilobytes = 0;
      for (const char c : line.substr(line_start.size())) {
        if (c >= '0' && c <= '9') {
          kilobytes = 10 * kilobytes + (c - '0');
        }
      }
      return 1024 * kilobytes;
    }
    at = end + 1;
  }
  return 0;
}

MemoryNow ReadMemory() {
  const std::string status = ReadProcStatus();
  return {StatusFieldBytes(status, "VmRSS"), StatusFieldBytes(status, "RssAnon"),
          StatusFieldBytes(status, "RssFile")};
}

MemoryMeter::MemoryMeter() : thread_([this] { Run(); }) {}

MemoryMeter::~MemoryMeter() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  stopping_.notify_one();
  thread_.join();
}

MemoryUse MemoryMeter::Sample() {
  const std::string status = ReadProcStatus();
  const std::lock_guard<std::mutex> lock(mutex_);
  peak_.peak_rss_bytes = std::max(peak_.peak_rss_bytes, StatusFieldBytes(status, "VmHWM"));
  peak_.peak_anonymous_bytes =
      std::max(peak_.peak_anonymous_bytes, StatusFieldBytes(status, "RssAnon"));
  return peak_;
}

void MemoryMeter::Run() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (!stop_) {
    lock.unlock();
    Sample();
    lock.lock();
    stopping_.wait_for(lock, kInterval, [this] { return stop_; });
  }
}

}  // namespace mvlm
