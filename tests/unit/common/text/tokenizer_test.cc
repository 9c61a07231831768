#include "common/text/tokenizer.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <algorithm>
#include <thread>

#include "tests/common/byte_tokenizer.h"
#include "tests/unit/common/text/text_test_util.h"

namespace headroom {
namespace {

using Special = Tokenizer::Special;

class SmolLm2 : public testing::Test {
 protected:
  static void SetUpTestSuite() { tokenizer_ = ModelTokenizer().release(); }
  static void TearDownTestSuite() { delete tokenizer_; }
  static Tokenizer* tokenizer_;
};
Tokenizer* SmolLm2::tokenizer_ = nullptr;

TEST_F(SmolLm2, EncodesAsPythonDoes) {
  const Json vectors = Vectors();
  ASSERT_GE(vectors.Find("encode")->as_array().size(), 50u);
  for (const Json& vector : vectors.Find("encode")->as_array()) {
    const std::string& text = vector.Find("text")->as_string();
    EXPECT_EQ(Must(tokenizer_->Encode(text, Special::kWithout)), Ids(*vector.Find("ids"))) << text;
    EXPECT_EQ(Must(tokenizer_->Encode(text, Special::kWith)), Ids(*vector.Find("ids_with_special")))
        << text;
  }
}

TEST_F(SmolLm2, DecodesAsPythonDoes) {
  const Json vectors = Vectors();
  ASSERT_GE(vectors.Find("decode")->as_array().size(), 50u);
  for (const Json& vector : vectors.Find("decode")->as_array()) {
    const std::vector<int32_t> ids = Ids(*vector.Find("ids"));
    EXPECT_EQ(Must(tokenizer_->Decode(ids, Special::kWithout)), vector.Find("text")->as_string());
    EXPECT_EQ(Must(tokenizer_->Decode(ids, Special::kWith)),
              vector.Find("text_with_special")->as_string());
  }
}

TEST_F(SmolLm2, TextsComeBackAndAreTheBytesOfTheirTokens) {
  std::vector<std::string> texts;
  const Json vectors = Vectors();
  for (const Json& vector : vectors.Find("encode")->as_array()) {
    if (vector.Find("comes_back")->as_bool()) texts.push_back(vector.Find("text")->as_string());
  }
  ASSERT_GE(texts.size(), 50u);
  std::mt19937_64 random(11);
  for (int round = 0; round < 300; ++round) texts.push_back(RandomText(random, 1 + round % 60));
  for (const std::string& text : texts) {
    const std::vector<int32_t> ids = Must(tokenizer_->Encode(text));
    EXPECT_EQ(Must(tokenizer_->Decode(ids, Special::kWith)), text);
    std::string bytes;
    for (const int32_t id : ids) {
      ASSERT_LT(id, tokenizer_->vocab_size());
      bytes += std::string(tokenizer_->TokenBytes(id).value());
    }
    EXPECT_EQ(bytes, text);
  }
}

TEST_F(SmolLm2, SpecialTokensAreRecognisedAndLeftOut) {
  const std::vector<int32_t> ids = Must(tokenizer_->Encode("<|im_start|>user\nhi<|im_end|>"));
  EXPECT_EQ(ids.front(), 1);
  EXPECT_EQ(ids.back(), 2);
  EXPECT_TRUE(tokenizer_->IsSpecial(1));
  EXPECT_FALSE(tokenizer_->IsSpecial(ids[1]));
  EXPECT_EQ(Must(tokenizer_->Decode(ids)), "user\nhi");
  EXPECT_EQ(tokenizer_->TokenText(1), "<|im_start|>");
  EXPECT_EQ(tokenizer_->eos_ids(), std::vector<int32_t>{2});
  EXPECT_TRUE(tokenizer_->IsEos(2));
  EXPECT_FALSE(tokenizer_->IsEos(1));
}

TEST_F(SmolLm2, ATokenIsSpelledAsTheVocabularyHasItAndStandsForItsBytes) {
  const std::vector<int32_t> ids = Must(tokenizer_->Encode(" the"));
  ASSERT_EQ(ids.size(), 1u);
  EXPECT_EQ(tokenizer_->TokenText(ids[0]), "\xC4\xA0the");
  EXPECT_EQ(tokenizer_->TokenBytes(ids[0]), " the");
}

TEST_F(SmolLm2, IdsThatAreNoTokensHaveNoText) {
  EXPECT_EQ(tokenizer_->vocab_size(), 49152);
  for (const int32_t id : {-1, 49152, 50000, INT32_MAX, INT32_MIN}) {
    EXPECT_FALSE(tokenizer_->TokenText(id).has_value());
    EXPECT_FALSE(tokenizer_->TokenBytes(id).has_value());
    EXPECT_FALSE(tokenizer_->IsSpecial(id));
    EXPECT_FALSE(tokenizer_->IsEos(id));
  }
  const std::vector<int32_t> hello = Must(tokenizer_->Encode("hello"));
  std::vector<int32_t> ids = {49152};
  ids.insert(ids.end(), hello.begin(), hello.end());
  ids.push_back(INT32_MAX);
  EXPECT_EQ(Must(tokenizer_->Decode(ids)), "hello");
  ids[1] = -7;
  const absl::Status status = tokenizer_->Decode(ids).status();
  EXPECT_TRUE(absl::IsInvalidArgument(status));
  EXPECT_EQ(status.message(), "token id -7 at position 1 is negative");
}

TEST_F(SmolLm2, WhatIsNotUtf8IsRefusedWithItsPlace) {
  for (const char* wrong : {"\xff", "\xc3", "\xed\xa0\x80", "\xf4\x90\x80\x80", "\xc0\xaf"}) {
    const absl::Status status = tokenizer_->Encode(absl::StrCat("abc", wrong)).status();
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
    EXPECT_EQ(status.message(), "text is not UTF-8 at byte 3");
  }
}

TEST_F(SmolLm2, TextsBeyondTheCapAreRefusedBeforeTheyAreEncoded) {
  const std::string text(static_cast<size_t>(Tokenizer::kMaxTextBytes) + 1, 'a');
  const absl::Status status = tokenizer_->Encode(text).status();
  EXPECT_TRUE(absl::IsInvalidArgument(status));
  EXPECT_NE(status.message().find("67108865"), std::string::npos) << status;
}

TEST_F(SmolLm2, ManyThreadsUseOneTokenizer) {
  std::mt19937_64 random(12);
  const std::string text = RandomText(random, 2000);
  const std::vector<int32_t> expected = Must(tokenizer_->Encode(text));
  std::vector<std::thread> threads;
  std::atomic<int> wrong{0};
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      for (int round = 0; round < 10; ++round) {
        wrong += *tokenizer_->Encode(text) != expected;
        wrong += *tokenizer_->Decode(expected, Special::kWith) != text;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
}

// ---------------------------------------------------------------- files

class TokenizerFiles : public testing::Test {
 protected:
  TokenizerFiles() { EXPECT_TRUE(WriteByteTokenizer(300, 512, dir_.path()).ok()); }

  // The error of loading the folder, which must be of `code` and name `file`.
  std::string ErrorOf(absl::StatusCode code, const std::string& file) {
    const absl::Status status = Tokenizer::FromModelDir(dir_.path()).status();
    EXPECT_EQ(status.code(), code) << status;
    EXPECT_NE(status.message().find(dir_.File(file)), std::string::npos) << status;
    return std::string(status.message());
  }

  const TempModelDir dir_;
};

TEST_F(TokenizerFiles, AByteTokenizerHasAnIdForEachByte) {
  const std::unique_ptr<Tokenizer> tokenizer = Must(Tokenizer::FromModelDir(dir_.path()));
  EXPECT_EQ(tokenizer->vocab_size(), 300);
  EXPECT_TRUE(tokenizer->eos_ids().empty());
  EXPECT_EQ(Must(tokenizer->Encode("\xC3\xA9 ")),
            (std::vector<int32_t>{3 + 0xC3, 3 + 0xA9, 3 + ' '}));
  EXPECT_EQ(Must(tokenizer->Encode("ab")).size(), 1u) << "a merge";
  for (int byte = 0; byte < 256; ++byte) {
    EXPECT_EQ(tokenizer->TokenBytes(3 + byte), std::string(1, static_cast<char>(byte)));
  }
  EXPECT_EQ(Must(tokenizer->Decode({3 + 0xC3})), kReplacement);
  std::mt19937_64 random(13);
  const std::string text = RandomText(random, 500);
  EXPECT_EQ(Must(tokenizer->Decode(Must(tokenizer->Encode(text)))), text);
}

TEST_F(TokenizerFiles, ErrorsNameTheFile) {
  dir_.Write("tokenizer.json", "{\"model\": 5}");
  ErrorOf(absl::StatusCode::kInvalidArgument, "tokenizer.json");
  dir_.Write("tokenizer.json", "no JSON \xff");
  ErrorOf(absl::StatusCode::kInvalidArgument, "tokenizer.json");
  dir_.Write("tokenizer.json", "");
  ErrorOf(absl::StatusCode::kInvalidArgument, "tokenizer.json");
  std::filesystem::remove(dir_.File("tokenizer.json"));
  ErrorOf(absl::StatusCode::kNotFound, "tokenizer.json");
  ASSERT_EQ(mkfifo(dir_.File("tokenizer.json").c_str(), 0600), 0);
  ErrorOf(absl::StatusCode::kInvalidArgument, "tokenizer.json");
}

TEST_F(TokenizerFiles, DamageOfATokenizerIsAnErrorAndNoCrash) {
  std::ifstream file(dir_.File("tokenizer.json"), std::ios::binary);
  const std::string whole(std::istreambuf_iterator<char>(file), {});
  std::mt19937_64 random(14);
  int refused = 0;
  for (int round = 0; round < 150; ++round) {
    std::string damaged = whole;
    if (round % 3 == 0) damaged.resize(random() % damaged.size());
    for (int i = 0; i < 3 && !damaged.empty(); ++i) {
      damaged[random() % damaged.size()] = static_cast<char>(random());
    }
    const auto tokenizer = Tokenizer::FromJson(damaged, "tokenizer.json", {});
    refused += !tokenizer.ok();
    if (tokenizer.ok()) {
      (void)(*tokenizer)->Encode("some text of letters");
      (void)(*tokenizer)->Decode({5, 260, 299});
    } else {
      EXPECT_TRUE(absl::IsInvalidArgument(tokenizer.status())) << tokenizer.status();
    }
  }
  EXPECT_GT(refused, 40);
}

TEST_F(TokenizerFiles, EndIdsComeFromTheGenerationConfigElseTheConfig) {
  dir_.Write("config.json", "{\"eos_token_id\": 5}");
  EXPECT_EQ(Must(Tokenizer::FromModelDir(dir_.path()))->eos_ids(), std::vector<int32_t>{5});
  dir_.Write("generation_config.json", "{\"eos_token_id\": [2, 0]}");
  EXPECT_EQ(Must(Tokenizer::FromModelDir(dir_.path()))->eos_ids(), (std::vector<int32_t>{2, 0}));
  dir_.Write("generation_config.json", "{\"eos_token_id\": null}");
  EXPECT_EQ(Must(Tokenizer::FromModelDir(dir_.path()))->eos_ids(), std::vector<int32_t>{5});
}

TEST_F(TokenizerFiles, EndIdsThatAreNoneAreRefused) {
  for (const char* ids : {"-1", "4294967298", "\"2\"", "[2, \"x\"]", "2.0", "{}"}) {
    dir_.Write("generation_config.json", absl::StrCat("{\"eos_token_id\": ", ids, "}"));
    EXPECT_NE(ErrorOf(absl::StatusCode::kInvalidArgument, "generation_config.json")
                  .find("'eos_token_id'"),
              std::string::npos);
  }
  for (const char* file : {"[]", "5", "[{\"eos_token_id\": 2}]"}) {
    dir_.Write("generation_config.json", file);
    ErrorOf(absl::StatusCode::kInvalidArgument, "generation_config.json");
  }
  dir_.Write("generation_config.json", "{\"eos_token_id\": 300}");
  EXPECT_NE(ErrorOf(absl::StatusCode::kInvalidArgument, "tokenizer.json").find("300"),
            std::string::npos);
  std::string many = "2";
  for (int i = 0; i < 64; ++i) many += ",2";
  dir_.Write("generation_config.json", absl::StrCat("{\"eos_token_id\": [", many, "]}"));
  EXPECT_NE(ErrorOf(absl::StatusCode::kInvalidArgument, "generation_config.json").find("65 ids"),
            std::string::npos);
}

}  // namespace
}  // namespace headroom
