#include "services/worker/model/random_weights.h"

#include <xxhash.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <random>
#include <vector>

#include "common/status.h"

namespace headroom {
namespace {

using kernels::BFloat16;
using kernels::PackedWeight;

// Draws matrices one after the other, each from a seed of its own.
class Drawer {
 public:
  Drawer(uint64_t seed, Device& device) : seeds_(seed), device_(device) {}

  absl::StatusOr<PackedWeight> Matrix(int64_t n, int64_t k) {
    HEADROOM_ASSIGN_OR_RETURN(uint8_t* const packed,
                              device_.Allocate(device_.PackedBytes(n, k), "weights"));
    HEADROOM_RETURN_IF_ERROR(device_.PrepareGemm(n, k));
    kernels::FillRandomArgs args;
    args.out = reinterpret_cast<BFloat16*>(packed);
    args.n = n;
    args.k = k;
    args.seed = seeds_();
    args.scale = std::sqrt(3.0f / static_cast<float>(k));
    HEADROOM_RETURN_IF_ERROR(device_.FillRandom(args));
    return PackedWeight{args.out, n, k};
  }

  // `one` is the weight that leaves what is normalised as it is.
  absl::StatusOr<const BFloat16*> Norm(int64_t size, float one = 1) {
    const std::vector<BFloat16> ones(static_cast<size_t>(size), kernels::ToBFloat16(one));
    return Vector(ones);
  }

  template <typename T>
  absl::StatusOr<const T*> Vector(const std::vector<T>& values) {
    const auto bytes = static_cast<int64_t>(values.size() * sizeof(T));
    HEADROOM_ASSIGN_OR_RETURN(uint8_t* const data, device_.Allocate(bytes, "weights"));
    HEADROOM_RETURN_IF_ERROR(device_.Upload(data, values.data(), bytes));
    return reinterpret_cast<const T*>(data);
  }

 private:
  std::mt19937_64 seeds_;  // whose outputs the language specifies
  Device& device_;
};

absl::StatusOr<LayerWeights> DrawLayer(const ModelConfig& config, Drawer& drawer) {
  const int64_t q_width = int64_t{config.num_q_heads} * config.head_dim;
  const float one = 1 - config.norm_weight_offset;
  LayerWeights weights;
  HEADROOM_ASSIGN_OR_RETURN(weights.attention_norm, drawer.Norm(config.hidden, one));
  HEADROOM_ASSIGN_OR_RETURN(weights.qkv, drawer.Matrix(config.qkv_width(), config.hidden));
  if (config.qkv_bias) {
    HEADROOM_ASSIGN_OR_RETURN(
        weights.qkv_bias,
        drawer.Vector(std::vector<BFloat16>(static_cast<size_t>(config.qkv_width()))));
  }
  if (config.qk_norm) {
    HEADROOM_ASSIGN_OR_RETURN(weights.q_norm, drawer.Norm(config.head_dim));
    HEADROOM_ASSIGN_OR_RETURN(weights.k_norm, drawer.Norm(config.head_dim));
  }
  HEADROOM_ASSIGN_OR_RETURN(weights.output, drawer.Matrix(config.hidden, q_width));
  HEADROOM_ASSIGN_OR_RETURN(weights.mlp_norm, drawer.Norm(config.hidden, one));
  if (config.post_norms) {
    HEADROOM_ASSIGN_OR_RETURN(weights.post_attention_norm, drawer.Norm(config.hidden, one));
    HEADROOM_ASSIGN_OR_RETURN(weights.post_mlp_norm, drawer.Norm(config.hidden, one));
  }
  HEADROOM_ASSIGN_OR_RETURN(weights.gate_up,
                            drawer.Matrix(2 * config.intermediate, config.hidden));
  HEADROOM_ASSIGN_OR_RETURN(weights.down, drawer.Matrix(config.hidden, config.intermediate));
  return weights;
}

std::array<uint8_t, 16> Fingerprint(const ModelConfig& config, uint64_t seed,
                                    const std::vector<float>& frequencies) {
  std::vector<double> numbers = {
      static_cast<double>(config.num_layers),   static_cast<double>(config.num_q_heads),
      static_cast<double>(config.num_kv_heads), static_cast<double>(config.head_dim),
      static_cast<double>(config.hidden),       static_cast<double>(config.intermediate),
      static_cast<double>(config.vocab),        static_cast<double>(config.tied_embeddings),
      static_cast<double>(config.qkv_bias),     static_cast<double>(config.qk_norm)};
  const std::vector<double> options = config.NumbersBehindKeys();
  numbers.insert(numbers.end(), options.begin(), options.end());
  numbers.insert(numbers.end(), frequencies.begin(), frequencies.end());
  XXH128_canonical_t canonical;
  XXH128_canonicalFromHash(
      &canonical, XXH3_128bits_withSeed(numbers.data(), numbers.size() * sizeof(double), seed));
  std::array<uint8_t, 16> bytes;
  std::copy(std::begin(canonical.digest), std::end(canonical.digest), bytes.begin());
  return bytes;
}

}  // namespace

absl::StatusOr<ModelWeights> DrawWeights(const ModelConfig& config, uint64_t seed, Device& device) {
  Drawer drawer(seed, device);
  ModelWeights weights;
  HEADROOM_ASSIGN_OR_RETURN(weights.embedding, drawer.Matrix(config.vocab, config.hidden));
  for (int32_t layer = 0; layer < config.num_layers; ++layer) {
    HEADROOM_ASSIGN_OR_RETURN(const LayerWeights drawn, DrawLayer(config, drawer));
    weights.layers.push_back(drawn);
  }
  HEADROOM_ASSIGN_OR_RETURN(weights.final_norm,
                            drawer.Norm(config.hidden, 1 - config.norm_weight_offset));
  weights.lm_head = weights.embedding;
  if (!config.tied_embeddings) {
    HEADROOM_ASSIGN_OR_RETURN(weights.lm_head, drawer.Matrix(config.vocab, config.hidden));
  }
  const std::vector<float> frequencies = config.InverseFrequencies();
  HEADROOM_ASSIGN_OR_RETURN(weights.inverse_frequency, drawer.Vector(frequencies));
  weights.fingerprint = Fingerprint(config, seed, frequencies);
  return weights;
}

}  // namespace headroom
