// A decode step's products and norms between two attentions as one kernel: the weights of all of them are one
// stream, which does not stop where one product ends and the next waits for its results.
//
// One block a multiprocessor. Two warps of it ask for the block's tiles of weights, those of one product
// after those of the other, by bulk copies into a ring of stages in shared memory, as far ahead as there is
// room. Eight others wait, where a product begins, until all blocks are done with the operation before it, and
// multiply what has come meanwhile. While they wait they take the next stages into registers, so that the ring
// goes on: with the ring's 96 KiB that is what HBM brings in some 4 us.
//
// Weights do not pass through L1, so that activations and the word that says how many blocks are done do
// not queue behind them (loads return in order: some 3 us).
//
// A tile is kRowTiles x 16 outputs of all rows. Sums have skinny_gemm.cu's order, and so its bits: pair i of
// slices of 32 k belongs to warp i % 8, a stage is a pair of each.
//
// Every block must be there for any to go on. They are: there is one for each multiprocessor and room for
// it beside kernels that end without waiting for it; those of this stream that may start early do so when all
// of its blocks have begun.
//
// A layer of Llama-3-8B (436 MB) takes 109.6 us of an H200 with one row, 124 with 16, where one operation
// after the other takes 112.7 and 142 (gpu_bench chain), and RoPE, which is one of them here, comes to that.
#include <type_traits>

#include "kernels/cuda/device_util.cuh"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/mbarrier.cuh"
#include "kernels/cuda/norm_row.cuh"
#include "kernels/cuda/tensor_core.cuh"

