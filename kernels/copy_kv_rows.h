// Moves K and V rows between places: sealing (tail or chunk buffer to mapped extents), the same rows
// into resident copies, what is left of a chunk into the tail, the tail in front of a chunk.
#ifndef HEADROOM_KERNELS_COPY_KV_ROWS_H_
#define HEADROOM_KERNELS_COPY_KV_ROWS_H_

#include "kernels/types.h"

namespace headroom::kernels {

class CpuTeam;

// Copies `to.count` positions from `to.first_pos` on, heads [to.kv_head_begin, to.kv_head_end).
// REQUIRES: `from` covers those heads and positions.
struct CopyKvItem {
  KvSpan from;  // arena
  KvSpan to;    // arena, or a registered host range (an extent)
};

struct CopyKvRowsArgs {
  Table<CopyKvItem> items;
  int32_t head_dim = 0;
  // On a GPU, of its multiprocessors' work: 0, or the most blocks of threads that may copy at once. What
  // goes to host memory waits for PCIe, which 16 blocks keep busy, and should not fill the card with
  // blocks that wait; then long runs go by copy engines, which take no blocks at all.
  int32_t max_blocks = 0;
};

inline constexpr int32_t kHostCopyBlocks = 16;

// The part of `item.from` that is read.
inline KvSpan CopyKvSource(const CopyKvItem& item, int32_t head_dim) {
  KvSpan source = item.from;
  source.base += (item.to.kv_head_begin - item.from.kv_head_begin) * SpanHeadBytes(item.from, head_dim);
  source.kv_head_begin = item.to.kv_head_begin;
  source.kv_head_end = item.to.kv_head_end;
  source.first_pos = item.to.first_pos;
  source.count = item.to.count;
  return source;
}

template <typename F>
void ForEachRange(const CopyKvRowsArgs& a, F&& f) {
  f(a.items.device, a.items.count * static_cast<int64_t>(sizeof(CopyKvItem)), Access::kRead);
  for (int32_t i = 0; i < a.items.count; ++i) {
    const CopyKvItem& item = a.items.host[i];
    ForEachSpanRun(CopyKvSource(item, a.head_dim), a.head_dim,
                   [&](const void* p, int64_t bytes) { f(p, bytes, Access::kRead); });
    ForEachSpanRun(item.to, a.head_dim,
                   [&](const void* p, int64_t bytes) { f(p, bytes, Access::kWrite); });
  }
}

namespace cpu {
void CopyKvRows(const CopyKvRowsArgs& args, CpuTeam& team);
}
namespace reference {
void CopyKvRows(const CopyKvRowsArgs& args);
}

}  // namespace headroom::kernels

#endif  // HEADROOM_KERNELS_COPY_KV_ROWS_H_
