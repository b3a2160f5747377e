#include "runner/file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "runner/str_cat.h"

namespace mvlm {
namespace {

bool WriteAll(int fd, std::string_view content) {
  while (!content.empty()) {
    const ssize_t written = write(fd, content.data(), content.size());
    if (written < 0) {
      if (errno == EINTR) {
        continue;
      }
      return false;
    }
    content.remove_prefix(static_cast<size_t>(written));
  }
  return true;
}

// What open(2) would have given a new file; mkstemp(3) gives 0600.
mode_t NewFileMode() {
  const mode_t mask = umask(0);
  umask(mask);
  return 0666 & ~mask;
}

}  // namespace

bool FileDescriptor::Close() {
  const int fd = std::exchange(fd_, -1);
  return fd < 0 || close(fd) == 0;
}

Result<std::string> ReadAt(int fd, uint64_t offset, size_t size) {
  std::string content(size, '\0');
  size_t filled = 0;
  while (filled < size) {
    const ssize_t count =
        pread(fd, content.data() + filled, size - filled, static_cast<off_t>(offset + filled));
    if (count < 0 && errno == EINTR) {
      continue;
    }
    if (count <= 0) {
      return InvalidInput(count < 0 ? std::strerror(errno) : "the file ends early");
    }
    filled += static_cast<size_t>(count);
  }
  return content;
}

Result<std::string> ReadFile(const std::string& path, uint64_t max_bytes) {
  // O_NONBLOCK, so that a named pipe is refused below instead of waited for.
  const FileDescriptor file(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  struct stat info = {};
  if (file.get() < 0 || fstat(file.get(), &info) != 0) {
    return InvalidInput(StrCat("cannot read ", path, ": ", std::strerror(errno)));
  }
  if (!S_ISREG(info.st_mode)) {
    return InvalidInput(StrCat("cannot read ", path, ": it is ",
                               S_ISDIR(info.st_mode) ? "a folder" : "not a file"));
  }
  const auto size = static_cast<uint64_t>(info.st_size);
  if (size > max_bytes) {
    return InvalidInput(StrCat("cannot read ", path, ": its ", size, " bytes are more than the ",
                               max_bytes, " that are accepted"));
  }
  std::string content(size, '\0');
  size_t filled = 0;
  while (filled < content.size()) {
    const ssize_t count = read(file.get(), content.data() + filled, content.size() - filled);
    if (count < 0 && errno == EINTR) {
      continue;
    }
    if (count < 0) {
      return InvalidInput(StrCat("cannot read ", path, ": ", std::strerror(errno)));
    }
    if (count == 0) {  // the file shrank since fstat()
      break;
    }
    filled += static_cast<size_t>(count);
  }
  content.resize(filled);
  return content;
}

Result<PendingFile> PendingFile::Create(const std::string& path) {
  if (path.empty()) {
    return InvalidInput("cannot write a file without a name");
  }
  struct stat info = {};
  if (stat(path.c_str(), &info) == 0 && !S_ISREG(info.st_mode)) {
    if (S_ISDIR(info.st_mode)) {
      return InvalidInput(StrCat("cannot write ", path, ": it is a folder; name a file"));
    }
    FileDescriptor file(open(path.c_str(), O_WRONLY | O_CLOEXEC));
    if (file.get() < 0) {
      return InvalidInput(StrCat("cannot write ", path, ": ", std::strerror(errno)));
    }
    return PendingFile(path, "", std::move(file));
  }
  // Beside the target, because rename(2) does not cross file systems.
  std::string temporary_path = path + ".XXXXXX";
  FileDescriptor file(mkostemp(temporary_path.data(), O_CLOEXEC));
  if (file.get() < 0) {
    return InvalidInput(StrCat("cannot write ", path, ": ", std::strerror(errno)));
  }
  return PendingFile(path, std::move(temporary_path), std::move(file));
}

PendingFile::PendingFile(std::string path, std::string temporary_path, FileDescriptor file)
    : path_(std::move(path)), temporary_path_(std::move(temporary_path)), file_(std::move(file)) {}

PendingFile::PendingFile(PendingFile&& other) noexcept
    : path_(std::move(other.path_)),
      temporary_path_(std::move(other.temporary_path_)),
      file_(std::move(other.file_)) {
  other.temporary_path_.clear();
}

PendingFile::~PendingFile() {
  if (!temporary_path_.empty()) {
    unlink(temporary_path_.c_str());
  }
}

Status PendingFile::Reserve(uint64_t bytes) {
#ifdef __linux__
  // Not posix_fallocate(3): where the file system cannot, that writes every block.
  if (fallocate(file_.get(), 0, 0, static_cast<off_t>(bytes)) != 0 &&
      (errno == ENOSPC || errno == EDQUOT || errno == EFBIG)) {
    return CannotWrite();
  }
#endif
  return {};
}

Status PendingFile::Append(std::string_view content) {
  return WriteAll(file_.get(), content) ? Status() : CannotWrite();
}

Status PendingFile::Commit(std::string_view content, bool durable) {
  bool written = WriteAll(file_.get(), content);
  if (!temporary_path_.empty()) {
    written = written && fchmod(file_.get(), NewFileMode()) == 0;
    written = written && (!durable || fsync(file_.get()) == 0);
    written = written && file_.Close();
    written = written && rename(temporary_path_.c_str(), path_.c_str()) == 0;
  }
  if (!written) {
    return CannotWrite();
  }
  temporary_path_.clear();  // it has another name now: nothing to remove
  return {};
}

Status PendingFile::CannotWrite() const {
  return Failure(StrCat("cannot write ", path_, ": ", std::strerror(errno)));
}

}  // namespace mvlm
