#include "services/worker/model/safetensors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "tests/common/test_processes.h"
#include "tests/unit/services/worker_model/test_folder.h"

namespace headroom {
namespace {

using testing::HasSubstr;

// A header that says how long it is, then data.
std::string FileOf(const std::string& header, const std::string& data) {
  const uint64_t length = header.size();
  std::string file(sizeof(length), '\0');
  std::memcpy(file.data(), &length, sizeof(length));
  return file + header + data;
}

std::string Entry(const std::string& name, const std::string& dtype, const std::string& shape,
                  const std::string& offsets) {
  return absl::StrCat("\"", name, "\":{\"dtype\":\"", dtype, "\",\"shape\":", shape,
                      ",\"data_offsets\":", offsets, "}");
}

class SafetensorsTest : public testing::Test {
 protected:
  absl::StatusOr<std::unique_ptr<SafetensorsReader>> Open(const std::string& content) {
    folder_.Write("model.safetensors", content);
    return SafetensorsReader::Open(folder_.path());
  }
  // Whether a single file is refused in words that name it and `words`.
  testing::AssertionResult IsRefused(const std::string& content,
                                     const std::vector<std::string>& words) {
    return Names(Open(content).status(), "model.safetensors", words);
  }
  testing::AssertionResult HeaderIsRefused(const std::string& header,
                                           const std::vector<std::string>& words,
                                           const std::string& data = "0123456789ab") {
    return IsRefused(FileOf(header, data), words);
  }
  testing::AssertionResult Names(const absl::Status& status, const std::string& file,
                                 const std::vector<std::string>& words) {
    const std::string message(status.message());
    bool all = message.find(absl::StrCat(folder_.path(), "/", file)) != std::string::npos;
    for (const std::string& word : words) all = all && message.find(word) != std::string::npos;
    const bool is_data_error = status.code() == absl::StatusCode::kInvalidArgument ||
                               status.code() == absl::StatusCode::kDataLoss;
    if (all && is_data_error) return testing::AssertionSuccess();
    return testing::AssertionFailure() << status;
  }
  testing::AssertionResult IndexIsRefused(const std::string& map,
                                          const std::vector<std::string>& words) {
    folder_.Write("model.safetensors.index.json", absl::StrCat("{\"weight_map\":", map, "}"));
    return Names(SafetensorsReader::Open(folder_.path()).status(), "model.safetensors.index.json",
                 words);
  }

