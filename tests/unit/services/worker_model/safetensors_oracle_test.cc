// What is a well-formed safetensors file: our reader and the format's own library agree on thousands
// of files that are almost valid. Where they do not, we are the stricter one, by one of the rules
// named here.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "services/worker/model/safetensors.h"
#include "tests/unit/services/worker_model/test_folder.h"

// tests/oracles/safetensors: 1 if the Rust crate takes these bytes for a file, else 0.
extern "C" int32_t safetensors_accepts(const uint8_t* data, size_t size);

namespace headroom {
namespace {

// Files that the crate accepts and we refuse, by what our error says.
struct StricterRule {
  const char* error;
  const char* why;
};
constexpr StricterRule kStricter[] = {
    {"twice in one object", "the format forbids it; the crate takes the last one of a name"},
    {"nested deeper than 64", "the crate's parser stops at 128; the format nests to a depth of 3"},
    {"an integer beyond 64 bits",
     "the crate holds dimensions up to 2^64 - 1, which only fit a file beside a dimension of 0, and "
     "takes any number under a name that it does not know"},
    {"expected an object of dtype, shape and data_offsets",
     "what its derived parser takes besides: the three values as a list, without names"},
    {"at most 4194304", "the format's limit is 100 MB; no model of ours comes near 4 MiB"},
    {"has more than 4096 values",
     "an entry of the format has a type, a shape and two offsets; more would only take memory"},
    {"'dtype' is {", "what its derived parser takes besides: {\"F32\": null} for \"F32\""},
};

const StricterRule* RuleOf(const absl::Status& status) {
  for (const StricterRule& rule : kStricter) {
    if (absl::StrContains(status.message(), rule.error)) return &rule;
  }
  return nullptr;
}

// A file whose length field is right.
std::string FileOf(const std::string& header, const std::string& data) {
  const uint64_t length = header.size();
  std::string file(sizeof(length), '\0');
  std::memcpy(file.data(), &length, sizeof(length));
  return file + header + data;
}

bool CrateAccepts(const std::string& file) {
  return safetensors_accepts(reinterpret_cast<const uint8_t*>(file.data()), file.size()) == 1;
}

class OracleTest : public testing::Test {
 protected:
  absl::Status OurStatus(const std::string& file) {
    folder_.Write("model.safetensors", file);
    return SafetensorsReader::Open(folder_.path()).status();
  }
  // Empty if both agree or we are stricter by a rule, which is counted; else what is wrong. A refusal
  // is one short line that begins with the file.
  std::string Disagreement(const std::string& file) {
    const absl::Status ours = OurStatus(file);
    const bool crate_accepts = CrateAccepts(file);
    ++(ours.ok() ? accepted_ : refused_);
    const std::string where =
        absl::StrCat(crate_accepts ? "\nthe crate accepts " : "\nthe crate refuses ",
                     absl::CHexEscape(file));
    if (ours.ok()) return crate_accepts ? "" : absl::StrCat("accepted", where);
    const std::string path = folder_.path() + "/model.safetensors";
    if (!absl::StartsWith(ours.message(), path) || absl::StrContains(ours.message(), "\n") ||
        ours.message().size() > path.size() + 400) {
      return absl::StrCat("not worded as it should: ", ours.message(), where);
    }
    if (!crate_accepts) return "";
    if (const StricterRule* const rule = RuleOf(ours); rule != nullptr) {
      ++by_rule_[rule->error];
      return "";
    }
    return absl::StrCat(ours.message(), where);
  }

