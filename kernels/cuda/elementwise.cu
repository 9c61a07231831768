// Embed, RmsNorm, SwiGlu, SoftCap and the RoPE table.
#include "kernels/cuda/device_util.cuh"
#include "kernels/cuda/kernels.h"

namespace headroom::kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kNormThreads = 512;

// Elements [i, i + 4); i is a multiple of 4 and the memory aligned accordingly.
__device__ float4 Load4(const Activations& from, int64_t i) {
  if (from.type == ElementType::kFloat32) return *reinterpret_cast<const float4*>(from.floats() + i);
  const uint2 words = *reinterpret_cast<const uint2*>(from.bfloats() + i);
  return make_float4(WidenLow(words.x), WidenHigh(words.x), WidenLow(words.y), WidenHigh(words.y));
}
__device__ void Store4(const Activations& to, int64_t i, float4 value) {
  if (to.type == ElementType::kFloat32) {
    *reinterpret_cast<float4*>(to.floats() + i) = value;
    return;
  }
  uint2 words;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(words.x) : "f"(value.y), "f"(value.x));
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(words.y) : "f"(value.w), "f"(value.z));
  *reinterpret_cast<uint2*>(to.bfloats() + i) = words;
}

// One block a row.
__global__ void EmbedKernel(EmbedArgs a) {
  const int64_t row = blockIdx.x;
  const EmbedRow what = a.rows.device[row];
  const int64_t id = what.token_id >= 0 ? what.token_id : a.last_tokens[what.slot];
  const BFloat16* from = a.table.data + id * a.table.k;
  for (int64_t i = threadIdx.x; i < a.table.k; i += blockDim.x) {
    a.out[row * a.table.k + i] = Widen(from[i]) * a.scale;
  }
}

// Vectors of 4 that a thread keeps between the two passes over a row: hidden sizes up to 8192.
constexpr int kNormVectors = 4;

// One block a row; rows of multiples of 4 are read 16 bytes at once. The weights, which no kernel
// writes, are on their way before the row is there.
__global__ void __launch_bounds__(kNormThreads) RmsNormKernel(RmsNormArgs a) {
  __shared__ float shared[kWarp];
  const int64_t kept = a.hidden % 4 == 0 ? min(a.hidden / 4, int64_t{kNormVectors} * kNormThreads) : 0;
  uint2 w[kNormVectors];
#pragma unroll
  for (int v = 0; v < kNormVectors; ++v) {
    const int64_t i = v * kNormThreads + threadIdx.x;
    if (i < kept) w[v] = *reinterpret_cast<const uint2*>(a.weight + i * 4);
  }
  BeginDependent();
  const int64_t row = blockIdx.x;
  const int64_t from = a.row_index.device != nullptr ? a.row_index.device[row] : row;
  const float* const x = a.x + from * a.hidden;
  float4 values[kNormVectors];
  float sum = 0;
#pragma unroll
  for (int v = 0; v < kNormVectors; ++v) {
    const int64_t i = v * kNormThreads + threadIdx.x;
    values[v] = i < kept ? reinterpret_cast<const float4*>(x)[i] : make_float4(0, 0, 0, 0);
  }
#pragma unroll
  for (int v = 0; v < kNormVectors; ++v) {
    sum = __fmaf_rn(values[v].x, values[v].x, sum);
    sum = __fmaf_rn(values[v].y, values[v].y, sum);
    sum = __fmaf_rn(values[v].z, values[v].z, sum);
    sum = __fmaf_rn(values[v].w, values[v].w, sum);
  }
#pragma unroll 1
  for (int64_t i = kept * 4 + threadIdx.x; i < a.hidden; i += kNormThreads) {
    sum = __fmaf_rn(x[i], x[i], sum);
  }
  sum = BlockReduce(sum, 0.0f, Sum(), shared);
  const float scale = 1.0f / sqrtf(sum / static_cast<float>(a.hidden) + a.epsilon);
#pragma unroll
  for (int v = 0; v < kNormVectors; ++v) {
    const int64_t i = v * kNormThreads + threadIdx.x;
    if (i >= kept) continue;
    const float offset = a.weight_offset;
    float4 value = make_float4(values[v].x * scale * (WidenLow(w[v].x) + offset),
                               values[v].y * scale * (WidenHigh(w[v].x) + offset),
                               values[v].z * scale * (WidenLow(w[v].y) + offset),
                               values[v].w * scale * (WidenHigh(w[v].y) + offset));
    if (a.accumulate) {
      const float4 before = Load4(a.out, row * a.hidden + i * 4);
      value = make_float4(before.x + value.x, before.y + value.y, before.z + value.z,
                          before.w + value.w);
    }
    Store4(a.out, row * a.hidden + i * 4, value);
  }
#pragma unroll 1
  for (int64_t i = kept * 4 + threadIdx.x; i < a.hidden; i += kNormThreads) {
    const int64_t at = row * a.hidden + i;
    const float value = x[i] * scale * (Widen(a.weight[i]) + a.weight_offset);
    StoreActivation(a.out, at, a.accumulate ? LoadActivation(a.out, at) + value : value);
  }
}

