// The kernel against a plain double-precision loop, for every instruction set of this CPU.

#include "cached_attention.h"

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

struct Sizes {
  int64_t tokens;
  int64_t heads;
  int64_t kv_heads;
  int64_t head_dim;
  int64_t capacity;
  int64_t start_pos;
};

std::ostream& operator<<(std::ostream& out, const Sizes& s) {
  return out << s.tokens << " tokens at " << s.start_pos << " of " << s.capacity << ", " << s.heads
             << "/" << s.kv_heads << " heads of " << s.head_dim;
}

// Owns the tensors of a call. The caches hold random numbers before start_pos and NaN from there
// on, `out` holds NaN.
class Problem {
 public:
  Problem(const Sizes& sizes, uint32_t seed, float magnitude = 1.0f)
      : sizes_(sizes), random_(seed) {
    const int64_t token = sizes.head_dim * sizes.tokens;
    query_ = Random(token * sizes.heads, magnitude);
    key_ = Random(token * sizes.kv_heads, magnitude);
    value_ = Random(token * sizes.kv_heads, magnitude);
    const int64_t per_head = sizes.capacity * sizes.head_dim;
    key_cache_ = Random(per_head * sizes.kv_heads, magnitude);
    value_cache_ = Random(per_head * sizes.kv_heads, magnitude);
    for (int64_t head = 0; head < sizes.kv_heads; ++head) {
      for (int64_t i = sizes.start_pos * sizes.head_dim; i < per_head; ++i) {
        key_cache_[head * per_head + i] = kNan;
        value_cache_[head * per_head + i] = kNan;
      }
    }
    out_.assign(query_.size(), kNan);
  }

  CachedAttention Call() {
    return {query_.data(),
            key_.data(),
            value_.data(),
            key_cache_.data(),
            value_cache_.data(),
            out_.data(),
            sizes_.tokens,
            sizes_.heads,
            sizes_.kv_heads,
            sizes_.head_dim,
            sizes_.capacity,
            sizes_.start_pos,
            1.0f / std::sqrt(static_cast<float>(sizes_.head_dim))};
  }

  // What the caches must hold afterwards.
  std::vector<float> Written(const std::vector<float>& cache,
                             const std::vector<float>& added) const {
    std::vector<float> result = cache;
    for (int64_t token = 0; token < sizes_.tokens; ++token) {
      for (int64_t head = 0; head < sizes_.kv_heads; ++head) {
        std::copy_n(&added[(token * sizes_.kv_heads + head) * sizes_.head_dim], sizes_.head_dim,
                    &result[(head * sizes_.capacity + sizes_.start_pos + token) * sizes_.head_dim]);
      }
    }
    return result;
  }

  // Attention by its definition, over caches that have been written.
  std::vector<double> Reference(float scale) const {
    const int64_t dim = sizes_.head_dim;
    const int64_t group = sizes_.heads / sizes_.kv_heads;
    std::vector<double> result(out_.size(), 0.0);
    for (int64_t token = 0; token < sizes_.tokens; ++token) {
      for (int64_t head = 0; head < sizes_.heads; ++head) {
        const int64_t offset = (token * sizes_.heads + head) * dim;
        const int64_t cache = head / group * sizes_.capacity * dim;
        const int64_t visible = sizes_.start_pos + token + 1;
        std::vector<double> scores(visible, 0.0);
        for (int64_t j = 0; j < visible; ++j) {
          for (int64_t i = 0; i < dim; ++i) {
            scores[j] += static_cast<double>(query_[offset + i]) * key_cache_[cache + j * dim + i];
          }
          scores[j] *= scale;
        }
        const double largest = *std::max_element(scores.begin(), scores.end());
        double sum = 0;
        for (double& score : scores) sum += score = std::exp(score - largest);
        for (int64_t j = 0; j < visible; ++j) {
          for (int64_t i = 0; i < dim; ++i) {
            result[offset + i] += scores[j] / sum * value_cache_[cache + j * dim + i];
          }
        }
      }
    }
    return result;
  }

  const std::vector<float>& query() const { return query_; }
  const std::vector<float>& key() const { return key_; }
  const std::vector<float>& value() const { return value_; }
  const std::vector<float>& key_cache() const { return key_cache_; }
  const std::vector<float>& value_cache() const { return value_cache_; }
  const std::vector<float>& out() const { return out_; }

 private:
  std::vector<float> Random(int64_t count, float magnitude) {
    std::normal_distribution<float> normal(0.0f, magnitude);
    std::vector<float> result(static_cast<size_t>(count));
    for (float& x : result) x = normal(random_);
    return result;
  }