  const TestFolder folder_;
  int accepted_ = 0;
  int refused_ = 0;
  std::map<std::string, int> by_rule_;
};

// ---------------------------------------------------------------- cases made by hand

std::string OneTensor(const std::string& dtype, const std::string& shape, int64_t bytes) {
  return absl::StrCat(R"({"a":{"dtype":)", dtype, R"(,"shape":)", shape, R"(,"data_offsets":[0,)",
                      bytes, "]}}");
}

TEST_F(OracleTest, BothTakeWhatTheFormatAllows) {
  const std::string f32 = OneTensor("\"F32\"", "[1]", 4);
  for (const auto& [header, bytes] : std::vector<std::pair<std::string, int>>{
           {"{}", 0},
           {R"({"__metadata__":{}})", 0},
           {R"({"__metadata__":null})", 0},
           {R"({"__metadata__":{"":"","a":"\u0000\ud83d\ude00"}})", 0},
           {f32, 4},
           {f32 + "    ", 4},
           {" \n\t\r" + f32, 4},
           {OneTensor("\"F32\"", "[]", 4), 4},
           {OneTensor("\"F32\"", "[0]", 0), 0},
           {OneTensor("\"F32\"", "[0,4611686018427387904,4]", 0), 0},
           {OneTensor("\"F32\"", "[4611686018427387904,0]", 0), 0},
           {OneTensor("\"F32\"", "[4611686018427387904,2,0]", 0), 0},
           {OneTensor("\"F4\"", "[2,3]", 3), 3},
           {OneTensor("\"F6_E2M3\"", "[4]", 3), 3},
           {OneTensor("\"F6_E3M2\"", "[8]", 6), 6},
           {OneTensor("\"C64\"", "[2]", 16), 16},
           {OneTensor("\"F8_E8M0\"", "[3]", 3), 3},
           {OneTensor("\"F8_E4M3FNUZ\"", "[3]", 3), 3},
           {OneTensor("\"F8_E5M2FNUZ\"", "[3]", 3), 3},
           {R"({"a":{"x":[{"y":1e300}],"dtype":"U8","shape":[],"data_offsets":[0,1],"":-7}})", 1},
       }) {
    const std::string file = FileOf(header, std::string(bytes, 'd'));
    EXPECT_TRUE(CrateAccepts(file)) << header;
    EXPECT_TRUE(OurStatus(file).ok()) << header << ": " << OurStatus(file);
  }
}

TEST_F(OracleTest, BothRefuseWhatIsAlmostAFile) {
  const std::string f32 = OneTensor("\"F32\"", "[1]", 4);
  for (const std::string& header : std::vector<std::string>{
           "",
           " ",
           "null",
           "[]",
           "{}",  // and 4 bytes of data that no tensor has
           "\xEF\xBB\xBF" + f32,
           f32 + std::string(1, '\0'),
           f32 + "{}",
           f32 + ",",
           R"({"__metadata__":{"a":1},)" + f32.substr(1),
           R"({"__metadata__":{"a":null},)" + f32.substr(1),
           R"({"__metadata__":[],)" + f32.substr(1),
           R"({"__metadata__":"a",)" + f32.substr(1),
           R"({"__metadata__":{},"__metadata__":{},)" + f32.substr(1),
           R"({"b":null,)" + f32.substr(1),
           R"({"b":{},)" + f32.substr(1),
           R"({"b":"F32",)" + f32.substr(1),
           R"({"\ud800":3,)" + f32.substr(1),
           "{\"\xff\":3," + f32.substr(1),
           OneTensor("\"F4\"", "[9]", 4),
           OneTensor("\"F6_E2M3\"", "[5]", 4),
           OneTensor("\"f32\"", "[1]", 4),
           OneTensor("32", "[1]", 4),
           OneTensor("null", "[1]", 4),
           OneTensor("\"F32\"", "1", 4),
           OneTensor("\"F32\"", "[1.0]", 4),
           OneTensor("\"F32\"", "[\"1\"]", 4),
           OneTensor("\"F32\"", "[-1]", 4),
           OneTensor("\"F32\"", "[[1]]", 4),
           OneTensor("\"F32\"", "{\"0\":1}", 4),
           OneTensor("\"F32\"", "[4611686018427387904,4,0]", 0),
           OneTensor("\"U8\"", "[4294967296,4294967296]", 0),
           OneTensor("\"U8\"", "[4611686018427387905,4]", 4),
           R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[-0,4]}})",
           R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4,4]}})",
           R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[4]}})",
           R"({"a":{"dtype":"F32","shape":[1],"data_offsets":{"0":0,"1":4}}})",
           R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,18446744073709551620]}})",
           R"({"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}})",
           R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":1e400}})",
       }) {
    const std::string file = FileOf(header, "data");
    EXPECT_FALSE(CrateAccepts(file)) << header;
    EXPECT_FALSE(OurStatus(file).ok()) << header;
  }
}

