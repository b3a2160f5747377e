#include "runner/utf8.h"

#include <gtest/gtest.h>

#include <string>

namespace mvlm {
namespace {

// A character of every length: A, e acute, euro sign, grinning face.
const std::string kOneToFour = "A\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80";

TEST(Utf8, AcceptsCharactersOfEveryLength) {
  EXPECT_TRUE(IsValidUtf8(""));
  EXPECT_TRUE(IsValidUtf8(kOneToFour));
  EXPECT_EQ(ReadUtf8Char("\xE2\x82\xAC").code_point, 0x20ACu);
  EXPECT_EQ(ReadUtf8Char("\xF0\x9F\x98\x80").code_point, 0x1F600u);
}

TEST(Utf8, RejectsWhatRfc3629Forbids) {
  EXPECT_FALSE(IsValidUtf8("\x80"));              // continuation without a lead
  EXPECT_FALSE(IsValidUtf8("\xFF"));              // never occurs
  EXPECT_FALSE(IsValidUtf8("\xC0\xAF"));          // overlong
  EXPECT_FALSE(IsValidUtf8("\xE0\x80\xAF"));      // overlong
  EXPECT_FALSE(IsValidUtf8("\xF0\x80\x80\xAF"));  // overlong
  EXPECT_FALSE(IsValidUtf8("\xED\xA0\x80"));      // surrogate
  EXPECT_FALSE(IsValidUtf8("\xF4\x90\x80\x80"));  // above U+10FFFF
  EXPECT_FALSE(IsValidUtf8("\xE2\x82"));          // incomplete
  EXPECT_EQ(ValidUtf8PrefixLength("ab\xE2\x82"), 2u);
}

TEST(Utf8, FindsTheIncompleteSuffixAtEveryCut) {
  // Bytes that belong to a character that the cut goes through.
  const size_t expected[] = {0, 0, 1, 0, 1, 2, 0, 1, 2, 3, 0};
  for (size_t cut = 0; cut <= kOneToFour.size(); ++cut) {
    EXPECT_EQ(IncompleteUtf8SuffixLength(kOneToFour.substr(0, cut)), expected[cut]) << cut;
  }
}

TEST(Utf8, WhatCannotBecomeACharacterIsNotIncomplete) {
  EXPECT_EQ(IncompleteUtf8SuffixLength("\xED\xA0"), 0u);      // would be a surrogate
  EXPECT_EQ(IncompleteUtf8SuffixLength("\x80\x80\x80"), 0u);  // no lead at all
  EXPECT_EQ(IncompleteUtf8SuffixLength("\xF5"), 0u);
}

TEST(Utf8, MeasuresWhiteSpaceAsPythonDoes) {
  EXPECT_EQ(LeadingSpaceLength(" \t\n\xC2\xA0\xE3\x80\x80x "), 8u);
  EXPECT_EQ(TrailingSpaceLength(" x\xE3\x80\x80\xC2\xA0\n "), 7u);
  EXPECT_EQ(LeadingSpaceLength("\xE2\x80\x8Bx"), 0u);  // zero width space: not white space
  EXPECT_EQ(TrailingSpaceLength(kOneToFour), 0u);
  EXPECT_EQ(LeadingSpaceLength("  "), 2u);
  EXPECT_EQ(TrailingSpaceLength("  "), 2u);
  EXPECT_EQ(TrailingSpaceLength(""), 0u);
}

}  // namespace
}  // namespace mvlm
