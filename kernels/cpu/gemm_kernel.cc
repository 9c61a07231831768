// float32 x bfloat16 GEMM over packed panels of 32 outputs. Every output is one chain of fused
// multiply-adds over k, so that the blocking below is invisible in the bits.
#include <algorithm>
#include <type_traits>
#include <utility>

#include "kernels/cpu/kernels.h"

namespace headroom::kernels::cpu::HEADROOM_ISA_NAMESPACE {
namespace {

// Rows and vectors of outputs that the micro kernel carries. AVX-512: 12 x 2 accumulators, two weights
// and a broadcast are 27 of 32 registers. AVX2, where a vector is two registers: 6 x 1, 15 of 16; one
// accumulator in memory would halve the speed.
#if defined(__AVX512F__)
constexpr int kRows = 12;
constexpr int kVectors = 2;
constexpr int kWide = 4;
#else
constexpr int kRows = 6;
constexpr int kVectors = 1;
constexpr int kWide = 2;
#endif
constexpr int kOutputs = kVectors * kLanes;
constexpr int kPanelVectors = kPanelOutputs / kLanes;
// kWide: panels that one row's pass reads side by side, so that enough loads and chains are in flight.

// From this many rows on a panel is widened to float32 once and reused from L2.
constexpr int64_t kWidenFromRows = 24;
// k values widened at a time: 2048 x 32 x 4 B = 256 KiB of a 1 MiB L2.
constexpr int64_t kDepth = 2048;
// Rows whose chains are carried over blocks of k at a time: 60 KiB.
constexpr int64_t kCarriedRows = 480;
static_assert(kCarriedRows % kRows == 0);

F32x16 LoadWeight(const float* w) { return Load(w); }
F32x16 LoadWeight(const BFloat16* w) { return LoadBf16(w); }

// Writes the accumulators of one row, as many outputs as there are: the last n.
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

// kM rows x kOutputs of one panel's outputs over `depth` values of k. The chain of a row begins from
// zero, or goes on from `carry` (rows of 32) where an earlier block of k left it, and ends there or in
// c, which has n outputs from here on.
template <int kM, typename W>
void MicroKernel(const float* a, int64_t a_stride, const W* w, int64_t depth, float* carry,
                 bool first, bool last, float* c, int64_t c_stride, int64_t n, bool accumulate) {
  F32x16 acc[kM][kVectors];
#pragma GCC unroll 16
  for (int m = 0; m < kM; ++m) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      acc[m][v] = first ? Zero() : Load(carry + m * kPanelOutputs + v * kLanes);
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    if constexpr (std::is_same_v<W, BFloat16>) __builtin_prefetch(w + 16 * kPanelOutputs);
    F32x16 b[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) b[v] = LoadWeight(w + v * kLanes);
    w += kPanelOutputs;
#pragma GCC unroll 16
    for (int m = 0; m < kM; ++m) {
      const F32x16 x = Broadcast(a[m * a_stride + k]);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) acc[m][v] = Fma(x, b[v], acc[m][v]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < kM; ++m) {
    if (last) {
      StoreRow<kVectors>(c + m * c_stride, acc[m], n, accumulate);
    } else {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        Store(carry + m * kPanelOutputs + v * kLanes, acc[m][v]);
      }
    }
  }
}

using MicroFn = void (*)(const float*, int64_t, const float*, int64_t, float*, bool, bool, float*,
                         int64_t, int64_t, bool);
using NarrowFn = void (*)(const float*, int64_t, const BFloat16*, int64_t, float*, bool, bool,
                          float*, int64_t, int64_t, bool);

template <typename W, typename Fn, int... kM>
constexpr auto MakeTable(std::integer_sequence<int, kM...>) {
  struct {
    Fn fn[sizeof...(kM)];
  } table = {{&MicroKernel<kM + 1, W>...}};
  return table;
}
constexpr auto kWideTable = MakeTable<float, MicroFn>(std::make_integer_sequence<int, kRows>());
constexpr auto kNarrowTable =
    MakeTable<BFloat16, NarrowFn>(std::make_integer_sequence<int, kRows>());

// One row x kWide neighbouring panels: the memory-bound case. Each panel is a stream of its own.
void RowTimesPanels(const float* a, const PackedWeight& w, int64_t panel, float* c,
                    bool accumulate) {
  F32x16 acc[kWide][kPanelVectors];
  const BFloat16* from[kWide];
#pragma GCC unroll 4
  for (int p = 0; p < kWide; ++p) {
    from[p] = w.data + (panel + p) * w.k * kPanelOutputs;
#pragma GCC unroll 2
    for (int v = 0; v < kPanelVectors; ++v) acc[p][v] = Zero();
  }
  for (int64_t k = 0; k < w.k; ++k) {
    const F32x16 x = Broadcast(a[k]);
#pragma GCC unroll 4
    for (int p = 0; p < kWide; ++p) {
      const BFloat16* at = from[p] + k * kPanelOutputs;
      __builtin_prefetch(at + 24 * kPanelOutputs);
#pragma GCC unroll 2
      for (int v = 0; v < kPanelVectors; ++v) {
        acc[p][v] = Fma(x, LoadBf16(at + v * kLanes), acc[p][v]);
      }
    }
  }
#pragma GCC unroll 4
  for (int p = 0; p < kWide; ++p) {
    const int64_t first = (panel + p) * kPanelOutputs;
    StoreRow<kPanelVectors>(c + first, acc[p], w.n - first, accumulate);
  }
}

// All rows x one panel, weights read as they are.
void NarrowPanel(const GemmArgs& g, int64_t panel) {
  const BFloat16* w = g.w.data + panel * g.w.k * kPanelOutputs;
  for (int64_t m = 0; m < g.m; m += kRows) {
    const int64_t rows = std::min<int64_t>(kRows, g.m - m);
    for (int64_t at = 0; at < kPanelOutputs; at += kOutputs) {
      const int64_t first = panel * kPanelOutputs + at;
      if (first >= g.w.n) break;
      kNarrowTable.fn[rows - 1](g.a + m * g.a_stride, g.a_stride, w + at, g.w.k, nullptr, true,
                                true, g.c + m * g.c_stride + first, g.c_stride, g.w.n - first,
                                g.accumulate);
    }
  }
}

// All rows x one panel, widened once per block of k and reused by every block of rows.
void WidePanel(const GemmArgs& g, int64_t panel) {
  alignas(64) float widened[kDepth * kPanelOutputs];
  alignas(64) float carries[kCarriedRows * kPanelOutputs];
  const BFloat16* w = g.w.data + panel * g.w.k * kPanelOutputs;
  // Where k takes several blocks, rows go in passes whose carries stay in L2; the panel is widened
  // again for each pass.
  const int64_t rows_a_pass = g.w.k <= kDepth ? g.m : kCarriedRows;
  for (int64_t pass = 0; pass < g.m; pass += rows_a_pass) {
    const int64_t pass_end = std::min(g.m, pass + rows_a_pass);
    for (int64_t k = 0; k < g.w.k; k += kDepth) {
      const int64_t depth = std::min(kDepth, g.w.k - k);
      for (int64_t i = 0; i < depth * kPanelOutputs; i += kLanes) {
        Store(widened + i, LoadBf16(w + k * kPanelOutputs + i));
      }
      const bool last = k + depth == g.w.k;
      for (int64_t m = pass; m < pass_end; m += kRows) {
        const int64_t rows = std::min<int64_t>(kRows, pass_end - m);
        for (int64_t at = 0; at < kPanelOutputs; at += kOutputs) {
          const int64_t first = panel * kPanelOutputs + at;
          if (first >= g.w.n) break;
          kWideTable.fn[rows - 1](g.a + m * g.a_stride + k, g.a_stride, widened + at, depth,
                                  g.w.k <= kDepth ? nullptr
                                                  : carries + (m - pass) * kPanelOutputs + at,
                                  k == 0, last, g.c + m * g.c_stride + first, g.c_stride,
                                  g.w.n - first, g.accumulate);
        }
      }
    }
  }
}

}  // namespace

void Gemm(const GemmArgs& g, CpuTeam& team) {
  if (g.m <= 0 || g.w.n <= 0) return;
  const int64_t panels = (g.w.n + kPanelOutputs - 1) / kPanelOutputs;
  if (g.m >= kWidenFromRows) {
    team.ForEach(panels, [&](int64_t panel) { WidePanel(g, panel); });
    return;
  }
  // Memory-bound: each member streams one contiguous range of the weights.
  team.Run([&](int member) {
    int64_t panel = panels * member / team.size();
    const int64_t end = panels * (member + 1) / team.size();
    if (g.m == 1) {
      for (; panel + kWide <= end; panel += kWide) {
        RowTimesPanels(g.a, g.w, panel, g.c, g.accumulate);
      }
    }
    for (; panel < end; ++panel) NarrowPanel(g, panel);
  });
}

}  // namespace headroom::kernels::cpu::HEADROOM_ISA_NAMESPACE
