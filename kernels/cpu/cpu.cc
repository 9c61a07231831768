// The public CPU kernels: the best instruction set of this processor, chosen once.
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>

#include "kernels/cpu/kernel_table.h"
#include "kernels/cpu/tile_attention.h"
#include "kernels/fill_random.h"

namespace headroom::kernels::cpu {
namespace {

const KernelTable& Best() {
  static const KernelTable& best = HasAvx512() ? kAvx512Kernels
                                   : HasAvx2() ? kAvx2Kernels
                                               : kPortableKernels;
  return best;
}

}  // namespace

bool HasAvx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool HasAvx512() {
  return HasAvx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

bool ReadsAhead() { return HasAvx512() && __builtin_cpu_is("amd"); }

bool HasAmx() {
  static const bool has = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!HasAvx512() || __get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
    constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24;
    if ((d & kBf16) == 0 || (d & kTiles) == 0) return false;
    constexpr unsigned kBf16Vectors = 1u << 5;
    if (__get_cpuid_count(7, 1, &a, &b, &c, &d) == 0 || (a & kBf16Vectors) == 0) return false;
    // Linux keeps the tiles of those who have asked: ARCH_REQ_XCOMP_PERM of XFEATURE_XTILEDATA.
    constexpr long kRequest = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  }();
  return has;
}

const TileAttention* BestTileAttention() {
  return HasAmx() ? &kAmxAttention : nullptr;
}

void Attend(const AttendArgs& args, CpuTeam& team) {
  static const bool streamed = ReadsAhead();
  (streamed ? Best().attend_streamed : Best().attend)(args, team);
}
void CopyKvRows(const CopyKvRowsArgs& args, CpuTeam& team) { Best().copy_kv_rows(args, team); }
void Embed(const EmbedArgs& args, CpuTeam& team) { Best().embed(args, team); }
void Gemm(const GemmArgs& args, CpuTeam& team) { Best().gemm(args, team); }
void MergePartials(const MergePartialsArgs& args, CpuTeam& team) {
  Best().merge_partials(args, team);
}
void RmsNorm(const RmsNormArgs& args, CpuTeam& team) { Best().rms_norm(args, team); }
void RopeTable(const RopeTableArgs& args, CpuTeam& team) { Best().rope_table(args, team); }
void RopeAppend(const RopeAppendArgs& args, CpuTeam& team) { Best().rope_append(args, team); }
void Sample(const SampleArgs& args, CpuTeam& team) { Best().sample(args, team); }
void SoftCap(const SoftCapArgs& args, CpuTeam& team) { Best().soft_cap(args, team); }
void SwiGlu(const SwiGluArgs& args, CpuTeam& team) { Best().swiglu(args, team); }

void PackWeightRows(const BFloat16* rows_data, int64_t row_begin, int64_t rows, int64_t n,
                    int64_t k, BFloat16* packed) {
  for (int64_t row = row_begin; row < row_begin + rows; ++row) {
    const BFloat16* from = rows_data + (row - row_begin) * k;
    BFloat16* to = packed + PackedWeightIndex(k, row, 0);
    for (int64_t column = 0; column < k; ++column) to[column * kPanelOutputs] = from[column];
    // The row that opens the last panel also clears the outputs past n.
    if (row % kPanelOutputs != 0 || row + kPanelOutputs <= n) continue;
    const int64_t padding = row + kPanelOutputs - n;
    for (int64_t column = 0; column < k; ++column) {
      BFloat16* const end = to + (column + 1) * kPanelOutputs;
      std::fill(end - padding, end, BFloat16());
    }
  }
}

// A panel is one task; its rows are drawn one after the other, four elements from one number.
void FillRandom(const FillRandomArgs& a, CpuTeam& team) {
  const int64_t panels = (a.n + kPanelOutputs - 1) / kPanelOutputs;
  team.ForEach(panels, [&](int64_t panel) {
    for (int64_t row = panel * kPanelOutputs; row < (panel + 1) * kPanelOutputs; ++row) {
      BFloat16* const to = a.out + PackedWeightIndex(a.k, row, 0);
      const int64_t first = row * a.k;
      uint64_t four = SplitMix64(a.seed, static_cast<uint64_t>(first / 4)) >> (16 * (first % 4));
      for (int64_t column = 0; column < a.k; ++column, four >>= 16) {
        const int64_t i = first + column;
        if (i % 4 == 0) four = SplitMix64(a.seed, static_cast<uint64_t>(i / 4));
        to[column * kPanelOutputs] =
            row < a.n ? ToBFloat16(a.scale * UniformOf16Bits(four)) : BFloat16();
      }
    }
  });
}

}  // namespace headroom::kernels::cpu
