// What must hold for every picture. That the values equal PIL's is tests/runner/test_pixels.py.

#include "runner/preprocess.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>

#include "runner/memory.h"

namespace mvlm {
namespace {

constexpr std::array<uint8_t, 3> kPad = {122, 116, 104};

Image Filled(int64_t width, int64_t height, std::array<uint8_t, 3> color) {
  Image image{width, height, std::vector<uint8_t>(static_cast<size_t>(3 * width * height))};
  for (size_t i = 0; i < image.rgb.size(); ++i) {
    image.rgb[i] = color[i % 3];
  }
  return image;
}

Image Noise(int64_t width, int64_t height) {
  Image image = Filled(width, height, {});
  std::mt19937 generator(1);
  std::generate(image.rgb.begin(), image.rgb.end(),
                [&] { return static_cast<uint8_t>(generator()); });
  return image;
}

Image Transposed(const Image& image) {
  Image transposed = Filled(image.height, image.width, {});
  for (int64_t y = 0; y < image.height; ++y) {
    for (int64_t x = 0; x < image.width; ++x) {
      std::copy_n(image.rgb.begin() + 3 * (y * image.width + x), 3,
                  transposed.rgb.begin() + 3 * (x * image.height + y));
    }
  }
  return transposed;
}

TEST(PadAndResize, TheRightSizeStaysAsItIs) {
  const Image image = Noise(28, 28);
  EXPECT_EQ(PadAndResize(image, 28, kPad), image.rgb);
}

TEST(PadAndResize, OneColorStaysOneColor) {
  for (const auto& [width, height] : {std::pair{1, 1}, {7, 7}, {100, 100}, {1001, 1001}}) {
    const auto pixels = PadAndResize(Filled(width, height, {7, 200, 255}), 28, kPad);
    EXPECT_EQ(pixels, Filled(28, 28, {7, 200, 255}).rgb) << width;
  }
}

TEST(PadAndResize, APictureInThePaddingColorDisappears) {
  for (const auto& [width, height] : {std::pair{50, 3}, {3, 50}, {1000, 1}, {1, 1000}, {9, 8}}) {
    const auto pixels = PadAndResize(Filled(width, height, kPad), 28, kPad);
    EXPECT_EQ(pixels, Filled(28, 28, kPad).rgb) << width << " x " << height;
  }
}

TEST(PadAndResize, AWidePictureLiesInTheMiddle) {
  // 56 x 28 halves to 28 x 14 at rows 7 to 20; the filter reaches 2 rows further.
  const auto pixels = PadAndResize(Filled(56, 28, {255, 255, 255}), 28, kPad);
  for (size_t y = 0; y < 28; ++y) {
    const uint8_t red = pixels[3 * (28 * y + 14)];
    if (y < 5 || y > 22) {
      EXPECT_EQ(red, kPad[0]) << y;
    } else if (y >= 9 && y <= 18) {
      EXPECT_EQ(red, 255) << y;
    }
  }
}

TEST(PadAndResize, AnOddRestOfPaddingGoesBelow) {
  // 5 x 2 in a square of 5: offset floor(3 / 2) = 1, so rows 1 and 2.
  const auto pixels = PadAndResize(Filled(5, 2, {255, 255, 255}), 5, kPad);
  const std::vector<bool> expected = {false, true, true, false, false};
  for (size_t y = 0; y < 5; ++y) {
    EXPECT_EQ(pixels[15 * y] == 255, expected[y]) << y;
  }
}

TEST(PadAndResize, RowsAndColumnsAreTreatedAlike) {
  // Not bit for bit: the horizontal pass rounds first.
  const Image image = Noise(90, 40);
  const auto a = PadAndResize(image, 28, kPad);
  const auto b = Transposed({28, 28, PadAndResize(Transposed(image), 28, kPad)}).rgb;
  for (size_t i = 0; i < a.size(); ++i) {
    EXPECT_NEAR(a[i], b[i], 1) << i;
  }
}

TEST(PadAndResize, AnExtremeShapeTakesLittleMemory) {
  // Its square alone would be 480 GB; a resized copy of every row 270 MB.
  const Image tall = Filled(1, 400'000, {255, 255, 255});
  MemoryMeter meter;
  const int64_t before = meter.Sample().peak_rss_bytes;
  const auto pixels = PadAndResize(tall, 224, kPad);
  EXPECT_EQ(pixels.size(), size_t{224} * 224 * 3);
  EXPECT_LT(meter.Sample().peak_rss_bytes - before, int64_t{64} << 20);
}

TEST(Preprocess, NormalizesByChannelAndPutsChannelsFirst) {
  const ImageFormat format = {2, kPad, {0.5, 0.25, 0.0}, {0.5, 0.25, 1.0}};
  const auto values = Preprocess(Filled(2, 2, {255, 0, 51}), format);
  ASSERT_EQ(values.size(), 12u);
  for (size_t i = 0; i < 4; ++i) {
    EXPECT_FLOAT_EQ(values[i], 1.0f);
    EXPECT_FLOAT_EQ(values[4 + i], -1.0f);
    EXPECT_FLOAT_EQ(values[8 + i], 0.2f);
  }
}

}  // namespace
}  // namespace mvlm
