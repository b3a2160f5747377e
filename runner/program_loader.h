// How ExecuTorch reads a .pte, with one change on the way: the name of the backend that runs its
// delegates.

#pragma once

#include <executorch/runtime/core/data_loader.h>

#include <memory>
#include <string>

#include "mvlm/result.h"

namespace mvlm {

// A loader that maps `path` into memory. With `use_linear_backend`, the delegates that the program
// has for XNNPACK become those of the backend of ops/linear_backend.h, which stands in front of it.
//
// Failure if the file cannot be opened.
Result<std::unique_ptr<executorch::runtime::DataLoader>> MakeProgramLoader(const std::string& path,
                                                                           bool use_linear_backend);

}  // namespace mvlm
