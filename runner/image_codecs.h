// The two decoders behind DecodeImage(). Each is given bytes that begin like its format.

#pragma once

#include <optional>
#include <string>
#include <string_view>

#include "mvlm/result.h"
#include "runner/image.h"

namespace mvlm {

// The error's message is only the reason, e.g. "Not a JPEG file"; DecodeImage() puts it into
// a sentence.
Result<Image> DecodeJpeg(std::string_view bytes);
Result<Image> DecodePng(std::string_view bytes);

// Why a picture of this size is refused, or nothing. Both sides are positive.
std::optional<std::string> RefuseImageSize(int64_t width, int64_t height);

}  // namespace mvlm
