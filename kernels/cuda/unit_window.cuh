// What unit_attention.cu leaves in scratch for unit_fold.cu, and where.
#ifndef HEADROOM_KERNELS_CUDA_UNIT_WINDOW_CUH_
#define HEADROOM_KERNELS_CUDA_UNIT_WINDOW_CUH_

#include "kernels/cuda/attention_parts.cuh"

namespace headroom::kernels::cuda::unit {

inline constexpr int kQueries = 8;  // of a KV head, that one reading of a unit's keys serves

// Items of a launch: what is known of each goes with its parameters.
inline constexpr int kMostItems = 256;
inline constexpr int64_t kMostUnits = int64_t{1} << 31;

// What the units [first, first + count) of every item leave in scratch, for the fold: o of all queries'
// units, a query's one behind the other, and then m and l of each, likewise. A task, for which
// a ticket stands, is a unit of up to kQueries queries of a KV head; tasks count by item, head, unit, queries.
struct UnitWindow {
  int64_t first;  // counted from the unit of the item's first key
  int64_t count;
  int32_t first_head;  // of each item
  int32_t heads;       // from that one on, of the item that has the most
  int32_t queries;     // likewise of the item that has the most
  uint32_t slots;      // of all items
  uint32_t tasks;
  uint32_t first_task[kMostItems];
  uint32_t first_slot[kMostItems];
  int32_t first_span[kMostItems];
};

// An item's part of a window, the same for host and device.
struct ItemUnits {
  int64_t first_unit;  // of the item's first key
  int64_t units;       // from that one on
  uint32_t count;      // of them in the window
  uint32_t heads;      // in the window
  uint32_t queries;

  HEADROOM_HOST_DEVICE ItemUnits(const UnitWindow& window, const AttendItem& item, int32_t group,
                                 int64_t begin_pos, int64_t end_pos)
      : first_unit(begin_pos / kUnitTokens), units(0), count(0), heads(0), queries(0) {
    if (!GoesByUnits(item, group)) return;
    if (item.span_count > 0) units = (end_pos + kUnitTokens - 1) / kUnitTokens - first_unit;
    const int64_t behind = units - window.first;
    count = static_cast<uint32_t>(behind < 0 ? 0 : behind < window.count ? behind : window.count);
    const int32_t its = item.kv_head_end - item.kv_head_begin - window.first_head;
    heads = static_cast<uint32_t>(its < 0 ? 0 : its < window.heads ? its : window.heads);
    queries = static_cast<uint32_t>(item.row_count * group);
  }
  HEADROOM_HOST_DEVICE uint32_t tiles() const { return (queries + kQueries - 1) / kQueries; }
  HEADROOM_HOST_DEVICE uint32_t tasks() const { return heads * count * tiles(); }
  HEADROOM_HOST_DEVICE uint32_t slots() const { return heads * queries * count; }
};

// Where the partials of a query's units lie: 32 columns of all units, the next 32, ...; and m and l of each.
template <int kD>
struct QueryPartials {
  float* o;
  float2* m_and_l;
  uint32_t units;
  // `slot` is that of the query's first unit in the window.
  __device__ QueryPartials(const AttendArgs& a, const UnitWindow& window, uint32_t slot, uint32_t count)
      : o(a.scratch + int64_t{slot} * kD),
        m_and_l(reinterpret_cast<float2*>(a.scratch + int64_t{window.slots} * kD) + slot),
        units(count) {}
  __device__ float* Of(uint32_t unit, int column) const {
    return o + (int64_t{static_cast<uint32_t>(column) / kWarp} * units + unit) * kWarp + column % kWarp;
  }
};

// Folds the window's units into the states, or results, of the items, of which the one that has the most has
// `units`. `whole`: no item has other launches than this one.
cudaError_t LaunchUnitFold(const AttendArgs& a, const UnitWindow& window, int64_t units, bool whole,
                           cudaStream_t stream);
cudaError_t LoadUnitFold();

// Likewise all of the attention, without scratch. REQUIRES: IsShort(), which looks at sizes alone; every item has a unit
// at least and no other launches than this one.
bool IsShort(const AttendArgs& a, const UnitWindow& window, int64_t units);
cudaError_t LaunchShortAttend(const AttendArgs& a, const UnitWindow& window, int64_t units,
                              cudaStream_t stream);
cudaError_t LoadShortAttend();

}  // namespace headroom::kernels::cuda::unit

#endif  // HEADROOM_KERNELS_CUDA_UNIT_WINDOW_CUH_
