// A chain's operations as its kernel has them (chain.cu), and the way of their weights: asked for by some warps of
// a block, into a ring in shared memory, from there to the registers of those that multiply.
#ifndef HEADROOM_KERNELS_CUDA_CHAIN_WEIGHTS_CUH_
#define HEADROOM_KERNELS_CUDA_CHAIN_WEIGHTS_CUH_

#include "kernels/chain.h"
#include "kernels/cuda/device_util.cuh"
#include "kernels/cuda/few_row_sums.cuh"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/mbarrier.cuh"
#include "kernels/cuda/norm_row.cuh"

namespace headroom::kernels::cuda::chain {

inline constexpr int kThreads = kSumWarps * kWarp;  // that multiply
// Warps that ask for a share of every stage's rows. A warp's copies begin one after the other: with one a layer
// takes 155 us, with four, whose shares do not come at one time, 122.
inline constexpr int kAskers = 2;
// They are of a group of four, which can leave registers to the others.
inline constexpr int kBlockThreads = kThreads + 4 * kWarp;
// A stage is a turn of k. 64 bytes more than a multiple of 128: of 8 lanes that load 16 bytes each of two rows
// none meet in a bank.
inline constexpr int kPitch = kTurn * 2 + 64;
static_assert(kThreads == kNormThreads);

// Rows of activations up to which a chain is one kernel. Every block reads all of them.
inline constexpr int64_t kMostRows = 16;
// Results of a norm that every block computes for itself, rather than wait for others once more.
inline constexpr int64_t kOwnBytes = 16384;

enum class PhaseKind : int32_t { kNorm, kOwnNorm, kProduct, kGated, kRotated };

// One operation, or a product and what its results go through.
struct Phase {
  PhaseKind kind;
  GateActivation activation;
  uint32_t tiles;
  uint32_t first_block;  // which has the first tile
  RmsNormArgs norm;
  GemmArgs gemm;
  RopeAppendArgs rope;
};

struct Phases {
  static constexpr int kMost = 8;
  uint32_t* arrived;  // [kMost], then `left`: blocks that are done
  int32_t count;
  Phase phase[kMost];
};
static_assert(sizeof(Phases) <= 4096, "parameters of a kernel");
static_assert(kChainWords > Phases::kMost);

template <int kRowTiles_, int kColumnTiles_>
struct Shape {
  static constexpr int kRowTiles = kRowTiles_, kColumnTiles = kColumnTiles_;
  static constexpr int kOutputs = kRowTiles * 16;  // rows of weights
  static constexpr int kRows = kColumnTiles * 8;   // of activations
  static constexpr int kStages = kRowTiles == 1 ? 6 : 3;
  static constexpr int kHeld = kRowTiles == 1 ? 4 : 2;  // stages in registers
  static constexpr bool kManyRegisters = kRowTiles > 1;
  static constexpr int kSums = kColumnTiles == 1 ? 2 : 1;
  static constexpr int64_t kOwnElements = kColumnTiles == 1 ? kOwnBytes / 2 : 1;
};

template <typename S>
struct Shared {
  uint8_t weights[S::kStages][S::kOutputs][kPitch];
  float sums[S::kSums][kSumWarps * S::kRows * S::kOutputs];  // of the tile: [warp][row][output]
  alignas(16) BFloat16 own[S::kOwnElements];              // of a norm
  MBarrier filled[S::kStages];
  MBarrier free[S::kStages];
  MBarrier may_go;  // turns are operations that all blocks are done with
  float of_warps[kWarp];
  int32_t item_of_row[S::kRows];
};

// A block's place in the ring.
template <int kStages>
struct Place {
  int stage = 0;
  uint32_t turn = 0;
  __device__ void Next() {
    if (++stage < kStages) return;
    stage = 0;
    ++turn;
  }
};

// Tiles of a phase: block b has every gridDim.x-th. A phase begins with the block that comes after the last
// one's, so that all have the same share of a chain.
__device__ inline uint32_t FirstTile(const Phase& phase) {
  return (blockIdx.x + gridDim.x - phase.first_block) % gridDim.x;
}
template <typename F>
__device__ void ForEachTile(const Phase& phase, F&& f) {
  for (uint32_t tile = FirstTile(phase); tile < phase.tiles; tile += gridDim.x) f(tile);
}

// A tile of two results each, a gate and what it gates or a pair of RoPE, has the first in the upper 8 rows of
// a row tile, the second in the lower ones.
__device__ inline bool InPairs(PhaseKind kind) {
  return kind == PhaseKind::kGated || kind == PhaseKind::kRotated;
}
__device__ inline bool IsNorm(PhaseKind kind) {
  return kind == PhaseKind::kNorm || kind == PhaseKind::kOwnNorm;
}

// The row of the weights of output `i` of a tile. Those past the end repeat the last.
template <typename S>
__device__ int64_t WeightRow(const Phase& phase, uint32_t tile, int i) {
  const auto n = static_cast<uint32_t>(phase.gemm.w.n);
  if (!InPairs(phase.kind)) return min(tile * S::kOutputs + i, n - 1);
  const uint32_t pair = min(tile * (S::kOutputs / 2) + i / 16 * 8 + i % 8, n / 2 - 1);
  const uint32_t second = i / 8 % 2;
  if (phase.kind == PhaseKind::kGated) return pair + second * (n / 2);
  const auto half = static_cast<uint32_t>(phase.rope.head_dim / 2);
  return pair / half * (2 * half) + pair % half + second * half;
}

// By warp `asker` of those that do: asks for its share of all weights, in the order in which RunProduct() takes
// them.
template <typename S>
__device__ void AskForWeights(const Phases& a, Shared<S>& shared, int asker) {
  constexpr int kShare = S::kOutputs / kAskers;
  static_assert(kShare <= kWarp);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int output = asker * kShare + lane % kShare;
  Place<S::kStages> place;
  for (int p = 0; p < a.count; ++p) {
    const Phase& phase = a.phase[p];
    if (IsNorm(phase.kind)) continue;
    const auto depth = static_cast<int>(phase.gemm.w.k);
    ForEachTile(phase, [&](uint32_t tile) {
      const BFloat16* const row = phase.gemm.w.data + WeightRow<S>(phase, tile, output) * depth;
      for (int k = 0; k < depth; k += kTurn) {
        if (place.turn > 0) shared.free[place.stage].Wait(place.turn - 1);
        const auto bytes = static_cast<uint32_t>(min(kTurn, depth - k)) * 2;
        MBarrier& filled = shared.filled[place.stage];
        if (lane == 0) filled.ArriveExpecting(bytes * kShare);
        __syncwarp();
        if (lane < kShare) filled.BulkCopy(shared.weights[place.stage][output], row + k, bytes);
        place.Next();
      }
    });
  }
}

// A lane's part of a stage of weights.
template <typename S>
struct Weights {
  uint4 of[2][S::kRowTiles][2];  // slices; row tiles; their upper and lower 8 rows
};

// The stages that a warp takes one after the other.
template <typename S>
class Ring {
 public:
  __device__ explicit Ring(Shared<S>& shared)
      : shared_(shared),
        lane_(static_cast<int>(threadIdx.x) % kWarp),
        its_k_(static_cast<int>(threadIdx.x) / kWarp * kPair + lane_ % 4 * 8) {}

