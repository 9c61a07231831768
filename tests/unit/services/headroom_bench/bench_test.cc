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

ModelConfig SmolLm2() {
  ModelConfig config;
  config.num_layers = 30;
  config.num_q_heads = 9;
  config.num_kv_heads = 3;
  config.head_dim = 64;
  config.hidden = 576;
  config.intermediate = 1536;
  config.vocab = 49152;
  config.tied_embeddings = true;
  return config;
}

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

// ---- Work items ---------------------------------------------------------------------------------

TEST(WorkItem, IsReadFromItsText) {
  const absl::StatusOr<WorkItem> decode = ParseWorkItem("decode:7168:fetched:4");
  ASSERT_TRUE(decode.ok()) << decode.status();
  EXPECT_EQ(*decode, (WorkItem{WorkItem::Kind::kDecode, 7168, Lane::kFetched, 4}));
  const absl::StatusOr<WorkItem> question = ParseWorkItem("question:7168:auto");
  ASSERT_TRUE(question.ok()) << question.status();
  EXPECT_EQ(*question, (WorkItem{WorkItem::Kind::kQuestion, 7168, Lane::kResident, 1, true}));
  EXPECT_EQ(question->ToString(), "question:7168:auto");
  const absl::StatusOr<WorkItem> shares = ParseWorkItem("decode:7168:resident=0.25,in-place=0.75:2");
  ASSERT_TRUE(shares.ok()) << shares.status();
  EXPECT_TRUE(shares->planned);
  EXPECT_FALSE(shares->placement.automatic);
  EXPECT_EQ(shares->placement.share(coordinator::Lane::kInPlace), 0.75);
  EXPECT_EQ(shares->batch, 2);
  EXPECT_EQ(shares->ToString(), "decode:7168:resident=0.25,in-place=0.75:2");
  const absl::StatusOr<WorkItem> beside = ParseWorkItem("beside:7168:fetched");
  ASSERT_TRUE(beside.ok()) << beside.status();
  EXPECT_EQ(*beside, (WorkItem{WorkItem::Kind::kBeside, 7168, Lane::kFetched, 1}));
  EXPECT_EQ(beside->ToString(), "beside:7168:fetched");
  const absl::StatusOr<WorkItem> prefill = ParseWorkItem("prefill:2048");
  ASSERT_TRUE(prefill.ok()) << prefill.status();
  EXPECT_EQ(*prefill, (WorkItem{WorkItem::Kind::kPrefill, 2048, Lane::kResident, 1}));
}

TEST(WorkItem, OfEverySetIsReadFromItsOwnText) {
  for (const char* const set : {"default", "prefill", "decode", "quick", "128k", "plan"}) {
    const absl::StatusOr<std::vector<WorkItem>> items = WorkItemsOf(set, 1);
    ASSERT_TRUE(items.ok()) << items.status();
    for (const WorkItem& item : *items) {
      const absl::StatusOr<WorkItem> read = ParseWorkItem(item.ToString());
      ASSERT_TRUE(read.ok()) << read.status();
      EXPECT_EQ(*read, item);
    }
  }
}

TEST(WorkItem, ThatIsWrongIsNamedWithItsPart) {
  const struct {
    const char* text;
    const char* part;
  } cases[] = {
      {"", "prefill:CONTEXT"},          {"encode:5", "prefill:CONTEXT"},
      {"decode", "no context"},         {"decode:0", "context '0'"},
      {"decode:-5", "context '-5'"},    {"decode:99999999999999999999", "context"},
      {"decode:16777217", "context"},   {"decode:5x", "context '5x'"},
      {"decode:5:gpu", "lane 'gpu'"},   {"decode:5:in_place", "expected resident, fetched, in-place"},
      {"prefill:5:in-place", "too many rows"}, {"prefill:5:auto", "no prefill is planned"},
      {"beside:5:in-place", "too many rows"}, {"beside:5:auto", "no prefill is planned"},
      {"prefill:5:resident:2", "batch"}, {"decode:5:resident:0", "batch '0'"},
      {"decode:5:resident:65", "batch"}, {"decode:5:resident:2:", "part too many"},
      {"question:5:resident:2", "only a decode"}, {"decode:5:resident=0.5", "sum to"},
      {"decode:5:here=1", "'here=1'"},           {"prefill:5:resident=0.5,fetched=0.5", "no prefill"},
  };
  for (const auto& c : cases) {
    const absl::Status status = ParseWorkItem(c.text).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << c.text;
    EXPECT_NE(status.message().find(c.part), std::string::npos) << status;
  }
  EXPECT_NE(WorkItemsOf("nightly", 1).status().message().find("default, prefill, decode"),
            std::string::npos);
}

// ---- Costs --------------------------------------------------------------------------------------

