// The CPU kernels of one instruction set. kernels/cpu/*_kernel.cc are compiled once per set; cpu.cc
// picks the best that this processor has.
#ifndef HEADROOM_KERNELS_CPU_KERNEL_TABLE_H_
#define HEADROOM_KERNELS_CPU_KERNEL_TABLE_H_

#include "kernels/attention.h"
#include "kernels/copy_kv_rows.h"
#include "kernels/cpu/team.h"
#include "kernels/embed.h"
#include "kernels/gemm.h"
#include "kernels/merge_partials.h"
#include "kernels/rms_norm.h"
#include "kernels/rope.h"
#include "kernels/sample.h"
#include "kernels/soft_cap.h"
#include "kernels/swiglu.h"

namespace headroom::kernels::cpu {

struct KernelTable {
  const char* name;
  void (*attend)(const AttendArgs&, CpuTeam&);
  void (*attend_streamed)(const AttendArgs&, CpuTeam&);  // the same bits; ReadsAhead()
  void (*copy_kv_rows)(const CopyKvRowsArgs&, CpuTeam&);
  void (*embed)(const EmbedArgs&, CpuTeam&);
  void (*gemm)(const GemmArgs&, CpuTeam&);
  void (*merge_partials)(const MergePartialsArgs&, CpuTeam&);
  void (*rms_norm)(const RmsNormArgs&, CpuTeam&);
  void (*rope_table)(const RopeTableArgs&, CpuTeam&);
  void (*rope_append)(const RopeAppendArgs&, CpuTeam&);
  void (*sample)(const SampleArgs&, CpuTeam&);
  void (*soft_cap)(const SoftCapArgs&, CpuTeam&);
  void (*swiglu)(const SwiGluArgs&, CpuTeam&);
};

extern const KernelTable kAvx512Kernels;   // HasAvx512()
extern const KernelTable kAvx2Kernels;     // HasAvx2()
extern const KernelTable kPortableKernels;  // any processor; exact, and slow by a factor of 50

// What this processor has: AVX2 with FMA; AVX-512 F, BW, VL and DQ.
bool HasAvx2();
bool HasAvx512();
// Whether its prefetchers keep up with a core that touches lines in the order they lie: AMD's from Zen 4 on
// (earlier ones were not measured).
bool ReadsAhead();

}  // namespace headroom::kernels::cpu

#endif  // HEADROOM_KERNELS_CPU_KERNEL_TABLE_H_
