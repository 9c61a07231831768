// Embed, RmsNorm, SwiGlu and the RoPE table.
#include "kernels/cuda/device_util.cuh"
#include "kernels/cuda/kernels.h"

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
    a.out[row * a.table.k + i] = Widen(from[i]);
  }
}

// One block a row.
__global__ void RmsNormKernel(RmsNormArgs a) {
  __shared__ float shared[kWarp];
  const int64_t row = blockIdx.x;
  const int64_t from = a.row_index.device != nullptr ? a.row_index.device[row] : row;
  const float* x = a.x + from * a.hidden;
  float sum = 0;
  for (int64_t i = threadIdx.x; i < a.hidden; i += blockDim.x) sum = __fmaf_rn(x[i], x[i], sum);
  sum = BlockReduce(sum, 0.0f, Sum(), shared);
  const float scale = 1.0f / sqrtf(sum / static_cast<float>(a.hidden) + a.epsilon);
  for (int64_t i = threadIdx.x; i < a.hidden; i += blockDim.x) {
    a.out[row * a.hidden + i] = x[i] * scale * Widen(a.weight[i]);
  }
}

__global__ void SwiGluKernel(SwiGluArgs a) {
  const int64_t row = blockIdx.y;
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= a.width) return;
  const float gate = a.gate_up[row * 2 * a.width + i];
  const float up = a.gate_up[row * 2 * a.width + a.width + i];
  a.out[row * a.width + i] = gate / (1.0f + expf(-gate)) * up;
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
  return LaunchOn(stream, RmsNormKernel, dim3(static_cast<unsigned>(args.rows)), kThreads, 0, args);
}

cudaError_t LaunchSwiGlu(const SwiGluArgs& args, cudaStream_t stream) {
  constexpr int64_t kMaxRows = 65535;  // of a grid's second dimension
  for (int64_t row = 0; row < args.rows; row += kMaxRows) {
    SwiGluArgs part = args;
    part.gate_up += row * 2 * args.width;
    part.out += row * args.width;
    part.rows = args.rows - row < kMaxRows ? args.rows - row : kMaxRows;
    const dim3 grid(static_cast<unsigned>(CeilDiv(args.width, kThreads)),
                    static_cast<unsigned>(part.rows));
    HEADROOM_CUDA_RETURN_IF_ERROR(LaunchOn(stream, SwiGluKernel, grid, kThreads, 0, part));
  }
  return cudaSuccess;
}

cudaError_t LaunchRopeTable(const RopeTableArgs& args, cudaStream_t stream) {
  if (args.positions.count == 0) return cudaSuccess;
  return LaunchOn(stream, RopeTableKernel, dim3(args.positions.count), 128, 0, args);
}

cudaError_t LoadElementwise() {
  HEADROOM_CUDA_RETURN_IF_ERROR(LoadKernel(EmbedKernel));
  HEADROOM_CUDA_RETURN_IF_ERROR(LoadKernel(RmsNormKernel));
  HEADROOM_CUDA_RETURN_IF_ERROR(LoadKernel(SwiGluKernel));
  return LoadKernel(RopeTableKernel);
}

cudaError_t LoadKernels() {
  HEADROOM_CUDA_RETURN_IF_ERROR(LoadAttend());
  HEADROOM_CUDA_RETURN_IF_ERROR(LoadElementwise());
  HEADROOM_CUDA_RETURN_IF_ERROR(LoadGemm());
  HEADROOM_CUDA_RETURN_IF_ERROR(LoadKvRows());
  HEADROOM_CUDA_RETURN_IF_ERROR(LoadMailbox());
  HEADROOM_CUDA_RETURN_IF_ERROR(LoadSample());
  return LoadWideAttention();
}

}  // namespace headroom::kernels::cuda
