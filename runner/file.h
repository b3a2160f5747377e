// Reading a file whole, and writing one so that it appears whole or not at all.

#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>

#include "mvlm/result.h"

namespace mvlm {

// Owns an open file; -1 is none.
class FileDescriptor {
 public:
  explicit FileDescriptor(int fd = -1) : fd_(fd) {}
  FileDescriptor(FileDescriptor&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  FileDescriptor& operator=(FileDescriptor&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  FileDescriptor(const FileDescriptor&) = delete;
  FileDescriptor& operator=(const FileDescriptor&) = delete;
  ~FileDescriptor() { Close(); }

  int get() const { return fd_; }
  // False if the operating system reports a failure, which can be one of earlier writing.
  bool Close();

 private:
  int fd_;
};

// `size` bytes of an open file from byte `offset` on; InvalidInput if they cannot be read or are
// fewer. The message is errno's, or says that the file ends early.
Result<std::string> ReadAt(int fd, uint64_t offset, size_t size);

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

  // Takes disk space for `bytes` bytes in all, so that a disk too full is known before they are
  // written. Failure if it is; does nothing where the file system cannot reserve.
  Status Reserve(uint64_t bytes);

  // Writes `content` after what was written before.
  Status Append(std::string_view content);

  // Writes `content` after what was written before and puts the file in its place; with `durable`
  // only once it is on the disk, so that not even a power failure leaves a part of it there. To be
  // called once at most.
  Status Commit(std::string_view content, bool durable = false);

 private:
  PendingFile(std::string path, std::string temporary_path, FileDescriptor file);

  Status CannotWrite() const;

  std::string path_;
  std::string temporary_path_;  // empty if path_ itself is open
  FileDescriptor file_;         // none once closed or moved from
};

}  // namespace mvlm
