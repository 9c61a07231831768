#include "services/worker/device_budget.h"

#include <algorithm>

#include "absl/strings/str_format.h"
#include "common/extent_limit.h"
#include "kernels/attention.h"
#include "kernels/copy_kv_rows.h"
#include "kernels/merge_partials.h"
#include "kernels/rope.h"
#include "kernels/sample.h"
#include "kernels/types.h"

namespace headroom {
namespace {

constexpr int64_t kFloat = sizeof(float);
constexpr int64_t kMiB = int64_t{1} << 20;
constexpr int64_t kMaxUnitScratchFloats = int64_t{4} << 20;
constexpr int64_t kAlignSlack = 64 * 256;  // what aligning a few dozen buffers may cost

// Sequences with extents of every size whose resident copies one step may list.
constexpr int64_t kTableSequences = 16;

// Tables of one step. Per layer: of each sequence and head an item and the spans of the small extents
// that it has grown through, and what it seals; the spans and tiles of the longest context.
int64_t TableBytes(const ModelConfig& config, int64_t rows, int64_t max_context_tokens) {
  constexpr int64_t kSpan = sizeof(kernels::KvSpan);
  constexpr int64_t kItem = sizeof(kernels::AttendItem) + 16;  // tables are aligned to 16 bytes
  constexpr int64_t kMove = sizeof(kernels::CopyKvItem);
  const int64_t heads = config.num_kv_heads;
  int64_t small_extents = 1;
  const int64_t full = MaxExtentTokens(config.kv_geometry(), config.windows);
  for (int64_t tokens = kBlockTokens; tokens < full; tokens *= 2) ++small_extents;
  constexpr int64_t kMerge = sizeof(kernels::MergeItem);
  const int64_t a_sequence = heads * (kItem + kMerge + (small_extents + 1) * kSpan) +
                             (heads + 2) * kMove + static_cast<int64_t>(sizeof(kernels::AppendItem));
  const int64_t full_extents = max_context_tokens / full + 1;
  const int64_t long_context = heads * full_extents * 2 * (kItem + kSpan);
  return (64 << 10) + 64 * rows +
         config.num_layers * (kTableSequences * a_sequence + long_context);
}

// On the CPU as little as the kernel works with; a GPU computes the units of the longest context side by
// side, up to 16 MiB of them: 128K tokens of Llama-3-8B; and chunks take what a library's kernel wants.
int64_t AttendScratchFloats(const ModelConfig& config, kernels::ElementType product_type,
                            int64_t rows, int64_t max_context_tokens) {
  if (product_type == kernels::ElementType::kFloat32) return kernels::kMinAttendScratchFloats;
  const int64_t units = max_context_tokens / kUnitTokens + 2;
  return std::max(std::clamp(units * config.num_q_heads * (config.head_dim + 2),
                             kernels::kMinAttendScratchFloats, kMaxUnitScratchFloats),
                  kernels::WideAttendScratchFloats(WideShapeOf(config, rows)));
}

}  // namespace

kernels::WideShape WideShapeOf(const ModelConfig& config, int64_t rows) {
  return {rows,
          config.num_q_heads,
          config.num_kv_heads,
          config.head_dim,
          config.attention_soft_cap,
          !config.windows.empty()};
}

int64_t WorkspaceBytes(const ModelConfig& config, int64_t rows, const DeviceBudget& budget) {
  const int64_t q_width = int64_t{config.num_q_heads} * config.head_dim;
  const int64_t row_floats = config.qkv_width() + (config.post_norms ? config.hidden : 0) +
                             config.num_q_heads *
                                                      kernels::AttentionStateFloats(config.head_dim);
  const int64_t logit_floats = kLogitSliceRows * config.vocab +
                               kSampleSliceRows * kernels::SampleScratchFloats(config.vocab);
  // What goes through products: normed rows, attention's result, sampled rows.
  const int64_t activations = rows * (config.hidden + q_width) + kLogitSliceRows * config.hidden;
  return (rows * row_floats + logit_floats) * kFloat + SharedScratchBytes(config, rows, budget) +
         activations * kernels::ElementBytes(budget.product_type) + kAlignSlack;
}

int64_t SharedScratchBytes(const ModelConfig& config, int64_t rows, const DeviceBudget& budget) {
  return std::max(budget.attend_scratch_floats * kFloat,
                  std::min(rows, budget.mlp_slice_rows) * 3 * config.intermediate *
                      kernels::ElementBytes(budget.product_type));
}

int64_t ContextBytes(const ModelConfig& config, int64_t rows) {
  return rows * (config.hidden + config.head_dim) * kFloat +
         kStepsInFlight * kMaxResults * static_cast<int64_t>(sizeof(kernels::SampleResult)) +
         kAlignSlack;
}

int64_t ChunkBufferBytes(const ModelConfig& config, int64_t rows) {
  return 2 * (rows + kTailTokens) * config.kv_geometry().BytesPerTokenPerLayer();
}

absl::StatusOr<DeviceBudget> DivideBudget(const ModelConfig& config, int64_t weights_bytes,
                                          int64_t budget_bytes, int64_t chunk_limit,
                                          int64_t max_context_tokens,
                                          kernels::ElementType product_type) {
  const KvGeometry geometry = config.kv_geometry();
  DeviceBudget budget;
  budget.budget_bytes = budget_bytes;
  budget.weights_bytes = weights_bytes;
  budget.product_type = product_type;
  budget.max_context_tokens = max_context_tokens;
  budget.tail_bytes_per_sequence = kTailTokens * geometry.BytesPerToken();
  const int64_t granule_bytes = kBlockTokens * geometry.BytesPerTokenPerHead();
  budget.draw_state_bytes = (kernels::DrawStateBytes(config.vocab) + granule_bytes - 1) /
                            granule_bytes * granule_bytes;
  const int64_t rest = std::max<int64_t>(budget_bytes, 0) - weights_bytes;
  budget.mlp_slice_rows = kMinChunkTokens;
  while (budget.mlp_slice_rows < kMaxMlpSliceRows &&
         2 * budget.mlp_slice_rows * 3 * config.intermediate * kFloat <= rest / 16) {
    budget.mlp_slice_rows *= 2;
  }
  const auto activations = [&](int64_t chunk) {
    budget.attend_scratch_floats =
        AttendScratchFloats(config, product_type, chunk, max_context_tokens);
    const int64_t tables = TableBytes(config, chunk, max_context_tokens);
    return WorkspaceBytes(config, chunk, budget) + ContextBytes(config, chunk) +
           ContextBytes(config, kMaxDecodeRows) + ChunkBufferBytes(config, chunk) +
           kNumContexts * kStepsInFlight * tables;
  };
  // A tile holds at least one head of a full-size extent, a partition two tiles.
  const int64_t least_tile = geometry.MaxExtentTokens() * geometry.BytesPerTokenPerHead();
  const int64_t least_ring = kNumContexts * 2 * least_tile;
  const int64_t least_beside =
      activations(kMinChunkTokens) + budget.tail_bytes_per_sequence;
  if (rest < least_ring + least_beside) {
    const auto mib = [](int64_t bytes) { return (bytes + kMiB - 1) / kMiB; };
    return absl::ResourceExhaustedError(absl::StrFormat(
        "--gpu-memory %d MiB is too small: this model needs at least %d MiB (weights %d, staging "
        "ring %d, activations %d, tail of one sequence %d MiB)",
        budget_bytes / kMiB, mib(weights_bytes + least_ring + least_beside), mib(weights_bytes),
        mib(least_ring), mib(activations(kMinChunkTokens)), mib(budget.tail_bytes_per_sequence)));
  }
  budget.max_chunk_tokens = kMinChunkTokens;
  while (2 * budget.max_chunk_tokens <= std::min(chunk_limit, kMaxChunkTokens) &&
         activations(2 * budget.max_chunk_tokens) <=
             std::min(rest / 3, rest - least_ring - budget.tail_bytes_per_sequence)) {
    budget.max_chunk_tokens *= 2;
  }
  budget.table_bytes = TableBytes(config, budget.max_chunk_tokens, max_context_tokens);
  budget.activation_bytes = activations(budget.max_chunk_tokens);
  const int64_t most_ring =
      rest - budget.activation_bytes - budget.tail_bytes_per_sequence;
  budget.ring_bytes =
      std::max(least_ring, std::min({kMaxRingBytes, rest / 4, most_ring})) / 4096 * 4096;
  budget.max_tile_bytes = budget.ring_bytes / kNumContexts / 2;
  budget.kv_pool_bytes = rest - budget.ring_bytes - budget.activation_bytes;
  return budget;
}

}  // namespace headroom
