// Gated activation of the MLP: out[m, i] = silu(gate[m, i]) * up[m, i], with
// gate_up[m] = [gate: width][up: width] and silu(x) = x / (1 + exp(-x)).
// Source: Shazeer, arXiv 2002.05202.
#ifndef HEADROOM_KERNELS_SWIGLU_H_
#define HEADROOM_KERNELS_SWIGLU_H_

#include "kernels/types.h"

namespace headroom::kernels {

class CpuTeam;

struct SwiGluArgs {
  const float* gate_up = nullptr;  // [rows, 2 * width]
  float* out = nullptr;            // [rows, width]
  int64_t rows = 0;
  int64_t width = 0;
};

template <typename F>
void ForEachRange(const SwiGluArgs& a, F&& f) {
  f(a.gate_up, a.rows * 2 * a.width * static_cast<int64_t>(sizeof(float)), Access::kRead);
  f(a.out, a.rows * a.width * static_cast<int64_t>(sizeof(float)), Access::kWrite);
}

namespace cpu {
void SwiGlu(const SwiGluArgs& args, CpuTeam& team);
}
namespace reference {
void SwiGlu(const SwiGluArgs& args);
}

}  // namespace headroom::kernels

#endif  // HEADROOM_KERNELS_SWIGLU_H_
