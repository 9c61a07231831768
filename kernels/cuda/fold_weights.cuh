// How two attention states over disjoint keys become one.
#ifndef HEADROOM_KERNELS_CUDA_FOLD_WEIGHTS_CUH_
#define HEADROOM_KERNELS_CUDA_FOLD_WEIGHTS_CUH_

#include <math_constants.h>

namespace headroom::kernels::cuda {

// The weights with which the later of two disjoint parts is folded into the earlier one.
struct FoldWeights {
  float a, b, m, l;
  bool keep;  // the later part is empty
  bool take;  // the earlier one is

  __device__ FoldWeights(float am, float al, float bm, float bl)
      : a(1), b(1), m(am), l(al), keep(bl == 0), take(bl != 0 && al == 0) {
    if (keep) return;
    if (take) {
      m = bm;
      l = bl;
      return;
    }
    m = fmaxf(am, bm);
    a = expf(__fsub_rn(am, m));
    b = expf(__fsub_rn(bm, m));
    l = __fmaf_rn(bl, b, __fmul_rn(al, a));
  }
  __device__ float operator()(float ao, float bo) const {
    if (keep) return ao;
    return take ? bo : __fmaf_rn(bo, b, __fmul_rn(ao, a));
  }
};

// Likewise of a whole unit and all units before it. Where nothing is before it, or nothing in it, the one has weight 0
// and the other 1.
struct __align__(16) UnitWeights {
  float before;
  float unit;
  float l;  // the unit's

  // `m`: the largest score before the unit.
  __device__ static UnitWeights Of(float m, float2 m_and_l) {
    UnitWeights weights = {1, 0, m_and_l.y};
    if (m_and_l.y == 0) return weights;
    const float with = fmaxf(m, m_and_l.x);
    const bool nothing_before = m == -CUDART_INF_F;
    weights.before = nothing_before ? 0.0f : expf(__fsub_rn(m, with));
    weights.unit = nothing_before ? 1.0f : expf(__fsub_rn(m_and_l.x, with));
    return weights;
  }
  __device__ void Fold(float unit_o, float& o, float& total_l) const {
    o = __fmaf_rn(unit_o, unit, __fmul_rn(o, before));
    total_l = __fmaf_rn(l, unit, __fmul_rn(total_l, before));
  }
};

}  // namespace headroom::kernels::cuda

#endif  // HEADROOM_KERNELS_CUDA_FOLD_WEIGHTS_CUH_
