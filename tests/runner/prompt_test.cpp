#include "runner/prompt.h"

#include <gtest/gtest.h>

namespace mvlm {
namespace {

const PromptFormat kFormat = {
    "System. USER: {prompt} ASSISTANT:", "USER: {prompt} ASSISTANT:", "<image>", "<image>\n"};
using Pieces = std::vector<std::string>;

Result<Pieces> Ask(std::string_view text, int64_t images, bool raw = false, bool follows = false) {
  return PromptPieces(kFormat, {text, images, raw, follows});
}

std::string Complaint(const Result<Pieces>& result) {
  EXPECT_FALSE(result.ok());
  EXPECT_EQ(result.error().kind, ErrorKind::kInvalidInput);
  return result.error().message;
}

TEST(PromptPieces, PutsThePictureInFrontOfTheQuestion) {
  EXPECT_EQ(*Ask("What?", 1), (Pieces{"System. USER: ", "\nWhat? ASSISTANT:"}));
}

TEST(PromptPieces, OrWhereTheQuestionSays) {
  EXPECT_EQ(*Ask("Is <image> red?", 1), (Pieces{"System. USER: Is ", " red? ASSISTANT:"}));
}

TEST(PromptPieces, SeveralPicturesGoInFrontOrWhereTheQuestionSays) {
  EXPECT_EQ(*Ask("Same?", 2), (Pieces{"System. USER: ", "\n", "\nSame? ASSISTANT:"}));
  EXPECT_EQ(*Ask("Is <image> like <image>?", 2),
            (Pieces{"System. USER: Is ", " like ", "? ASSISTANT:"}));
}

TEST(PromptPieces, AFurtherQuestionHasATemplateOfItsOwn) {
  EXPECT_EQ(*Ask("And?", 0, false, true), (Pieces{"USER: And? ASSISTANT:"}));
  EXPECT_EQ(*Ask("And?", 1, false, true), (Pieces{"USER: ", "\nAnd? ASSISTANT:"}));
  EXPECT_EQ(*Ask("And?", 0, true, true), (Pieces{"And?"}));
}

TEST(PromptPieces, WithoutAPictureThereIsOnePiece) {
  EXPECT_EQ(*Ask("What?", 0), (Pieces{"System. USER: What? ASSISTANT:"}));
}

TEST(PromptPieces, ARawPromptIsTakenAsItIs) {
  EXPECT_EQ(*Ask(" Q: What? A:", 0, true), (Pieces{" Q: What? A:"}));
  EXPECT_EQ(*Ask("<image>", 1, true), (Pieces{"", ""}));
  EXPECT_NE(Complaint(Ask("What?", 1, true)).find("put <image> into it"), std::string::npos);
}

TEST(PromptPieces, TheQuestionIsNotATemplate) {
  EXPECT_EQ(*Ask("{prompt}", 0), (Pieces{"System. USER: {prompt} ASSISTANT:"}));
}

TEST(PromptPieces, RefusesWhatCannotBeAsked) {
  EXPECT_NE(Complaint(Ask("", 0)).find("empty"), std::string::npos);
  EXPECT_NE(Complaint(Ask(" \n\t", 1)).find("empty"), std::string::npos);
  EXPECT_NE(Complaint(Ask("ab\xFFz", 1)).find("not valid UTF-8: byte 2"), std::string::npos);
  EXPECT_NE(Complaint(Ask("<image> what?", 0)).find("no picture was given"), std::string::npos);
  EXPECT_NE(Complaint(Ask("<image> and <image>", 1)).find("2 times, but there is 1 picture;"),
            std::string::npos);
  EXPECT_NE(Complaint(Ask("<image>?", 3)).find("1 times, but there are 3 pictures;"),
            std::string::npos);
}

TEST(PromptPieces, ToALanguageModelAloneAMarkerIsText) {
  const PromptFormat format = {"USER: {prompt}", "USER: {prompt}", "", ""};
  EXPECT_EQ(*PromptPieces(format, {"<image>\n<image>"}), (Pieces{"USER: <image>\n<image>"}));
  EXPECT_EQ(*PromptPieces(format, {"<image>", 0, true}), (Pieces{"<image>"}));
}

TEST(TokenizedPrompt, CountsPieceAndPicturePositions) {
  EXPECT_EQ((TokenizedPrompt{{{1, 5, 6}, {7}}, 144}.positions()), 148);
  EXPECT_EQ((TokenizedPrompt{{{1}, {}, {7}}, 144}.positions()), 290);
  EXPECT_EQ((TokenizedPrompt{{{1}}, 0}.positions()), 1);
}

TEST(ResolveSeqLen, DefaultsToAllAndStaysWithin) {
  EXPECT_EQ(*ResolveSeqLen(std::nullopt, 768), 768);
  EXPECT_EQ(*ResolveSeqLen(768, 768), 768);
  EXPECT_EQ(*ResolveSeqLen(2, 768), 2);
  for (const int64_t bad : {int64_t{-1}, int64_t{0}, int64_t{1}, int64_t{769}, INT64_MAX}) {
    const auto result = ResolveSeqLen(bad, 768);
    ASSERT_FALSE(result.ok()) << bad;
    EXPECT_NE(result.error().message.find("2 to 768"), std::string::npos);
  }
}

TEST(ResolveMaxNewTokens, DefaultsToTheReferencesOrWhatFits) {
  EXPECT_EQ(*ResolveMaxNewTokens(std::nullopt, 100, 768), kDefaultMaxNewTokens);
  EXPECT_EQ(*ResolveMaxNewTokens(std::nullopt, 194, 600), 406);
}

TEST(ResolveMaxNewTokens, APictureMayTakeMostOfTheCache) {
  const TokenizedPrompt llava = {{{1, 5, 6}, {7}},
                                 576};  // 24 x 24 patches, as LLaVA-1.5 takes them
  EXPECT_EQ(*ResolveMaxNewTokens(std::nullopt, llava.positions(), 768), 188);
}

TEST(ResolveMaxNewTokens, ARequestIsCutToWhatFits) {
  EXPECT_EQ(*ResolveMaxNewTokens(7, 194, 768), 7);
  EXPECT_EQ(*ResolveMaxNewTokens(INT64_MAX, 194, 768), 574);
}

TEST(ResolveMaxNewTokens, InAConversationLessIsLeft) {
  EXPECT_EQ(*ResolveMaxNewTokens(std::nullopt, 100, 768, 600), 68);
  EXPECT_EQ(*ResolveMaxNewTokens(std::nullopt, 167, 768, 600), 1);
  const auto full = ResolveMaxNewTokens(std::nullopt, 168, 768, 600);
  ASSERT_FALSE(full.ok());
  EXPECT_EQ(full.error().kind, ErrorKind::kInvalidInput);
  EXPECT_NE(full.error().message.find("used 600 of 768 positions"), std::string::npos);
  EXPECT_NE(full.error().message.find("takes 168"), std::string::npos);
}

TEST(ResolveMaxNewTokens, APromptMustLeaveRoomForOneToken) {
  EXPECT_EQ(*ResolveMaxNewTokens(std::nullopt, 767, 768), 1);
  const auto full = ResolveMaxNewTokens(std::nullopt, 768, 768);
  ASSERT_FALSE(full.ok());
  EXPECT_NE(full.error().message.find("takes 768 tokens"), std::string::npos);
  EXPECT_NE(full.error().message.find("at most 767 fit"), std::string::npos);
}

TEST(PrefillSteps, AreAsFewAsCanBe) {
  EXPECT_EQ(PrefillSteps(600, 256), (std::vector<int64_t>{256, 256, 88}));
  EXPECT_EQ(PrefillSteps(512, 256), (std::vector<int64_t>{256, 256}));
  EXPECT_EQ(PrefillSteps(1, 256), (std::vector<int64_t>{1}));
  EXPECT_EQ(PrefillSteps(3, 1), (std::vector<int64_t>{1, 1, 1}));
  EXPECT_TRUE(PrefillSteps(0, 256).empty());
}

}  // namespace
}  // namespace mvlm
