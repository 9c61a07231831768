#include "services/headroom/bench/bench.h"

#include <gtest/gtest.h>
#include <stdlib.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/json.h"
#include "services/headroom/bench/costs.h"
#include "services/headroom/bench/geometries.h"
#include "services/headroom/bench/work_item.h"
#include "tests/common/random_model.h"

namespace headroom {
namespace {

class TempDir {
 public:
  TempDir() {
    std::string name = testing::TempDir() + "headroom-bench-XXXXXX";
    path_ = mkdtemp(name.data());
  }
  ~TempDir() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  std::string File(const std::string& name) const { return path_ + "/" + name; }

 private:
  std::string path_;
};

TEST(Bench, RefusesWrongOptions) {
  BenchOptions options;
  EXPECT_EQ(RunBench(options), 2);  // no model
  options.model_dir = "/nowhere";
  options.repeat = 2;
  EXPECT_EQ(RunBench(options), 2);
  options.repeat = 3;
  options.set = "nightly";
  EXPECT_EQ(RunBench(options), 2);
  options.work = {"decode"};
  EXPECT_EQ(RunBench(options), 2);
  options.work = {"decode:64"};
  EXPECT_EQ(RunBench(options), 2);  // no such model
  options.chunk_tokens = 32;
  EXPECT_EQ(RunBench(options), 2);
  options.chunk_tokens = 0;
  options.random_weights = "/nowhere/config.json";
  EXPECT_EQ(RunBench(options), 2);  // and a model
  options.model_dir.clear();
  options.geometry = "llama-3-8b";
  EXPECT_EQ(RunBench(options), 2);  // and random weights
}

// ---- Random weights -----------------------------------------------------------------------------

constexpr char kTinyConfig[] = R"({
  "architectures": ["LlamaForCausalLM"], "head_dim": 64, "hidden_size": 256,
  "intermediate_size": 512, "max_position_embeddings": 8192, "num_attention_heads": 4,
  "num_hidden_layers": 6, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
  "tie_word_embeddings": false, "vocab_size": 1000})";

std::string Said(int exit_status, const BenchOptions& options) {
  testing::internal::CaptureStderr();
  EXPECT_EQ(RunBench(options), exit_status);
  return testing::internal::GetCapturedStderr();
}

TEST(BenchWithRandomWeights, NamesTheFileThatIsWrong) {
  const TempDir dir;
  BenchOptions options;
  options.random_weights = dir.File("geometry.json");
  options.repeat = 3;
  options.work = {"decode:64"};
  EXPECT_NE(Said(2, options).find(options.random_weights), std::string::npos);  // not there
  const std::string text = kTinyConfig;
  const std::string wrong[] = {"{", "[]", std::string(text).replace(text.find("64"), 2, "65"),
                               std::string(text).replace(text.find("256"), 3, "\"x\"")};
  for (const std::string& config : wrong) {
    std::ofstream(options.random_weights) << config;
    EXPECT_NE(Said(2, options).find(options.random_weights), std::string::npos) << config;
  }
}

// Of a tiny model that is drawn; results go to a file in `dir`.
BenchOptions TinyBench(const TempDir& dir) {
  BenchOptions options;
  options.random_weights = dir.File("geometry.json");
  std::ofstream(options.random_weights) << kTinyConfig;
  options.threads = 2;
  options.gpu_memory_bytes = int64_t{128} << 20;
  options.repeat = 3;
  options.json_path = dir.File("bench.json");
  return options;
}

// A logit that is not finite fails its step, and that the run.
TEST(BenchWithRandomWeights, PrefillsAndDecodesWithFiniteLogits) {
#if defined(__SANITIZE_ADDRESS__)
  GTEST_SKIP() << "measuring the machine takes minutes with AddressSanitizer";
#endif
  const TempDir dir;
  BenchOptions options = TinyBench(dir);
  options.seed = 11;
  options.work = {"prefill:300", "decode:300:resident:2"};
  options.trace_path = dir.File("trace.json");
  ASSERT_EQ(RunBench(options), 0);
  std::stringstream trace;
  trace << std::ifstream(options.trace_path).rdbuf();
  for (const char* const name : {"chunk step", "token step", "Attend"}) {
    EXPECT_NE(trace.str().find(name), std::string::npos) << name;
  }
  std::ifstream file(options.json_path);
  std::string line;
  ASSERT_TRUE(std::getline(file, line));
  const absl::StatusOr<Json> setup = Json::Parse(line, 1 << 20);
  ASSERT_TRUE(setup.ok()) << setup.status();
  EXPECT_NE(setup->Find("model")->as_string().find("random weights of"), std::string::npos);
  EXPECT_EQ(setup->Find("decode_keys")->as_string(), "generated, not prefilled");
  EXPECT_EQ(setup->Find("chunk_tokens")->as_int(), 1024);
}

