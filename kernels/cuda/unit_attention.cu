// Attention of few queries over many keys: a decode step's. Its time is that of reading the keys.
//
// Units of kUnitTokens keys are computed side by side into scratch, and folded in order by a second kernel
// (unit_fold.cu); attention.h states the fold. Each of a block's four warps takes one block of 64 keys of a unit alone
// (warp_block.cuh); U is the fold of the four, in order. (On the CPU blocks go on from each other by online
// softmax: the same but for rounding.) Where there are few units one kernel does both (short_attention.cu).
//
// Blocks of threads draw tickets for units, so that none idles while there is work: multiprocessors do not
// get the same share of memory, and sequences are not of one length. Units that are read at one time lie side
// by side. Tickets are drawn three units ahead, and where a unit's keys lie is looked up two ahead, by the warps in
// turn. All that is not reading happens while keys or values are on their way: a unit is folded in the midst
// of the next, so that no warp waits for the slowest. 131,072 keys of Llama-3-8B take 135 us of an H200, and with
// 15 sequences of 1,024 beside them 180, where blocks that were dealt out evenly took 141 and 590 (gpu_bench).
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/mbarrier.cuh"
#include "kernels/cuda/unit_task.cuh"

namespace headroom::kernels::cuda {
namespace {

using namespace unit;  // NOLINT: its other half

template <int kD>
struct UnitShared {
  Partials<kD> partials;
  // Of the unit that is still to be folded, the one that is attended to, and the next two.
  Task tasks[4];
  uint32_t tickets[4];  // ... and the next three
  MBarrier stored;      // all threads have stored their partials of a unit
  MBarrier folded;      // ... and all have read them; turns are units
};

// What a ticket stands for.
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
  LookUp<kD>(
      a, window, item,
      [&](const ItemUnits& its) -> TaskOfItem {
        const uint32_t at = ticket - window.first_task[item];
        return {at / its.tiles() / its.count, at / its.tiles() % its.count, at % its.tiles()};
      },
      task);
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
    shared.stored.Init(kThreads);
    shared.folded.Init(kThreads);
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
        const QueryPartials<kD> to(a, window, its.slot + query * its.units, its.units);
        FoldPartials<kD, kColumns>(
            shared.partials, static_cast<int>(query), column,
            its.opened ? work.state(its.kv_head, its.query + query) + kD + 2 : nullptr,
            [&](int first, float2 pair) {
              *reinterpret_cast<float2*>(to.Of(its.unit, first)) = pair;
            },
            [&](float2 sums) { to.m_and_l[its.unit] = sums; });
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
  int64_t rows = 0, slots = 0, units = 0;  // slots if all units were in one window; units of the item with most
  bool whole = true;                       // no item has other launches
  bool all_have_units = true;
  ForEachItem(a, window, [&](int32_t i, const ItemUnits& its) {
    window.first_span[i] = a.items.host[i].span_begin;
    all_have_units = all_have_units && its.units > 0;
    whole = whole && a.items.host[i].reset != 0 && a.items.host[i].finish != 0;
    rows += int64_t{its.heads} * its.queries;
    slots += int64_t{its.heads} * its.queries * its.units;
    units = units < its.units ? its.units : units;
  });
  if (rows == 0) return cudaSuccess;
  if (whole && all_have_units && IsShort(a, window, units)) return LaunchShortAttend(a, window, units, stream);
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
    HEADROOM_CUDA_RETURN_IF_ERROR(LaunchUnitFold(a, window, units, whole, stream));
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

template <int kD>
cudaError_t Load() {
  return LoadDecodeKernel(UnitKernel<kD>, sizeof(UnitShared<kD>));
}

}  // namespace

cudaError_t LaunchUnitAttend(const AttendArgs& args, uint32_t* tickets, cudaStream_t stream) {
  return ForHeadDim(args.head_dim, [&](auto d) { return Launch<d()>(args, tickets, stream); });
}

cudaError_t LoadUnitAttend() {
  HEADROOM_CUDA_RETURN_IF_ERROR(Load<64>());
  HEADROOM_CUDA_RETURN_IF_ERROR(Load<128>());
  HEADROOM_CUDA_RETURN_IF_ERROR(Load<256>());
  HEADROOM_CUDA_RETURN_IF_ERROR(LoadShortAttend());
  return LoadUnitFold();
}

}  // namespace headroom::kernels::cuda
