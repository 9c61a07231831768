// float32 x bfloat16 GEMM over packed panels of 32 outputs. Every output is one chain of fused
// multiply-adds over k, from its first to its last weight inside one call of the micro kernel.
//
// Weights are widened in registers where they are used: two instructions on otherwise idle ports for
// 24 multiply-adds at 12 rows. One row streams them as fast as a core reads memory.
#include <algorithm>
#include <array>
#include <utility>

#include "kernels/cpu/kernels.h"
#include "kernels/cpu/runs.h"

namespace headroom::kernels::cpu::HEADROOM_ISA_NAMESPACE {
namespace {

// Rows that the micro kernel carries, and vectors of outputs. AVX-512: 12 x 2 accumulators, two weights
// and a broadcast are 27 of 32 registers. AVX2, where a vector is two registers: 6 x 1 are 15 of 16
// (one accumulator in memory would halve the speed); one or two rows take both vectors of a panel.
#if defined(__AVX512F__)
constexpr int kRows = 12;
template <int kM>
constexpr int kVectors = 2;
#elif defined(__AVX2__)
constexpr int kRows = 6;
template <int kM>
constexpr int kVectors = kM <= 2 ? 2 : 1;
#else
constexpr int kRows = 2;
template <int kM>
constexpr int kVectors = 1;
#endif

// How far ahead weights are asked for: at 4 KiB one core reads them as fast as it reads at all
// (30 GB/s), at 1 KiB it loses a tenth.
constexpr int64_t kAhead = 64 * kPanelOutputs;

// Writes the accumulators of one row, of which n outputs exist.
template <int kCount>
void StoreRow(float* c, const F32x16* acc, int64_t n, bool accumulate) {
  if (n >= kCount * kLanes) {
#pragma GCC unroll 2
    for (int v = 0; v < kCount; ++v) {
      Store(c + v * kLanes, accumulate ? Add(Load(c + v * kLanes), acc[v]) : acc[v]);
    }
    return;
  }
  alignas(64) float lanes[kCount * kLanes];
  for (int v = 0; v < kCount; ++v) Store(lanes + v * kLanes, acc[v]);
  for (int64_t i = 0; i < n; ++i) c[i] = accumulate ? c[i] + lanes[i] : lanes[i];
}

// kM rows of a and c x kVectors of a panel, from `w` on; n outputs are left from here on. Weights up to
// `weights_end` will be wanted next.
template <int kM>
void MicroKernel(const GemmArgs& g, const float* a, const BFloat16* w, const BFloat16* weights_end,
                 float* c, int64_t n) {
  constexpr int kCount = kVectors<kM>;
  F32x16 acc[kM][kCount];
#pragma GCC unroll 16
  for (int m = 0; m < kM; ++m) {
#pragma GCC unroll 2
    for (int v = 0; v < kCount; ++v) acc[m][v] = Zero();
  }
  const int64_t a_stride = g.a_stride;
  for (int64_t k = 0, depth = g.w.k; k < depth; ++k) {
    F32x16 b[kCount];
    if constexpr (kCount == 2) {
      LoadBf16EvenOdd(w, b[0], b[1]);  // even and odd outputs, sorted at the end
    } else {
      b[0] = LoadBf16(w);
    }
    __builtin_prefetch(std::min(w + kAhead, weights_end));
    w += kPanelOutputs;
#pragma GCC unroll 16
    for (int m = 0; m < kM; ++m) {
      const F32x16 x = Broadcast(a[m * a_stride + k]);
#pragma GCC unroll 2
      for (int v = 0; v < kCount; ++v) acc[m][v] = Fma(x, b[v], acc[m][v]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < kM; ++m) {
    if constexpr (kCount == 2) Interleave(acc[m][0], acc[m][1]);
    StoreRow<kCount>(c + m * g.c_stride, acc[m], n, g.accumulate);
  }
}

// kM rows x one panel.
template <int kM>
void PanelRows(const GemmArgs& g, const float* a, int64_t panel, const BFloat16* weights_end,
               float* c) {
  const BFloat16* w = g.w.data + panel * g.w.k * kPanelOutputs;
  for (int64_t at = 0; at < kPanelOutputs; at += kVectors<kM> * kLanes) {
    const int64_t first = panel * kPanelOutputs + at;
    if (first < g.w.n) MicroKernel<kM>(g, a, w + at, weights_end, c + first, g.w.n - first);
  }
}

using PanelFn = void (*)(const GemmArgs&, const float*, int64_t, const BFloat16*, float*);
template <int... kM>
constexpr std::array<PanelFn, sizeof...(kM)> MakeTable(std::integer_sequence<int, kM...>) {
  return {&PanelRows<kM + 1>...};
}
constexpr auto kPanelRows = MakeTable(std::make_integer_sequence<int, kRows>());  // [rows - 1]

// Rows [row_begin, row_end) x one panel.
void Panel(const GemmArgs& g, int64_t row_begin, int64_t row_end, int64_t panel,
           const BFloat16* weights_end) {
  for (int64_t m = row_begin; m < row_end; m += kRows) {
    const int64_t rows = std::min<int64_t>(kRows, row_end - m);
    kPanelRows[rows - 1](g, g.a.floats() + m * g.a_stride, panel, weights_end,
                         g.c.floats() + m * g.c_stride);
  }
}

// Rows that go through all panels together, so that their activations stay in L2 meanwhile.
int64_t RowsABlock(const GemmArgs& g) {
  constexpr int64_t kActivationBytes = 640 << 10;
  const int64_t fit = kActivationBytes / (g.w.k * static_cast<int64_t>(sizeof(float)));
  const int64_t most = std::max<int64_t>(fit, 10 * kRows);
  const int64_t blocks = (g.m + most - 1) / most;
  const int64_t rows = (g.m + blocks - 1) / blocks;
  return (rows + kRows - 1) / kRows * kRows;
}

}  // namespace

void Gemm(const GemmArgs& g, CpuTeam& team) {
  if (g.m <= 0 || g.w.n <= 0) return;
  const int64_t rows = RowsABlock(g);
  const int64_t panels = (g.w.n + kPanelOutputs - 1) / kPanelOutputs;
  // Panels in a row, because each prefetches for the next.
  const int64_t tasks = (g.m + rows - 1) / rows * panels;
  ForEachStream(team, tasks, [&](int64_t begin, int64_t end, int64_t left_end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row_begin = task / panels * rows;
      const int64_t panel = task % panels;
      // The last line that is read before other rows' turn.
      const int64_t last_panel = std::min(panels, panel + left_end - task);
      Panel(g, row_begin, std::min(g.m, row_begin + rows), panel,
            g.w.data + (last_panel * g.w.k - 1) * kPanelOutputs);
    }
  });
}

}  // namespace headroom::kernels::cpu::HEADROOM_ISA_NAMESPACE
