// The kernel against a plain double-precision loop, for every instruction set of this CPU.

#include "attention_kernel.h"

#include <gtest/gtest.h>
#include <hwy/targets.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <iterator>
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
constexpr KeyValues kCaches[] = {KeyValues::kFloat32Cache, KeyValues::kFloat16Cache,
                                 KeyValues::kInt8Cache};

// IEEE half precision by its definition.
double FromHalf(uint16_t bits) {
  const int exponent = bits >> 10 & 31;
  const int fraction = bits & 1023;
  const double sign = bits & 0x8000 ? -1 : 1;
  if (exponent == 31) return fraction ? kNan : sign * HUGE_VAL;
  return sign *
         (exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25));
}

// The half that is nearest to `value`, of two the even one. Finite values only.
uint16_t ToHalf(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const double magnitude = std::abs(static_cast<double>(value));
  if (magnitude >= 65520) return sign | 0x7c00;
  int exponent;
  std::frexp(magnitude, &exponent);
  const int unit = std::max(exponent - 11, -24);  // of the last place, as a power of two
  const double units = std::nearbyint(std::ldexp(magnitude, -unit));  // ties to even
  // 1024 units or more are a normal number, whose bits count on past the exponent.
  const int bits = units == 0 ? 0 : static_cast<int>(units) + 1024 * (unit + 24);
  return sign | static_cast<uint16_t>(bits);
}

struct Sizes {
  KeyValues key_values;
  int64_t tokens;
  int64_t heads;
  int64_t kv_heads;
  int64_t head_dim;
  int64_t capacity;
  int64_t start_pos;
};

std::ostream& operator<<(std::ostream& out, const Sizes& s) {
  return out << "keys " << static_cast<int>(s.key_values) << ", " << s.tokens << " tokens at "
             << s.start_pos << " of " << s.capacity << ", " << s.heads << "/" << s.kv_heads
             << " heads of " << s.head_dim;
}

Sizes Uncached(int64_t tokens, int64_t heads, int64_t head_dim) {
  return {KeyValues::kProjection, tokens, heads, heads, head_dim, 0, 0};
}

// A cache as bytes, of any type, with a scale per head and position.
struct Cache {
  std::vector<char> bytes;
  std::vector<float> scales;
};

// Owns the tensors of a call. The caches hold random numbers before start_pos and rubbish from
// there on (NaN, or for integers NaN scales), `out` holds NaN.
class Problem {
 public:
  Problem(const Sizes& sizes, uint32_t seed, float magnitude = 1.0f)
      : sizes_(sizes), random_(seed), magnitude_(magnitude) {
    qkv_ = Random(sizes.tokens * (sizes.heads + 2 * sizes.kv_heads) * sizes.head_dim);
    out_.assign(sizes.tokens * sizes.heads * sizes.head_dim, kNan);
    if (!cached()) return;
    for (Cache* cache : {&keys_, &values_}) {
      cache->bytes.assign(sizes.kv_heads * sizes.capacity * sizes.head_dim * ElementBytes(), -1);
      cache->scales.assign(sizes.kv_heads * sizes.capacity, kNan);
      for (int64_t head = 0; head < sizes.kv_heads; ++head) {
        for (int64_t position = 0; position < sizes.start_pos; ++position) {
          Write(*cache, head, position, Random(sizes.head_dim));
        }
      }
    }
    for (int64_t i = 0; i < sizes.capacity * sizes.head_dim / 2; ++i) {
      const double angle = std::uniform_real_distribution<double>(-3, 3)(random_);
      cos_.push_back(static_cast<float>(std::cos(angle)));
      sin_.push_back(static_cast<float>(std::sin(angle)));
    }
  }

  AttentionCall Call() {
    AttentionCall call = {};
    call.key_values = sizes_.key_values;
    call.qkv = qkv_.data();
    call.out = out_.data();
    call.tokens = sizes_.tokens;
    call.heads = sizes_.heads;
    call.kv_heads = sizes_.kv_heads;
    call.head_dim = sizes_.head_dim;
    call.scale = Scale();
    if (!cached()) return call;
    call.key_cache = keys_.bytes.data();
    call.value_cache = values_.bytes.data();
    if (sizes_.key_values == KeyValues::kInt8Cache) {
      call.key_scales = keys_.scales.data();
      call.value_scales = values_.scales.data();
    }
    call.cos = cos_.data();
    call.sin = sin_.data();
    call.capacity = sizes_.capacity;
    call.start_pos = sizes_.start_pos;
    return call;
  }

