// The kernels of norms, activations and depthwise convolution against plain double-precision loops,
// for every instruction set of this CPU.

#include <gtest/gtest.h>
#include <hwy/targets.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <ostream>
#include <random>
#include <string>
#include <vector>

#include "activation_kernel.h"
#include "depthwise_conv2d_kernel.h"
#include "norm_kernel.h"

namespace mvlm {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Around every number of lanes and of vectors that the kernels treat in their own way, and large.
const int64_t kWidths[] = {1,  2,  3,  4,  5,  7,  8,  9,   15,  16,  17,  31,
                           32, 33, 47, 63, 64, 65, 96, 100, 127, 255, 257, 1024};

std::vector<float> Random(int64_t count, uint32_t seed, float mean = 0.0f, float deviation = 1.0f) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(mean, deviation);
  std::vector<float> result(static_cast<size_t>(count));
  for (float& x : result) x = normal(random);
  return result;
}

bool SameBits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

// Results followed by a border that must not be touched.
class Output {
 public:
  explicit Output(int64_t count) : values_(static_cast<size_t>(count) + kBorder, kNan) {
    std::fill(values_.end() - kBorder, values_.end(), kMark);
  }
  ~Output() {
    for (size_t i = values_.size() - kBorder; i < values_.size(); ++i) {
      EXPECT_EQ(values_[i], kMark) << "written past the end";
    }
  }
  float* data() { return values_.data(); }
  float operator[](size_t i) const { return values_[i]; }
  std::vector<float> values() const { return {values_.begin(), values_.end() - kBorder}; }

 private:
  static constexpr ptrdiff_t kBorder = 64;
  static constexpr float kMark = 12345.0f;
  std::vector<float> values_;
};

class KernelsTest : public ::testing::TestWithParam<int64_t> {
 protected:
  void SetUp() override {
    hwy::SetSupportedTargetsForTest(GetParam());
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
    ASSERT_STREQ(NormTarget(), hwy::TargetName(GetParam()));
    ASSERT_STREQ(ActivationTarget(), hwy::TargetName(GetParam()));
    ASSERT_STREQ(DepthwiseConv2dTarget(), hwy::TargetName(GetParam()));
  }
  void TearDown() override {
    hwy::SetSupportedTargetsForTest(0);
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
  }
};

INSTANTIATE_TEST_SUITE_P(Targets, KernelsTest,
                         ::testing::ValuesIn(hwy::SupportedAndGeneratedTargets()),
                         [](const auto& info) { return std::string(hwy::TargetName(info.param)); });

// --- Norms ---

using NormKernel = void (*)(const Norm&, int64_t, int64_t);

// Owns the tensors of a call.
struct NormProblem {
  NormProblem(int64_t rows, int64_t width, bool adds, float mean = 0.0f, float deviation = 1.0f)
      : rows(rows),
        width(width),
        adds(adds),
        input(Random(rows * width, 1, mean, deviation)),
        residual(Random(rows * width, 2, mean, deviation)),
        weight(Random(width, 3)),
        bias(Random(width, 4)),
        sum(adds ? rows * width : 0),
        out(rows * width) {}

  Norm Call(bool has_bias, float eps) {
    return {input.data(),
            adds ? residual.data() : nullptr,
            weight.data(),
            has_bias ? bias.data() : nullptr,
            adds ? sum.data() : nullptr,
            out.data(),
            rows,
            width,
            eps};
  }

  // What is normalized, rounded as the kernel must round it.
  float Value(int64_t i) const { return adds ? input[i] + residual[i] : input[i]; }

