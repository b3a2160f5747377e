// The kernel against plain loops with exact integer sums, for every instruction set of this CPU.

#include "quantized_linear.h"

#include <gtest/gtest.h>
#include <hwy/targets.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <ostream>
#include <random>
#include <string>
#include <thread>
#include <vector>

namespace mvlm {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Sizes {
  int64_t rows;
  int64_t in;
  int64_t out;
  int64_t group;
};

std::ostream& operator<<(std::ostream& out, const Sizes& s) {
  out << s.rows << " rows, " << s.in << " -> " << s.out;
  return s.group == 0 ? out << ", 8 bits" : out << ", 4 bits in groups of " << s.group;
}

// A bfloat16 is the upper half of a float.
uint16_t ToBfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return static_cast<uint16_t>(bits >> 16);
}

float FromBfloat16(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// Memory that ends where the heap block ends, so that AddressSanitizer sees reads past it, and that
// is not aligned.
template <typename T>
class Unaligned {
 public:
  explicit Unaligned(const std::vector<T>& values) : bytes_(values.size() * sizeof(T) + 1) {
    const char* const from = reinterpret_cast<const char*>(values.data());
    std::copy_n(from, values.size() * sizeof(T), bytes_.data() + 1);
  }
  const void* data() const { return bytes_.data() + 1; }

 private:
  std::vector<char> bytes_;
};

class Problem {
 public:
  Problem(const Sizes& sizes, uint32_t seed) : sizes_(sizes), random_(seed) {
    std::uniform_int_distribution<int> weight(sizes.group == 0 ? -128 : -8,
                                              sizes.group == 0 ? 127 : 7);
    weights_.resize(sizes.in * sizes.out);
    for (int& w : weights_) w = weight(random_);
    const int64_t scales = sizes.group == 0 ? sizes.out : sizes.out * (sizes.in / sizes.group);
    std::uniform_real_distribution<float> scale(0.001f, 0.02f);
    for (int64_t i = 0; i < scales; ++i) {
      scales_.push_back(FromBfloat16(ToBfloat16(scale(random_))));
    }
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < sizes.out; ++i) bias_.push_back(normal(random_));
    for (int64_t row = 0; row < sizes.rows; ++row) {
      // Rows differ in size and in where their zero point is.
      const float magnitude = std::exp(normal(random_));
      const float shift = 2 * normal(random_);
      for (int64_t i = 0; i < sizes.in; ++i) {
        input_.push_back(magnitude * (normal(random_) + shift));
      }
    }
  }

  std::vector<int>& weights() { return weights_; }
  std::vector<float>& input() { return input_; }
  void RemoveBias() { bias_.clear(); }

  std::vector<float> Run(int64_t threads) const {
    std::vector<uint8_t> packed;
    std::vector<uint16_t> halves;
    if (sizes_.group == 0) {
      for (int w : weights_) packed.push_back(static_cast<uint8_t>(w));
    } else {
      for (size_t i = 0; i < weights_.size(); i += 2) {
        packed.push_back(static_cast<uint8_t>((weights_[i] + 8) | (weights_[i + 1] + 8) << 4));
      }
      for (float scale : scales_) halves.push_back(ToBfloat16(scale));
    }
    const Unaligned<uint8_t> weight(packed);
    const Unaligned<uint16_t> half_scales(halves);
    const std::vector<float> input = input_;  // for AddressSanitizer: without spare capacity
    std::vector<float> output(sizes_.rows * sizes_.out, kNan);
    QuantizedLinear linear;
    linear.weight = weight.data();
    linear.scales = sizes_.group == 0 ? scales_.data() : half_scales.data();
    linear.bias = bias_.empty() ? nullptr : bias_.data();
    linear.in = sizes_.in;
    linear.out = sizes_.out;
    linear.group = sizes_.group;

    const size_t scratch_bytes = LinearScratchBytes(linear, sizes_.rows, threads);
    EXPECT_EQ(scratch_bytes % kLinearScratchAlignment, 0u);
    const std::unique_ptr<void, decltype(&std::free)> scratch(
        std::aligned_alloc(kLinearScratchAlignment, scratch_bytes), &std::free);
    std::memset(scratch.get(), 0xff, scratch_bytes);  // NaN
    RunQuantizedLinear(linear, input.data(), sizes_.rows, output.data(), threads, scratch.get(),
                       [](int64_t count, const auto& body) {
                         std::vector<std::thread> others;
                         for (int64_t i = 1; i < count; ++i) {
                           others.emplace_back([&body, i] { body(i, i + 1); });
                         }
                         body(0, 1);
                         for (std::thread& thread : others) thread.join();
                       });
    return output;
  }

  // The definition. Also returns, per output, the sum of the magnitudes that are added up, which is
  // what rounding errors are relative to.
  void Reference(std::vector<double>* result, std::vector<double>* magnitudes) const {
    const int64_t group = sizes_.group == 0 ? sizes_.in : sizes_.group;
    std::vector<int> q(sizes_.in);
    for (int64_t row = 0; row < sizes_.rows; ++row) {
      const float* const x = &input_[row * sizes_.in];
      // In float, as XNNPACK does it.
      const float low = std::min(0.0f, *std::min_element(x, x + sizes_.in));
      const float high = std::max(0.0f, *std::max_element(x, x + sizes_.in));
      const float scale = low == high ? 1.0f : 255.0f / (high - low);
      const volatile float scaled_low = low * scale, scaled_high = high * scale;
      const float zero_point_error = (-128.0f + scaled_low) + (127.0f + scaled_high);
      const float zero_point = zero_point_error > 0 ? -128.0f - scaled_low : 127.0f - scaled_high;
      const int zero = std::lrint(std::min(std::max(zero_point, -128.0f), 127.0f));
      for (int64_t k = 0; k < sizes_.in; ++k) {
        const volatile float scaled = x[k] * scale;
        const int quantized = static_cast<int>(std::lrint(scaled)) + zero;
        q[k] = std::min(std::max(quantized, -128), 127) - zero;
      }
      const double inverse = 1.0f / scale;
      for (int64_t n = 0; n < sizes_.out; ++n) {
        double sum = bias_.empty() ? 0.0 : bias_[n];
        double magnitude = std::abs(sum);
        for (int64_t g = 0; g < sizes_.in / group; ++g) {
          int64_t exact = 0;
          for (int64_t k = g * group; k < (g + 1) * group; ++k) {
            exact += q[k] * weights_[n * sizes_.in + k];
          }
          const double part = exact * inverse * scales_[n * (sizes_.in / group) + g];
          sum += part;
          magnitude += std::abs(part);
        }
        result->push_back(sum);
        magnitudes->push_back(magnitude);
      }
    }
  }

  void Check() const {
    const std::vector<float> actual = Run(1);
    std::vector<double> expected, magnitudes;
    Reference(&expected, &magnitudes);
    for (size_t i = 0; i < actual.size(); ++i) {
      const double error = std::abs(actual[i] - expected[i]);
      // Few rows add up a group's lanes in float: they round parts that may be larger than the sum.
      const double slack = sizes_.group != 0 && sizes_.rows <= 3 ? 3e-6 : 1e-6;
      ASSERT_LE(error, slack * magnitudes[i] + 1e-30)
          << sizes_ << ": output " << i << " is " << actual[i] << ", not " << expected[i];
    }
  }

 private:
  Sizes sizes_;
  std::mt19937 random_;
  std::vector<int> weights_;
  std::vector<float> scales_;
  std::vector<float> bias_;
  std::vector<float> input_;
};

