#include "runner/pte_file.h"

#include <sys/stat.h>

#include <cerrno>
#include <cstring>
#include <fstream>

#include "runner/str_cat.h"

namespace mvlm {
namespace {

constexpr size_t kFileIdentifierOffset = 4;
constexpr std::string_view kFileIdentifier = "ET";  // then two digits
constexpr size_t kHeaderOffset = 8;
constexpr std::string_view kHeaderMagic = "eh00";
// Magic, own length, program size, offset of the weights; then, since 2025, their size.
constexpr uint64_t kMinHeaderBytes = 24;
constexpr uint64_t kHeaderBytesWithWeightsSize = 32;

uint64_t LittleEndian(std::string_view bytes, size_t offset, size_t length) {
  uint64_t value = 0;
  for (size_t i = length; i > 0; --i) {
    value = (value << 8) | static_cast<unsigned char>(bytes[offset + i - 1]);
  }
  return value;
}

Error NotAProgram(std::string_view why) {
  return InvalidInput(
      StrCat("is not an ExecuTorch program (", why, "); make one with `python -m mvlm.export`"));
}

}  // namespace

Status CheckPteHeader(std::string_view head, uint64_t file_size) {
  if (file_size == 0) {
    return InvalidInput("is empty (0 bytes); make one with `python -m mvlm.export`");
  }
  if (head.size() < kPteHeadBytes) {
    return NotAProgram(StrCat("it has only ", file_size, " bytes"));
  }
  if (head.substr(kFileIdentifierOffset, kFileIdentifier.size()) != kFileIdentifier) {
    return NotAProgram("its bytes 4 and 5 are not \"ET\"");
  }
  const std::string_view header = head.substr(kHeaderOffset);
  if (header.substr(0, kHeaderMagic.size()) != kHeaderMagic) {
    return NotAProgram("it has no extended header, without which its length is unknown");
  }
  const uint64_t header_bytes = LittleEndian(header, 4, 4);
  if (header_bytes < kMinHeaderBytes) {
    return NotAProgram("its extended header is damaged");
  }
  const uint64_t program_bytes = LittleEndian(header, 8, 8);
  const uint64_t weights_offset = LittleEndian(header, 16, 8);
  const uint64_t weights_bytes =
      header_bytes >= kHeaderBytesWithWeightsSize ? LittleEndian(header, 24, 8) : 0;
  // Compared one by one, so that absurd values cannot overflow a sum.
  const bool is_whole = program_bytes <= file_size && weights_offset <= file_size &&
                        weights_bytes <= file_size - weights_offset;
  if (!is_whole) {
    return InvalidInput(
        StrCat("is cut off or damaged: its header speaks of a program of ", program_bytes,
               " bytes and of ", weights_bytes, " bytes of weights from byte ", weights_offset,
               " on, but the file has only ", file_size, " bytes; copy or export it again"));
  }
  return {};
}

Result<uint64_t> CheckPteFile(const std::string& path) {
  struct stat info = {};
  if (stat(path.c_str(), &info) != 0) {
    return InvalidInput(StrCat("cannot read ", path, ": ", std::strerror(errno)));
  }
  if (!S_ISREG(info.st_mode)) {
    return InvalidInput(StrCat("cannot read ", path, ": it is ",
                               S_ISDIR(info.st_mode) ? "a folder" : "not a file",
                               "; name a .pte file"));
  }
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    return InvalidInput(StrCat("cannot read ", path, ": ", std::strerror(errno)));
  }
  std::string head(kPteHeadBytes, '\0');
  file.read(head.data(), static_cast<std::streamsize>(head.size()));
  head.resize(static_cast<size_t>(file.gcount()));
  const auto size = static_cast<uint64_t>(info.st_size);
  const Status status = CheckPteHeader(head, size);
  if (!status.ok()) {
    return Error{status.error().kind, StrCat(path, " ", status.error().message)};
  }
  return size;
}

}  // namespace mvlm