  // What the caches must hold afterwards.
  Cache ExpectedKeys() const { return Written(keys_, sizes_.heads, true); }
  Cache ExpectedValues() const { return Written(values_, sizes_.heads + sizes_.kv_heads, false); }

  // Attention by its definition, over caches that have been written.
  std::vector<double> Reference() const {
    const int64_t dim = sizes_.head_dim;
    const int64_t group = sizes_.heads / sizes_.kv_heads;
    std::vector<double> result(out_.size(), 0.0);
    for (int64_t token = 0; token < sizes_.tokens; ++token) {
      for (int64_t head = 0; head < sizes_.heads; ++head) {
        const std::vector<float> query = Projected(token, head, cached());
        const int64_t visible = cached() ? sizes_.start_pos + token + 1 : sizes_.tokens;
        std::vector<double> scores(visible, 0.0);
        for (int64_t j = 0; j < visible; ++j) {
          const std::vector<double> key = Seen(keys_, sizes_.heads, head / group, j);
          for (int64_t i = 0; i < dim; ++i) scores[j] += static_cast<double>(query[i]) * key[i];
          scores[j] *= Scale();
        }
        const double largest = *std::max_element(scores.begin(), scores.end());
        double sum = 0;
        for (double& score : scores) sum += score = std::exp(score - largest);
        for (int64_t j = 0; j < visible; ++j) {
          const std::vector<double> value =
              Seen(values_, sizes_.heads + sizes_.kv_heads, head / group, j);
          for (int64_t i = 0; i < dim; ++i) {
            result[(token * sizes_.heads + head) * dim + i] += scores[j] / sum * value[i];
          }
        }
      }
    }
    return result;
  }

  std::vector<float>& qkv() { return qkv_; }
  const Cache& keys() const { return keys_; }
  const Cache& values() const { return values_; }
  const std::vector<float>& out() const { return out_; }

 private:
  bool cached() const { return sizes_.key_values != KeyValues::kProjection; }
  float Scale() const { return 1.0f / std::sqrt(static_cast<float>(sizes_.head_dim)); }

  int64_t ElementBytes() const {
    return sizes_.key_values == KeyValues::kFloat32Cache   ? 4
           : sizes_.key_values == KeyValues::kFloat16Cache ? 2
                                                           : 1;
  }

  std::vector<float> Random(int64_t count) {
    std::normal_distribution<float> normal(0.0f, magnitude_);
    std::vector<float> result(static_cast<size_t>(count));
    for (float& x : result) x = normal(random_);
    return result;
  }

  // A head of `qkv`, counted over queries, keys and values, in the precision of the kernel.
  std::vector<float> Projected(int64_t token, int64_t head, bool rotated) const {
    const int64_t dim = sizes_.head_dim;
    const float* const x = &qkv_[(token * (sizes_.heads + 2 * sizes_.kv_heads) + head) * dim];
    std::vector<float> result(x, x + dim);
    for (int64_t i = 0; rotated && i < dim / 2; ++i) {
      const int64_t angle = (sizes_.start_pos + token) * (dim / 2) + i;
      // volatile: products are rounded, whatever the compiler would like to fuse.
      const volatile float ac = x[i] * cos_[angle], bs = x[i + dim / 2] * sin_[angle];
      const volatile float bc = x[i + dim / 2] * cos_[angle], as = x[i] * sin_[angle];
      result[i] = ac - bs;
      result[i + dim / 2] = bc + as;
    }
    return result;
  }

  void Write(Cache& cache, int64_t head, int64_t position, const std::vector<float>& x) const {
    const int64_t row = head * sizes_.capacity + position;
    char* const to = &cache.bytes[row * sizes_.head_dim * ElementBytes()];
    float maximum = 0;
    for (const float v : x) maximum = std::max(maximum, std::abs(v));
    for (int64_t i = 0; i < sizes_.head_dim; ++i) {
      if (sizes_.key_values == KeyValues::kFloat32Cache) {
        std::memcpy(to + 4 * i, &x[i], 4);
      } else if (sizes_.key_values == KeyValues::kFloat16Cache) {
        const uint16_t half = ToHalf(x[i]);
        std::memcpy(to + 2 * i, &half, 2);
      } else {
        const float factor = maximum == 0 ? 0 : 127.0f / maximum;
        // By way of a signed type: char has no sign on Arm.
        to[i] = static_cast<char>(static_cast<int8_t>(std::nearbyint(x[i] * factor)));
        cache.scales[row] = maximum / 127.0f;
      }
    }
  }

