// How two attention states over disjoint keys become one.
#ifndef HEADROOM_KERNELS_CUDA_FOLD_WEIGHTS_CUH_
#define HEADROOM_KERNELS_CUDA_FOLD_WEIGHTS_CUH_

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

}  // namespace headroom::kernels::cuda

#endif  // HEADROOM_KERNELS_CUDA_FOLD_WEIGHTS_CUH_
