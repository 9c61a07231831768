// The kernels of one instruction set, by name; included only where KernelTable is filled and by the
// files that define them.
#ifndef HEADROOM_KERNELS_CPU_KERNELS_H_
#define HEADROOM_KERNELS_CPU_KERNELS_H_

#include "kernels/cpu/kernel_table.h"
#include "kernels/cpu/simd.h"

namespace headroom::kernels::cpu::HEADROOM_ISA_NAMESPACE {

void Attend(const AttendArgs& args, CpuTeam& team);
void AttendStreamed(const AttendArgs& args, CpuTeam& team);
void CopyKvRows(const CopyKvRowsArgs& args, CpuTeam& team);
void Embed(const EmbedArgs& args, CpuTeam& team);
void Gemm(const GemmArgs& args, CpuTeam& team);
void MergePartials(const MergePartialsArgs& args, CpuTeam& team);
void RmsNorm(const RmsNormArgs& args, CpuTeam& team);
void RopeTable(const RopeTableArgs& args, CpuTeam& team);
void RopeAppend(const RopeAppendArgs& args, CpuTeam& team);
void Sample(const SampleArgs& args, CpuTeam& team);
void SoftCap(const SoftCapArgs& args, CpuTeam& team);
void SwiGlu(const SwiGluArgs& args, CpuTeam& team);

}  // namespace headroom::kernels::cpu::HEADROOM_ISA_NAMESPACE

#endif  // HEADROOM_KERNELS_CPU_KERNELS_H_
