// Attention of few queries over many keys: a decode step's. Its time is that of reading the keys.
//
// Units of kUnitTokens keys are computed side by side into scratch, and folded in order by a second kernel;
// attention.h states the fold. Each of a block's four warps takes one block of 64 keys of a unit alone
// (warp_block.cuh); U is the fold of the four, in order. (On the CPU blocks go on from each other by online
// softmax: the same but for rounding.)
//
// Blocks of threads draw tickets for units, so that none idles while there is work: multiprocessors do not
// get the same share of memory, and sequences are not of one length. Units that are read at one time lie side
// by side. Tickets are drawn three units ahead, and where a unit's keys lie is looked up two ahead, by the warps in
// turn. All that is not reading happens while keys or values are on their way: a unit is folded in the midst
// of the next, so that no warp waits for the slowest. 131,072 keys of Llama-3-8B take 135 us of an H200, and with
// 15 sequences of 1,024 beside them 180, where blocks that were dealt out evenly took 141 and 590 (gpu_bench).
#include "kernels/cuda/attention_parts.cuh"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/warp_block.cuh"

namespace headroom::kernels::cuda {
namespace {

using namespace unit;  // NOLINT: its other half

// Items of a launch: what is known of each goes with its parameters.
constexpr int kMostItems = 256;
constexpr int64_t kMostUnits = int64_t{1} << 31;

// What the units [first, first + count) of every item leave in scratch, for FoldKernel: o of all queries'
// units, a query's one behind the other, and then m and l of each, likewise. A task, of which each
// ticket is one, is a unit of up to kQueries queries of a KV head; they count by item, head, unit, queries.
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

// U of one query and some columns: what an earlier launch has opened, if there is such, and then the
// partials of the unit's blocks, in order. To `to`.
template <int kD, int kColumns>
__device__ void FoldPartials(const Partials<kD>& partials, int query, int column, const float* opened,
                             const QueryPartials<kD>& to, uint32_t unit) {
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
    *reinterpret_cast<float2*>(to.Of(unit, column + i)) = make_float2(o[i], o[i + 1]);
  }
  if (column == 0) to.m_and_l[unit] = make_float2(m, l);
}

// Where a block's threads meet, once for each unit, without waiting before they must: what a thread has read or
// written before Arrive() is done when another comes from Wait(). Units count from 0.
struct UnitBarrier {
  uint64_t word;
  // By one thread, before a __syncthreads().
  __device__ void Init() {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" : : "r"(Address()), "r"(kThreads) : "memory");
  }
  __device__ void Arrive() {
    asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }"
                 :
                 : "r"(Address())
                 : "memory");
  }
  __device__ void Wait(int unit) {
    uint32_t done;
    do {
      asm volatile(
          "{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
          : "=r"(done)
          : "r"(Address()), "r"(unit & 1)
          : "memory");
    } while (done == 0);
  }

 private:
  __device__ uint32_t Address() { return static_cast<uint32_t>(__cvta_generic_to_shared(&word)); }
};

// What a ticket stands for.
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

template <int kD>
struct UnitShared {
  Partials<kD> partials;
  // Of the unit that is still to be folded, the one that is attended to, and the next two.
  Task tasks[4];
  uint32_t tickets[4];  // ... and the next three
  UnitBarrier stored;   // all warps have stored their partials of a unit
  UnitBarrier folded;   // ... and all have read them
};