TEST(Bench, ATraceThatCannotBeWrittenIsAWrongFlag) {
  const TempDir dir;
  BenchOptions options = TinyBench(dir);
  options.work = {"prefill:300"};
  options.trace_path = dir.File("no/such/folder");
  EXPECT_EQ(RunBench(options), 2);
}

TEST(Bench, TimesTokensBesideAPrefill) {
#if defined(__SANITIZE_ADDRESS__)
  GTEST_SKIP() << "measuring the machine takes minutes with AddressSanitizer";
#endif
  const TempDir dir;
  BenchOptions options = TinyBench(dir);
  options.chunk_tokens = 64;
  options.work = {"beside:3000:fetched"};
  ASSERT_EQ(RunBench(options), 0);
  std::ifstream file(options.json_path);
  std::string line;
  while (std::getline(file, line)) {
    const absl::StatusOr<Json> json = Json::Parse(line, 1 << 20);
    ASSERT_TRUE(json.ok()) << json.status();
    if (json->Find("type")->as_string() != "beside") continue;
    const Json& tokens = *json->Find("tokens_beside");
    // As long as there are chunks, 47 of them, the other sequence goes on at their layers' borders.
    EXPECT_GE(tokens.Find("count")->as_int(), 40);
    EXPECT_LE(tokens.Find("p50_seconds")->as_number(), tokens.Find("p99_seconds")->as_number());
    EXPECT_LE(tokens.Find("p99_seconds")->as_number(), tokens.Find("most_seconds")->as_number());
    EXPECT_EQ(json->Find("prefilled_tokens")->as_int(), 3000);
    EXPECT_GT(json->Find("prefill_seconds")->as_number(), tokens.Find("most_seconds")->as_number());
    // A decode step's bytes: 4,096 tokens and some of 2 KV heads in 6 layers.
    const double bytes = json->Find("lanes")->Find("fetched")->Find("bytes")->as_number();
    EXPECT_GE(bytes, 4096.0 * 6 * 2 * 64 * 4);
    EXPECT_LE(bytes, 8192.0 * 6 * 2 * 64 * 4);
    return;
  }
  FAIL() << "no line of it in " << options.json_path;
}

TEST(Bench, WritesALineForTheSetupAndForEachItem) {
#if defined(__SANITIZE_ADDRESS__)
  GTEST_SKIP() << "measuring the machine takes minutes with AddressSanitizer";
#endif
  const TempDir dir;
  RandomModelSpec spec;
  spec.num_layers = 2;
  ASSERT_TRUE(WriteRandomModel(spec, dir.File("model")).ok());
  BenchOptions options;
  options.model_dir = dir.File("model");
  options.device = "cpu";
  options.threads = 2;
  options.gpu_memory_bytes = int64_t{128} << 20;
  options.repeat = 3;
  options.chunk_tokens = 64;
  options.work = {"prefill:200:resident", "decode:130:fetched:3", "decode:130:in-place:3",
                  "decode:4000:auto:1", "decode:130:resident=0.5,fetched=0.5:3"};
  options.json_path = dir.File("bench.json");
  ASSERT_EQ(RunBench(options), 0);

  std::ifstream file(options.json_path);
  std::vector<Json> lines;
  int chunks = 0;
  for (std::string line; std::getline(file, line);) {
    absl::StatusOr<Json> json = Json::Parse(line, 1 << 20);
    ASSERT_TRUE(json.ok()) << json.status();
    if (json->Find("type")->as_string() == "chunk") {
      ++chunks;
    } else {
      lines.push_back(*std::move(json));
    }
  }
  EXPECT_EQ(chunks, 3 * 4);  // each measurement's
  ASSERT_EQ(lines.size(), 6);
  EXPECT_EQ(lines[0].Find("type")->as_string(), "setup");
  EXPECT_EQ(lines[0].Find("threads")->as_int(), 2);
  for (int i = 1; i < 6; ++i) {
    SCOPED_TRACE(lines[i].Dump());
    EXPECT_GT(lines[i].Find("floor_seconds")->as_number(), 0);
    EXPECT_GT(lines[i].Find("ratio")->as_number(), 0);
    EXPECT_EQ(lines[i].Find("repeats")->as_int(), 3);
    EXPECT_LE(lines[i].Find("gpu_memory_peak_bytes")->as_int(), options.gpu_memory_bytes);
    EXPECT_GT(lines[i].Find("gpu_memory_peak_bytes")->as_int(), 0);
    EXPECT_EQ(lines[i].Find("gpu_memory_beside_arena_bytes")->as_int(), 0);
    EXPECT_EQ(lines[i].Find("floor_ceilings")->Dump(), lines[i].Find("ceilings")->Dump());
    for (const Json::Member& ceiling : lines[i].Find("ceilings")->as_object()) {
      EXPECT_GT(ceiling.second.as_number(), 0) << ceiling.first;
    }
  }
  EXPECT_EQ(lines[1].Find("type")->as_string(), "prefill");
  EXPECT_EQ(lines[2].Find("batch")->as_int(), 3);
  // The sealed part of each of the 3 sequences, of 4 KV heads in 2 layers, is copied once a step.
  const double bytes = 3 * 128 * 4 * 2 * 64 * 2 * 2;
  const Json& fetched = *lines[2].Find("lanes")->Find("fetched");
  EXPECT_DOUBLE_EQ(fetched.Find("bytes")->as_number(), bytes);
  // ... or read where it lies.
  EXPECT_EQ(lines[3].Find("lanes")->Find("fetched")->Find("bytes")->as_number(), 0);
  EXPECT_DOUBLE_EQ(lines[3].Find("lanes")->Find("in_place")->Find("bytes")->as_number(), bytes);
  EXPECT_GT(lines[4].Find("predicted_seconds")->as_number(), 0);
  EXPECT_NE(lines[4].Find("prediction_off")->as_number(), 0);
  EXPECT_EQ(lines[3].Find("prediction_off")->as_number(), 0);
  EXPECT_DOUBLE_EQ(lines[5].Find("lanes")->Find("fetched")->Find("bytes")->as_number(), bytes / 2);
}