  // Compares `sum`, to the bit, and `out`, by its distance from the definition in the unit of the
  // result, before weight and bias.
  void Check(bool is_layer_norm, float eps, double tolerance) const {
    SCOPED_TRACE(::testing::Message() << rows << " x " << width << (adds ? ", adds" : ""));
    double error = 0;
    for (int64_t row = 0; row < rows; ++row) {
      double mean = 0, squares = 0;
      for (int64_t i = 0; i < width; ++i) mean += Value(row * width + i);
      mean = is_layer_norm ? mean / static_cast<double>(width) : 0.0;
      for (int64_t i = 0; i < width; ++i) {
        squares += (Value(row * width + i) - mean) * (Value(row * width + i) - mean);
      }
      const double factor = 1 / std::sqrt(squares / static_cast<double>(width) + eps);
      for (int64_t i = 0; i < width; ++i) {
        const float x = Value(row * width + i);
        if (adds) {
          ASSERT_EQ(sum[row * width + i], x);
        }
        const double normal = (x - mean) * factor;
        const double added = is_layer_norm ? bias[i] : 0.0;
        const double expected = normal * weight[i] + added;
        const double scale = std::abs(normal * weight[i]) + std::abs(added) + std::abs(weight[i]);
        const double difference = std::abs(out[row * width + i] - expected) / scale;
        error = std::isnan(difference) ? HUGE_VAL : std::max(error, difference);
      }
    }
    EXPECT_LT(error, tolerance);
  }

  int64_t rows, width;
  bool adds;
  std::vector<float> input, residual, weight, bias;
  Output sum, out;
};

TEST_P(KernelsTest, RmsNormMatchesReference) {
  for (const bool adds : {false, true}) {
    for (const int64_t width : kWidths) {
      NormProblem problem(3, width, adds);
      RmsNorm(problem.Call(false, 1e-6f), 0, 3);
      problem.Check(false, 1e-6f, 5e-7);
    }
  }
}

TEST_P(KernelsTest, LayerNormMatchesReference) {
  for (const bool adds : {false, true}) {
    for (const int64_t width : kWidths) {
      NormProblem problem(3, width, adds);
      LayerNorm(problem.Call(true, 1e-5f), 0, 3);
      problem.Check(true, 1e-5f, 5e-7);
    }
  }
}

// A mean 10000 times the deviation: subtracting it after rounding it to float32 costs 3 digits.
TEST_P(KernelsTest, LayerNormKeepsItsPrecisionWithALargeMean) {
  for (const bool adds : {false, true}) {
    for (const int64_t width : {5, 64, 257, 1024}) {
      NormProblem problem(3, width, adds, 1000.0f, 0.1f);
      LayerNorm(problem.Call(true, 1e-5f), 0, 3);
      problem.Check(true, 1e-5f, 1e-6);
    }
  }
}

// An outlier must not serve as what is subtracted first, wherever it is.
TEST_P(KernelsTest, LayerNormKeepsItsPrecisionWithAnOutlier) {
  for (const size_t at : {0, 1, 100, 255}) {
    NormProblem problem(1, 256, false);
    problem.input[at] = 300.0f;
    LayerNorm(problem.Call(true, 1e-5f), 0, 1);
    problem.Check(true, 1e-5f, 1e-6);
  }
}

TEST_P(KernelsTest, EpsCounts) {
  NormProblem problem(2, 37, false, 0.0f, 0.01f);
  RmsNorm(problem.Call(false, 0.5f), 0, 2);
  problem.Check(false, 0.5f, 5e-7);
  LayerNorm(problem.Call(true, 0.5f), 0, 2);
  problem.Check(true, 0.5f, 5e-7);
}

TEST_P(KernelsTest, NormsOfRowsOfOneNumberAreFinite) {
  for (const float number : {0.0f, 3.0f, -1e6f}) {
    NormProblem problem(1, 40, false);
    std::fill(problem.input.begin(), problem.input.end(), number);
    LayerNorm(problem.Call(true, 1e-5f), 0, 1);
    for (size_t i = 0; i < 40; ++i) ASSERT_NEAR(problem.out[i], problem.bias[i], 1e-4);
    RmsNorm(problem.Call(false, 1e-6f), 0, 1);
    const float sign = number == 0.0f ? 0.0f : std::copysign(1.0f, number);
    for (size_t i = 0; i < 40; ++i) ASSERT_NEAR(problem.out[i], sign * problem.weight[i], 1e-6);
  }
}

