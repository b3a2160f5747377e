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
  stats.load_parts = {{"open", 0.5}, {"text", 1.0}};
  stats.weight_cache = {"auto",
                        "/c",
                        "built",
                        {{"text_decoder", "built", "/c/x", 5, 7.0}, {"other", "none", "", 0, 0}}};
  stats.prefill_steps = {128, 66};
  stats.memory_stages = {{"loaded", {30, 10, 20}}};
  const auto json = nlohmann::json::parse(ToJson(stats));
  EXPECT_EQ(json["load_ms"], 1.5);
  EXPECT_EQ(json["load"]["text"], 1.0);
  EXPECT_EQ(json["weight_cache"]["mode"], "auto");
  EXPECT_EQ(json["weight_cache"]["path"], "/c");
  EXPECT_EQ(json["weight_cache"]["state"], "built");
  EXPECT_EQ(json["weight_cache"]["methods"][0]["bytes"], 5);
  EXPECT_TRUE(json["weight_cache"]["methods"][1]["path"].is_null());
  EXPECT_EQ(json["low_memory"], false);
  EXPECT_EQ(json["prefill_steps"], (std::vector<int>{128, 66}));
  EXPECT_EQ(json["memory"][0]["anonymous_bytes"], 10);
  EXPECT_EQ(json["prefill_tokens_per_second"], 2000.0);
  EXPECT_EQ(json["decode_tokens_per_second"], 50.0);
  EXPECT_EQ(json["tokens"], (std::vector<int>{5, 2}));
  EXPECT_EQ(json["sampling"]["seed"], UINT64_MAX);
  EXPECT_EQ(json["peak_rss_bytes"], 300);
  EXPECT_EQ(json["peak_anonymous_bytes"], 200);
  EXPECT_EQ(json["threads"], 2);
  EXPECT_EQ(json["versions"]["contract"], 3);
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
