// A chain's operations as its kernel has them (chain.cu), and the way of their weights: asked for by one thread of
// a block, into a ring in shared memory, from there to the registers of the warps that multiply.
#ifndef HEADROOM_KERNELS_CUDA_CHAIN_WEIGHTS_CUH_
#define HEADROOM_KERNELS_CUDA_CHAIN_WEIGHTS_CUH_

#include <cuda.h>

#include "kernels/chain.h"
#include "kernels/cuda/device_util.cuh"
#include "kernels/cuda/few_row_sums.cuh"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/mbarrier.cuh"
#include "kernels/cuda/norm_row.cuh"

namespace headroom::kernels::cuda::chain {

inline constexpr int kThreads = kSumWarps * kWarp;  // that multiply
// One thread behind them asks for weights. Its warp is of a group of four, which can leave registers to the others.
inline constexpr int kBlockThreads = kThreads + 4 * kWarp;
static_assert(kThreads == kNormThreads);

// Rows of activations up to which a chain is one kernel. Every block reads all of them.
inline constexpr int64_t kMostRows = 16;
// Results of a norm that every block computes for itself, rather than wait for others once more.
inline constexpr int64_t kOwnBytes = 16384;

enum class PhaseKind : int32_t { kNorm, kOwnNorm, kProduct, kGated, kRotated };

// One operation, or a product and what its results go through.
struct Phase {
  CUtensorMap weights;  // a product's; see kBoxBytes
  PhaseKind kind;
  GateActivation activation;
  uint32_t tiles;
  uint32_t first_block;  // which has the first tile
  // A product may begin before the one whose results it reads has ended, since both go through them in ascending
  // order: once all blocks are done with the first `tiles_ahead` tiles of the operation before, which are its
  // first `k_ahead` k. 0: it begins when they are done with all.
  uint32_t tiles_ahead;
  int32_t k_ahead;
  RmsNormArgs norm;
  GemmArgs gemm;
  RopeAppendArgs rope;
};

struct Phases {
  static constexpr int kMost = 8;
  // Blocks that are done with operation p: [2 * p], with those of its tiles that are ahead of the next one's
  // beginning: [2 * p + 1]. Behind them those that have left.
  uint32_t* arrived;
  int32_t count;
  uint32_t zero;  // 0, which the compiler does not know
  Phase phase[kMost];
};
static_assert(sizeof(Phases) <= 32764, "parameters of a kernel");
static_assert(kChainWords > 2 * Phases::kMost);

// A box is what one copy brings: a turn of k of 16 rows of weights, 128 bytes of each for every warp,
// [warp][row][64 k]. The copy engine writes the 16 bytes of place c of row r to place c ^ r % 8
// (CU_TENSOR_MAP_SWIZZLE_128B, which wants boxes aligned to 1 KiB).
//
// To it a matrix is [k / 64][heads][2][rows][64 k]; the rows of a box are 16 that follow each other, or 8 from
// each of two halves (InPairs()), of each head where that is what is turned.
inline constexpr int kBoxRows = 16;
inline constexpr int kBoxBytes = kBoxRows * kTurn * 2;

template <int kRowTiles_, int kColumnTiles_>
struct Shape {
  static constexpr int kRowTiles = kRowTiles_, kColumnTiles = kColumnTiles_;
  static constexpr int kOutputs = kRowTiles * 16;  // rows of weights
  static constexpr int kRows = kColumnTiles * 8;   // of activations
  static constexpr int kStages = kRowTiles == 1 ? 6 : 3;
  static constexpr int kHeld = kRowTiles == 1 ? 4 : 2;  // stages in registers
  static constexpr int kSums = kColumnTiles == 1 ? 2 : 1;
  static constexpr int64_t kOwnElements = kColumnTiles == 1 ? kOwnBytes / 2 : 1;
};

template <typename S>
struct Shared {
  uint8_t weights[S::kStages][S::kRowTiles][kBoxBytes];
  float sums[S::kSums][kSumWarps * S::kRows * S::kOutputs];  // of the tile: [warp][row][output]
  alignas(16) BFloat16 own[S::kOwnElements];              // of a norm
  MBarrier filled[S::kStages];
  MBarrier free[S::kStages];
  MBarrier may_go[2];  // by turns, which are what all blocks are done with
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
HEADROOM_HOST_DEVICE inline bool InPairs(PhaseKind kind) {
  return kind == PhaseKind::kGated || kind == PhaseKind::kRotated;
}
HEADROOM_HOST_DEVICE inline bool IsNorm(PhaseKind kind) {
  return kind == PhaseKind::kNorm || kind == PhaseKind::kOwnNorm;
}

// By one thread: asks for all weights, in the order in which RunProduct() takes them. What lies behind the last
// row or k comes as zeros.
template <typename S>
__device__ void AskForWeights(const Phases& a, Shared<S>& shared) {
  Place<S::kStages> place;
  for (int p = 0; p < a.count; ++p) {
    const Phase& phase = a.phase[p];
    if (IsNorm(phase.kind)) continue;
    const auto depth = static_cast<int>(phase.gemm.w.k);
    const int rows = InPairs(phase.kind) ? kBoxRows / 2 : kBoxRows;  // of each half
    const int half = phase.kind == PhaseKind::kRotated ? phase.rope.head_dim / 2 : INT32_MAX;
    ForEachTile(phase, [&](uint32_t tile) {
      TensorElement at[S::kRowTiles];
#pragma unroll
      for (int t = 0; t < S::kRowTiles; ++t) {
        const int row = (static_cast<int>(tile) * S::kRowTiles + t) * rows;
        at[t] = {0, row % half, 0, row / half, 0};
      }
      for (int k = 0; k < depth; k += kTurn) {
        if (place.turn > 0) shared.free[place.stage].Wait(place.turn - 1);
        MBarrier& filled = shared.filled[place.stage];
        filled.ArriveExpecting(S::kRowTiles * kBoxBytes);
#pragma unroll
        for (int t = 0; t < S::kRowTiles; ++t) {
          at[t].v = k / kPair;
          filled.TensorCopy(shared.weights[place.stage][t], phase.weights, at[t]);
        }
        place.Next();
      }
    });
  }
}

// Which of 8 rows of weights the lanes of a quad have: 8 lanes that load 16 bytes each at one time are two quads,
// whose rows' places must differ in the upper bit (kBoxBytes) to lie in different banks.
__device__ inline int RowOfQuad(int quad) { return (quad & 1) << 2 | (quad & 2) | quad >> 2; }

// A lane's part of a stage of weights.
template <typename S>
struct Weights {
  uint4 of[2][S::kRowTiles][2];  // slices; row tiles; their upper and lower 8 rows
};

// The stages that a warp takes one after the other.
template <typename S>
class Ring {
 public:
  __device__ Ring(const Phases& a, Shared<S>& shared)
      : shared_(shared),
        zero_(a.zero),
        lane_(static_cast<int>(threadIdx.x) % kWarp),
        its_k_(static_cast<int>(threadIdx.x) / kWarp * kPair + lane_ % 4 * 8),
        its_place_(PlaceOf(static_cast<int>(threadIdx.x) / kWarp, RowOfQuad(lane_ / 4), lane_ % 4)) {}

