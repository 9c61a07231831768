// Tokenizers of several families: what Python's tokenizers makes of published texts and of 10,000 random
// ones is what ours makes of them. make_family_vectors.py draws the same texts and wrote the sums.
#include <gtest/gtest.h>

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "common/text/stream_decoder.h"
#include "common/text/tokenizer.h"
#include "tests/common/sha256.h"
#include "tests/unit/common/text/text_test_util.h"

namespace headroom {
namespace {

using Special = Tokenizer::Special;

constexpr int kBatch = 100;
constexpr size_t kDigits = 16;  // of a sum that are kept
// The Rust library does the work, which no sanitizer sees: all of it in one build.
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kBatches = 10;
#else
constexpr size_t kBatches = 100;
#endif

// ---------------------------------------------------------------- the same texts as in Python

constexpr const char* kSpaces[] = {" ",    "  ",   "    ",     "\n",           "\n\n",
                                   "\t",   "\r\n", "\u00a0",   "\u3000",       "\u2028"};
constexpr const char* kWords[] = {
    "the",     " and",  " I'm",   "don't",  "WE'LL",        "2024",       " 12345",        "def f(x):",
    "://",     "\u2581", "Hello", " world", "<s>",          "</s>",       "<unk>",         "<bos>",
    "<0x0A>",  "<|im_start|>",    "<|im_end|>",             "<|endoftext|>", "<|eot_id|>",
    "<start_of_turn>",  "[INST]", "</"};
constexpr uint32_t kJoiners[] = {0x200D, 0xFE0F, 0x0301, 0x0308, 0x1F3FB};

// splitmix64
class Draw {
 public:
  explicit Draw(uint64_t seed) : state_(seed) {}
  uint64_t Below(uint64_t limit) {
    uint64_t z = state_ += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return (z ^ (z >> 31)) % limit;
  }
  uint32_t CodeFrom(uint32_t first, uint64_t count) {
    return first + static_cast<uint32_t>(Below(count));
  }

