// A decode step's products and norms between two attentions as one kernel: the weights of all of them are one
// stream, which does not stop where one product ends and the next waits for its results.
//
// One block a multiprocessor. A thread of it asks for the block's tiles of weights, those of one product
// after those of the other, by tensor copies into a ring of stages in shared memory, as far ahead as there is
// room. Eight warps wait, where a product begins, until all blocks are done with the operation before it, and
// multiply what has come meanwhile. While they wait they take the next stages into registers, so that the ring
// goes on: with the ring's 96 KiB that is what HBM brings in some 5 us. A product whose activations are another's
// results does not wait where it begins, but before it comes to those that the last tiles give (LetBeginAhead()).
//
// Weights do not pass through L1, so that activations and the word that says how many blocks are done do
// not queue behind them: loads return in order. One copy a stage: of 16, one a row, two warps were needed to ask, and
// 16 rows of activations took 2% longer.
//
// A tile is kRowTiles x 16 outputs of all rows. Sums have skinny_gemm.cu's order (few_row_sums.cuh), and so its
// bits. What the operations are, and the weights' way to the warps: chain_weights.cuh.
//
// Every block must be there for any to go on. They are: there is one for each multiprocessor and room for
// it beside kernels that end without waiting for it; those of this stream that may start early do so when all
// of its blocks have begun.
//
// A layer of Llama-3-8B (436 MB) takes 108.3 us of an H200 with one row, 121 with 16, where one operation
// after the other takes 114.2 and 142 (gpu_bench chain), and RoPE, which is one of them here, comes to that.
#include "kernels/cuda/chain_weights.cuh"
#include "kernels/cuda/device_util.cuh"
#include "kernels/cuda/few_row_sums.cuh"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/norm_row.cuh"

