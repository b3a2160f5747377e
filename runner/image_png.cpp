// PNG through libpng.
//
// libpng reports errors by longjmp, which must not jump over objects with destructors. So every
// libpng call is made in a function that has none, and what owns something lives in DecodePng().

#include <png.h>

#include <algorithm>
#include <csetjmp>
#include <cstring>
#include <vector>

#include "runner/image_codecs.h"
#include "runner/str_cat.h"

namespace mvlm {
namespace {

struct Source {
  const char* next;
  size_t left;
  char message[128];
};

void ReadBytes(png_structp png, png_bytep out, size_t count) {
  auto* source = static_cast<Source*>(png_get_io_ptr(png));
  if (count > source->left) {
    png_error(png, "the file ends early");
  }
  std::memcpy(out, source->next, count);
  source->next += count;
  source->left -= count;
}

[[noreturn]] void EscapeWithMessage(png_structp png, png_const_charp message) {
  auto* source = static_cast<Source*>(png_get_error_ptr(png));
  std::snprintf(source->message, sizeof(source->message), "%s", message);
  png_longjmp(png, 1);
}

void IgnoreWarning(png_structp, png_const_charp) {}

// Releases what libpng holds, on every way out.
class PngReader {
 public:
  explicit PngReader(Source* source)
      : png_(png_create_read_struct(PNG_LIBPNG_VER_STRING, source, EscapeWithMessage,
                                    IgnoreWarning)),
        info_(png_ != nullptr ? png_create_info_struct(png_) : nullptr) {
    if (png_ != nullptr) {
      png_set_read_fn(png_, source, ReadBytes);
    }
  }
  PngReader(const PngReader&) = delete;
  PngReader& operator=(const PngReader&) = delete;
  ~PngReader() { png_destroy_read_struct(&png_, &info_, nullptr); }

  bool ok() const { return info_ != nullptr; }
  png_structp png() const { return png_; }
  png_infop info() const { return info_; }

 private:
  png_structp png_;
  png_infop info_;
};

struct Layout {
  png_uint_32 width;
  png_uint_32 height;
  bool is_gray16;    // rows come as 16-bit big-endian grayscale
  size_t row_bytes;  // as libpng will give them
};

// Reads up to the pixels and asks for 8-bit RGB. The one exception is 16-bit grayscale, see
// Gray16ToRgb(). False if libpng failed.
bool ReadHeader(png_structp png, png_infop info, Layout* layout) {
  if (setjmp(png_jmpbuf(png)) != 0) {  // NOLINT(cert-err52-cpp): libpng's way
    return false;
  }
  // Only RefuseImageSize() decides: libpng's own limit of a million a side is another one.
  png_set_user_limits(png, PNG_UINT_31_MAX, PNG_UINT_31_MAX);
  png_read_info(png, info);
  layout->width = png_get_image_width(png, info);
  layout->height = png_get_image_height(png, info);
  const int bit_depth = png_get_bit_depth(png, info);
  const int color_type = png_get_color_type(png, info);
  layout->is_gray16 = bit_depth == 16 && color_type == PNG_COLOR_TYPE_GRAY;
  return true;
}

bool PrepareRows(png_structp png, png_infop info, Layout* layout) {
  if (setjmp(png_jmpbuf(png)) != 0) {  // NOLINT(cert-err52-cpp): libpng's way
    return false;
  }
  const int color_type = png_get_color_type(png, info);
  if (!layout->is_gray16) {
    png_set_strip_16(png);  // keeps the high byte, like PIL; no rounding
    if (color_type == PNG_COLOR_TYPE_PALETTE) {
      png_set_palette_to_rgb(png);
    } else if ((color_type & PNG_COLOR_MASK_COLOR) == 0) {
      png_set_expand_gray_1_2_4_to_8(png);
      png_set_gray_to_rgb(png);
    }
    png_set_strip_alpha(png);
  }
  png_set_interlace_handling(png);
  png_read_update_info(png, info);
  layout->row_bytes = png_get_rowbytes(png, info);
  return true;
}

// Reads all rows to where `rows` points, and the rest of the file.
bool ReadRows(png_structp png, png_bytepp rows) {
  if (setjmp(png_jmpbuf(png)) != 0) {  // NOLINT(cert-err52-cpp): libpng's way
    return false;
  }
  png_read_image(png, rows);
  png_read_end(png, nullptr);
  return true;
}

// PIL takes 16-bit grayscale as integers and saturates them, so that only 0 to 255 is not white.
// It is odd, but it is what the reference sees.
void Gray16ToRgb(const std::vector<uint8_t>& gray, std::vector<uint8_t>* rgb) {
  for (size_t i = 0; 2 * i < gray.size(); ++i) {
    const uint8_t value = gray[2 * i] == 0 ? gray[2 * i + 1] : 255;
    std::fill_n(rgb->begin() + static_cast<ptrdiff_t>(3 * i), 3, value);
  }
}

}  // namespace

Result<Image> DecodePng(std::string_view bytes) {
  Source source = {bytes.data(), bytes.size(), ""};
  const PngReader reader(&source);
  if (!reader.ok()) {
    return Failure("out of memory");
  }
  const auto damaged = [&source] {
    return InvalidInput(StrCat("it is damaged or cut off (libpng: ", source.message, ")"));
  };

  Layout layout = {};
  if (!ReadHeader(reader.png(), reader.info(), &layout)) {
    return damaged();
  }
  if (const auto refusal = RefuseImageSize(layout.width, layout.height)) {
    return InvalidInput(*refusal);
  }
  if (!PrepareRows(reader.png(), reader.info(), &layout)) {
    return damaged();
  }

  Image image;
  image.width = layout.width;
  image.height = layout.height;
  const size_t pixels = size_t{layout.width} * layout.height;
  const size_t row_bytes = size_t{layout.width} * (layout.is_gray16 ? 2 : 3);
  if (layout.row_bytes != row_bytes) {
    return Failure(
        StrCat("libpng gives rows of ", layout.row_bytes, " bytes instead of ", row_bytes));
  }
  std::vector<uint8_t> gray16(layout.is_gray16 ? 2 * pixels : 0);
  image.rgb.resize(3 * pixels);
  uint8_t* first_row = layout.is_gray16 ? gray16.data() : image.rgb.data();
  std::vector<png_bytep> rows(layout.height);
  for (size_t y = 0; y < rows.size(); ++y) {
    rows[y] = first_row + y * row_bytes;
  }
  if (!ReadRows(reader.png(), rows.data())) {
    return damaged();
  }
  if (layout.is_gray16) {
    Gray16ToRgb(gray16, &image.rgb);
  }
  return image;
}

}  // namespace mvlm
