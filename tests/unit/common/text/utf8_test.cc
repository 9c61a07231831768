#include "common/text/utf8.h"

#include <gtest/gtest.h>

#include "tests/unit/common/text/text_test_util.h"

namespace headroom {
namespace {

TEST(CheckUtf8, TakesEveryCharacterAndNothingElse) {
  for (const char* text : {"", "a", "\x7f", "\xc2\x80", "\xdf\xbf", "\xe0\xa0\x80", "\xed\x9f\xbf",
                           "\xee\x80\x80", "\xef\xbf\xbf", "\xf0\x90\x80\x80", "\xf4\x8f\xbf\xbf"}) {
    EXPECT_TRUE(CheckUtf8(text, "text").ok()) << text;
  }
  // Lone and missing continuations, overlong forms, surrogates, beyond U+10FFFF, bytes never used.
  for (const char* text : {"\x80", "\xbf", "\xc2", "\xe0\xa0", "\xf0\x90\x80", "\xc0\xaf", "\xc1\xbf",
                           "\xe0\x9f\xbf", "\xed\xa0\x80", "\xed\xbf\xbf", "\xf0\x8f\xbf\xbf",
                           "\xf4\x90\x80\x80", "\xf5\x80\x80\x80", "\xfe", "\xff", "\xc2" "a"}) {
    EXPECT_TRUE(absl::IsInvalidArgument(CheckUtf8(text, "text"))) << absl::StrCat(text);
  }
  EXPECT_TRUE(CheckUtf8(absl::string_view("\0a", 2), "text").ok());
}

TEST(CheckUtf8, SaysWhatAndWhere) {
  const absl::Status status = CheckUtf8("ab\xc3\xa9\xe2\x82", "messages[1].content");
  EXPECT_EQ(status.message(), "messages[1].content is not UTF-8 at byte 4");
}

// ASCII is passed over in groups: a wrong byte is found wherever in one, or after the last, it lies.
TEST(CheckUtf8, FindsAWrongByteAtAnyPlace) {
  for (size_t size = 1; size < 40; ++size) {
    EXPECT_TRUE(CheckUtf8(std::string(size, 'a'), "text").ok());
    for (size_t at = 0; at < size; ++at) {
      std::string text(size, 'a');
      text[at] = '\xff';
      EXPECT_EQ(CheckUtf8(text, "text").message(), absl::StrCat("text is not UTF-8 at byte ", at));
    }
  }
}

// Cuts bytes into random pieces; the pieces' text in a row, each of which must be whole.
std::string Assemble(const std::string& bytes, std::mt19937_64& random) {
  Utf8Assembler assembler;
  std::string text;
  for (size_t at = 0; at < bytes.size();) {
    const size_t size = 1 + random() % 4;
    const std::string piece = assembler.Push(bytes.substr(at, size));
    EXPECT_TRUE(CheckUtf8(piece, "piece").ok());
    text += piece;
    at += size;
  }
  return text + assembler.Finish();
}

TEST(Utf8Assembler, GivesWholeCharactersWhereverPiecesEnd) {
  std::mt19937_64 random(3);
  for (int round = 0; round < 500; ++round) {
    const std::string text = RandomText(random, 20);
    EXPECT_EQ(Assemble(text, random), text);
  }
}

TEST(Utf8Assembler, WhatIsNoTextDoesNotDependOnThePieces) {
  std::mt19937_64 random(4);
  for (int round = 0; round < 2000; ++round) {
    std::string bytes;
    for (int i = 0; i < 12; ++i) bytes += static_cast<char>(0x70 + random() % 0x90);
    const std::string text = Assemble(bytes, random);
    EXPECT_EQ(Assemble(bytes, random), text);
    EXPECT_TRUE(CheckUtf8(text, "text").ok());
  }
}

TEST(Utf8Assembler, ReplacesEachMaximalPart) {
  std::mt19937_64 random(5);
  const std::string r = kReplacement;
  // Table 3-8 of the Unicode standard, and its neighbours.
  EXPECT_EQ(Assemble("\xC0\xAF\xE0\x80\xBF\xF0\x81\x82\x41", random),
            r + r + r + r + r + r + r + r + "A");
  EXPECT_EQ(Assemble("\xED\xA0\x80\xED\xBF\xBF\xED\xAF\x41", random),
            r + r + r + r + r + r + r + r + "A");
  EXPECT_EQ(Assemble("\xF4\x91\x92\x93\xFF\x41\x80\xBF\x42", random),
            r + r + r + r + r + "A" + r + r + "B");
  EXPECT_EQ(Assemble("\xE1\x80\xE2\xF0\x91\x92\xF1\xBF\x41", random), r + r + r + r + "A");
}

TEST(Utf8Assembler, HoldsBackAtMostThreeBytesAndGoesOn) {
  Utf8Assembler assembler;
  EXPECT_EQ(assembler.Push("\xF0\x9F"), "");
  EXPECT_EQ(assembler.Push("\x98"), "");
  EXPECT_EQ(assembler.Push("\x80"), kEmoji);
  EXPECT_EQ(assembler.Push("a\xF0\x9F\x98"), "a");
  EXPECT_EQ(assembler.Finish(), kReplacement);
  EXPECT_EQ(assembler.Finish(), "");
  EXPECT_EQ(assembler.Push("b"), "b");
}

}  // namespace
}  // namespace headroom
