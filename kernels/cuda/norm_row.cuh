// RMSNorm of one row by kNormThreads threads: the same sums, in the same order, wherever it is done.
#ifndef HEADROOM_KERNELS_CUDA_NORM_ROW_CUH_
#define HEADROOM_KERNELS_CUDA_NORM_ROW_CUH_

#include "kernels/cuda/device_util.cuh"
#include "kernels/rms_norm.h"

namespace headroom::kernels::cuda {

inline constexpr int kNormThreads = 256;

// What a thread has of every row's weights, which no kernel writes: on their way from the beginning.
class NormRow {
 public:
  __device__ NormRow(const RmsNormArgs& args, int thread)
      : a_(args),
        thread_(thread),
        hidden_(static_cast<int>(args.hidden)),
        kept_(hidden_ % 4 == 0 ? min(hidden_ / 4, kVectors * kNormThreads) : 0) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int i = v * kNormThreads + thread_;
      if (i < kept_) w_[v] = *reinterpret_cast<const uint2*>(a_.weight + i * 4);
    }
  }

  // Row `row` of the result to `out`, element `at` and those behind it. By all threads; `sync` makes them
  // wait for each other, `shared` has room for kWarp floats, and calls may share it.
  template <typename Sync>
  __device__ void Run(int64_t row, const Activations& out, int64_t at, float* shared, Sync&& sync) const {
    const int64_t from = a_.row_index.device != nullptr ? a_.row_index.device[row] : row;
    const float* const x = a_.x + from * hidden_;
    float4 values[kVectors];
    float sum = 0;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int i = v * kNormThreads + thread_;
      values[v] = i < kept_ ? reinterpret_cast<const float4*>(x)[i] : make_float4(0, 0, 0, 0);
    }
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      sum = __fmaf_rn(values[v].x, values[v].x, sum);
      sum = __fmaf_rn(values[v].y, values[v].y, sum);
      sum = __fmaf_rn(values[v].z, values[v].z, sum);
      sum = __fmaf_rn(values[v].w, values[v].w, sum);
    }
#pragma unroll 1
    for (int i = kept_ * 4 + thread_; i < hidden_; i += kNormThreads) sum = __fmaf_rn(x[i], x[i], sum);
    sum = BlockReduce(sum, 0.0f, Sum(), shared, kNormThreads / kWarp, sync);
    const float scale = 1.0f / sqrtf(sum / static_cast<float>(a_.hidden) + a_.epsilon);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int i = v * kNormThreads + thread_;
      if (i >= kept_) continue;
      const float offset = a_.weight_offset;
      float4 value = make_float4(values[v].x * scale * (WidenLow(w_[v].x) + offset),
                                 values[v].y * scale * (WidenHigh(w_[v].x) + offset),
                                 values[v].z * scale * (WidenLow(w_[v].y) + offset),
                                 values[v].w * scale * (WidenHigh(w_[v].y) + offset));
      if (a_.accumulate) {
        const float4 before = Load4(out, at + i * 4);
        value = make_float4(before.x + value.x, before.y + value.y, before.z + value.z,
                            before.w + value.w);
      }
      Store4(out, at + i * 4, value);
    }
#pragma unroll 1
    for (int i = kept_ * 4 + thread_; i < hidden_; i += kNormThreads) {
      const float value = x[i] * scale * (Widen(a_.weight[i]) + a_.weight_offset);
      StoreActivation(out, at + i, a_.accumulate ? LoadActivation(out, at + i) + value : value);
    }
  }

 private:
  // Vectors of 4 that a thread keeps between the two passes over a row: hidden sizes up to 8192.
  static constexpr int kVectors = 8;

  const RmsNormArgs& a_;
  const int thread_;
  const int hidden_;
  const int kept_;  // vectors; hidden sizes that are no multiple of 4 have none
  uint2 w_[kVectors];
};

}  // namespace headroom::kernels::cuda

#endif  // HEADROOM_KERNELS_CUDA_NORM_ROW_CUH_