class QuantizedLinearTest : public ::testing::TestWithParam<int64_t> {
 protected:
  void SetUp() override {
    hwy::SetSupportedTargetsForTest(GetParam());
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
    ASSERT_STREQ(LinearTarget(), hwy::TargetName(GetParam()));
  }
  void TearDown() override {
    hwy::SetSupportedTargetsForTest(0);
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
  }
};

std::vector<int64_t> Targets() {
  std::vector<int64_t> targets;
  for (int64_t rest = hwy::SupportedTargets() & HWY_TARGETS; rest != 0; rest &= rest - 1) {
    targets.push_back(rest & -rest);
  }
  return targets;
}

INSTANTIATE_TEST_SUITE_P(Targets, QuantizedLinearTest, ::testing::ValuesIn(Targets()),
                         [](const auto& info) { return std::string(hwy::TargetName(info.param)); });

TEST_P(QuantizedLinearTest, MatchesDefinitionWith4Bits) {
  for (int64_t group : {32, 64, 128, 256}) {
    for (int64_t rows = 1; rows <= 9; ++rows) {
      // Groups are odd in number, columns fill no panel, and there is more than one panel in depth.
      for (int64_t out : {1, 37}) Problem({rows, 3 * group, out, group}, 1).Check();
      Problem({rows, 1024 + group, 19, group}, 2).Check();
    }
  }
}

