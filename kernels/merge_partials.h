// Takes in the attention states that another device has computed over keys of its own.
#ifndef HEADROOM_KERNELS_MERGE_PARTIALS_H_
#define HEADROOM_KERNELS_MERGE_PARTIALS_H_

#include "kernels/attention.h"
#include "kernels/types.h"

namespace headroom::kernels {

class CpuTeam;

// Rows whose states (kernels/attention.h: R and U of each row and query head) meet partial ones of the
// same shape.
// REQUIRES: items of one launch do not meet in a (row, kv_head).
struct MergeItem {
  int32_t row_begin = 0;  // rows [row_begin, row_begin + row_count) of the batch
  int32_t row_count = 0;
  int32_t kv_head_begin = 0;
  int32_t kv_head_end = 0;
  // 1: state = partial, to the bit, whatever the state was: attention goes on with the keys after the
  // partial's. 0: the partial's keys lie before the state's: R = fold(fold(partial R, partial U), R).
  int32_t reset = 0;
  int32_t finish = 0;  // 1: then write o / l of fold(R, U) to `out`
};

struct MergePartialsArgs {
  const float* partials = nullptr;  // [rows, num_q_heads, AttentionStateFloats]; may be host memory
  float* state = nullptr;           // [rows, num_q_heads, AttentionStateFloats]
  Activations out;                  // [rows, num_q_heads * head_dim]
  int64_t rows = 0;                 // of the whole batch
  Table<MergeItem> items;
  int32_t num_q_heads = 0;
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;  // 64, 128 or 256
};

template <typename F>
void ForEachRange(const MergePartialsArgs& a, F&& f) {
  constexpr int64_t kFloat = sizeof(float);
  const int64_t state_floats = AttentionStateFloats(a.head_dim);
  const int64_t group = a.num_q_heads / a.num_kv_heads;
  f(a.items.device, a.items.count * static_cast<int64_t>(sizeof(MergeItem)), Access::kRead);
  for (int32_t i = 0; i < a.items.count; ++i) {
    const MergeItem& item = a.items.host[i];
    const int64_t heads = (item.kv_head_end - item.kv_head_begin) * group;
    for (int64_t row = item.row_begin; row < item.row_begin + item.row_count; ++row) {
      const int64_t first = row * a.num_q_heads + item.kv_head_begin * group;
      f(a.partials + first * state_floats, heads * state_floats * kFloat, Access::kRead);
      f(a.state + first * state_floats, heads * state_floats * kFloat, Access::kReadWrite);
      if (item.finish == 0) continue;
      f((a.out + first * a.head_dim).data, a.out.Bytes(heads * a.head_dim), Access::kWrite);
    }
  }
}

namespace cpu {
void MergePartials(const MergePartialsArgs& args, CpuTeam& team);
}
namespace reference {
void MergePartials(const MergePartialsArgs& args);
}

}  // namespace headroom::kernels

#endif  // HEADROOM_KERNELS_MERGE_PARTIALS_H_
