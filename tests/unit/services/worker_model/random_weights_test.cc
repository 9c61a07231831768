#include "services/worker/model/random_weights.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "common/device/cpu/cpu_device.h"

namespace headroom {
namespace {

ModelConfig Config() {
  ModelConfig config;
  config.num_layers = 2;
  config.num_q_heads = 4;
  config.num_kv_heads = 2;
  config.head_dim = 64;
  config.hidden = 96;
  config.intermediate = 80;
  config.vocab = 67;
  return config;
}

std::unique_ptr<Device> CpuDeviceOf(int64_t bytes, int threads) {
  CpuDeviceOptions options;
  options.arena_bytes = bytes;
  options.compute_threads = threads;
  return *CreateCpuDevice(options);
}

// Weights and the device that has them, with an arena just large enough.
struct Drawn {
  std::unique_ptr<Device> device;
  ModelWeights weights;
};
Drawn Draw(const ModelConfig& config, uint64_t seed, int threads = 1) {
  Drawn drawn;
  const int64_t bytes = WeightBytes(config, *CpuDeviceOf(1 << 20, 1));
  drawn.device = CpuDeviceOf(bytes, threads);
  absl::StatusOr<ModelWeights> weights = DrawWeights(config, seed, *drawn.device);
  EXPECT_TRUE(weights.ok()) << weights.status();
  if (weights.ok()) drawn.weights = *std::move(weights);
  return drawn;
}

std::string Bytes(const kernels::PackedWeight& weight) {
  return {reinterpret_cast<const char*>(weight.data),
          static_cast<size_t>(kernels::PackedWeightBytes(weight.n, weight.k))};
}

// Every matrix, in a fixed order.
std::vector<std::string> Matrices(const ModelWeights& weights) {
  std::vector<std::string> all = {Bytes(weights.embedding), Bytes(weights.lm_head)};
  for (const LayerWeights& layer : weights.layers) {
    for (const auto& matrix : {layer.qkv, layer.output, layer.gate_up, layer.down}) {
      all.push_back(Bytes(matrix));
    }
  }
  return all;
}

TEST(DrawWeights, TheSameSeedGivesTheSameBits) {
  const Drawn one = Draw(Config(), 3);
  const Drawn other = Draw(Config(), 3, /*threads=*/3);
  EXPECT_EQ(Matrices(one.weights), Matrices(other.weights));
  EXPECT_EQ(one.weights.fingerprint, other.weights.fingerprint);
}

TEST(DrawWeights, AnotherSeedGivesOthersAndNoTwoMatricesAreTheSame) {
  const Drawn one = Draw(Config(), 3);
  const Drawn other = Draw(Config(), 4);
  EXPECT_NE(one.weights.fingerprint, other.weights.fingerprint);
  std::vector<std::string> all = Matrices(one.weights);
  for (std::string& matrix : Matrices(other.weights)) all.push_back(std::move(matrix));
  for (size_t i = 0; i < all.size(); ++i) {
    for (size_t j = 0; j < i; ++j) EXPECT_NE(all[i], all[j]) << i << ", " << j;
  }
}

TEST(DrawWeights, AnotherGeometryHasAnotherFingerprint) {
  ModelConfig config = Config();
  config.rope_theta = 500000;
  EXPECT_NE(Draw(config, 3).weights.fingerprint, Draw(Config(), 3).weights.fingerprint);
}

TEST(DrawWeights, ShapesAreThoseOfTheConfig) {
  const ModelConfig config = Config();
  const Drawn drawn = Draw(config, 3);
  const ModelWeights& weights = drawn.weights;
  EXPECT_EQ(weights.embedding.n, config.vocab);
  EXPECT_EQ(weights.embedding.k, config.hidden);
  ASSERT_EQ(weights.layers.size(), 2u);
  const LayerWeights& layer = weights.layers[1];
  EXPECT_EQ(layer.qkv.n, (4 + 2 * 2) * 64);
  EXPECT_EQ(layer.output.n, config.hidden);
  EXPECT_EQ(layer.output.k, 4 * 64);
  EXPECT_EQ(layer.gate_up.n, 2 * config.intermediate);
  EXPECT_EQ(layer.down.k, config.intermediate);
  for (const kernels::BFloat16* norm :
       {layer.attention_norm, layer.mlp_norm, weights.final_norm}) {
    for (int64_t i = 0; i < config.hidden; ++i) EXPECT_EQ(kernels::ToFloat(norm[i]), 1.0f);
  }
  const std::vector<float> frequencies = config.InverseFrequencies();
  EXPECT_EQ(std::memcmp(weights.inverse_frequency, frequencies.data(),
                        frequencies.size() * sizeof(float)),
            0);
}

TEST(DrawWeights, ATiedHeadIsTheEmbedding) {
  ModelConfig config = Config();
  config.tied_embeddings = true;
  const Drawn drawn = Draw(config, 3);
  EXPECT_EQ(drawn.weights.lm_head.data, drawn.weights.embedding.data);
}

TEST(DrawWeights, AnOutputHasTheVarianceOfItsInputs) {
  const Drawn drawn = Draw(Config(), 3);
  const kernels::PackedWeight& down = drawn.weights.layers[0].down;
  double squares = 0;  // of a row's elements, in the mean over the rows
  for (int64_t row = 0; row < down.n; ++row) {
    for (int64_t column = 0; column < down.k; ++column) {
      const double value =
          kernels::ToFloat(down.data[kernels::PackedWeightIndex(down.k, row, column)]);
      squares += value * value / static_cast<double>(down.n);
    }
  }
  EXPECT_NEAR(squares, 1, 0.05);
}

TEST(DrawWeights, AnArenaThatIsTooSmallIsTheError) {
  const std::unique_ptr<Device> device = CpuDeviceOf(64 << 10, 1);
  EXPECT_EQ(DrawWeights(Config(), 3, *device).status().code(),
            absl::StatusCode::kResourceExhausted);
}

// The arena of Draw() has no byte to spare.
TEST(DrawWeights, HasTheWeightsOfEveryOption) {
  ModelConfig config = Config();
  config.qkv_bias = config.qk_norm = config.post_norms = true;
  config.norm_weight_offset = 1;
  const Drawn drawn = Draw(config, 3);
  ASSERT_EQ(drawn.weights.layers.size(), 2u);
  const LayerWeights& layer = drawn.weights.layers[1];
  ASSERT_NE(layer.qkv_bias, nullptr);
  ASSERT_NE(layer.q_norm, nullptr);
  ASSERT_NE(layer.k_norm, nullptr);
  ASSERT_NE(layer.post_attention_norm, nullptr);
  ASSERT_NE(layer.post_mlp_norm, nullptr);
  EXPECT_EQ(kernels::ToFloat(layer.qkv_bias[config.qkv_width() - 1]), 0);
  EXPECT_EQ(kernels::ToFloat(layer.q_norm[63]), 1);
  EXPECT_EQ(kernels::ToFloat(layer.post_mlp_norm[95]), 0);  // less 1
  EXPECT_EQ(kernels::ToFloat(drawn.weights.final_norm[0]), 0);
  EXPECT_NE(drawn.weights.fingerprint, Draw(Config(), 3).weights.fingerprint);
}

}  // namespace
}  // namespace headroom
