#include "services/headroom/bench/costs.h"

#include <algorithm>

#include "kernels/gemm.h"

namespace headroom {
namespace {

// Multiply-adds of a token in all layers' matrices.
double LayerMacs(const ModelConfig& config) {
  const double hidden = static_cast<double>(config.hidden);
  const double q_width = static_cast<double>(int64_t{config.num_q_heads} * config.head_dim);
  return config.num_layers * hidden *
         (static_cast<double>(config.qkv_width()) + q_width +
          3 * static_cast<double>(config.intermediate));
}

double VocabMacs(const ModelConfig& config) {
  return static_cast<double>(config.hidden) * static_cast<double>(config.vocab);
}

// FLOPs of one (query, key) pair in all heads and layers: q . k and the weighted sum of v.
double PairFlops(const ModelConfig& config) {
  return 4.0 * config.head_dim * config.num_q_heads * config.num_layers;
}

// Keys that a query at the end of `tokens` sees in a layer, averaged over the layers; windows end it.
double MeanSeen(const ModelConfig& config, double tokens) {
  double sum = 0;
  for (int32_t layer = 0; layer < config.num_layers; ++layer) {
    const auto window = static_cast<double>(config.window(layer));
    sum += window == 0 ? tokens : std::min(window, tokens);
  }
  return sum / config.num_layers;
}

// ... summed over all queries from the first on.
double MeanPairs(const ModelConfig& config, double tokens) {
  double sum = 0;
  for (int32_t layer = 0; layer < config.num_layers; ++layer) {
    const auto window = static_cast<double>(config.window(layer));
    const double growing = window == 0 ? tokens : std::min(window, tokens);
    sum += growing * (growing + 1) / 2 + (tokens - growing) * window;
  }
  return sum / config.num_layers;
}

double LayerWeightBytes(const ModelConfig& config) {
  const int64_t q_width = int64_t{config.num_q_heads} * config.head_dim;
  const int64_t norms = (config.post_norms ? 4 : 2) * config.hidden * static_cast<int64_t>(sizeof(kernels::BFloat16));
  return static_cast<double>(
      config.num_layers * (kernels::PackedWeightBytes(config.qkv_width(), config.hidden) +
                           kernels::PackedWeightBytes(config.hidden, q_width) +
                           kernels::PackedWeightBytes(2 * config.intermediate, config.hidden) +
                           kernels::PackedWeightBytes(config.hidden, config.intermediate) + norms));
}

double VocabWeightBytes(const ModelConfig& config) {
  return static_cast<double>(kernels::PackedWeightBytes(config.vocab, config.hidden));
}

}  // namespace

Ceilings Larger(const Ceilings& a, const Ceilings& b) {
  Ceilings larger;
  for (const CeilingField& field : kCeilingFields) {
    larger.*field.value = std::max(a.*field.value, b.*field.value);
  }
  return larger;
}

Costs PrefillCosts(const ModelConfig& config, int64_t context_tokens) {
  const double tokens = static_cast<double>(context_tokens);
  Costs costs;
  costs.linear_flops = 2 * (tokens * LayerMacs(config) + VocabMacs(config));
  costs.attention_flops = PairFlops(config) * MeanPairs(config, tokens);
  costs.weight_bytes = LayerWeightBytes(config) + VocabWeightBytes(config);
  costs.kv_bytes = tokens * static_cast<double>(config.kv_geometry().BytesPerToken());
  return costs;
}

Costs DecodeCosts(const ModelConfig& config, double context_tokens, int64_t batch) {
  const double rows = static_cast<double>(batch);
  Costs costs;
  costs.linear_flops = 2 * rows * (LayerMacs(config) + VocabMacs(config));
  costs.attention_flops = PairFlops(config) * rows * MeanSeen(config, context_tokens);
  costs.weight_bytes = LayerWeightBytes(config) + VocabWeightBytes(config);
  costs.kv_bytes = rows * MeanSeen(config, context_tokens) *
                   static_cast<double>(config.kv_geometry().BytesPerToken());
  return costs;
}

double PrefillFloorSeconds(const Costs& costs, const Ceilings& ceilings) {
  return costs.linear_flops / ceilings.gemm_flops +
         costs.attention_flops / ceilings.attention_flops;
}

double DecodeFloorSeconds(const Costs& costs, const Ceilings& ceilings) {
  const double weights = std::max(costs.weight_bytes / ceilings.read_bytes,
                                  costs.linear_flops / ceilings.gemm_flops);
  return weights + costs.kv_bytes / ceilings.read_bytes + costs.copied_bytes / ceilings.copy_bytes;
}

double GpuDecodeFloorSeconds(const Costs& costs, const Ceilings& ceilings) {
  const double weights = std::max(costs.weight_bytes / ceilings.read_bytes,
                                  costs.linear_flops / ceilings.gemm_flops);
  const double device =
      weights + (costs.kv_bytes - costs.in_place_bytes) / ceilings.read_bytes;
  double both = 0;
  if (ceilings.both_links_bytes > 0 && costs.copied_bytes > 0 && costs.in_place_bytes > 0) {
    both = (costs.copied_bytes + costs.in_place_bytes) /
           std::max({ceilings.both_links_bytes, ceilings.copy_bytes, ceilings.host_read_bytes});
  }
  return std::max({device, both, costs.copied_bytes / ceilings.copy_bytes,
                   costs.in_place_bytes / ceilings.host_read_bytes});
}

Spread SpreadOf(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const size_t half = values.size() / 2;
  const double median =
      values.size() % 2 == 1 ? values[half] : (values[half - 1] + values[half]) / 2;
  return {median, values.front(), values.back()};
}

double Percentile(const std::vector<double>& sorted, size_t percent) {
  return sorted[std::min(sorted.size() - 1, sorted.size() * percent / 100)];
}

}  // namespace headroom
