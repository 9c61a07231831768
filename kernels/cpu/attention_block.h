// The arithmetic of attention: some queries of one KV head against one block of 64 keys.
//
// Scores are chains of fused multiply-adds over head_dim, vectorised over keys (K is transposed);
// P V are chains over keys, vectorised over head_dim. A query takes exactly the keys that it sees:
// keys after them are masked, absent or garbage without a difference.
#ifndef HEADROOM_KERNELS_CPU_ATTENTION_BLOCK_H_
#define HEADROOM_KERNELS_CPU_ATTENTION_BLOCK_H_

#include <algorithm>
#include <cstring>
#include <limits>
#include <type_traits>

#include "kernels/cpu/key_blocks.h"

namespace headroom::kernels::cpu::HEADROOM_ISA_NAMESPACE {

inline constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// R or U of attention.h: {o[d], m, l}.
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
  void CopyFrom(const Partial& other) const {
    std::memcpy(o, other.o, (d + 2) * sizeof(float));
  }
};

// a = fold(a, b), b the later keys. Empty is the identity on both sides, exactly.
inline void Fold(const Partial& a, const Partial& b) {
  if (b.l() == 0) return;
  if (a.l() == 0) return a.CopyFrom(b);
  const float m = std::max(a.m(), b.m());
  const float wa = Exp(a.m() - m);
  const float wb = Exp(b.m() - m);
  for (int i = 0; i < a.d; i += kLanes) {
    Store(a.o + i, Fma(Load(b.o + i), Broadcast(wb), Mul(Load(a.o + i), Broadcast(wa))));
  }
  a.l() = __builtin_fmaf(b.l(), wb, a.l() * wa);
  a.m() = m;
}

// One query: where it reads, its open unit, the positions [first_seen, pos] that it sees.
struct Query {
  const float* q;
  Partial unit;
  int64_t pos;
  int64_t first_seen;
};

// How scores become what softmax takes.
struct Scoring {
  float scale;
  float soft_cap;  // 0: none
};

// The keys [begin, end) of a block that a query sees; none: {0, 0}.
struct Seen {
  int begin;
  int end;
};

// One of the groups that a block's queries are taken in; each asks for its share of the next block.
struct Group {
  int index;
  int count;
};

// scores[n][key] = q[n] . k[key], not scaled.
template <int kN, typename Block>
inline void Scores(const Query* queries, const Block& block, int32_t d, Group group,
                   float (*scores)[kBlock]) {
  constexpr int kPass = Block::template kPass<kN>;
  for (int first = 0; first < kBlockVectors; first += kPass) {
    F32x16 acc[kN][kPass];
#pragma GCC unroll 8
    for (int n = 0; n < kN; ++n) {
#pragma GCC unroll 4
      for (int v = 0; v < kPass; ++v) acc[n][v] = Zero();
    }
    // 1.5 d lines over all groups' passes over d / 2 pairs.
    const int passes = kBlockVectors / kPass * group.count;
    const int lines = (3 + passes - 1) / passes;
    for (size_t pair = 0; pair < static_cast<size_t>(d); pair += 2) {
      block.Prefetch(lines);
#pragma GCC unroll 2
      for (size_t i = pair; i < pair + 2; ++i) {
        F32x16 k[kPass];
#pragma GCC unroll 4
        for (int v = 0; v < kPass; ++v) k[v] = block.Key(i, first + v);
#pragma GCC unroll 8
        for (int n = 0; n < kN; ++n) {
          const F32x16 q = Broadcast(queries[n].q[i]);
#pragma GCC unroll 4
          for (int v = 0; v < kPass; ++v) acc[n][v] = Fma(q, k[v], acc[n][v]);
        }
      }
    }
#pragma GCC unroll 8
    for (int n = 0; n < kN; ++n) {
#pragma GCC unroll 4
      for (int v = 0; v < kPass; ++v) Store(scores[n] + (first + v) * kLanes, acc[n][v]);
    }
  }
}

