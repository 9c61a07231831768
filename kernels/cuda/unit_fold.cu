// The fold of what unit_attention.cu has computed of each unit of keys, in their order.
#include "kernels/cuda/tensor_core.cuh"
#include "kernels/cuda/unit_window.cuh"

namespace headroom::kernels::cuda::unit {
namespace {

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
      shared.weights[i * kLooks + n] = UnitWeights::Of(before, m_and_l[n]);
      before = fmaxf(before, m_and_l[n].x);
    }
    __syncthreads();
    const int count = whole - begin < kRound ? whole - begin : kRound;
    for (int first = 0; folds && first < count; first += kStageUnits) {
      __syncwarp();  // its lanes have read the stage that is fetched now
      fetch(begin + first + (kStages - 1) * kStageUnits);
      AwaitCopies<kStages - 1>();
      __syncwarp();
      const auto& stage = shared.o[warp][(begin + first) / kStageUnits % kStages];
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
        for (int n = 0; n < kSome; ++n) weights[n].Fold(its_o[n], o, l);
      }
      for (; k < kStageUnits && first + k < count; ++k) {
        shared.weights[first + k].Fold(stage[k][lane], o, l);
      }
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

template <int kD, int kColumns, bool kLong>
cudaError_t LoadFold() {
  return LoadDecodeKernel(FoldKernel<kD, kColumns, kLong>, sizeof(FoldShared<kD, kColumns, kLong>));
}
template <int kD>
cudaError_t Load() {
  HEADROOM_CUDA_RETURN_IF_ERROR((LoadFold<kD, kD, true>()));
  HEADROOM_CUDA_RETURN_IF_ERROR((LoadFold<kD, kLongColumns, true>()));
  return LoadFold<kD, kD, false>();
}

}  // namespace

cudaError_t LaunchUnitFold(const AttendArgs& a, const UnitWindow& window, int64_t units, bool whole,
                           cudaStream_t stream) {
  return ForHeadDim(a.head_dim, [&](auto d) {
    constexpr int kD = d();
    if (units <= kFewUnits) return LaunchFold<kD, kD, false>(a, window, stream);
    if (whole && units <= window.count) return LaunchFold<kD, kLongColumns, true>(a, window, stream);
    return LaunchFold<kD, kD, true>(a, window, stream);
  });
}

cudaError_t LoadUnitFold() {
  HEADROOM_CUDA_RETURN_IF_ERROR(Load<64>());
  HEADROOM_CUDA_RETURN_IF_ERROR(Load<128>());
  return Load<256>();
}

}  // namespace headroom::kernels::cuda::unit
