// Gated activation of the MLP: out[m, i] = act(gate[m, i]) * up[m, i], with
// gate_up[m] = [gate: width][up: width]. SwiGLU: act(x) = x / (1 + exp(-x)). GeGLU, with the tanh
// approximation of GELU: act(x) = x / 2 * (1 + tanh(y)) = x / (1 + exp(-2 y)),
// y = sqrt(2 / pi) * (x + 0.044715 x^3).
// Sources: Shazeer, arXiv 2002.05202; Hendrycks and Gimpel, arXiv 1606.08415.
#ifndef HEADROOM_KERNELS_SWIGLU_H_
#define HEADROOM_KERNELS_SWIGLU_H_

#include "kernels/gemm.h"
#include "kernels/types.h"

namespace headroom::kernels {

class CpuTeam;

enum class GateActivation : int32_t { kSilu, kGeluTanh };

// 2 y = x * (kGeluLinear + kGeluCubic * x^2).
inline constexpr float kGeluLinear = 1.5957691216057308f;  // 2 sqrt(2 / pi)
inline constexpr float kGeluCubic = 0.07135481627260025f;  // 0.044715 of that

struct SwiGluArgs {
  Activations gate_up;  // [rows, 2 * width], read
  Activations out;      // [rows, width]
  int64_t rows = 0;
  int64_t width = 0;
  GateActivation activation = GateActivation::kSilu;
};

template <typename F>
void ForEachRange(const SwiGluArgs& a, F&& f) {
  f(a.gate_up.data, a.gate_up.Bytes(a.rows * 2 * a.width), Access::kRead);
  f(a.out.data, a.out.Bytes(a.rows * a.width), Access::kWrite);
}

// A product and, of what it comes to, the gated activation: gemm.c is swiglu.gate_up. Where both are one
// kernel, gate_up is not written.
struct GatedGemmArgs {
  GemmArgs gemm;
  SwiGluArgs swiglu;
};

template <typename F>
void ForEachRange(const GatedGemmArgs& a, F&& f) {
  ForEachRange(a.gemm, f);
  ForEachRange(a.swiglu, f);
}

namespace cpu {
void SwiGlu(const SwiGluArgs& args, CpuTeam& team);
}
namespace reference {
void SwiGlu(const SwiGluArgs& args);
}

}  // namespace headroom::kernels

#endif  // HEADROOM_KERNELS_SWIGLU_H_
