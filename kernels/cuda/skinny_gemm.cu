// Products of up to kFewGemmRows rows: a decode step's. The weights are streamed once, and that is the
// time it takes.
//
// A block computes kRowTiles x 16 outputs of all rows. Its 8 warps take turns at pairs of slices of 32 k
// (few_row_sums.cuh).
//
// Weights go from memory straight into the fragments of m16n8k16 products, weights being the left
// operand: the order of k within a slice is free as long as both operands agree, so that a lane loads 16
// contiguous bytes of a weight row and of an activation row. A lane has kSlots slices in flight and asks
// for the next as soon as it has used one: 32 KiB a block, where HBM3 wants some 25 KiB a multiprocessor.
// The first are asked for before the kernel waits for the one before it, whose results they do not need;
// blocks are small, so that they find room beside the last ones of that kernel.
#include "kernels/cuda/device_util.cuh"
#include "kernels/cuda/few_row_sums.cuh"
#include "kernels/cuda/kernels.h"

namespace headroom::kernels::cuda {
namespace {

constexpr int kWarps = kSumWarps;
constexpr int kThreads = kWarps * kWarp;
// How far the n-th of a warp's slices is from its first.
HEADROOM_HOST_DEVICE constexpr int OffsetOf(int n) { return n / 2 * kTurn + n % 2 * kSlice; }

// Not kept in L1, where nothing of it is wanted again.
__device__ uint4 LoadOnce(const BFloat16* from) {
  uint4 value;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(from));
  return value;
}

// Of gated products the upper 8 rows of a row tile are gates, the lower ones what they gate.
// kPerSm: blocks that a multiprocessor has at once, where it is up to us.
template <int kRowTiles, int kColumnTiles, bool kGated, int kPerSm>
struct Shape {
  static constexpr int kOutputs = kRowTiles * 16;
  static constexpr int kResults = kGated ? kOutputs / 2 : kOutputs;
  static constexpr int kRows = kColumnTiles * 8;
  static constexpr int kSharedBytes = kWarps * kOutputs * kRows * static_cast<int>(sizeof(float));
  // 64, 80 or 128 registers a thread; of one row what they hold beside 32 is on its way.
  static constexpr int kBlocks = kRowTiles * kColumnTiles == 1 ? kPerSm : 2;
  static constexpr int kSlots = kRowTiles * kColumnTiles > 1 ? (kColumnTiles <= 2 ? 4 : 2)
                                : kPerSm == 4               ? 4
                                : kPerSm == 3               ? 6
                                                            : 8;
};

// g.c has kResults outputs a block: with kGated as many as half of the weights' rows, and it is out of
// act(gate) * up (kernels/swiglu.h).
template <int kRowTiles, int kColumnTiles, bool kGated, int kPerSm>
__global__ void __launch_bounds__(kThreads, Shape<kRowTiles, kColumnTiles, kGated, kPerSm>::kBlocks)
    SkinnyKernel(const __grid_constant__ GemmArgs g, GateActivation activation) {
  using S = Shape<kRowTiles, kColumnTiles, kGated, kPerSm>;
  extern __shared__ __align__(16) float sums[];  // [warp][row][output]
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int quad = lane / 4;
  const int pair = lane % 4;
  constexpr int kSlots = S::kSlots;
  const auto depth = static_cast<int>(g.w.k);
  const int64_t num_results = kGated ? g.w.n / 2 : g.w.n;
  const int64_t first_result = int64_t{blockIdx.x} * S::kResults;
  const int first_k = warp * kPair + pair * 8;  // of the lane

  // A lane's two rows of each tile; those that do not exist repeat the last. Counted in 16 bytes: addresses
  // took registers that slices want (16 sequences of 4K: 7.44 ms a step on one H200, for 7.29 on another).
  uint32_t weights[kRowTiles][2];
#pragma unroll
  for (int t = 0; t < kRowTiles; ++t) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      int64_t row = first_result + (kGated ? t * 8 : t * 16 + h * 8) + quad;
      if (row >= num_results) row = num_results - 1;
      if (kGated && h == 1) row += num_results;
      weights[t][h] = static_cast<uint32_t>((row * depth + first_k) / 8);
    }
  }
  uint4 w[kSlots][kRowTiles][2];
  // The lane's part of the slice `steps` after the one that `weights` point to, which is at `k`.
  const auto load = [&](uint4(&slot)[kRowTiles][2], int k, int steps) {
    const bool inside = k + OffsetOf(steps) < depth;
#pragma unroll
    for (int t = 0; t < kRowTiles; ++t) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const BFloat16* const from = g.w.data + int64_t{weights[t][h]} * 8 + OffsetOf(steps);
        slot[t][h] = inside ? LoadOnce(from) : make_uint4(0, 0, 0, 0);
      }
    }
  };