  // The lane's first k of a stage.
  __device__ int its_k() const { return its_k_; }
  __device__ bool HasNext() const {
    return __any_sync(kFullMask, shared_.filled[place_.stage].Test(place_.turn));
  }
  // Waits for the next stage, takes it and gives its memory back. It begins with `k` of `depth`; what is behind
  // is zero.
  __device__ void Take(int k, int depth, Weights<S>& to) {
    shared_.filled[place_.stage].Wait(place_.turn);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const bool inside = k + its_k_ + n * kSlice < depth;
#pragma unroll
      for (int t = 0; t < S::kRowTiles; ++t) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const uint8_t* const row = shared_.weights[place_.stage][t * 16 + h * 8 + lane_ / 4];
          to.of[n][t][h] = *reinterpret_cast<const uint4*>(row + (its_k_ + n * kSlice) * 2);
          if (!inside) to.of[n][t][h] = make_uint4(0, 0, 0, 0);
        }
      }
    }
    __syncwarp();
    if (lane_ == 0) shared_.free[place_.stage].Arrive();
    place_.Next();
  }

 private:
  Shared<S>& shared_;
  const int lane_;
  const int its_k_;
  Place<S::kStages> place_;
};

// The first stages of the block's next tile, in registers: what comes while it cannot be multiplied yet finds
// more room than the ring has.
template <typename S>
struct Held {
  Weights<S> stages[S::kHeld];
  int count = 0;
  int depth = 0;  // of the tile; 0: there is none

  // One more if there is one and room for it; with `wait` also one that is on its way.
  __device__ void Add(Ring<S>& ring, bool wait) {
    if (count == S::kHeld || count * kTurn >= depth || !(wait || ring.HasNext())) return;
    Weights<S> w;
    ring.Take(count * kTurn, depth, w);
#pragma unroll
    for (int s = 0; s < S::kHeld; ++s) {
      if (s == count) stages[s] = w;
    }
    ++count;
  }
};

}  // namespace headroom::kernels::cuda::chain

#endif  // HEADROOM_KERNELS_CUDA_CHAIN_WEIGHTS_CUH_
