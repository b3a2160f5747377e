// The thread pool that ExecuTorch's kernels and the operators of mvlm share.

#pragma once

#include <cstdint>
#include <optional>

#include "mvlm/result.h"

namespace mvlm {

inline constexpr int64_t kMaxThreads = 1024;

// The number of threads that is used when nobody asks for another: the fast cores of a processor
// with fast and slow ones, else all cores, but no more than the CPUs this process may run on.
int64_t DefaultThreads();

// Makes the pool this large. To be called before the first inference, while nothing runs in the
// pool. Failure if ExecuTorch refuses. Returns the pool's size.
Result<int64_t> SetThreads(std::optional<int64_t> threads);

}  // namespace mvlm