namespace headroom::kernels::cuda {
namespace {

constexpr int kWarps = 8;  // that multiply
constexpr int kThreads = kWarps * kWarp;
// Warps that ask for a share of every stage's rows. A warp's copies begin one after the other: with one a layer
// takes 155 us, with four, whose shares do not come at one time, 122.
constexpr int kAskers = 2;
// They are of a group of four, which can leave registers to the others.
constexpr int kBlockThreads = kThreads + 4 * kWarp;
constexpr int kSlice = 32;
constexpr int kPair = 2 * kSlice;
constexpr int kTurn = kWarps * kPair;  // k of a stage
// 64 bytes more than a multiple of 128: of 8 lanes that load 16 bytes each of two rows none meet in a bank.
constexpr int kPitch = kTurn * 2 + 64;
static_assert(kThreads == kNormThreads);

// Rows of activations up to which a chain is one kernel. Every block reads all of them.
constexpr int64_t kMostRows = 16;
// Results of a norm that every block computes for itself, rather than wait for others once more.
constexpr int64_t kOwnBytes = 16384;

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
  float sums[S::kSums][kWarps * S::kRows * S::kOutputs];  // of the tile: [warp][row][output]
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
__device__ uint32_t FirstTile(const Phase& phase) {
  return (blockIdx.x + gridDim.x - phase.first_block) % gridDim.x;
}
template <typename F>
__device__ void ForEachTile(const Phase& phase, F&& f) {
  for (uint32_t tile = FirstTile(phase); tile < phase.tiles; tile += gridDim.x) f(tile);
}

// A tile of two results each, a gate and what it gates or a pair of RoPE, has the first in the upper 8 rows of
// a row tile, the second in the lower ones.
__device__ bool InPairs(PhaseKind kind) {
  return kind == PhaseKind::kGated || kind == PhaseKind::kRotated;
}
__device__ bool IsNorm(PhaseKind kind) {
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

// Of each thread of a group of four warps; more are there when others have left some.
template <bool kMore, int kCount>
__device__ void SetRegisters() {
#if __CUDA_ARCH__ >= 900
  if constexpr (kMore) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" : : "n"(kCount));
  } else {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" : : "n"(kCount));
  }
#endif
}

// The warps that multiply, among themselves.
__device__ void SyncWarps() { asm volatile("bar.sync 1, %0;" : : "n"(kThreads) : "memory"); }

// What a block has written of an operation is there for those that come from Await() of it.
__device__ void Arrive(uint32_t* arrived) {
  SyncWarps();
  if (threadIdx.x != 0) return;
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" : : "l"(arrived) : "memory");
}
// Until all blocks have arrived. One warp asks: a thousand that did would keep the others' arrivals waiting.
template <typename S>
__device__ void Await(const uint32_t* arrived, uint32_t turn, Shared<S>& shared, Ring<S>& ring, Held<S>& held) {
  const bool asks = threadIdx.x < kWarp;
  for (bool done = false; !done;) {
    if (asks) {
      uint32_t blocks;
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(blocks) : "l"(arrived) : "memory");
      done = __shfl_sync(kFullMask, blocks, 0) == gridDim.x;
      if (done && threadIdx.x == 0) shared.may_go.Arrive();
    } else {
      done = __any_sync(kFullMask, shared.may_go.Test(turn));
    }
    held.Add(ring, false);
  }
  shared.may_go.Wait(turn);  // all lanes: what they read comes after it
}

// Result `pair` of row `row` of a product with q's, k's and v's weights: turned, to where it belongs.
__device__ void Rotate(const RopeAppendArgs& a, int32_t item_of_row, int row, uint32_t pair,
                       float first, float second) {
  const int32_t d = a.head_dim;
  const int32_t half = d / 2;
  const auto head = static_cast<int32_t>(pair) / half;
  const auto i = static_cast<int32_t>(pair) % half;
  float* const x = a.qkv + (int64_t{row} * (a.num_q_heads + 2 * a.num_kv_heads) + head) * d;
  if (item_of_row < 0) {  // as a product alone would
    x[i] = first;
    x[i + half] = second;
    return;
  }
  if (a.bias != nullptr) {
    first = __fadd_rn(first, Widen(a.bias[head * d + i]));
    second = __fadd_rn(second, Widen(a.bias[head * d + i + half]));
  }
  const int32_t kv_head = head - a.num_q_heads;
  float2 both = make_float2(first, second);
  if (kv_head < a.num_kv_heads) {
    const float* const cos_sin = a.cos_sin + int64_t{row} * d;
    both = Turned(first, second, cos_sin[i], cos_sin[half + i]);
  }
  if (kv_head < 0) {
    x[i] = both.x;
    x[i + half] = both.y;
    return;
  }
  const AppendItem& item = a.items.device[item_of_row];
  const int64_t pos = item.target.first_pos + (row - item.row_begin);
  auto* const to = reinterpret_cast<BFloat16*>(
      kv_head < a.num_kv_heads ? KeyRow(item.target, kv_head, pos, d)
                               : ValueRow(item.target, kv_head - a.num_kv_heads, pos, d));
  to[i] = RoundToBFloat16(both.x);
  to[i + half] = RoundToBFloat16(both.y);
}

// Which item of `rope` has each row of the batch.
template <typename S>
__device__ void FindItems(const RopeAppendArgs& rope, Shared<S>& shared) {
  const auto thread = static_cast<int>(threadIdx.x);
  if (thread < S::kRows) shared.item_of_row[thread] = -1;
  SyncWarps();
  for (int32_t i = thread; i < rope.items.count; i += kThreads) {
    const AppendItem& item = rope.items.device[i];
    for (int32_t row = item.row_begin; row < min(item.row_begin + item.target.count, S::kRows); ++row) {
      shared.item_of_row[row] = i;
    }
  }
  SyncWarps();
}

// A product: all of the block's tiles of it, of the first of which some is `held`. `activations` may be shared
// memory.
template <typename S>
__device__ void RunProduct(const Phase& phase, const BFloat16* activations, Ring<S>& ring, Held<S>& held,
                           Shared<S>& shared) {
  constexpr int kRowTiles = S::kRowTiles, kColumnTiles = S::kColumnTiles;
  const GemmArgs& g = phase.gemm;
  const auto thread = static_cast<int>(threadIdx.x);
  const int warp = thread / kWarp;
  const int quad = thread % kWarp / 4;
  const int pair = thread % 4;
  const auto depth = static_cast<int>(g.w.k);
  const auto rows = static_cast<int>(g.m);
  const bool in_pairs = InPairs(phase.kind);
  const int results = in_pairs ? S::kOutputs / 2 : S::kOutputs;  // of a tile
  const auto num_results = static_cast<uint32_t>(in_pairs ? g.w.n / 2 : g.w.n);
  const int its_k = ring.its_k();
  const BFloat16* const its_activations = activations + quad * g.a_stride + its_k;
  int which = 0;  // of the sums

  ForEachTile(phase, [&](uint32_t tile) {
    const uint32_t first_result = tile * static_cast<uint32_t>(results);
    // What the thread's results are added to, ahead of the end.
    constexpr int kMine = (S::kRows * S::kOutputs + kThreads - 1) / kThreads;
    float before[kMine] = {};
    if (g.accumulate) {
#pragma unroll
      for (int n = 0; n < kMine; ++n) {
        const int i = n * kThreads + thread;
        const int row = i / S::kOutputs;
        const uint32_t result = first_result + i % S::kOutputs;
        if (row < rows && result < num_results) before[n] = g.c.floats()[row * g.c_stride + result];
      }
    }
    // As many stages' activations, which come from L2 at first.
    constexpr int kAhead = S::kHeld;
    uint4 a[kAhead][2][kColumnTiles];
    const auto load = [&](uint4(&to)[2][kColumnTiles], int k) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int c = 0; c < kColumnTiles; ++c) {
          to[n][c] = make_uint4(0, 0, 0, 0);
          if (k + its_k + n * kSlice >= depth || c * 8 + quad >= rows) continue;
          to[n][c] = *reinterpret_cast<const uint4*>(its_activations + c * 8 * g.a_stride + k + n * kSlice);
        }
      }
    };
#pragma unroll
    for (int s = 0; s < kAhead; ++s) load(a[s], s * kTurn);
    float sum[kRowTiles][kColumnTiles][4] = {};
    for (int begin = 0; begin < depth; begin += kAhead * kTurn) {
#pragma unroll
      for (int s = 0; s < kAhead; ++s) {
        const int k = begin + s * kTurn;
        if (k >= depth) break;
        Weights<S> w;
        if (begin == 0 && s < held.count) {
          w = held.stages[s];
        } else {
          ring.Take(k, depth, w);
        }
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
          for (int c = 0; c < kColumnTiles; ++c) {
#pragma unroll
            for (int t = 0; t < kRowTiles; ++t) {
              const uint4 upper = w.of[n][t][0];
              const uint4 lower = w.of[n][t][1];
              Multiply(sum[t][c], {upper.x, lower.x, upper.y, lower.y}, a[s][n][c].x, a[s][n][c].y);
              Multiply(sum[t][c], {upper.z, lower.z, upper.w, lower.w}, a[s][n][c].z, a[s][n][c].w);
            }
          }
        }
        load(a[s], k + kAhead * kTurn);
      }
    }
    held.count = 0;

    float* const sums = shared.sums[which];
    if (S::kSums == 1) SyncWarps();  // the tile before has been added up
    which = (which + 1) % S::kSums;
