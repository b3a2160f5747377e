#include "runner/answer.h"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>

namespace mvlm {
namespace {

std::string Complaint(const std::function<void(Options&)>& change) {
  Options options;
  options.model_path = "a.pte";
  options.prompt = "What?";
  change(options);
  const Status status = CheckOptions(options);
  return status.ok() ? "" : status.error().message;
}

TEST(CheckOptions, AcceptsDefaultsAndLimits) {
  EXPECT_EQ(Complaint([](Options&) {}), "");
  EXPECT_EQ(Complaint([](Options& o) { o.temperature = 0.0; }), "");
  EXPECT_EQ(Complaint([](Options& o) { o.temperature = 100.0; }), "");
  EXPECT_EQ(Complaint([](Options& o) { o.top_p = 1e-9; }), "");
  EXPECT_EQ(Complaint([](Options& o) { o.max_new_tokens = 1; }), "");
  EXPECT_EQ(Complaint([](Options& o) { o.cpu_threads = 1; }), "");
  EXPECT_EQ(Complaint([](Options& o) {
              o.prepare = true;
              o.prompt.reset();
            }),
            "");
  // Whether it needs a picture, the .pte decides.
  EXPECT_EQ(Complaint([](Options& o) { o.prompt = "<image>"; }), "");
}

TEST(CheckOptions, NamesTheFlagAndWhatIsAllowed) {
  const std::pair<const char*, std::function<void(Options&)>> cases[] = {
      {"--temperature -0.5", [](Options& o) { o.temperature = -0.5; }},
      {"--temperature nan", [](Options& o) { o.temperature = std::nan(""); }},
      {"--temperature inf", [](Options& o) { o.temperature = INFINITY; }},
      {"--top_p 0", [](Options& o) { o.top_p = 0.0; }},
      {"--top_p 1.5", [](Options& o) { o.top_p = 1.5; }},
      {"--top_p nan", [](Options& o) { o.top_p = std::nan(""); }},
      {"--top_k -1", [](Options& o) { o.top_k = -1; }},
      {"--max_new_tokens 0", [](Options& o) { o.max_new_tokens = 0; }},
      {"--cpu_threads 0", [](Options& o) { o.cpu_threads = 0; }},
      {"--cpu_threads 1025", [](Options& o) { o.cpu_threads = 1025; }},
      {"--prompt is required", [](Options& o) { o.prompt.reset(); }},
      {"--weight_cache is empty", [](Options& o) { o.weight_cache = ""; }},
      {"leave out --prompt", [](Options& o) { o.prepare = true; }},
      {"--weight_cache off",
       [](Options& o) {
         o.prepare = true;
         o.prompt.reset();
         o.weight_cache = kWeightCacheOff;
       }},
      {"empty", [](Options& o) { o.prompt = ""; }},
      {"not valid UTF-8", [](Options& o) { o.prompt = "\xC3("; }},
  };
  for (const auto& [expected, change] : cases) {
    const std::string complaint = Complaint(change);
    EXPECT_NE(complaint.find(expected), std::string::npos) << expected << ": " << complaint;
  }
}

}  // namespace
}  // namespace mvlm