#pragma unroll
  for (int s = 0; s < kSlots; ++s) load(w[s], first_k, s);

  BeginDependent();
  // What the thread's first result is added to, where there are registers for it: the latency of L2 less at
  // the end.
  constexpr bool kEarly = !kGated && kRowTiles * kColumnTiles == 1;
  const auto thread = static_cast<int>(threadIdx.x);
  const auto exists = [&](int i) {
    return i / S::kResults < g.m && first_result + i % S::kResults < num_results;
  };
  const auto place = [&](int i) {
    return i / S::kResults * g.c_stride + first_result + i % S::kResults;
  };
  float before = 0;
  if (kEarly && g.accumulate && exists(thread)) before = g.c.floats()[place(thread)];

  const BFloat16* activations = g.a.bfloats() + quad * g.a_stride + first_k;
  float sum[kRowTiles][kColumnTiles][4] = {};
  // Lanes of a warp end together: what lies past `depth` is zero.
  for (int k = first_k; k - pair * 8 < depth; k += OffsetOf(kSlots)) {
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
#pragma unroll
      for (int c = 0; c < kColumnTiles; ++c) {
        uint4 a = make_uint4(0, 0, 0, 0);
        if (k + OffsetOf(s) < depth && c * 8 + quad < g.m) {
          a = *reinterpret_cast<const uint4*>(activations + c * 8 * g.a_stride + OffsetOf(s));
        }
#pragma unroll
        for (int t = 0; t < kRowTiles; ++t) {
          AddSlice(sum[t][c], w[s][t][0], w[s][t][1], a);
        }
      }
      load(w[s], k, kSlots + s);
    }
#pragma unroll
    for (int t = 0; t < kRowTiles; ++t) {
      weights[t][0] += OffsetOf(kSlots) / 8;
      weights[t][1] += OffsetOf(kSlots) / 8;
    }
    activations += OffsetOf(kSlots);
  }

  StoreSums(sum, warp, quad, pair, sums);
  __syncthreads();
  const auto total = [&](int row, int output) {
    return TotalOf<S::kRows, S::kOutputs>(sums, row, output);
  };
  for (int i = thread; i < S::kRows * S::kResults; i += kThreads) {
    if (!exists(i)) continue;
    const int row = i / S::kResults;
    const int result = i % S::kResults;
    float value;
    if constexpr (kGated) {
      const int gate = result / 8 * 16 + result % 8;
      value = Gated(activation, total(row, gate), total(row, gate + 8));
    } else {
      value = total(row, result);
      if (g.accumulate) {
        value = __fadd_rn(kEarly && i == thread ? before : g.c.floats()[place(i)], value);
      }
    }
    StoreActivation(g.c, place(i), value);
  }
}