#pragma unroll
    for (int t = 0; t < kRowTiles; ++t) {
#pragma unroll
      for (int c = 0; c < kColumnTiles; ++c) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = c * 8 + 2 * pair + i % 2;
          const int output = t * 16 + quad + i / 2 * 8;
          sums[(warp * S::kRows + row) * S::kOutputs + output] = sum[t][c][i];
        }
      }
    }
    SyncWarps();
    const auto total = [&](int row, int output) {
      float value = 0;
#pragma unroll
      for (int from = 0; from < kWarps; ++from) {
        value = __fadd_rn(value, sums[(from * S::kRows + row) * S::kOutputs + output]);
      }
      return value;
    };
    if (!in_pairs) {
#pragma unroll
      for (int n = 0; n < kMine; ++n) {
        const int i = n * kThreads + thread;
        const int row = i / S::kOutputs;
        const uint32_t result = first_result + i % S::kOutputs;
        if (row >= rows || result >= num_results) continue;
        const float value = total(row, i % S::kOutputs);
        StoreActivation(g.c, row * g.c_stride + result,
                        g.accumulate ? __fadd_rn(before[n], value) : value);
      }
      return;
    }
    for (int i = thread; i < rows * (S::kOutputs / 2); i += kThreads) {
      const int row = i / (S::kOutputs / 2);
      const int of_tile = i % (S::kOutputs / 2);
      const uint32_t result = first_result + static_cast<uint32_t>(of_tile);
      if (result >= num_results) continue;
      const int output = of_tile / 8 * 16 + of_tile % 8;
      const float first = total(row, output);
      const float second = total(row, output + 8);
      if (phase.kind == PhaseKind::kGated) {
        StoreActivation(g.c, row * g.c_stride + result, Gated(phase.activation, first, second));
      } else {
        Rotate(phase.rope, shared.item_of_row[row], row, result, first, second);
      }
    }
  });
}

// The depth of the block's first tile of the operations from `p` on.
__device__ int NextDepth(const Phases& a, int p) {
  for (; p < a.count; ++p) {
    const Phase& phase = a.phase[p];
    if (!IsNorm(phase.kind) && FirstTile(phase) < phase.tiles) return static_cast<int>(phase.gemm.w.k);
  }
  return 0;
}

