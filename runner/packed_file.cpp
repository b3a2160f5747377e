#include "runner/packed_file.h"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <nlohmann/json.hpp>
#include <optional>

#include "runner/hash.h"
#include "runner/str_cat.h"

namespace mvlm {
namespace {

using Json = nlohmann::ordered_json;

constexpr size_t kFooterBytes = 20;
constexpr uint32_t kFooterMagic = 0x58505743;  // what the backend calls kCacheMagic
constexpr uint32_t kFooterVersion = 2;         // and kCacheVersion
constexpr std::string_view kManifestMagic = "mvlmpack";
constexpr int kManifestVersion = 1;
// Between manifest and footer: its length and kManifestMagic.
constexpr size_t kManifestEndBytes = sizeof(uint32_t) + kManifestMagic.size();
constexpr size_t kMaxManifestBytes = size_t{1} << 16;
// An entry is a name and three numbers; a model has some hundreds.
constexpr size_t kMaxIndexBytes = size_t{1} << 26;
constexpr size_t kPageBytes = 4096;
constexpr size_t kSamples = 64;
constexpr size_t kCopyBytes = size_t{1} << 20;

// Of the machine's byte order, as the backend writes them.
template <typename T>
T Load(std::string_view bytes, size_t offset) {
  T value;
  std::memcpy(&value, bytes.data() + offset, sizeof(value));
  return value;
}

struct Footer {
  uint64_t index_start = 0;
  uint32_t entries = 0;
};

Error Damaged(std::string_view why) {
  return InvalidInput(StrCat("is cut off or damaged (", why, ")"));
}

Result<Footer> ParseFooter(std::string_view bytes) {
  if (Load<uint32_t>(bytes, 12) != kFooterMagic || Load<uint32_t>(bytes, 16) != kFooterVersion) {
    return Damaged("it does not end like one");
  }
  return Footer{Load<uint64_t>(bytes, 0), Load<uint32_t>(bytes, 8)};
}

Result<uint64_t> FileSize(int fd) {
  struct stat info = {};
  if (fstat(fd, &info) != 0) {
    return InvalidInput(StrCat("cannot be read (", std::strerror(errno), ")"));
  }
  if (!S_ISREG(info.st_mode)) {
    return InvalidInput("is not a file");
  }
  return static_cast<uint64_t>(info.st_size);
}

// The end of a packed file.
struct Tail {
  uint64_t file_bytes = 0;
  Footer footer;
  uint64_t index_end = 0;
  Json manifest;
};

Result<Tail> ReadTail(int fd) {
  const Result<uint64_t> size = FileSize(fd);
  if (!size.ok()) {
    return size.error();
  }
  constexpr size_t kEndBytes = kManifestEndBytes + kFooterBytes;
  if (*size < kEndBytes) {
    return Damaged(StrCat("it has only ", *size, " bytes"));
  }
  const Result<std::string> end = ReadAt(fd, *size - kEndBytes, kEndBytes);
  if (!end.ok()) {
    return Damaged(end.error().message);
  }
  const Result<Footer> footer = ParseFooter(std::string_view(*end).substr(kManifestEndBytes));
  if (!footer.ok()) {
    return footer.error();
  }
  const uint64_t manifest_bytes = Load<uint32_t>(*end, 0);
  if (std::string_view(*end).substr(sizeof(uint32_t), kManifestMagic.size()) != kManifestMagic ||
      manifest_bytes > kMaxManifestBytes || manifest_bytes > *size - kEndBytes) {
    return InvalidInput("was not written by this program");
  }
  Tail tail;
  tail.file_bytes = *size;
  tail.footer = *footer;
  tail.index_end = *size - kEndBytes - manifest_bytes;
  const Result<std::string> text = ReadAt(fd, tail.index_end, manifest_bytes);
  if (!text.ok()) {
    return Damaged(text.error().message);
  }
  tail.manifest = Json::parse(*text, nullptr, false);
  if (!tail.manifest.is_object() || tail.manifest.value("version", Json()) != kManifestVersion) {
    return InvalidInput("was written by another version of this program");
  }
  return tail;
}

Json ToJson(const PackedKey& key) {
  return {{"program_id", key.program_id}, {"model_bytes", key.model_bytes}, {"method", key.method},
          {"executorch", key.executorch}, {"library", key.library},         {"cpu", key.cpu}};
}

std::optional<PackedKey> ToKey(const Json& manifest) {
  const auto found = manifest.find("key");
  if (found == manifest.end() || !found->is_object()) {
    return std::nullopt;
  }
  const auto text = [&found](const char* name) {
    const auto field = found->find(name);
    return field != found->end() && field->is_string() ? field->get<std::string>() : std::string();
  };
  PackedKey key = {text("program_id"), 0,          text("method"), text("executorch"),
                   text("library"),    text("cpu")};
  const auto bytes = found->find("model_bytes");
  if (bytes != found->end() && bytes->is_number_unsigned()) {
    key.model_bytes = bytes->get<uint64_t>();
  }
  return key;
}

std::string Escaped(std::string_view bytes) {
  return Json(std::string(bytes)).dump(-1, ' ', false, Json::error_handler_t::replace);
}

// Walks the index as the backend does.
Status CheckIndex(std::string_view index, const Footer& footer) {
  constexpr size_t kNumbersBytes = 8 + 8 + 4;
  size_t at = 0;
  for (uint32_t i = 0; i < footer.entries; ++i) {
    if (index.size() - at < sizeof(uint32_t)) {
      return Damaged("its index is short");
    }
    const size_t name_bytes = Load<uint32_t>(index, at);
    at += sizeof(uint32_t);
    if (index.size() - at < kNumbersBytes || name_bytes > index.size() - at - kNumbersBytes) {
      return Damaged("its index is short");
    }
    at += name_bytes;
    const auto offset = Load<uint64_t>(index, at);
    const auto bytes = Load<uint64_t>(index, at + 8);
    at += kNumbersBytes;
    if (offset >= footer.index_start || bytes > footer.index_start - offset) {
      return Damaged("its index is wrong");
    }
  }
  return {};
}

// Of everything in front of the manifest that is cheap to read.
Result<std::string> HashOfContent(int fd, const Footer& footer, std::string_view index) {
  uint64_t hash = Hash(index);
  for (const uint64_t page : SampledPages(footer.index_start, kSamples)) {
    const size_t bytes = std::min<uint64_t>(kPageBytes, footer.index_start - page);
    const Result<std::string> content = ReadAt(fd, page, bytes);
    if (!content.ok()) {
      return content.error();
    }
    hash = Hash(*content, hash);
  }
  return HashToHex(hash);
}

Result<std::string> ReadIndex(int fd, const Footer& footer, uint64_t index_end) {
  if (footer.index_start > index_end || index_end - footer.index_start > kMaxIndexBytes) {
    return Damaged("its index is nowhere");
  }
  Result<std::string> index = ReadAt(fd, footer.index_start, index_end - footer.index_start);
  if (!index.ok()) {
    return Damaged(index.error().message);
  }
  return index;
}

// What the backend wrote, which has no manifest yet. When it cannot make the file longer, it puts
// the rest of the weights elsewhere and does not end the file.
Result<Footer> ReadBackendFooter(int fd, uint64_t size) {
  if (size >= kFooterBytes) {
    const Result<std::string> bytes = ReadAt(fd, size - kFooterBytes, kFooterBytes);
    const Result<Footer> footer = bytes.ok() ? ParseFooter(*bytes) : bytes.error();
    if (footer.ok()) {
      return footer;
    }
  }
  return Failure(StrCat("XNNPACK left its file of packed weights at ", size,
                        " bytes, unfinished; is the size of files limited (ulimit -f)?"));
}

template <typename T>
void AppendNumber(std::string& bytes, T value) {
  bytes.append(reinterpret_cast<const char*>(&value), sizeof(value));
}

}  // namespace

std::string FirstDifference(const PackedKey& a, const PackedKey& b) {
  return a.program_id != b.program_id     ? "program id"
         : a.model_bytes != b.model_bytes ? "size of the .pte"
         : a.method != b.method           ? "method"
         : a.executorch != b.executorch   ? "version of ExecuTorch"
         : a.library != b.library         ? "XNNPACK library"
         : a.cpu != b.cpu                 ? "processor"
                                          : "";
}

std::string ShortName(const PackedKey& key) {
  return HashToHex(Hash(ToJson(key).dump(-1, ' ', false, Json::error_handler_t::replace)));
}

std::vector<uint64_t> SampledPages(uint64_t bytes, size_t count) {
  const uint64_t pages = (bytes + kPageBytes - 1) / kPageBytes;
  const uint64_t taken = std::min<uint64_t>(count, pages);
  std::vector<uint64_t> places;
  for (uint64_t i = 0; i < taken; ++i) {
    places.push_back(kPageBytes * (taken == 1 ? 0 : i * (pages - 1) / (taken - 1)));
  }
  return places;
}

Result<PackedKey> ReadPackedKey(int fd) {
  const Result<Tail> tail = ReadTail(fd);
  if (!tail.ok()) {
    return tail.error();
  }
  std::optional<PackedKey> key = ToKey(tail->manifest);
  if (!key.has_value()) {
    return Damaged("its manifest is wrong");
  }
  return std::move(*key);
}

Status CheckPackedFile(int fd, const PackedKey& key) {
  const Result<Tail> tail = ReadTail(fd);
  if (!tail.ok()) {
    return tail.error();
  }
  const std::optional<PackedKey> found = ToKey(tail->manifest);
  if (!found.has_value()) {
    return Damaged("its manifest is wrong");
  }
  if (const std::string difference = FirstDifference(*found, key); !difference.empty()) {
    return InvalidInput(StrCat("is stale (of another ", difference, ")"));
  }
  if (tail->manifest.value("bytes", Json()) != tail->file_bytes) {
    return Damaged(StrCat("it has ", tail->file_bytes, " bytes, but says ",
                          tail->manifest.value("bytes", Json()).dump()));
  }
  const Result<std::string> index = ReadIndex(fd, tail->footer, tail->index_end);
  if (!index.ok()) {
    return index.error();
  }
  if (Status status = CheckIndex(*index, tail->footer); !status.ok()) {
    return status;
  }
  const Result<std::string> hash = HashOfContent(fd, tail->footer, *index);
  if (!hash.ok()) {
    return Damaged(hash.error().message);
  }
  if (tail->manifest.value("hash", Json()) != *hash) {
    return Damaged(StrCat("its hash is ", *hash, ", but it says ",
                          Escaped(tail->manifest.value("hash", Json()).dump())));
  }
  return {};
}

Result<bool> HasPackedWeights(int fd) {
  const Result<uint64_t> size = FileSize(fd);
  if (!size.ok()) {
    return size.error();
  }
  const Result<Footer> footer = ReadBackendFooter(fd, *size);
  if (!footer.ok()) {
    return footer.error();
  }
  return footer->entries > 0;
}

Status WritePackedFile(int fd, const PackedKey& key, PendingFile file) {
  const Result<uint64_t> size = FileSize(fd);
  if (!size.ok()) {
    return size.error();
  }
  const Result<Footer> footer = ReadBackendFooter(fd, *size);
  if (!footer.ok()) {
    return footer.error();
  }
  const uint64_t index_end = *size - kFooterBytes;
  const Result<std::string> index = ReadIndex(fd, *footer, index_end);
  const Result<std::string> hash = index.ok() ? HashOfContent(fd, *footer, *index) : index;
  const Result<std::string> footer_bytes = ReadAt(fd, index_end, kFooterBytes);
  if (!hash.ok() || !footer_bytes.ok()) {
    return hash.ok() ? footer_bytes.error() : hash.error();
  }

  // The manifest says how long the file is, which depends on how long the manifest is: so the
  // number is padded to the same length whatever it is.
  Json manifest = {{"version", kManifestVersion}, {"key", ToJson(key)}, {"hash", *hash}};
  const auto end = [&](uint64_t bytes) {
    manifest["bytes"] = bytes;
    std::string text = manifest.dump(-1, ' ', false, Json::error_handler_t::replace);
    text.append(20 - std::to_string(bytes).size(), ' ');
    AppendNumber(text, static_cast<uint32_t>(text.size()));
    return StrCat(text, kManifestMagic, *footer_bytes);
  };
  const uint64_t bytes = index_end + end(0).size();
  if (Status status = file.Reserve(bytes); !status.ok()) {
    return status;
  }
  for (uint64_t at = 0; at < index_end; at += kCopyBytes) {
    const Result<std::string> part = ReadAt(fd, at, std::min<uint64_t>(kCopyBytes, index_end - at));
    if (!part.ok()) {
      return part.error();
    }
    if (Status status = file.Append(*part); !status.ok()) {
      return status;
    }
  }
  return file.Commit(end(bytes), /*durable=*/true);
}

}  // namespace mvlm
