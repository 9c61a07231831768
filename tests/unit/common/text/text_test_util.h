// What the tests of common/text share.
#ifndef HEADROOM_TESTS_UNIT_COMMON_TEXT_TEXT_TEST_UTIL_H_
#define HEADROOM_TESTS_UNIT_COMMON_TEXT_TEXT_TEST_UTIL_H_

#include <gtest/gtest.h>
#include <stdlib.h>

#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "common/json.h"
#include "common/text/tokenizer.h"

namespace headroom {

inline constexpr char kReplacement[] = "\xEF\xBF\xBD";
inline constexpr char kEmoji[] = "\xF0\x9F\x98\x80";

// The value of a StatusOr that must be OK.
template <typename T>
T Must(absl::StatusOr<T> value) {
  EXPECT_TRUE(value.ok()) << value.status();
  if (!value.ok()) std::abort();
  return *std::move(value);
}

// A variable of the test's environment that ctest sets.
inline std::string Environment(const char* name) {
  const char* const value = getenv(name);
  if (value == nullptr) {
    std::fprintf(stderr, "%s is not set: run this by ctest\n", name);
    std::abort();
  }
  return value;
}

// The folder of SmolLM2-135M-Instruct, which scripts/fetch_model makes.
inline std::string ModelDir() { return Environment("HEADROOM_MODEL_DIR"); }

inline std::unique_ptr<Tokenizer> ModelTokenizer() {
  return Must(Tokenizer::FromModelDir(ModelDir()));
}

// A file beside the tests.
inline Json TestData(const std::string& name) {
  return Must(Json::ParseFile(
      absl::StrCat(Environment("HEADROOM_SOURCE_DIR"), "/tests/unit/common/text/", name), 1 << 20));
}

// What Python makes of texts, ids and messages; make_tokenizer_vectors.py wrote it.
inline Json Vectors() { return TestData("tokenizer_vectors.json"); }

inline std::vector<int32_t> Ids(const Json& array) {
  std::vector<int32_t> ids;
  for (const Json& id : array.as_array()) ids.push_back(static_cast<int32_t>(id.as_int()));
  return ids;
}

// A folder for a model's files; gone at the end.
class TempModelDir {
 public:
  TempModelDir() {
    std::string name = testing::TempDir() + "/headroom-text-XXXXXX";
    path_ = mkdtemp(name.data());
  }
  ~TempModelDir() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  const std::string& path() const { return path_; }
  std::string File(const std::string& name) const { return absl::StrCat(path_, "/", name); }
  void Write(const std::string& name, const std::string& text) const {
    std::ofstream file(File(name), std::ios::binary | std::ios::trunc);
    file << text;
    EXPECT_TRUE(file.good());
  }

 private:
  std::string path_;
};

// A code point as UTF-8. REQUIRES: no surrogate
inline std::string Utf8Of(uint32_t code) {
  const auto byte = [code](uint32_t lead, int shift) {
    return static_cast<char>(lead | (lead == 0x80 ? code >> shift & 0x3F : code >> shift));
  };
  if (code < 0x80) return {byte(0, 0)};
  if (code < 0x800) return {byte(0xC0, 6), byte(0x80, 0)};
  if (code < 0x10000) return {byte(0xE0, 12), byte(0x80, 6), byte(0x80, 0)};
  return {byte(0xF0, 18), byte(0x80, 12), byte(0x80, 6), byte(0x80, 0)};
}

// A text of `characters` random characters of all sizes, many of them emoji, letters, spaces and digits;
// without those for whose bytes SmolLM2's vocabulary has no token.
inline std::string RandomText(std::mt19937_64& random, int characters) {
  std::string text;
  for (int i = 0; i < characters; ++i) {
    uint32_t code = 0;
    switch (random() % 6) {
      case 0: code = 0x20 + random() % 0x5F; break;
      case 1: code = "    \n\t019aeist"[random() % 14]; break;
      case 2: code = 0xA0 + random() % 0x700; break;
      case 3: code = 0x4E00 + random() % 0x5000; break;
      case 4: code = 0x1F300 + random() % 0x300; break;
      case 5: code = random() % 0x110000; break;
    }
    const bool surrogate = code >= 0xD800 && code < 0xE000;
    const bool no_token = code >= 0x40000 && code < 0xC0000;  // F1.. and F2..
    if (surrogate || no_token || (code < 0x20 && code != '\n' && code != '\t')) code = 0xFFFD;
    text += Utf8Of(code);
  }
  return text;
}

}  // namespace headroom

#endif  // HEADROOM_TESTS_UNIT_COMMON_TEXT_TEXT_TEST_UTIL_H_
