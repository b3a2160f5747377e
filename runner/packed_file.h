// The files that packed weights are kept in.
//
// ExecuTorch's XNNPACK backend writes, and maps later:
//
//   packed weights, each from a page's beginning on
//   index           of their names and places
//   footer          20 bytes: where the index begins, its entries, a magic number, a version
//
// It looks at the footer and walks the index, which does not tell a file for another processor or
// another model, nor one that was damaged. So between index and footer, where the backend does not
// look, goes a manifest that does: what the weights were packed from and for, how long the file
// is, and hashes of the index and of pages spread over the weights.

#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "mvlm/result.h"
#include "runner/file.h"

namespace mvlm {

// What packed weights depend on. Those of another key are of no use.
struct PackedKey {
  std::string program_id;    // of the .pte
  uint64_t model_bytes = 0;  // its size
  std::string method;        // whose weights they are
  std::string executorch;    // version
  std::string library;       // XnnpackBuildId()
  std::string cpu;           // HostCpuId()
};

// The name of the first field in which the two differ; empty if they are the same.
std::string FirstDifference(const PackedKey& a, const PackedKey& b);

// A short name for the key, in hexadecimal digits.
std::string ShortName(const PackedKey& key);

// Places of `count` pages spread evenly over `bytes` bytes, the first and the last among them;
// fewer if there are not so many.
std::vector<uint64_t> SampledPages(uint64_t bytes, size_t count);

// Whether the packed file open as `fd` is whole and of `key`. InvalidInput with a message that
// says of the file what is wrong with it: "is cut off or damaged (...)". It reads little: the end
// of the file and the sampled pages.
Status CheckPackedFile(int fd, const PackedKey& key);

// The key in a packed file's manifest. InvalidInput as above, if there is none.
Result<PackedKey> ReadPackedKey(int fd);

// Whether the backend put any weights into the file that it wrote to `fd`.
Result<bool> HasPackedWeights(int fd);

// Copies what the backend wrote to `fd` into `file`, with a manifest, and puts it in place. Failure
// if it cannot be written, of a full disk for example; then nothing is left behind.
Status WritePackedFile(int fd, const PackedKey& key, PendingFile file);

}  // namespace mvlm