TEST_P(QuantizedLinearTest, MatchesDefinitionWith8Bits) {
  for (int64_t rows = 1; rows <= 9; ++rows) {
    for (int64_t in : {1, 2, 3, 15, 16, 17, 63, 100, 513, 1030}) {
      for (int64_t out : {1, 37}) Problem({rows, in, out, 0}, 3).Check();
    }
  }
}

TEST_P(QuantizedLinearTest, MatchesDefinitionWithManyRows) {
  Problem({190, 256, 70, 128}, 4).Check();
  Problem({577, 160, 33, 32}, 5).Check();
  Problem({577, 100, 66, 0}, 6).Check();
  // More than a task has.
  Problem({1601, 64, 5, 64}, 7).Check();
  Problem({1601, 20, 5, 0}, 8).Check();
}

TEST_P(QuantizedLinearTest, WorksWithoutBias) {
  for (const Sizes& sizes :
       {Sizes{1, 128, 9, 64}, Sizes{7, 128, 9, 64}, Sizes{1, 128, 9, 0}, Sizes{7, 128, 9, 0}}) {
    Problem problem(sizes, 9);
    problem.RemoveBias();
    problem.Check();
  }
}

TEST_P(QuantizedLinearTest, NothingSaturates) {
  for (int64_t rows : {1, 3, 5}) {
    for (int64_t group : {0, 32, 64, 128, 256}) {
      for (int weight : {-1, 1}) {
        for (float other : {-1.0f, 0.0f, 1.0f}) {
          Problem problem({rows, 1024, 18, group}, 10);
          const int extreme = group == 0 ? (weight < 0 ? -128 : 127) : (weight < 0 ? -8 : 7);
          std::fill(problem.weights().begin(), problem.weights().end(), extreme);
          // Quantized to -128 and to 127 throughout, but for a number that spans the range.
          for (float value : {-1.0f, 1.0f}) {
            std::fill(problem.input().begin(), problem.input().end(), value);
            for (int64_t row = 0; row < rows; ++row) problem.input()[row * 1024 + 777] = other;
            problem.Check();
          }
        }
      }
    }
  }
}

// How many weights are multiplied apart depends on their distribution.
TEST_P(QuantizedLinearTest, WeightsOfAnyDistribution) {
  for (int64_t rows : {4, 17, 70}) {
    for (double deviation : {0.1, 5.0, 20.0, 40.0, 80.0, 1000.0}) {
      Problem problem({rows, 1030, 19, 0}, 15);
      std::mt19937 random(16);
      std::normal_distribution<double> weight(0, deviation);
      for (int& w : problem.weights()) {
        w = static_cast<int>(std::nearbyint(std::min(127.0, std::max(-128.0, weight(random)))));
      }
      problem.Check();
    }
  }
}

// It also depends on the range that the numbers at a k have.
TEST_P(QuantizedLinearTest, NumbersOfAnyRange) {
  constexpr int64_t kIn = 1030;
  std::mt19937 random(19);
  std::uniform_real_distribution<float> center(-1, 1);
  for (int64_t rows : {4, 17, 70}) {
    for (float width : {0.0f, 0.02f, 0.5f, 2.0f}) {
      for (unsigned negative : {1, 8, 15}) {  // of sixteen weights
        Problem problem({rows, kIn, 19, 0}, 20);
        for (int& w : problem.weights()) w = random() % 16 < negative ? -128 : 127;
        std::vector<float>& input = problem.input();
        for (int64_t k = 0; k < kIn; ++k) {
          std::uniform_int_distribution<int> side(0, 1);
          const float middle = center(random);
          for (int64_t row = 0; row < rows; ++row) {
            const float number = middle + width * (static_cast<float>(side(random)) - 0.5f);
            input[row * kIn + k] = std::min(1.0f, std::max(-1.0f, number));
          }
        }
        // All rows have the same scale.
        for (int64_t row = 0; row < rows; ++row) {
          input[row * kIn] = -1;
          input[row * kIn + 1] = 1;
        }
        problem.Check();
      }
    }
  }
}