TEST_F(OracleTest, EachRuleByWhichWeAreStricter) {
  const std::string f32 = OneTensor("\"F32\"", "[1]", 4);
  const std::string deep =
      R"({"a":{"x":)" + std::string(70, '[') + std::string(70, ']') + "," + f32.substr(6);
  std::string many;
  for (int i = 0; i < 5000; ++i) many += "1,";
  for (const auto& [header, error] : std::vector<std::pair<std::string, std::string>>{
           {R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},)" + f32.substr(1),
            kStricter[0].error},
           {R"({"__metadata__":{"a":"1","a":"2"},)" + f32.substr(1), kStricter[0].error},
           {R"({"a":{"x":1,"x":1,)" + f32.substr(6), kStricter[0].error},
           {deep, kStricter[1].error},
           {R"({"a":{"x":9223372036854775808,)" + f32.substr(6), kStricter[2].error},
           {R"({"b":{"dtype":"U8","shape":[0,18446744073709551615],"data_offsets":[0,0]},)" +
                f32.substr(1),
            kStricter[2].error},
           {R"({"a":["F32",[1],[0,4]]})", kStricter[3].error},
           {f32 + std::string(4 << 20, ' '), kStricter[4].error},
           {R"({"a":{"x":[)" + many + "1]," + f32.substr(6), kStricter[5].error},
           {OneTensor(R"({"F32":null})", "[1]", 4), kStricter[6].error},
       }) {
    const std::string file = FileOf(header, "data");
    EXPECT_TRUE(CrateAccepts(file)) << header;
    const absl::Status ours = OurStatus(file);
    ASSERT_NE(RuleOf(ours), nullptr) << header << ": " << ours;
    EXPECT_EQ(RuleOf(ours)->error, error) << RuleOf(ours)->why;
  }
}

// ---------------------------------------------------------------- mutations

struct Content {
  std::string header;
  std::string data;
};

// Small files that both accept, with all that a header can have.
std::vector<Content> GoodFiles() {
  return {
      {R"({"__metadata__":{"format":"pt"},"b":{"dtype":"F32","shape":[1,2],"data_offsets":[4,12]},)"
       R"("a":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}}   )",
       "0123456789ab"},
      {R"({"none":{"dtype":"F32","shape":[0,7],"data_offsets":[2,2]},)"
       R"("one":{"dtype":"BF16","shape":[],"data_offsets":[0,2]},)"
       R"("four":{"dtype":"F4","shape":[2,4],"data_offsets":[2,6]},)"
       R"("six":{"dtype":"F6_E2M3","shape":[4],"data_offsets":[6,9]}})",
       "012345678"},
      {"{ \"\\u00e9\\n\" : { \"extra\" : { \"x\" : [ 1 , -2.5e3 , null , true ] } , \"shape\" : [ 3 ] ,"
       " \"data_offsets\" : [ 0 , 3 ] , \"dtype\" : \"I8\" } ,\n \"\xc3\xa9\" : { \"dtype\" : "
       "\"C64\" , \"shape\" : [ 1 ] , \"data_offsets\" : [ 3 , 11 ] } }",
       "0123456789a"},
      {R"({"a":{"dtype":"U8","shape":[64],"data_offsets":[0,64]}})", std::string(64, 'x')},
      {R"({"__metadata__":{}})", ""},
  };
}

constexpr const char* kDtypeTexts[] = {
    R"("BOOL")", R"("F4")",   R"("F6_E2M3")", R"("F6_E3M2")",     R"("U8")",          R"("I8")",
    R"("I16")",  R"("U16")",  R"("F8_E5M2")", R"("F8_E4M3")",     R"("F8_E8M0")",     R"("F16")",
    R"("BF16")", R"("I32")",  R"("U32")",     R"("F8_E4M3FNUZ")", R"("F8_E5M2FNUZ")", R"("F32")",
    R"("C64")",  R"("F64")",  R"("I64")",     R"("U64")",         R"("f32")",         R"("F3")",
    R"("")",     R"("BF16 ")", "null",        "3",                "[\"F32\"]"};
