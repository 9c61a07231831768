// Embed, RmsNorm, SwiGlu, SoftCap and the RoPE table.
#include "kernels/cuda/device_util.cuh"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/norm_row.cuh"

namespace headroom::kernels::cuda {
namespace {

constexpr int kThreads = 256;

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

// One block a row.
__global__ void __launch_bounds__(kNormThreads) RmsNormKernel(RmsNormArgs a) {
  __shared__ float shared[kWarp];
  const NormRow norm(a, static_cast<int>(threadIdx.x));
  BeginDependent();
  norm.Run(blockIdx.x, a.out, int64_t{blockIdx.x} * a.hidden, shared, [] { __syncthreads(); });
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
  HEADROOM_CUDA_RETURN_IF_ERROR(LoadChain());
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