// Four elements a thread where the width allows it.
__global__ void __launch_bounds__(kThreads) SwiGluKernel(SwiGluArgs a) {
  BeginDependent();
  const int64_t row = blockIdx.y;
  const int64_t i = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * 4;
  const int64_t gate = row * 2 * a.width + i;
  const int64_t up = gate + a.width;
  const int64_t to = row * a.width + i;
  if (a.width % 4 == 0 && i < a.width) {
    const float4 g = Load4(a.gate_up, gate);
    const float4 u = Load4(a.gate_up, up);
    Store4(a.out, to,
           make_float4(Gated(a.activation, g.x, u.x), Gated(a.activation, g.y, u.y),
                       Gated(a.activation, g.z, u.z), Gated(a.activation, g.w, u.w)));
    return;
  }
  for (int64_t n = 0; n < 4 && i + n < a.width; ++n) {
    StoreActivation(a.out, to + n,
                    Gated(a.activation, LoadActivation(a.gate_up, gate + n),
                          LoadActivation(a.gate_up, up + n)));
  }
}

__global__ void __launch_bounds__(kThreads) SoftCapKernel(SoftCapArgs a) {
  BeginDependent();
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < a.rows * a.width) a.x[i] = a.cap * tanhf(a.x[i] / a.cap);
}

// One block a row. Once a step, so float64 costs nothing that shows.
__global__ void RopeTableKernel(RopeTableArgs a) {
  const int64_t row = blockIdx.x;
  const int32_t half = a.head_dim / 2;
  for (int32_t i = threadIdx.x; i < half; i += blockDim.x) {
    const float angle =
        __fmul_rn(static_cast<float>(a.positions.device[row]), a.inverse_frequency[i]);
    a.cos_sin[row * a.head_dim + i] = static_cast<float>(cos(static_cast<double>(angle)));
    a.cos_sin[row * a.head_dim + half + i] = static_cast<float>(sin(static_cast<double>(angle)));
  }
}

}  // namespace

cudaError_t LaunchEmbed(const EmbedArgs& args, cudaStream_t stream) {
  if (args.rows.count == 0) return cudaSuccess;
  return LaunchOn(stream, EmbedKernel, dim3(args.rows.count), kThreads, 0, args);
}

cudaError_t LaunchRmsNorm(const RmsNormArgs& args, cudaStream_t stream) {
  if (args.rows == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(args.rows));
  return LaunchDependentOn(stream, RmsNormKernel, grid, kNormThreads, 0, args);
}

cudaError_t LaunchSwiGlu(const SwiGluArgs& args, cudaStream_t stream) {
  constexpr int64_t kMaxRows = 65535;  // of a grid's second dimension
  for (int64_t row = 0; row < args.rows; row += kMaxRows) {
    SwiGluArgs part = args;
    part.gate_up = args.gate_up + row * 2 * args.width;
    part.out = args.out + row * args.width;
    part.rows = args.rows - row < kMaxRows ? args.rows - row : kMaxRows;
    const dim3 grid(static_cast<unsigned>(CeilDiv(args.width, 4 * kThreads)),
                    static_cast<unsigned>(part.rows));
    HEADROOM_CUDA_RETURN_IF_ERROR(LaunchDependentOn(stream, SwiGluKernel, grid, kThreads, 0, part));
  }
  return cudaSuccess;
}

cudaError_t LaunchSoftCap(const SoftCapArgs& args, cudaStream_t stream) {
  if (args.rows == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(CeilDiv(args.rows * args.width, kThreads)));
  return LaunchDependentOn(stream, SoftCapKernel, grid, kThreads, 0, args);
}

cudaError_t LaunchRopeTable(const RopeTableArgs& args, cudaStream_t stream) {
  if (args.positions.count == 0) return cudaSuccess;
  return LaunchOn(stream, RopeTableKernel, dim3(args.positions.count), 128, 0, args);
}

cudaError_t LoadElementwise() {
  HEADROOM_CUDA_RETURN_IF_ERROR(LoadDecodeKernel(EmbedKernel));
  HEADROOM_CUDA_RETURN_IF_ERROR(LoadDecodeKernel(RmsNormKernel));
  HEADROOM_CUDA_RETURN_IF_ERROR(LoadDecodeKernel(SwiGluKernel));
  HEADROOM_CUDA_RETURN_IF_ERROR(LoadDecodeKernel(SoftCapKernel));
  return LoadDecodeKernel(RopeTableKernel);
}

cudaError_t LoadKernels() {
  HEADROOM_CUDA_RETURN_IF_ERROR(LoadAttend());
  HEADROOM_CUDA_RETURN_IF_ERROR(LoadElementwise());
  HEADROOM_CUDA_RETURN_IF_ERROR(LoadFillRandom());
  HEADROOM_CUDA_RETURN_IF_ERROR(LoadGemm());
  HEADROOM_CUDA_RETURN_IF_ERROR(LoadKvRows());
  HEADROOM_CUDA_RETURN_IF_ERROR(LoadMailbox());
  HEADROOM_CUDA_RETURN_IF_ERROR(LoadReadMemory());
  HEADROOM_CUDA_RETURN_IF_ERROR(LoadSample());
  return LoadWideAttention();
}

}  // namespace headroom::kernels::cuda
