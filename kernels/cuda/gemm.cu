// Products that no faster way takes: of few rows whose length is no multiple of 8 (skinny_gemm.cu takes
// the others), of many where there is no cuBLASLt.
//
// An output is one chain of m16n8k16 products over ascending k, then the old c where `accumulate` is
// set. Both tile shapes keep that order, so that a row's bits do not depend on the batch. Tiles of A and
// W go through shared memory, several stages ahead.
#include "kernels/cuda/device_util.cuh"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/tensor_core.cuh"

namespace headroom::kernels::cuda {
namespace {

// Shape of a block: it computes kM x kN outputs in kWarpsM x kWarpsN warps.
template <int kM_, int kN_, int kK_, int kWarpsM_, int kWarpsN_, int kStages_>
struct Tiling {
  static constexpr int kM = kM_, kN = kN_, kK = kK_;
  static constexpr int kWarpsM = kWarpsM_, kWarpsN = kWarpsN_;
  static constexpr int kStages = kStages_;
  static constexpr int kThreads = kWarpsM * kWarpsN * kWarp;
  static constexpr int kMmaM = kM / kWarpsM / 16;  // products of a warp
  static constexpr int kMmaN = kN / kWarpsN / 8;
  // Rows are padded so that the lanes of a fragment's load meet 32 different banks.
  static constexpr int kStride = kK + 8;
  static constexpr int kBytesA = kM * kStride * 2;
  static constexpr int kBytesW = kN * kStride * 2;
  static constexpr int kSharedBytes = kStages * (kBytesA + kBytesW);
};
using Middle = Tiling<64, 64, 32, 2, 2, 4>;
using Wide = Tiling<128, 128, 32, 2, 4, 3>;

// Rows [row, row + kRows) x columns [column, column + kColumns) of a [num_rows, num_columns]
// matrix to shared memory; what lies outside becomes zero. 16 bytes at once where kVector (rows
// and columns are multiples of 16 bytes).
template <int kRows, int kColumns, int kStride, int kThreads, bool kVector>
__device__ void LoadTile(const BFloat16* matrix, int64_t stride, int64_t row, int64_t num_rows,
                         int64_t column, int64_t num_columns, BFloat16* shared) {
  constexpr int kPerCopy = kVector ? 8 : 1;
  constexpr int kPerRow = kColumns / kPerCopy;
  for (int i = threadIdx.x; i < kRows * kPerRow; i += kThreads) {
    const int64_t r = row + i / kPerRow;
    const int64_t c = column + i % kPerRow * kPerCopy;
    BFloat16* const to = shared + i / kPerRow * kStride + i % kPerRow * kPerCopy;
    const bool inside = r < num_rows && c < num_columns;
    if constexpr (kVector) {
      CopyAsync16(to, inside ? matrix + r * stride + c : matrix, inside ? 16 : 0);
    } else {
      *to = inside ? matrix[r * stride + c] : BFloat16();
    }
  }
}

template <typename T, bool kVector>
__global__ void __launch_bounds__(T::kThreads) GemmKernel(GemmArgs g) {
  extern __shared__ __align__(16) uint8_t shared[];
  auto* const shared_a = reinterpret_cast<BFloat16*>(shared);
  auto* const shared_w = reinterpret_cast<BFloat16*>(shared + T::kStages * T::kBytesA);
  const int64_t row = int64_t{blockIdx.y} * T::kM;
  const int64_t column = int64_t{blockIdx.x} * T::kN;
  const int64_t steps = (g.w.k + T::kK - 1) / T::kK;
  const auto load = [&](int64_t step) {
    if (step < steps) {
      const auto stage = static_cast<int>(step % T::kStages);
      LoadTile<T::kM, T::kK, T::kStride, T::kThreads, kVector>(
          g.a.bfloats(), g.a_stride, row, g.m, step * T::kK, g.w.k,
          shared_a + stage * T::kM * T::kStride);
      LoadTile<T::kN, T::kK, T::kStride, T::kThreads, kVector>(
          g.w.data, g.w.k, column, g.w.n, step * T::kK, g.w.k,
          shared_w + stage * T::kN * T::kStride);
    }
    CommitCopies();  // also when empty: groups are counted
  };

  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int quad = lane / 4;
  const int pair = lane % 4;
  const int warp_row = warp / T::kWarpsN * (T::kMmaM * 16);
  const int warp_column = warp % T::kWarpsN * (T::kMmaN * 8);
  float sum[T::kMmaM][T::kMmaN][4] = {};

  for (int stage = 0; stage < T::kStages - 1; ++stage) load(stage);
  for (int64_t step = 0; step < steps; ++step) {
    AwaitCopies<T::kStages - 2>();
    __syncthreads();  // the stage is complete, and the one before is no longer read
    load(step + T::kStages - 1);
    const auto stage = static_cast<int>(step % T::kStages);
    const BFloat16* const a = shared_a + stage * T::kM * T::kStride;
    const BFloat16* const w = shared_w + stage * T::kN * T::kStride;
#pragma unroll
    for (int k = 0; k < T::kK; k += 16) {
      uint32_t b[T::kMmaN][2];
#pragma unroll
      for (int n = 0; n < T::kMmaN; ++n) {
        const BFloat16* const from = w + (warp_column + n * 8 + quad) * T::kStride + k + 2 * pair;
        b[n][0] = *reinterpret_cast<const uint32_t*>(from);
        b[n][1] = *reinterpret_cast<const uint32_t*>(from + 8);
      }
#pragma unroll
      for (int m = 0; m < T::kMmaM; ++m) {
        const BFloat16* const from = a + (warp_row + m * 16 + quad) * T::kStride + k + 2 * pair;
        uint32_t fragment[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {  // rows quad, quad + 8; then the same of columns + 8
          fragment[i] =
              *reinterpret_cast<const uint32_t*>(from + i % 2 * 8 * T::kStride + i / 2 * 8);
        }
#pragma unroll
        for (int n = 0; n < T::kMmaN; ++n) Multiply(sum[m][n], fragment, b[n][0], b[n][1]);
      }
    }
  }

#pragma unroll
  for (int m = 0; m < T::kMmaM; ++m) {
#pragma unroll
    for (int n = 0; n < T::kMmaN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t r = row + warp_row + m * 16 + quad + i / 2 * 8;
        const int64_t c = column + warp_column + n * 8 + 2 * pair + i % 2;
        if (r >= g.m || c >= g.w.n) continue;
        const int64_t at = r * g.c_stride + c;
        const float value = sum[m][n][i];
        StoreActivation(g.c, at, g.accumulate ? __fadd_rn(g.c.floats()[at], value) : value);
      }
    }
  }
}

int64_t Blocks(const GemmArgs& g, int64_t rows, int64_t columns) {
  return CeilDiv(g.m, rows) * CeilDiv(g.w.n, columns);
}

template <typename T>
cudaError_t Launch(GemmArgs g, cudaStream_t stream) {
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  const bool vector =
      g.w.k % 8 == 0 && g.a_stride % 8 == 0 && aligned(g.a.data) && aligned(g.w.data);
  void (*const kernel)(GemmArgs) = vector ? GemmKernel<T, true> : GemmKernel<T, false>;
  constexpr int64_t kMaxRows = int64_t{65535} * T::kM;  // of a grid's second dimension
  const int64_t m = g.m;
  for (int64_t row = 0; row < m; row += kMaxRows) {
    g.m = m - row < kMaxRows ? m - row : kMaxRows;
    const dim3 grid(static_cast<unsigned>(CeilDiv(g.w.n, T::kN)),
                    static_cast<unsigned>(CeilDiv(g.m, T::kM)));
    HEADROOM_CUDA_RETURN_IF_ERROR(LaunchOn(stream, kernel, grid, T::kThreads, T::kSharedBytes, g));
    g.a.data = g.a.bfloats() + kMaxRows * g.a_stride;
    g.c.data = static_cast<uint8_t*>(g.c.data) +
               kMaxRows * g.c_stride * ElementBytes(g.c.type);
  }
  return cudaSuccess;
}

template <typename T>
cudaError_t Load() {
  HEADROOM_CUDA_RETURN_IF_ERROR(LoadKernel(GemmKernel<T, true>, T::kSharedBytes));
  return LoadKernel(GemmKernel<T, false>, T::kSharedBytes);
}

}  // namespace

cudaError_t LaunchGemm(const GemmArgs& args, cudaStream_t stream) {
  if (args.m == 0 || args.w.n == 0) return cudaSuccess;
  if (args.a.type != ElementType::kBFloat16 ||
      (args.accumulate && args.c.type != ElementType::kFloat32)) {
    return cudaErrorInvalidValue;
  }
  if (IsSkinny(args)) return LaunchSkinnyGemm(args, stream);
  // Wide tiles reuse more, where there are enough of them for a wave of some hundred
  // multiprocessors.
  constexpr int64_t kWave = 100;
  if (Blocks(args, Wide::kM, Wide::kN) < kWave) return Launch<Middle>(args, stream);
  return Launch<Wide>(args, stream);
}

cudaError_t LoadGemm() {
  HEADROOM_CUDA_RETURN_IF_ERROR(LoadSkinnyGemm());
  HEADROOM_CUDA_RETURN_IF_ERROR(Load<Middle>());
  return Load<Wide>();
}

}  // namespace headroom::kernels::cuda
