// Where words go: the answer to stdout, everything else to stderr.

#pragma once

#include <string>
#include <string_view>

#include "runner/str_cat.h"

namespace mvlm {

// Tells a person how things go, a line at a time, on stderr; silent if `quiet`.
class Progress {
 public:
  explicit Progress(bool quiet) : quiet_(quiet) {}

  template <typename... Parts>
  void Say(const Parts&... parts) const {
    if (!quiet_) {
      WriteLine(StrCat(parts...));
    }
  }

 private:
  static void WriteLine(const std::string& line);

  bool quiet_;
};

// Writes "llava_main: error: MESSAGE" to stderr.
void ReportError(std::string_view message);

// 1234.5 -> "1.23 s", 12.34 -> "12 ms".
std::string FormatMs(double ms);
// 1075838976 -> "1026 MiB".
std::string FormatBytes(int64_t bytes);
// 12.345 -> "12.3".
std::string FormatRate(double rate);

// The answer on its way to stdout, each part at once.
class AnswerStream {
 public:
  // False if stdout takes nothing more; error() says why.
  bool Write(std::string_view text);
  // Ends the line.
  bool End() { return Write("\n"); }

  // Whether anything was written.
  bool begun() const { return begun_; }

  // Whether it failed because the reader has closed the pipe, which is no fault.
  bool closed() const;
  bool failed() const { return errno_ != 0; }
  std::string error() const;

 private:
  bool begun_ = false;
  int errno_ = 0;  // of the first failure
};

}  // namespace mvlm
