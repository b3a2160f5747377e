// What goes wrong with pictures. That good ones give PIL's pixels is tests/runner/test_pixels.py.

#include "runner/image.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "runner/image_codecs.h"
#include "sample_pictures.h"

namespace mvlm {
namespace {

using namespace std::string_literals;

std::string Png() { return {std::begin(testing::kPng), std::end(testing::kPng)}; }
std::string Jpeg() { return {std::begin(testing::kJpeg), std::end(testing::kJpeg)}; }

std::string Complaint(const std::string& bytes) {
  const Result<Image> image = DecodeImage(bytes, "cat.jpg");
  EXPECT_FALSE(image.ok());
  if (image.ok()) {
    return "";
  }
  EXPECT_EQ(image.error().kind, ErrorKind::kInvalidInput);
  EXPECT_NE(image.error().message.find("cat.jpg"), std::string::npos) << image.error().message;
  return image.error().message;
}

TEST(DecodeImage, ReadsPng) {
  const Result<Image> image = DecodeImage(Png(), "a.png");
  ASSERT_TRUE(image.ok());
  EXPECT_EQ(image->width, 3);
  EXPECT_EQ(image->height, 2);
  EXPECT_EQ(image->rgb, (std::vector<uint8_t>{255, 0, 0, 0, 255, 0, 0, 0, 255, 10, 20, 30, 200, 100,
                                              50, 0, 0, 0}));
}

TEST(DecodeImage, ReadsJpegWhateverItIsCalled) {
  const Result<Image> image = DecodeImage(Jpeg(), "a.png");
  ASSERT_TRUE(image.ok());
  EXPECT_EQ(image->rgb.size(), size_t{16} * 16 * 3);
  EXPECT_LT(image->rgb.front(), 40);
  EXPECT_GT(image->rgb.back(), 215);
}

TEST(DecodeImage, SaysWhatOtherContentLooksLike) {
  const std::pair<std::string, std::string> cases[] = {
      {"GIF89a and so on", "GIF"},
      {"RIFF\x10\0\0\0WEBPVP8 "s, "WebP"},
      {"BM\x36\0\0\0\0\0"s, "BMP"},
      {"II*\0\x08\0\0\0"s, "TIFF"},
      {"\0\0\0\x20"s + "ftypheic", "HEIC"},
      {"\0\0\0\x20"s + "ftypavif", "AVIF"},
      {"%PDF-1.7", "PDF"},
      {"Dear diary, t\xC3\xA9l\xC3\xA9phone\n", "text"},
      {"\x01\x02\x03\x04"s, "something else"},
  };
  for (const auto& [bytes, name] : cases) {
    const std::string complaint = Complaint(bytes);
    EXPECT_NE(complaint.find(name), std::string::npos) << complaint;
    EXPECT_NE(complaint.find("only JPEG and PNG are supported"), std::string::npos) << complaint;
  }
  EXPECT_NE(Complaint("").find("empty"), std::string::npos);
}

TEST(DecodeImage, EveryTruncationIsAnError) {
  for (const std::string& whole : {Png(), Jpeg()}) {
    ASSERT_TRUE(DecodeImage(whole, "whole").ok());
    for (size_t length = 0; length < whole.size(); ++length) {
      EXPECT_FALSE(DecodeImage(whole.substr(0, length), "cut").ok()) << length;
    }
  }
  EXPECT_NE(Complaint(Png().substr(0, 50)).find("cut off"), std::string::npos);
  EXPECT_NE(Complaint(Jpeg().substr(0, Jpeg().size() - 20)).find("cut off"), std::string::npos);
}

TEST(DecodeImage, NoDamagedByteDoesHarm) {
  for (const std::string& whole : {Png(), Jpeg()}) {
    for (size_t at = 0; at < whole.size(); ++at) {
      for (const unsigned char flip : {0x01, 0x80, 0xFF}) {
        std::string damaged = whole;
        damaged[at] = static_cast<char>(static_cast<unsigned char>(damaged[at]) ^ flip);
        const Result<Image> image = DecodeImage(damaged, "damaged");
        if (image.ok()) {
          EXPECT_EQ(image->rgb.size(), static_cast<size_t>(3 * image->width * image->height));
        }
      }
    }
  }
}

TEST(DecodeImage, RefusesHugePicturesBeforeTakingMemory) {
  EXPECT_FALSE(RefuseImageSize(20'000, 10).has_value());
  EXPECT_FALSE(RefuseImageSize(kMaxImagePixels, 1).has_value());
  EXPECT_TRUE(RefuseImageSize(kMaxImagePixels + 1, 1).has_value());
  EXPECT_TRUE(RefuseImageSize(INT32_MAX, INT32_MAX).has_value());
  // A JPEG that claims 65,000 x 65,000 pixels: the size stands 5 bytes after its SOF0 marker.
  std::string huge = Jpeg();
  const size_t frame = huge.find("\xFF\xC0");
  ASSERT_NE(frame, std::string::npos);
  huge.replace(frame + 5, 4, "\xFD\xE8\xFD\xE8");
  EXPECT_NE(Complaint(huge).find("65000 x 65000"), std::string::npos);
}

TEST(LoadImage, NamesAFileThatCannotBeRead) {
  const Result<Image> image = LoadImage("/nonexistent/cat.jpg");
  ASSERT_FALSE(image.ok());
  EXPECT_NE(image.error().message.find("/nonexistent/cat.jpg: No such file"), std::string::npos);
}

}  // namespace
}  // namespace mvlm