// By the warps that multiply.
template <typename S>
__device__ void RunPhases(const Phases& a, Shared<S>& shared) {
  Ring<S> ring(shared);
  Held<S> held;
  held.depth = NextDepth(a, 0);
  for (int s = 0; s < S::kHeld; ++s) held.Add(ring, true);
  BeginDependent();
  uint32_t turn = 0;
  const auto await = [&](int p) {
    if (p > 0) Await(a.arrived + p - 1, turn++, shared, ring, held);
  };
  for (int p = 0; p < a.count; ++p) {
    const Phase& phase = a.phase[p];
    if (IsNorm(phase.kind)) {
      const NormRow norm(phase.norm, static_cast<int>(threadIdx.x));
      await(p);
      const bool own = phase.kind == PhaseKind::kOwnNorm;
      const Activations out = own ? Activations(shared.own) : phase.norm.out;
      for (int64_t row = own ? 0 : blockIdx.x; row < phase.norm.rows; row += own ? 1 : gridDim.x) {
        norm.Run(row, out, row * phase.norm.hidden, shared.of_warps, SyncWarps);
      }
      if (own) {
        SyncWarps();
      } else {
        Arrive(a.arrived + p);
      }
      continue;
    }
    const bool own = p > 0 && a.phase[p - 1].kind == PhaseKind::kOwnNorm;
    if (!own) await(p);
    if (phase.kind == PhaseKind::kRotated) FindItems(phase.rope, shared);
    RunProduct(phase, own ? shared.own : phase.gemm.a.bfloats(), ring, held, shared);
    Arrive(a.arrived + p);
    if (held.count == 0) held.depth = NextDepth(a, p + 1);
  }
  // The last block to leave: nobody waits any more.
  if (threadIdx.x == 0 && atomicAdd(a.arrived + Phases::kMost, 1) == gridDim.x - 1) {
    for (int i = 0; i <= Phases::kMost; ++i) a.arrived[i] = 0;
  }
}

template <typename S>
__global__ void __launch_bounds__(kBlockThreads, 1)
    ChainKernel(const __grid_constant__ Phases a) {
  extern __shared__ __align__(128) uint8_t memory[];
  auto& shared = *reinterpret_cast<Shared<S>*>(memory);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < S::kStages; ++stage) {
      shared.filled[stage].Init(kAskers);
      shared.free[stage].Init(kWarps);
    }
    shared.may_go.Init(1);
    MBarrier::InitDone();
  }
  __syncthreads();
  if (threadIdx.x >= kThreads) {
    if (S::kManyRegisters) SetRegisters<false, 56>();
    const int asker = static_cast<int>(threadIdx.x) / kWarp - kWarps;
    if (asker < kAskers) AskForWeights(a, shared, asker);
  } else {
    if (S::kManyRegisters) SetRegisters<true, 224>();
    RunPhases(a, shared);
  }
}

// ---- What a chain's operations come to.

int64_t RowsOf(const RmsNormArgs& norm) { return norm.rows; }
int64_t RowsOf(const GemmArgs& gemm) { return gemm.m; }
int64_t RowsOf(const GatedGemmArgs& gated) { return gated.gemm.m; }
int64_t RowsOf(const RopeAppendArgs& rope) { return rope.rows; }

// Products of whole rows that the kernel takes, whose count of outputs fits 32 bits.
bool Takes(const GemmArgs& gemm) {
  return IsSkinny(gemm) && gemm.w.n > 0 && gemm.w.n < (int64_t{1} << 31) &&
         (!gemm.accumulate || gemm.c.type == ElementType::kFloat32);
}

bool Takes(const GatedGemmArgs& gated) {
  return Takes(gated.gemm) && gated.gemm.w.n == 2 * gated.swiglu.width;
}