constexpr const char* kNumberTexts[] = {"0",
                                        "1",
                                        "-1",
                                        "-0",
                                        "4.0",
                                        "4e0",
                                        "04",
                                        "\"4\"",
                                        "null",
                                        "[4]",
                                        "2147483648",
                                        "4294967296",
                                        "9007199254740993",
                                        "4611686018427387904",
                                        "9223372036854775807",
                                        "9223372036854775808",
                                        "18446744073709551615",
                                        "18446744073709551616",
                                        "1000000000000000000000000000000"};
// Members that may stand where an object begins.
constexpr const char* kMemberTexts[] = {
    R"("k":"v",)",        R"("k":1,)",           R"("k":null,)",     R"("k":[[[[{}]]]],)",
    R"("dtype":"U8",)",   R"("shape":[],)",      R"("k":1e400,)",    R"("k":18446744073709551616,)",
    R"("\ud83d":"v",)",   R"("k":"\ud83d\ude00",)", "\"k\":\"\x01\",", R"("__metadata__":{"k":"v"},)",
    R"("k":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},)", "\"k\":\"\xf0\x9f\x98\x80\","};
constexpr char kJsonBytes[] = "{}[]\",:0123456789-+.eE \n\t\\u/truefalsn";

class Mutator {
 public:
  explicit Mutator(uint64_t seed) : random_(seed) {}

  // One of the good files with one mutation, or two or three.
  std::string Next(const std::vector<Content>& good) {
    Content content = good[Below(good.size())];
    for (size_t left = Below(2) == 0 ? 1 : 2 + Below(2); left > 0; --left) Mutate(content);
    std::string file = FileOf(content.header, content.data);
    if (Below(12) == 0) EditLength(file);
    if (Below(16) == 0) file.resize(Below(file.size() + 1));
    if (Below(16) == 0) FlipBit(file);
    return file;
  }

 private:
  size_t Below(size_t limit) { return limit == 0 ? 0 : random_() % limit; }
  template <typename T, size_t n>
  const T& OneOf(const T (&list)[n]) {
    return list[Below(n)];
  }
  void FlipBit(std::string& text) {
    if (!text.empty()) text[Below(text.size())] ^= static_cast<char>(1 << Below(8));
  }

  // Where numbers, or texts that name a type, stand in the header.
  std::vector<std::pair<size_t, size_t>> NumbersOf(const std::string& header) {
    std::vector<std::pair<size_t, size_t>> found;  // begin, size
    for (size_t at = header.find_first_of("0123456789"); at != std::string::npos;) {
      const size_t end = std::min(header.find_first_not_of("0123456789", at), header.size());
      found.emplace_back(at, end - at);
      at = header.find_first_of("0123456789", end);
    }
    return found;
  }
  void EditNumber(std::string& header) {
    const auto numbers = NumbersOf(header);
    if (numbers.empty()) return;
    const auto [at, size] = numbers[Below(numbers.size())];
    const std::string text = header.substr(at, size);
    const uint64_t value = text.size() < 19 ? std::stoull(text) : 0;
    switch (Below(5)) {
      case 0: header.replace(at, size, std::to_string(value + 1)); break;
      case 1: header.replace(at, size, std::to_string(static_cast<int64_t>(value) - 1)); break;
      case 2: header.insert(at, "-"); break;
      case 3: header.replace(at, size, std::to_string(value * 2)); break;
      case 4: header.replace(at, size, OneOf(kNumberTexts)); break;
    }
  }
  void SwapNumbers(std::string& header) {
    const auto numbers = NumbersOf(header);
    if (numbers.size() < 2) return;
    const size_t first = Below(numbers.size() - 1);
    const auto [low, low_size] = numbers[first];
    const auto [high, high_size] = numbers[first + 1 + Below(numbers.size() - 1 - first)];
    const std::string low_text = header.substr(low, low_size);
    const std::string high_text = header.substr(high, high_size);
    header.replace(high, high_size, low_text);
    header.replace(low, low_size, high_text);
  }
  void EditDtype(std::string& header) {
    std::vector<std::pair<size_t, size_t>> found;
    for (const char* const dtype : kDtypeTexts) {
      const size_t at = header.find(dtype);
      if (at != std::string::npos) found.emplace_back(at, std::strlen(dtype));
    }
    if (found.empty()) return;
    const auto [at, size] = found[Below(found.size())];
    header.replace(at, size, OneOf(kDtypeTexts));
  }
  // A tensor's entry once more: under its name, or under another one with nothing in it.
  void RepeatEntry(std::string& header) {
    const size_t end = header.find("]}");
    const size_t begin = end == std::string::npos ? end : header.rfind("},", end);
    const size_t from = begin == std::string::npos ? 1 : begin + 2;
    if (end == std::string::npos || from > end) return;
    std::string entry = header.substr(from, end + 2 - from);
    if (Below(2) == 0) entry.insert(entry.find('"') + 1, "again");
    header.insert(from, entry + ",");
  }
  void AddMember(std::string& header) {
    std::vector<size_t> opens;
    for (size_t at = 0; at < header.size(); ++at) {
      if (header[at] == '{') opens.push_back(at + 1);
    }
    if (opens.empty()) return;
    header.insert(opens[Below(opens.size())], OneOf(kMemberTexts));
  }
  void AddSpace(std::string& header) {
    const size_t at = header.find_first_of("{}[],:", Below(header.size() + 1));
    if (at != std::string::npos) header.insert(at, 1, " \n\t\r\f"[Below(5)]);
  }
  void EditLength(std::string& file) {
    uint64_t length = 0;
    std::memcpy(&length, file.data(), sizeof(length));
    const uint64_t others[] = {length + 1, length - 1,  length + 8,         length - 8,
                               0,          1,           100'000'000,        100'000'001,
                               1u << 31,   1ull << 32,  uint64_t{INT64_MAX}, 1ull << 63,
                               ~0ull,      ~7ull,       file.size(),        file.size() - 8};
    length = OneOf(others);
    std::memcpy(file.data(), &length, sizeof(length));
  }

