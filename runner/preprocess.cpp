#include "runner/preprocess.h"

#include <algorithm>
#include <cmath>
#include <cstddef>

namespace mvlm {
namespace {

// PIL resizes 8-bit pictures with fixed-point weights of this many fractional bits: 32 less 8 for
// the pixel and 2 for the sum, which can go above 255 or below 0 because bicubic weights do.
constexpr int kFractionBits = 32 - 8 - 2;
constexpr int32_t kHalf = int32_t{1} << (kFractionBits - 1);

constexpr double kBicubicSupport = 2.0;

// Keys' cubic convolution kernel with a = -0.5, as in PIL.
double Bicubic(double x) {
  constexpr double a = -0.5;
  x = std::abs(x);
  if (x < 1.0) {
    return ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0;
  }
  if (x < 2.0) {
    return (((x - 5.0) * x + 8.0) * x - 4.0) * a;
  }
  return 0.0;
}

uint8_t ToByte(int32_t fixed_point) {
  return static_cast<uint8_t>(std::clamp(fixed_point >> kFractionBits, 0, 255));
}

// The inputs that one output is a weighted sum of.
struct Window {
  int64_t begin;          // first input
  int64_t end;            // one past the last
  const int32_t* weight;  // fixed point, one for every input in [begin, end)
};

// One-dimensional resampling from `in_size` to `out_size` samples, as weights. Antialiased: when
// the picture shrinks, the kernel widens with it.
class Resampling {
 public:
  Resampling(int64_t in_size, int64_t out_size) {
    const double scale = static_cast<double>(in_size) / static_cast<double>(out_size);
    const double widening = std::max(scale, 1.0);
    const double narrowing = 1.0 / widening;
    const double support = kBicubicSupport * widening;
    windows_.reserve(static_cast<size_t>(out_size));
    std::vector<size_t> offsets;
    std::vector<double> window;
    for (int64_t out = 0; out < out_size; ++out) {
      const double center = (static_cast<double>(out) + 0.5) * scale;
      const auto begin = std::max<int64_t>(static_cast<int64_t>(center - support + 0.5), 0);
      const auto end = std::min(static_cast<int64_t>(center + support + 0.5), in_size);
      window.clear();
      double sum = 0.0;
      for (int64_t in = begin; in < end; ++in) {
        window.push_back(Bicubic((static_cast<double>(in) - center + 0.5) * narrowing));
        sum += window.back();
      }
      offsets.push_back(weights_.size());
      for (const double weight : window) {
        const double normalized = sum != 0.0 ? weight / sum : weight;
        const double fixed_point = normalized * static_cast<double>(int32_t{1} << kFractionBits);
        weights_.push_back(static_cast<int32_t>(fixed_point + (normalized < 0.0 ? -0.5 : 0.5)));
      }
      windows_.push_back({begin, end, nullptr});
    }
    for (size_t i = 0; i < windows_.size(); ++i) {
      windows_[i].weight = weights_.data() + offsets[i];
    }
  }
  Resampling(const Resampling&) = delete;
  Resampling& operator=(const Resampling&) = delete;

  // By output; begin and end never decrease.
  const std::vector<Window>& windows() const { return windows_; }

 private:
  std::vector<int32_t> weights_;
  std::vector<Window> windows_;
};

int32_t SumOfWeights(const Window& window, int64_t begin, int64_t end) {
  int32_t sum = 0;
  for (int64_t in = std::max(begin, window.begin); in < std::min(end, window.end); ++in) {
    sum += window.weight[in - window.begin];
  }
  return sum;
}

// The horizontal pass over one row of the square. A row is `pad_color` except for
// [left, left + width), so that the padding's share of every output is a constant.
class RowResizer {
 public:
  RowResizer(const Resampling& resampling, int64_t left, int64_t width,
             const std::array<uint8_t, 3>& pad_color)
      : windows_(resampling.windows()), left_(left), right_(left + width) {
    const auto touches = [this](const Window& window) {
      return window.begin < right_ && window.end > left_;
    };
    const auto first = std::find_if(windows_.begin(), windows_.end(), touches);
    const auto last = std::find_if_not(first, windows_.end(), touches);
    first_ = static_cast<size_t>(first - windows_.begin());
    last_ = static_cast<size_t>(last - windows_.begin());
    for (const Window& window : windows_) {
      const int32_t outside =
          SumOfWeights(window, window.begin, left_) + SumOfWeights(window, right_, window.end);
      const int32_t inside = SumOfWeights(window, left_, right_);
      for (const uint8_t color : pad_color) {
        // PIL's sum begins with a half, so that the final shift rounds.
        padding_share_.push_back(kHalf + outside * color);
        padding_row_.push_back(ToByte(kHalf + (outside + inside) * color));
      }
    }
  }

