// Attention of few queries over many keys: a decode step's. Its time is that of reading the keys.
//
// Units of kUnitTokens keys are computed side by side into scratch, and folded in order by a second kernel;
// attention.h states the fold. Blocks of threads take units by turns, so that those which are read at one
// time lie side by side: 142 us of an H200 for 128K tokens of Llama-3-8B, where blocks of eight units in
// a row took 145. Each of the four warps takes one block of 64 keys alone (warp_block.cuh); U is the fold
// of the blocks, in order. (On the CPU blocks go on from each other by online softmax: the same but for
// rounding.)
#include "kernels/cuda/attention_parts.cuh"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/warp_block.cuh"

namespace headroom::kernels::cuda {
namespace {

using namespace unit;  // NOLINT: its other half

// What the units [first, first + count) of every item leave in scratch, for FoldKernel: o of each query
// and unit, a query's units one behind the other, and then m and l of each, likewise.
struct UnitWindow {
  int64_t first;  // counted from the unit of the item's first key
  int64_t count;
  int64_t parts;       // blocks of threads that share the window: each takes every parts-th unit
  int64_t first_head;  // of each item
  int64_t heads;       // from that one on, of the item that has the most
  int64_t queries;     // likewise of the item that has the most
  int64_t slots;       // of all items
  __device__ int64_t Slot(int64_t item, int64_t unit, int64_t head, int64_t query) const {
    return ((item * heads + head) * queries + query) * count + unit;
  }
};

// Where a slot's partial lies.
template <int kD>
struct Partial {
  float* o;
  float2* m_and_l;
  __device__ Partial(const AttendArgs& a, const UnitWindow& window, int64_t slot)
      : o(a.scratch + slot * kD),
        m_and_l(reinterpret_cast<float2*>(a.scratch + window.slots * kD) + slot) {}
};

// U of one query and some columns: what an earlier launch has opened, if there is such, and then the
// partials of the unit's blocks, in order. To `to`.
template <int kD, int kColumns>
__device__ void FoldPartials(const Partials<kD>& partials, int query, int column, const float* opened,
                             const Partial<kD>& to) {
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
  for (int i = 0; i < kColumns; i += 2) {
    *reinterpret_cast<float2*>(to.o + column + i) = make_float2(o[i], o[i + 1]);
  }
  if (column == 0) *to.m_and_l = make_float2(m, l);
}

// Block (some units of the window, head and queries; item = blockIdx.y).
template <int kD>
__global__ void __launch_bounds__(kThreads, kD <= 128 ? 2 : 1)
    UnitKernel(const __grid_constant__ AttendArgs a, UnitWindow window) {
  extern __shared__ __align__(16) uint8_t memory[];
  auto& partials = *reinterpret_cast<Partials<kD>*>(memory);
  // The tables are copied to the device, which no kernel overtakes: read while the one before still runs.
  const AttendItem item = a.items.device[blockIdx.y];
  const Work work(a, item);
  const int64_t begin_pos = work.begin_pos();
  const int64_t end_pos = work.end_pos();
  const auto parts = static_cast<unsigned>(window.parts);
  const auto heads = static_cast<unsigned>(window.heads);
  const int64_t head = blockIdx.x / parts % heads;
  const int64_t first_query = int64_t{blockIdx.x / parts / heads} * kQueries;
  const auto kv_head = static_cast<int32_t>(item.kv_head_begin + window.first_head + head);
  // Units count from that of the item's first key.
  const int64_t first_unit = begin_pos / kUnitTokens;
  int64_t unit = window.first + blockIdx.x % parts;
  int64_t end_unit = window.first + window.count;
  const int64_t item_units = (end_pos + kUnitTokens - 1) / kUnitTokens - first_unit;
  if (end_unit > item_units) end_unit = item_units;
  if (!GoesByUnits(item, work.group) || kv_head >= item.kv_head_end ||
      first_query >= work.num_queries() || unit >= end_unit) {
    return BeginDependent();
  }

  const int64_t last_query = first_query + kQueries < work.num_queries() ? first_query + kQueries
                                                                         : work.num_queries();
  int64_t seen = work.pos(last_query - 1) + 1;
  if (seen > end_pos) seen = end_pos;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  // The warp's keys of a unit: [begin_of, end_of), or none. Positions are below 2^31.
  const auto begin_of = [&](int64_t of) {
    return static_cast<int32_t>((first_unit + of) * kUnitTokens) + warp * kBlock;
  };
  const auto end_of = [&](int64_t of) {
    const int32_t begin = begin_of(of);
    if (of >= end_unit || begin < begin_pos) return begin;
    return min(begin + kBlock, static_cast<int32_t>(seen));
  };
  constexpr int kColumns = kD * kQueries / kThreads;
  const int query = static_cast<int>(threadIdx.x) * kQueries / kThreads;
  const int column = static_cast<int>(threadIdx.x) % (kThreads / kQueries) * kColumns;

  WarpBlock<kD> block(work, kv_head, first_query, static_cast<int32_t>(parts * kUnitTokens));
  // Keys of earlier steps, which no kernel of this one writes, are on their way before it is waited for those
  // that append its own.
  const bool early = end_of(unit) <= item.first_pos;
  if (!early) BeginDependent();
  block.StartKeys(begin_of(unit), end_of(unit));
  if (early) BeginDependent();
  block.LoadQueries();
  for (; unit < end_unit; unit += parts) {
    block.Run(begin_of(unit + parts), end_of(unit + parts));
    __syncthreads();  // the unit before is folded
    block.Store(partials, warp);
    __syncthreads();
    if (first_query + query >= last_query) continue;
    const bool opened = begin_pos > (first_unit + unit) * kUnitTokens && item.reset == 0;
    FoldPartials<kD, kColumns>(
        partials, query, column,
        opened ? work.state(kv_head, first_query + query) + kD + 2 : nullptr,
        {a, window, window.Slot(blockIdx.y, unit - window.first, head, first_query + query)});
  }
}

// Of what is before a unit and of the unit itself in their fold, and the unit's l. Where nothing is
// before it, or nothing in it, the one has weight 0 and the other 1.
struct __align__(16) UnitWeights {
  float before;
  float unit;
  float l;
};

// Shared memory of a block that folds. Each warp fetches its own 32 columns: no warp waits for another's.
// kLong: 24 KiB are on their way, what a multiprocessor that has one block wants; else a third of that, and
// many sequences' blocks find room.
template <int kD, bool kLong>
struct FoldShared {
  static constexpr int kStages = 4;
  static constexpr int kStageUnits = (kLong ? 2048 : 1024) / kD;  // 8 or 4 KiB
  static constexpr int kLooks = kLong ? 4 : 1;                    // units whose weights a thread finds
  static constexpr int kRound = kLooks * kD;
  float o[kStages][kStageUnits][kD];
  UnitWeights weights[kRound];
  float largest_of_warp[kD / kWarp];
};

// Block (query and head, item): folds the window's units in order. A thread for each column.
//
// 128K tokens are 512 units: what the fold hangs on (the largest score so far, and with it both weights of
// each unit) is found for all of them at once, so that only a multiplication and an addition a unit remain
// one after the other.
template <int kD, bool kLong>
__global__ void __launch_bounds__(kD) FoldKernel(const __grid_constant__ AttendArgs a,
                                                 UnitWindow window) {
  using Shared = FoldShared<kD, kLong>;
  constexpr int kStageUnits = Shared::kStageUnits, kStages = Shared::kStages;
  constexpr int kLooks = Shared::kLooks, kRound = Shared::kRound;
  static_assert(kRound % kStageUnits == 0);
  extern __shared__ __align__(16) uint8_t memory[];
  auto& shared = *reinterpret_cast<Shared*>(memory);
  const AttendItem item = a.items.device[blockIdx.y];
  const Work work(a, item);
  const int64_t begin_pos = work.begin_pos();
  const int64_t end_pos = work.end_pos();
  BeginDependent();
  if (!GoesByUnits(item, work.group)) return;
  const int64_t head = blockIdx.x / static_cast<unsigned>(window.queries);
  const int64_t query = blockIdx.x % static_cast<unsigned>(window.queries);
  const auto kv_head = static_cast<int32_t>(item.kv_head_begin + window.first_head + head);
  if (kv_head >= item.kv_head_end || query >= work.num_queries()) return;
  const int64_t first_unit = begin_pos / kUnitTokens;
  const int64_t units =
      item.span_count == 0 ? 0 : (end_pos + kUnitTokens - 1) / kUnitTokens - first_unit;
  if (window.first > 0 && window.first >= units) return;
  const int64_t last = window.first + window.count < units ? window.first + window.count : units;
  const bool opens = last == units && units > 0 && end_pos % kUnitTokens != 0;
  // Whole units, counted from the window's first, and what the unit kernel left of each.
  const auto whole = static_cast<int>((opens ? last - 1 : last) - window.first);
  const Partial<kD> parts(a, window, window.Slot(blockIdx.y, 0, head, query));

  const int i = static_cast<int>(threadIdx.x);
  const int warp = i / kWarp;
  const int lane = i % kWarp;
  // The stage that begins with `unit`: eight lanes a row of the warp's columns. What is past the last unit
  // is zero.
  const auto fetch = [&](int unit) {
    auto& stage = shared.o[unit / kStageUnits % kStages];
    constexpr int kLanes = kWarp * static_cast<int>(sizeof(float)) / 16;
    const int column = warp * kWarp + lane % kLanes * 4;
#pragma unroll
    for (int row = lane / kLanes; row < kStageUnits; row += kWarp / kLanes) {
      const bool exists = unit + row < whole;
      CopyAsync16(&stage[row][column], parts.o + (exists ? int64_t{unit + row} * kD : 0) + column,
                  exists ? 16 : 0);
    }
    CommitCopies();
  };
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) fetch(stage * kStageUnits);
  // The thread's units of a round.
  float2 next[kLooks];
  const auto look = [&](int begin) {
#pragma unroll
    for (int n = 0; n < kLooks; ++n) {
      const int unit = begin + i * kLooks + n;
      next[n] = unit < whole ? parts.m_and_l[unit] : make_float2(-CUDART_INF_F, 0);
    }
  };
  look(0);

