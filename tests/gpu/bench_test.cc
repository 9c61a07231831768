// `headroom bench --device cuda` with random weights, small: that it runs in every lane and counts
// what it should. How fast it is does not matter here.
#include "services/headroom/bench/bench.h"

#include <gtest/gtest.h>
#include <stdlib.h>

#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "common/json.h"
#include "services/headroom/bench/costs.h"

namespace headroom {
namespace {

constexpr char kConfig[] = R"({
  "architectures": ["LlamaForCausalLM"], "head_dim": 128, "hidden_size": 1024,
  "intermediate_size": 2048, "max_position_embeddings": 65536, "num_attention_heads": 8,
  "num_hidden_layers": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
  "tie_word_embeddings": false, "vocab_size": 5000})";
constexpr double kBytesAToken = 2.0 * 2 * 128 * 2 * 4;

class BenchOnGpu : public testing::Test {
 protected:
  BenchOnGpu() {
    std::string name = testing::TempDir() + "headroom-gpu-bench-XXXXXX";
    folder_ = mkdtemp(name.data());
    std::ofstream(folder_ + "/config.json") << kConfig;
  }
  ~BenchOnGpu() override {
    std::error_code ignored;
    std::filesystem::remove_all(folder_, ignored);
  }
  // A line for the setup and one for each item.
  std::vector<Json> Run(const std::vector<std::string>& work) {
    BenchOptions options;
    options.random_weights = folder_ + "/config.json";
    options.device = "cuda";
    options.gpu_memory_bytes = int64_t{2} << 30;
    options.repeat = 3;
    options.work = work;
    options.json_path = folder_ + "/out.json";
    EXPECT_EQ(RunBench(options), 0);
    std::vector<Json> lines;
    std::ifstream file(options.json_path);
    for (std::string line; std::getline(file, line);) {
      absl::StatusOr<Json> json = Json::Parse(line, 1 << 20);
      EXPECT_TRUE(json.ok()) << json.status();
      if (json.ok() && json->Find("type")->as_string() != "chunk") lines.push_back(*std::move(json));
    }
    return lines;
  }

  std::string folder_;
};

double LaneBytes(const Json& line, const char* lane) {
  return line.Find("lanes")->Find(lane)->Find("bytes")->as_number();
}

TEST_F(BenchOnGpu, RunsInEveryLaneBesideWhatTheMachineCanDo) {
  const std::vector<Json> lines =
      Run({"prefill:9000:resident", "prefill:9000:fetched", "decode:8192:resident:2",
           "decode:8192:fetched", "decode:8192:in-place"});
  ASSERT_EQ(lines.size(), 6);
  EXPECT_EQ(lines[0].Find("chunk_tokens")->as_int(), 8192);
  for (size_t i = 1; i < lines.size(); ++i) {
    SCOPED_TRACE(lines[i].Dump());
    EXPECT_EQ(lines[i].Find("ceilings")->as_object().size(), std::size(kCeilingFields));
    EXPECT_GT(lines[i].Find("ratio")->as_number(), 0);
    // The context alone takes some hundred MiB.
    EXPECT_GT(lines[i].Find("gpu_memory_beside_arena_bytes")->as_int(), 64 << 20);
    EXPECT_LT(lines[i].Find("gpu_memory_peak_bytes")->as_int(), int64_t{8} << 30);
  }
  EXPECT_EQ(LaneBytes(lines[3], "fetched"), 0);
  EXPECT_DOUBLE_EQ(LaneBytes(lines[4], "fetched"), 8192 * kBytesAToken);
  EXPECT_DOUBLE_EQ(LaneBytes(lines[5], "in_place"), 8192 * kBytesAToken);
  EXPECT_EQ(LaneBytes(lines[5], "fetched"), 0);
}

}  // namespace
}  // namespace headroom
