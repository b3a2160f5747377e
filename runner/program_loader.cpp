#include "runner/program_loader.h"

#include <executorch/extension/data_loader/mmap_data_loader.h>

#include <cstdint>
#include <cstring>
#include <string_view>
#include <utility>

#include "ops/linear_backend.h"
#include "runner/executorch_log.h"
#include "runner/str_cat.h"

namespace mvlm {
namespace {

using executorch::extension::MmapDataLoader;
using executorch::runtime::DataLoader;
using executorch::runtime::Error;
using executorch::runtime::FreeableBuffer;

template <typename T>
using EtResult = executorch::runtime::Result<T>;

// A flatbuffer holds a string as its length in 32 bits, little-endian, its characters and a zero.
std::string SerializedString(std::string_view text) {
  std::string serialized;
  for (int shift = 0; shift < 32; shift += 8) {
    serialized.push_back(static_cast<char>(text.size() >> shift & 0xff));
  }
  return serialized.append(text).append(1, '\0');
}

// Hands out a copy of the program's tables with another backend's name in them; they are some
// hundred KiB. All else, the weights above all, is mapped as it is.
class LinearBackendLoader final : public DataLoader {
 public:
  explicit LinearBackendLoader(MmapDataLoader file) : file_(std::move(file)) {}

  EtResult<FreeableBuffer> load(size_t offset, size_t size,
                                const SegmentInfo& info) const override {
    EtResult<FreeableBuffer> buffer = file_.load(offset, size, info);
    if (!buffer.ok() || info.segment_type != SegmentInfo::Type::Program) {
      return buffer;
    }
    // Aligned as strictly as ExecuTorch asks of a program.
    constexpr std::align_val_t kAlignment{64};
    char* const copy = static_cast<char*>(operator new(size, kAlignment));
    std::memcpy(copy, buffer->data(), size);
    ReplaceBackend(copy, size);
    return FreeableBuffer(copy, size,
                          [](void*, void* data, size_t) { operator delete(data, kAlignment); });
  }

  Error load_into(size_t offset, size_t size, const SegmentInfo& info,
                  void* buffer) const override {
    return file_.load_into(offset, size, info, buffer);
  }

  EtResult<size_t> size() const override { return file_.size(); }

 private:
  static void ReplaceBackend(char* program, size_t size) {
    static const std::string from = SerializedString(kXnnpackBackendId);
    static const std::string to = SerializedString(kLinearBackendId);
    const std::string_view text(program, size);
    for (size_t at = text.find(from); at != text.npos; at = text.find(from, at + from.size())) {
      std::memcpy(program + at, to.data(), to.size());
    }
  }

  MmapDataLoader file_;
};

}  // namespace

Result<std::unique_ptr<DataLoader>> MakeProgramLoader(const std::string& path,
                                                      bool use_linear_backend) {
  EtResult<MmapDataLoader> file =
      MmapDataLoader::from(path.c_str(), MmapDataLoader::MlockConfig::NoMlock);
  if (!file.ok()) {
    return Failure(StrCat("cannot open ", path, ": ", ExplainExecuTorchError(file.error())));
  }
  if (use_linear_backend) {
    return std::unique_ptr<DataLoader>(new LinearBackendLoader(std::move(*file)));
  }
  return std::unique_ptr<DataLoader>(new MmapDataLoader(std::move(*file)));
}

}  // namespace mvlm