// By one warp. No kernel of a step writes what it reads: tables are copied to the device before.
template <int kD>
__device__ void LookUp(const AttendArgs& a, const UnitWindow& window, uint32_t ticket, Task& task) {
  const auto lane = static_cast<int32_t>(threadIdx.x) % kWarp;
  if (ticket >= window.tasks) {
    if (lane == 0) task.exists = false;
    return;
  }
  int32_t item = -1;  // the last that begins at the ticket or before
  for (int32_t base = 0; base < a.items.count; base += kWarp) {
    const bool begun = base + lane < a.items.count && window.first_task[base + lane] <= ticket;
    item += __popc(__ballot_sync(kFullMask, begun));
  }
  constexpr auto kWords = static_cast<int32_t>(sizeof(AttendItem) / sizeof(uint32_t));
  static_assert(kWords <= kWarp && sizeof(AttendItem) % sizeof(uint32_t) == 0);
  if (lane < kWords) {
    reinterpret_cast<uint32_t*>(&task.item)[lane] =
        reinterpret_cast<const uint32_t*>(a.items.device + item)[lane];
  }
  __syncwarp();
  const Work work(a, task.item);
  // The lanes have a span each: a long context has some forty.
  const int32_t spans = task.item.span_count;
  KvSpan span = {};
  if (lane < spans) span = work.span(lane);
  const int64_t begin_pos = __shfl_sync(kFullMask, span.first_pos, 0);
  int64_t end_pos = __shfl_sync(kFullMask, span.first_pos + span.count, (spans - 1) % kWarp);
  if (spans > kWarp) end_pos = work.end_pos();
  const ItemUnits its(window, task.item, work.group, begin_pos, end_pos);
  const uint32_t at = ticket - window.first_task[item];
  const uint32_t tile = at % its.tiles();
  const uint32_t unit = at / its.tiles() % its.count;
  const uint32_t head = at / its.tiles() / its.count;
  const uint32_t query = tile * kQueries;
  const auto kv_head =
      static_cast<int32_t>(task.item.kv_head_begin + window.first_head + static_cast<int32_t>(head));
  const auto begin_of_unit =
      static_cast<int32_t>((its.first_unit + window.first + unit) * kUnitTokens);
  const uint32_t last_query = min(query + kQueries, its.queries) - 1;
  const auto seen = static_cast<int32_t>(
      min(task.item.first_pos + last_query / static_cast<uint32_t>(work.group) + 1, end_pos));
  if (lane == 0) {
    task.exists = true;
    task.opened = begin_pos > begin_of_unit && task.item.reset == 0;
    task.kv_head = kv_head;
    task.of = ticket - unit * its.tiles();
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
  if (lane < kWarps) task.keys[lane] = keys;
  __syncwarp();
}

// As many blocks as may be at once, which take tasks until there are none: three each by their own numbers, then
// what `tickets` says, a word that is 0 before and after. Who computes a unit does not show in its bits.
template <int kD>
__global__ void __launch_bounds__(kThreads, kD <= 128 ? 2 : 1)
    UnitKernel(const __grid_constant__ AttendArgs a, const __grid_constant__ UnitWindow window,
               uint32_t* tickets) {
  extern __shared__ __align__(16) uint8_t memory[];
  auto& shared = *reinterpret_cast<UnitShared<kD>*>(memory);
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const auto task = [&](int n) -> Task& { return shared.tasks[n % 4]; };
  const auto ticket = [&](int n) -> uint32_t& { return shared.tickets[n % 4]; };
  if (warp < 3) {
    const uint32_t its = static_cast<uint32_t>(warp) * gridDim.x + blockIdx.x;
    LookUp<kD>(a, window, its, task(warp));
    ticket(warp) = its;
  } else if (threadIdx.x == 3 * kWarp) {
    shared.stored.Init();
    shared.folded.Init();
  }
  __syncthreads();

  WarpBlock<kD> block(a);
  const auto load_queries = [&](const Task& of) {
    block.LoadQueries(Work(a, of.item), of.kv_head, of.query);
  };
  // Keys of earlier steps, which no kernel of this one writes, are on their way before it is waited for those
  // that append its own.
  const Keys& first = task(0).keys[warp];
  const bool early = first.pos + first.count <= task(0).item.first_pos;
  if (!early) BeginDependent();
  block.StartKeys(first);
  if (early) BeginDependent();
  load_queries(task(0));
  constexpr int kColumns = kD * kQueries / kThreads;
  const uint32_t query = threadIdx.x * kQueries / kThreads;
  const int column = static_cast<int>(threadIdx.x) % (kThreads / kQueries) * kColumns;
  for (int n = 0;; ++n) {
    const bool exists = task(n).exists;
    // Every block that has a third task draws until there is none left: tasks - 2 gridDim.x times in all.
    const bool draws = threadIdx.x == 0;
    uint32_t drawn = window.tasks;
    if (draws && exists && ticket(n + 2) < window.tasks) {
      drawn = 3 * gridDim.x + atomicInc(tickets, window.tasks - 2 * gridDim.x - 1);
    }
    if (exists) block.TakeKeys();
    if (n > 0) {
      shared.stored.Wait(n - 1);
      const Task& its = task(n - 1);
      const Work work(a, its.item);
      if (its.query + query < work.num_queries()) {
        FoldPartials<kD, kColumns>(
            shared.partials, static_cast<int>(query), column,
            its.opened ? work.state(its.kv_head, its.query + query) + kD + 2 : nullptr,
            {a, window, its.slot + query * its.units, its.units}, its.unit);
      }
      if (!exists) return;
      shared.folded.Arrive();
      if (warp == n % kWarps) LookUp<kD>(a, window, ticket(n + 2), task(n + 2));
    }
    if (draws) ticket(n + 3) = drawn;
    const Task& next = task(n + 1);
    block.TakeValues(next.exists ? next.keys[warp] : Keys());
    if (n > 0) shared.folded.Wait(n - 1);
    block.Store(shared.partials, warp);
    shared.stored.Arrive();
    if (next.exists && next.of != task(n).of) load_queries(next);
  }
}

// Of what is before a unit and of the unit itself in their fold, and the unit's l. Where nothing is
// before it, or nothing in it, the one has weight 0 and the other 1.
struct __align__(16) UnitWeights {
  float before;
  float unit;
  float l;
};

// Shared memory of a block that folds, of all columns or some. Each warp fetches its own 32: no warp waits
// for another's. kLong: 24 KiB are on their way, what a multiprocessor that has one block wants; else a third
// of that, and many sequences' blocks find room.
template <int kD, int kColumns, bool kLong>
struct FoldShared {
  static constexpr int kStages = 4;
  static constexpr int kStageUnits = (kLong ? 2048 : 1024) / kColumns;  // 8 or 4 KiB
  static constexpr int kLooks = kLong ? 512 / kD : 1;  // units whose weights a thread finds
  static constexpr int kRound = kLooks * kD;
  float o[kColumns / kWarp][kStages][kStageUnits][kWarp];
  UnitWeights weights[kRound];
  float largest_of_warp[kD / kWarp];
};

// Block (columns, query and head; item): folds the window's units in order, a thread for each column; the others
// find weights. With less than kD columns a block there are others beside it that read the same m and l, and
// an item must be done with it, from its beginning to its end: no state is read then, nor written.
//
// 128K tokens are 512 units: what the fold hangs on (the largest score so far, and with it both weights of
// each unit) is found for all of them at once, so that only a multiplication and an addition a unit remain
// one after the other.
template <int kD, int kColumns, bool kLong>
__global__ void __launch_bounds__(kD) FoldKernel(const __grid_constant__ AttendArgs a,
                                                 const __grid_constant__ UnitWindow window) {
  using Shared = FoldShared<kD, kColumns, kLong>;
  constexpr int kStageUnits = Shared::kStageUnits, kStages = Shared::kStages;
  constexpr int kLooks = Shared::kLooks, kRound = Shared::kRound;
  constexpr int kSome = kStageUnits < 32 ? kStageUnits : 32;
  static_assert(kRound % kStageUnits == 0 && kStageUnits % kSome == 0);
  extern __shared__ __align__(16) uint8_t memory[];
  auto& shared = *reinterpret_cast<Shared*>(memory);
  const AttendItem item = a.items.device[blockIdx.y];
  const Work work(a, item);
  const int64_t begin_pos = work.begin_pos();
  const int64_t end_pos = work.end_pos();
  BeginDependent();
  constexpr unsigned kParts = kD / kColumns;
  const int first_column = static_cast<int>(blockIdx.x % kParts) * kColumns;
  const uint32_t head = blockIdx.x / kParts / static_cast<unsigned>(window.queries);
  const uint32_t query = blockIdx.x / kParts % static_cast<unsigned>(window.queries);
  const ItemUnits its(window, item, work.group, begin_pos, end_pos);
  if (head >= its.heads || query >= its.queries) return;
  if (window.first > 0 && window.first >= its.units) return;
  const auto kv_head = item.kv_head_begin + window.first_head + static_cast<int32_t>(head);
  const bool last = window.first + its.count == its.units;
  const bool opens = last && its.units > 0 && end_pos % kUnitTokens != 0;
  // Whole units, counted from the window's first, and what the unit kernel left of each.
  const auto whole = static_cast<int>(its.count) - (opens ? 1 : 0);
  const QueryPartials<kD> parts(
      a, window, window.first_slot[blockIdx.y] + (head * its.queries + query) * its.count, its.count);

  const int i = static_cast<int>(threadIdx.x);
  const int warp = i / kWarp;
  const int lane = i % kWarp;
  const bool folds = i < kColumns;
  // The stage that begins with `unit`, of the warp's columns: eight lanes a unit. What is past the last unit
  // is zero.
  const float* const its_columns = parts.Of(0, first_column + (folds ? warp * kWarp : 0));
  const auto fetch = [&](int unit) {
    auto& stage = shared.o[warp][unit / kStageUnits % kStages];
    constexpr int kAtOnce = 4;
    const int first = lane / (kWarp / kAtOnce);
    const float* const from = its_columns + int64_t{unit} * kWarp + lane * 4;
#pragma unroll
    for (int n = 0; n < kStageUnits; n += kAtOnce) {
      const bool exists = unit + n + first < whole;
      CopyAsync16(&stage[n + first][lane % (kWarp / kAtOnce) * 4],
                  exists ? from + n * kWarp : its_columns, exists ? 16 : 0);
    }
    CommitCopies();
  };
  if (folds) {
#pragma unroll
    for (int stage = 0; stage < kStages - 1; ++stage) fetch(stage * kStageUnits);
  }
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
  const bool empty = kParts > 1 || (window.first == 0 && item.reset != 0);
  float o = empty ? 0.0f : r[i];
  float m = empty ? -CUDART_INF_F : r[kD];
  float l = empty ? 0.0f : r[kD + 1];
  for (int begin = 0; begin < whole; begin += kRound) {
    float2 m_and_l[kLooks];
    float upto[kLooks];  // the largest of the thread's units up to and with each
#pragma unroll
    for (int n = 0; n < kLooks; ++n) {
      m_and_l[n] = next[n];
      upto[n] = n == 0 ? m_and_l[0].x : fmaxf(upto[n - 1], m_and_l[n].x);
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
      const float with = fmaxf(before, m_and_l[n].x);
      const bool nothing_before = before == -CUDART_INF_F;
      UnitWeights weights = {1, 0, m_and_l[n].y};
      if (m_and_l[n].y != 0) {
        weights.before = nothing_before ? 0.0f : expf(__fsub_rn(before, with));
        weights.unit = nothing_before ? 1.0f : expf(__fsub_rn(m_and_l[n].x, with));
      }
      shared.weights[i * kLooks + n] = weights;
      before = with;
    }
    __syncthreads();
    const int count = whole - begin < kRound ? whole - begin : kRound;
    for (int first = 0; folds && first < count; first += kStageUnits) {
      __syncwarp();  // its lanes have read the stage that is fetched now
      fetch(begin + first + (kStages - 1) * kStageUnits);
      AwaitCopies<kStages - 1>();
      __syncwarp();
      const auto& stage = shared.o[warp][(begin + first) / kStageUnits % kStages];
      const auto add = [&](float unit_o, const UnitWeights& weights) {
        o = __fmaf_rn(unit_o, weights.unit, __fmul_rn(o, weights.before));
        l = __fmaf_rn(weights.l, weights.unit, __fmul_rn(l, weights.before));
      };
      // Additions wait for each other; what they need of shared memory is there before.
      int k = 0;
      for (; k < kStageUnits && first + k + kSome <= count; k += kSome) {
        float its_o[kSome];
        UnitWeights weights[kSome];
#pragma unroll
        for (int n = 0; n < kSome; ++n) {
          its_o[n] = stage[k + n][lane];
          weights[n] = shared.weights[first + k + n];
        }
#pragma unroll
        for (int n = 0; n < kSome; ++n) add(its_o[n], weights[n]);
      }
      for (; k < kStageUnits && first + k < count; ++k) add(stage[k][lane], shared.weights[first + k]);
    }
  }
  AwaitCopies<0>();
  if (!folds) return;
  // What was open went into the first unit's partial, if there is one.
  float open_o = 0, open_m = -CUDART_INF_F, open_l = 0;
  if (opens) {
    open_o = *parts.Of(static_cast<uint32_t>(whole), first_column + i);
    open_m = parts.m_and_l[whole].x;
    open_l = parts.m_and_l[whole].y;
  } else if (its.units == 0 && !empty) {
    open_o = u[i];
    open_m = u[kD];
    open_l = u[kD + 1];
  }
  if (last && item.finish != 0) {
    const FoldWeights fold(m, l, open_m, open_l);
    o = fold(o, open_o);
    m = fold.m;
    l = fold.l;
    open_o = open_l = 0;
    open_m = -CUDART_INF_F;
    StoreActivation(a.out, work.out(kv_head, query) + first_column + i, __fmul_rn(o, 1.0f / l));
  }
  if (kParts > 1) return;
  __syncthreads();  // all have read m and l
  r[i] = o;
  u[i] = open_o;
  if (i != 0) return;
  r[kD] = m;
  r[kD + 1] = l;
  u[kD] = open_m;
  u[kD + 1] = open_l;
}

// A sequence's units up to which its fold is a short one, and how many columns a block has of a long one: 32
// queries of 512 units are 8.5 MB, and 128 blocks read more at a time than 32.
constexpr int64_t kFewUnits = 64;
constexpr int kLongColumns = 32;

template <int kD, int kColumns, bool kLong>
cudaError_t LaunchFold(const AttendArgs& a, const UnitWindow& window, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(window.heads * window.queries * (kD / kColumns)),
                  static_cast<unsigned>(a.items.count));
  return LaunchDependentOn(stream, FoldKernel<kD, kColumns, kLong>, grid, kD,
                           sizeof(FoldShared<kD, kColumns, kLong>), a, window);
}

