// A weight matrix of random numbers, drawn where it lies: 16 GB in milliseconds on a GPU, and the
// same matrix on every device, whatever form that keeps it in.
//
// Element (row, column) is scale * u, u uniform on the 65,536 odd multiples of 2^-16 in (-1, 1):
// exact in float32, so that one rounding to float32 and one to bfloat16 give the same bits
// everywhere. Its 16 bits are piece i % 4 (from the lowest) of output i / 4 of SplitMix64 (Steele,
// Lea and Flood, OOPSLA 2014) at `seed`, i = row * k + column. Padding of the packed form is zero.
#ifndef HEADROOM_KERNELS_FILL_RANDOM_H_
#define HEADROOM_KERNELS_FILL_RANDOM_H_

#include "kernels/gemm.h"
#include "kernels/types.h"

namespace headroom::kernels {

class CpuTeam;

struct FillRandomArgs {
  BFloat16* out = nullptr;  // a packed weight [n, k]
  int64_t n = 0;
  int64_t k = 0;
  uint64_t seed = 0;
  float scale = 0;
};

// Output `counter` of SplitMix64 at `seed`.
HEADROOM_HOST_DEVICE inline uint64_t SplitMix64(uint64_t seed, uint64_t counter) {
  uint64_t z = seed + (counter + 1) * 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// u of an element whose 16 bits are the lowest of `bits`.
HEADROOM_HOST_DEVICE inline float UniformOf16Bits(uint64_t bits) {
  return static_cast<float>(2 * static_cast<int32_t>(bits & 0xffff) - 65535) * 0x1p-16f;
}

template <typename F>
void ForEachRange(const FillRandomArgs& a, F&& f) {
  f(a.out, PackedWeightBytes(a.n, a.k), Access::kWrite);
}

namespace cpu {
void FillRandom(const FillRandomArgs& args, CpuTeam& team);
}
namespace reference {
void FillRandom(const FillRandomArgs& args);
}

}  // namespace headroom::kernels

#endif  // HEADROOM_KERNELS_FILL_RANDOM_H_