// The same, of keys that are transposed on the way, kVectors x 16 side by side: the chains are the same, so
// the bits are. With d a constant, rows have fixed distances, so that no register is spent on addresses.
template <int kN, int kVectors, typename Dim>
inline void StreamedScores(const Query* queries, const StreamedBlock& block, Dim d,
                           float (*scores)[kBlock]) {
  // Bytes: BFloat16 would be cleared at every block, which takes as long as half of the scores.
  alignas(64) uint8_t padded[kVectors][kLanes * kMaxHeadDim * sizeof(BFloat16)];
  const float* q[kN];
  for (int n = 0; n < kN; ++n) q[n] = queries[n].q;
  for (int begin = 0; begin < kBlock; begin += kVectors * kLanes) {
    block.TouchKeys(begin, begin + kVectors * kLanes);
    const BFloat16* rows[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) rows[v] = block.Keys(begin + v * kLanes, padded[v]);
    F32x16 acc[kN][kVectors];
#pragma GCC unroll 8
    for (int n = 0; n < kN; ++n) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) acc[n][v] = Zero();
    }
    for (int32_t column = 0; column < d; column += 8) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        // One query of head_dim 128 is done with a tile too soon for it: 24 GB/s instead of 27.
        if (kN > 1 || d <= 64) block.PrefetchValues(begin / kLanes * (d / 8) + column / 8 * kVectors + v);
        alignas(64) uint32_t words[4][kLanes];
        TransposeEight(rows[v] + column, d, words);
        // Nothing moves past this: each multiply-add takes its own broadcast from memory, which costs no
        // instruction (963 cycles for 3 queries, not 1,256), and one vector's run while the other's
        // are transposed.
        asm volatile("" ::: "memory");
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
          const F32x16 k = i % 2 == 0 ? LowBf16(words[i / 2]) : HighBf16(words[i / 2]);
#pragma GCC unroll 8
          for (int n = 0; n < kN; ++n) acc[n][v] = Fma(Broadcast(q[n][column + i]), k, acc[n][v]);
        }
      }
    }
#pragma GCC unroll 8
    for (int n = 0; n < kN; ++n) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) Store(scores[n] + begin + v * kLanes, acc[n][v]);
    }
  }
}

template <int kN>
inline void Scores(const Query* queries, const StreamedBlock& block, int32_t d, Group,
                   float (*scores)[kBlock]) {
  if (d == 64) {
    StreamedScores<kN, 2>(queries, block, std::integral_constant<int32_t, 64>(), scores);
  } else if (d == 128) {
    StreamedScores<kN, 2>(queries, block, std::integral_constant<int32_t, 128>(), scores);
  } else {
    StreamedScores<kN, 1>(queries, block, d, scores);
  }
}

// Scores to weights exp(score * scale - m), with the unit's m and l brought forward; rescale[n] is
// what its o must be multiplied with.
template <int kN>
inline void Softmax(const Query* queries, const Seen* seen, const Scoring& scoring,
                    float (*scores)[kBlock], float* rescale) {
  alignas(64) float difference[kLanes] = {};
  float maximum[kN];
  for (int n = 0; n < kN; ++n) {
    if (seen[n].end == 0) continue;
    F32x16 top = Broadcast(kMinusInfinity);
    for (int v = 0; v < kBlockVectors; ++v) {
      F32x16 score = Mul(Load(scores[n] + v * kLanes), Broadcast(scoring.scale));
      if (scoring.soft_cap != 0) score = Capped(score, scoring.soft_cap);
      if (seen[n].end < kBlock) score = FirstLanes(score, seen[n].end - v * kLanes, kMinusInfinity);
      if (seen[n].begin > 0) score = LanesFrom(score, seen[n].begin - v * kLanes, kMinusInfinity);
      Store(scores[n] + v * kLanes, score);
      top = Max(top, score);
    }
    const float before = queries[n].unit.m();
    maximum[n] = std::max(before, ReduceMax(top));
    difference[n] = before - maximum[n];
  }
  alignas(64) float factors[kLanes];
  Store(factors, Exp(Load(difference)));
  for (int n = 0; n < kN; ++n) {
    rescale[n] = factors[n];  // 1 where nothing is seen
    if (seen[n].end == 0) continue;
    F32x16 e[kBlockVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kBlockVectors; ++v) {
      e[v] = Exp(Sub(Load(scores[n] + v * kLanes), Broadcast(maximum[n])));
      Store(scores[n] + v * kLanes, e[v]);
    }
    const Partial& unit = queries[n].unit;
    const float sum = ReduceAdd(Add(Add(e[0], e[1]), Add(e[2], e[3])));
    unit.l() = __builtin_fmaf(unit.l(), rescale[n], sum);
    unit.m() = maximum[n];
  }
}