TEST_P(KernelsTest, NormsPassNanOnWithinTheRow) {
  for (const NormKernel kernel : {RmsNorm, LayerNorm}) {
    NormProblem problem(3, 21, true);
    problem.input[21 + 20] = kNan;
    kernel(problem.Call(true, 1e-5f), 0, 3);
    for (size_t i = 0; i < 3 * 21; ++i) {
      ASSERT_EQ(std::isnan(problem.out[i]), i / 21 == 1) << "at " << i;
    }
  }
}

TEST_P(KernelsTest, NormsDoNotDependOnTheRanges) {
  for (const NormKernel kernel : {RmsNorm, LayerNorm}) {
    NormProblem whole(11, 75, true), parts(11, 75, true);
    kernel(whole.Call(true, 1e-5f), 0, 11);
    for (const auto& [begin, end] : {std::pair(4, 11), std::pair(0, 1), std::pair(1, 4)}) {
      kernel(parts.Call(true, 1e-5f), begin, end);
    }
    EXPECT_TRUE(SameBits(whole.out.values(), parts.out.values()));
    EXPECT_TRUE(SameBits(whole.sum.values(), parts.sum.values()));
  }
}

// --- Activations ---

double TimesSigmoid(double x, double slope) { return x / (1 + std::exp(-slope * x)); }

// From -110 to 110, small numbers more often.
std::vector<float> Arguments() {
  std::vector<float> result = {0.0f, -0.0f, 1e-30f, -1e-30f, 1e-4f, -1e-4f};
  for (int i = -11000; i <= 11000; ++i) result.push_back(static_cast<float>(i) * 0.01f);
  for (int i = -4000; i <= 4000; ++i) result.push_back(static_cast<float>(i) * 0.001f);
  return result;
}

void ExpectTimesSigmoid(float actual, float x, double slope, double factor) {
  const double expected = TimesSigmoid(x, slope) * factor;
  // The product slope * x is rounded, and so the exponential's argument is relatively to itself.
  const double tolerance =
      (4e-7 + 1.2e-7 * std::abs(slope == 1 ? 0 : slope * x)) * std::abs(expected) +
      1e-33 * std::abs(factor);
  ASSERT_LE(std::abs(actual - expected), tolerance) << "at " << x;
}

TEST_P(KernelsTest, QuickGeluMatchesReference) {
  const std::vector<float> x = Arguments();
  Output out(static_cast<int64_t>(x.size()));
  QuickGelu(x.data(), 0, static_cast<int64_t>(x.size()), out.data());
  for (size_t i = 0; i < x.size(); ++i) ExpectTimesSigmoid(out[i], x[i], 1.702f, 1);
}

TEST_P(KernelsTest, SwigluMatchesReference) {
  const std::vector<float> gate = Arguments();
  const std::vector<float> up = Random(static_cast<int64_t>(gate.size()), 6);
  std::vector<float> gate_up = gate;
  gate_up.insert(gate_up.end(), up.begin(), up.end());
  Output out(static_cast<int64_t>(gate.size()));
  Swiglu(gate_up.data(), 0, 1, static_cast<int64_t>(gate.size()), out.data());
  for (size_t i = 0; i < gate.size(); ++i) ExpectTimesSigmoid(out[i], gate[i], 1, up[i]);
}

TEST_P(KernelsTest, ActivationsOfEveryWidth) {
  for (const int64_t width : kWidths) {
    const std::vector<float> x = Random(3 * 2 * width, 7);
    Output out(3 * width);
    Swiglu(x.data(), 0, 3, width, out.data());
    for (int64_t i = 0; i < 3 * width; ++i) {
      const int64_t at = i / width * 2 * width + i % width;
      ExpectTimesSigmoid(out[i], x[at], 1, x[at + width]);
    }
    Output gelu(width);
    QuickGelu(x.data(), 0, width, gelu.data());
    for (int64_t i = 0; i < width; ++i) ExpectTimesSigmoid(gelu[i], x[i], 1.702f, 1);
  }
}

