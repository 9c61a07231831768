// Rows of K and V on their way: RoPE and append, sealing and other copies.
#include "kernels/cuda/device_util.cuh"
#include "kernels/cuda/kernels.h"

namespace headroom::kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRopeThreads = 512;
constexpr int64_t kMaxGridY = 65535;
// So many positions fill a GPU with one block each. Of fewer, a decode step's, a block has some heads: all else
// waits for one block's loads and stores, and ten blocks do the 40 heads of Llama-3-8B in a third of the time.
constexpr int64_t kManyPositions = 256;
constexpr int32_t kHeadsOfFew = 4;

// What heads [begin, end) of a row of q, k and v get before they are turned: a warp a head at a time, the
// first heads' warps the first. REQUIRES: a head_dim of at most kMostOfALane x 32.
constexpr int kMostOfALane = 8;
__device__ void BiasAndNorm(const RopeAppendArgs& a, float* qkv, int32_t begin, int32_t end) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int32_t d = a.head_dim;
  const int32_t turned = a.num_q_heads + a.num_kv_heads;
  for (int32_t head = begin + static_cast<int32_t>(threadIdx.x) / kWarp; head < end;
       head += static_cast<int32_t>(blockDim.x) / kWarp) {
    float values[kMostOfALane];
    float sum = 0;
#pragma unroll
    for (int n = 0; n < kMostOfALane; ++n) {
      const int32_t i = n * kWarp + lane;
      if (i >= d) continue;
      values[n] = qkv[head * d + i];
      if (a.bias != nullptr) values[n] = __fadd_rn(values[n], Widen(a.bias[head * d + i]));
      sum = __fmaf_rn(values[n], values[n], sum);
    }
    const bool norm = a.q_norm != nullptr && head < turned;
    const BFloat16* const weight = head < a.num_q_heads ? a.q_norm : a.k_norm;
    const float scale =
        1.0f / sqrtf(WarpReduce(sum, Sum()) / static_cast<float>(d) + a.norm_epsilon);
#pragma unroll
    for (int n = 0; n < kMostOfALane; ++n) {
      const int32_t i = n * kWarp + lane;
      if (i >= d) continue;
      qkv[head * d + i] = norm ? values[n] * scale * Widen(weight[i]) : values[n];
    }
  }
}

// Block (at, item, part): position `at` of an item, heads_a_block of its query and KV heads. A thread turns
// pairs of q, then of k, and rounds v.
__global__ void __launch_bounds__(kRopeThreads)
    RopeAppendKernel(RopeAppendArgs a, int32_t heads_a_block) {
  BeginDependent();
  const AppendItem item = a.items.device[blockIdx.y];
  const int64_t at = blockIdx.x;
  if (at >= item.target.count) return;
  const int32_t d = a.head_dim;
  const int32_t half = d / 2;
  const int64_t row = item.row_begin + at;
  const int64_t pos = item.target.first_pos + at;
  float* const q = a.qkv + row * (int64_t{a.num_q_heads + 2 * a.num_kv_heads} * d);
  const float* const k = q + int64_t{a.num_q_heads} * d;
  const float* const v = k + int64_t{a.num_kv_heads} * d;
  const float* const cos_sin = a.cos_sin + row * d;
  const auto thread = static_cast<int32_t>(threadIdx.x);
  const auto threads = static_cast<int32_t>(blockDim.x);
  const int32_t begin = static_cast<int32_t>(blockIdx.z) * heads_a_block;
  const int32_t end = min(begin + heads_a_block, a.num_q_heads + a.num_kv_heads);
  const int32_t q_end = min(end, a.num_q_heads);
  const int32_t kv_begin = max(begin - a.num_q_heads, 0);
  const int32_t kv_end = max(end - a.num_q_heads, 0);
  if (a.bias != nullptr || a.q_norm != nullptr) {
    const int32_t values = a.num_q_heads + a.num_kv_heads;
    BiasAndNorm(a, q, begin, end);
    BiasAndNorm(a, q, values + kv_begin, values + kv_end);
    __syncthreads();
  }
#pragma unroll 1
  for (int32_t n = begin * half + thread; n < q_end * half; n += threads) {
    float* const x = q + n / half * d;
    const int32_t i = n % half;
    const float2 turned = Turned(x[i], x[i + half], cos_sin[i], cos_sin[half + i]);
    x[i] = turned.x;
    x[i + half] = turned.y;
  }
#pragma unroll 1
  for (int32_t n = kv_begin * d + thread; n < kv_end * d; n += threads) {
    const int32_t head = n / d;
    const int32_t i = n % d;
    auto* const key = reinterpret_cast<BFloat16*>(KeyRow(item.target, head, pos, d));
    auto* const value = reinterpret_cast<BFloat16*>(ValueRow(item.target, head, pos, d));
    const float* const x = k + head * d + i % half;
    const float2 turned = Turned(x[0], x[half], cos_sin[i % half], cos_sin[half + i % half]);
    key[i] = RoundToBFloat16(i < half ? turned.x : turned.y);
    value[i] = RoundToBFloat16(v[head * d + i]);
  }
}