  Cache Written(const Cache& before, int64_t first_head, bool rotated) const {
    Cache result = before;
    for (int64_t token = 0; token < sizes_.tokens; ++token) {
      for (int64_t head = 0; head < sizes_.kv_heads; ++head) {
        Write(result, head, sizes_.start_pos + token, Projected(token, first_head + head, rotated));
      }
    }
    return result;
  }

  // The key or value that a query sees.
  std::vector<double> Seen(const Cache& cache, int64_t first_head, int64_t head,
                           int64_t position) const {
    if (!cached()) {
      const std::vector<float> x = Projected(position, first_head + head, false);
      return {x.begin(), x.end()};
    }
    std::vector<double> result;
    const int64_t row = head * sizes_.capacity + position;
    const char* const from = &cache.bytes[row * sizes_.head_dim * ElementBytes()];
    for (int64_t i = 0; i < sizes_.head_dim; ++i) {
      float x;
      uint16_t half;
      if (sizes_.key_values == KeyValues::kFloat32Cache) {
        std::memcpy(&x, from + 4 * i, 4);
        result.push_back(x);
      } else if (sizes_.key_values == KeyValues::kFloat16Cache) {
        std::memcpy(&half, from + 2 * i, 2);
        result.push_back(FromHalf(half));
      } else {
        result.push_back(static_cast<double>(cache.scales[row]) *
                         static_cast<signed char>(from[i]));
      }
    }
    return result;
  }

  Sizes sizes_;
  std::mt19937 random_;
  float magnitude_;
  std::vector<float> qkv_, out_, cos_, sin_;
  Cache keys_, values_;
};

// Scratch of exactly the size that the kernel asks for, with a border that it must not touch.
class Scratch {
 public:
  explicit Scratch(size_t bytes)
      : bytes_(bytes),
        memory_(static_cast<char*>(std::aligned_alloc(kScratchAlignment, bytes + kBorder)),
                &std::free) {
    std::memset(memory_.get(), kMark, bytes + kBorder);
  }
  ~Scratch() {
    for (size_t i = 0; i < kBorder; ++i) {
      EXPECT_EQ(memory_.get()[bytes_ + i], kMark) << "scratch overrun at byte " << i;
    }
  }
  void* get() const { return memory_.get(); }

 private:
  static constexpr size_t kBorder = 4 * kScratchAlignment;
  static constexpr char kMark = 0x5a;
  size_t bytes_;
  std::unique_ptr<char, void (*)(void*)> memory_;
};

void RunOnOneThread(const AttentionCall& call) {
  const Scratch scratch(AttentionScratchBytes(call));
  RunAttention(call, 1, scratch.get(), [](int64_t count, const auto& body) { body(0, count); });
}

void RunOnThreads(const AttentionCall& call, int64_t workers) {
  const Scratch scratch(AttentionScratchBytes(call) * static_cast<size_t>(workers));
  RunAttention(call, workers, scratch.get(), [](int64_t count, const auto& body) {
    std::vector<std::thread> threads;
    for (int64_t i = 0; i < count; ++i) threads.emplace_back([&body, i] { body(i, i + 1); });
    for (std::thread& thread : threads) thread.join();
  });
}

bool SameBits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

bool SameBits(const Cache& a, const Cache& b) {
  return a.bytes == b.bytes && SameBits(a.scales, b.scales);
}

