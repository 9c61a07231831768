// Linear layers: c[m, n] = (accumulate ? c[m, n] : 0) + sum over k of a[m, k] * w[n, k].
//
// bfloat16 weights; sums in float32, then one addition of the old c where `accumulate` is set.
// On the CPU activations are float32, and every sum is ONE chain of fused multiply-adds over k = 0, 1,
// ..., K-1, so that a row's bits do not depend on the batch. On a GPU activations are bfloat16, and a
// row's bits do not depend on the batch among batches of up to kFewGemmRows rows: decode.
#ifndef HEADROOM_KERNELS_GEMM_H_
#define HEADROOM_KERNELS_GEMM_H_

#include "kernels/types.h"

namespace headroom::kernels {

class CpuTeam;

// Outputs per panel of a packed weight: 32 bfloat16 are one cache line.
inline constexpr int64_t kPanelOutputs = 32;

// A weight matrix [n, k] as the CPU kernels want it: panels of kPanelOutputs outputs,
// [ceil(n / 32)][k][32], outputs past n are zero. 64-byte aligned.
struct PackedWeight {
  const BFloat16* data = nullptr;
  int64_t n = 0;
  int64_t k = 0;
};

inline int64_t PackedWeightBytes(int64_t n, int64_t k) {
  return (n + kPanelOutputs - 1) / kPanelOutputs * kPanelOutputs * k *
         static_cast<int64_t>(sizeof(BFloat16));
}

// Index of element (row, column) of the [n, k] matrix inside its packed form.
inline int64_t PackedWeightIndex(int64_t k, int64_t row, int64_t column) {
  return (row / kPanelOutputs * k + column) * kPanelOutputs + row % kPanelOutputs;
}

// What a decode step may have; more rows are a chunk's.
inline constexpr int64_t kFewGemmRows = 64;

struct GemmArgs {
  Activations a;  // [m, k], row stride a_stride; read
  int64_t a_stride = 0;
  PackedWeight w;
  Activations c;  // [m, n], row stride c_stride; float32 with `accumulate`
  int64_t c_stride = 0;
  int64_t m = 0;
  bool accumulate = false;
};

template <typename F>
void ForEachRange(const GemmArgs& g, F&& f) {
  if (g.m == 0) return;
  f(g.a.data, g.a.Bytes((g.m - 1) * g.a_stride + g.w.k), Access::kRead);
  f(g.w.data, PackedWeightBytes(g.w.n, g.w.k), Access::kRead);
  f(g.c.data, g.c.Bytes((g.m - 1) * g.c_stride + g.w.n),
    g.accumulate ? Access::kReadWrite : Access::kWrite);
}

namespace cpu {
void Gemm(const GemmArgs& args, CpuTeam& team);
// Packs rows [row_begin, row_begin + rows) of a row-major [n, k] matrix into `packed`. Rows may come
// in any order and grouping; the padding of the last panel is zeroed when its first row is packed.
void PackWeightRows(const BFloat16* rows_data, int64_t row_begin, int64_t rows, int64_t n, int64_t k,
                    BFloat16* packed);
}  // namespace cpu
namespace reference {
void Gemm(const GemmArgs& args);
}

}  // namespace headroom::kernels

#endif  // HEADROOM_KERNELS_GEMM_H_