// Parts of kRowsAPart positions of one head's K or V, 16 bytes a thread: a warp's stores to host memory
// are then whole 128-byte lines. A block takes every gridDim.x-th of the parts_an_item of all items.
constexpr int64_t kRowsAPart = 64;

__device__ void CopyPart(const CopyKvItem& item, int64_t part, int32_t head_dim) {
  const int64_t pieces = (item.to.count + kRowsAPart - 1) / kRowsAPart;
  const int64_t heads = item.to.kv_head_end - item.to.kv_head_begin;
  if (part >= pieces * heads * 2) return;
  const int64_t first = part % pieces * kRowsAPart;
  const auto head = static_cast<int32_t>(item.to.kv_head_begin + part / pieces / 2);
  const bool values = part / pieces % 2 != 0;
  const int64_t rows = item.to.count - first < kRowsAPart ? item.to.count - first : kRowsAPart;
  const int32_t vectors = head_dim * static_cast<int32_t>(kKvElementBytes) / 16;  // of a row
  for (int64_t i = threadIdx.x; i < rows * vectors; i += blockDim.x) {
    const int64_t pos = item.to.first_pos + first + i / vectors;
    const uint8_t* const from = values ? ValueRow(item.from, head, pos, head_dim)
                                       : KeyRow(item.from, head, pos, head_dim);
    uint8_t* const to = values ? ValueRow(item.to, head, pos, head_dim)
                               : KeyRow(item.to, head, pos, head_dim);
    reinterpret_cast<uint4*>(to)[i % vectors] = reinterpret_cast<const uint4*>(from)[i % vectors];
  }
}

__global__ void CopyKvRowsKernel(CopyKvRowsArgs a, int64_t parts_an_item) {
  for (int64_t i = blockIdx.x; i < parts_an_item * a.items.count; i += gridDim.x) {
    CopyPart(a.items.device[i / parts_an_item], i % parts_an_item, a.head_dim);
  }
}

}  // namespace

cudaError_t LaunchRopeAppend(const RopeAppendArgs& args, cudaStream_t stream) {
  int32_t longest = 0;
  for (int32_t i = 0; i < args.items.count; ++i) {
    const int32_t count = args.items.host[i].target.count;
    longest = longest < count ? count : longest;
  }
  if (longest == 0) return cudaSuccess;
  if (args.items.count > kMaxGridY || args.head_dim > kMostOfALane * kWarp) {
    return cudaErrorInvalidValue;
  }
  const int32_t heads = args.num_q_heads + args.num_kv_heads;
  const int32_t heads_a_block =
      int64_t{longest} * args.items.count < kManyPositions ? kHeadsOfFew : heads;
  const dim3 grid(static_cast<unsigned>(longest), static_cast<unsigned>(args.items.count),
                  static_cast<unsigned>(CeilDiv(heads, heads_a_block)));
  return LaunchDependentOn(stream, RopeAppendKernel, grid, kRopeThreads, 0, args, heads_a_block);
}

cudaError_t LaunchCopyKvRows(const CopyKvRowsArgs& args, cudaStream_t stream) {
  int64_t most = 0;
  for (int32_t i = 0; i < args.items.count; ++i) {
    const KvSpan& to = args.items.host[i].to;
    const int64_t heads = to.kv_head_end - to.kv_head_begin;
    const int64_t parts = CeilDiv(to.count, kRowsAPart) * heads * 2;
    most = most < parts ? parts : most;
  }
  if (most == 0) return cudaSuccess;
  constexpr int64_t kMaxGrid = int64_t{1} << 20;
  int64_t blocks = most * args.items.count < kMaxGrid ? most * args.items.count : kMaxGrid;
  if (args.max_blocks > 0 && blocks > args.max_blocks) blocks = args.max_blocks;
  return LaunchOn(stream, CopyKvRowsKernel, dim3(static_cast<unsigned>(blocks)), kThreads, 0, args,
                  most);
}

cudaError_t LoadKvRows() {
  HEADROOM_CUDA_RETURN_IF_ERROR(LoadDecodeKernel(RopeAppendKernel));
  return LoadDecodeKernel(CopyKvRowsKernel);
}

}  // namespace headroom::kernels::cuda
