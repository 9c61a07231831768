// What lies around a fused attention kernel: queries to bfloat16, keys gathered, partials folded.
// All is bound by memory; a thread takes eight columns, 16 bytes of bfloat16.
#include <math_constants.h>

#include "kernels/cuda/device_util.cuh"
#include "kernels/cuda/fold_weights.cuh"
#include "kernels/cuda/kernels.h"

namespace headroom::kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kColumns = 8;  // of a thread

struct Columns {
  float value[kColumns];
};

__device__ Columns LoadFloats(const float* from) {
  const float4 a = *reinterpret_cast<const float4*>(from);
  const float4 b = *reinterpret_cast<const float4*>(from + 4);
  return {{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
}
__device__ void StoreFloats(float* to, const Columns& c) {
  const float* const v = c.value;
  *reinterpret_cast<float4*>(to) = make_float4(v[0], v[1], v[2], v[3]);
  *reinterpret_cast<float4*>(to + 4) = make_float4(v[4], v[5], v[6], v[7]);
}
__device__ void StoreColumns(const Activations& to, int64_t at, const Columns& c) {
  if (to.type == ElementType::kFloat32) {
    StoreFloats(to.floats() + at, c);
    return;
  }
  uint32_t word[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word[i]) : "f"(c.value[2 * i + 1]), "f"(c.value[2 * i]));
  }
  *reinterpret_cast<uint4*>(to.bfloats() + at) = make_uint4(word[0], word[1], word[2], word[3]);
}
// U lies at an odd multiple of eight bytes.
__device__ Columns LoadU(const float* from) {
  Columns c;
#pragma unroll
  for (int i = 0; i < kColumns; i += 2) {
    const float2 pair = *reinterpret_cast<const float2*>(from + i);
    c.value[i] = pair.x;
    c.value[i + 1] = pair.y;
  }
  return c;
}
__device__ void ClearU(float* to) {
#pragma unroll
  for (int i = 0; i < kColumns; i += 2) *reinterpret_cast<float2*>(to + i) = make_float2(0, 0);
}
__device__ Columns WidenAll(const uint4& word) {
  return {{WidenLow(word.x), WidenHigh(word.x), WidenLow(word.y), WidenHigh(word.y),
           WidenLow(word.z), WidenHigh(word.z), WidenLow(word.w), WidenHigh(word.w)}};
}

// Block (rows, head of the buffer).
__global__ void __launch_bounds__(kThreads) WideQueriesKernel(WideQueriesArgs a) {
  const int pieces = a.head_dim / kColumns;
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t row = i / pieces;
  const int head = static_cast<int>(blockIdx.y);
  if (row >= a.row_capacity) return;
  const int column = static_cast<int>(i % pieces) * kColumns;
  uint32_t word[4] = {};
  if (row < a.rows && head < a.heads) {
    const int64_t from = a.backwards ? a.rows - 1 - row : row;
    const Columns q =
        LoadFloats(a.q + from * a.q_stride + int64_t{head} * a.head_dim + column);
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const BFloat16 low = RoundToBFloat16(__fmul_rn(q.value[2 * w], a.scale));
      const BFloat16 high = RoundToBFloat16(__fmul_rn(q.value[2 * w + 1], a.scale));
      word[w] = low.bits | uint32_t{high.bits} << 16;
    }
  }
  BFloat16* const to = a.to + (head * a.row_capacity + row) * a.head_dim + column;
  *reinterpret_cast<uint4*>(to) = make_uint4(word[0], word[1], word[2], word[3]);
}

// Block (rows, head).
__global__ void __launch_bounds__(kThreads) WideKeysKernel(const __grid_constant__ WideKeysArgs a) {
  if (a.lengths != nullptr && blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) {
    a.lengths[0] = a.query_rows;
    a.lengths[1] = static_cast<int32_t>(a.count);
  }
  const int pieces = a.head_dim / kColumns;
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t row = i / pieces;
  if (row >= a.row_capacity || static_cast<int>(blockIdx.y) >= a.num_heads) return;
  const int column = static_cast<int>(i % pieces) * kColumns;
  const WideKeysArgs::Head head = a.heads[blockIdx.y];
  uint4 key = make_uint4(0, 0, 0, 0);
  uint4 value = key;
  if (row < a.count) {
    const int64_t pos = a.begin + (a.backwards ? a.count - 1 - row : row);
    const KvSpan* span = a.spans + head.span_begin;
    const KvSpan* const last = span + head.span_count - 1;
    while (span < last && pos >= span->first_pos + span->count) ++span;
    const KvSpan from = *span;
    const int offset = column * static_cast<int>(sizeof(BFloat16));
    key = *reinterpret_cast<const uint4*>(KeyRow(from, head.kv_head, pos, a.head_dim) + offset);
    value = *reinterpret_cast<const uint4*>(ValueRow(from, head.kv_head, pos, a.head_dim) + offset);
  }
  const int64_t to = (blockIdx.y * a.row_capacity + row) * a.head_dim + column;
  *reinterpret_cast<uint4*>(a.keys + to) = key;
  *reinterpret_cast<uint4*>(a.values + to) = value;
}

