// The linear parts of a decoder-only transformer, enqueued on one stream: everything of a step but
// attention, which is where keys lie (step_layers.cc).
//
// The workspace holds what lives within one layer of one step; contexts share it, because they take
// turns on one stream. What outlives a layer is the caller's: the residual stream x.
#ifndef HEADROOM_SERVICES_WORKER_MODEL_DECODER_H_
#define HEADROOM_SERVICES_WORKER_MODEL_DECODER_H_

#include <cstdint>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/device/device.h"
#include "services/worker/device_budget.h"
#include "services/worker/model/model_config.h"
#include "services/worker/model/weights.h"

namespace headroom {

class Decoder {
 public:
  // Allocates the workspace for up to budget.max_chunk_tokens rows.
  static absl::StatusOr<Decoder> Create(Device& device, StreamId stream, const ModelConfig& config,
                                        const ModelWeights& weights, const DeviceBudget& budget);

  // x[rows, hidden] = embedding of the tokens; cos_sin[rows, head_dim] = their rotations.
  absl::Status Begin(const kernels::Table<kernels::EmbedRow>& tokens,
                     const kernels::Table<int64_t>& positions, float* x, float* cos_sin);
  // The rotations of a step's rows, and where a layer's keys and values go.
  struct NewKeys {
    const float* cos_sin = nullptr;  // [rows, head_dim]
    kernels::Table<kernels::AppendItem> items;
  };
  // Norm, q, k and v of one layer, rotation, append.
  absl::Status AttentionInput(int32_t layer, const float* x, int64_t rows, const NewKeys& keys);
  // The arguments of a layer's attention, but for items and spans: q, state and out.
  kernels::AttendArgs Attention(int32_t layer, int64_t rows) const;
  // x += output projection of the attention; x += MLP(x). With `next` also the next layer's AttentionInput():
  // a decode step's is then one kernel from one attention to the other.
  absl::Status LayerOutput(int32_t layer, float* x, int64_t rows, const NewKeys* next);
  // Final norm, logits and sampling of the rows of x that `row_index` names, result by result.
  absl::Status Sample(const float* x, int64_t x_rows, const kernels::Table<int32_t>& row_index,
                      const kernels::Table<kernels::SampleRow>& rows,
                      kernels::SampleResult* results);

  const ModelConfig& config() const { return config_; }
  int32_t* last_tokens() { return last_tokens_; }

  // The most sequences that may be open: slots of last_tokens.
  static constexpr int32_t kMaxSequences = 64;

 private:
  Decoder(Device& device, StreamId stream, const ModelConfig& config, const ModelWeights& weights)
      : device_(device), stream_(stream), config_(config), weights_(weights) {}

  class Chain;
  absl::Status AddInput(Chain& chain, int32_t layer, const float* x, int64_t rows, const NewKeys& keys);
  // x += a w, normalised first where there is a `post_norm`.
  absl::Status AddProduct(Chain& chain, kernels::Activations a, const kernels::PackedWeight& w,
                          const kernels::BFloat16* post_norm, float* x, int64_t rows);
  kernels::RmsNormArgs Norm(const float* x, const kernels::BFloat16* weight,
                            kernels::Activations out, int64_t rows) const;
  static kernels::GemmArgs Product(kernels::Activations a, const kernels::PackedWeight& w,
                                   kernels::Activations c, int64_t rows);

  Device& device_;
  const StreamId stream_;
  const ModelConfig& config_;
  const ModelWeights& weights_;

  int64_t mlp_slice_rows_ = 0;
  kernels::Activations normed_;      // [rows, hidden]
  float* qkv_ = nullptr;             // [rows, qkv_width]
  float* projected_ = nullptr;       // [rows, hidden], with post-norms
  kernels::Activations attention_;   // [rows, q heads * head_dim]
  float* attention_state_ = nullptr; // [rows, q heads, AttentionStateFloats]
  float* attend_scratch_ = nullptr;  // [attend_scratch_floats_], where the next two lie
  int64_t attend_scratch_floats_ = 0;
  kernels::Activations gate_up_;     // [mlp_slice_rows, 2 * intermediate]
  kernels::Activations activated_;   // [mlp_slice_rows, intermediate]
  float* logits_ = nullptr;          // [kLogitSliceRows, vocab]
  kernels::Activations sampled_;     // [kLogitSliceRows, hidden]
  float* sample_scratch_ = nullptr;  // [kSampleSliceRows, SampleScratchFloats]
  int32_t* last_tokens_ = nullptr;   // [kMaxSequences]
};

}  // namespace headroom

#endif  // HEADROOM_SERVICES_WORKER_MODEL_DECODER_H_
