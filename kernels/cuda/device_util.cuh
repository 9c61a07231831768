// What the CUDA kernels share: bfloat16, reductions in a fixed order, addresses of KV rows.
//
// Arithmetic that must give the same bits in every kernel is written with the _rn intrinsics: the
// compiler fuses none of them.
#ifndef HEADROOM_KERNELS_CUDA_DEVICE_UTIL_CUH_
#define HEADROOM_KERNELS_CUDA_DEVICE_UTIL_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/swiglu.h"
#include "kernels/types.h"

namespace headroom::kernels::cuda {

inline constexpr int kWarp = 32;
inline constexpr unsigned kFullMask = 0xffffffffu;

__device__ inline float Widen(BFloat16 value) {
  return __uint_as_float(static_cast<uint32_t>(value.bits) << 16);
}
// The two halves of a word of two bfloat16: the one at the lower address, the one after it.
__device__ inline float WidenLow(uint32_t word) { return __uint_as_float(word << 16); }
__device__ inline float WidenHigh(uint32_t word) { return __uint_as_float(word & 0xffff0000u); }

// kernels/types.h's ToBFloat16.
__device__ inline BFloat16 RoundToBFloat16(float value) {
  const uint32_t bits = __float_as_uint(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

__device__ inline void StoreActivation(const Activations& to, int64_t i, float value) {
  if (to.type == ElementType::kFloat32) {
    to.floats()[i] = value;
  } else {
    to.bfloats()[i] = RoundToBFloat16(value);
  }
}
__device__ inline float LoadActivation(const Activations& from, int64_t i) {
  return from.type == ElementType::kFloat32 ? from.floats()[i] : Widen(from.bfloats()[i]);
}

// Elements [i, i + 4); i is a multiple of 4 and the memory aligned accordingly.
__device__ inline float4 Load4(const Activations& from, int64_t i) {
  if (from.type == ElementType::kFloat32) return *reinterpret_cast<const float4*>(from.floats() + i);
  const uint2 words = *reinterpret_cast<const uint2*>(from.bfloats() + i);
  return make_float4(WidenLow(words.x), WidenHigh(words.x), WidenLow(words.y), WidenHigh(words.y));
}
__device__ inline void Store4(const Activations& to, int64_t i, float4 value) {
  if (to.type == ElementType::kFloat32) {
    *reinterpret_cast<float4*>(to.floats() + i) = value;
    return;
  }
  uint2 words;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(words.x) : "f"(value.y), "f"(value.x));
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(words.y) : "f"(value.w), "f"(value.z));
  *reinterpret_cast<uint2*>(to.bfloats() + i) = words;
}

// What a gate of kernels/swiglu.h comes to, times `up`.
__device__ inline float Gated(GateActivation activation, float gate, float up) {
  float y = gate;
  if (activation == GateActivation::kGeluTanh) {
    y = gate * __fmaf_rn(gate * gate, kGeluCubic, kGeluLinear);
  }
  return gate / (1.0f + expf(-y)) * up;
}

// A pair of RoPE (kernels/rope.h), turned. Rounded as the CPU kernels round.
__device__ inline float2 Turned(float first, float second, float cos, float sin) {
  return make_float2(__fsub_rn(__fmul_rn(first, cos), __fmul_rn(second, sin)),
                     __fadd_rn(__fmul_rn(second, cos), __fmul_rn(first, sin)));
}

struct Sum {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Largest {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a < b ? b : a;
  }
};

// Every lane gets op over all lanes, in the same order each time. `op` is commutative.
template <typename T, typename Op>
__device__ T WarpReduce(T value, Op op) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value = op(value, __shfl_xor_sync(kFullMask, value, offset));
  }
  return value;
}

// Every thread of the first `warps` of a block gets op over all of theirs. `shared` has room for kWarp values,
// and calls may share it; `sync` makes those warps wait for each other.
template <typename T, typename Op, typename Sync>
__device__ T BlockReduce(T value, T identity, Op op, T* shared, int warps, Sync&& sync) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  value = WarpReduce(value, op);
  sync();  // the call before may still be reading
  if (lane == 0) shared[threadIdx.x / kWarp] = value;
  sync();
  return WarpReduce(lane < warps ? shared[lane] : identity, op);
}
template <typename T, typename Op>
__device__ T BlockReduce(T value, T identity, Op op, T* shared) {
  return BlockReduce(value, identity, op, shared, static_cast<int>(blockDim.x) / kWarp,
                     [] { __syncthreads(); });
}

// Positions are below 2^31, and a division of 64 bits takes as long as a load.
__device__ inline int64_t RowOf(const KvSpan& span, int64_t pos) {
  return static_cast<uint32_t>(pos - span.origin_pos) % static_cast<uint32_t>(span.capacity);
}
__device__ inline uint8_t* KeyRow(const KvSpan& span, int32_t kv_head, int64_t pos, int32_t d) {
  return span.base +
         KvLayout{span.capacity, d}.KeyOffset(kv_head - span.kv_head_begin, RowOf(span, pos));
}
__device__ inline uint8_t* ValueRow(const KvSpan& span, int32_t kv_head, int64_t pos, int32_t d) {
  return span.base +
         KvLayout{span.capacity, d}.ValueOffset(kv_head - span.kv_head_begin, RowOf(span, pos));
}

