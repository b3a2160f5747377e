#include "runner/stats.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

namespace mvlm {
namespace {

TEST(Stats, JsonHasWhatWasMeasured) {
  RunStats stats;
  TurnStats turn;
  stats.load_ms = 1.5;
  turn.prompt_tokens = 194;
  turn.prefill_ms = 97.0;
  turn.decode_tokens = 10;
  turn.decode_ms = 200.0;
  turn.tokens = {5, 2};
  turn.seed = UINT64_MAX;
  stats.memory = {300, 200};
  stats.threads = 2;
  stats.load_parts = {{"open", 0.5}, {"text", 1.0}};
  stats.weight_cache = {"auto",
                        "/c",
                        "built",
                        {{"text_decoder", "built", "/c/x", 5, 7.0}, {"other", "none", "", 0, 0}}};
  turn.prefill_steps = {128, 66};
  stats.memory_stages = {{"loaded", {30, 10, 20}}};
  const auto json = nlohmann::json::parse(ToJson(stats, turn));
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
  EXPECT_EQ(json["versions"]["contract"], 4);
  EXPECT_EQ(json["versions"]["mvlm"], MvlmVersion());
  EXPECT_FALSE(MvlmVersion().empty());
  EXPECT_FALSE(ExecuTorchVersion().empty());
  EXPECT_TRUE(json["images"].empty());
  EXPECT_TRUE(json["image_encode_ms"].is_null());
}

TEST(Stats, PicturesHaveTheirOwn) {
  TurnStats turn;
  turn.images = {{"a.png", 640, 480, 144, 1.0, 2.0, 3.0}, {"", 32, 24, 144, 1.0, 2.0, 4.0}};
  const auto json = nlohmann::json::parse(ToJson(RunStats(), turn));
  EXPECT_EQ(json["images"][0]["width"], 640);
  EXPECT_EQ(json["images"][1]["height"], 24);
  EXPECT_TRUE(json["images"][1]["path"].is_null());
  EXPECT_EQ(json["image_encode_ms"], 7.0);
}

TEST(Stats, AConversationIsAListOfTurns) {
  TurnStats turn;
  turn.start_pos = 60;
  RunStats stats;
  stats.load_ms = 1.5;
  const auto json = nlohmann::json::parse(ToJson(stats, std::vector<TurnStats>{TurnStats(), turn}));
  EXPECT_EQ(json["load_ms"], 1.5);
  ASSERT_EQ(json["turns"].size(), 2);
  EXPECT_EQ(json["turns"][1]["start_pos"], 60);
  EXPECT_FALSE(json.contains("tokens"));
}

TEST(Stats, APathThatIsNotUtf8StaysJson) {
  RunStats stats;
  stats.model_path = "/tmp/\xFF.pte";
  EXPECT_TRUE(nlohmann::json::accept(ToJson(stats, TurnStats())));
}

TEST(Stats, NothingIsDividedByZero) {
  EXPECT_EQ(TokensPerSecond(0, 0.0), 0.0);
  EXPECT_EQ(TokensPerSecond(5, 0.0), 0.0);
}

}  // namespace
}  // namespace mvlm
