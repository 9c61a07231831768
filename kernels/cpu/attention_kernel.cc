// Attention over spans of keys; attention.h states the fold, to the bit.
//
// One routine does the arithmetic: a group of queries against one block of 64 keys, with K transposed
// to [head_dim][64] and V widened to [64][head_dim] once per block and head. Scores are then chains
// of fused multiply-adds over head_dim, vectorised over keys; P V are chains over keys, vectorised over
// head_dim. Only how work is divided differs: many rows are split by rows, few rows by units, whose
// partials are folded in order afterwards.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels/cpu/kernels.h"

namespace headroom::kernels::cpu::HEADROOM_ISA_NAMESPACE {
namespace {

constexpr int kBlock = static_cast<int>(kBlockTokens);
constexpr int kBlockVectors = kBlock / kLanes;
constexpr int kMaxHeadDim = 256;
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// Queries that share a pass over a block: 6 x 4 accumulators fill 24 of AVX-512's 32 registers.
#if defined(__AVX512F__)
constexpr int kGroup = 6;
#else
constexpr int kGroup = 2;
#endif

// Queries (rows x group) of one KV head from which work is divided by rows and not by units.
constexpr int64_t kManyQueries = 96;
// Rows of a task when it is.
constexpr int64_t kRowsATask = 32;

// R or U: {o[d], m, l}.
struct Partial {
  float* o;
  int32_t d;
  float& m() const { return o[d]; }
  float& l() const { return o[d + 1]; }
  void Reset() const {
    std::memset(o, 0, d * sizeof(float));
    m() = kMinusInfinity;
    l() = 0;
  }
};

// a = fold(a, b), b the later keys. Empty is the identity on both sides, exactly.
void Fold(const Partial& a, const Partial& b) {
  if (b.l() == 0) return;
  if (a.l() == 0) {
    std::memcpy(a.o, b.o, (a.d + 2) * sizeof(float));
    return;
  }
  const float m = std::max(a.m(), b.m());
  const float wa = Exp(a.m() - m);
  const float wb = Exp(b.m() - m);
  for (int i = 0; i < a.d; i += kLanes) {
    Store(a.o + i, Fma(Load(b.o + i), Broadcast(wb), Mul(Load(a.o + i), Broadcast(wa))));
  }
  a.l() = std::fma(b.l(), wb, a.l() * wa);
  a.m() = m;
}

// One block of keys, ready for use.
struct Block {
  int64_t first_pos = 0;
  int count = 0;                                          // keys that exist
  alignas(64) float k_transposed[kMaxHeadDim * kBlock];   // [d][64]
  alignas(64) float v[kBlock * kMaxHeadDim];              // [64][d]
};

#if defined(__AVX512F__)
// in[r]: 16 32-bit words of row r; out: word w of all 16 rows.
void Transpose(const __m512i* in, __m512i* out) {
  __m512i a[16], b[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    a[2 * i] = _mm512_unpacklo_epi32(in[2 * i], in[2 * i + 1]);
    a[2 * i + 1] = _mm512_unpackhi_epi32(in[2 * i], in[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    b[4 * i] = _mm512_unpacklo_epi64(a[4 * i], a[4 * i + 2]);
    b[4 * i + 1] = _mm512_unpackhi_epi64(a[4 * i], a[4 * i + 2]);
    b[4 * i + 2] = _mm512_unpacklo_epi64(a[4 * i + 1], a[4 * i + 3]);
    b[4 * i + 3] = _mm512_unpackhi_epi64(a[4 * i + 1], a[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i p = _mm512_shuffle_i32x4(b[j], b[4 + j], 0x88);
    const __m512i q = _mm512_shuffle_i32x4(b[j], b[4 + j], 0xdd);
    const __m512i r = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0x88);
    const __m512i s = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0xdd);
    out[j] = _mm512_shuffle_i32x4(p, r, 0x88);
    out[8 + j] = _mm512_shuffle_i32x4(p, r, 0xdd);
    out[4 + j] = _mm512_shuffle_i32x4(q, s, 0x88);
    out[12 + j] = _mm512_shuffle_i32x4(q, s, 0xdd);
  }
}

// 16 rows x 32 columns of bfloat16 to [32][kBlock] float32.
void TransposeTile(const BFloat16* const* rows, int column, float* out) {
  __m512i in[16], words[16];
  for (int r = 0; r < 16; ++r) in[r] = _mm512_loadu_si512(rows[r] + column);
  Transpose(in, words);
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  for (int w = 0; w < 16; ++w) {
    _mm512_storeu_si512(out + (2 * w) * kBlock, _mm512_slli_epi32(words[w], 16));
    _mm512_storeu_si512(out + (2 * w + 1) * kBlock, _mm512_and_si512(words[w], high));
  }
}
#else
void TransposeTile(const BFloat16* const* rows, int column, float* out) {
  for (int r = 0; r < 16; ++r) {
    for (int c = 0; c < 32; ++c) out[c * kBlock + r] = ToFloat(rows[r][column + c]);
  }
}
#endif

// Rows past `count` are taken as zero and never read.
void LoadBlock(const KvSpan& span, int32_t head, int64_t first_pos, int count, int32_t d,
               Block& block) {
  alignas(64) static constexpr BFloat16 kZeroRow[kMaxHeadDim] = {};
  const KvLayout layout{span.capacity, d};
  const int64_t row = (first_pos - span.origin_pos) % span.capacity;
  const auto* keys = reinterpret_cast<const BFloat16*>(
      span.base + layout.KeyOffset(head - span.kv_head_begin, row));
  const auto* values = reinterpret_cast<const BFloat16*>(
      span.base + layout.ValueOffset(head - span.kv_head_begin, row));
  block.first_pos = first_pos;
  block.count = count;
  for (int begin = 0; begin < kBlock; begin += 16) {
    const BFloat16* rows[16];
    for (int r = 0; r < 16; ++r) rows[r] = begin + r < count ? keys + (begin + r) * d : kZeroRow;
    for (int column = 0; column < d; column += 32) {
      TransposeTile(rows, column, block.k_transposed + column * kBlock + begin);
    }
  }
  const int64_t present = int64_t{count} * d;
  for (int64_t i = 0; i < present; i += kLanes) Store(block.v + i, LoadBf16(values + i));
  std::memset(block.v + present, 0, (int64_t{kBlock} * d - present) * sizeof(float));
}

// One query: where it reads, where its open unit is, what it sees.
struct Query {
  const float* q;
  Partial unit;
  int64_t pos;
};

// kN queries against one block.
template <int kN>
void AttendBlock(const Query* queries, const Block& block, int32_t d, float scale) {
  alignas(64) float p[kN][kBlock];
  float rescale[kN];
  {
    F32x16 scores[kN][kBlockVectors];
#pragma GCC unroll 8
    for (int n = 0; n < kN; ++n) {
#pragma GCC unroll 4
      for (int v = 0; v < kBlockVectors; ++v) scores[n][v] = Zero();
    }
    for (int32_t i = 0; i < d; ++i) {
      F32x16 k[kBlockVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kBlockVectors; ++v) k[v] = Load(block.k_transposed + i * kBlock + v * kLanes);
#pragma GCC unroll 8
      for (int n = 0; n < kN; ++n) {
        const F32x16 q = Broadcast(queries[n].q[i]);
#pragma GCC unroll 4
        for (int v = 0; v < kBlockVectors; ++v) scores[n][v] = Fma(q, k[v], scores[n][v]);
      }
    }
    for (int n = 0; n < kN; ++n) {
      const int64_t seen = std::min<int64_t>(block.count, queries[n].pos - block.first_pos + 1);
      const Partial& unit = queries[n].unit;
      if (seen <= 0) {
        rescale[n] = 1;
        std::memset(p[n], 0, sizeof(p[n]));
        continue;
      }
      F32x16 top = Broadcast(kMinusInfinity);
      for (int v = 0; v < kBlockVectors; ++v) {
        scores[n][v] = FirstLanes(Mul(scores[n][v], Broadcast(scale)),
                                  static_cast<int>(seen) - v * kLanes, kMinusInfinity);
        top = Max(top, scores[n][v]);
      }
      const float m = std::max(unit.m(), ReduceMax(top));
      F32x16 e[kBlockVectors];
      for (int v = 0; v < kBlockVectors; ++v) {
        e[v] = Exp(Sub(scores[n][v], Broadcast(m)));
        Store(p[n] + v * kLanes, e[v]);
      }
      rescale[n] = Exp(unit.m() - m);
      unit.l() = std::fma(unit.l(), rescale[n],
                          ReduceAdd(Add(Add(e[0], e[1]), Add(e[2], e[3]))));
      unit.m() = m;
    }
  }
  for (int32_t column = 0; column < d; column += kBlock) {
    F32x16 o[kN][kBlockVectors];
#pragma GCC unroll 8
    for (int n = 0; n < kN; ++n) {
#pragma GCC unroll 4
      for (int v = 0; v < kBlockVectors; ++v) {
        o[n][v] = Mul(Load(queries[n].unit.o + column + v * kLanes), Broadcast(rescale[n]));
      }
    }
    for (int j = 0; j < kBlock; ++j) {
      F32x16 value[kBlockVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kBlockVectors; ++v) value[v] = Load(block.v + j * d + column + v * kLanes);
#pragma GCC unroll 8
      for (int n = 0; n < kN; ++n) {
        const F32x16 weight = Broadcast(p[n][j]);
#pragma GCC unroll 4
        for (int v = 0; v < kBlockVectors; ++v) o[n][v] = Fma(weight, value[v], o[n][v]);
      }
    }
#pragma GCC unroll 8
    for (int n = 0; n < kN; ++n) {
#pragma GCC unroll 4
      for (int v = 0; v < kBlockVectors; ++v) {
        Store(queries[n].unit.o + column + v * kLanes, o[n][v]);
      }
    }
  }
}

void AttendGroup(const Query* queries, int count, const Block& block, int32_t d, float scale) {
  switch (count) {
    case 1: return AttendBlock<1>(queries, block, d, scale);
    case 2: return AttendBlock<2>(queries, block, d, scale);
#if defined(__AVX512F__)
    case 3: return AttendBlock<3>(queries, block, d, scale);
    case 4: return AttendBlock<4>(queries, block, d, scale);
    case 5: return AttendBlock<5>(queries, block, d, scale);
    case 6: return AttendBlock<6>(queries, block, d, scale);
#endif
    default: return;
  }
}

// A launch's arguments with the addresses that follow from them.
struct Launch {
  const AttendArgs& a;
  int32_t group;  // query heads of a KV head

  const KvSpan* spans(const AttendItem& item) const { return a.spans.device + item.span_begin; }
  int64_t begin_pos(const AttendItem& item) const { return spans(item)[0].first_pos; }
  int64_t end_pos(const AttendItem& item) const {
    const KvSpan& last = spans(item)[item.span_count - 1];
    return last.first_pos + last.count;
  }
  float* state(int64_t row, int64_t q_head) const {
    return a.state + (row * a.num_q_heads + q_head) * AttentionStateFloats(a.head_dim);
  }
  Partial finished(int64_t row, int64_t q_head) const { return {state(row, q_head), a.head_dim}; }
  Partial open(int64_t row, int64_t q_head) const {
    return {state(row, q_head) + a.head_dim + 2, a.head_dim};
  }
  const float* q(int64_t row, int64_t q_head) const {
    return a.q + row * a.q_stride + q_head * a.head_dim;
  }
  float* out(int64_t row, int64_t q_head) const {
    return a.out + (row * a.num_q_heads + q_head) * a.head_dim;
  }
};

// Calls fn(block) for every block of the item's keys within [begin, end).
template <typename Fn>
void ForEachBlock(const Launch& launch, const AttendItem& item, int32_t head, int64_t begin,
                  int64_t end, Fn&& fn) {
  thread_local Block block;
  const KvSpan* spans = launch.spans(item);
  for (int32_t s = 0; s < item.span_count; ++s) {
    const int64_t span_end = spans[s].first_pos + spans[s].count;
    if (span_end <= begin || spans[s].first_pos >= end) continue;
    for (int64_t pos = std::max(begin, spans[s].first_pos); pos < std::min(end, span_end);
         pos += kBlockTokens) {
      const int count = static_cast<int>(std::min<int64_t>(kBlockTokens, span_end - pos));
      LoadBlock(spans[s], head, pos, count, launch.a.head_dim, block);
      fn(block);
    }
  }
}

void Finish(const Launch& launch, int64_t row, int64_t q_head) {
  const Partial result = launch.finished(row, q_head);
  Fold(result, launch.open(row, q_head));
  const float inverse = 1.0f / result.l();
  float* out = launch.out(row, q_head);
  for (int32_t i = 0; i < launch.a.head_dim; i += kLanes) {
    Store(out + i, Mul(Load(result.o + i), Broadcast(inverse)));
  }
}

// ---- Many rows: a task is some rows of one KV head; it walks all keys in order.
void AttendRows(const Launch& launch, const AttendItem& item, int32_t head, int64_t row_begin,
                int64_t row_end) {
  thread_local Query queries[kRowsATask * 64];
  const int32_t d = launch.a.head_dim;
  int count = 0;
  for (int64_t row = row_begin; row < row_end; ++row) {
    for (int32_t g = 0; g < launch.group; ++g) {
      const int64_t q_head = int64_t{head} * launch.group + g;
      const int64_t at = item.row_begin + row;
      if (item.reset) {
        launch.finished(at, q_head).Reset();
        launch.open(at, q_head).Reset();
      }
      queries[count++] = {launch.q(at, q_head), launch.open(at, q_head), item.first_pos + row};
    }
  }
  const int64_t last_pos = item.first_pos + row_end - 1;
  const int64_t end = launch.end_pos(item);
  // Keys past the last row are seen by none; their units' folds would be the identity.
  ForEachBlock(launch, item, head, launch.begin_pos(item), std::min(end, last_pos + 1),
               [&](const Block& block) {
                 // Queries are in order of position: the first that sees the block.
                 int first = 0;
                 while (first < count && queries[first].pos < block.first_pos) ++first;
                 for (int n = first; n < count; n += kGroup) {
                   AttendGroup(queries + n, std::min(kGroup, count - n), block, d, launch.a.scale);
                 }
                 const int64_t block_end = block.first_pos + block.count;
                 if (block_end % kUnitTokens != 0) return;
                 for (int n = 0; n < count; ++n) {
                   const Partial unit = queries[n].unit;
                   Fold({unit.o - (d + 2), d}, unit);
                   unit.Reset();
                 }
               });
  if (!item.finish) return;
  for (int64_t row = row_begin; row < row_end; ++row) {
    for (int32_t g = 0; g < launch.group; ++g) {
      Finish(launch, item.row_begin + row, int64_t{head} * launch.group + g);
    }
  }
}

// ---- Few rows: a task is some units of one KV head; partials go to scratch, [unit][query].
struct UnitWork {
  const AttendItem* item;
  int32_t head;
  int64_t first_unit;  // of this pass
  int64_t num_units;
  float* partials;
};

int64_t NumQueries(const Launch& launch, const AttendItem& item) {
  return int64_t{item.row_count} * launch.group;
}

void AttendUnit(const Launch& launch, const UnitWork& work, int64_t unit) {
  const AttendItem& item = *work.item;
  const int32_t d = launch.a.head_dim;
  const int64_t num_queries = NumQueries(launch, item);
  const int64_t begin = std::max(unit * kUnitTokens, launch.begin_pos(item));
  const int64_t end = std::min((unit + 1) * kUnitTokens, launch.end_pos(item));
  Query queries[kManyQueries];
  float* partials = work.partials + (unit - work.first_unit) * num_queries * (d + 2);
  for (int64_t n = 0; n < num_queries; ++n) {
    const int64_t row = item.row_begin + n / launch.group;
    const int64_t q_head = int64_t{work.head} * launch.group + n % launch.group;
    const Partial partial{partials + n * (d + 2), d};
    // A unit that an earlier launch opened goes on from there.
    if (begin > unit * kUnitTokens && !item.reset) {
      std::memcpy(partial.o, launch.open(row, q_head).o, (d + 2) * sizeof(float));
    } else {
      partial.Reset();
    }
    queries[n] = {launch.q(row, q_head), partial, item.first_pos + n / launch.group};
  }
  ForEachBlock(launch, item, work.head, begin, end, [&](const Block& block) {
    for (int64_t n = 0; n < num_queries; n += kGroup) {
      AttendGroup(queries + n, static_cast<int>(std::min<int64_t>(kGroup, num_queries - n)), block,
                  d, launch.a.scale);
    }
  });
}

// Folds the pass's units of one KV head into the states, in order.
void FoldUnits(const Launch& launch, const UnitWork& work) {
  const AttendItem& item = *work.item;
  const int32_t d = launch.a.head_dim;
  const int64_t num_queries = NumQueries(launch, item);
  const int64_t end = launch.end_pos(item);
  const bool first_pass = work.first_unit == launch.begin_pos(item) / kUnitTokens;
  const bool last_pass = (work.first_unit + work.num_units) * kUnitTokens >= end;
  for (int64_t n = 0; n < num_queries; ++n) {
    const int64_t row = item.row_begin + n / launch.group;
    const int64_t q_head = int64_t{work.head} * launch.group + n % launch.group;
    const Partial finished = launch.finished(row, q_head);
    const Partial open = launch.open(row, q_head);
    if (first_pass && item.reset) finished.Reset();
    if (first_pass) open.Reset();
    for (int64_t i = 0; i < work.num_units; ++i) {
      const Partial unit{work.partials + (i * num_queries + n) * (d + 2), d};
      if ((work.first_unit + i + 1) * kUnitTokens <= end) {
        Fold(finished, unit);
      } else {
        std::memcpy(open.o, unit.o, (d + 2) * sizeof(float));
      }
    }
    if (last_pass && item.finish) Finish(launch, row, q_head);
  }
}

// Runs the passes of all few-row items from `item_index` on; stops before the next many-row item.
void AttendFewRows(const Launch& launch, int32_t begin, int32_t end, CpuTeam& team) {
  constexpr int kMaxWorks = 256;
  UnitWork works[kMaxWorks];
  int64_t units_before[kMaxWorks + 1];
  const int32_t d = launch.a.head_dim;
  int num_works = 0;
  int64_t used = 0;
  units_before[0] = 0;
  const auto flush = [&] {
    if (num_works == 0) return;
    team.ForEach(units_before[num_works], [&](int64_t i) {
      const int64_t w =
          std::upper_bound(units_before, units_before + num_works + 1, i) - units_before - 1;
      AttendUnit(launch, works[w], works[w].first_unit + i - units_before[w]);
    });
    team.ForEach(num_works, [&](int64_t w) { FoldUnits(launch, works[w]); });
    num_works = 0;
    used = 0;
  };
  for (int32_t i = begin; i < end; ++i) {
    const AttendItem& item = launch.a.items.device[i];
    const int64_t unit_floats = NumQueries(launch, item) * (d + 2);
    const int64_t last_unit = (launch.end_pos(item) - 1) / kUnitTokens;
    for (int32_t head = item.kv_head_begin; head < item.kv_head_end; ++head) {
      for (int64_t unit = launch.begin_pos(item) / kUnitTokens; unit <= last_unit;) {
        // Passes of one head follow each other: a head goes into one flush only once.
        const bool more = num_works > 0 && works[num_works - 1].item == &item &&
                          works[num_works - 1].head == head;
        if (more || num_works == kMaxWorks || used + unit_floats > launch.a.scratch_floats) flush();
        const int64_t fit = (launch.a.scratch_floats - used) / unit_floats;
        const int64_t count = std::min(last_unit - unit + 1, fit);
        works[num_works] = {&item, head, unit, count, launch.a.scratch + used};
        units_before[num_works + 1] = units_before[num_works] + count;
        ++num_works;
        used += count * unit_floats;
        unit += count;
      }
    }
  }
  flush();
}

}  // namespace

void Attend(const AttendArgs& args, CpuTeam& team) {
  const Launch launch{args, args.num_q_heads / args.num_kv_heads};
  const auto many = [&](int32_t i) {
    return NumQueries(launch, args.items.device[i]) >= kManyQueries;
  };
  for (int32_t begin = 0, end; begin < args.items.count; begin = end) {
    end = begin + 1;
    if (!many(begin)) {
      while (end < args.items.count && !many(end)) ++end;
      AttendFewRows(launch, begin, end, team);
      continue;
    }
    const AttendItem& item = args.items.device[begin];
    // Late rows see the most keys: they go first, so that members end together.
    const int64_t blocks = (item.row_count + kRowsATask - 1) / kRowsATask;
    const int64_t heads = item.kv_head_end - item.kv_head_begin;
    team.ForEach(blocks * heads, [&](int64_t task) {
      const int64_t block = blocks - 1 - task / heads;
      AttendRows(launch, item, item.kv_head_begin + static_cast<int32_t>(task % heads),
                 block * kRowsATask, std::min<int64_t>((block + 1) * kRowsATask, item.row_count));
    });
  }
}

}  // namespace headroom::kernels::cpu::HEADROOM_ISA_NAMESPACE
