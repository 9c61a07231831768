// What is asked of a bench, and what it costs by count.
#include "services/headroom/bench/costs.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "services/headroom/bench/geometries.h"
#include "services/headroom/bench/work_item.h"

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

}  // namespace
}  // namespace headroom
