#include "runner/answer_filter.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

namespace mvlm {
namespace {

std::string Filter(const std::vector<std::string>& stop_strings,
                   const std::vector<std::string>& parts) {
  AnswerFilter filter(stop_strings);
  std::string answer;
  for (const std::string& part : parts) {
    answer += filter.Push(part);
  }
  return answer + filter.Finish();
}

std::vector<std::string> Bytes(const std::string& text) {
  std::vector<std::string> parts;
  for (const char c : text) {
    parts.emplace_back(1, c);
  }
  return parts;
}

TEST(AnswerFilter, StripsTheEndsAndKeepsTheInside) {
  EXPECT_EQ(Filter({}, {"  a  b \n"}), "a  b");
  EXPECT_EQ(Filter({}, Bytes("  a  b \n")), "a  b");
  EXPECT_EQ(Filter({}, {" ", "\n"}), "");
  EXPECT_EQ(Filter({}, {}), "");
}

TEST(AnswerFilter, EndsBeforeAStopStringHoweverTheTextIsCut) {
  const std::string text = " red </b> circle </s> more";
  for (size_t a = 0; a <= text.size(); ++a) {
    for (size_t b = a; b <= text.size(); ++b) {
      EXPECT_EQ(Filter({"</s>", "ASSISTANT:"},
                       {text.substr(0, a), text.substr(a, b - a), text.substr(b)}),
                "red </b> circle");
    }
  }
}

TEST(AnswerFilter, TheFirstStopStringInTheTextWins) {
  EXPECT_EQ(Filter({"late", "early"}, {"an early one and a late one"}), "an");
  EXPECT_EQ(Filter({"</s>"}, {"</s>never shown"}), "");
  EXPECT_EQ(Filter({"\nUSER:"}, Bytes("\nUSER: x")), "");  // not taken for white space in front
  EXPECT_EQ(Filter({""}, {"an empty one is ignored"}), "an empty one is ignored");
}

TEST(AnswerFilter, APartialStopStringAtTheEndIsText) {
  EXPECT_EQ(Filter({"</s>"}, Bytes("a < b </s")), "a < b </s");
  EXPECT_EQ(Filter({"aab"}, Bytes("aaab")), "a");
}

TEST(AnswerFilter, ShowsWhatIsCertainAtOnce) {
  AnswerFilter filter({"</s>"});
  EXPECT_EQ(filter.Push(" red"), "red");
  EXPECT_EQ(filter.Push(" "), "");
  EXPECT_EQ(filter.Push("circle<"), " circle");
  EXPECT_EQ(filter.Push("b"), "<b");
  EXPECT_FALSE(filter.stopped());
  EXPECT_EQ(filter.Push("! </s>"), "!");
  EXPECT_TRUE(filter.stopped());
  EXPECT_EQ(filter.Push("more"), "");
  EXPECT_EQ(filter.Finish(), "");
}

}  // namespace
}  // namespace mvlm
