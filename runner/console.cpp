#include "runner/console.h"

#include <cerrno>
#include <cstdio>
#include <cstring>

namespace mvlm {
namespace {

template <typename... Values>
std::string Format(const char* format, Values... values) {
  char buffer[64];
  std::snprintf(buffer, sizeof(buffer), format, values...);
  return buffer;
}

}  // namespace

void Progress::WriteLine(const std::string& line) {
  std::fprintf(stderr, "llava_main: %s\n", line.c_str());
}

void ReportError(std::string_view message) {
  std::fprintf(stderr, "llava_main: error: %.*s\n", static_cast<int>(message.size()),
               message.data());
}

std::string FormatMs(double ms) {
  if (ms < 10.0) {
    return Format("%.1f ms", ms);
  }
  return ms < 1000.0 ? Format("%.0f ms", ms) : Format("%.2f s", ms / 1000.0);
}

std::string FormatBytes(int64_t bytes) {
  const double mib = static_cast<double>(bytes) / (1024.0 * 1024.0);
  return Format(mib < 10.0 ? "%.1f MiB" : "%.0f MiB", mib);
}

std::string FormatRate(double rate) { return Format(rate < 100.0 ? "%.1f" : "%.0f", rate); }

bool AnswerStream::Write(std::string_view text) {
  if (errno_ != 0) {
    return false;
  }
  begun_ = true;
  if (std::fwrite(text.data(), 1, text.size(), stdout) != text.size() || std::fflush(stdout) != 0) {
    errno_ = errno != 0 ? errno : EIO;
  }
  return errno_ == 0;
}

bool AnswerStream::closed() const { return errno_ == EPIPE; }

std::string AnswerStream::error() const { return std::strerror(errno_); }

}  // namespace mvlm
