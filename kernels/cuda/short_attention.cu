// Attention over so few keys that it takes as long as the steps from one kernel to the next: up to eight units.
//
// A cluster of blocks has up to eight queries of a KV head, each of its blocks one unit of the keys. Instead of leaving the
// fold to a second kernel (unit_fold.cu), whose bits theirs are, the blocks send each other what they have: query q is
// folded by block q % units. A step of Llama-3-8B behind 1,024 tokens takes 4.03 ms of an H200, by two kernels 4.18.
//
// It does not help to have the values on their way beside the keys, nor this step's unit in L2. Blocks that waited for
// each other before they wait for the kernel before would cost 2 us a layer.
#include "kernels/cuda/cluster.cuh"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/unit_task.cuh"

namespace headroom::kernels::cuda::unit {
namespace {

// Of all units, o (or m and l) of the queries that a block folds: of the first one's units, the second one's ...
constexpr int kMostShares = [] {
  int most = 0;
  for (int units = 1; units <= Cluster::kMost; ++units) {
    const int shares = (kQueries + units - 1) / units * units;
    most = shares > most ? shares : most;
  }
  return most;
}();

template <int kD>
struct ShortShared {
  alignas(16) Partials<kD> partials;
  float o[kMostShares][kD];
  float2 m_and_l[kMostShares];
  Task task;
};

// Block (unit of a cluster, head and `tiles` of queries, item). REQUIRES: every item resets and finishes, and has a
// unit at least and no more than a cluster has blocks.
template <int kD>
__global__ void __launch_bounds__(kThreads, 1)
    ShortKernel(const __grid_constant__ AttendArgs a, const __grid_constant__ UnitWindow window,
                uint32_t tiles) {
  extern __shared__ __align__(16) uint8_t memory[];
  auto& shared = *reinterpret_cast<ShortShared<kD>*>(memory);
  Cluster::Begin();
  const auto thread = static_cast<int>(threadIdx.x);
  const int warp = thread / kWarp;
  if (warp == 0) {
    LookUp<kD>(
        a, window, static_cast<int32_t>(blockIdx.z),
        [&](const ItemUnits&) -> TaskOfItem {
          return {blockIdx.y / tiles, blockIdx.x, blockIdx.y % tiles};
        },
        shared.task);
  }
  __syncthreads();
  const Task& task = shared.task;
  const Keys& keys = task.keys[warp];
  WarpBlock<kD> block(a);
  // As in unit_attention.cu: keys of earlier steps are on their way before it is waited for this one's.
  const bool early = keys.pos + keys.count <= task.item.first_pos;
  if (!early) BeginDependent();
  block.StartKeys(keys);
  if (early) BeginDependent();

  const Work work(a, task.item);
  const uint32_t units = task.units;
  const uint32_t whole = units - (work.end_pos() % kUnitTokens != 0 ? 1 : 0);
  // Of the tile's.
  const uint32_t queries = task.exists ? static_cast<uint32_t>(work.num_queries()) - task.query : 0;
  if (task.exists) {
    block.LoadQueries(work, task.kv_head, task.query);
    block.TakeKeys();
    block.TakeValues(Keys());
    block.Store(shared.partials, warp);
  }
  __syncthreads();
  Cluster::AwaitBegun();
  constexpr int kColumns = kD * kQueries / kThreads;
  const auto its_query = static_cast<uint32_t>(thread * kQueries / kThreads);
  if (its_query < queries) {
    const uint32_t to = its_query % units;
    const uint32_t share = its_query / units * units + task.unit;
    FoldPartials<kD, kColumns>(
        shared.partials, static_cast<int>(its_query), thread % (kThreads / kQueries) * kColumns, nullptr,
        [&](int column, float2 pair) {
          Cluster::Store(reinterpret_cast<float2*>(&shared.o[share][column]), to, pair);
        },
        [&](float2 m_and_l) { Cluster::Store(&shared.m_and_l[share], to, m_and_l); });
  }
  Cluster::Sync();
  uint32_t first_share = 0;
  for (uint32_t query = task.unit; query < kQueries && query < queries; query += units) {
    for (int column = thread; column < kD; column += kThreads) {
      float its_o[Cluster::kMost];
      float2 m_and_l[Cluster::kMost];
#pragma unroll
      for (uint32_t unit = 0; unit < Cluster::kMost; ++unit) {
        if (unit >= units) break;
        its_o[unit] = shared.o[first_share + unit][column];
        m_and_l[unit] = shared.m_and_l[first_share + unit];
      }
      float o = 0, m = -CUDART_INF_F, l = 0;
#pragma unroll
      for (uint32_t unit = 0; unit < Cluster::kMost; ++unit) {
        if (unit >= units) break;
        if (unit < whole) {
          UnitWeights::Of(m, m_and_l[unit]).Fold(its_o[unit], o, l);
          m = fmaxf(m, m_and_l[unit].x);
        } else {
          const FoldWeights fold(m, l, m_and_l[unit].x, m_and_l[unit].y);
          o = fold(o, its_o[unit]);
          l = fold.l;
        }
      }
      StoreActivation(a.out, work.out(task.kv_head, task.query + query) + column,
                      __fmul_rn(o, 1.0f / l));
    }
    first_share += units;
  }
}

int64_t TilesOf(const UnitWindow& window) { return CeilDiv(window.queries, kQueries); }

}  // namespace

bool IsShort(const AttendArgs& a, const UnitWindow& window, int64_t units) {
  // About a multiprocessor for each block (a cluster is of one GPC, so that some may share); where there are more, the
  // blocks of UnitKernel, which draw units, do better.
  return RunsHopperCode() && units <= Cluster::kMost &&
         a.items.count * window.heads * TilesOf(window) * units <= Multiprocessors();
}

cudaError_t LaunchShortAttend(const AttendArgs& a, const UnitWindow& window, int64_t units,
                              cudaStream_t stream) {
  const auto tiles = static_cast<uint32_t>(TilesOf(window));
  const dim3 clusters(1, static_cast<unsigned>(window.heads) * tiles, static_cast<unsigned>(a.items.count));
  return ForHeadDim(a.head_dim, [&](auto d) {
    return LaunchClustersOn(stream, ShortKernel<d()>, clusters, static_cast<unsigned>(units), kThreads,
                            sizeof(ShortShared<d()>), a, window, tiles);
  });
}

cudaError_t LoadShortAttend() {
  HEADROOM_CUDA_RETURN_IF_ERROR(LoadDecodeKernel(ShortKernel<64>, sizeof(ShortShared<64>)));
  HEADROOM_CUDA_RETURN_IF_ERROR(LoadDecodeKernel(ShortKernel<128>, sizeof(ShortShared<128>)));
  return LoadDecodeKernel(ShortKernel<256>, sizeof(ShortShared<256>));
}

}  // namespace headroom::kernels::cuda::unit
