#include "runner/executorch_log.h"

#include <executorch/runtime/platform/platform.h>

#include <deque>
#include <mutex>

namespace mvlm {
namespace {

// The first message is usually the cause and the later ones its consequences on the way up.
constexpr size_t kMaxKept = 3;

struct Log {
  std::mutex mutex;
  std::deque<std::string> errors;
};

Log& TheLog() {
  static auto* log = new Log;  // never destroyed: threads of ExecuTorch may outlive main()
  return *log;
}

void Catch(et_timestamp_t, et_pal_log_level_t level, const char*, const char*, size_t,
           const char* message, size_t length) {
  if (level != et_pal_log_level_t::kError && level != et_pal_log_level_t::kFatal) {
    return;
  }
  Log& log = TheLog();
  const std::lock_guard<std::mutex> lock(log.mutex);
  if (log.errors.size() < kMaxKept) {
    log.errors.emplace_back(message, length);
  }
}

}  // namespace

void CatchExecuTorchLog() {
  static const bool registered =
      executorch::runtime::register_pal(executorch::runtime::PalImpl::create(Catch, __FILE__));
  (void)registered;  // if it fails the log stays on stderr, which is no reason to stop
}

std::string TakeExecuTorchErrors() {
  Log& log = TheLog();
  const std::lock_guard<std::mutex> lock(log.mutex);
  std::string joined;
  for (const std::string& error : log.errors) {
    joined += (joined.empty() ? "" : "; ") + error;
  }
  log.errors.clear();
  return joined;
}

}  // namespace mvlm
