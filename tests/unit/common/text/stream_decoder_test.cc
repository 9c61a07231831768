#include "common/text/stream_decoder.h"

#include <gtest/gtest.h>

#include "tests/common/byte_tokenizer.h"
#include "tests/unit/common/text/text_test_util.h"

namespace headroom {
namespace {

using Special = Tokenizer::Special;

// All deltas in a row, each of which must be whole UTF-8, and what Finish() adds.
std::string Stream(StreamDecoder decoder, const std::vector<int32_t>& ids) {
  std::string text;
  for (const int32_t id : ids) {
    const std::string delta = Must(decoder.Push(id));
    EXPECT_TRUE(CheckUtf8(delta, "delta").ok());
    text += delta;
  }
  return text + Must(decoder.Finish());
}

std::unique_ptr<Tokenizer> ByteTokenizer() {
  const TempModelDir dir;
  EXPECT_TRUE(WriteByteTokenizer(400, 512, dir.path()).ok());
  return Must(Tokenizer::FromModelDir(dir.path()));
}

TEST(StreamDecoder, DeltasInARowAreTheWholeTextForAnyIds) {
  const std::unique_ptr<Tokenizer> smollm2 = ModelTokenizer();
  const std::unique_ptr<Tokenizer> bytes = ByteTokenizer();
  std::mt19937_64 random(21);
  for (int round = 0; round < 400; ++round) {
    const Tokenizer& tokenizer = round % 2 == 0 ? *smollm2 : *bytes;
    std::vector<int32_t> ids(1 + random() % 50);
    // Every third sequence of specials and single bytes, where nearly nothing is whole.
    const uint64_t below = round % 3 == 0 ? 280 : tokenizer.vocab_size() + 3;
    for (int32_t& id : ids) id = static_cast<int32_t>(random() % below);
    for (const Special special : {Special::kWithout, Special::kWith}) {
      EXPECT_EQ(Stream(StreamDecoder(&tokenizer, {}, special), ids),
                Must(tokenizer.Decode(ids, special)))
          << "round " << round;
    }
  }
}

TEST(StreamDecoder, EncodedTextsComeBack) {
  const std::unique_ptr<Tokenizer> tokenizer = ModelTokenizer();
  std::mt19937_64 random(22);
  for (int round = 0; round < 100; ++round) {
    const std::string text = RandomText(random, 40);
    EXPECT_EQ(Stream(StreamDecoder(tokenizer.get(), {}, Special::kWith),
                     Must(tokenizer->Encode(text))),
              text);
  }
}

TEST(StreamDecoder, HoldsACharacterBackUntilItIsWhole) {
  const std::unique_ptr<Tokenizer> tokenizer = ByteTokenizer();
  StreamDecoder decoder(tokenizer.get());
  const std::vector<int32_t> ids = Must(tokenizer->Encode(absl::StrCat("x", kEmoji, "y")));
  ASSERT_EQ(ids.size(), 6u);
  std::vector<std::string> deltas;
  for (const int32_t id : ids) deltas.push_back(Must(decoder.Push(id)));
  EXPECT_EQ(deltas, (std::vector<std::string>{"x", "", "", "", kEmoji, "y"}));
  EXPECT_EQ(Must(decoder.Finish()), "");
}

TEST(StreamDecoder, WhatIsIncompleteIsReplacedInTheEndOrWhenItCannotGoOn) {
  const std::unique_ptr<Tokenizer> tokenizer = ByteTokenizer();
  StreamDecoder decoder(tokenizer.get());
  EXPECT_EQ(Must(decoder.Push(3 + 0xF0)), "");
  EXPECT_EQ(Must(decoder.Push(3 + 0x9F)), "");
  EXPECT_EQ(Must(decoder.Finish()), kReplacement);
  StreamDecoder broken(tokenizer.get());
  EXPECT_EQ(Must(broken.Push(3 + 0xF0)), "");
  EXPECT_EQ(Must(broken.Push(3 + 'a')), absl::StrCat(kReplacement, "a"));
}

TEST(StreamDecoder, SpecialTokensHaveNoTextAndBreakNoCharacter) {
  const std::unique_ptr<Tokenizer> tokenizer = ByteTokenizer();
  StreamDecoder decoder(tokenizer.get());
  EXPECT_EQ(Must(decoder.Push(3 + 0xC3)), "");
  EXPECT_EQ(Must(decoder.Push(kByteTokenizerEos)), "");
  EXPECT_EQ(Must(decoder.Push(1000)), "") << "beyond the vocabulary";
  EXPECT_EQ(Must(decoder.Push(3 + 0xA9)), "\xC3\xA9");
  StreamDecoder with(tokenizer.get(), {}, Special::kWith);
  EXPECT_EQ(Must(with.Push(kByteTokenizerEos)), "<|im_end|>");
}

TEST(StreamDecoder, ANegativeIdIsRefused) {
  const std::unique_ptr<Tokenizer> tokenizer = ByteTokenizer();
  StreamDecoder decoder(tokenizer.get());
  EXPECT_TRUE(absl::IsInvalidArgument(decoder.Push(-1).status()));
}

// ---------------------------------------------------------------- sentencepiece

// Ids: <unk>, <s>, </s>, the 256 bytes, then these. As Llama 2 decodes: "\u2581" is a space, and the
// first one of a text is stripped.
constexpr int32_t kFirstByte = 3;
constexpr int32_t kHello = 259, kWorld = 260, kComma = 261, kSpace = 262;

std::unique_ptr<Tokenizer> SentencePieceTokenizer() {
  Json::Object vocab = {{"<unk>", 0}, {"<s>", 1}, {"</s>", 2}};
  for (int byte = 0; byte < 256; ++byte) {
    char name[8];
    std::snprintf(name, sizeof(name), "<0x%02X>", byte);
    vocab.emplace_back(name, kFirstByte + byte);
  }
  vocab.emplace_back("\xE2\x96\x81Hello", kHello);
  vocab.emplace_back("\xE2\x96\x81world", kWorld);
  vocab.emplace_back(",", kComma);
  vocab.emplace_back("\xE2\x96\x81", kSpace);
  Json::Array added;
  for (int id = 0; id < 3; ++id) {
    added.push_back(Json::Object{{"id", id}, {"content", vocab[id].first}, {"single_word", false},
                                 {"lstrip", false}, {"rstrip", false}, {"normalized", false},
                                 {"special", true}});
  }
  const Json::Array decoders = {
      Json::Object{{"type", "Replace"}, {"pattern", Json::Object{{"String", "\xE2\x96\x81"}}},
                   {"content", " "}},
      Json::Object{{"type", "ByteFallback"}}, Json::Object{{"type", "Fuse"}},
      Json::Object{{"type", "Strip"}, {"content", " "}, {"start", 1}, {"stop", 0}}};
  const Json tokenizer = Json::Object{
      {"version", "1.0"}, {"truncation", nullptr}, {"padding", nullptr}, {"added_tokens", added},
      {"normalizer", nullptr}, {"pre_tokenizer", nullptr}, {"post_processor", nullptr},
      {"decoder", Json::Object{{"type", "Sequence"}, {"decoders", decoders}}},
      {"model", Json::Object{{"type", "BPE"}, {"dropout", nullptr}, {"unk_token", "<unk>"},
                             {"continuing_subword_prefix", nullptr},
                             {"end_of_word_suffix", nullptr}, {"fuse_unk", true},
                             {"byte_fallback", true}, {"vocab", vocab},
                             {"merges", Json::Array()}}}};
  return Must(Tokenizer::FromJson(tokenizer.Dump(), "tokenizer.json", {}));
}

TEST(SentencePieceStream, TheFirstWordKeepsItsSpaceAfterAPrompt) {
  const std::unique_ptr<Tokenizer> tokenizer = SentencePieceTokenizer();
  EXPECT_EQ(Stream(StreamDecoder(tokenizer.get()), {kHello, kComma, kWorld}), "Hello, world");
  const std::vector<int32_t> prompt = {1, kHello, kComma};
  EXPECT_EQ(Stream(StreamDecoder(tokenizer.get(), prompt), {kWorld, kWorld}), " world world");
}

TEST(SentencePieceStream, ByteTokensMakeCharacters) {
  const std::unique_ptr<Tokenizer> tokenizer = SentencePieceTokenizer();
  StreamDecoder decoder(tokenizer.get());
  EXPECT_EQ(Must(decoder.Push(kHello)), "Hello");
  for (const int byte : {0xF0, 0x9F, 0x98}) EXPECT_EQ(Must(decoder.Push(kFirstByte + byte)), "");
  EXPECT_EQ(Must(decoder.Push(kFirstByte + 0x80)), kEmoji);
  EXPECT_EQ(Must(decoder.Push(kWorld)), " world");
  EXPECT_EQ(Must(decoder.Push(kFirstByte + 0xC3)), "");
  EXPECT_EQ(Must(decoder.Push(kComma)), absl::StrCat(kReplacement, ","));
}

TEST(SentencePieceStream, DeltasInARowAreTheWholeTextWhereCharactersAreWhole) {
  const std::unique_ptr<Tokenizer> tokenizer = SentencePieceTokenizer();
  std::mt19937_64 random(23);
  for (int round = 0; round < 300; ++round) {
    std::vector<int32_t> ids;
    for (int i = 0; i < 12; ++i) {
      switch (random() % 7) {
        case 0: ids.push_back(kHello); break;
        case 1: ids.push_back(kWorld); break;
        case 2: ids.push_back(kComma); break;
        case 3: ids.push_back(kSpace); break;
        case 4: ids.push_back(static_cast<int32_t>(random() % 3)); break;
        case 5: ids.insert(ids.end(), {kFirstByte + 0xC3, kFirstByte + 0xA9}); break;
        case 6:
          for (const int byte : {0xF0, 0x9F, 0x98, 0x80}) ids.push_back(kFirstByte + byte);
          break;
      }
    }
    for (const Special special : {Special::kWithout, Special::kWith}) {
      EXPECT_EQ(Stream(StreamDecoder(tokenizer.get(), {}, special), ids),
                Must(tokenizer->Decode(ids, special)))
          << "round " << round;
    }
  }
}

}  // namespace
}  // namespace headroom
