#include "kernels/cpu/kernels.h"

namespace headroom::kernels::cpu {

#if defined(__AVX512F__)
const KernelTable kAvx512Kernels = {
    "avx512",
#elif defined(__AVX2__) && defined(__FMA__)
const KernelTable kAvx2Kernels = {
    "avx2",
#else
const KernelTable kPortableKernels = {
    "portable",
#endif
    &HEADROOM_ISA_NAMESPACE::Attend,     &HEADROOM_ISA_NAMESPACE::AttendStreamed,
    &HEADROOM_ISA_NAMESPACE::CopyKvRows, &HEADROOM_ISA_NAMESPACE::Embed,
    &HEADROOM_ISA_NAMESPACE::Gemm,       &HEADROOM_ISA_NAMESPACE::MergePartials,
    &HEADROOM_ISA_NAMESPACE::RmsNorm,    &HEADROOM_ISA_NAMESPACE::RopeTable,
    &HEADROOM_ISA_NAMESPACE::RopeAppend, &HEADROOM_ISA_NAMESPACE::Sample,
    &HEADROOM_ISA_NAMESPACE::SoftCap,    &HEADROOM_ISA_NAMESPACE::SwiGlu,
};

}  // namespace headroom::kernels::cpu
