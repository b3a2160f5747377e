// Whether a file can be a whole ExecuTorch program, judged before anything is mapped from it.

#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "mvlm/result.h"

namespace mvlm {

// As many bytes of the beginning of a file as CheckPteHeader() wants, or all that there are.
inline constexpr size_t kPteHeadBytes = 64;

// A program is a flatbuffer with an "extended header" that says how long the flatbuffer is and
// where its weights lie, followed by the weights. (The layout is that of
// executorch/exir/_serialize/_program.py.) Touching mapped pages beyond the end of a truncated
// file kills the process with SIGBUS, so the two are compared first.
//
// `head` is the first kPteHeadBytes of a file of `file_size` bytes. The error's message is a
// predicate: "is empty (0 bytes)".
Status CheckPteHeader(std::string_view head, uint64_t file_size);

// Reads the beginning of the file at `path` and checks it. Returns the file's size.
Result<uint64_t> CheckPteFile(const std::string& path);

}  // namespace mvlm
