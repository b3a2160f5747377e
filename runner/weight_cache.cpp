#include "runner/weight_cache.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <ctime>
#include <filesystem>
#include <system_error>
#include <utility>

#include "runner/hash.h"
#include "runner/str_cat.h"

namespace mvlm {
namespace {

namespace fs = std::filesystem;

constexpr std::string_view kExtension = ".packed";
// No run that is still alive has been writing for so long.
constexpr std::time_t kAbandonedSeconds = 24 * 60 * 60;

// mkdir -p, for the user alone, as the XDG rules ask for.
bool MakeFolders(const std::string& folder) {
  for (size_t end = folder.find('/', 1);; end = folder.find('/', end + 1)) {
    const std::string part = folder.substr(0, end);
    if (mkdir(part.c_str(), 0700) != 0 && errno != EEXIST && errno != EISDIR) {
      struct stat info = {};
      const int error = errno;
      if (stat(part.c_str(), &info) != 0) {  // on a read-only file system existing ones are errors
        errno = error;
        return false;
      }
    }
    if (end == std::string::npos) {
      return true;
    }
  }
}

bool StartsWith(std::string_view text, std::string_view prefix) {
  return text.substr(0, prefix.size()) == prefix;
}

bool EndsWith(std::string_view text, std::string_view suffix) {
  return text.size() >= suffix.size() && text.substr(text.size() - suffix.size()) == suffix;
}

}  // namespace

std::optional<std::string> UserCacheFolder(const char* xdg_cache_home, const char* home) {
  if (xdg_cache_home != nullptr && xdg_cache_home[0] == '/') {
    return StrCat(xdg_cache_home, "/mvlm");
  }
  if (home != nullptr && home[0] == '/') {
    return StrCat(home, "/.cache/mvlm");
  }
  return std::nullopt;
}

WeightCache::WeightCache(std::string folder, PackedKey key)
    : folder_(std::move(folder)), key_(std::move(key)) {}

Result<WeightCache> WeightCache::Create(std::string folder, PackedKey key) {
  struct stat info = {};
  if (stat(folder.c_str(), &info) == 0 && !S_ISDIR(info.st_mode)) {
    return InvalidInput(StrCat(folder, " is not a folder"));
  }
  if (!MakeFolders(folder)) {
    return Failure(StrCat("cannot make the folder ", folder, ": ", std::strerror(errno)));
  }
  if (stat(folder.c_str(), &info) != 0 || !S_ISDIR(info.st_mode)) {
    return Failure(StrCat("cannot make the folder ", folder));
  }
  return WeightCache(std::move(folder), std::move(key));
}

PackedKey WeightCache::KeyOf(std::string_view method) const {
  PackedKey key = key_;
  key.method = method;
  return key;
}

std::string WeightCache::Prefix(std::string_view method) const {
  return StrCat(HashToHex(Hash(key_.program_id)), "-", method, "-");
}

std::string WeightCache::Path(std::string_view method) const {
  return StrCat(folder_, "/", Prefix(method), ShortName(KeyOf(method)), kExtension);
}

bool WeightCache::Exists(std::string_view method) const {
  return access(Path(method).c_str(), F_OK) == 0;
}

Result<FileDescriptor> WeightCache::Open(std::string_view method) const {
  const std::string path = Path(method);
  FileDescriptor file(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK));
  struct stat info = {};
  if (file.get() < 0 || fstat(file.get(), &info) != 0) {
    return InvalidInput(StrCat("cannot read ", path, ": ", std::strerror(errno)));
  }
  // Not of somebody else, who could have an answer made of anything.
  if (info.st_uid != geteuid() && info.st_uid != 0) {
    return InvalidInput(StrCat(path, " belongs to another user"));
  }
  if (Status status = CheckPackedFile(file.get(), KeyOf(method)); !status.ok()) {
    return InvalidInput(StrCat(path, " ", status.error().message));
  }
  if (flock(file.get(), LOCK_SH | LOCK_NB) != 0) {
    return InvalidInput(StrCat("cannot lock ", path, ": ", std::strerror(errno)));
  }
  return file;
}

Status WeightCache::CheckWritable() const {
  if (access(folder_.c_str(), W_OK | X_OK) != 0) {
    return Failure(StrCat("cannot write into ", folder_, ": ", std::strerror(errno)));
  }
  return {};
}

Status WeightCache::Store(std::string_view method, int fd) const {
  Result<PendingFile> file = PendingFile::Create(Path(method));
  if (!file.ok()) {
    return file.error();
  }
  Status status = WritePackedFile(fd, KeyOf(method), std::move(*file));
  if (status.ok()) {
    RemoveStale(method);
  }
  return status;
}

void WeightCache::RemoveStale(std::string_view method) const {
  const PackedKey key = KeyOf(method);
  const std::string prefix = Prefix(method);
  std::error_code error;
  for (fs::directory_iterator entry(folder_, error), end; !error && entry != end;
       entry.increment(error)) {
    const std::string path = entry->path().string();
    const std::string name = entry->path().filename().string();
    struct stat info = {};
    if (!StartsWith(name, prefix) || lstat(path.c_str(), &info) != 0 || !S_ISREG(info.st_mode)) {
      continue;
    }
    bool stale = false;
    if (EndsWith(name, kExtension)) {
      const FileDescriptor file(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW));
      const Result<PackedKey> found = ReadPackedKey(file.get());
      // Of another processor it may be in use: home folders can be shared by machines.
      stale = file.get() >= 0 &&
              (!found.ok() || (found->cpu == key.cpu && !FirstDifference(*found, key).empty()));
    } else {
      stale = std::time(nullptr) - info.st_mtime > kAbandonedSeconds;
    }
    if (stale) {
      unlink(path.c_str());
    }
  }
}

Result<FileDescriptor> MakeMemoryFile() {
  FileDescriptor file(memfd_create("mvlm packed weights", MFD_CLOEXEC));
  if (file.get() < 0) {
    return Failure(StrCat("cannot make a file in memory: ", std::strerror(errno)));
  }
  return file;
}

}  // namespace mvlm