int64_t EndOf(const AttendArgs& a, const AttendItem& item) {
  if (item.span_count == 0) return 0;
  const KvSpan& last = a.spans.host[item.span_begin + item.span_count - 1];
  return last.first_pos + last.count;
}
int64_t BeginOf(const AttendArgs& a, const AttendItem& item) {
  return item.span_count == 0 ? 0 : a.spans.host[item.span_begin].first_pos;
}

// Calls f(index of the item, ItemUnits) for every item.
template <typename F>
void ForEachItem(const AttendArgs& a, const UnitWindow& window, F&& f) {
  const int32_t group = a.num_q_heads / a.num_kv_heads;
  for (int32_t i = 0; i < a.items.count; ++i) {
    const AttendItem& item = a.items.host[i];
    f(i, ItemUnits(window, item, group, BeginOf(a, item), EndOf(a, item)));
  }
}

// Some items, and of each as many KV heads as the window says: all their units.
template <int kD>
cudaError_t LaunchWindows(const AttendArgs& a, UnitWindow window, uint32_t* tickets,
                          cudaStream_t stream) {
  window.first = 0;
  window.count = kMostUnits;
  int64_t rows = 0, slots = 0, units = 0;  // slots if all units were in one window
  bool whole = true;                       // no item has other launches
  ForEachItem(a, window, [&](int32_t i, const ItemUnits& its) {
    whole = whole && a.items.host[i].reset != 0 && a.items.host[i].finish != 0;
    rows += int64_t{its.heads} * its.queries;
    slots += int64_t{its.heads} * its.queries * its.units;
    units = units < its.units ? its.units : units;
  });
  if (rows == 0) return cudaSuccess;
  const int64_t most_slots = a.scratch_floats / (kD + 2);
  if (slots > most_slots) window.count = most_slots / rows;
  const int64_t at_once = int64_t{kD <= 128 ? 2 : 1} * Multiprocessors();
  do {
    window.tasks = window.slots = 0;
    ForEachItem(a, window, [&](int32_t i, const ItemUnits& its) {
      window.first_task[i] = window.tasks;
      window.first_slot[i] = window.slots;
      window.tasks += its.tasks();
      window.slots += its.slots();
    });
    if (window.tasks > 0) {
      const dim3 blocks(static_cast<unsigned>(window.tasks < at_once ? window.tasks : at_once));
      HEADROOM_CUDA_RETURN_IF_ERROR(LaunchDependentOn(stream, UnitKernel<kD>, blocks, kThreads,
                                                      sizeof(UnitShared<kD>), a, window, tickets));
    }
    if (units <= kFewUnits) {
      HEADROOM_CUDA_RETURN_IF_ERROR((LaunchFold<kD, kD, false>(a, window, stream)));
    } else if (whole && units <= window.count) {
      HEADROOM_CUDA_RETURN_IF_ERROR((LaunchFold<kD, kLongColumns, true>(a, window, stream)));
    } else {
      HEADROOM_CUDA_RETURN_IF_ERROR((LaunchFold<kD, kD, true>(a, window, stream)));
    }
    window.first += window.count;
  } while (window.first < units);
  return cudaSuccess;
}

