#include "services/worker/model/decoder.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/log.h"
#include "common/status.h"

namespace headroom {
namespace {

// `count` entries of `table` from `begin` on.
template <typename T>
kernels::Table<T> Slice(const kernels::Table<T>& table, int64_t begin, int64_t count) {
  return {table.device + begin, table.host + begin, static_cast<int32_t>(count)};
}

}  // namespace

absl::StatusOr<Decoder> Decoder::Create(Device& device, StreamId stream, const ModelConfig& config,
                                        const ModelWeights& weights, const DeviceBudget& budget) {
  Decoder decoder(device, stream, config, weights);
  const int64_t rows = std::max(budget.max_chunk_tokens, kMaxDecodeRows);
  const int64_t q_width = int64_t{config.num_q_heads} * config.head_dim;
  decoder.mlp_slice_rows_ = std::min(rows, budget.mlp_slice_rows);
  decoder.attend_scratch_floats_ = budget.attend_scratch_floats;
  const struct {
    float** buffer;
    int64_t floats;
  } float_buffers[] = {
      {&decoder.qkv_, rows * config.qkv_width()},
      {&decoder.projected_, config.post_norms ? rows * config.hidden : 0},
      {&decoder.attention_state_,
       rows * config.num_q_heads * kernels::AttentionStateFloats(config.head_dim)},
      {&decoder.logits_, kLogitSliceRows * config.vocab},
      {&decoder.sample_scratch_, kSampleSliceRows * kernels::SampleScratchFloats(config.vocab)},
  };
  for (const auto& [buffer, floats] : float_buffers) {
    if (floats == 0) continue;
    HEADROOM_ASSIGN_OR_RETURN(
        uint8_t* const data,
        device.Allocate(floats * static_cast<int64_t>(sizeof(float)), "activations"));
    *buffer = reinterpret_cast<float*>(data);
  }
  const struct {
    kernels::Activations* buffer;
    int64_t elements;
  } buffers[] = {
      {&decoder.normed_, rows * config.hidden},
      {&decoder.attention_, rows * q_width},
      {&decoder.sampled_, kLogitSliceRows * config.hidden},
  };
  const kernels::ElementType type = device.product_type();
  for (const auto& [buffer, elements] : buffers) {
    HEADROOM_ASSIGN_OR_RETURN(
        uint8_t* const data,
        device.Allocate(elements * kernels::ElementBytes(type), "activations"));
    *buffer = {data, type};
  }
  HEADROOM_ASSIGN_OR_RETURN(
      uint8_t* const shared,
      device.Allocate(SharedScratchBytes(config, rows, budget), "activations"));
  decoder.attend_scratch_ = reinterpret_cast<float*>(shared);
  decoder.gate_up_ = {shared, type};
  decoder.activated_ =
      decoder.gate_up_ + decoder.mlp_slice_rows_ * 2 * int64_t{config.intermediate};
  // What cannot be had is done by the kernels that take any number of rows.
  if (type != kernels::ElementType::kFloat32) {
    const absl::Status wide =
        device.PrepareWideAttend(WideShapeOf(config, budget.max_chunk_tokens),
                                 decoder.attend_scratch_, decoder.attend_scratch_floats_);
    if (!wide.ok()) LogWarning(absl::StrCat("prefill runs without cuDNN: ", wide.message()));
  }
  HEADROOM_ASSIGN_OR_RETURN(
      uint8_t* const tokens,
      device.Allocate(kMaxSequences * static_cast<int64_t>(sizeof(int32_t)), "activations"));
  decoder.last_tokens_ = reinterpret_cast<int32_t*>(tokens);
  return decoder;
}

absl::Status Decoder::Begin(const kernels::Table<kernels::EmbedRow>& tokens,
                            const kernels::Table<int64_t>& positions, float* x, float* cos_sin) {
  kernels::EmbedArgs embed;
  embed.table = weights_.embedding;
  embed.rows = tokens;
  embed.last_tokens = last_tokens_;
  embed.num_slots = kMaxSequences;
  embed.out = x;
  embed.scale = config_.embedding_scale;
  HEADROOM_RETURN_IF_ERROR(device_.Embed(stream_, embed));
  kernels::RopeTableArgs rope;
  rope.positions = positions;
  rope.inverse_frequency = weights_.inverse_frequency;
  rope.cos_sin = cos_sin;
  rope.head_dim = config_.head_dim;
  return device_.RopeTable(stream_, rope);
}

// Operations in order, a chain of which goes to the device when there are as many as that.
class Decoder::Chain {
 public:
  Chain(Device& device, StreamId stream) : device_(device), stream_(stream) {}
  absl::Status Add(const kernels::ChainOp& op) {
    if (count_ == kMost) HEADROOM_RETURN_IF_ERROR(Enqueue());
    ops_[count_++] = op;
    return absl::OkStatus();
  }
  absl::Status Enqueue() {
    const auto ops = absl::MakeConstSpan(ops_, static_cast<size_t>(std::exchange(count_, 0)));
    return device_.Chain(stream_, ops);
  }