  // A row that is all padding: [size, 3].
  const std::vector<uint8_t>& padding_row() const { return padding_row_; }

  // `row` is [width, 3], the picture's part of the row; `out` is [size, 3] and holds padding_row()
  // or what this wrote into it before: outputs that see only padding are left alone.
  void Resize(const uint8_t* row, std::vector<uint8_t>* out) const {
    for (size_t x = first_; x < last_; ++x) {
      const Window& window = windows_[x];
      const int64_t begin = std::max(window.begin, left_);
      const int64_t end = std::min(window.end, right_);
      int32_t red = padding_share_[3 * x];
      int32_t green = padding_share_[3 * x + 1];
      int32_t blue = padding_share_[3 * x + 2];
      for (int64_t in = begin; in < end; ++in) {
        const int32_t weight = window.weight[in - window.begin];
        const uint8_t* pixel = row + 3 * (in - left_);
        red += weight * pixel[0];
        green += weight * pixel[1];
        blue += weight * pixel[2];
      }
      (*out)[3 * x] = ToByte(red);
      (*out)[3 * x + 1] = ToByte(green);
      (*out)[3 * x + 2] = ToByte(blue);
    }
  }

 private:
  const std::vector<Window>& windows_;
  int64_t left_;
  int64_t right_;
  size_t first_;  // outputs [first_, last_) see the picture
  size_t last_;
  std::vector<int32_t> padding_share_;  // [size, 3]
  std::vector<uint8_t> padding_row_;    // [size, 3]
};

}  // namespace

std::vector<uint8_t> PadAndResize(const Image& image, int64_t size,
                                  const std::array<uint8_t, 3>& pad_color) {
  const int64_t side = std::max(image.width, image.height);
  const int64_t left = (side - image.width) / 2;
  const int64_t top = (side - image.height) / 2;
  const int64_t bottom = top + image.height;

  const Resampling resampling(side, size);  // the square's rows and columns alike
  const std::vector<Window>& windows = resampling.windows();
  const RowResizer rows(resampling, left, image.width, pad_color);
  const size_t row_length = 3 * static_cast<size_t>(size);

  // The vertical pass, turned inside out: instead of gathering, for every output row, the input
  // rows under its window, every input row is resized once and added to the output rows that want
  // it. Integer sums do not mind the order, and no input row has to be kept. The rows of padding
  // are all alike and are added at once.
  std::vector<int32_t> sums(static_cast<size_t>(size) * row_length);  // [size, size, 3]
  for (size_t y = 0; y < windows.size(); ++y) {
    const Window& window = windows[y];
    const int32_t padding_weight =
        SumOfWeights(window, window.begin, top) + SumOfWeights(window, bottom, window.end);
    for (size_t i = 0; i < row_length; ++i) {
      sums[y * row_length + i] = kHalf + padding_weight * rows.padding_row()[i];
    }
  }
  std::vector<uint8_t> row = rows.padding_row();
  size_t first = 0;  // the first output row whose window may still hold the input row
  for (int64_t in = top; in < bottom; ++in) {
    rows.Resize(image.rgb.data() + 3 * (in - top) * image.width, &row);
    while (first < windows.size() && windows[first].end <= in) {
      ++first;
    }
    for (size_t y = first; y < windows.size() && windows[y].begin <= in; ++y) {
      const int32_t weight = windows[y].weight[in - windows[y].begin];
      int32_t* sum = sums.data() + y * row_length;
      for (size_t i = 0; i < row_length; ++i) {
        sum[i] += weight * row[i];
      }
    }
  }

  std::vector<uint8_t> resized(sums.size());
  std::transform(sums.begin(), sums.end(), resized.begin(), ToByte);
  return resized;
}

std::vector<float> Preprocess(const Image& image, const ImageFormat& format) {
  const std::vector<uint8_t> pixels = PadAndResize(image, format.size, format.pad_color);
  const size_t plane = pixels.size() / 3;
  std::vector<float> values(pixels.size());
  for (size_t channel = 0; channel < 3; ++channel) {
    std::array<float, 256> normalized;
    const auto mean = static_cast<float>(format.mean[channel]);
    const auto std = static_cast<float>(format.std[channel]);
    for (size_t byte = 0; byte < normalized.size(); ++byte) {
      const auto rescaled = static_cast<float>(static_cast<double>(byte) * (1.0 / 255.0));
      normalized[byte] = (rescaled - mean) / std;
    }
    for (size_t i = 0; i < plane; ++i) {
      values[channel * plane + i] = normalized[pixels[3 * i + channel]];
    }
  }
  return values;
}

}  // namespace mvlm
