// Root-mean-square normalisation:
//   out[r] = x[row(r)] / sqrt(mean(x[row(r)]^2) + epsilon) * (weight + weight_offset),
// added to what out[r] was with `accumulate`.
// Source: Zhang and Sennrich, arXiv 1910.07467. Mean in float32, in a fixed order.
#ifndef HEADROOM_KERNELS_RMS_NORM_H_
#define HEADROOM_KERNELS_RMS_NORM_H_

#include "kernels/types.h"

namespace headroom::kernels {

class CpuTeam;

struct RmsNormArgs {
  const float* x = nullptr;  // [x_rows, hidden]
  int64_t x_rows = 0;
  const BFloat16* weight = nullptr;  // [hidden]
  Activations out;                   // [rows, hidden]
  int64_t rows = 0;
  int64_t hidden = 0;
  float epsilon = 0;
  // Which rows of x to take, each in [0, x_rows); without it row r is x[r]. Only rows that sample
  // need the final norm.
  Table<int32_t> row_index;
  float weight_offset = 0;  // Gemma's weights are stored less 1
  bool accumulate = false;  // REQUIRES: out is float32
};

template <typename F>
void ForEachRange(const RmsNormArgs& a, F&& f) {
  f(a.x, a.x_rows * a.hidden * static_cast<int64_t>(sizeof(float)), Access::kRead);
  f(a.weight, a.hidden * static_cast<int64_t>(sizeof(BFloat16)), Access::kRead);
  f(a.out.data, a.out.Bytes(a.rows * a.hidden),
    a.accumulate ? Access::kReadWrite : Access::kWrite);
  if (a.row_index.device != nullptr) {
    f(a.row_index.device, a.rows * static_cast<int64_t>(sizeof(int32_t)), Access::kRead);
  }
}

namespace cpu {
void RmsNorm(const RmsNormArgs& args, CpuTeam& team);
}
namespace reference {
void RmsNorm(const RmsNormArgs& args);
}

}  // namespace headroom::kernels

#endif  // HEADROOM_KERNELS_RMS_NORM_H_
