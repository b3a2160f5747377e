// JPEG through libjpeg-turbo.
//
// libjpeg reports errors by longjmp, which must not jump over objects with destructors. So every
// libjpeg call is made in ReadJpeg(), which has none, and what owns something lives in
// DecodeJpeg().

// jpeglib.h needs FILE and size_t declared before it.
#include <cstddef>
#include <cstdio>
// clang-format off
#include <jpeglib.h>
#include <jerror.h>
// clang-format on

#include <algorithm>
#include <csetjmp>
#include <vector>

#include "runner/image_codecs.h"
#include "runner/str_cat.h"

namespace mvlm {
namespace {

struct ErrorManager {
  jpeg_error_mgr base;  // must be first: libjpeg hands back a pointer to it
  std::jmp_buf escape;
  char message[JMSG_LENGTH_MAX];
};

[[noreturn]] void EscapeWithMessage(j_common_ptr info) {
  auto* errors = reinterpret_cast<ErrorManager*>(info->err);
  errors->base.format_message(info, errors->message);
  std::longjmp(errors->escape, 1);
}

// Called for warnings (level -1) and traces (level >= 0). libjpeg goes on after a warning; after
// these three the rest of the picture would be gray or garbage, and the answer about it wrong.
void HandleWarning(j_common_ptr info, int level) {
  if (level >= 0) {
    return;
  }
  switch (info->err->msg_code) {
    case JWRN_JPEG_EOF:
    case JWRN_HIT_MARKER:
    case JWRN_HUFF_BAD_CODE:
      EscapeWithMessage(info);
    default:
      break;
  }
}

void IgnoreMessage(j_common_ptr) {}

// Releases what libjpeg holds, on every way out.
class JpegDecompressor {
 public:
  JpegDecompressor() {
    info_.err = jpeg_std_error(&errors_.base);
    errors_.base.error_exit = EscapeWithMessage;
    errors_.base.emit_message = HandleWarning;
    errors_.base.output_message = IgnoreMessage;
    errors_.message[0] = '\0';
  }
  JpegDecompressor(const JpegDecompressor&) = delete;
  JpegDecompressor& operator=(const JpegDecompressor&) = delete;
  ~JpegDecompressor() { jpeg_destroy_decompress(&info_); }

  jpeg_decompress_struct& info() { return info_; }
  ErrorManager& errors() { return errors_; }

 private:
  jpeg_decompress_struct info_ = {};
  ErrorManager errors_ = {};
};

// a * b / 255, rounded, for a and b in 0..255.
int MultiplyDivideBy255(int a, int b) {
  const int product = a * b + 128;
  return ((product >> 8) + product) >> 8;
}

// Adobe's programs write CMYK inverted: 255 means no ink. PIL takes every CMYK JPEG to be so, and
// then composes a channel's light as what black leaves less what the colored ink takes of that.
void InvertedCmykToRgb(const uint8_t* cmyk, uint8_t* rgb, size_t pixels) {
  for (size_t i = 0; i < pixels; ++i) {
    const int not_black = cmyk[4 * i + 3];
    for (size_t channel = 0; channel < 3; ++channel) {
      const int ink = 255 - cmyk[4 * i + channel];
      rgb[3 * i + channel] =
          static_cast<uint8_t>(std::max(0, not_black - MultiplyDivideBy255(ink, not_black)));
    }
  }
}

// False if libjpeg failed; `errors.message` says why.
bool ReadHeader(jpeg_decompress_struct& info, ErrorManager& errors, std::string_view bytes) {
  if (setjmp(errors.escape) != 0) {  // NOLINT(cert-err52-cpp): libjpeg's way
    return false;
  }
  jpeg_create_decompress(&info);
  // Older libjpegs declare the bytes as not const; none writes to them.
  jpeg_mem_src(&info, reinterpret_cast<unsigned char*>(const_cast<char*>(bytes.data())),
               static_cast<unsigned long>(bytes.size()));
  jpeg_read_header(&info, TRUE);
  return true;
}

// `rgb` has room for the picture, `row` for one row of CMYK if that is what it is.
bool ReadPixels(jpeg_decompress_struct& info, ErrorManager& errors, uint8_t* rgb, uint8_t* row) {
  if (setjmp(errors.escape) != 0) {  // NOLINT(cert-err52-cpp): libjpeg's way
    return false;
  }
  const bool is_cmyk = info.num_components == 4;
  info.out_color_space = is_cmyk ? JCS_CMYK : JCS_RGB;
  jpeg_start_decompress(&info);
  const size_t row_bytes = size_t{3} * info.output_width;
  while (info.output_scanline < info.output_height) {
    uint8_t* out = rgb + info.output_scanline * row_bytes;
    JSAMPROW target = is_cmyk ? row : out;
    jpeg_read_scanlines(&info, &target, 1);
    if (is_cmyk) {
      InvertedCmykToRgb(row, out, info.output_width);
    }
  }
  // Reads on to the end marker, so a file without it counts as cut off.
  jpeg_finish_decompress(&info);
  return true;
}

}  // namespace

Result<Image> DecodeJpeg(std::string_view bytes) {
  JpegDecompressor decompressor;
  jpeg_decompress_struct& info = decompressor.info();
  ErrorManager& errors = decompressor.errors();
  const auto damaged = [&errors] {
    return InvalidInput(StrCat("it is damaged or cut off (libjpeg: ", errors.message, ")"));
  };

  if (!ReadHeader(info, errors, bytes)) {
    return damaged();
  }
  if (info.num_components != 1 && info.num_components != 3 && info.num_components != 4) {
    return InvalidInput(StrCat("it has ", info.num_components,
                               " color channels; 1 (grayscale), 3 (color) and 4 (CMYK) are known"));
  }
  if (const auto refusal = RefuseImageSize(info.image_width, info.image_height)) {
    return InvalidInput(*refusal);
  }

  Image image;
  image.width = info.image_width;
  image.height = info.image_height;
  image.rgb.resize(size_t{3} * info.image_width * info.image_height);
  std::vector<uint8_t> row(info.num_components == 4 ? size_t{4} * info.image_width : 0);
  if (!ReadPixels(info, errors, image.rgb.data(), row.data())) {
    return damaged();
  }
  return image;
}

}  // namespace mvlm