// Runs the call and compares `out` and both caches with what they must be.
void ExpectCorrect(const Sizes& sizes, uint32_t seed, float magnitude = 1.0f) {
  SCOPED_TRACE(::testing::Message() << sizes << ", seed " << seed);
  Problem problem(sizes, seed, magnitude);
  if (sizes.key_values == KeyValues::kProjection) {
    RunOnOneThread(problem.Call());
  } else {
    const Cache keys = problem.ExpectedKeys();
    const Cache values = problem.ExpectedValues();
    RunOnOneThread(problem.Call());
    EXPECT_TRUE(SameBits(problem.keys(), keys));
    EXPECT_TRUE(SameBits(problem.values(), values));
  }

  const std::vector<double> expected = problem.Reference();
  double error = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    const double difference = std::abs(problem.out()[i] - expected[i]);
    error = std::isnan(difference) ? HUGE_VAL : std::max(error, difference);
  }
  // Scores of magnitude s carry an absolute error of about s * 2^-24, outputs that much relatively;
  // scores grow with the square of the inputs.
  EXPECT_LT(error, 3e-6 * magnitude * std::max(1.0f, magnitude * magnitude));
}

class KernelTest : public ::testing::TestWithParam<int64_t> {
 protected:
  void SetUp() override {
    hwy::SetSupportedTargetsForTest(GetParam());
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
    ASSERT_STREQ(AttentionTarget(), hwy::TargetName(GetParam()));
  }
  void TearDown() override {
    hwy::SetSupportedTargetsForTest(0);
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
  }
};

TEST_P(KernelTest, MatchesReferenceOnRandomShapes) {
  constexpr int64_t kHeadDims[] = {2, 4, 6, 8, 14, 16, 30, 32, 40, 64, 78, 80, 96, 128, 130};
  std::mt19937 random(7);
  const auto between = [&random](int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random);
  };
  for (uint32_t seed = 0; seed < 60; ++seed) {
    Sizes sizes = {};
    sizes.key_values = kCaches[between(0, 2)];
    sizes.head_dim = kHeadDims[between(0, std::size(kHeadDims) - 1)];
    sizes.kv_heads = between(1, 3);
    sizes.heads = sizes.kv_heads * between(1, 4);
    sizes.capacity = between(1, 160);
    sizes.tokens = between(1, sizes.capacity);
    sizes.start_pos = between(0, sizes.capacity - sizes.tokens);
    ExpectCorrect(sizes, seed);
  }
}

TEST_P(KernelTest, MatchesReferenceAtTheEdges) {
  for (const KeyValues cache : kCaches) {
    for (const int64_t head_dim : {64, 80, 128, 34}) {
      for (const int64_t tokens : {1, 2, 99, 100}) {
        ExpectCorrect({cache, tokens, 4, 2, head_dim, 100, 0}, 1);
        ExpectCorrect({cache, tokens, 4, 2, head_dim, 100, 100 - tokens}, 2);
      }
    }
  }
}

// Every number of rows around the widths at which the kernel changes its way of working.
TEST_P(KernelTest, MatchesReferenceForEveryFewTokens) {
  for (const KeyValues cache : kCaches) {
    for (int64_t tokens = 1; tokens <= 52; ++tokens) {
      ExpectCorrect({cache, tokens, 2, 2, 20, 130, 70}, 3);
    }
  }
}

// Positions around multiples of the key block.
TEST_P(KernelTest, MatchesReferenceForEveryPosition) {
  for (const KeyValues cache : kCaches) {
    for (int64_t position = 0; position < 140; ++position) {
      ExpectCorrect({cache, 1, 4, 2, 24, 140, position}, 4);
    }
  }
}

// More rows than a task has, and one more.
TEST_P(KernelTest, MatchesReferenceOverSeveralTasks) {
  for (const int64_t tokens : {385, 430}) {
    ExpectCorrect({KeyValues::kFloat32Cache, tokens, 1, 1, 8, 440, 7}, 5);
    ExpectCorrect({KeyValues::kInt8Cache, tokens / 2, 2, 1, 8, 440, 7}, 5);
    ExpectCorrect(Uncached(tokens, 2, 8), 5);
  }
}

TEST_P(KernelTest, MatchesReferenceWithoutACache) {
  for (const int64_t head_dim : {1, 3, 8, 33, 64, 80}) {
    for (const int64_t tokens : {1, 2, 5, 23, 24, 25, 65, 101}) {
      ExpectCorrect(Uncached(tokens, 2, head_dim), 6);
    }
  }
  ExpectCorrect(Uncached(197, 3, 64), 6);
}