 private:
  uint64_t state_;
};

std::string Piece(Draw& draw) {
  const uint64_t kind = draw.Below(10);
  if (kind <= 1) return Utf8Of(draw.CodeFrom(0x20, 0x5F));
  if (kind == 2) return kSpaces[draw.Below(std::size(kSpaces))];
  if (kind == 3) return kWords[draw.Below(std::size(kWords))];
  if (kind == 4) return Utf8Of(draw.CodeFrom(0xA0, 0x760));
  if (kind == 5) return Utf8Of(draw.CodeFrom(0x900, 0x700));
  if (kind == 6) return Utf8Of(draw.CodeFrom(0x4E00, 0x5200));
  if (kind == 7) return Utf8Of(draw.CodeFrom(0xAC00, 0x2BA4));
  if (kind == 8) {
    return Utf8Of(draw.Below(2) != 0 ? kJoiners[draw.Below(std::size(kJoiners))]
                                     : draw.CodeFrom(0x1F300, 0x300));
  }
  const uint32_t code = draw.CodeFrom(0, 0x110000);
  return Utf8Of(code >= 0xD800 && code < 0xE000 ? 0xFFFD : code);
}

std::string DrawText(Draw& draw) {
  std::string text;
  for (uint64_t left = 1 + draw.Below(24); left > 0; --left) text += Piece(draw);
  return text;
}

// ---------------------------------------------------------------- the tokenizers

// Of those that are fetched: scripts/fetch_tokenizers.
std::string TokenizersDir() { return Environment("HEADROOM_SOURCE_DIR") + "/.data/tokenizers"; }

class Families : public testing::TestWithParam<const char*> {
 protected:
  // The text of tokenizer.json, or nothing if it has not been fetched.
  static std::string FileOf(const std::string& name) {
    if (absl::EndsWith(name, "_like")) return TestData("built_tokenizers.json").Find(name)->Dump();
    const std::string folder = name == "smollm2" ? ModelDir() : TokenizersDir() + "/" + name;
    std::ifstream file(folder + "/tokenizer.json", std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
  }
  void SetUp() override {
    const std::string file = FileOf(GetParam());
    if (file.empty()) GTEST_SKIP() << GetParam() << ": run scripts/fetch_tokenizers";
    tokenizer_ = Must(Tokenizer::FromJson(file, GetParam(), {}));
    vectors_ = *TestData("family_vectors.json").Find("tokenizers")->Find(GetParam());
  }

  // The deltas of a stream of its own, in a row.
  std::string Streamed(const std::vector<int32_t>& ids, Special special) const {
    StreamDecoder stream(tokenizer_.get(), {}, special);
    std::string text;
    for (const int32_t id : ids) text += Must(stream.Push(id));
    return text + Must(stream.Finish());
  }

  std::unique_ptr<Tokenizer> tokenizer_;
  Json vectors_;
};

TEST_P(Families, TenThousandTextsAreEncodedAndDecodedAsInPython) {
  ASSERT_EQ(tokenizer_->vocab_size(), vectors_.Find("vocab_size")->as_int());
  const auto sums = [this](const char* kind) { return vectors_.Find(kind)->as_array(); };
  const Json::Array encoded = sums("encoded"), decoded = sums("decoded"), of_ids = sums("decoded_ids");
  ASSERT_EQ(encoded.size(), 100u);
  Draw draw(20261129);
  for (size_t batch = 0; batch < kBatches; ++batch) {
    std::string ids_of_texts, texts_of_ids, texts_of_drawn;
    for (int i = 0; i < kBatch; ++i) {
      const std::string text = DrawText(draw);
      const std::vector<int32_t> ids =
          Must(tokenizer_->Encode(text, i % 2 == 1 ? Special::kWith : Special::kWithout));
      ids_of_texts.append(reinterpret_cast<const char*>(ids.data()), ids.size() * sizeof(ids[0]));
      ids_of_texts += "\xff\xff\xff\xff";
      const Special special = i / 2 % 2 == 1 ? Special::kWithout : Special::kWith;
      const std::string back = Must(tokenizer_->Decode(ids, special));
      absl::StrAppend(&texts_of_ids, back, "\xff");
      if (i % 8 == 0 && !absl::StrContains(back, kReplacement)) {  // a third of the time for all
        EXPECT_EQ(Streamed(ids, special), back) << "batch " << batch << ", text " << i;
      }
      std::vector<int32_t> drawn(1 + draw.Below(20));
      for (int32_t& id : drawn) id = static_cast<int32_t>(draw.Below(tokenizer_->vocab_size()));
      absl::StrAppend(&texts_of_drawn, Must(tokenizer_->Decode(drawn, special)), "\xff");
    }
    const auto sum = [](const std::string& bytes) { return Sha256Of(bytes).substr(0, kDigits); };
    EXPECT_EQ(sum(ids_of_texts), encoded[batch].as_string()) << "batch " << batch;
    EXPECT_EQ(sum(texts_of_ids), decoded[batch].as_string()) << "batch " << batch;
    EXPECT_EQ(sum(texts_of_drawn), of_ids[batch].as_string()) << "batch " << batch;
  }
  // Vectors that somebody else published, where there are some.
  const Json* const published = vectors_.Find("published");
  if (published == nullptr) return;
  EXPECT_GE(published->as_array().size(), 46u);
  for (const Json& vector : published->as_array()) {
    const std::string& text = vector.as_array()[0].as_string();
    const std::vector<int32_t> ids = Ids(vector.as_array()[1]);
    EXPECT_EQ(Must(tokenizer_->Encode(text, Special::kWithout)), ids) << text;
  }
}

INSTANTIATE_TEST_SUITE_P(All, Families,
                         testing::Values("smollm2", "llama3", "qwen3", "gemma3", "mistral", "llama3_like",
                                         "qwen2_like", "llama2_like", "mistral_like", "gemma2_like"),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace headroom
