// ExecuTorch writes its log to stderr. Most of what it says there is the reason for an error that
// the runner reports in its own words, so it is caught instead and put into that report.

#pragma once

#include <executorch/runtime/core/error.h>

#include <cstdint>
#include <string>

namespace mvlm {

// From now on ExecuTorch's log goes into a small buffer and no longer to stderr. To be called
// before the first use of ExecuTorch; more than once does no harm.
void CatchExecuTorchLog();

// The latest errors that ExecuTorch logged since the last call, joined by "; ", and forgets them.
// Empty if there were none. Thread-safe.
std::string TakeExecuTorchErrors();

// What ExecuTorch had to say about an error of its own: its name and TakeExecuTorchErrors().
std::string ExplainExecuTorchError(executorch::runtime::Error error);

// How many files of packed weights the XNNPACK backend has said to have mapped, since the first
// CatchExecuTorchLog(). Thread-safe.
int64_t CountMappedWeightFiles();

}  // namespace mvlm
