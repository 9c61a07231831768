// Soft cap of logits, in place: x = cap * tanh(x / cap).
// Source: Gemma 2, arXiv 2408.00118.
#ifndef HEADROOM_KERNELS_SOFT_CAP_H_
#define HEADROOM_KERNELS_SOFT_CAP_H_

#include "kernels/types.h"

namespace headroom::kernels {

class CpuTeam;

struct SoftCapArgs {
  float* x = nullptr;  // [rows, width]
  int64_t rows = 0;
  int64_t width = 0;
  float cap = 0;  // > 0
};

template <typename F>
void ForEachRange(const SoftCapArgs& a, F&& f) {
  f(a.x, a.rows * a.width * static_cast<int64_t>(sizeof(float)), Access::kReadWrite);
}

namespace cpu {
void SoftCap(const SoftCapArgs& args, CpuTeam& team);
}
namespace reference {
void SoftCap(const SoftCapArgs& args);
}

}  // namespace headroom::kernels

#endif  // HEADROOM_KERNELS_SOFT_CAP_H_