  void Mutate(Content& content) {
    std::string& header = content.header;
    switch (Below(14)) {
      case 0: FlipBit(header); break;
      case 1: header.insert(Below(header.size() + 1), 1, OneOf(kJsonBytes)); break;
      case 2: header.insert(Below(header.size() + 1), 1, static_cast<char>(random_())); break;
      case 3: header.erase(Below(header.size()), 1 + Below(4)); break;
      case 4: {
        const std::string piece = header.substr(Below(header.size()), 1 + Below(40));
        header.insert(Below(header.size() + 1), piece);
        break;
      }
      case 5:
      case 6: EditNumber(header); break;
      case 7: SwapNumbers(header); break;
      case 8: EditDtype(header); break;
      case 9: RepeatEntry(header); break;
      case 10: AddMember(header); break;
      case 11: AddSpace(header); break;
      case 12: content.data += std::string(1 + Below(8), 'x'); break;
      case 13: content.data.resize(Below(content.data.size() + 1)); break;
    }
    if (header.empty()) header = "{";
  }

  std::mt19937_64 random_;
};

TEST_F(OracleTest, BothAgreeOnThousandsOfMutations) {
  const std::vector<Content> good = GoodFiles();
  for (const Content& content : good) {
    ASSERT_EQ(Disagreement(FileOf(content.header, content.data)), "");
  }
  ASSERT_EQ(accepted_, static_cast<int>(good.size()));
  const char* const rounds = std::getenv("HEADROOM_TEST_ROUNDS");  // of 5,000 files each
  const int files = 5000 * (rounds == nullptr ? 1 : std::stoi(rounds));
  Mutator mutator(1);
  for (int i = 0, wrong = 0; i < files && wrong < 10; ++i) {
    const std::string disagreement = Disagreement(mutator.Next(good));
    if (disagreement.empty()) continue;
    ADD_FAILURE() << "file " << i << ": " << disagreement;
    ++wrong;
  }
  // Neither answer is the easy one.
  EXPECT_GT(accepted_, files / 10);
  EXPECT_GT(refused_, files / 2);
  RecordProperty("accepted", accepted_);
  for (const auto& [rule, count] : by_rule_) RecordProperty(rule, count);
}

}  // namespace
}  // namespace headroom
