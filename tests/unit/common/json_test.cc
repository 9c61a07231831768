#include "common/json.h"

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"

namespace headroom {
namespace {

constexpr int64_t kPlenty = 1 << 20;

Json Must(absl::string_view text) {
  absl::StatusOr<Json> json = Json::Parse(text, kPlenty);
  EXPECT_TRUE(json.ok()) << text << ": " << json.status();
  return json.ok() ? *std::move(json) : Json();
}

// The error of parsing; "" if there is none.
std::string ErrorOf(absl::string_view text, int64_t max_bytes = kPlenty) {
  const absl::Status status = Json::Parse(text, max_bytes).status();
  EXPECT_TRUE(status.ok() || absl::IsInvalidArgument(status)) << status;
  return std::string(status.message());
}

TEST(Json, KeepsKindsValuesAndOrder) {
  const Json json = Must(
      R"( {"z": null, "a": [true, false, -3, 2.5, "t\u00e9\n"], "m": {"": 1}, "e": [], "o": {}} )");
  ASSERT_EQ(json.as_object().size(), 5u);
  EXPECT_EQ(json.as_object()[0].first, "z");
  EXPECT_TRUE(json.as_object()[0].second.is_null());
  const Json::Array& array = json.Find("a")->as_array();
  EXPECT_TRUE(array[0].as_bool());
  EXPECT_FALSE(array[1].as_bool());
  EXPECT_EQ(array[2].as_int(), -3);
  EXPECT_TRUE(array[2].is_number());
  EXPECT_FALSE(array[3].is_int());
  EXPECT_EQ(array[3].as_number(), 2.5);
  EXPECT_EQ(array[4].as_string(), "t\xc3\xa9\n");
  EXPECT_EQ(json.Find("m")->Find("")->as_int(), 1);
  EXPECT_EQ(json.Dump(), R"({"z":null,"a":[true,false,-3,2.5,"té\n"],"m":{"":1},"e":[],"o":{}})");
  EXPECT_EQ(Must(json.Dump(2)).Dump(), json.Dump());
}

TEST(Json, FindsNoNullsAndNothingInWhatIsNoObject) {
  const Json json = Must(R"({"a": null, "b": 0})");
  EXPECT_EQ(json.Find("a"), nullptr);
  EXPECT_EQ(json.Find("c"), nullptr);
  EXPECT_NE(json.Find("b"), nullptr);
  EXPECT_EQ(Must("[1]").Find("a"), nullptr);
  EXPECT_EQ(Json().Find("a"), nullptr);
}

TEST(Json, RefusesWhatIsAlmostJson) {
  for (const char* text :
       {"", " ", "{", "[1,]", R"({"a":1,})", "{'a':1}", "{a:1}", "[1 2]", "[1]]", "{} {}", "// x\n1",
        "/* x */ 1", "nul", "True", "NaN", "Infinity", "-Infinity", "01", "+1", "1.", ".5", "1e",
        "0x10", "--1", "\"a", "\"\\x\"", "\"\\u12\"", "\"\\ud800\"", "\"\\udc00x\"", "\"a\nb\"",
        "\"\x01\"", "[\"a\":1]", R"({"a"})", R"({1:2})"}) {
    EXPECT_NE(ErrorOf(text), "") << text;
  }
  EXPECT_NE(ErrorOf(absl::string_view("1\0", 2)), "") << "a zero byte ends no text";
  EXPECT_NE(ErrorOf(absl::string_view("1\0x", 3)), "");
}

TEST(Json, AByteOrderMarkIsNoJson) {
  EXPECT_NE(ErrorOf("\xEF\xBB\xBF[1]").find("byte order mark"), std::string::npos);
  EXPECT_EQ(Must("\"\xEF\xBB\xBF\"").as_string(), "\xEF\xBB\xBF");
}

TEST(Json, RefusesWhatIsNotUtf8) {
  for (const char* bytes : {"\xff", "\xc3", "\xc0\xaf", "\xed\xa0\x80", "\xf4\x90\x80\x80", "\x80"}) {
    EXPECT_NE(ErrorOf(absl::StrCat("\"", bytes, "\"")), "");
    EXPECT_NE(ErrorOf(absl::StrCat("{\"", bytes, "\": 1}")), "");
  }
  EXPECT_EQ(Must("\"\xf0\x9f\x98\x80\"").as_string(), Must(R"("\ud83d\ude00")").as_string());
  EXPECT_EQ(Must(R"("\u0000")").as_string(), std::string(1, '\0'));
}

TEST(Json, ErrorsSayWhere) {
  EXPECT_NE(ErrorOf(R"({"a": 1, "b": x})").find("byte 15"), std::string::npos)
      << ErrorOf(R"({"a": 1, "b": x})");
  EXPECT_EQ(ErrorOf(R"({"a": 1, "b": 2, "a": 3})"), "member 'a' twice in one object at byte 20");
  EXPECT_NE(ErrorOf("[1, 99999999999999999999]").find("64 bits at byte"), std::string::npos);
  EXPECT_NE(ErrorOf(std::string(100, '[')).find("deeper than 64 at byte 65"), std::string::npos)
      << ErrorOf(std::string(100, '['));
}

TEST(Json, AMemberTwiceInOneObjectIsRefusedAndInTwoObjectsNot) {
  EXPECT_NE(ErrorOf(R"([{"a": 1, "a": 1}])"), "");
  EXPECT_NE(ErrorOf(R"({"a": 1, "\u0061": 1})"), "") << "spelled otherwise, and the same";
  EXPECT_EQ(ErrorOf(R"({"a": {"a": 1}, "b": {"a": 1}})"), "");
}

TEST(Json, NestsToADepthOf64) {
  for (const auto& [open, close] : {std::pair{"[", "]"}, {"{\"a\":", "}"}}) {
    std::string deep = "1";
    for (int i = 0; i < 64; ++i) deep = absl::StrCat(open, deep, close);
    EXPECT_EQ(ErrorOf(deep), "");
    EXPECT_NE(ErrorOf(absl::StrCat(open, deep, close)).find("deeper than 64"), std::string::npos);
  }
  // Refused while reading: a million brackets never become a tree.
  EXPECT_NE(ErrorOf(std::string(1'000'000, '[')), "");
}

TEST(Json, IntegersOfInt64AreExactAndLargerOnesAreRefused) {
  EXPECT_EQ(Must("9223372036854775807").as_int(), INT64_MAX);
  EXPECT_EQ(Must("-9223372036854775808").as_int(), INT64_MIN);
  EXPECT_EQ(Must("9007199254740993").as_int(), 9007199254740993);  // 2^53 + 1
  EXPECT_TRUE(std::signbit(Must("-0").as_number())) << "no integer is that";
  EXPECT_FALSE(Must("-0").is_int());
  for (const char* text : {"9223372036854775808", "18446744073709551615", "18446744073709551616",
                           "-9223372036854775809", "100000000000000000000000000000"}) {
    EXPECT_NE(ErrorOf(text).find("beyond 64 bits"), std::string::npos) << text;
  }
  EXPECT_FALSE(Must("9.223372036854775808e18").is_int());
}

TEST(Json, NumbersBeyondDoubleAreRefused) {
  EXPECT_NE(ErrorOf("1e400"), "");
  EXPECT_NE(ErrorOf("-1e400"), "");
  EXPECT_EQ(Must("1e-400").as_number(), 0);
  EXPECT_EQ(Must("1e308").as_number(), 1e308);
}

TEST(Json, FloatsOfBothSizesComeBackBitForBit) {
  std::mt19937_64 random(1);
  for (int i = 0; i < 20000; ++i) {
    const auto bits32 = static_cast<uint32_t>(random());
    float single;
    std::memcpy(&single, &bits32, sizeof(single));
    if (std::isfinite(single)) {
      const auto back = static_cast<float>(Must(Json(double{single}).Dump()).as_number());
      ASSERT_EQ(std::memcmp(&back, &single, sizeof(back)), 0) << single;
    }
    const uint64_t bits64 = random();
    double number;
    std::memcpy(&number, &bits64, sizeof(number));
    if (std::isfinite(number)) {
      const double back = Must(Json(number).Dump()).as_number();
      ASSERT_EQ(std::memcmp(&back, &number, sizeof(back)), 0) << number;
    }
  }
  EXPECT_EQ(Json(1.0).Dump(), "1.0") << "a float stays one";
}

TEST(Json, WritesNullForWhatIsNoNumberAndReplacesWhatIsNotUtf8) {
  EXPECT_EQ(Json(std::nan("")).Dump(), "null");
  EXPECT_EQ(Json(std::numeric_limits<double>::infinity()).Dump(), "null");
  EXPECT_EQ(Json("a\xff").Dump(), "\"a\xEF\xBF\xBD\"");
}

TEST(Json, TextsAreCapped) {
  EXPECT_EQ(ErrorOf("[1, 2]", 6), "");
  const std::string error = ErrorOf("[1, 2]", 5);
  EXPECT_NE(error.find("6 bytes"), std::string::npos) << error;
  EXPECT_NE(error.find("at most 5"), std::string::npos) << error;
}

// ---------------------------------------------------------------- member by member

// What ParseMembers hands on, as "name=value", and the error that it ends with.
std::pair<std::vector<std::string>, std::string> Members(absl::string_view text, int64_t max_values = 10,
                                                         const std::string& refused = "") {
  std::vector<std::string> members;
  const absl::Status status = Json::ParseMembers(
      text, kPlenty, {max_values, [&](const std::string& name, const Json& value) {
                        if (name == refused && !refused.empty()) return absl::DataLossError("mine");
                        members.push_back(absl::StrCat(name, "=", value.Dump()));
                        return absl::OkStatus();
                      }});
  return {members, std::string(status.message())};
}

TEST(JsonMembers, ComeInTheirOrderAndWhole) {
  const auto [members, error] = Members(R"( {"b": {"x": [1, {"y": null}]}, "a": "t", "": []} )");
  EXPECT_EQ(error, "");
  EXPECT_EQ(members, (std::vector<std::string>{R"(b={"x":[1,{"y":null}]})", R"(a="t")", "=[]"}));
  EXPECT_EQ(Members("{}").second, "");
}

TEST(JsonMembers, TheSameTextsAreRefused) {
  for (const char* text : {"", "{", "{\"a\":1}x", "{\"a\":01}", "{\"a\":1,}", "{\"a\":\"\xff\"}",
                           "\xEF\xBB\xBF{}", "{\"a\":1,\"a\":2}", "{\"a\":{\"b\":1,\"b\":1}}",
                           "{\"a\":18446744073709551616}"}) {
    EXPECT_EQ(Members(text).second, ErrorOf(text)) << text;
    EXPECT_NE(Members(text).second, "") << text;
  }
  const std::string deep = "{\"a\":" + std::string(70, '[');
  EXPECT_EQ(Members(deep, 100).second, ErrorOf(deep));
  EXPECT_EQ(Json::ParseMembers("{}", 1, {1, nullptr}).message(), ErrorOf("{}", 1));
  for (const char* text : {"[]", "[{}]", "3", "null", "\"a\""}) {
    EXPECT_EQ(Members(text).second, "expected an object") << text;
  }
}

TEST(JsonMembers, OneThatIsTooLargeIsNotKept) {
  EXPECT_EQ(Members(R"({"a":[1,2,3]})", 4).second, "");
  EXPECT_EQ(Members(R"({"a":[1,2,3]})", 3).second, "member 'a' has more than 3 values at byte 12");
  EXPECT_EQ(Members(R"({"a":{"b":[[],[]]}})", 3).first.size(), 0u);
  EXPECT_EQ(Members(R"({"a":1,"b":2,"c":3,"d":4})", 1).first.size(), 4u) << "each counts by itself";
}

TEST(JsonMembers, ARefusalEndsTheReading) {
  const auto [members, error] = Members(R"({"a":1,"b":2,"c":3,)", 10, "b");
  EXPECT_EQ(error, "mine");
  EXPECT_EQ(members, std::vector<std::string>{"a=1"});
}

// ---------------------------------------------------------------- files

class JsonFile : public testing::Test {
 protected:
  JsonFile() {
    std::string name = testing::TempDir() + "/headroom-json-XXXXXX";
    dir_ = mkdtemp(name.data());
    path_ = dir_ + "/config.json";
  }
  ~JsonFile() override { std::filesystem::remove_all(dir_); }
  absl::Status Parse(int64_t max_bytes = kPlenty) {
    return Json::ParseFile(path_, max_bytes).status();
  }