TEST_P(KernelTest, SurvivesScoresThatWouldOverflowExp) {
  for (const KeyValues cache : kCaches) {
    ExpectCorrect({cache, 40, 2, 1, 64, 90, 50}, 5, 20.0f);
    ExpectCorrect({cache, 1, 2, 1, 64, 90, 89}, 6, 20.0f);
  }
  ExpectCorrect(Uncached(70, 2, 64), 7, 20.0f);
}

TEST_P(KernelTest, OneVisibleKeyGivesItsValue) {
  Problem problem({KeyValues::kFloat32Cache, 1, 4, 2, 38, 9, 0}, 8);
  RunOnOneThread(problem.Call());
  for (int64_t head = 0; head < 4; ++head) {
    for (int64_t i = 0; i < 38; ++i) {
      ASSERT_EQ(problem.out()[head * 38 + i], problem.qkv()[(6 + head / 2) * 38 + i]);
    }
  }
}

// Every half, the numbers halfway between two, and their neighbours.
TEST_P(KernelTest, RoundsToHalvesCorrectly) {
  std::vector<float> numbers;
  for (int bits = 0; bits < 0x7bff; ++bits) {
    const float low = static_cast<float>(FromHalf(static_cast<uint16_t>(bits)));
    const float high = static_cast<float>(FromHalf(static_cast<uint16_t>(bits + 1)));
    const float middle = (low + high) / 2;
    for (const float x :
         {low, middle, std::nextafter(middle, 0.0f), std::nextafter(middle, 1e9f)}) {
      numbers.push_back(bits % 2 ? x : -x);
    }
  }
  for (const float x : {65504.0f, 65519.9f, 65520.0f, 65535.0f, 65536.0f, 1e30f, 1e-30f}) {
    numbers.push_back(x);
    numbers.push_back(-x);
  }
  numbers.resize(numbers.size() / 126 * 126);
  const int64_t tokens = static_cast<int64_t>(numbers.size()) / 126;
  Problem problem({KeyValues::kFloat16Cache, tokens, 1, 1, 126, tokens, 0}, 1);
  std::fill(problem.qkv().begin(), problem.qkv().end(), 0.0f);
  for (int64_t token = 0; token < tokens; ++token) {
    std::copy_n(&numbers[token * 126], 126, &problem.qkv()[(token * 3 + 2) * 126]);
  }
  const AttentionCall call = problem.Call();
  const Scratch scratch(AttentionScratchBytes(call));
  WriteCache(call, 0, scratch.get());
  for (size_t i = 0; i < numbers.size(); ++i) {
    uint16_t half;
    std::memcpy(&half, &problem.values().bytes[2 * i], 2);
    ASSERT_EQ(half, ToHalf(numbers[i])) << numbers[i];
  }
}

TEST_P(KernelTest, QuantizesZeroAndWhatIsNotFinite) {
  constexpr int64_t kTokens = 6, kDim = 20;
  Problem problem({KeyValues::kInt8Cache, kTokens, 1, 1, kDim, kTokens, 0}, 1);
  const float values[kTokens] = {0.0f, 1e-38f, 1e-29f, kNan, HUGE_VALF, 3.0f};
  for (int64_t token = 0; token < kTokens; ++token) {
    float* const value = &problem.qkv()[(token * 3 + 2) * kDim];
    std::fill_n(value, kDim, 0.0f);
    value[token % 2 ? 3 : kDim - 1] = values[token];  // in a whole vector, and in the rest
    value[1] = -values[token] / 2;
  }
  const AttentionCall call = problem.Call();
  const Scratch scratch(AttentionScratchBytes(call));
  WriteCache(call, 0, scratch.get());
  for (int64_t token = 0; token < kTokens; ++token) {
    const float scale = problem.values().scales[token];
    const auto* const integers =
        reinterpret_cast<const int8_t*>(&problem.values().bytes[token * kDim]);
    const bool finite = std::isfinite(values[token]);
    const bool zero = !finite || values[token] < 1e-30f;
    if (finite) {
      EXPECT_EQ(scale, zero ? 0.0f : values[token] / 127.0f) << token;
    } else {
      EXPECT_TRUE(std::isnan(scale)) << token;
    }
    EXPECT_EQ(integers[token % 2 ? 3 : kDim - 1], zero ? 0 : 127) << token;
    EXPECT_EQ(integers[1], zero ? 0 : -64) << token;  // -63.5: ties to even
    EXPECT_EQ(integers[2], 0) << token;
  }
}

