#include "runner/stats.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

namespace mvlm {
namespace {

TEST(Stats, JsonHasWhatWasMeasured) {
  RunStats stats;
  stats.load_ms = 1.5;
  stats.prompt_tokens = 194;
  stats.prefill_ms = 97.0;
  stats.decode_tokens = 10;
  stats.decode_ms = 200.0;
  stats.tokens = {5, 2};
  stats.seed = UINT64_MAX;
  stats.memory = {300, 200};
  stats.threads = 2;
  const auto json = nlohmann::json::parse(ToJson(stats));
  EXPECT_EQ(json["load_ms"], 1.5);
  EXPECT_EQ(json["prefill_tokens_per_second"], 2000.0);
  EXPECT_EQ(json["decode_tokens_per_second"], 50.0);
  EXPECT_EQ(json["tokens"], (std::vector<int>{5, 2}));
  EXPECT_EQ(json["sampling"]["seed"], UINT64_MAX);
  EXPECT_EQ(json["peak_rss_bytes"], 300);
  EXPECT_EQ(json["peak_anonymous_bytes"], 200);
  EXPECT_EQ(json["threads"], 2);
  EXPECT_EQ(json["versions"]["contract"], 1);
  EXPECT_EQ(json["versions"]["mvlm"], MvlmVersion());
  EXPECT_FALSE(MvlmVersion().empty());
  EXPECT_FALSE(ExecuTorchVersion().empty());
  EXPECT_TRUE(json["image"].is_null());
  EXPECT_TRUE(json["image_encode_ms"].is_null());
}

TEST(Stats, APictureHasItsOwn) {
  RunStats stats;
  stats.image = ImageStats{"a.png", 640, 480, 144, 1.0, 2.0, 3.0};
  const auto json = nlohmann::json::parse(ToJson(stats));
  EXPECT_EQ(json["image"]["width"], 640);
  EXPECT_EQ(json["image_encode_ms"], 3.0);
}

TEST(Stats, APathThatIsNotUtf8StaysJson) {
  RunStats stats;
  stats.model_path = "/tmp/\xFF.pte";
  EXPECT_TRUE(nlohmann::json::accept(ToJson(stats)));
}

TEST(Stats, NothingIsDividedByZero) {
  EXPECT_EQ(TokensPerSecond(0, 0.0), 0.0);
  EXPECT_EQ(TokensPerSecond(5, 0.0), 0.0);
}

}  // namespace
}  // namespace mvlm
