// Reads memory and does nothing else: how fast that goes is the ceiling of whatever reads weights
// and keys.
#include "kernels/cuda/device_util.cuh"
#include "kernels/cuda/kernels.h"

namespace headroom::kernels::cuda {
namespace {

constexpr int kThreads = 256;
// Loads of 16 bytes that each thread has in flight.
constexpr int kLoads = 8;
constexpr int64_t kBlockBytes = kThreads * kLoads * static_cast<int64_t>(sizeof(uint4));

// One block reads kBlockBytes side by side. `never` is written only if what a thread read is a
// pattern that random data does not have: without a use of what it read there would be no reads.
__global__ void ReadMemoryKernel(const uint4* data, uint32_t* never) {
  const uint4* const from = data + int64_t{blockIdx.x} * kThreads * kLoads + threadIdx.x;
  uint4 loaded[kLoads];
#pragma unroll
  for (int i = 0; i < kLoads; ++i) loaded[i] = __ldcs(from + i * kThreads);
  uint32_t folded = 0;
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    folded |= loaded[i].x ^ loaded[i].y ^ loaded[i].z ^ loaded[i].w ^ static_cast<uint32_t>(i);
  }
  if (folded == 0) *never = 1;
}

}  // namespace

cudaError_t LaunchReadMemory(const void* data, int64_t bytes, uint32_t* never,
                             cudaStream_t stream) {
  if (bytes <= 0 || bytes % kReadMemoryBytes != 0) return cudaErrorInvalidValue;
  const dim3 grid(static_cast<unsigned>(bytes / kBlockBytes));
  return LaunchOn(stream, ReadMemoryKernel, grid, kThreads, 0, static_cast<const uint4*>(data),
                  never);
}

static_assert(kReadMemoryBytes % kBlockBytes == 0);

cudaError_t LoadReadMemory() { return LoadKernel(ReadMemoryKernel); }

}  // namespace headroom::kernels::cuda