template <int kRowTiles, int kColumnTiles, bool kGated, int kPerSm>
cudaError_t Launch(const GemmArgs& g, GateActivation activation, cudaStream_t stream) {
  using S = Shape<kRowTiles, kColumnTiles, kGated, kPerSm>;
  const dim3 grid(static_cast<unsigned>(CeilDiv(kGated ? g.w.n / 2 : g.w.n, S::kResults)));
  return LaunchDependentOn(stream, SkinnyKernel<kRowTiles, kColumnTiles, kGated, kPerSm>, grid, kThreads,
                           S::kSharedBytes, g, activation);
}

template <int kRowTiles, int kColumnTiles, bool kGated, int kPerSm>
cudaError_t Load() {
  return LoadDecodeKernel(SkinnyKernel<kRowTiles, kColumnTiles, kGated, kPerSm>,
                          Shape<kRowTiles, kColumnTiles, kGated, kPerSm>::kSharedBytes);
}

// Of one row: no more blocks to a multiprocessor than there are for each. The first that is done with the
// kernel before would take four of a few, and others get one: 14.5 us for 384 blocks on an H200, for 17.7.
template <bool kGated>
cudaError_t LaunchFew(const GemmArgs& g, GateActivation activation, cudaStream_t stream) {
  const int64_t blocks = CeilDiv(kGated ? g.w.n / 2 : g.w.n, Shape<1, 1, kGated, 4>::kResults);
  const int64_t multiprocessors = Multiprocessors();
  if (blocks <= 2 * multiprocessors) return Launch<1, 1, kGated, 2>(g, activation, stream);
  if (blocks <= 3 * multiprocessors) return Launch<1, 1, kGated, 3>(g, activation, stream);
  return Launch<1, 1, kGated, 4>(g, activation, stream);
}

// Of more rows, more outputs a block: each reads all rows' activations.
template <bool kGated>
cudaError_t LaunchFor(const GemmArgs& args, GateActivation activation, cudaStream_t stream) {
  if (args.m <= 8) return LaunchFew<kGated>(args, activation, stream);
  if (args.m <= 16) return Launch<2, 2, kGated, 2>(args, activation, stream);
  if (args.m <= 32) return Launch<2, 4, kGated, 2>(args, activation, stream);
  return Launch<2, 8, kGated, 2>(args, activation, stream);
}

template <bool kGated>
cudaError_t LoadAll() {
  HEADROOM_CUDA_RETURN_IF_ERROR((Load<1, 1, kGated, 2>()));
  HEADROOM_CUDA_RETURN_IF_ERROR((Load<1, 1, kGated, 3>()));
  HEADROOM_CUDA_RETURN_IF_ERROR((Load<1, 1, kGated, 4>()));
  HEADROOM_CUDA_RETURN_IF_ERROR((Load<2, 2, kGated, 2>()));
  HEADROOM_CUDA_RETURN_IF_ERROR((Load<2, 4, kGated, 2>()));
  return Load<2, 8, kGated, 2>();
}

}  // namespace

bool IsSkinny(const GemmArgs& g) {
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  return g.m <= kFewGemmRows && g.w.k > 0 && g.w.k % 8 == 0 && g.a_stride % 8 == 0 &&
         g.w.n <= int64_t{8} * UINT32_MAX / g.w.k &&
         g.a.type == ElementType::kBFloat16 && aligned(g.a.data) && aligned(g.w.data);
}

cudaError_t LaunchSkinnyGemm(const GemmArgs& args, cudaStream_t stream) {
  return LaunchFor<false>(args, GateActivation::kSilu, stream);
}

cudaError_t LaunchGatedGemm(const GatedGemmArgs& args, cudaStream_t stream) {
  GemmArgs g = args.gemm;
  if (g.m == 0) return cudaSuccess;
  g.c = args.swiglu.out;
  g.c_stride = args.swiglu.width;
  return LaunchFor<true>(g, args.swiglu.activation, stream);
}

cudaError_t LoadSkinnyGemm() {
  HEADROOM_CUDA_RETURN_IF_ERROR(LoadAll<false>());
  return LoadAll<true>();
}

}  // namespace headroom::kernels::cuda