 private:
  static constexpr int kMost = 12;
  Device& device_;
  const StreamId stream_;
  kernels::ChainOp ops_[kMost];
  int count_ = 0;
};

absl::Status Decoder::AttentionInput(int32_t layer, const float* x, int64_t rows,
                                     const NewKeys& keys) {
  Chain chain(device_, stream_);
  HEADROOM_RETURN_IF_ERROR(AddInput(chain, layer, x, rows, keys));
  return chain.Enqueue();
}

absl::Status Decoder::AddInput(Chain& chain, int32_t layer, const float* x, int64_t rows,
                               const NewKeys& keys) {
  const LayerWeights& w = weights_.layers[layer];
  kernels::RopeAppendArgs rope;
  rope.qkv = qkv_;
  rope.bias = w.qkv_bias;
  rope.q_norm = w.q_norm;
  rope.k_norm = w.k_norm;
  rope.norm_epsilon = static_cast<float>(config_.rms_norm_epsilon);
  rope.cos_sin = keys.cos_sin;
  rope.items = keys.items;
  rope.rows = rows;
  rope.num_q_heads = config_.num_q_heads;
  rope.num_kv_heads = config_.num_kv_heads;
  rope.head_dim = config_.head_dim;
  HEADROOM_RETURN_IF_ERROR(chain.Add(Norm(x, w.attention_norm, normed_, rows)));
  HEADROOM_RETURN_IF_ERROR(chain.Add(Product(normed_, w.qkv, qkv_, rows)));
  return chain.Add(rope);
}

kernels::AttendArgs Decoder::Attention(int32_t layer, int64_t rows) const {
  kernels::AttendArgs attend;
  attend.q = qkv_;
  attend.q_stride = config_.qkv_width();
  attend.state = attention_state_;
  attend.out = attention_;
  attend.rows = rows;
  attend.scratch = attend_scratch_;
  attend.scratch_floats = attend_scratch_floats_;
  attend.scale = config_.attention_scale();
  attend.soft_cap = config_.attention_soft_cap;
  attend.window = config_.window(layer);
  attend.num_q_heads = config_.num_q_heads;
  attend.num_kv_heads = config_.num_kv_heads;
  attend.head_dim = config_.head_dim;
  return attend;
}

absl::Status Decoder::LayerOutput(int32_t layer, float* x, int64_t rows, const NewKeys* next) {
  const LayerWeights& w = weights_.layers[layer];
  Chain chain(device_, stream_);
  HEADROOM_RETURN_IF_ERROR(
      AddProduct(chain, attention_, w.output, w.post_attention_norm, x, rows));
  HEADROOM_RETURN_IF_ERROR(chain.Add(Norm(x, w.mlp_norm, normed_, rows)));
  for (int64_t row = 0; row < rows; row += mlp_slice_rows_) {
    const int64_t count = std::min(mlp_slice_rows_, rows - row);
    kernels::GatedGemmArgs gated;
    gated.gemm = Product(normed_ + row * config_.hidden, w.gate_up, gate_up_, count);
    gated.swiglu.gate_up = gate_up_;
    gated.swiglu.out = activated_;
    gated.swiglu.rows = count;
    gated.swiglu.width = config_.intermediate;
    gated.swiglu.activation = config_.activation;
    HEADROOM_RETURN_IF_ERROR(chain.Add(gated));
    HEADROOM_RETURN_IF_ERROR(AddProduct(chain, activated_, w.down, w.post_mlp_norm,
                                        x + row * config_.hidden, count));
  }
  if (next != nullptr) HEADROOM_RETURN_IF_ERROR(AddInput(chain, layer + 1, x, rows, *next));
  return chain.Enqueue();
}

absl::Status Decoder::Sample(const float* x, int64_t x_rows,
                             const kernels::Table<int32_t>& row_index,
                             const kernels::Table<kernels::SampleRow>& rows,
                             kernels::SampleResult* results) {
  for (int64_t begin = 0; begin < rows.count; begin += kLogitSliceRows) {
    const int64_t count = std::min<int64_t>(kLogitSliceRows, rows.count - begin);
    kernels::RmsNormArgs norm = Norm(x, weights_.final_norm, sampled_, count);
    norm.x_rows = x_rows;
    norm.row_index = Slice(row_index, begin, count);
    Chain chain(device_, stream_);
    HEADROOM_RETURN_IF_ERROR(chain.Add(norm));
    HEADROOM_RETURN_IF_ERROR(chain.Add(Product(sampled_, weights_.lm_head, logits_, count)));
    HEADROOM_RETURN_IF_ERROR(chain.Enqueue());
    if (config_.logit_soft_cap != 0) {
      HEADROOM_RETURN_IF_ERROR(device_.SoftCap(
          stream_, {logits_, count, config_.vocab, config_.logit_soft_cap}));
    }
    for (int64_t at = 0; at < count; at += kSampleSliceRows) {
      kernels::SampleArgs sample;
      sample.logits = logits_ + at * config_.vocab;
      sample.rows = Slice(rows, begin + at, std::min(kSampleSliceRows, count - at));
      sample.results = results;
      sample.num_results = kMaxResults;
      sample.last_tokens = last_tokens_;
      sample.num_slots = kMaxSequences;
      sample.vocab = config_.vocab;
      sample.scratch = sample_scratch_;
      HEADROOM_RETURN_IF_ERROR(device_.Sample(stream_, sample));
    }
  }
  return absl::OkStatus();
}

absl::Status Decoder::AddProduct(Chain& chain, kernels::Activations a,
                                 const kernels::PackedWeight& w,
                                 const kernels::BFloat16* post_norm, float* x, int64_t rows) {
  if (post_norm == nullptr) {
    kernels::GemmArgs product = Product(a, w, x, rows);
    product.accumulate = true;
    return chain.Add(product);
  }
  HEADROOM_RETURN_IF_ERROR(chain.Add(Product(a, w, projected_, rows)));
  kernels::RmsNormArgs norm = Norm(projected_, post_norm, x, rows);
  norm.accumulate = true;
  return chain.Add(norm);
}

kernels::RmsNormArgs Decoder::Norm(const float* x, const kernels::BFloat16* weight,
                                   kernels::Activations out, int64_t rows) const {
  kernels::RmsNormArgs norm;
  norm.x = x;
  norm.x_rows = rows;
  norm.weight = weight;
  norm.out = out;
  norm.rows = rows;
  norm.hidden = config_.hidden;
  norm.epsilon = static_cast<float>(config_.rms_norm_epsilon);
  norm.weight_offset = config_.norm_weight_offset;
  return norm;
}

kernels::GemmArgs Decoder::Product(kernels::Activations a, const kernels::PackedWeight& w,
                                   kernels::Activations c, int64_t rows) {
  kernels::GemmArgs gemm;
  gemm.a = a;
  gemm.a_stride = w.k;
  gemm.w = w;
  gemm.c = c;
  gemm.c_stride = w.n;
  gemm.m = rows;
  return gemm;
}

}  // namespace headroom