// Block (rows, query head): kD / 8 threads for each query. Everything that a thread reads is asked
// for before anything is used.
template <int kD>
__global__ void __launch_bounds__(kThreads)
    WideFoldKernel(const __grid_constant__ WideFoldArgs a) {
  constexpr int kLanes = kD / kColumns;
  constexpr int kRows = kThreads / kLanes;
  const int64_t row = int64_t{blockIdx.x} * kRows + threadIdx.x / kLanes;
  if (row >= a.rows) return;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int column = lane * kColumns;
  const int64_t head = blockIdx.y;

  uint4 word[kWidePartials];
  float lse[kWidePartials];
#pragma unroll
  for (int p = 0; p < kWidePartials; ++p) {
    if (p >= a.num_partials) break;
    const WideFoldArgs::Partial& its = a.partials[p];
    if (row >= its.rows) continue;
    const int64_t query = head * a.row_capacity + (its.backwards ? its.rows - 1 - row : row);
    word[p] = *reinterpret_cast<const uint4*>(its.o + query * kD + column);
    lse[p] = its.lse[query];
  }
  const int64_t q_head = row * a.num_q_heads + head;
  float* const r = a.state + q_head * (2 * (kD + 2));  // AttentionStateFloats()
  float* const u = r + kD + 2;
  Columns o = {};
  float2 r_sums = make_float2(-CUDART_INF_F, 0);  // m, l
  float2 u_sums = r_sums;
  if (!a.reset) {
    o = LoadFloats(r + column);
    r_sums = *reinterpret_cast<const float2*>(r + kD);
    u_sums = *reinterpret_cast<const float2*>(u + kD);
  }
  float m = r_sums.x;
  float l = r_sums.y;
  const auto fold = [&](float its_m, float its_l, const Columns& its_o) {
    const FoldWeights weights(m, l, its_m, its_l);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) o.value[i] = weights(o.value[i], its_o.value[i]);
    m = weights.m;
    l = weights.l;
  };
  if (u_sums.y != 0) fold(u_sums.x, u_sums.y, LoadU(u + column));
#pragma unroll
  for (int p = 0; p < kWidePartials; ++p) {
    if (p >= a.num_partials) break;
    if (row >= a.partials[p].rows) continue;
    fold(lse[p], 1.0f, WidenAll(word[p]));
  }
  if (a.finish) {
    const float inverse = 1.0f / l;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) o.value[i] = __fmul_rn(o.value[i], inverse);
    StoreColumns(a.out, q_head * kD + column, o);
    return;
  }
  StoreFloats(r + column, o);
  const bool clear = a.reset || u_sums.y != 0;
  if (clear) ClearU(u + column);
  // All lanes of the query, which lie in one warp, have read m and l before one overwrites them.
  const int first_lane = static_cast<int>(threadIdx.x) % kWarp / kLanes * kLanes;
  __syncwarp((kFullMask >> (kWarp - kLanes)) << first_lane);
  if (lane != 0) return;
  *reinterpret_cast<float2*>(r + kD) = make_float2(m, l);
  if (clear) *reinterpret_cast<float2*>(u + kD) = make_float2(-CUDART_INF_F, 0);
}

template <int kD>
cudaError_t LaunchFold(const WideFoldArgs& a, cudaStream_t stream) {
  constexpr int64_t kRows = kThreads / (kD / kColumns);
  const dim3 grid(static_cast<unsigned>(CeilDiv(a.rows, kRows)), static_cast<unsigned>(a.heads));
  return LaunchOn(stream, WideFoldKernel<kD>, grid, kThreads, 0, a);
}

unsigned BlocksOf(int64_t rows, int32_t head_dim) {
  return static_cast<unsigned>(CeilDiv(rows * (head_dim / kColumns), kThreads));
}

}  // namespace

cudaError_t LaunchWideQueries(const WideQueriesArgs& args, cudaStream_t stream) {
  const dim3 grid(BlocksOf(args.row_capacity, args.head_dim),
                  static_cast<unsigned>(args.head_capacity));
  return LaunchOn(stream, WideQueriesKernel, grid, kThreads, 0, args);
}

cudaError_t LaunchWideKeys(const WideKeysArgs& args, cudaStream_t stream) {
  const auto heads = static_cast<unsigned>(args.num_heads > 0 ? args.num_heads : 1);
  const dim3 grid(BlocksOf(args.row_capacity, args.head_dim), heads);
  return LaunchOn(stream, WideKeysKernel, grid, kThreads, 0, args);
}

cudaError_t LaunchWideFold(const WideFoldArgs& args, cudaStream_t stream) {
  if (args.rows == 0 || args.heads == 0) return cudaSuccess;
  switch (args.head_dim) {
    case 64:
      return LaunchFold<64>(args, stream);
    case 128:
      return LaunchFold<128>(args, stream);
    case 256:
      return LaunchFold<256>(args, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

cudaError_t LoadWideAttention() {
  HEADROOM_CUDA_RETURN_IF_ERROR(LoadKernel(WideQueriesKernel));
  HEADROOM_CUDA_RETURN_IF_ERROR(LoadKernel(WideKeysKernel));
  HEADROOM_CUDA_RETURN_IF_ERROR(LoadKernel(WideFoldKernel<64>));
  HEADROOM_CUDA_RETURN_IF_ERROR(LoadKernel(WideFoldKernel<128>));
  return LoadKernel(WideFoldKernel<256>);
}

}  // namespace headroom::kernels::cuda