  Sizes sizes_;
  std::mt19937 random_;
  std::vector<float> query_, key_, value_, key_cache_, value_cache_, out_;
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

void RunOnOneThread(const CachedAttention& call) {
  const Scratch scratch(AttentionScratchBytes(call));
  RunCachedAttention(call, 1, scratch.get(),
                     [](int64_t count, const auto& body) { body(0, count); });
}

void RunOnThreads(const CachedAttention& call, int64_t workers) {
  const Scratch scratch(AttentionScratchBytes(call) * static_cast<size_t>(workers));
  RunCachedAttention(call, workers, scratch.get(), [](int64_t count, const auto& body) {
    std::vector<std::thread> threads;
    for (int64_t i = 0; i < count; ++i) threads.emplace_back([&body, i] { body(i, i + 1); });
    for (std::thread& thread : threads) thread.join();
  });
}

bool SameBits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

// Runs the call and compares `out` and both caches with what they must be.
void ExpectCorrect(const Sizes& sizes, uint32_t seed, float magnitude = 1.0f) {
  SCOPED_TRACE(::testing::Message() << sizes << ", seed " << seed);
  Problem problem(sizes, seed, magnitude);
  const std::vector<float> key_cache = problem.Written(problem.key_cache(), problem.key());
  const std::vector<float> value_cache = problem.Written(problem.value_cache(), problem.value());
  const CachedAttention call = problem.Call();
  RunOnOneThread(call);
  EXPECT_TRUE(SameBits(problem.key_cache(), key_cache));
  EXPECT_TRUE(SameBits(problem.value_cache(), value_cache));

  const std::vector<double> expected = problem.Reference(call.scale);
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
  constexpr int64_t kHeadDims[] = {1, 2, 3, 5, 8, 13, 16, 31, 32, 40, 64, 77, 80, 96, 128, 131};
  std::mt19937 random(7);
  const auto between = [&random](int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random);
  };
  for (uint32_t seed = 0; seed < 60; ++seed) {
    Sizes sizes = {};
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
  for (const int64_t head_dim : {64, 80, 128, 33}) {
    for (const int64_t tokens : {1, 2, 99, 100}) {
      ExpectCorrect({tokens, 4, 2, head_dim, 100, 0}, 1);
      ExpectCorrect({tokens, 4, 2, head_dim, 100, 100 - tokens}, 2);
    }
  }
}

// Every number of rows around the widths at which the kernel changes its way of working.
TEST_P(KernelTest, MatchesReferenceForEveryFewTokens) {
  for (int64_t tokens = 1; tokens <= 52; ++tokens) ExpectCorrect({tokens, 2, 2, 20, 130, 70}, 3);
}

// Positions around multiples of the key block.
TEST_P(KernelTest, MatchesReferenceForEveryPosition) {
  for (int64_t position = 0; position < 140; ++position) {
    ExpectCorrect({1, 4, 2, 24, 140, position}, 4);
  }
}

TEST_P(KernelTest, SurvivesScoresThatWouldOverflowExp) {
  ExpectCorrect({40, 2, 1, 64, 90, 50}, 5, 20.0f);
  ExpectCorrect({1, 2, 1, 64, 90, 89}, 6, 20.0f);
}

TEST_P(KernelTest, OneVisibleKeyGivesItsValue) {
  Problem problem({1, 4, 2, 37, 9, 0}, 8);
  RunOnOneThread(problem.Call());
  for (int64_t head = 0; head < 4; ++head) {
    for (int64_t i = 0; i < 37; ++i) {
      ASSERT_EQ(problem.out()[head * 37 + i], problem.value()[head / 2 * 37 + i]);
    }
  }
}

TEST_P(KernelTest, StepByStepEqualsAllAtOnce) {
  constexpr int64_t kTokens = 70, kHeads = 4, kKvHeads = 2, kDim = 48;
  Problem whole({kTokens, kHeads, kKvHeads, kDim, kTokens, 0}, 9);
  Problem steps({kTokens, kHeads, kKvHeads, kDim, kTokens, 0}, 9);
  RunOnOneThread(whole.Call());
  for (int64_t done = 0; done < kTokens;) {
    CachedAttention call = steps.Call();
    call.tokens = done == 0 ? 37 : 1 + done % 3;
    call.tokens = std::min(call.tokens, kTokens - done);
    call.start_pos = done;
    call.query += done * kHeads * kDim;
    call.key += done * kKvHeads * kDim;
    call.value += done * kKvHeads * kDim;
    call.out += done * kHeads * kDim;
    RunOnOneThread(call);
    done += call.tokens;
  }
  EXPECT_TRUE(SameBits(whole.key_cache(), steps.key_cache()));
  for (size_t i = 0; i < whole.out().size(); ++i) {
    ASSERT_NEAR(whole.out()[i], steps.out()[i], 2e-6);
  }
}

TEST_P(KernelTest, AnyNumberOfThreadsGivesTheSameBits) {
  const Sizes kSizes[] = {{190, 4, 4, 32, 256, 11}, {1, 8, 4, 64, 256, 200}, {7, 6, 3, 19, 64, 57}};
  for (const Sizes& sizes : kSizes) {
    SCOPED_TRACE(::testing::Message() << sizes);
    Problem one(sizes, 10);
    RunOnOneThread(one.Call());
    for (const int64_t workers : {2, 3, 8}) {
      Problem many(sizes, 10);
      RunOnThreads(many.Call(), workers);
      EXPECT_TRUE(SameBits(one.out(), many.out())) << workers << " threads";
      EXPECT_TRUE(SameBits(one.key_cache(), many.key_cache())) << workers << " threads";
      EXPECT_TRUE(SameBits(one.value_cache(), many.value_cache())) << workers << " threads";
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Targets, KernelTest,
                         ::testing::ValuesIn(hwy::SupportedAndGeneratedTargets()),
                         [](const auto& info) { return std::string(hwy::TargetName(info.param)); });

TEST(AttentionWorkers, DependOnTheAmountOfWork) {
  Problem decode_early({1, 4, 4, 64, 768, 3}, 1);
  EXPECT_EQ(AttentionWorkers(decode_early.Call(), 8), 1);
  Problem decode_late({1, 16, 16, 128, 768, 700}, 1);
  EXPECT_EQ(AttentionWorkers(decode_late.Call(), 8), 8);
  Problem prefill({190, 16, 16, 128, 768, 0}, 1);
  EXPECT_EQ(AttentionWorkers(prefill.Call(), 8), 8);
  EXPECT_EQ(AttentionWorkers(prefill.Call(), 1), 1);
  // Never more than there are tasks.
  Problem one_head({1, 8, 1, 128, 4096, 4095}, 1);
  EXPECT_EQ(AttentionWorkers(one_head.Call(), 8), 1);
}

}  // namespace
}  // namespace mvlm
