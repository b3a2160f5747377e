#include "runner/interrupt.h"

#include <csignal>

namespace mvlm {
namespace {

std::atomic<bool> g_interrupted{false};
static_assert(std::atomic<bool>::is_always_lock_free, "set in a signal handler");

void SetInterrupted(int) { g_interrupted = true; }

}  // namespace

void HandleSignals(SignalsDuring during) {
  struct sigaction action = {};
  action.sa_handler = SetInterrupted;
  // SA_RESTART: a write of the answer goes on. SA_RESETHAND: the second signal is not handled.
  action.sa_flags = static_cast<int>(SA_RESETHAND);
  if (during == SignalsDuring::kWork) {
    action.sa_flags |= SA_RESTART;
  }
  sigaction(SIGINT, &action, nullptr);
  sigaction(SIGTERM, &action, nullptr);
  std::signal(SIGPIPE, SIG_IGN);
  std::signal(SIGXFSZ, SIG_IGN);
}

const std::atomic<bool>& Interrupted() { return g_interrupted; }

void ClearInterrupted() { g_interrupted = false; }

}  // namespace mvlm
