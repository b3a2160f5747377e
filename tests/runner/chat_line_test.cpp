#include "runner/chat_line.h"

#include <gtest/gtest.h>

namespace mvlm {
namespace {

using Kind = ChatLine::Kind;

void ExpectLine(std::string_view line, Kind kind, std::string_view text = "") {
  const Result<ChatLine> parsed = ParseChatLine(line);
  ASSERT_TRUE(parsed.ok()) << line << ": " << parsed.error().message;
  EXPECT_EQ(parsed->kind, kind) << line;
  EXPECT_EQ(parsed->text, text) << line;
}

TEST(ParseChatLine, KnowsQuestionsAndCommands) {
  ExpectLine("", Kind::kNothing);
  ExpectLine(" \t\r\n", Kind::kNothing);
  ExpectLine("What is /image?\n", Kind::kQuestion, "What is /image?");
  ExpectLine("//image is a word", Kind::kQuestion, "/image is a word");
  ExpectLine("/image cat.jpg\n", Kind::kImage, "cat.jpg");
  ExpectLine("/image  my cat.jpg \r\n", Kind::kImage, "my cat.jpg");
  ExpectLine("/image 'my cat.jpg'", Kind::kImage, "my cat.jpg");
  ExpectLine("/image \"a'b.png\"", Kind::kImage, "a'b.png");
  ExpectLine("/image \"", Kind::kImage, "\"");
  ExpectLine("/reset", Kind::kReset);
  ExpectLine(" /stats ", Kind::kStats);
  ExpectLine("/help", Kind::kHelp);
  ExpectLine("/quit\n", Kind::kQuit);
}

TEST(ParseChatLine, SaysWhatIsWrongWithACommand) {
  const std::pair<const char*, const char*> cases[] = {
      {"/imgae cat.jpg", "there is no command /imgae"},
      {"/", "there is no command /;"},
      {"/image", "/image needs the path"},
      {"/image ''", "/image needs the path"},
      {"/reset now", "/reset stands alone, without \"now\""},
  };
  for (const auto& [line, expected] : cases) {
    const Result<ChatLine> parsed = ParseChatLine(line);
    ASSERT_FALSE(parsed.ok()) << line;
    EXPECT_EQ(parsed.error().kind, ErrorKind::kInvalidInput);
    EXPECT_NE(parsed.error().message.find(expected), std::string::npos) << parsed.error().message;
  }
}

TEST(ChatHelp, NamesEveryCommand) {
  for (const char* command : {"/image", "/reset", "/stats", "/quit"}) {
    EXPECT_NE(ChatHelp().find(command), std::string_view::npos) << command;
  }
}

}  // namespace
}  // namespace mvlm
