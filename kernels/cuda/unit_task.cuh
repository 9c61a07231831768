// A unit's keys as a block of threads has them: where they lie, and the fold of what its warps make of them.
#ifndef HEADROOM_KERNELS_CUDA_UNIT_TASK_CUH_
#define HEADROOM_KERNELS_CUDA_UNIT_TASK_CUH_

#include "kernels/cuda/unit_window.cuh"
#include "kernels/cuda/warp_block.cuh"

namespace headroom::kernels::cuda::unit {

// U of one query and some columns: what an earlier launch has opened, if there is such, and then the
// partials of the unit's blocks, in order. Calls store(column, its o and the next one's), store_sums(m, l).
template <int kD, int kColumns, typename Store, typename StoreSums>
__device__ void FoldPartials(const Partials<kD>& partials, int query, int column, const float* opened,
                             Store&& store, StoreSums&& store_sums) {
  float m = opened != nullptr ? opened[kD] : -CUDART_INF_F;
  float l = opened != nullptr ? opened[kD + 1] : 0.0f;
  float o[kColumns];
#pragma unroll
  for (int i = 0; i < kColumns; ++i) o[i] = opened != nullptr ? opened[column + i] : 0.0f;
#pragma unroll
  for (int part = 0; part < kWarps; ++part) {
    const FoldWeights fold(m, l, partials.m[part][query], partials.l[part][query]);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) o[i] = fold(o[i], partials.o[part][query][column + i]);
    m = fold.m;
    l = fold.l;
  }
#pragma unroll
  for (int i = 0; i < kColumns; i += 2) store(column + i, make_float2(o[i], o[i + 1]));
  if (column == 0) store_sums(make_float2(m, l));
}

// Up to kQueries queries of a KV head, and one unit of the keys.
struct Task {
  bool exists;
  bool opened;  // an earlier launch has begun the unit
  int32_t kv_head;
  uint32_t of;      // a number that all units of the same queries have
  uint32_t query;   // the first
  uint32_t slot;    // of its first unit in the window; those of the others follow in steps of `units`
  uint32_t unit;    // in the window
  uint32_t units;
  AttendItem item;
  Keys keys[kWarps];
};

// Which of an item's it is.
struct TaskOfItem {
  uint32_t head, unit, tile;
};

// By one warp: the task of `item` that which(ItemUnits) says, which need not exist. No kernel of a step writes what
// it reads: tables are copied to the device before.
template <int kD, typename Which>
__device__ void LookUp(const AttendArgs& a, const UnitWindow& window, int32_t item, Which&& which,
                       Task& task) {
  const auto lane = static_cast<int32_t>(threadIdx.x) % kWarp;
  // The lanes have a span each: a long context has some forty. They do not wait for the item.
  KvSpan span = {};
  const int32_t first_span = window.first_span[item];
  if (first_span + lane < a.spans.count) span = a.spans.device[first_span + lane];
  constexpr auto kWords = static_cast<int32_t>(sizeof(AttendItem) / sizeof(uint32_t));
  static_assert(kWords <= kWarp && sizeof(AttendItem) % sizeof(uint32_t) == 0);
  if (lane < kWords) {
    reinterpret_cast<uint32_t*>(&task.item)[lane] =
        reinterpret_cast<const uint32_t*>(a.items.device + item)[lane];
  }
  __syncwarp();
  const Work work(a, task.item);
  const int32_t spans = task.item.span_count;
  if (lane >= spans) span = {};
  const int64_t begin_pos = __shfl_sync(kFullMask, span.first_pos, 0);
  int64_t end_pos = __shfl_sync(kFullMask, span.first_pos + span.count, (spans - 1) % kWarp);
  if (spans > kWarp) end_pos = work.end_pos();
  const ItemUnits its(window, task.item, work.group, begin_pos, end_pos);
  const auto [head, unit, tile] = which(its);
  const bool exists = head < its.heads && unit < its.count && tile < its.tiles();
  const uint32_t query = tile * kQueries;
  const auto kv_head =
      static_cast<int32_t>(task.item.kv_head_begin + window.first_head + static_cast<int32_t>(head));
  const auto begin_of_unit =
      static_cast<int32_t>((its.first_unit + window.first + unit) * kUnitTokens);
  const uint32_t last_query = min(query + kQueries, its.queries) - 1;
  const auto seen = static_cast<int32_t>(
      min(task.item.first_pos + last_query / static_cast<uint32_t>(work.group) + 1, end_pos));
  if (lane == 0) {
    task.exists = exists;
    task.opened = begin_pos > begin_of_unit && task.item.reset == 0;
    task.kv_head = kv_head;
    task.of = window.first_task[item] + head * its.count * its.tiles() + tile;
    task.query = query;
    task.slot = window.first_slot[item] + (head * its.queries + query) * its.count;
    task.unit = unit;
    task.units = its.count;
  }
  // Of each of the first lanes, a block of keys: which lane has the span that it is in.
  Keys keys = {nullptr, nullptr, begin_of_unit + lane * kBlock, 0};
  for (int32_t base = 0; base < spans; base += kWarp) {
    if (base > 0) span = base + lane < spans ? work.span(base + lane) : KvSpan();
    const auto first_pos = static_cast<int32_t>(span.first_pos);
    const int32_t span_end = first_pos + span.count;
    unsigned of = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
      const int32_t begin = begin_of_unit + warp * kBlock;
      const unsigned found = __ballot_sync(kFullMask, first_pos <= begin && begin < span_end);
      if (lane == warp) of = found;
    }
    const int from = of == 0 ? 0 : __ffs(static_cast<int>(of)) - 1;
    const auto base_of = reinterpret_cast<uint8_t*>(
        __shfl_sync(kFullMask, reinterpret_cast<unsigned long long>(span.base), from));
    const int32_t end = min(seen, __shfl_sync(kFullMask, span_end, from));
    const auto row = static_cast<uint32_t>(
        keys.pos - __shfl_sync(kFullMask, static_cast<int32_t>(span.origin_pos), from));
    const int32_t capacity = __shfl_sync(kFullMask, span.capacity, from);
    const int32_t first_head = __shfl_sync(kFullMask, span.kv_head_begin, from);
    if (of == 0 || keys.pos >= end) continue;
    const KvLayout layout{capacity, kD};
    const auto in_ring = static_cast<int64_t>(row % static_cast<uint32_t>(capacity));
    keys.rows = base_of + layout.KeyOffset(kv_head - first_head, in_ring);
    keys.value_rows = base_of + layout.ValueOffset(kv_head - first_head, in_ring);
    keys.count = min(end - keys.pos, kBlock);
  }
  if (lane < kWarps) task.keys[lane] = exists ? keys : Keys();
  __syncwarp();
}

}  // namespace headroom::kernels::cuda::unit

#endif  // HEADROOM_KERNELS_CUDA_UNIT_TASK_CUH_