  TestFolder folder_;
  // Two tensors of 4 and 8 bytes.
  const std::string a_ = Entry("a", "BF16", "[2]", "[0,4]");
  const std::string b_ = Entry("b", "F32", "[1,2]", "[4,12]");
  const std::string good_ = "{\"__metadata__\":{\"format\":\"pt\"}," + b_ + "," + a_ + "}   ";
};

TEST_F(SafetensorsTest, ReadsASingleFile) {
  const auto reader = Open(FileOf(good_, "0123456789ab"));
  ASSERT_TRUE(reader.ok()) << reader.status();
  ASSERT_EQ((*reader)->tensors().size(), 2u);
  const auto a = (*reader)->Expect("a", "BF16", {2});
  const auto b = (*reader)->Expect("b", "F32", {1, 2});
  ASSERT_TRUE(a.ok() && b.ok()) << a.status() << b.status();
  EXPECT_EQ((*reader)->file_name(**b), folder_.path() + "/model.safetensors");
  std::string bytes(4, '?');
  ASSERT_TRUE((*reader)->Read(**a, 0, 4, bytes.data()).ok());
  EXPECT_EQ(bytes, "0123");
  ASSERT_TRUE((*reader)->Read(**b, 2, 4, bytes.data()).ok());
  EXPECT_EQ(bytes, "6789");
  // Past the tensor's end there is another's data, or nothing.
  EXPECT_FALSE((*reader)->Read(**a, 2, 4, bytes.data()).ok());
  EXPECT_FALSE((*reader)->Read(**a, -1, 4, bytes.data()).ok());
  EXPECT_FALSE((*reader)->Read(**a, 2, INT64_MAX, bytes.data()).ok());
}

TEST_F(SafetensorsTest, ReadsScalarsAndEmptyTensors) {
  const std::string header = "{" + Entry("none", "F32", "[0,7]", "[2,2]") + "," +
                             Entry("one", "BF16", "[]", "[0,2]") + "}";
  const auto reader = Open(FileOf(header, "ab"));
  ASSERT_TRUE(reader.ok()) << reader.status();
  EXPECT_TRUE((*reader)->Expect("one", "BF16", {}).ok());
  EXPECT_TRUE((*reader)->Expect("none", "F32", {0, 7}).ok());
}

TEST_F(SafetensorsTest, AFolderWithoutWeightsIsNamed) {
  const absl::Status status = SafetensorsReader::Open(folder_.path()).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(status.message(), HasSubstr(folder_.path()));
}

TEST_F(SafetensorsTest, WhatIsNoRegularFileIsRefusedAtOnce) {
  const std::string path = folder_.path() + "/model.safetensors";
  ASSERT_EQ(mkfifo(path.c_str(), 0600), 0);  // opening one waits for a writer
  EXPECT_TRUE(Names(SafetensorsReader::Open(folder_.path()).status(), "model.safetensors",
                    {"not a regular file"}));
  unlink(path.c_str());
  ASSERT_EQ(mkdir(path.c_str(), 0700), 0);
  EXPECT_TRUE(Names(SafetensorsReader::Open(folder_.path()).status(), "model.safetensors",
                    {"not a regular file"}));
}

TEST_F(SafetensorsTest, EveryTruncationIsRefused) {
  const std::string whole = FileOf(good_, "0123456789ab");
  for (size_t bytes = 0; bytes < whole.size(); ++bytes) {
    EXPECT_TRUE(IsRefused(whole.substr(0, bytes), {})) << bytes << " bytes";
  }
  EXPECT_TRUE(IsRefused(whole.substr(0, whole.size() - 1), {"tensor 'b'", "data_offsets"}));
  EXPECT_TRUE(IsRefused(whole + "c", {"end at data byte 12", "13"}));
}

// A file that shrinks after it was opened.
TEST_F(SafetensorsTest, AFileThatEndsBeforeItsTensorsIsDataLoss) {
  const std::string whole = FileOf(good_, "0123456789ab");
  const auto reader = Open(whole);
  ASSERT_TRUE(reader.ok()) << reader.status();
  const std::string path = folder_.path() + "/model.safetensors";
  ASSERT_EQ(truncate(path.c_str(), static_cast<off_t>(whole.size()) - 3), 0);
  char bytes[8];
  const absl::Status status =
      (*reader)->Read((*reader)->tensors().find("b")->second, 0, 8, bytes);
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(status.message(), HasSubstr(path));
}

TEST_F(SafetensorsTest, AHeaderLengthIsNotTrusted) {
  std::string file = FileOf(good_, "0123456789ab");
  for (const uint64_t length : {uint64_t{1} << 20, uint64_t{4 << 20}, uint64_t{4 << 20} + 1,
                                uint64_t{1} << 40, uint64_t{INT64_MAX}, ~uint64_t{0}, ~uint64_t{7}}) {
    std::memcpy(file.data(), &length, sizeof(length));
    // Beyond the limit it is not even compared with the file.
    const char* why = length > 4 << 20 ? "at most 4194304" : "in a file of";
    EXPECT_TRUE(IsRefused(file, {absl::StrCat("header of ", length, " bytes"), why}));
  }
}

TEST_F(SafetensorsTest, AHeaderThatIsNoHeaderIsRefused) {
  EXPECT_TRUE(HeaderIsRefused("", {"header"}));
  EXPECT_TRUE(HeaderIsRefused("{\"a\":", {"header", "JSON"}));
  EXPECT_TRUE(HeaderIsRefused("[1]", {"header", "an object"}));
  EXPECT_TRUE(HeaderIsRefused("{\"a\":\xff}", {"header"}));
  EXPECT_TRUE(HeaderIsRefused(std::string(100'000, '['), {"header", "nested deeper"}));
  EXPECT_TRUE(HeaderIsRefused("{\"a\":3," + b_ + "}",
                              {"tensor 'a' is 3", "expected an object of dtype, shape"}));
  EXPECT_TRUE(HeaderIsRefused("{\"__metadata__\":{\"n\":3}," + b_ + "}",
                              {"'__metadata__'", "'n' is 3", "expected a string"}));
}

// A name of the file goes into errors, and it may be anything.
TEST_F(SafetensorsTest, NamesOfAnyLengthMakeOneShortLine) {
  const std::string name = "a\\nERROR: \\u001b[2J" + std::string(20'000, 'x');
  for (const std::string& entry :
       {Entry(name, "F3", "[2]", "[0,4]"), Entry(name, "BF16", "[3]", "[0,4]"),
        Entry(name, "BF16", "[2]", "[4,8]"), Entry(name, "BF16", "[-1]", "[0,4]"),
        Entry("a", name, "[2]", "[0,4]"), Entry("a", "BF16", "\"" + name + "\"", "[0,4]"),
        "\"" + name + "\":[\"" + name + "\"]", "\"__metadata__\":{\"" + name + "\":[0]}",
        Entry(name, "BF16", "[2]", "[0,4]") + "," + Entry(name, "BF16", "[2]", "[0,4]")}) {
    const absl::Status status = Open(FileOf("{" + entry + "}", "0123")).status();
    EXPECT_TRUE(Names(status, "model.safetensors", {}));
    EXPECT_EQ(status.message().find_first_of("\n\x1b"), std::string::npos) << status;
    EXPECT_LT(status.message().size(), folder_.path().size() + 300) << status;
  }
}

TEST_F(SafetensorsTest, ANameTwiceIsRefused) {
  EXPECT_TRUE(HeaderIsRefused("{" + a_ + "," + b_ + "," + a_ + "}", {"'a' twice"}));
}

TEST_F(SafetensorsTest, LyingOffsetsAreRefused) {
  const auto with = [&](const std::string& dtype, const std::string& shape,
                        const std::string& offsets) {
    return "{" + a_ + "," + Entry("b", dtype, shape, offsets) + "}";
  };
  for (const char* offsets :
       {"[4,13]", "[4,11]", "[12,4]", "[-8,0]", "[4]", "[4,8,12]", "[4.0,12.0]", "null", "{}",
        "[4,9223372036854775807]", "[9223372036854775800,9223372036854775807]"}) {
    EXPECT_TRUE(HeaderIsRefused(with("F32", "[1,2]", offsets), {"tensor 'b'", "'data_offsets'"}))
        << offsets;
  }
  // Beyond 64 bits: no number here.
  EXPECT_TRUE(HeaderIsRefused(with("F32", "[1,2]", "[4,18446744073709551615]"), {"header"}));
  for (const char* shape : {"[-1,2]", "[1.5]", "\"2\"", "null", "[4294967296,4294967296,2]",
                            "[9223372036854775807,2]"}) {
    EXPECT_TRUE(HeaderIsRefused(with("F32", shape, "[4,12]"), {"tensor 'b'", "'shape'"})) << shape;
  }
  // A product that wraps around to the right number of bytes.
  EXPECT_TRUE(HeaderIsRefused(with("F32", "[4611686018427387905,2]", "[4,12]"),
                              {"tensor 'b'", "'shape'", "within 64 bits"}));
  EXPECT_TRUE(HeaderIsRefused(with("F3", "[1,2]", "[4,12]"), {"tensor 'b'", "dtype", "F3"}));
  EXPECT_TRUE(HeaderIsRefused(with("BF16", "[1,2]", "[4,12]"), {"tensor 'b'", "4 bytes"}));
}

TEST_F(SafetensorsTest, OverlapsAndHolesAreRefused) {
  const auto with = [&](const std::string& offsets) {
    return "{" + a_ + "," + Entry("b", "F32", "[1,2]", offsets) + "}";
  };
  EXPECT_TRUE(HeaderIsRefused(with("[2,10]"), {"tensor 'b'", "overlap"}));
  EXPECT_TRUE(HeaderIsRefused(with("[0,8]"), {"tensor 'b'", "overlap"}));
  EXPECT_TRUE(HeaderIsRefused(with("[6,14]"), {"tensor 'b'", "hole"}, "0123456789abcd"));
  EXPECT_TRUE(HeaderIsRefused("{" + b_ + "}", {"tensor 'b'", "hole"}));
}

TEST_F(SafetensorsTest, WhatIsExpectedIsNamedWhereItIsNot) {
  const auto reader = Open(FileOf(good_, "0123456789ab"));
  ASSERT_TRUE(reader.ok()) << reader.status();
  absl::Status status = (*reader)->Expect("b", "BF16", {1, 2}).status();
  EXPECT_TRUE(Names(status, "model.safetensors",
                    {"tensor 'b' is F32 [1, 2]", "expected BF16 [1, 2]"}));
  status = (*reader)->Expect("b", "F32", {2, 1}).status();
  EXPECT_TRUE(Names(status, "model.safetensors", {"tensor 'b' is F32 [1, 2]", "F32 [2, 1]"}));
  status = (*reader)->Expect("c", "BF16", {3}).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(status.message(), HasSubstr("model.safetensors"));
  EXPECT_THAT(status.message(), HasSubstr("tensor 'c'"));
}

// ---------------------------------------------------------------- shards

class ShardsTest : public SafetensorsTest {
 protected:
  ShardsTest() {
    folder_.Write("one.safetensors", FileOf("{" + a_ + "}", "0123"));
    folder_.Write("two.safetensors",
                  FileOf("{" + Entry("b", "F32", "[1,2]", "[0,8]") + "}", "456789ab"));
  }
};

TEST_F(ShardsTest, AreReadAsTheIndexSays) {
  folder_.Write("model.safetensors.index.json",
                R"({"metadata": {},
                    "weight_map": {"a": "one.safetensors", "b": "two.safetensors"}})");
  const auto reader = SafetensorsReader::Open(folder_.path());
  ASSERT_TRUE(reader.ok()) << reader.status();
  const auto b = (*reader)->Expect("b", "F32", {1, 2});
  ASSERT_TRUE(b.ok()) << b.status();
  EXPECT_EQ((*reader)->file_name(**b), folder_.path() + "/two.safetensors");
  std::string bytes(8, '?');
  ASSERT_TRUE((*reader)->Read(**b, 0, 8, bytes.data()).ok());
  EXPECT_EQ(bytes, "456789ab");
  EXPECT_THAT((*reader)->Expect("c", "F32", {1}).status().message(), HasSubstr("tensor 'c'"));
}

TEST_F(ShardsTest, AnIndexThatLeavesTheFolderIsRefused) {
  folder_.Write("outside.safetensors", FileOf("{" + a_ + "}", "0123"));
  for (const char* file : {"../outside.safetensors", "/etc/passwd", "sub/one.safetensors", "..",
                           ".", "", ".hidden"}) {
    EXPECT_TRUE(IndexIsRefused(absl::StrCat("{\"a\": \"", file, "\"}"), {"tensor 'a'", file}))
        << file;
  }
  EXPECT_TRUE(IndexIsRefused(R"({"a": "one.safetensors\u0000/../x"})", {"tensor 'a'"}));
  EXPECT_TRUE(IndexIsRefused(R"({"a": "one.safetensors\u0000"})", {"tensor 'a'"}));
}

TEST_F(ShardsTest, AnIndexThatIsNoneIsRefused) {
  EXPECT_TRUE(IndexIsRefused("3", {"weight_map"}));
  EXPECT_TRUE(IndexIsRefused("{}", {"weight_map"}));
  EXPECT_TRUE(IndexIsRefused(R"({"a": 3})", {"tensor 'a'"}));
  EXPECT_TRUE(IndexIsRefused(R"({"a": "one.safetensors", "a": "two.safetensors"})", {"'a' twice"}));
  folder_.Write("model.safetensors.index.json", "{");
  EXPECT_TRUE(Names(SafetensorsReader::Open(folder_.path()).status(),
                    "model.safetensors.index.json", {"JSON"}));
}

TEST_F(ShardsTest, AnIndexThatLiesIsRefused) {
  EXPECT_TRUE(IndexIsRefused(R"({"b": "one.safetensors"})", {"tensor 'b'", "one.safetensors"}));
  EXPECT_TRUE(IndexIsRefused(R"({"a": "two.safetensors", "b": "one.safetensors"})",
                             {"tensor 'a'", "two.safetensors"}));
  folder_.Write("model.safetensors.index.json", R"({"weight_map": {"a": "three.safetensors"}})");
  const absl::Status status = SafetensorsReader::Open(folder_.path()).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
  EXPECT_TRUE(testing::Value(std::string(status.message()),
                             testing::AllOf(HasSubstr("index.json"), HasSubstr("tensor 'a'"),
                                            HasSubstr("three.safetensors"))))
      << status;
}

TEST_F(ShardsTest, LinksAreFollowedInsideTheFolderOnly) {
  namespace fs = std::filesystem;
  const TestFolder elsewhere;
  fs::rename(folder_.path() + "/one.safetensors", elsewhere.path() + "/one.safetensors");
  fs::create_symlink(elsewhere.path() + "/one.safetensors", folder_.path() + "/one.safetensors");
  EXPECT_TRUE(IndexIsRefused(R"({"a": "one.safetensors", "b": "two.safetensors"})",
                             {"tensor 'a'", "one.safetensors", elsewhere.path(), "same folder"}));
  // Another folder whose name begins with the model's is outside too.
  const std::string beside = folder_.path() + "-beside";
  fs::create_directory(beside);
  fs::rename(elsewhere.path() + "/one.safetensors", beside + "/one.safetensors");
  fs::remove(folder_.path() + "/one.safetensors");
  fs::create_symlink(beside + "/one.safetensors", folder_.path() + "/one.safetensors");
  EXPECT_TRUE(IndexIsRefused(R"({"a": "one.safetensors"})", {"tensor 'a'", beside}));
  // One inside is as good as the file, by whatever name the folder is called.
  fs::create_directory(folder_.path() + "/data");
  fs::rename(beside + "/one.safetensors", folder_.path() + "/data/one");
  fs::remove_all(beside);
  fs::remove(folder_.path() + "/one.safetensors");
  fs::create_symlink("data/one", folder_.path() + "/one.safetensors");
  fs::create_directory_symlink(folder_.path(), elsewhere.path() + "/model");
  for (const std::string& dir : {folder_.path(), folder_.path() + "/data/..",
                                 elsewhere.path() + "/model"}) {
    const auto reader = SafetensorsReader::Open(dir);
    EXPECT_TRUE(reader.ok()) << reader.status();
  }
}

// models--NAME/snapshots/REVISION/file -> ../../blobs/HASH
TEST_F(ShardsTest, TheCacheOfHuggingfaceHubIsAFolderToo) {
  namespace fs = std::filesystem;
  const std::string repo = folder_.path() + "/models--a--b";
  const std::string snapshot = repo + "/snapshots/0123abcd";
  fs::create_directories(snapshot);
  fs::create_directories(repo + "/blobs");
  folder_.Write("models--a--b/blobs/aaaa", R"({"weight_map": {"a": "one.safetensors"}})");
  fs::rename(folder_.path() + "/one.safetensors", repo + "/blobs/bbbb");
  fs::create_symlink("../../blobs/aaaa", snapshot + "/model.safetensors.index.json");
  fs::create_symlink("../../blobs/bbbb", snapshot + "/one.safetensors");
  const auto reader = SafetensorsReader::Open(snapshot);
  EXPECT_TRUE(reader.ok()) << reader.status();
  // Not those of another model.
  fs::create_directories(folder_.path() + "/models--c--d/blobs");
  fs::rename(repo + "/blobs/bbbb", folder_.path() + "/models--c--d/blobs/bbbb");
  fs::remove(snapshot + "/one.safetensors");
  fs::create_symlink("../../../models--c--d/blobs/bbbb", snapshot + "/one.safetensors");
  const absl::Status status = SafetensorsReader::Open(snapshot).status();
  EXPECT_THAT(status.message(), HasSubstr("models--c--d"));
}

TEST_F(ShardsTest, ATensorInTwoShardsIsRefused) {
  folder_.Write("two.safetensors", FileOf("{" + a_ + "}", "0123"));
  folder_.Write("model.safetensors.index.json",
                R"({"weight_map": {"a": "one.safetensors", "c": "two.safetensors"}})");
  EXPECT_TRUE(Names(SafetensorsReader::Open(folder_.path()).status(), "two.safetensors",
                    {"tensor 'a'", "one.safetensors"}));
}

// ---------------------------------------------------------------- what a refusal costs

int64_t PeakMemoryKiB() {
  std::ifstream status("/proc/self/status");
  std::string word;
  int64_t peak = 0;
  while (status >> word && word != "VmHWM:") {
  }
  status >> peak;
  return peak;
}

// They take memory of their own, and keep for a while what is freed.
constexpr int64_t kOfSanitizersKib = kSanitized ? 4 << 20 : 0;

class Costs : public ShardsTest {
 protected:
  struct Cost {
    absl::Duration longest = absl::ZeroDuration();
    int64_t peak_growth_kib = 0;
  };
  // Of opening what lies in the folder, which must be refused, `times` times.
  Cost Refuse(int times) const {
    Cost cost;
    std::ofstream("/proc/self/clear_refs") << 5;  // the peak is what there is now
    const int64_t before = PeakMemoryKiB();
    for (int i = 0; i < times; ++i) {
      const absl::Time begin = absl::Now();
      EXPECT_FALSE(SafetensorsReader::Open(folder_.path()).ok());
      cost.longest = std::max(cost.longest, absl::Now() - begin);
    }
    cost.peak_growth_kib = PeakMemoryKiB() - before;
    return cost;
  }
  static void Report(const std::string& kind, const Cost& cost) {
    std::printf("%-44s %7.2f ms %6ld KiB\n", kind.c_str(), absl::ToDoubleMilliseconds(cost.longest),
                static_cast<long>(cost.peak_growth_kib));
  }
  void WriteIndex(const std::string& map) const {
    folder_.Write("model.safetensors.index.json", absl::StrCat("{\"weight_map\":", map, "}"));
  }
};

// Each kind of file that a start may meet. What is measured is printed (docs/testing.md has it); a clock
// on a machine that does other things, too, cannot be held to 20 ms.
TEST_F(Costs, EachKindOfBadFileIsRefusedSoonAndInLittleMemory) {
  const std::string data = "0123456789ab", good = FileOf(good_, data);
  const auto declares = [&](uint64_t header_bytes) {
    std::string file = good;
    std::memcpy(file.data(), &header_bytes, sizeof(header_bytes));
    return file;
  };
  const auto with_b = [&](const std::string& dtype, const std::string& shape,
                          const std::string& offsets, const std::string& more = "") {
    return FileOf("{" + a_ + "," + Entry("b", dtype, shape, offsets) + more + "}", data);
  };
  const std::pair<const char*, std::string> files[] = {
      {"empty", ""},
      {"cut in the length", good.substr(0, 5)},
      {"cut in the header", good.substr(0, 60)},
      {"cut in the data", good.substr(0, good.size() - 1)},
      {"data behind the last tensor", good + "c"},
      {"a header of 4 MiB that is not there", declares(4 << 20)},
      {"a header over the limit", declares((4 << 20) + 1)},
      {"a header of 2^40 bytes", declares(uint64_t{1} << 40)},
      {"a header of 2^64 - 1 bytes", declares(~uint64_t{0})},
      {"a header that is no JSON", FileOf("{\"a\":", data)},
      {"a header that is no object", FileOf("[1]", data)},
      {"a header that is not UTF-8", FileOf("{\"\xff\":1}", data)},
      {"a header nested deep", FileOf("{\"a\":" + std::string(4000, '['), data)},
      {"a tensor that is no object", FileOf("{\"a\":3}", data)},
      {"metadata that is no text", FileOf("{\"__metadata__\":{\"n\":3}," + a_ + "}", data)},
      {"a name twice", FileOf("{" + a_ + "," + b_ + "," + a_ + "}", data)},
      {"a type that is none", with_b("F3", "[1,2]", "[4,12]")},
      {"a type of another size", with_b("BF16", "[1,2]", "[4,12]")},
      {"offsets that are negative", with_b("F32", "[1,2]", "[-8,0]")},
      {"offsets that are turned round", with_b("F32", "[1,2]", "[12,4]")},
      {"offsets past the end", with_b("F32", "[1,2]", "[4,1000]")},
      {"offsets beyond 64 bits", with_b("F32", "[1,2]", "[4,18446744073709551616]")},
      {"tensors that overlap", with_b("F32", "[1,2]", "[2,10]")},
      {"a hole", FileOf("{" + b_ + "}", data)},
      {"a size that is negative", with_b("F32", "[-1,2]", "[4,12]")},
      {"a product beyond 64 bits", with_b("F32", "[4611686018427387905,2]", "[4,12]")},
      {"a product beyond 64 bits, of no bytes", with_b("F32", "[4611686018427387904,8,0]", "[4,4]")},
      {"800 MB that are not there", with_b("F64", "[100000000]", "[4,800000004]")},
  };
  Refuse(1);  // what is made once: nothing is there yet
  for (const auto& [kind, file] : files) {
    folder_.Write("model.safetensors", file);
    const Cost cost = Refuse(20);
    Report(kind, cost);
    EXPECT_LT(cost.longest, absl::Seconds(kSanitized ? 5 : 1)) << kind;
    EXPECT_LT(cost.peak_growth_kib, 1024 + kOfSanitizersKib) << kind;
  }
  std::filesystem::remove(folder_.path() + "/model.safetensors");
  std::filesystem::create_symlink("/etc/passwd", folder_.path() + "/link.safetensors");
  const std::pair<const char*, std::string> maps[] = {
      {"index: no object", "3"},
      {"index: names nothing", "{}"},
      {"index: ../", R"({"a":"../outside.safetensors"})"},
      {"index: an absolute path", R"({"a":"/etc/passwd"})"},
      {"index: a link out of the folder", R"({"a":"link.safetensors"})"},
      {"index: a shard that is missing", R"({"a":"three.safetensors"})"},
      {"index: a tensor that is not in its shard", R"({"a":"two.safetensors"})"},
      {"index: a name twice", R"({"a":"one.safetensors","a":"two.safetensors"})"},
      {"index: cut", R"({"a":)"},
  };
  for (const auto& [kind, map] : maps) {
    WriteIndex(map);
    const Cost cost = Refuse(20);
    Report(kind, cost);
    EXPECT_LT(cost.longest, absl::Seconds(kSanitized ? 5 : 1)) << kind;
    EXPECT_LT(cost.peak_growth_kib, 1024 + kOfSanitizersKib) << kind;
  }
}

std::string Repeated(const std::string& text, size_t bytes) {
  std::string all;
  for (all.reserve(bytes + text.size()); all.size() < bytes;) all += text;
  return all;
}

// As large as they may be: memory follows the file's size and not what a tree of it would take.
TEST_F(Costs, TheLargestHeadersTakeMemoryInProportion) {
  constexpr size_t kBytes = (4 << 20) - 200;
  constexpr size_t kIndexBytes = (1 << 20) - 200;
  std::string tensors;
  for (int i = 0; tensors.size() < kBytes - 60; ++i) {
    absl::StrAppend(&tensors, "\"", i, R"(":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},)");
  }
  std::string names;
  for (int i = 0; names.size() < kBytes - 60; ++i) absl::StrAppend(&names, "\"", i, "\":\"\",");
  const std::pair<const char*, std::string> headers[] = {
      {"80,000 tensors, and one byte too many", "{" + tensors + b_ + "}"},
      {"[[],[],...]", "{\"a\":[" + Repeated("[],", kBytes) + "0]}"},
      {"[[],[],...] at the outside", "[" + Repeated("[],", kBytes) + "0]"},
      {"a shape of 2,000,000 sizes",
       "{\"a\":{\"dtype\":\"U8\",\"shape\":[" + Repeated("1,", kBytes) + "1]}}"},
      {"400,000 names in the metadata", "{\"__metadata__\":{" + names + "\"n\":0}}"},
      {"a name of 4 MB", "{" + Entry(std::string(kBytes, 'n'), "U8", "[1]", "[0,1]") + "}"},
      {"spaces", "{" + std::string(kBytes, ' ') + "}"},
  };
  for (const auto& [kind, header] : headers) {
    folder_.Write("model.safetensors", FileOf(header, "0123"));
    const Cost cost = Refuse(1);
    Report(kind, cost);
    EXPECT_LT(cost.peak_growth_kib, (48 << 10) + kOfSanitizersKib) << kind;
  }
  // 16 MB that are over the limit are not read.
  folder_.Write("model.safetensors", FileOf("{" + std::string(16 << 20, ' ') + "}", ""));
  const Cost over = Refuse(1);
  Report("16 MB of spaces", over);
  EXPECT_LT(over.peak_growth_kib, 1024 + kOfSanitizersKib);
  std::filesystem::remove(folder_.path() + "/model.safetensors");
  std::string map;
  for (int i = 0; map.size() < kIndexBytes - 60; ++i) absl::StrAppend(&map, "\"", i, "\":\"a\",");
  WriteIndex("{" + map + "\"n\":0}");
  const Cost index = Refuse(1);
  Report("an index of 80,000 names", index);
  EXPECT_LT(index.peak_growth_kib, (48 << 10) + kOfSanitizersKib);
  WriteIndex("{" + std::string(2 << 20, ' ') + "}");
  EXPECT_THAT(SafetensorsReader::Open(folder_.path()).status().message(), HasSubstr("at most 1048576"));
}

}  // namespace
}  // namespace headroom