// Few rows: groups without and with numbers that are further from the zero point than 8 bits go.
TEST_P(QuantizedLinearTest, GroupsFarFromTheZeroPoint) {
  for (int64_t group : {32, 64, 128, 256}) {
    for (float largest : {4.0f, 6.0f, 400.0f, -6.0f}) {
      Problem problem({3, 4 * group, 9, group}, 17);
      std::mt19937 random(18);
      std::uniform_real_distribution<float> number(-3, 3);
      for (float& x : problem.input()) x = number(random);
      for (int64_t row = 0; row < 3; ++row) {
        problem.input()[row * 4 * group + row * group + 5] = largest;
      }
      problem.Check();
    }
  }
}

TEST_P(QuantizedLinearTest, AnyNumberOfThreadsGivesTheSameBits) {
  for (const Sizes& sizes :
       {Sizes{1, 2048, 300, 128}, Sizes{3, 1024, 301, 32}, Sizes{45, 512, 301, 128},
        Sizes{800, 64, 77, 64}, Sizes{1, 2048, 300, 0}, Sizes{45, 515, 301, 0}}) {
    const Problem problem(sizes, 11);
    const std::vector<float> one = problem.Run(1);
    for (int64_t threads : {2, 3, 7}) {
      const std::vector<float> several = problem.Run(threads);
      EXPECT_EQ(std::memcmp(one.data(), several.data(), one.size() * sizeof(float)), 0)
          << sizes << ", " << threads << " threads";
    }
  }
}

TEST_P(QuantizedLinearTest, ConstantAndZeroRows) {
  for (int64_t rows : {2, 8}) {
    for (int64_t group : {0, 64}) {
      for (float value : {0.0f, -0.0f, 3.5f, -1e-3f, 1e30f}) {
        Problem problem({rows, 192, 21, group}, 12);
        std::fill(problem.input().begin(), problem.input().end(), value);
        problem.Check();
      }
    }
  }
}

TEST_P(QuantizedLinearTest, RowsThatAreNotFinitePoisonThemselvesOnly) {
  for (int64_t rows : {2, 8}) {
    for (int64_t group : {0, 64}) {
      for (int64_t at : {0, 100, 191}) {
        for (float value : {kNan, kInfinity, -kInfinity}) {
          Problem problem({rows, 192, 21, group}, 13);
          const std::vector<float> before = problem.Run(1);
          problem.input()[192 + at] = value;
          const std::vector<float> after = problem.Run(1);
          for (size_t i = 0; i < after.size(); ++i) {
            if (i / 21 == 1) {
              EXPECT_TRUE(std::isnan(after[i])) << rows << " rows, " << group << ", " << value;
            } else {
              EXPECT_EQ(after[i], before[i]);
            }
          }
        }
      }
    }
  }
}

// Ranges whose scale overflows: neither may crash or be silently wrong.
TEST_P(QuantizedLinearTest, ExtremeRanges) {
  for (int64_t rows : {1, 5}) {
    for (int64_t group : {0, 32}) {
      Problem problem({rows, 64, 3, group}, 14);
      problem.RemoveBias();
      std::fill(problem.input().begin(), problem.input().end(), 1e-42f);
      for (float y : problem.Run(1)) EXPECT_LT(std::abs(y), 1e-30f);
      for (size_t i = 0; i < problem.input().size(); ++i) {
        problem.input()[i] = i % 2 ? 3e38f : -3e38f;
      }
      for (float y : problem.Run(1)) EXPECT_TRUE(std::isnan(y));
    }
  }
}

TEST(LinearIsFasterHereTest, OnX86Only) {
#if !HWY_ARCH_X86
  EXPECT_FALSE(LinearIsFasterHere());
#endif
  EXPECT_EQ(LinearIsFasterHere(), LinearIsFasterHere());
}

}  // namespace
}  // namespace mvlm