TEST_P(KernelTest, StepByStepEqualsAllAtOnce) {
  constexpr int64_t kTokens = 70, kHeads = 4, kKvHeads = 2, kDim = 48;
  for (const KeyValues cache : kCaches) {
    Problem whole({cache, kTokens, kHeads, kKvHeads, kDim, kTokens, 0}, 9);
    Problem steps({cache, kTokens, kHeads, kKvHeads, kDim, kTokens, 0}, 9);
    RunOnOneThread(whole.Call());
    for (int64_t done = 0; done < kTokens;) {
      AttentionCall call = steps.Call();
      call.tokens = done == 0 ? 37 : 1 + done % 3;
      call.tokens = std::min(call.tokens, kTokens - done);
      call.start_pos = done;
      call.qkv += done * (kHeads + 2 * kKvHeads) * kDim;
      call.out += done * kHeads * kDim;
      RunOnOneThread(call);
      done += call.tokens;
    }
    EXPECT_TRUE(SameBits(whole.keys(), steps.keys()));
    EXPECT_TRUE(SameBits(whole.values(), steps.values()));
    for (size_t i = 0; i < whole.out().size(); ++i) {
      ASSERT_NEAR(whole.out()[i], steps.out()[i], 2e-6);
    }
  }
}

TEST_P(KernelTest, AnyNumberOfThreadsGivesTheSameBits) {
  std::vector<Sizes> all = {Uncached(401, 3, 16)};
  for (const KeyValues cache : kCaches) {
    all.push_back({cache, 190, 4, 4, 32, 256, 11});
    all.push_back({cache, 200, 4, 2, 8, 256, 11});  // several tasks per kv head
    all.push_back({cache, 1, 8, 4, 64, 256, 200});
    all.push_back({cache, 7, 6, 3, 18, 64, 57});
  }
  for (const Sizes& sizes : all) {
    SCOPED_TRACE(::testing::Message() << sizes);
    Problem one(sizes, 10);
    RunOnOneThread(one.Call());
    for (const int64_t workers : {2, 3, 8}) {
      Problem many(sizes, 10);
      RunOnThreads(many.Call(), workers);
      EXPECT_TRUE(SameBits(one.out(), many.out())) << workers << " threads";
      EXPECT_TRUE(SameBits(one.keys(), many.keys())) << workers << " threads";
      EXPECT_TRUE(SameBits(one.values(), many.values())) << workers << " threads";
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Targets, KernelTest,
                         ::testing::ValuesIn(hwy::SupportedAndGeneratedTargets()),
                         [](const auto& info) { return std::string(hwy::TargetName(info.param)); });

TEST(AttentionWorkers, DependOnTheAmountOfWork) {
  constexpr KeyValues kCache = KeyValues::kFloat32Cache;
  Problem decode_early({kCache, 1, 4, 4, 64, 768, 3}, 1);
  EXPECT_EQ(AttentionWorkers(decode_early.Call(), 8), 1);
  Problem decode_late({kCache, 1, 16, 16, 128, 768, 700}, 1);
  EXPECT_EQ(AttentionWorkers(decode_late.Call(), 8), 8);
  Problem prefill({kCache, 190, 16, 16, 128, 768, 0}, 1);
  EXPECT_EQ(AttentionWorkers(prefill.Call(), 8), 8);
  EXPECT_EQ(AttentionWorkers(prefill.Call(), 1), 1);
  Problem vision(Uncached(577, 16, 64), 1);
  EXPECT_EQ(AttentionWorkers(vision.Call(), 8), 8);
  // Never more than there are tasks.
  Problem one_head({kCache, 1, 8, 1, 128, 4096, 4095}, 1);
  EXPECT_EQ(AttentionWorkers(one_head.Call(), 8), 1);
}

TEST(AttentionScratchBytes, AreFewForOneToken) {
  Problem decode({KeyValues::kInt8Cache, 1, 16, 16, 128, 768, 700}, 1);
  EXPECT_LE(AttentionScratchBytes(decode.Call()), 1024u);
}

}  // namespace
}  // namespace mvlm