template <int kD>
cudaError_t Launch(AttendArgs a, uint32_t* tickets, cudaStream_t stream) {
  const int32_t group = a.num_q_heads / a.num_kv_heads;
  int64_t heads = 0, queries = 0;  // of the item that has the most
  for (int32_t i = 0; i < a.items.count; ++i) {
    const AttendItem& item = a.items.host[i];
    if (!GoesByUnits(item, group)) continue;
    const int64_t its_heads = item.kv_head_end - item.kv_head_begin;
    const int64_t its_queries = int64_t{item.row_count} * group;
    heads = heads < its_heads ? its_heads : heads;
    queries = queries < its_queries ? its_queries : queries;
  }
  if (heads == 0 || queries == 0) return cudaSuccess;
  // Heads and items of a launch that leave scratch for a unit of each.
  UnitWindow window = {};
  window.queries = static_cast<int32_t>(queries);
  const int64_t most_heads = a.scratch_floats / (queries * (kD + 2));
  if (most_heads == 0) return cudaErrorInvalidValue;
  window.heads = static_cast<int32_t>(most_heads < heads ? most_heads : heads);
  const int64_t fit = most_heads / window.heads;
  const auto most_items = static_cast<int32_t>(fit < kMostItems ? fit : kMostItems);
  const AttendArgs all = a;
  for (int32_t item = 0; item < all.items.count; item += most_items) {
    const int32_t left = all.items.count - item;
    a.items = {all.items.device + item, all.items.host + item, left < most_items ? left : most_items};
    for (window.first_head = 0; window.first_head < heads; window.first_head += window.heads) {
      HEADROOM_CUDA_RETURN_IF_ERROR(LaunchWindows<kD>(a, window, tickets, stream));
    }
  }
  return cudaSuccess;
}

template <int kD, int kColumns, bool kLong>
cudaError_t LoadFold() {
  return LoadDecodeKernel(FoldKernel<kD, kColumns, kLong>, sizeof(FoldShared<kD, kColumns, kLong>));
}
template <int kD>
cudaError_t Load() {
  HEADROOM_CUDA_RETURN_IF_ERROR(LoadDecodeKernel(UnitKernel<kD>, sizeof(UnitShared<kD>)));
  HEADROOM_CUDA_RETURN_IF_ERROR((LoadFold<kD, kD, true>()));
  HEADROOM_CUDA_RETURN_IF_ERROR((LoadFold<kD, kLongColumns, true>()));
  return LoadFold<kD, kD, false>();
}

}  // namespace

cudaError_t LaunchUnitAttend(const AttendArgs& args, uint32_t* tickets, cudaStream_t stream) {
  return ForHeadDim(args.head_dim, [&](auto d) { return Launch<d()>(args, tickets, stream); });
}

cudaError_t LoadUnitAttend() {
  HEADROOM_CUDA_RETURN_IF_ERROR(Load<64>());
  HEADROOM_CUDA_RETURN_IF_ERROR(Load<128>());
  return Load<256>();
}

}  // namespace headroom::kernels::cuda
