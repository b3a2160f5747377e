// Reading a file whole, and writing one so that it appears whole or not at all.

#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "runner/result.h"

namespace mvlm {

// The content of a regular file. InvalidInput if it does not exist, is a folder, cannot be read,
// or is larger than `max_bytes`.
Result<std::string> ReadFile(const std::string& path, uint64_t max_bytes);

// A file that is written beside `path` under a temporary name and put in its place at the end.
//
// Create() does everything that can be known to fail early (a missing folder, no permission), so
// that a long computation need not end in "cannot write". Without Commit() nothing is left behind
// and an older file at `path` stays as it was. If `path` exists and is not a regular file (a
// terminal, a pipe, /dev/null), it is written to directly.
class PendingFile {
 public:
  static Result<PendingFile> Create(const std::string& path);

  PendingFile(PendingFile&& other) noexcept;
  PendingFile& operator=(PendingFile&&) = delete;
  PendingFile(const PendingFile&) = delete;
  PendingFile& operator=(const PendingFile&) = delete;
  ~PendingFile();

  // Writes `content` as the whole file. To be called once at most.
  Status Commit(std::string_view content);

 private:
  PendingFile(std::string path, std::string temporary_path, int fd);

  std::string path_;
  std::string temporary_path_;  // empty if path_ itself is open
  int fd_;                      // -1 once closed or moved from
};

}  // namespace mvlm
