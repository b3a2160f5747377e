#include "runner/sampler.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <set>
#include <vector>

namespace mvlm {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

std::vector<int64_t> Draw(const SamplerConfig& config, const std::vector<float>& logits,
                          size_t count) {
  Sampler sampler(config);
  std::vector<int64_t> tokens;
  for (size_t i = 0; i < count; ++i) {
    tokens.push_back(*sampler.Sample(logits.data(), logits.size()));
  }
  return tokens;
}

std::vector<double> Frequencies(const std::vector<int64_t>& tokens, size_t vocab) {
  std::vector<double> frequencies(vocab);
  for (const int64_t token : tokens) {
    frequencies[static_cast<size_t>(token)] += 1.0 / static_cast<double>(tokens.size());
  }
  return frequencies;
}

TEST(ArgMax, TakesTheFirstOfTheLargest) {
  const std::vector<float> logits = {-3, 2, 5, 5, 1};
  EXPECT_EQ(ArgMax(logits.data(), logits.size()), 2u);
  EXPECT_EQ(ArgMax(logits.data(), 1), 0u);
}

TEST(ArgMax, IsNothingWithoutFiniteLogits) {
  EXPECT_EQ(ArgMax(nullptr, 0), std::nullopt);
  for (const float bad : {kNan, kInf, -kInf}) {
    for (size_t at = 0; at < 3; ++at) {
      std::vector<float> logits = {1, 2, 3};
      logits[at] = bad;
      EXPECT_EQ(ArgMax(logits.data(), logits.size()), std::nullopt);
    }
  }
}

TEST(Sampler, FailsWithoutFiniteLogits) {
  Sampler sampler({1.0, 0, 1.0, 0});
  const std::vector<float> logits = {0, kNan};
  const Result<int64_t> token = sampler.Sample(logits.data(), logits.size());
  ASSERT_FALSE(token.ok());
  EXPECT_EQ(token.error().kind, ErrorKind::kFailure);
  EXPECT_FALSE(sampler.Sample(logits.data(), 0).ok());
}

TEST(Sampler, TemperatureZeroIsGreedyWhateverTheRest) {
  EXPECT_EQ(Draw({0.0, 2, 0.5, 7}, {1, 3, 3, 2}, 50), std::vector<int64_t>(50, 1));
}

TEST(Sampler, FollowsTheDistribution) {
  const std::vector<float> logits = {std::log(0.5f), std::log(0.3f), std::log(0.2f)};
  const auto at_1 = Frequencies(Draw({1.0, 0, 1.0, 42}, logits, 40000), 3);
  // The standard deviation of such a frequency is below 0.0025.
  EXPECT_NEAR(at_1[0], 0.5, 0.01);
  EXPECT_NEAR(at_1[1], 0.3, 0.01);
  EXPECT_NEAR(at_1[2], 0.2, 0.01);
  // At temperature 1/2 probabilities are squared: 0.25, 0.09, 0.04, of 0.38.
  const auto at_half = Frequencies(Draw({0.5, 0, 1.0, 42}, logits, 40000), 3);
  EXPECT_NEAR(at_half[0], 0.25 / 0.38, 0.01);
  EXPECT_NEAR(at_half[2], 0.04 / 0.38, 0.01);
}

TEST(Sampler, TopKKeepsTheLikeliestAndTheirProportions) {
  const std::vector<float> logits = {std::log(0.1f), std::log(0.6f), std::log(0.3f)};
  const auto frequencies = Frequencies(Draw({1.0, 2, 1.0, 1}, logits, 40000), 3);
  EXPECT_EQ(frequencies[0], 0.0);
  EXPECT_NEAR(frequencies[1], 0.6 / 0.9, 0.01);
  EXPECT_EQ(Draw({1.0, 1, 1.0, 1}, logits, 50), std::vector<int64_t>(50, 1));
  // More than there are: all.
  EXPECT_GT(Frequencies(Draw({1.0, 99, 1.0, 1}, logits, 1000), 3)[0], 0.0);
}

TEST(Sampler, TopPKeepsTheFewestThatReachIt) {
  const std::vector<float> logits = {std::log(0.15f), std::log(0.5f), std::log(0.35f)};
  // 0.5 alone reaches 0.45; 0.5 + 0.35 reach 0.8; all are needed for 0.9.
  EXPECT_EQ(Draw({1.0, 0, 0.45, 3}, logits, 50), std::vector<int64_t>(50, 1));
  const auto two = Frequencies(Draw({1.0, 0, 0.8, 3}, logits, 40000), 3);
  EXPECT_EQ(two[0], 0.0);
  EXPECT_NEAR(two[2], 0.35 / 0.85, 0.01);
  EXPECT_GT(Frequencies(Draw({1.0, 0, 0.9, 3}, logits, 1000), 3)[0], 0.0);
  // However small: never nothing.
  EXPECT_EQ(Draw({1.0, 0, 1e-300, 3}, logits, 50), std::vector<int64_t>(50, 1));
}

TEST(Sampler, TopKComesBeforeTopP) {
  // Of 0.4, 0.3, 0.3 top_k 2 leaves 4/7 and 3/7, so that 0.55 is reached by the first alone; on
  // its own it would not be.
  const std::vector<float> logits = {std::log(0.4f), std::log(0.3f), std::log(0.3f)};
  EXPECT_EQ(Draw({1.0, 2, 0.55, 3}, logits, 50), std::vector<int64_t>(50, 0));
}

TEST(Sampler, EqualLogitsAreToldApartById) {
  const std::vector<int64_t> tokens = Draw({1.0, 2, 1.0, 5}, {1, 1, 1, 1}, 200);
  EXPECT_EQ(std::set<int64_t>(tokens.begin(), tokens.end()), (std::set<int64_t>{0, 1}));
}

TEST(Sampler, ExtremeTemperaturesAndLogitsAreFine) {
  EXPECT_EQ(Draw({1e-300, 0, 1.0, 5}, {1, 2, 3}, 50), std::vector<int64_t>(50, 2));
  EXPECT_EQ(Draw({1.0, 0, 1.0, 5}, {-3e38f, 3e38f}, 50), std::vector<int64_t>(50, 1));
  EXPECT_GT(Frequencies(Draw({1e300, 0, 1.0, 5}, {0, 80}, 1000), 2)[0], 0.4);
}

// A seed must give the same tokens on every platform, so these are written down. They come from a
// second implementation, in Python, of the 64-bit Mersenne twister and of the draw.
TEST(Sampler, ASeedGivesTheSameTokensEverywhere) {
  const std::vector<float> logits = {0.1f, 0.9f, -0.4f, 1.3f, 0.0f, 0.7f, -1.0f, 0.5f};
  const std::vector<int64_t> expected = {7, 0, 7, 7, 1, 7, 7, 7, 1, 5, 7, 1, 3, 7, 1, 5};
  EXPECT_EQ(Draw({0.8, 0, 1.0, 1234}, logits, 16), expected);
  const std::vector<int64_t> restricted = {0, 3, 0, 0, 3, 0, 7, 0, 3, 5, 0, 3, 1, 0, 3, 5};
  EXPECT_EQ(Draw({0.8, 6, 0.9, 1234}, logits, 16), restricted);
  EXPECT_NE(Draw({0.8, 0, 1.0, 1235}, logits, 16), expected);
}

}  // namespace
}  // namespace mvlm
