#include "runner/metadata.h"

#include <gtest/gtest.h>

#include "runner/contract.h"

namespace mvlm {
namespace {

Constants Good() {
  return {
      {contract::kMaxSeqLen, {int64_t{256}}},
      {contract::kMaxContextLen, {int64_t{768}}},
      {contract::kBosId, {int64_t{1}}},
      {contract::kEosIds, {int64_t{2}, int64_t{7}}},
      {contract::kVocabSize, {int64_t{32000}}},
      {contract::kUseKvCache, {true}},
      {contract::kUseSdpaWithKvCache, {true}},
      {contract::kEnableDynamicShape, {true}},
      {contract::kFormat, {contract::kFormatVersion}},
      {contract::kVersion, {"0.1.0"}},
      {contract::kProgramId, {"sha256:01"}},
      {contract::kModelName, {"demo"}},
      {contract::kCheckpointId, {"sha256:00"}},
      {contract::kRecipe, {"{}"}},
      {contract::kPromptTemplate, {"USER: {prompt} ASSISTANT:"}},
      {contract::kNextTurnTemplate, {"USER: {prompt} ASSISTANT:"}},
      {contract::kLogitPositions, {int64_t{8}}},
      {contract::kImageMarker, {"<image>"}},
      {contract::kImagePrefix, {"<image>\n"}},
      {contract::kStopStrings, {"</s>"}},
      {contract::kImageSize, {int64_t{336}}},
      {contract::kImageMean, {0.5, 0.25, 0.125}},
      {contract::kImageStd, {0.5, 0.5, 1.0}},
      {contract::kImagePadColor, {int64_t{122}, int64_t{116}, int64_t{104}}},
      {contract::kImageTokens, {int64_t{144}}},
      {contract::kTokenizer, {"bytes"}},
  };
}

Constants With(const char* name, std::vector<Constant> outputs) {
  Constants constants = Good();
  constants[name] = std::move(outputs);
  return constants;
}

std::string Complaint(const Constants& constants, bool has_vision = true) {
  const Result<Metadata> metadata = ParseMetadata(constants, has_vision);
  return metadata.ok() ? "" : metadata.error().message;
}

TEST(ParseMetadata, ReadsAllFields) {
  const Result<Metadata> metadata = ParseMetadata(Good(), true);
  ASSERT_TRUE(metadata.ok()) << metadata.error().message;
  EXPECT_EQ(metadata->max_seq_len, 256);
  EXPECT_EQ(metadata->max_context_len, 768);
  EXPECT_EQ(metadata->logit_positions, 8);
  EXPECT_EQ(metadata->program_id, "sha256:01");
  EXPECT_EQ(metadata->eos_ids, (std::vector<int64_t>{2, 7}));
  EXPECT_EQ(metadata->prompt.image_prefix, "<image>\n");
  EXPECT_EQ(metadata->vision->format.mean, (std::array<double, 3>{0.5, 0.25, 0.125}));
  EXPECT_EQ(metadata->vision->format.pad_color, (std::array<uint8_t, 3>{122, 116, 104}));
  EXPECT_EQ(metadata->vision->tokens, 144);
}

TEST(ParseMetadata, TheTestKnowsEveryConstant) {
  EXPECT_EQ(Good().size(), ContractConstants().size());
  for (const std::string& name : ContractConstants()) {
    EXPECT_EQ(Good().count(name), 1u) << name;
  }
}

TEST(ParseMetadata, NamesWhateverIsMissing) {
  for (const std::string& name : ContractConstants()) {
    if (name == contract::kUseSdpaWithKvCache) {
      continue;  // for other runners; this one does not care how attention is computed
    }
    Constants constants = Good();
    constants.erase(name);
    EXPECT_NE(Complaint(constants).find("constant method " + name + " is missing"),
              std::string::npos)
        << name << ": " << Complaint(constants);
  }
}

TEST(ParseMetadata, ALanguageModelAloneHasNoImageConstants) {
  Constants constants = Good();
  for (const std::string& name : ImageConstants()) {
    constants.erase(name);
  }
  const Result<Metadata> metadata = ParseMetadata(constants, false);
  ASSERT_TRUE(metadata.ok()) << metadata.error().message;
  EXPECT_FALSE(metadata->vision.has_value());
  EXPECT_EQ(metadata->prompt.image_marker, "");
  EXPECT_EQ(metadata->prompt.image_prefix, "");
  for (const std::string& name : ImageConstants()) {
    EXPECT_NE(Complaint(constants, true).find(name), std::string::npos) << name;
  }
}

TEST(ParseMetadata, AllImageConstantsOrNone) {
  EXPECT_NE(Complaint(Good(), false)
                .find("method vision_encoder is missing, though it has "
                      "mvlm_image_marker, mvlm_image_prefix"),
            std::string::npos)
      << Complaint(Good(), false);
  Constants constants = Good();
  constants.erase(contract::kImageTokens);
  constants.erase(contract::kImageStd);
  for (const bool has_vision : {false, true}) {
    EXPECT_NE(Complaint(constants, has_vision)
                  .find("constant methods mvlm_image_std, mvlm_image_tokens are missing"),
              std::string::npos)
        << Complaint(constants, has_vision);
  }
}

TEST(ParseMetadata, AnotherProgramsFileIsCalledThat) {
  EXPECT_NE(Complaint({}).find("not an mvlm .pte"), std::string::npos);
  EXPECT_NE(Complaint({{contract::kMaxSeqLen, {int64_t{128}}}}).find("not an mvlm .pte"),
            std::string::npos);
}

TEST(ParseMetadata, KnowsWhoseAttentionItIs) {
  const auto attention_op = [](const char* recipe) {
    return ParseMetadata(With(contract::kRecipe, {recipe}), true)->attention_op;
  };
  EXPECT_EQ(attention_op(R"({"attention_op": "llama", "vision": "int8"})"), "llama");
  EXPECT_EQ(attention_op(R"({"attention_op": "mvlm"})"), "mvlm");
  for (const char* recipe : {"{}", "", "no JSON", "[1]", "7", R"({"attention_op": 3})"}) {
    EXPECT_EQ(attention_op(recipe), "mvlm") << recipe;
  }
}

TEST(ParseMetadata, RefusesEveryOtherFormatAndSaysWhatToDo) {
  const std::string older = Complaint(With(contract::kFormat, {int64_t{3}}));
  EXPECT_NE(older.find("format 3"), std::string::npos) << older;
  EXPECT_NE(older.find("older mvlm: export it again"), std::string::npos) << older;
  const std::string newer = Complaint(With(contract::kFormat, {contract::kFormatVersion + 1}));
  EXPECT_NE(newer.find("format 5"), std::string::npos) << newer;
  EXPECT_NE(newer.find("newer mvlm: install"), std::string::npos) << newer;
}

TEST(ParseMetadata, AnOlderFormatIsCalledThatWhateverElseItLacks) {
  Constants constants = With(contract::kFormat, {int64_t{3}});
  constants.erase(contract::kLogitPositions);
  EXPECT_NE(Complaint(constants).find("older mvlm"), std::string::npos) << Complaint(constants);
}

TEST(ParseMetadata, RefusesValuesThatCannotBe) {
  const std::pair<const char*, std::vector<Constant>> cases[] = {
      {contract::kMaxContextLen, {int64_t{0}}},
      {contract::kMaxContextLen, {INT64_MAX}},
      {contract::kMaxContextLen, {"768"}},
      {contract::kMaxContextLen, {}},
      {contract::kMaxSeqLen, {int64_t{769}}},
      {contract::kLogitPositions, {int64_t{0}}},
      {contract::kLogitPositions, {int64_t{257}}},
      {contract::kProgramId, {""}},
      {contract::kBosId, {int64_t{32000}}},
      {contract::kEosIds, {}},
      {contract::kEosIds, {int64_t{-1}}},
      {contract::kUseKvCache, {false}},
      {contract::kEnableDynamicShape, {int64_t{0}}},
      {contract::kPromptTemplate, {"no place for it"}},
      {contract::kPromptTemplate, {"{prompt}{prompt}"}},
      {contract::kNextTurnTemplate, {"no place for it"}},
      {contract::kImagePrefix, {"no marker"}},
      {contract::kImageMarker, {""}},
      {contract::kImageSize, {int64_t{1} << 40}},
      {contract::kImageMean, {0.5, 0.5}},
      {contract::kImageStd, {0.5, 0.0, 0.5}},
      {contract::kImageStd, {0.5, std::numeric_limits<double>::quiet_NaN(), 0.5}},
      {contract::kImagePadColor, {int64_t{256}, int64_t{0}, int64_t{0}}},
  };
  for (const auto& [name, outputs] : cases) {
    EXPECT_NE(Complaint(With(name, outputs)).find("constant method"), std::string::npos) << name;
  }
}

TEST(ParseMetadata, TakesIntegersForBoolsAndFloats) {
  EXPECT_EQ(Complaint(With(contract::kUseKvCache, {int64_t{1}})), "");
  EXPECT_EQ(Complaint(With(contract::kImageMean, {int64_t{0}, int64_t{0}, int64_t{0}})), "");
}

}  // namespace
}  // namespace mvlm