namespace headroom::kernels::cuda {
namespace {

using namespace chain;  // NOLINT: its other half

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
// Until all blocks have arrived; calls meanwhile() meanwhile. One warp asks: a thousand that did would keep the others'
// arrivals waiting. `turn` counts a block's calls, of which every second has SyncWarps() before it.
template <typename S, typename F>
__device__ void Await(const uint32_t* arrived, uint32_t turn, Shared<S>& shared, F&& meanwhile) {
  MBarrier& may_go = shared.may_go[turn % 2];
  const bool asks = threadIdx.x < kWarp;
  for (bool done = false; !done;) {
    if (asks) {
      uint32_t blocks;
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(blocks) : "l"(arrived) : "memory");
      done = __shfl_sync(kFullMask, blocks, 0) == gridDim.x;
      if (done && threadIdx.x == 0) may_go.Arrive();
    } else {
      done = __any_sync(kFullMask, may_go.Test(turn / 2));
    }
    meanwhile();
  }
  may_go.Wait(turn / 2);  // all lanes: what they read comes after it
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
// memory. Calls await_rest() before it reads more than k_ahead of them; `ahead` counts the blocks that are done with
// what the next product begins with.
template <typename S, typename F>
__device__ void RunProduct(const Phase& phase, const BFloat16* activations, Ring<S>& ring, Held<S>& held,
                           Shared<S>& shared, uint32_t* ahead, F&& await_rest) {
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
  constexpr int kAll = INT32_MAX / 2;
  int k_ahead = phase.k_ahead > 0 ? phase.k_ahead : kAll;  // of the activations

  const auto run = [&](uint32_t tile) {
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
    // As many stages' activations, which come from L2 at first. Of rows that do not exist, zeros; behind the last k
    // those of before, which weights of zero are multiplied with: what is infinite there is NaN then, in a row
    // that is not finite anyhow, since these activations are its own.
    constexpr int kAhead = S::kHeld;
    uint4 a[kAhead][2][kColumnTiles] = {};
    const auto load = [&](uint4(&to)[2][kColumnTiles], int k) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int c = 0; c < kColumnTiles; ++c) {
          if (k + its_k + n * kSlice >= depth || c * 8 + quad >= rows) continue;
          to[n][c] = *reinterpret_cast<const uint4*>(its_activations + c * 8 * g.a_stride + k + n * kSlice);
        }
      }
    };
#pragma unroll
    for (int s = 0; s < kAhead; ++s) load(a[s], s * kTurn);
    float sum[kRowTiles][kColumnTiles][4] = {};
    for (int begin = 0; begin < depth; begin += kAhead * kTurn) {
      if (begin + 2 * kAhead * kTurn > k_ahead) {
        await_rest();
        k_ahead = kAll;
      }
#pragma unroll
      for (int s = 0; s < kAhead; ++s) {
        const int k = begin + s * kTurn;
        if (k >= depth) break;
        Weights<S> w;
        if (begin == 0 && s < held.count) {
          w = held.stages[s];
        } else {
          ring.Take(w);
        }
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
          for (int c = 0; c < kColumnTiles; ++c) {
#pragma unroll
            for (int t = 0; t < kRowTiles; ++t) {
              AddSlice(sum[t][c], w.of[n][t][0], w.of[n][t][1], a[s][n][c]);
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
    StoreSums(sum, warp, RowOfQuad(quad), pair, sums);
    SyncWarps();
    const auto total = [&](int row, int output) {
      return TotalOf<S::kRows, S::kOutputs>(sums, row, output);
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
  };
  ForEachTile(phase, [&](uint32_t tile) {
    run(tile);
    if (tile < phase.tiles_ahead && tile + gridDim.x >= phase.tiles_ahead) Arrive(ahead);
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
  Ring<S> ring(a, shared);
  Held<S> held;
  held.depth = NextDepth(a, 0);
  for (int s = 0; s < S::kHeld; ++s) held.Add(ring, true);
  BeginDependent();
  uint32_t turn = 0;
  const auto await = [&](const uint32_t* arrived) {
    Await(arrived, turn++, shared, [&] { held.Add(ring, false); });
  };
  for (int p = 0; p < a.count; ++p) {
    const Phase& phase = a.phase[p];
    const uint32_t* const before = p > 0 ? a.arrived + 2 * (p - 1) : nullptr;
    uint32_t* const arrived = a.arrived + 2 * p;
    if (IsNorm(phase.kind)) {
      const NormRow norm(phase.norm, static_cast<int>(threadIdx.x));
      if (before != nullptr) await(before);
      const bool own = phase.kind == PhaseKind::kOwnNorm;
      const Activations out = own ? Activations(shared.own) : phase.norm.out;
      for (int64_t row = own ? 0 : blockIdx.x; row < phase.norm.rows; row += own ? 1 : gridDim.x) {
        norm.Run(row, out, row * phase.norm.hidden, shared.of_warps, SyncWarps);
      }
      if (own) {
        SyncWarps();
      } else {
        Arrive(arrived);
      }
      continue;
    }
    const bool own = p > 0 && a.phase[p - 1].kind == PhaseKind::kOwnNorm;
    if (!own && before != nullptr) await(before + (phase.k_ahead > 0));
    if (phase.kind == PhaseKind::kRotated) FindItems(phase.rope, shared);
    RunProduct(phase, own ? shared.own : phase.gemm.a.bfloats(), ring, held, shared, arrived + 1,
               [&] { Await(before, turn++, shared, [] {}); });
    Arrive(arrived);
    if (held.count == 0) held.depth = NextDepth(a, p + 1);
  }
  // The last block to leave: nobody waits any more.
  if (threadIdx.x == 0 && atomicAdd(a.arrived + 2 * Phases::kMost, 1) == gridDim.x - 1) {
    for (int i = 0; i <= 2 * Phases::kMost; ++i) a.arrived[i] = 0;
  }
}

template <typename S>
__global__ void __launch_bounds__(kBlockThreads, 1)
    ChainKernel(const __grid_constant__ Phases a) {
  extern __shared__ __align__(1024) uint8_t memory[];
  auto& shared = *reinterpret_cast<Shared<S>*>(memory);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < S::kStages; ++stage) {
      shared.filled[stage].Init(1);
      shared.free[stage].Init(kSumWarps);
    }
    for (MBarrier& may_go : shared.may_go) may_go.Init(1);
    MBarrier::InitDone();
  }
  __syncthreads();
  if (threadIdx.x >= kThreads) {
    SetRegisters<false, 56>();
    if (threadIdx.x == kThreads) AskForWeights(a, shared);
  } else {
    SetRegisters<true, 224>();
    RunPhases(a, shared);
  }
}

// ---- What a chain's operations come to.

int64_t RowsOf(const RmsNormArgs& norm) { return norm.rows; }
int64_t RowsOf(const GemmArgs& gemm) { return gemm.m; }
int64_t RowsOf(const GatedGemmArgs& gated) { return gated.gemm.m; }
int64_t RowsOf(const RopeAppendArgs& rope) { return rope.rows; }

// Products that the kernel takes: of whole boxes' columns, whose count of outputs fits 32 bits.
bool Takes(const GemmArgs& gemm) {
  return IsSkinny(gemm) && gemm.w.k % kPair == 0 && gemm.w.n > 0 && gemm.w.n < (int64_t{1} << 31) &&
         (!gemm.accumulate || gemm.c.type == ElementType::kFloat32);
}

bool Takes(const GatedGemmArgs& gated) {
  return Takes(gated.gemm) && gated.gemm.w.n == 2 * gated.swiglu.width;
}

// Whether every block may compute for itself what `norm` gives `gemm`, which follows it.
bool MayBeOwn(const RmsNormArgs& norm, const GemmArgs& gemm) {
  return !norm.accumulate && gemm.m == norm.rows && gemm.a.data == norm.out.data && gemm.a_stride == norm.hidden &&
         gemm.w.k == norm.hidden && norm.rows <= 8 && norm.rows * norm.hidden * 2 <= kOwnBytes;
}

// Whether what comes out of `gemm` may go through `rope`, which follows it, on its way.
bool MayBeRotated(const GemmArgs& gemm, const RopeAppendArgs& rope) {
  return rope.qkv == gemm.c.data && !gemm.accumulate && rope.q_norm == nullptr && rope.rows == gemm.m &&
         rope.head_dim % 16 == 0 && gemm.c_stride == gemm.w.n &&
         gemm.w.n == int64_t{rope.num_q_heads + 2 * rope.num_kv_heads} * rope.head_dim;
}

// What `ops` begins with, as the kernel has it: an operation, or a product and the one that its results go through.
// No operations: the kernel does not do the first.
struct Group {
  PhaseKind kind = PhaseKind::kNorm;
  size_t ops = 0;
};
Group FirstGroup(const ChainOp* ops, size_t count) {
  const ChainOp* const second = count > 1 ? ops + 1 : nullptr;
  if (const auto* norm = std::get_if<RmsNormArgs>(ops)) {
    if (norm->hidden > (int64_t{1} << 28)) return {};
    const auto* gemm = std::get_if<GemmArgs>(second);
    const auto* gated = std::get_if<GatedGemmArgs>(second);
    const bool own = (gemm != nullptr && Takes(*gemm) && MayBeOwn(*norm, *gemm)) ||
                     (gated != nullptr && Takes(*gated) && MayBeOwn(*norm, gated->gemm));
    return {own ? PhaseKind::kOwnNorm : PhaseKind::kNorm, 1};
  }
  if (const auto* gemm = std::get_if<GemmArgs>(ops)) {
    if (!Takes(*gemm)) return {};
    const auto* rope = std::get_if<RopeAppendArgs>(second);
    if (rope != nullptr && MayBeRotated(*gemm, *rope)) return {PhaseKind::kRotated, 2};
    return {PhaseKind::kProduct, 1};
  }
  const auto* gated = std::get_if<GatedGemmArgs>(ops);
  return gated != nullptr && Takes(*gated) ? Group{PhaseKind::kGated, 1} : Group();
}

Phase PhaseOf(PhaseKind kind, const ChainOp* ops) {
  Phase phase = {};
  phase.kind = kind;
  if (IsNorm(kind)) {
    phase.norm = std::get<RmsNormArgs>(*ops);
  } else if (kind == PhaseKind::kGated) {
    const auto& gated = std::get<GatedGemmArgs>(*ops);
    phase.activation = gated.swiglu.activation;
    phase.gemm = gated.gemm;
    phase.gemm.c = gated.swiglu.out;
    phase.gemm.c_stride = gated.swiglu.width;
  } else {
    phase.gemm = std::get<GemmArgs>(*ops);
    if (kind == PhaseKind::kRotated) phase.rope = std::get<RopeAppendArgs>(ops[1]);
  }
  return phase;
}

// The driver's function that describes a tensor to the copy engine; null where it has none.
decltype(&cuTensorMapEncodeTiled) EncodeTiled() {
  static const auto function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000,
                                                               cudaEnableDefault, &result);
    const bool there = error == cudaSuccess && result == cudaDriverEntryPointSuccess;
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(there ? found : nullptr);
  }();
  return function;
}

// A product's weights as kBoxBytes has them.
cudaError_t DescribeWeights(Phase& phase) {
  const PackedWeight& w = phase.gemm.w;
  const auto row_bytes = static_cast<cuuint64_t>(w.k) * sizeof(BFloat16);
  const auto n = static_cast<cuuint64_t>(w.n);
  const bool in_pairs = InPairs(phase.kind);
  const cuuint64_t halves = in_pairs ? 2 : 1;
  const cuuint64_t heads =
      phase.kind == PhaseKind::kRotated ? n / static_cast<cuuint64_t>(phase.rope.head_dim) : 1;
  const cuuint64_t rows = n / halves / heads;
  const cuuint64_t sizes[] = {kPair, rows, halves, heads, static_cast<cuuint64_t>(w.k / kPair)};
  const cuuint64_t strides[] = {row_bytes, rows * row_bytes, halves * rows * row_bytes, kPair * sizeof(BFloat16)};
  const cuuint32_t box[] = {kPair, static_cast<cuuint32_t>(kBoxRows / halves), static_cast<cuuint32_t>(halves), 1,
                            kSumWarps};
  const cuuint32_t steps[] = {1, 1, 1, 1, 1};
  const CUresult result = EncodeTiled()(
      &phase.weights, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 5, const_cast<BFloat16*>(w.data), sizes, strides, box, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

int64_t RowsOf(const ChainOp& op) {
  return std::visit([](const auto& args) { return RowsOf(args); }, op);
}

// Calls f(kind, its operations) for each phase of those operations that `ops` begins with and one kernel does;
// returns of how many operations it was.
template <typename F>
size_t ForEachPhase(const ChainOp* ops, size_t count, F&& f) {
  const int64_t rows = count == 0 ? 0 : RowsOf(ops[0]);
  if (!RunsHopperCode() || EncodeTiled() == nullptr || rows < 1 || rows > kMostRows) return 0;
  size_t taken = 0;
  for (int phase = 0; phase < Phases::kMost && taken < count && RowsOf(ops[taken]) == rows; ++phase) {
    Group group = FirstGroup(ops + taken, count - taken);
    if (group.ops == 0) break;
    // A norm of every block's own is for the product behind it.
    if (group.kind == PhaseKind::kOwnNorm && phase + 1 == Phases::kMost) group.kind = PhaseKind::kNorm;
    f(group.kind, ops + taken);
    taken += group.ops;
  }
  return taken;
}

// Lets a product begin before the one that gives it its activations has ended, where that is long enough.
// The last round of tiles is where the blocks wait for each other; one more is time for the word of it.
template <typename S>
void LetBeginAhead(Phase& phase, Phase& before, uint32_t blocks) {
  const GemmArgs& gemm = phase.gemm;
  const GemmArgs& from = before.gemm;
  if (IsNorm(before.kind) || before.kind == PhaseKind::kRotated || gemm.a.data != from.c.data ||
      gemm.a_stride != from.c_stride || gemm.c.data == from.c.data) {
    return;
  }
  const uint32_t rounds = static_cast<uint32_t>(CeilDiv(before.tiles, blocks));
  if (rounds < 3) return;
  const uint32_t tiles = (rounds - 2) * blocks;
  const int64_t k = int64_t{tiles} * (InPairs(before.kind) ? S::kOutputs / 2 : S::kOutputs);
  if (k < 2 * S::kHeld * kTurn || k >= gemm.w.k) return;  // of which it loads so many before it looks
  before.tiles_ahead = tiles;
  phase.k_ahead = static_cast<int32_t>(k);
}

template <int kRowTiles, int kColumnTiles>
cudaError_t Launch(Phases& phases, cudaStream_t stream) {
  using S = Shape<kRowTiles, kColumnTiles>;
  const auto blocks = static_cast<uint32_t>(Multiprocessors());
  uint32_t next = 0;
  for (int p = 0; p < phases.count; ++p) {
    Phase& phase = phases.phase[p];
    if (IsNorm(phase.kind)) continue;
    HEADROOM_CUDA_RETURN_IF_ERROR(DescribeWeights(phase));
    const bool in_pairs = InPairs(phase.kind);
    phase.first_block = next;
    phase.tiles = static_cast<uint32_t>(
        in_pairs ? CeilDiv(phase.gemm.w.n / 2, S::kOutputs / 2) : CeilDiv(phase.gemm.w.n, S::kOutputs));
    next = (next + phase.tiles) % blocks;
    if (p > 0) LetBeginAhead<S>(phase, phases.phase[p - 1], blocks);
  }
  return LaunchDependentOn(stream, ChainKernel<S>, dim3(blocks), kBlockThreads, sizeof(Shared<S>),
                           phases);
}

}  // namespace

size_t ChainLength(const ChainOp* ops, size_t count) {
  return ForEachPhase(ops, count, [](PhaseKind, const ChainOp*) {});
}

cudaError_t LaunchChain(const ChainOp* ops, size_t count, uint32_t* words, cudaStream_t stream) {
  Phases phases;
  phases.arrived = words;
  phases.count = 0;
  phases.zero = 0;
  const size_t taken = ForEachPhase(ops, count, [&](PhaseKind kind, const ChainOp* its_ops) {
    phases.phase[phases.count++] = PhaseOf(kind, its_ops);
  });
  if (count == 0 || taken != count) return cudaErrorInvalidValue;
  return RowsOf(ops[0]) <= 8 ? Launch<1, 1>(phases, stream) : Launch<2, 2>(phases, stream);
}

cudaError_t LoadChain() {
  HEADROOM_CUDA_RETURN_IF_ERROR((LoadDecodeKernel(ChainKernel<Shape<1, 1>>, sizeof(Shared<Shape<1, 1>>))));
  return LoadDecodeKernel(ChainKernel<Shape<2, 2>>, sizeof(Shared<Shape<2, 2>>));
}

}  // namespace headroom::kernels::cuda
