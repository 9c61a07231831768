// The order of the sums of products of few rows, which a decode step's bits hang on, wherever they are computed
// (skinny_gemm.cu, chain.cu): pair i of slices of 32 k belongs to warp i % kSumWarps, which adds up its slices
// in ascending order; the warps' sums are added in the order of the warps. So a row's bits depend on its own
// activations only, however many rows there are and whichever tiles are chosen.
#ifndef HEADROOM_KERNELS_CUDA_FEW_ROW_SUMS_CUH_
#define HEADROOM_KERNELS_CUDA_FEW_ROW_SUMS_CUH_

#include "kernels/cuda/device_util.cuh"
#include "kernels/cuda/tensor_core.cuh"

namespace headroom::kernels::cuda {

inline constexpr int kSumWarps = 8;
inline constexpr int kSlice = 32;
inline constexpr int kPair = 2 * kSlice;         // 128 bytes of a row of weights
inline constexpr int kTurn = kSumWarps * kPair;  // after which the first warp's turn comes again

// Adds the slice of which the lane has 16 bytes of two rows of weights, 8 apart, and of a row of activations:
// the order of k within a slice is free as long as both agree.
__device__ inline void AddSlice(float (&sum)[4], uint4 upper, uint4 lower,
                                uint4 activations) {
  Multiply(sum, {upper.x, lower.x, upper.y, lower.y}, activations.x, activations.y);
  Multiply(sum, {upper.z, lower.z, upper.w, lower.w}, activations.z, activations.w);
}

// A warp's sums of kRowTiles x 16 outputs and kColumnTiles x 8 rows to `sums`, [warp][row][output].
template <int kRowTiles, int kColumnTiles>
__device__ void StoreSums(const float (&sum)[kRowTiles][kColumnTiles][4], int warp, int quad, int pair,
                          float* sums) {
#pragma unroll
  for (int t = 0; t < kRowTiles; ++t) {
#pragma unroll
    for (int c = 0; c < kColumnTiles; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = c * 8 + 2 * pair + i % 2;
        const int output = t * 16 + quad + i / 2 * 8;
        sums[(warp * kColumnTiles * 8 + row) * kRowTiles * 16 + output] = sum[t][c][i];
      }
    }
  }
}

// All warps' of one output, of `kRows` x `kOutputs` stored ones.
template <int kRows, int kOutputs>
__device__ float TotalOf(const float* sums, int row, int output) {
  float value = 0;
#pragma unroll
  for (int from = 0; from < kSumWarps; ++from) {
    value = __fadd_rn(value, sums[(from * kRows + row) * kOutputs + output]);
  }
  return value;
}

}  // namespace headroom::kernels::cuda

#endif  // HEADROOM_KERNELS_CUDA_FEW_ROW_SUMS_CUH_