TEST_P(KernelsTest, ActivationsAtTheEndsOfFloat) {
  constexpr float kLargest = std::numeric_limits<float>::max();
  const std::vector<float> x = {kInfinity, kLargest, 1e20f, 1000.0f, -kInfinity, -kLargest,
                                -1e20f,    -1000.0f, kNan,  0.0f,    -0.0f};
  // A NaN whose low bits, shifted to the exponent, would make a number of it.
  uint32_t bits = 0x7fc00001;
  std::vector<float> gates = x;
  std::memcpy(&gates[8], &bits, sizeof(bits));
  for (size_t size = gates.size(); size < 3 * x.size(); ++size) gates.push_back(gates[size - 11]);
  const int64_t width = static_cast<int64_t>(gates.size());
  std::vector<float> gate_up = gates;
  gate_up.insert(gate_up.end(), gates.size(), 1.0f);
  Output gelu(width), swiglu(width);
  QuickGelu(gates.data(), 0, width, gelu.data());
  Swiglu(gate_up.data(), 0, 1, width, swiglu.data());
  for (const Output* out : {&gelu, &swiglu}) {
    for (size_t i = 0; i < gates.size(); ++i) {
      const size_t kind = i % x.size();
      if (kind < 4) {
        ASSERT_EQ((*out)[i], x[kind]);
      } else if (kind == 8) {
        ASSERT_TRUE(std::isnan((*out)[i]));
      } else {
        ASSERT_NEAR((*out)[i], 0.0f, 1e-34f);
      }
    }
  }
}

TEST_P(KernelsTest, ActivationsDoNotDependOnTheRanges) {
  const std::vector<float> x = Random(2 * 7 * 37, 8, 0.0f, 5.0f);
  Output whole(7 * 37), parts(7 * 37);
  Swiglu(x.data(), 0, 7, 37, whole.data());
  Swiglu(x.data(), 5, 7, 37, parts.data());
  Swiglu(x.data(), 0, 5, 37, parts.data());
  EXPECT_TRUE(SameBits(whole.values(), parts.values()));
  QuickGelu(x.data(), 0, 7 * 37, whole.data());
  for (int64_t begin = 0; begin < 7 * 37; begin += 13) {
    QuickGelu(x.data(), begin, std::min<int64_t>(7 * 37, begin + 13), parts.data());
  }
  EXPECT_TRUE(SameBits(whole.values(), parts.values()));
}

// --- Depthwise convolution ---

struct ConvProblem {
  ConvProblem(int64_t batch, int64_t rows, int64_t columns, int64_t channels, int64_t kernel_rows,
              int64_t kernel_columns, int64_t stride, int64_t padding, bool has_bias)
      : input(Random(batch * rows * columns * channels, 1)),
        weight(Random(kernel_rows * kernel_columns * channels, 2)),
        bias(has_bias ? Random(channels, 3) : std::vector<float>()),
        out_rows((rows + 2 * padding - kernel_rows) / stride + 1),
        out_columns((columns + 2 * padding - kernel_columns) / stride + 1),
        out(batch * out_rows * out_columns * channels),
        call{input.data(),   weight.data(), has_bias ? bias.data() : nullptr,
             out.data(),     batch,         rows,
             columns,        channels,      kernel_rows,
             kernel_columns, stride,        padding,
             out_rows,       out_columns} {}

  // The definition, and the sum of the terms' magnitudes, to which rounding is relative.
  std::pair<double, double> Expected(int64_t batch, int64_t row, int64_t column,
                                     int64_t channel) const {
    double sum = bias.empty() ? 0.0 : bias[channel], magnitude = std::abs(sum);
    for (int64_t i = 0; i < call.kernel_rows; ++i) {
      for (int64_t j = 0; j < call.kernel_columns; ++j) {
        const int64_t y = row * call.stride + i - call.padding;
        const int64_t x = column * call.stride + j - call.padding;
        if (y < 0 || y >= call.rows || x < 0 || x >= call.columns) continue;
        const double term =
            static_cast<double>(
                input[((batch * call.rows + y) * call.columns + x) * call.channels + channel]) *
            weight[(i * call.kernel_columns + j) * call.channels + channel];
        sum += term;
        magnitude += std::abs(term);
      }
    }
    return {sum, magnitude};
  }

