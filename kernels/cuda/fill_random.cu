// Random weights, row-major as Gemm reads them.
#include "kernels/cuda/device_util.cuh"
#include "kernels/cuda/kernels.h"

namespace headroom::kernels::cuda {
namespace {

constexpr int kThreads = 256;
// Elements of one thread: one store of 16 bytes. The padded size is a multiple of it.
constexpr int64_t kElements = 8;
static_assert(kPanelOutputs % kElements == 0);

__global__ void FillRandomKernel(FillRandomArgs a, int64_t padded) {
  const int64_t begin = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kElements;
  if (begin >= padded) return;
  const int64_t count = a.n * a.k;
  uint32_t words[kElements / 2];
#pragma unroll
  for (int64_t i = 0; i < kElements; i += 2) {
    const uint64_t four = SplitMix64(a.seed, static_cast<uint64_t>(begin + i) / 4);
    uint32_t word = 0;
#pragma unroll
    for (int64_t j = i; j < i + 2; ++j) {
      const float value = __fmul_rn(UniformOf16Bits(four >> (16 * (j % 4))), a.scale);
      const uint32_t bits = begin + j < count ? RoundToBFloat16(value).bits : 0;
      word |= bits << (16 * (j - i));
    }
    words[i / 2] = word;
  }
  reinterpret_cast<uint4*>(a.out + begin)[0] = make_uint4(words[0], words[1], words[2], words[3]);
}

}  // namespace

cudaError_t LaunchFillRandom(const FillRandomArgs& args, cudaStream_t stream) {
  const int64_t padded = PackedWeightBytes(args.n, args.k) / static_cast<int64_t>(sizeof(BFloat16));
  if (padded == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(CeilDiv(padded, kThreads * kElements)));
  return LaunchOn(stream, FillRandomKernel, grid, kThreads, 0, args, padded);
}

cudaError_t LoadFillRandom() { return LoadKernel(FillRandomKernel); }

}  // namespace headroom::kernels::cuda
