// Where packed weights are kept from one run to the next.
//
// XNNPACK lays the weights of a .pte out anew for the processor at every load, which takes seconds
// and as much memory as the weights have. A file of what came out of it is mapped instead: there
// at once, and its pages can be dropped and read again. Knows nothing of ExecuTorch.

#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "mvlm/result.h"
#include "runner/file.h"
#include "runner/packed_file.h"

namespace mvlm {

// The folder for caches of the user whose environment variables these are (null if not set), by
// the XDG rules: XDG_CACHE_HOME/mvlm or HOME/.cache/mvlm. Nothing if neither is an absolute path.
std::optional<std::string> UserCacheFolder(const char* xdg_cache_home, const char* home);

// One folder, for one .pte on one machine. There is a file for every method, so that what a method
// holds can be let go with it. Files are put in place whole by rename(2), never changed and only
// removed, so that any number of processes can use and fill the folder at once.
class WeightCache {
 public:
  // Makes the folder, and those it is in, if need be. `key`: of the .pte and the machine; its
  // method is set by the functions below.
  //
  // InvalidInput if `folder` is something else than a folder; Failure if it cannot be made.
  static Result<WeightCache> Create(std::string folder, PackedKey key);

  std::string Path(std::string_view method) const;

  // The packed weights of `method`, checked, for reading. A lock on the open file keeps the
  // XNNPACK backend from ever writing to it. InvalidInput if there is no such file; if there is one
  // that cannot be used, the message says why.
  Result<FileDescriptor> Open(std::string_view method) const;

  // Whether there is a file for `method`, be it of use or not.
  bool Exists(std::string_view method) const;

  // Whether files can be put into the folder, as far as its permissions tell; Failure if not.
  Status CheckWritable() const;

  // Keeps what the backend wrote to the file open as `fd`, in place of an older file; then removes
  // files that are of no use any more: those of the same .pte and processor for another version of
  // the library, and what processes that were killed left.
  Status Store(std::string_view method, int fd) const;

 private:
  WeightCache(std::string folder, PackedKey key);

  PackedKey KeyOf(std::string_view method) const;
  std::string Prefix(std::string_view method) const;
  void RemoveStale(std::string_view method) const;

  std::string folder_;
  PackedKey key_;
};

// A file in memory alone, which the backend can fill as it fills one on disk, but which no full
// disk makes it fail, or crash, in the middle of. Failure if the system has none.
Result<FileDescriptor> MakeMemoryFile();

}  // namespace mvlm