  void Check() const {
    SCOPED_TRACE(::testing::Message()
                 << call.batch << " x " << call.rows << " x " << call.columns << " x "
                 << call.channels << ", kernel " << call.kernel_rows << " x " << call.kernel_columns
                 << ", stride " << call.stride << ", padding " << call.padding
                 << (bias.empty() ? "" : ", bias"));
    size_t i = 0;
    for (int64_t batch = 0; batch < call.batch; ++batch) {
      for (int64_t row = 0; row < out_rows; ++row) {
        for (int64_t column = 0; column < out_columns; ++column) {
          for (int64_t channel = 0; channel < call.channels; ++channel, ++i) {
            const auto [expected, magnitude] = Expected(batch, row, column, channel);
            ASSERT_LE(std::abs(out[i] - expected), 1e-6 * magnitude)
                << batch << ", " << row << ", " << column << ", " << channel;
          }
        }
      }
    }
  }

  std::vector<float> input, weight, bias;
  int64_t out_rows, out_columns;
  Output out;
  DepthwiseConv2d call;
};

TEST_P(KernelsTest, DepthwiseConv2dMatchesReferenceOnRandomShapes) {
  std::mt19937 random(11);
  const auto between = [&random](int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random);
  };
  const int64_t channels[] = {1, 3, 8, 13, 16, 33, 255, 256, 260, 515};
  int ran = 0;
  for (int seed = 0; seed < 400; ++seed) {
    const int64_t kernel_rows = between(1, 5), kernel_columns = between(1, 5);
    const int64_t padding = between(0, std::min(kernel_rows, kernel_columns) - 1);
    const int64_t rows = between(1, 7), columns = between(1, 14);
    if (rows + 2 * padding < kernel_rows || columns + 2 * padding < kernel_columns) continue;
    ConvProblem problem(between(1, 2), rows, columns, channels[between(0, 9)], kernel_rows,
                        kernel_columns, between(1, 4), padding, between(0, 1) == 1);
    RunDepthwiseConv2d(problem.call, 0, DepthwiseConv2dTasks(problem.call));
    problem.Check();
    ++ran;
  }
  EXPECT_GT(ran, 200);
}

TEST_P(KernelsTest, DepthwiseConv2dMatchesReferenceOnTheProjectors) {
  ConvProblem problems[] = {{1, 24, 24, 300, 3, 3, 1, 1, false},
                            {1, 24, 24, 300, 3, 3, 2, 1, false},
                            {1, 24, 24, 300, 2, 2, 2, 0, false},
                            {1, 12, 12, 300, 3, 3, 1, 1, true}};
  for (ConvProblem& problem : problems) {
    RunDepthwiseConv2d(problem.call, 0, DepthwiseConv2dTasks(problem.call));
    problem.Check();
  }
}

TEST_P(KernelsTest, DepthwiseConv2dReadsNothingOutsideTheGrid) {
  // NaN around the input would get into the sums.
  ConvProblem problem(1, 5, 6, 19, 3, 3, 1, 1, true);
  const size_t border = 8 * 19;
  std::vector<float> surrounded(border, kNan);
  surrounded.insert(surrounded.end(), problem.input.begin(), problem.input.end());
  surrounded.insert(surrounded.end(), border, kNan);
  problem.call.input = surrounded.data() + border;
  RunDepthwiseConv2d(problem.call, 0, DepthwiseConv2dTasks(problem.call));
  problem.Check();
}

TEST_P(KernelsTest, DepthwiseConv2dDoesNotDependOnTheRanges) {
  ConvProblem whole(2, 6, 7, 300, 3, 3, 1, 1, true), parts(2, 6, 7, 300, 3, 3, 1, 1, true);
  const int64_t tasks = DepthwiseConv2dTasks(whole.call);
  ASSERT_GE(tasks, 4);
  RunDepthwiseConv2d(whole.call, 0, tasks);
  for (int64_t task = tasks; task-- > 0;) RunDepthwiseConv2d(parts.call, task, task + 1);
  EXPECT_TRUE(SameBits(whole.out.values(), parts.out.values()));
}

}  // namespace
}  // namespace mvlm
