// From the bytes of a JPEG or PNG file to 8-bit RGB.

#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "mvlm/result.h"

namespace mvlm {

struct Image {
  int64_t width = 0;
  int64_t height = 0;
  std::vector<uint8_t> rgb;  // [height, width, 3], no padding between rows
};

// A picture with more pixels is refused before any memory is taken for it: a small file can claim
// to be huge. It is the number at which PIL refuses (twice its MAX_IMAGE_PIXELS).
inline constexpr int64_t kMaxImagePixels = 2 * (int64_t{1024} * 1024 * 1024 / 4 / 3);

// Decodes a JPEG or PNG picture; which of the two is seen from the content. Gives the same pixels
// as PIL's `Image.open(...).convert("RGB")`:
//   - grayscale is repeated in all channels, a palette is looked up, 1, 2 and 4 bits are stretched
//     to 8; of 16 bits the high byte is taken, but 16-bit grayscale saturates at 255, as in PIL;
//   - alpha is dropped, not composited: what lies under transparent pixels shows;
//   - CMYK and YCCK JPEGs are taken to be inverted, as Adobe's are, and have no color profile
//     applied;
//   - EXIF orientation is not applied.
//
// InvalidInput if the content is neither, is damaged or ends early, or has too many pixels.
// `name` stands for the picture in messages.
Result<Image> DecodeImage(std::string_view bytes, const std::string& name);

// Reads and decodes a file.
Result<Image> LoadImage(const std::string& path);

}  // namespace mvlm
