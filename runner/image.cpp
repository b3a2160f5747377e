#include "runner/image.h"

#include <algorithm>

#include "runner/file.h"
#include "runner/image_codecs.h"
#include "runner/str_cat.h"
#include "runner/utf8.h"

namespace mvlm {
namespace {

using namespace std::string_view_literals;  // the signatures contain zero bytes

// No photograph is larger; kMaxImagePixels uncompressed pixels of 16-bit RGBA would be 1.4 GB.
constexpr uint64_t kMaxImageFileBytes = uint64_t{1} << 30;

constexpr std::string_view kJpegSignature = "\xFF\xD8\xFF"sv;
constexpr std::string_view kPngSignature = "\x89PNG\r\n\x1A\n"sv;

bool StartsWith(std::string_view bytes, std::string_view prefix) {
  return bytes.substr(0, prefix.size()) == prefix;
}

bool LooksLikeText(std::string_view bytes) {
  const std::string_view head = bytes.substr(0, 512);
  // The cut may go through a character.
  const size_t valid = ValidUtf8PrefixLength(head);
  if (valid + IncompleteUtf8SuffixLength(head) != head.size()) {
    return false;
  }
  return std::none_of(head.begin(), head.end(), [](char c) {
    return static_cast<unsigned char>(c) < 0x20 && c != '\n' && c != '\r' && c != '\t';
  });
}

// What content that is neither JPEG nor PNG seems to be, for the message.
std::string_view GuessContent(std::string_view bytes) {
  struct Signature {
    size_t offset;
    std::string_view bytes;
    std::string_view name;
  };
  static constexpr Signature kSignatures[] = {
      {0, "GIF8"sv, "a GIF picture"},
      {8, "WEBP"sv, "a WebP picture"},
      {0, "BM"sv, "a BMP picture"},
      {0, "II*\0"sv, "a TIFF picture"},
      {0, "MM\0*"sv, "a TIFF picture"},
      {4, "ftypavif"sv, "an AVIF picture"},
      {4, "ftyphei"sv, "a HEIC picture"},
      {4, "ftypmif1"sv, "a HEIC picture"},
      {4, "ftyp"sv, "a video"},
      {0, "\0\0\0\x0CjP"sv, "a JPEG 2000 picture"},
      {0, "\xFF\x0A"sv, "a JPEG XL picture"},
      {0, "8BPS"sv, "a Photoshop file"},
      {0, "%PDF"sv, "a PDF document"},
      {0, "PK\x03\x04"sv, "a ZIP archive"},
      {0, "<svg"sv, "an SVG drawing"},
  };
  for (const Signature& signature : kSignatures) {
    if (bytes.size() > signature.offset &&
        StartsWith(bytes.substr(signature.offset), signature.bytes)) {
      return signature.name;
    }
  }
  return LooksLikeText(bytes) ? "text" : "something else";
}

}  // namespace

std::optional<std::string> RefuseImageSize(int64_t width, int64_t height) {
  // Both are below 2^32, so the product fits.
  if (width * height <= kMaxImagePixels) {
    return std::nullopt;
  }
  return StrCat("its ", width, " x ", height, " pixels are more than the ", kMaxImagePixels,
                " that are accepted; scale it down");
}

Result<Image> DecodeImage(std::string_view bytes, const std::string& name) {
  if (bytes.empty()) {
    return InvalidInput(StrCat(name, " is empty (0 bytes); give a JPEG or PNG picture"));
  }
  const bool is_jpeg = StartsWith(bytes, kJpegSignature);
  if (!is_jpeg && !StartsWith(bytes, kPngSignature)) {
    return InvalidInput(StrCat(name, " is not a picture that can be read: its content looks like ",
                               GuessContent(bytes),
                               "; only JPEG and PNG are supported (whatever the file is called)"));
  }
  Result<Image> image = is_jpeg ? DecodeJpeg(bytes) : DecodePng(bytes);
  if (!image.ok()) {
    return InvalidInput(StrCat("cannot read ", name, " as a ", is_jpeg ? "JPEG" : "PNG",
                               " picture: ", image.error().message));
  }
  return image;
}

Result<Image> LoadImage(const std::string& path) {
  Result<std::string> bytes = ReadFile(path, kMaxImageFileBytes);
  if (!bytes.ok()) {
    return bytes.error();
  }
  return DecodeImage(*bytes, path);
}

}  // namespace mvlm