// o = o * rescale + weights . V over the keys that each query sees.
template <int kN, typename Block>
inline void AddValues(const Query* queries, const Seen* seen, const Block& block, int32_t d,
                      Group group, const float (*weights)[kBlock], const float* rescale) {
  constexpr int kPass = Block::template kPass<kN>;
  // All see [common, common_end), some [first, common) and [common_end, last).
  int first = kBlock, common = 0, common_end = kBlock, last = 0;
  for (int n = 0; n < kN; ++n) {
    first = std::min(first, seen[n].begin);
    common = std::max(common, seen[n].begin);
    common_end = std::min(common_end, seen[n].end);
    last = std::max(last, seen[n].end);
  }
  common_end = std::max(common, common_end);
  for (int32_t column = 0; column < d; column += kPass * kLanes) {
    constexpr int kLines = std::max(1, kPass / 2);  // what is left, over all groups' columns and keys
    F32x16 o[kN][kPass];
#pragma GCC unroll 8
    for (int n = 0; n < kN; ++n) {
      const float* from = queries[n].unit.o + column;
#pragma GCC unroll 4
      for (int v = 0; v < kPass; ++v) {
        o[n][v] = Mul(Load(from + v * kLanes), Broadcast(rescale[n]));
      }
      Block::ToLanes(o[n]);
    }
    const auto take = [&](int j, auto&& sees) __attribute__((always_inline)) {
      F32x16 value[kPass];
      if (j % group.count == group.index) block.Prefetch(kLines);
      block.Value(j, column, value);
      if (column == 0) block.ReadAhead(j, kPass * kLanes);
#pragma GCC unroll 8
      for (int n = 0; n < kN; ++n) {
        if (!sees(n)) continue;
        const F32x16 weight = Broadcast(weights[n][j]);
#pragma GCC unroll 4
        for (int v = 0; v < kPass; ++v) o[n][v] = Fma(weight, value[v], o[n][v]);
      }
    };
    const auto some = [&](int begin, int end) __attribute__((always_inline)) {
      for (int j = begin; j < end; ++j) {
        take(j, [&](int n) { return j >= seen[n].begin && j < seen[n].end; });
      }
    };
    some(first, std::min(common, last));
    for (int j = common; j < std::min(common_end, last); ++j) take(j, [](int) { return true; });
    some(common_end, last);
#pragma GCC unroll 8
    for (int n = 0; n < kN; ++n) {
      Block::FromLanes(o[n]);
#pragma GCC unroll 4
      for (int v = 0; v < kPass; ++v) Store(queries[n].unit.o + column + v * kLanes, o[n][v]);
    }
  }
}

template <int kN, typename Block>
void AttendGroup(const Query* queries, const Block& block, int32_t d, const Scoring& scoring,
                 Group group) {
  alignas(64) float scores[kN][kBlock];
  float rescale[kN];
  Seen seen[kN];
  for (int n = 0; n < kN; ++n) {
    const BlockRows& rows = block.rows();
    const auto within = [&rows](int64_t pos) {
      return static_cast<int>(std::clamp<int64_t>(pos - rows.first_pos, 0, rows.count));
    };
    seen[n] = {within(queries[n].first_seen), within(queries[n].pos + 1)};
    if (seen[n].begin >= seen[n].end) seen[n] = {0, 0};
  }
  Scores<kN>(queries, block, d, group, scores);
  Softmax<kN>(queries, seen, scoring, scores, rescale);
  AddValues<kN>(queries, seen, block, d, group, scores, rescale);
}

// Only sizes of groups that the block has are compiled.
template <int kN, typename Block>
void AttendUpTo(const Query* queries, const Block& block, int32_t d, const Scoring& scoring,
                Group group) {
  if constexpr (kN <= Block::kGroup) AttendGroup<kN>(queries, block, d, scoring, group);
}

// All of `queries` against one block.
template <typename Block>
void AttendBlock(const Query* queries, int count, const Block& block, int32_t d,
                 const Scoring& scoring) {
  // Even groups: 8 queries as 4 + 4, not 6 + 2.
  const int groups = (count + Block::kGroup - 1) / Block::kGroup;
  for (int g = 0; g < groups; ++g) {
    const Query* at = queries + count * g / groups;
    switch (count * (g + 1) / groups - count * g / groups) {
      case 1: AttendGroup<1>(at, block, d, scoring, {g, groups}); break;
      case 2: AttendUpTo<2>(at, block, d, scoring, {g, groups}); break;
      case 3: AttendUpTo<3>(at, block, d, scoring, {g, groups}); break;
      case 4: AttendUpTo<4>(at, block, d, scoring, {g, groups}); break;
      case 5: AttendUpTo<5>(at, block, d, scoring, {g, groups}); break;
      case 6: AttendUpTo<6>(at, block, d, scoring, {g, groups}); break;
    }
  }
}

}  // namespace headroom::kernels::cpu::HEADROOM_ISA_NAMESPACE

#endif  // HEADROOM_KERNELS_CPU_ATTENTION_BLOCK_H_
