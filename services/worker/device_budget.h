// How one budget of device memory is divided. Pure numbers.
#ifndef HEADROOM_SERVICES_WORKER_DEVICE_BUDGET_H_
#define HEADROOM_SERVICES_WORKER_DEVICE_BUDGET_H_

#include <cstdint>

#include "absl/status/statusor.h"
#include "kernels/types.h"
#include "kernels/wide_shape.h"
#include "services/worker/model/model_config.h"

namespace headroom {

inline constexpr int64_t kMaxRingBytes = int64_t{512} << 20;
inline constexpr int64_t kMaxChunkTokens = 8192;
inline constexpr int64_t kMinChunkTokens = 64;
inline constexpr int64_t kMaxDecodeRows = 64;
// Rows of one pass through the MLP, at most: what bounds its buffers.
inline constexpr int64_t kMaxMlpSliceRows = 4096;
// Rows of one pass through the vocabulary, and of one launch of the sampler.
inline constexpr int64_t kLogitSliceRows = 16;
inline constexpr int64_t kSampleSliceRows = 4;
// Log-probabilities and drawn tokens that one step may report.
inline constexpr int64_t kMaxResults = 1024;
// Contexts that run side by side: prefill and decode; steps of one context in flight.
inline constexpr int kNumContexts = 2;
inline constexpr int kStepsInFlight = 2;

struct DeviceBudget {
  int64_t budget_bytes = 0;
  int64_t weights_bytes = 0;
  int64_t ring_bytes = 0;        // both contexts' partitions
  int64_t max_tile_bytes = 0;    // half a partition
  int64_t activation_bytes = 0;  // workspace, contexts, tables, results
  int64_t table_bytes = 0;       // of that: the tables of one step
  int64_t kv_pool_bytes = 0;     // tails and resident copies
  int64_t tail_bytes_per_sequence = 0;
  int64_t draw_state_bytes = 0;  // of the pool, for each sequence whose draws have a history
  int64_t max_chunk_tokens = 0;
  int64_t max_context_tokens = 0;  // that tables are made for
  int64_t mlp_slice_rows = 0;
  int64_t attend_scratch_floats = 0;
  kernels::ElementType product_type = kernels::ElementType::kFloat32;
};

// The attention of chunks of `rows` tokens.
kernels::WideShape WideShapeOf(const ModelConfig& config, int64_t rows);

// Buffers that live within one layer of one step, shared by the contexts: they take turns at layer
// borders on one stream. Uses of `budget`: mlp_slice_rows, attend_scratch_floats, product_type.
int64_t WorkspaceBytes(const ModelConfig& config, int64_t rows, const DeviceBudget& budget);
// Of it: attention's scratch, in the place of which the MLP's two buffers come after it.
int64_t SharedScratchBytes(const ModelConfig& config, int64_t rows, const DeviceBudget& budget);
// What one context keeps over a step: residual stream, RoPE table, results; without tables.
int64_t ContextBytes(const ModelConfig& config, int64_t rows);
// The chunk buffers (two, used by turns) for chunks of `rows` tokens.
int64_t ChunkBufferBytes(const ModelConfig& config, int64_t rows);

// Divides `budget_bytes`: weights; ring = the smaller of 512 MiB and a quarter of the rest, at least
// two tiles a context; activations = the largest chunk (a power of two, 64 to `chunk_limit`) that
// takes at most a third of the rest; the KV pool is what remains and holds at least one tail.
// `product_type` is the device's. RESOURCE_EXHAUSTED says what the least budget would be.
absl::StatusOr<DeviceBudget> DivideBudget(const ModelConfig& config, int64_t weights_bytes,
                                          int64_t budget_bytes, int64_t chunk_limit,
                                          int64_t max_context_tokens,
                                          kernels::ElementType product_type =
                                              kernels::ElementType::kFloat32);

}  // namespace headroom

#endif  // HEADROOM_SERVICES_WORKER_DEVICE_BUDGET_H_
