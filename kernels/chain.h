// A chain: operations of a step that follow each other, each of which may read what those before it wrote.
// A device that has more than one way to run them (Device::Chain) gives the bits of one after the other.
//
// What an operation writes and the next one alone reads need not be in memory afterwards: the result of a
// norm that a product takes, a product's sums that are rotated or gated.
#ifndef HEADROOM_KERNELS_CHAIN_H_
#define HEADROOM_KERNELS_CHAIN_H_

#include <variant>

#include "kernels/gemm.h"
#include "kernels/rms_norm.h"
#include "kernels/rope.h"
#include "kernels/swiglu.h"

namespace headroom::kernels {

using ChainOp = std::variant<RmsNormArgs, GemmArgs, GatedGemmArgs, RopeAppendArgs>;

}  // namespace headroom::kernels

#endif  // HEADROOM_KERNELS_CHAIN_H_