  float* const r = work.state(kv_head, query);
  float* const u = r + kD + 2;
  const bool empty = window.first == 0 && item.reset != 0;
  float o = empty ? 0.0f : r[i];
  float m = empty ? -CUDART_INF_F : r[kD];
  float l = empty ? 0.0f : r[kD + 1];
  for (int begin = 0; begin < whole; begin += kRound) {
    float2 its[kLooks];
    float upto[kLooks];  // the largest of the thread's units up to and with each
#pragma unroll
    for (int n = 0; n < kLooks; ++n) {
      its[n] = next[n];
      upto[n] = n == 0 ? its[0].x : fmaxf(upto[n - 1], its[n].x);
    }
    look(begin + kRound);
    float to_lane = upto[kLooks - 1];
#pragma unroll
    for (int offset = 1; offset < kWarp; offset *= 2) {
      const float left = __shfl_up_sync(kFullMask, to_lane, offset);
      if (lane >= offset) to_lane = fmaxf(to_lane, left);
    }
    __syncthreads();  // the round before has read its weights
    if (lane == kWarp - 1) shared.largest_of_warp[warp] = to_lane;
    float before = __shfl_up_sync(kFullMask, to_lane, 1);
    if (lane == 0) before = -CUDART_INF_F;
    __syncthreads();
    before = fmaxf(before, m);
#pragma unroll
    for (int other = 0; other < kD / kWarp; ++other) {
      const float largest = shared.largest_of_warp[other];
      if (other < warp) before = fmaxf(before, largest);
      m = fmaxf(m, largest);
    }
#pragma unroll
    for (int n = 0; n < kLooks; ++n) {
      const float with = fmaxf(before, its[n].x);
      const bool nothing_before = before == -CUDART_INF_F;
      UnitWeights weights = {1, 0, its[n].y};
      if (its[n].y != 0) {
        weights.before = nothing_before ? 0.0f : expf(__fsub_rn(before, with));
        weights.unit = nothing_before ? 1.0f : expf(__fsub_rn(its[n].x, with));
      }
      shared.weights[i * kLooks + n] = weights;
      before = with;
    }
    __syncthreads();
    const int count = whole - begin < kRound ? whole - begin : kRound;
    for (int first = 0; first < count; first += kStageUnits) {
      __syncwarp();  // its lanes have read the stage that is fetched now
      fetch(begin + first + (kStages - 1) * kStageUnits);
      AwaitCopies<kStages - 1>();
      __syncwarp();
      const auto& stage = shared.o[(begin + first) / kStageUnits % kStages];
#pragma unroll
      for (int k = 0; k < kStageUnits; ++k) {
        if (k % 4 == 0 && first + k >= count) break;
        const UnitWeights weights = shared.weights[first + k];
        o = __fmaf_rn(stage[k][i], weights.unit, __fmul_rn(o, weights.before));
        l = __fmaf_rn(weights.l, weights.unit, __fmul_rn(l, weights.before));
      }
    }
  }
  AwaitCopies<0>();
  // What was open went into the first unit's partial, if there is one.
  float open_o = 0, open_m = -CUDART_INF_F, open_l = 0;
  if (opens) {
    open_o = parts.o[int64_t{whole} * kD + i];
    open_m = parts.m_and_l[whole].x;
    open_l = parts.m_and_l[whole].y;
  } else if (units == 0 && item.reset == 0) {
    open_o = u[i];
    open_m = u[kD];
    open_l = u[kD + 1];
  }
  if (last == units && item.finish != 0) {
    const FoldWeights fold(m, l, open_m, open_l);
    o = fold(o, open_o);
    m = fold.m;
    l = fold.l;
    open_o = open_l = 0;
    open_m = -CUDART_INF_F;
    StoreActivation(a.out, work.out(kv_head, query) + i, __fmul_rn(o, 1.0f / l));
  }
  __syncthreads();  // all have read m and l
  r[i] = o;
  u[i] = open_o;
  if (i != 0) return;
  r[kD] = m;
  r[kD + 1] = l;
  u[kD] = open_m;
  u[kD + 1] = open_l;
}

// Blocks of threads of a long launch: what 132 multiprocessors hold at once.
constexpr int64_t kFullGrid = 264;
// A sequence's units up to which its fold is a short one.
constexpr int64_t kFewUnits = 64;

// The largest of each over the items that go by units.
struct Extents {
  int64_t heads = 0;
  int64_t queries = 0;
  int64_t units = 0;
};

Extents ExtentsOf(const AttendArgs& a) {
  const auto raise = [](int64_t& value, int64_t to) { value = value < to ? to : value; };
  const int32_t group = a.num_q_heads / a.num_kv_heads;
  Extents e;
  for (int32_t i = 0; i < a.items.count; ++i) {
    const AttendItem& item = a.items.host[i];
    if (!GoesByUnits(item, group)) continue;
    raise(e.heads, item.kv_head_end - item.kv_head_begin);
    raise(e.queries, int64_t{item.row_count} * group);
    if (item.span_count == 0) continue;
    const KvSpan& first = a.spans.host[item.span_begin];
    const KvSpan& last = a.spans.host[item.span_begin + item.span_count - 1];
    raise(e.units, CeilDiv(last.first_pos + last.count, kUnitTokens) -
                       first.first_pos / kUnitTokens);
  }
  return e;
}

// Some items, and of each as many KV heads as the window says: all their units.
template <int kD>
cudaError_t LaunchWindows(const AttendArgs& a, UnitWindow window, int64_t units,
                          cudaStream_t stream) {
  const int64_t items = a.items.count;
  const int64_t fit = a.scratch_floats / (items * window.heads * window.queries * (kD + 2));
  window.count = fit < units ? fit : units;
  if (window.count == 0) window.count = 1;
  const int64_t tasks = window.heads * CeilDiv(window.queries, kQueries);
  window.parts = CeilDiv(window.count, CeilDiv(window.count * tasks * items, kFullGrid));
  window.slots = items * window.heads * window.queries * window.count;
  const dim3 blocks(static_cast<unsigned>(window.parts * tasks), static_cast<unsigned>(items));
  const dim3 folds(static_cast<unsigned>(window.heads * window.queries),
                   static_cast<unsigned>(items));
  do {
    HEADROOM_CUDA_RETURN_IF_ERROR(
        LaunchDependentOn(stream, UnitKernel<kD>, blocks, kThreads, sizeof(Partials<kD>), a, window));
    const cudaError_t folded =
        window.count > kFewUnits
            ? LaunchDependentOn(stream, FoldKernel<kD, true>, folds, kD, sizeof(FoldShared<kD, true>), a,
                                window)
            : LaunchDependentOn(stream, FoldKernel<kD, false>, folds, kD,
                                sizeof(FoldShared<kD, false>), a, window);
    HEADROOM_CUDA_RETURN_IF_ERROR(folded);
    window.first += window.count;
  } while (window.first < units);
  return cudaSuccess;
}

template <int kD>
cudaError_t Launch(AttendArgs a, cudaStream_t stream) {
  const Extents e = ExtentsOf(a);
  if (e.heads == 0 || e.queries == 0) return cudaSuccess;
  // Heads and items of a launch that fit the grid and leave scratch for a unit of each.
  UnitWindow window = {};
  window.queries = e.queries;
  const int64_t a_head = e.queries * (kD + 2);
  const int64_t most_heads = a.scratch_floats / a_head;
  if (most_heads == 0) return cudaErrorInvalidValue;
  window.heads = most_heads < e.heads ? most_heads : e.heads;
  int64_t most_items = most_heads / window.heads;
  if (most_items > kMaxGridY) most_items = kMaxGridY;
  const AttendArgs all = a;
  for (int64_t item = 0; item < all.items.count; item += most_items) {
    const int64_t items = all.items.count - item < most_items ? all.items.count - item : most_items;
    a.items = {all.items.device + item, all.items.host + item, static_cast<int32_t>(items)};
    for (window.first_head = 0; window.first_head < e.heads; window.first_head += window.heads) {
      HEADROOM_CUDA_RETURN_IF_ERROR(LaunchWindows<kD>(a, window, e.units, stream));
    }
  }
  return cudaSuccess;
}

template <int kD>
cudaError_t Load() {
  HEADROOM_CUDA_RETURN_IF_ERROR(LoadDecodeKernel(UnitKernel<kD>, sizeof(Partials<kD>)));
  HEADROOM_CUDA_RETURN_IF_ERROR(LoadDecodeKernel(FoldKernel<kD, true>, sizeof(FoldShared<kD, true>)));
  return LoadDecodeKernel(FoldKernel<kD, false>, sizeof(FoldShared<kD, false>));
}

}  // namespace

cudaError_t LaunchUnitAttend(const AttendArgs& args, cudaStream_t stream) {
  return ForHeadDim(args.head_dim, [&](auto d) { return Launch<d()>(args, stream); });
}

cudaError_t LoadUnitAttend() {
  HEADROOM_CUDA_RETURN_IF_ERROR(Load<64>());
  HEADROOM_CUDA_RETURN_IF_ERROR(Load<128>());
  return Load<256>();
}

}  // namespace headroom::kernels::cuda