// How much of a multiprocessor's 256 KiB the kernels of a decode step have as shared memory, in percent of
// the 228 KiB that it can be: 132 KiB. They must agree, since a multiprocessor has to run empty before it
// changes that, which took 6 us where one kernel of an attention wanted more than the other. What is left
// is L1, through which attention's keys go: 131,072 of Llama-3-8B take as long on an H200 as with 64 KiB of
// shared memory, with 164 KiB 4% more, with 196 KiB 27%. What chains have, the weights' ring, takes the most.
inline constexpr int kSharedPercent = 57;

// Loads a kernel's code now.
template <typename Kernel>
cudaError_t LoadKernel(Kernel* kernel) {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
}
// ... and allows it more than the 48 KiB of shared memory that need no asking.
template <typename Kernel>
cudaError_t LoadKernel(Kernel* kernel, int64_t shared_bytes) {
  if (const cudaError_t error = LoadKernel(kernel); error != cudaSuccess) return error;
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                              cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(shared_bytes));
}
// Likewise a decode step's.
template <typename Kernel>
cudaError_t LoadDecodeKernel(Kernel* kernel, int64_t shared_bytes = 0) {
  if (const cudaError_t error = LoadKernel(kernel, shared_bytes); error != cudaSuccess) return error;
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                              cudaFuncAttributePreferredSharedMemoryCarveout, kSharedPercent);
}

// Programmatic dependent launch (compute capability 9.0): a kernel that is enqueued with
// LaunchDependentOn() may start while the one before it on the stream still runs. It calls this before it
// touches anything that others write, or that they read and it writes; what it does before that hides
// the start of the kernel. Waits for all earlier kernels, then lets the next one start.
__device__ inline void BeginDependent() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" : : : "memory");
  asm volatile("griddepcontrol.launch_dependents;" : : : "memory");
#endif
}

// Enqueues kernel(arguments...). What it returns is the launch's own error: cudaGetLastError()
// would also tell of calls before it, and of events that were asked too early.
template <typename... Parameters, typename... Arguments>
cudaError_t LaunchOn(cudaStream_t stream, void (*kernel)(Parameters...), dim3 grid, int threads,
                     int64_t shared_bytes, const Arguments&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// Whether the device runs the code that is compiled for compute capability 9.0 (HEADROOM_HOPPER_CODE: there is
// such code). Others run what is made for 8.0, in which a kernel waits for nothing and copies nothing in bulk.
inline bool RunsHopperCode() {
#ifdef HEADROOM_HOPPER_CODE
  static const bool runs = [] {
    int device = 0;
    int major = 0, minor = 0;
    return cudaGetDevice(&device) == cudaSuccess &&
           cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) ==
               cudaSuccess &&
           cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) ==
               cudaSuccess &&
           major == 9 && minor == 0;
  }();
  return runs;
#else
  return false;
#endif
}

// Likewise, for a kernel that calls BeginDependent(), whose grid is of clusters of `blocks` blocks each in x
// (kernels/cuda/cluster.cuh), of one block on devices that run other code.
template <typename... Parameters, typename... Arguments>
cudaError_t LaunchClustersOn(cudaStream_t stream, void (*kernel)(Parameters...), dim3 clusters, unsigned blocks,
                             int threads, int64_t shared_bytes, const Arguments&... arguments) {
  if (!RunsHopperCode()) blocks = 1;
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {blocks, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(clusters.x * blocks, clusters.y, clusters.z);
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = !RunsHopperCode() ? 0 : blocks == 1 ? 1 : 2;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}
template <typename... Parameters, typename... Arguments>
cudaError_t LaunchDependentOn(cudaStream_t stream, void (*kernel)(Parameters...), dim3 grid,
                              int threads, int64_t shared_bytes, const Arguments&... arguments) {
  return LaunchClustersOn(stream, kernel, grid, 1, threads, shared_bytes, arguments...);
}

// Of the device.
inline int Multiprocessors() {
  static const int count = [] {
    int device = 0;
    int value = 0;
    return cudaGetDevice(&device) == cudaSuccess &&
                   cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, device) == cudaSuccess
               ? value
               : 1;
  }();
  return count;
}

inline int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace headroom::kernels::cuda

// Returns from the enclosing launcher what is not cudaSuccess.
#define HEADROOM_CUDA_RETURN_IF_ERROR(expr)                                           \
  do {                                                                                \
    if (const cudaError_t headroom_error_ = (expr); headroom_error_ != cudaSuccess) { \
      return headroom_error_;                                                         \
    }                                                                                 \
  } while (false)

#endif  // HEADROOM_KERNELS_CUDA_DEVICE_UTIL_CUH_