  // The lane's first k of a stage.
  __device__ int its_k() const { return its_k_; }
  __device__ bool HasNext() const {
    return __any_sync(kFullMask, shared_.filled[place_.stage].Test(place_.turn));
  }
  // Waits for the next stage, takes it and gives its memory back.
  __device__ void Take(Weights<S>& to) {
    shared_.filled[place_.stage].Wait(place_.turn);
#pragma unroll
    for (int t = 0; t < S::kRowTiles; ++t) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint8_t* const rows = shared_.weights[place_.stage][t] + h * (kBoxRows / 2 * kPair * 2);
        to.of[0][t][h] = *reinterpret_cast<const uint4*>(rows + its_place_);
        to.of[1][t][h] = *reinterpret_cast<const uint4*>(rows + (its_place_ ^ kSlice * 2));
      }
    }
    // As soon as the stage is free a copy may overwrite it, and copies do not wait for loads: the barrier's address
    // hangs on all that they bring. (A fence of the two, fence.proxy.async, waits for activations, too. With neither,
    // chains whose weights lie in L2 have a wrong row now and then.)
    uint32_t brought = 0;
#pragma unroll
    for (int t = 0; t < S::kRowTiles; ++t) {
      brought ^= to.of[0][t][0].x ^ to.of[0][t][1].x ^ to.of[1][t][0].x ^ to.of[1][t][1].x;
    }
    __syncwarp();
    if (lane_ == 0) shared_.free[place_.stage].Arrive(brought & zero_);
    place_.Next();
  }

 private:
  // Of the 16 bytes `column` of what `warp` has of a row.
  __device__ static int PlaceOf(int warp, int row, int column) {
    return (warp * kBoxRows + row) * kPair * 2 + (column ^ row) * 16;
  }

  Shared<S>& shared_;
  const uint32_t zero_;
  const int lane_;
  const int its_k_;
  const int its_place_;  // of its first slice in a box; the second's differs by a bit
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
    ring.Take(w);
#pragma unroll
    for (int s = 0; s < S::kHeld; ++s) {
      if (s == count) stages[s] = w;
    }
    ++count;
  }
};

}  // namespace headroom::kernels::cuda::chain

#endif  // HEADROOM_KERNELS_CUDA_CHAIN_WEIGHTS_CUH_
