// Ctrl-C as a flag.

#pragma once

#include <atomic>

namespace mvlm {

// The exit code of a program that stopped because of Ctrl-C, as shells have it: 128 + SIGINT.
inline constexpr int kInterruptedExitCode = 130;

enum class SignalsDuring {
  kWork,     // writes go on after a signal
  kReading,  // a read that waits ends
};

// From now on the first SIGINT or SIGTERM sets Interrupted(), and a second one ends the process at
// once, as if this had not been called. Also ignores SIGPIPE and SIGXFSZ, so that writing to a
// closed pipe or beyond the allowed size of a file is an error that can be handled.
void HandleSignals(SignalsDuring during = SignalsDuring::kWork);

const std::atomic<bool>& Interrupted();
// As if no signal had come. HandleSignals() must be called again for the next.
void ClearInterrupted();

}  // namespace mvlm
