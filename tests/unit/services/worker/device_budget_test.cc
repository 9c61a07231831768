// How a budget of device memory is divided.
#include "services/worker/device_budget.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <limits>
#include <string>
#include <vector>

namespace headroom {
namespace {

ModelConfig Llama(int32_t layers, int32_t q_heads, int32_t kv_heads, int32_t head_dim,
                  int64_t hidden, int64_t intermediate, int64_t vocab) {
  ModelConfig config;
  config.num_layers = layers;
  config.num_q_heads = q_heads;
  config.num_kv_heads = kv_heads;
  config.head_dim = head_dim;
  config.hidden = hidden;
  config.intermediate = intermediate;
  config.vocab = vocab;
  return config;
}

struct BudgetCase {
  const char* name;
  ModelConfig config;
  int64_t weights_bytes;
};

std::vector<BudgetCase> BudgetCases() {
  return {{"SmolLM2-135M", Llama(30, 9, 3, 64, 576, 1536, 49152), int64_t{257} << 20},
          {"Llama-3-8B", Llama(32, 32, 8, 128, 4096, 14336, 128256), int64_t{15317} << 20},
          {"tiny", Llama(2, 4, 2, 64, 96, 136, 211), int64_t{1} << 20}};
}

TEST(DivideBudget, GivesAllOfItAndNoMore) {
  for (const BudgetCase& c : BudgetCases()) {
    SCOPED_TRACE(c.name);
    const KvGeometry geometry = c.config.kv_geometry();
    int works = 0;
    for (int64_t rest = 1 << 20; rest < int64_t{40} << 30; rest += rest / 7) {
      const int64_t bytes = c.weights_bytes + rest;
      const auto budget = DivideBudget(c.config, c.weights_bytes, bytes, 8192, 8192);
      if (!budget.ok()) continue;
      ++works;
      EXPECT_EQ(budget->budget_bytes, bytes);
      EXPECT_EQ(budget->weights_bytes + budget->ring_bytes + budget->activation_bytes +
                    budget->kv_pool_bytes,
                bytes);
      EXPECT_GE(budget->kv_pool_bytes, budget->tail_bytes_per_sequence);
      EXPECT_EQ(budget->tail_bytes_per_sequence, 256 * geometry.BytesPerToken());
      EXPECT_LE(budget->ring_bytes, kMaxRingBytes);
      EXPECT_EQ(budget->max_tile_bytes, budget->ring_bytes / 4);
      EXPECT_GE(budget->max_tile_bytes,
                geometry.MaxExtentTokens() * geometry.BytesPerTokenPerHead());
      EXPECT_EQ(budget->ring_bytes % (kNumContexts * 256), 0);
      EXPECT_GE(budget->max_chunk_tokens, 64);
      EXPECT_LE(budget->max_chunk_tokens, 8192);
      EXPECT_EQ(budget->max_chunk_tokens & (budget->max_chunk_tokens - 1), 0);
    }
    EXPECT_GT(works, 10);
  }
}

TEST(DivideBudget, ObeysTheChunkLimit) {
  const BudgetCase c = BudgetCases()[0];
  for (const int64_t limit : {1, 64, 100, 512, 100000}) {
    const auto budget =
        DivideBudget(c.config, c.weights_bytes, c.weights_bytes + (8ll << 30), limit, 8192);
    ASSERT_TRUE(budget.ok()) << budget.status();
    EXPECT_LE(budget->max_chunk_tokens, std::max<int64_t>(limit, kMinChunkTokens));
    EXPECT_GT(2 * budget->max_chunk_tokens, std::min(limit, kMaxChunkTokens));
  }
}

// The least budget that the refusal names is enough, and not by more than a MiB.
TEST(DivideBudget, TheLeastThatItNamesWorks) {
  for (const BudgetCase& c : BudgetCases()) {
    SCOPED_TRACE(c.name);
    for (const int64_t context : {512, 8192, 131072}) {
      const auto refused = DivideBudget(c.config, c.weights_bytes, c.weights_bytes, 8192, context);
      ASSERT_EQ(refused.status().code(), absl::StatusCode::kResourceExhausted);
      const std::string message(refused.status().message());
      EXPECT_NE(message.find("--gpu-memory"), std::string::npos) << message;
      const std::string before = "needs at least ";
      const size_t at = message.find(before);
      ASSERT_NE(at, std::string::npos) << message;
      const int64_t least = std::stoll(message.substr(at + before.size())) << 20;
      const auto enough = DivideBudget(c.config, c.weights_bytes, least, 8192, context);
      ASSERT_TRUE(enough.ok()) << enough.status();
      EXPECT_GE(enough->kv_pool_bytes, enough->tail_bytes_per_sequence);
      EXPECT_FALSE(
          DivideBudget(c.config, c.weights_bytes, least - (2 << 20), 8192, context).ok());
    }
  }
}

TEST(DivideBudget, RefusesNonsense) {
  const BudgetCase c = BudgetCases()[2];
  for (const int64_t bytes : {std::numeric_limits<int64_t>::min(), int64_t{-1}, int64_t{0}}) {
    EXPECT_EQ(DivideBudget(c.config, c.weights_bytes, bytes, 8192, 8192).status().code(),
              absl::StatusCode::kResourceExhausted);
  }
}

}  // namespace
}  // namespace headroom
