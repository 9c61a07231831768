// Rotary position embedding (Su et al., arXiv 2104.09864, in the rotate-half form of Hugging Face's
// Llama), and the append of the new keys and values to the tail or the chunk buffer.
//
// Pair i of a head, (x[i], x[i + d/2]), turns by the angle pos * inverse_frequency[i]. The angle is
// formed in float32 as Hugging Face forms it; its cosine and sine are computed in float64 from that
// float32 angle and rounded, so that they do not depend on a vector library.
#ifndef HEADROOM_KERNELS_ROPE_H_
#define HEADROOM_KERNELS_ROPE_H_

#include "kernels/types.h"

namespace headroom::kernels {

class CpuTeam;

// cos_sin[row] = [cos: d/2][sin: d/2] for each row's position; once a step, for all layers.
struct RopeTableArgs {
  Table<int64_t> positions;                  // [rows]
  const float* inverse_frequency = nullptr;  // [head_dim / 2]
  float* cos_sin = nullptr;                  // [rows, head_dim]
  int32_t head_dim = 0;
};

template <typename F>
void ForEachRange(const RopeTableArgs& a, F&& f) {
  f(a.positions.device, a.positions.count * static_cast<int64_t>(sizeof(int64_t)), Access::kRead);
  f(a.inverse_frequency, a.head_dim / 2 * static_cast<int64_t>(sizeof(float)), Access::kRead);
  f(a.cos_sin, int64_t{a.positions.count} * a.head_dim * static_cast<int64_t>(sizeof(float)),
    Access::kWrite);
}

// New rows of one sequence: rows [row_begin, row_begin + target.count) of the batch are its
// positions [target.first_pos, target.first_pos + target.count), whose K and V go to `target`
// (all KV heads).
struct AppendItem {
  int32_t row_begin = 0;
  KvSpan target;
};

// Adds a bias to q, k and v and normalises each head of q and k, where there are such weights, in place;
// then rotates q in place and k into the target, copies v to the target; both rounded to bfloat16.
struct RopeAppendArgs {
  float* qkv = nullptr;  // [rows, (num_q_heads + 2 num_kv_heads) * head_dim]: q heads, k heads, v heads
  const BFloat16* bias = nullptr;    // of a row of qkv; null: none
  const BFloat16* q_norm = nullptr;  // [head_dim], of kernels/rms_norm.h over one head; null: none
  const BFloat16* k_norm = nullptr;  // likewise; both or neither
  float norm_epsilon = 0;
  const float* cos_sin = nullptr;  // [rows, head_dim]
  Table<AppendItem> items;
  int64_t rows = 0;
  int32_t num_q_heads = 0;
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;
};

template <typename F>
void ForEachRange(const RopeAppendArgs& a, F&& f) {
  const int64_t width = int64_t{a.num_q_heads + 2 * a.num_kv_heads} * a.head_dim;
  f(a.qkv, a.rows * width * static_cast<int64_t>(sizeof(float)), Access::kReadWrite);
  const auto weights = [&f](const BFloat16* data, int64_t count) {
    if (data != nullptr) f(data, count * static_cast<int64_t>(sizeof(BFloat16)), Access::kRead);
  };
  weights(a.bias, width);
  weights(a.q_norm, a.head_dim);
  weights(a.k_norm, a.head_dim);
  f(a.cos_sin, a.rows * a.head_dim * static_cast<int64_t>(sizeof(float)), Access::kRead);
  f(a.items.device, a.items.count * static_cast<int64_t>(sizeof(AppendItem)), Access::kRead);
  for (int32_t i = 0; i < a.items.count; ++i) {
    ForEachSpanRun(a.items.host[i].target, a.head_dim,
                   [&](const void* p, int64_t bytes) { f(p, bytes, Access::kWrite); });
  }
}

namespace cpu {
void RopeTable(const RopeTableArgs& args, CpuTeam& team);
void RopeAppend(const RopeAppendArgs& args, CpuTeam& team);
}  // namespace cpu
namespace reference {
void RopeTable(const RopeTableArgs& args);
void RopeAppend(const RopeAppendArgs& args);
}  // namespace reference

}  // namespace headroom::kernels

#endif  // HEADROOM_KERNELS_ROPE_H_