TEST(Costs, OfSmolLm2AreThoseWorkedOutByHand) {
  const Costs prefill = PrefillCosts(SmolLm2(), 2048);
  // A layer: 576 x (960 + 576 + 3 x 1536) multiply-adds; the vocabulary once.
  EXPECT_DOUBLE_EQ(prefill.linear_flops, 2.0 * (2048 * 30 * 576.0 * 6144 + 576.0 * 49152));
  EXPECT_DOUBLE_EQ(prefill.attention_flops, 4.0 * 64 * 9 * 30 * (2048.0 * 2049 / 2));
  const Costs decode = DecodeCosts(SmolLm2(), 1000, 2);
  EXPECT_DOUBLE_EQ(decode.weight_bytes,
                   2.0 * (30 * (576.0 * 6144 + 2 * 576) + 576.0 * 49152));
  EXPECT_DOUBLE_EQ(decode.kv_bytes, 2 * 1000 * 23040.0);
}

TEST(Costs, AddUpToTheFloor) {
  Ceilings ceilings;
  ceilings.gemm_flops = 100;
  ceilings.attention_flops = 50;
  ceilings.read_bytes = 10;
  ceilings.copy_bytes = 5;
  Costs costs;
  costs.linear_flops = 300;
  costs.attention_flops = 200;
  costs.weight_bytes = 50;
  costs.kv_bytes = 20;
  EXPECT_DOUBLE_EQ(PrefillFloorSeconds(costs, ceilings), 3 + 4);
  EXPECT_DOUBLE_EQ(DecodeFloorSeconds(costs, ceilings), 7);
  costs.copied_bytes = 20;
  EXPECT_DOUBLE_EQ(DecodeFloorSeconds(costs, ceilings), 11);
  costs.linear_flops = 2000;  // a batch that computes for longer than it reads weights
  EXPECT_DOUBLE_EQ(DecodeFloorSeconds(costs, ceilings), 26);
}

TEST(Costs, OfAGpuRunSideBySideAndTheLongestCounts) {
  Ceilings ceilings;
  ceilings.gemm_flops = 100;
  ceilings.read_bytes = 10;
  ceilings.copy_bytes = 5;
  ceilings.host_read_bytes = 4;
  Costs costs;
  costs.linear_flops = 300;
  costs.weight_bytes = 50;
  costs.kv_bytes = 20;
  EXPECT_DOUBLE_EQ(GpuDecodeFloorSeconds(costs, ceilings), 7);
  costs.copied_bytes = 20;  // 4 s, behind the reads
  EXPECT_DOUBLE_EQ(GpuDecodeFloorSeconds(costs, ceilings), 7);
  costs.copied_bytes = 40;
  EXPECT_DOUBLE_EQ(GpuDecodeFloorSeconds(costs, ceilings), 8);
  costs.in_place_bytes = 10;  // no longer read by the device
  costs.copied_bytes = 0;
  EXPECT_DOUBLE_EQ(GpuDecodeFloorSeconds(costs, ceilings), 6);
  costs.kv_bytes = costs.in_place_bytes = 40;
  EXPECT_DOUBLE_EQ(GpuDecodeFloorSeconds(costs, ceilings), 10);
  costs.linear_flops = 2000;
  EXPECT_DOUBLE_EQ(GpuDecodeFloorSeconds(costs, ceilings), 20);
}

TEST(Costs, CopiesAndHostReadsShareOneMemory) {
  Ceilings ceilings;
  ceilings.gemm_flops = ceilings.read_bytes = 1000;
  ceilings.copy_bytes = 5;
  ceilings.host_read_bytes = 10;
  ceilings.both_links_bytes = 12;
  Costs costs;
  costs.kv_bytes = 60;
  costs.copied_bytes = costs.in_place_bytes = 30;
  EXPECT_DOUBLE_EQ(GpuDecodeFloorSeconds(costs, ceilings), 6);  // PCIe alone needs more than 60 / 12
  costs.copied_bytes = 20;
  costs.in_place_bytes = 40;
  EXPECT_DOUBLE_EQ(GpuDecodeFloorSeconds(costs, ceilings), 5);
  costs.copied_bytes = 0;  // one link: it has the memory for itself
  EXPECT_DOUBLE_EQ(GpuDecodeFloorSeconds(costs, ceilings), 4);
  costs.copied_bytes = 20;
  ceilings.both_links_bytes = 9;  // measured too low: no less than one of them
  EXPECT_DOUBLE_EQ(GpuDecodeFloorSeconds(costs, ceilings), 6);
  ceilings.both_links_bytes = 0;  // not measured
  EXPECT_DOUBLE_EQ(GpuDecodeFloorSeconds(costs, ceilings), 4);
}