// Adds what `ops` begins with, one operation or a product and the one that its results go through; returns
// of how many it was, 0 if the kernel does not do it.
size_t AddPhase(const ChainOp* ops, size_t count, Phases& to) {
  if (to.count == Phases::kMost) return 0;
  Phase& phase = to.phase[to.count];
  phase = {};
  size_t taken = 1;
  if (const auto* norm = std::get_if<RmsNormArgs>(ops)) {
    if (norm->hidden > (int64_t{1} << 28)) return 0;
    phase.kind = PhaseKind::kNorm;
    phase.norm = *norm;
    // The product behind it may have it from every block's own hands.
    const auto* gemm = count > 1 ? std::get_if<GemmArgs>(ops + 1) : nullptr;
    const auto* gated = count > 1 ? std::get_if<GatedGemmArgs>(ops + 1) : nullptr;
    if (gated != nullptr && Takes(*gated)) gemm = &gated->gemm;
    if (gemm != nullptr && Takes(*gemm) && to.count + 1 < Phases::kMost && !norm->accumulate &&
        gemm->m == norm->rows && gemm->a.data == norm->out.data && gemm->a_stride == norm->hidden &&
        gemm->w.k == norm->hidden && norm->rows <= 8 && norm->rows * norm->hidden * 2 <= kOwnBytes) {
      phase.kind = PhaseKind::kOwnNorm;
    }
  } else if (const auto* gemm = std::get_if<GemmArgs>(ops)) {
    if (!Takes(*gemm)) return 0;
    phase.kind = PhaseKind::kProduct;
    phase.gemm = *gemm;
    const auto* rope = count > 1 ? std::get_if<RopeAppendArgs>(ops + 1) : nullptr;
    if (rope != nullptr && rope->qkv == gemm->c.data && !gemm->accumulate && rope->q_norm == nullptr &&
        rope->rows == gemm->m && rope->head_dim % 16 == 0 && gemm->c_stride == gemm->w.n &&
        gemm->w.n == int64_t{rope->num_q_heads + 2 * rope->num_kv_heads} * rope->head_dim) {
      phase.kind = PhaseKind::kRotated;
      phase.rope = *rope;
      taken = 2;
    }
  } else if (const auto* gated = std::get_if<GatedGemmArgs>(ops)) {
    if (!Takes(*gated)) return 0;
    phase.kind = PhaseKind::kGated;
    phase.activation = gated->swiglu.activation;
    phase.gemm = gated->gemm;
    phase.gemm.c = gated->swiglu.out;
    phase.gemm.c_stride = gated->swiglu.width;
  } else {
    return 0;
  }
  ++to.count;
  return taken;
}

size_t Collect(const ChainOp* ops, size_t count, Phases& phases) {
  phases.count = 0;
  const int64_t rows = count == 0 ? 0 : std::visit([](const auto& op) { return RowsOf(op); }, ops[0]);
  if (!RunsHopperCode() || rows < 1 || rows > kMostRows) return 0;
  size_t taken = 0;
  while (taken < count &&
         std::visit([](const auto& op) { return RowsOf(op); }, ops[taken]) == rows) {
    const size_t more = AddPhase(ops + taken, count - taken, phases);
    if (more == 0) break;
    taken += more;
  }
  return taken;
}

template <int kRowTiles, int kColumnTiles>
cudaError_t Launch(Phases& phases, cudaStream_t stream) {
  using S = Shape<kRowTiles, kColumnTiles>;
  const auto blocks = static_cast<uint32_t>(Multiprocessors());
  uint32_t next = 0;
  for (int p = 0; p < phases.count; ++p) {
    Phase& phase = phases.phase[p];
    const bool in_pairs = phase.kind == PhaseKind::kGated || phase.kind == PhaseKind::kRotated;
    phase.first_block = next;
    phase.tiles = static_cast<uint32_t>(
        in_pairs ? CeilDiv(phase.gemm.w.n / 2, S::kOutputs / 2) : CeilDiv(phase.gemm.w.n, S::kOutputs));
    next = (next + phase.tiles) % blocks;
  }
  return LaunchDependentOn(stream, ChainKernel<S>, dim3(blocks), kBlockThreads, sizeof(Shared<S>),
                           phases);
}

}  // namespace

size_t ChainLength(const ChainOp* ops, size_t count) {
  Phases phases;
  return Collect(ops, count, phases);
}

cudaError_t LaunchChain(const ChainOp* ops, size_t count, uint32_t* words, cudaStream_t stream) {
  Phases phases;
  if (count == 0 || Collect(ops, count, phases) != count) return cudaErrorInvalidValue;
  phases.arrived = words;
  const int64_t rows = std::visit([](const auto& op) { return RowsOf(op); }, ops[0]);
  return rows <= 8 ? Launch<1, 1>(phases, stream) : Launch<2, 2>(phases, stream);
}

cudaError_t LoadChain() {
  HEADROOM_CUDA_RETURN_IF_ERROR((LoadDecodeKernel(ChainKernel<Shape<1, 1>>, sizeof(Shared<Shape<1, 1>>))));
  return LoadDecodeKernel(ChainKernel<Shape<2, 2>>, sizeof(Shared<Shape<2, 2>>));
}

}  // namespace headroom::kernels::cuda
