#include "runner/executorch_log.h"

#include <executorch/runtime/platform/platform.h>

#include <deque>
#include <mutex>
#include <string_view>

#include "runner/str_cat.h"

namespace mvlm {
namespace {

// The first message is usually the cause and the later ones its consequences on the way up.
constexpr size_t kMaxKept = 3;

// What the XNNPACK backend logs, as information, when it has mapped a file of packed weights.
constexpr std::string_view kMappedWeights = "Loaded packed weight cache: ";
// And as errors, for every part of a model, when that file is locked against changes, as ours are.
constexpr std::string_view kLockedWeights[] = {"flock(/proc/self/fd/", "open(/proc/self/fd/"};

struct Log {
  std::mutex mutex;
  std::deque<std::string> errors;
  int64_t mapped_weight_files = 0;
};

Log& TheLog() {
  static auto* log = new Log;  // never destroyed: threads of ExecuTorch may outlive main()
  return *log;
}

bool StartsWith(std::string_view text, std::string_view prefix) {
  return text.substr(0, prefix.size()) == prefix;
}

void Catch(et_timestamp_t, et_pal_log_level_t level, const char*, const char*, size_t,
           const char* message, size_t length) {
  const std::string_view text(message, length);
  const bool is_error = level == et_pal_log_level_t::kError || level == et_pal_log_level_t::kFatal;
  Log& log = TheLog();
  const std::lock_guard<std::mutex> lock(log.mutex);
  if (!is_error) {
    log.mapped_weight_files += StartsWith(text, kMappedWeights) ? 1 : 0;
    return;
  }
  for (const std::string_view expected : kLockedWeights) {
    if (StartsWith(text, expected)) {
      return;
    }
  }
  if (log.errors.size() < kMaxKept) {
    log.errors.emplace_back(text);
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

std::string ExplainExecuTorchError(executorch::runtime::Error error) {
  const std::string log = TakeExecuTorchErrors();
  return StrCat("ExecuTorch says ", executorch::runtime::to_string(error),
                log.empty() ? "" : StrCat(": ", log));
}

int64_t CountMappedWeightFiles() {
  Log& log = TheLog();
  const std::lock_guard<std::mutex> lock(log.mutex);
  return log.mapped_weight_files;
}

}  // namespace mvlm