TEST(Costs, OfLlama3Are128KiBOfKeysATokenAnd15GBOfWeights) {
  const absl::StatusOr<ModelConfig> config =
      ReadModelConfigFile(std::string(getenv("HEADROOM_SOURCE_DIR")) +
                          "/tests/bench/llama-3-8b.json");
  ASSERT_TRUE(config.ok()) << config.status();
  const Costs costs = DecodeCosts(*config, 131072, 1);
  EXPECT_DOUBLE_EQ(costs.kv_bytes, 131072.0 * 131072);
  EXPECT_NEAR(costs.weight_bytes, 15.0e9, 0.02e9);
  const Costs prefill = PrefillCosts(*config, 131072);
  EXPECT_DOUBLE_EQ(prefill.linear_flops,
                   2 * (131072 * 32 * 4096.0 * (6144 + 4096 + 3 * 14336) + 4096.0 * 128256));
  EXPECT_NEAR(prefill.attention_flops, 131072 * 2 * 131072.0 * 131072, 1e11);
}

TEST(Costs, TakeTheLargerOfEachCeiling) {
  Ceilings a, b;
  a.gemm_flops = 1;
  b.gemm_flops = 2;
  a.read_bytes = 5;
  b.read_bytes = 4;
  b.copy_both_bytes = 3;
  const Ceilings larger = Larger(a, b);
  EXPECT_EQ(larger.gemm_flops, 2);
  EXPECT_EQ(larger.read_bytes, 5);
  EXPECT_EQ(larger.copy_both_bytes, 3);
}

TEST(Costs, SpreadIsMedianLeastAndMost) {
  const Spread odd = SpreadOf({3, 1, 2});
  EXPECT_EQ(odd.median, 2);
  EXPECT_EQ(odd.least, 1);
  EXPECT_EQ(odd.most, 3);
  EXPECT_EQ(SpreadOf({4, 1, 2, 3}).median, 2.5);
}

// ---- The whole ----------------------------------------------------------------------------------

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

// Of a model whose layers see windows of 4,096 by turns, and of one whose layers all do.
TEST(Costs, CountWhatWindowsLeave) {
  const ModelConfig gemma = *GeometryOf("gemma-2-9b");
  const ModelConfig mistral = *GeometryOf("mistral-7b");
  ModelConfig full = gemma;
  full.windows.clear();
  EXPECT_EQ(DecodeCosts(gemma, 4096, 1).kv_bytes, DecodeCosts(full, 4096, 1).kv_bytes);
  EXPECT_EQ(DecodeCosts(gemma, 12288, 2).kv_bytes, 16384.0 * (336 << 10));
  EXPECT_EQ(DecodeCosts(mistral, 1 << 20, 1).kv_bytes, 4096.0 * (128 << 10));
  EXPECT_EQ(PrefillCosts(gemma, 4096).attention_flops, PrefillCosts(full, 4096).attention_flops);
  ModelConfig two = mistral;
  two.windows.assign(32, 2);
  // Of five queries the first sees one key, the others two.
  EXPECT_EQ(PrefillCosts(two, 5).attention_flops, 4.0 * 128 * 32 * 32 * 9);
}

TEST(Geometries, AreEachReadByTheName) {
  EXPECT_EQ(GeometryNames().front(), "llama-3-8b");
  for (const std::string& name : GeometryNames()) {
    const absl::StatusOr<ModelConfig> config = GeometryOf(name);
    ASSERT_TRUE(config.ok()) << name << ": " << config.status();
    EXPECT_GE(config->num_layers, 26) << name;
  }
  // Bytes of keys and values of a token, of all layers, which the models' papers and cards give.
  EXPECT_EQ(GeometryOf("llama-2-7b")->kv_geometry().BytesPerToken(), 512 << 10);
  EXPECT_EQ(GeometryOf("llama-3-8b")->kv_geometry().BytesPerToken(), 128 << 10);
  EXPECT_EQ(GeometryOf("mistral-7b")->kv_geometry().BytesPerToken(), 128 << 10);
  EXPECT_EQ(GeometryOf("qwen2-7b")->kv_geometry().BytesPerToken(), 56 << 10);
  EXPECT_TRUE(GeometryOf("qwen2-7b")->qkv_bias);
  EXPECT_TRUE(GeometryOf("qwen3-8b")->qk_norm);
  EXPECT_EQ(GeometryOf("gemma-2-9b")->kv_geometry().BytesPerToken(), 336 << 10);
  const absl::Status unknown = GeometryOf("llama-9").status();
  EXPECT_EQ(unknown.code(), absl::StatusCode::kNotFound);
  EXPECT_NE(unknown.message().find("qwen2-7b"), std::string::npos) << unknown;
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
