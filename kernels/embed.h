// Token embedding: out[row] = table[id of row] * scale.
#ifndef HEADROOM_KERNELS_EMBED_H_
#define HEADROOM_KERNELS_EMBED_H_

#include "kernels/gemm.h"
#include "kernels/types.h"

namespace headroom::kernels {

class CpuTeam;

// Where a row's token comes from. Decode step n+1 is enqueued before step n has sampled: its id is
// read from `last_tokens` when the kernel runs.
struct EmbedRow {
  int32_t token_id = 0;  // used if >= 0
  int32_t slot = 0;      // else last_tokens[slot]
};

struct EmbedArgs {
  PackedWeight table;  // [vocab, hidden]
  Table<EmbedRow> rows;
  const int32_t* last_tokens = nullptr;  // [slots]
  int32_t num_slots = 0;
  float* out = nullptr;  // [rows.count, hidden]
  float scale = 1;
};

template <typename F>
void ForEachRange(const EmbedArgs& a, F&& f) {
  f(a.table.data, PackedWeightBytes(a.table.n, a.table.k), Access::kRead);
  f(a.rows.device, a.rows.count * sizeof(EmbedRow), Access::kRead);
  f(a.last_tokens, a.num_slots * sizeof(int32_t), Access::kRead);
  f(a.out, int64_t{a.rows.count} * a.table.k * sizeof(float), Access::kWrite);
}

namespace cpu {
void Embed(const EmbedArgs& args, CpuTeam& team);
}
namespace reference {
void Embed(const EmbedArgs& args);
}

}  // namespace headroom::kernels

#endif  // HEADROOM_KERNELS_EMBED_H_