  std::string dir_;
  std::string path_;
};

TEST_F(JsonFile, ErrorsNameTheFile) {
  EXPECT_TRUE(absl::IsNotFound(Parse()));
  EXPECT_NE(Parse().message().find(path_), std::string::npos);
  std::ofstream(path_) << "{\"a\": 1,}";
  EXPECT_TRUE(absl::IsInvalidArgument(Parse()));
  EXPECT_NE(Parse().message().find(path_), std::string::npos);
  std::ofstream(path_, std::ios::trunc) << "{\"a\": 1}";
  EXPECT_TRUE(Parse().ok()) << Parse();
  EXPECT_TRUE(absl::IsInvalidArgument(Parse(7)));
}

TEST_F(JsonFile, APipeOrAFolderIsNotRead) {
  ASSERT_EQ(mkfifo(path_.c_str(), 0600), 0);
  EXPECT_TRUE(absl::IsInvalidArgument(Parse()));
  path_ = dir_;
  EXPECT_TRUE(absl::IsInvalidArgument(Parse()));
  EXPECT_NE(Parse().message().find("no regular file"), std::string::npos) << Parse();
}

TEST_F(JsonFile, OneThatMayNotBeReadIsNotTakenForOneThatIsMissing) {
  std::ofstream(path_) << "{}";
  ASSERT_EQ(chmod(path_.c_str(), 0), 0);
  ASSERT_EQ(chmod(dir_.c_str(), 0755), 0);
  const uid_t user = geteuid();
  if (user == 0 && seteuid(65534) != 0) GTEST_SKIP() << "root, who may read all, cannot be another";
  const absl::Status status = Parse();
  ASSERT_EQ(seteuid(user), 0);
  EXPECT_TRUE(absl::IsPermissionDenied(status)) << status;
  EXPECT_NE(status.message().find(path_), std::string::npos) << status;
}

// ---------------------------------------------------------------- what errors show

TEST(Brief, IsOneLineOfAtMost80BytesAndWholeCharacters) {
  EXPECT_EQ(Brief(Must(R"({"a": [1, "x\ny"]})")), R"({"a":[1,"x\ny"]})");
  EXPECT_EQ(BriefText("model.norm.weight"), "model.norm.weight");
  EXPECT_EQ(BriefText("a\n\x1b[1m\"b"), R"(a\n\u001b[1m\"b)");
  EXPECT_EQ(BriefText(std::string(80, 'x')), std::string(80, 'x'));
  EXPECT_EQ(BriefText(std::string(81, 'x')), std::string(80, 'x') + "...");
  for (int lead = 0; lead < 4; ++lead) {
    std::string text(lead, 'x');
    while (text.size() < 200) text += "\xf0\x9f\x98\x80";
    const std::string brief = BriefText(text);
    EXPECT_LE(brief.size(), 83u);
    EXPECT_GE(brief.size(), 80u);
    EXPECT_EQ(text.find(brief.substr(0, brief.size() - 3)), 0u) << "whole characters of it";
  }
}

// ---------------------------------------------------------------- JsonReader

TEST(JsonReader, ReadsWhatIsThereAndDefaultsWhatIsNot) {
  const Json json = Must(
      R"({"i": 5, "f": 0.5, "s": "x", "b": true, "n": null, "big": 9223372036854775807})");
  const JsonReader reader(json, "config.json");
  EXPECT_EQ(*reader.Int("i", 5, 5), 5);
  EXPECT_EQ(*reader.Int("big", 0, INT64_MAX), INT64_MAX);
  EXPECT_EQ(*reader.IntOr("n", 7, 0, 1), 7) << "null is as good as absent";
  EXPECT_EQ(*reader.Number("f", 0, 1), 0.5);
  EXPECT_EQ(*reader.Number("i", 0, 10), 5) << "an integer is a number";
  EXPECT_EQ(*reader.NumberOr("none", 2.5, 0, 1), 2.5);
  EXPECT_EQ(*reader.String("s"), "x");
  EXPECT_EQ(*reader.StringOr("none", "y"), "y");
  EXPECT_TRUE(*reader.BoolOr("b", false));
  EXPECT_TRUE(*reader.BoolOr("n", true));
}

TEST(JsonReader, ErrorsNamePlaceMemberFoundAndExpected) {
  const Json json = Must(R"({"i": 5, "f": 0.5, "s": "x", "b": 1, "l": [1]})");
  const JsonReader reader(json, "config.json");
  const auto text = [](const auto& value) {
    EXPECT_TRUE(absl::IsInvalidArgument(value.status())) << value.status();
    return std::string(value.status().message());
  };
  EXPECT_EQ(text(reader.Int("i", 6, 9)),
            "config.json: 'i' is 5, expected an integer from 6 to 9");
  EXPECT_EQ(text(reader.Int("none", 6, 9)),
            "config.json: 'none' is nothing, expected an integer from 6 to 9");
  EXPECT_EQ(text(reader.Int("f", 0, 9)),
            "config.json: 'f' is 0.5, expected an integer from 0 to 9");
  EXPECT_EQ(text(reader.IntOr("s", 1, 0, 9)),
            "config.json: 's' is \"x\", expected an integer from 0 to 9");
  EXPECT_EQ(text(reader.Number("f", 1, 2.5)),
            "config.json: 'f' is 0.5, expected a number from 1 to 2.5");
  EXPECT_EQ(text(reader.NumberOr("l", 1, 0, 2)),
            "config.json: 'l' is [1], expected a number from 0 to 2");
  EXPECT_EQ(text(reader.String("i")), "config.json: 'i' is 5, expected a string");
  EXPECT_EQ(text(reader.StringOr("l", "")), "config.json: 'l' is [1], expected a string");
  EXPECT_EQ(text(reader.BoolOr("b", false)), "config.json: 'b' is 1, expected true or false");
}

TEST(JsonReader, LongValuesAreCutBetweenCharacters) {
  for (int lead = 0; lead < 4; ++lead) {
    std::string value(lead, 'x');
    while (value.size() < 200) value += "\xf0\x9f\x98\x80";
    const Json json = Json::Object{{"a", value}};
    const std::string message(JsonReader(json, "f").Int("a", 0, 1).status().message());
    EXPECT_LT(message.size(), 160u);
    EXPECT_EQ(Json::Parse(Json(message).Dump(), kPlenty)->as_string(), message) << "whole UTF-8";
  }
}

TEST(JsonReader, NothingIsReadFromWhatIsNoObject) {
  const Json json = Must("[1]");
  EXPECT_TRUE(absl::IsInvalidArgument(JsonReader(json, "f").Int("a", 0, 1).status()));
}

}  // namespace
}  // namespace headroom
