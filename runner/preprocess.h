// From a picture to what the vision encoder takes: centered on a square, resized, normalized.
// Pure functions.

#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "runner/image.h"

namespace mvlm {

// Read from the .pte.
struct ImageFormat {
  int64_t size = 0;                       // side of the square, in pixels
  std::array<uint8_t, 3> pad_color = {};  // RGB
  std::array<double, 3> mean = {};        // by channel, for values in 0..1
  std::array<double, 3> std = {};         // by channel, for values in 0..1; not 0
};

// Puts `image` in the middle of a square of its longer side (offset rounded down), filled with
// `pad_color`, and resizes that to `size` x `size`: [size, size, 3] bytes. Equal, byte for byte,
// to PIL's `resize((size, size), Image.BICUBIC)` of the padded picture.
//
// The square itself is never made, nor is any part of it: beside the picture this takes
// 4 * 3 * size^2 bytes and the filter's coefficients, whatever the picture's shape. A picture of
// 20,000 x 10 pixels would otherwise need 1.2 GB. `image` has at least one pixel, size >= 1.
std::vector<uint8_t> PadAndResize(const Image& image, int64_t size,
                                  const std::array<uint8_t, 3>& pad_color);

// PadAndResize(), then (value / 255 - mean) / std: [3, size, size] floats. Equal to
// CLIPImageProcessor's pixel values for the padded picture, which rescales in double and
// normalizes in float.
std::vector<float> Preprocess(const Image& image, const ImageFormat& format);

}  // namespace mvlm
