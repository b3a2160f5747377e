// Ctrl-C as a flag.

#pragma once

#include <atomic>

namespace mvlm {

// The exit code of a program that stopped because of Ctrl-C, as shells have it: 128 + SIGINT.
inline constexpr int kInterruptedExitCode = 130;

// From now on the first SIGINT or SIGTERM sets Interrupted(), and a second one ends the process at
// once, as if this had not been called. Also ignores SIGPIPE and SIGXFSZ, so that writing to a
// closed pipe or beyond the allowed size of a file is an error that can be handled.
void HandleSignals();

const std::atomic<bool>& Interrupted();

}  // namespace mvlm