TEST(Bench, SaysWhenTheMemoryDoesNotHoldWhatShouldBeResident) {
  const TempDir dir;
  RandomModelSpec spec;
  spec.num_layers = 2;
  ASSERT_TRUE(WriteRandomModel(spec, dir.File("model")).ok());
  BenchOptions options;
  options.model_dir = dir.File("model");
  options.gpu_memory_bytes = int64_t{128} << 20;
  options.repeat = 3;
  options.chunk_tokens = 64;
  options.work = {"decode:65536:resident"};
  testing::internal::CaptureStderr();
  EXPECT_EQ(RunBench(options), 2);
  EXPECT_NE(testing::internal::GetCapturedStderr().find("raise --gpu-memory"), std::string::npos);
}

// What a run of minutes is worth when its time is over.
TEST(Bench, ReportsHowFarAPrefillCameThatWasCutOff) {
#if defined(__SANITIZE_ADDRESS__)
  GTEST_SKIP() << "measuring the machine takes minutes with AddressSanitizer";
#endif
  constexpr int64_t kTokens = 1000000;
  const TempDir dir;
  BenchOptions options;
  options.random_weights = dir.File("geometry.json");
  std::ofstream(options.random_weights) << R"({
    "architectures": ["LlamaForCausalLM"], "head_dim": 64, "hidden_size": 64,
    "intermediate_size": 64, "max_position_embeddings": 2000000, "num_attention_heads": 1,
    "num_hidden_layers": 1, "num_key_value_heads": 1, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "tie_word_embeddings": false, "vocab_size": 300})";
  options.threads = 2;
  options.gpu_memory_bytes = int64_t{1} << 30;
  options.repeat = 3;
  options.chunk_tokens = 1024;
  options.stop_after_seconds = 2;
  options.work = {absl::StrCat("prefill:", kTokens, ":fetched")};
  options.json_path = dir.File("bench.json");
  ASSERT_EQ(RunBench(options), 0);
  std::ifstream file(options.json_path);
  int64_t of_chunks = 0;
  bool reported = false;
  for (std::string line; std::getline(file, line);) {
    const absl::StatusOr<Json> json = Json::Parse(line, 1 << 20);
    ASSERT_TRUE(json.ok()) << json.status();
    const std::string type = json->Find("type")->as_string();
    if (type == "chunk") {
      of_chunks = std::max(of_chunks, json->Find("prefilled_tokens")->as_int());
    } else if (type == "prefill") {
      reported = true;
      SCOPED_TRACE(line);
      EXPECT_TRUE(json->Find("cut_off")->as_bool());
      EXPECT_EQ(json->Find("prefilled_tokens")->as_int(), of_chunks);
      EXPECT_EQ(json->Find("repeats")->as_int(), 1);
      EXPECT_EQ(json->Find("prefilled_tokens")->as_int() % 1024, 0);
      EXPECT_GT(json->Find("ratio")->as_number(), 0);
    }
  }
  EXPECT_TRUE(reported);
  EXPECT_GT(of_chunks, 0);
  EXPECT_LT(of_chunks, kTokens);
}

}  // namespace
}  // namespace headroom
