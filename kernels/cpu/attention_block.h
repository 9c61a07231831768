// The arithmetic of attention: some queries of one KV head against one block of 64 keys.
//
// Scores are chains of fused multiply-adds over head_dim, vectorised over keys (K is transposed);
// P V are chains over keys, vectorised over head_dim. A query takes exactly the keys that it sees:
// keys after them are masked, absent or garbage without a difference.
//
// K and V come in one of three forms with the same bits: widened to float32 once for many queries, or for
// few queries V where it lies and K as transposed words of two bfloat16, all of a block's before its scores
// (NarrowBlock) or eight dimensions at a time between them (StreamedBlock).
#ifndef HEADROOM_KERNELS_CPU_ATTENTION_BLOCK_H_
#define HEADROOM_KERNELS_CPU_ATTENTION_BLOCK_H_

#include <algorithm>
#include <cstring>
#include <limits>
#include <type_traits>

#include "kernels/cpu/simd.h"

namespace headroom::kernels::cpu::HEADROOM_ISA_NAMESPACE {

inline constexpr int kBlock = static_cast<int>(kBlockTokens);
inline constexpr int kMaxHeadDim = 256;
inline constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// Queries that share a pass over a block, and vectors of keys or columns of a pass of kN queries.
// AVX-512: 6 x 4 accumulators of 32 registers. AVX2, where a vector is two of 16 registers: 6 x 1
// as the GEMM has them; few queries, whose values come in pairs of vectors, 2 x 2. One query takes
// 1 x 4: with fewer accumulators it waits for each multiply-add to end.
#if defined(__AVX512F__)
inline constexpr int kNarrowGroup = 6, kWideGroup = 6;
template <int kN>
inline constexpr int kNarrowPass = 4;
template <int kN>
inline constexpr int kWidePass = 4;
#elif defined(__AVX2__)
inline constexpr int kNarrowGroup = 2, kWideGroup = 6;
template <int kN>
inline constexpr int kNarrowPass = kN == 1 ? 4 : 2;
template <int kN>
inline constexpr int kWidePass = kN == 1 ? 4 : kN == 2 ? 2 : 1;
#else
inline constexpr int kNarrowGroup = 1, kWideGroup = 1;
template <int kN>
inline constexpr int kNarrowPass = 2;
template <int kN>
inline constexpr int kWidePass = 2;
#endif
inline constexpr int kBlockVectors = kBlock / kLanes;

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

// Where one block's K and V rows of a head lie.
struct BlockRows {
  const BFloat16* keys = nullptr;    // [count][d]
  const BFloat16* values = nullptr;  // [count][d]
  int64_t first_pos = 0;
  int count = 0;  // rows that exist; others are never read
};

// 16 rows x 32 columns to 16 words of two columns: out[w][row], rows of `out` `stride` apart; with
// fewer `quads`, 4 of the words each. Each vector takes 4 words of every 4th row, so that 4 x 4 transposes within its 128-bit lanes are all
// that is left to shuffle.
#if defined(__AVX512F__)
inline __m128i Load128(const BFloat16* p) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
}
inline void TransposeTile(const BFloat16* const* rows, int column, uint32_t* out,
                          int64_t stride = kBlock, int quads = 4) {
#pragma GCC unroll 4
  for (int quad = 0; quad < quads; ++quad) {
    __m512i r[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const int at = column + 8 * quad;
      r[i] = _mm512_castsi128_si512(Load128(rows[i] + at));
      r[i] = _mm512_inserti32x4(r[i], Load128(rows[4 + i] + at), 1);
      r[i] = _mm512_inserti32x4(r[i], Load128(rows[8 + i] + at), 2);
      r[i] = _mm512_inserti32x4(r[i], Load128(rows[12 + i] + at), 3);
    }
    const __m512i a = _mm512_unpacklo_epi32(r[0], r[1]);
    const __m512i b = _mm512_unpacklo_epi32(r[2], r[3]);
    const __m512i c = _mm512_unpackhi_epi32(r[0], r[1]);
    const __m512i d = _mm512_unpackhi_epi32(r[2], r[3]);
    uint32_t* const to = out + 4 * quad * stride;
    _mm512_storeu_si512(to, _mm512_unpacklo_epi64(a, b));
    _mm512_storeu_si512(to + stride, _mm512_unpackhi_epi64(a, b));
    _mm512_storeu_si512(to + 2 * stride, _mm512_unpacklo_epi64(c, d));
    _mm512_storeu_si512(to + 3 * stride, _mm512_unpackhi_epi64(c, d));
  }
}
#elif defined(__AVX2__)
inline void TransposeTile(const BFloat16* const* rows, int column, uint32_t* out,
                          int64_t stride = kBlock, int quads = 4) {
  const auto store = [](uint32_t* to, __m256i words) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), words);
  };
  for (int half = 0; half < 2; ++half) {
    for (int quad = 0; quad < quads; ++quad) {
      __m256i r[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const BFloat16* low = rows[8 * half + i] + column + 8 * quad;
        const BFloat16* high = rows[8 * half + 4 + i] + column + 8 * quad;
        r[i] = _mm256_loadu2_m128i(reinterpret_cast<const __m128i*>(high),
                                   reinterpret_cast<const __m128i*>(low));
      }
      const __m256i a = _mm256_unpacklo_epi32(r[0], r[1]);
      const __m256i b = _mm256_unpacklo_epi32(r[2], r[3]);
      const __m256i c = _mm256_unpackhi_epi32(r[0], r[1]);
      const __m256i d = _mm256_unpackhi_epi32(r[2], r[3]);
      uint32_t* const to = out + 4 * quad * stride + 8 * half;
      store(to, _mm256_unpacklo_epi64(a, b));
      store(to + stride, _mm256_unpackhi_epi64(a, b));
      store(to + 2 * stride, _mm256_unpacklo_epi64(c, d));
      store(to + 3 * stride, _mm256_unpackhi_epi64(c, d));
    }
  }
}
#else
inline void TransposeTile(const BFloat16* const* rows, int column, uint32_t* out,
                          int64_t stride = kBlock, int quads = 4) {
  for (int r = 0; r < 16; ++r) {
    uint32_t words[16];
    std::memcpy(words, rows[r] + column, 4 * quads * sizeof(uint32_t));
    for (int w = 0; w < 4 * quads; ++w) out[w * stride + r] = words[w];
  }
}
#endif

// Eight columns of 16 rows that lie `d` elements apart to 4 words of two columns: out[w][row]. In 256-bit halves:
// a Zen 4 takes 963 cycles for the scores of 3 queries and 64 keys of head_dim 64 with them, 1,063 where each
// 128 bits go into a whole vector.
#if defined(__AVX512F__)
inline __m256i Load2x128(const BFloat16* low, const BFloat16* high) {
  return _mm256_inserti128_si256(_mm256_castsi128_si256(Load128(low)), Load128(high), 1);
}
template <typename Dim>
inline void TransposeEight(const BFloat16* rows, Dim d, uint32_t (&out)[4][kLanes]) {
  __m512i r[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const BFloat16* const at = rows + i * d;
    r[i] = _mm512_inserti64x4(_mm512_castsi256_si512(Load2x128(at, at + 4 * d)),
                              Load2x128(at + 8 * d, at + 12 * d), 1);
  }
  const __m512i a = _mm512_unpacklo_epi32(r[0], r[1]);
  const __m512i b = _mm512_unpacklo_epi32(r[2], r[3]);
  const __m512i c = _mm512_unpackhi_epi32(r[0], r[1]);
  const __m512i e = _mm512_unpackhi_epi32(r[2], r[3]);
  _mm512_store_si512(out[0], _mm512_unpacklo_epi64(a, b));
  _mm512_store_si512(out[1], _mm512_unpackhi_epi64(a, b));
  _mm512_store_si512(out[2], _mm512_unpacklo_epi64(c, e));
  _mm512_store_si512(out[3], _mm512_unpackhi_epi64(c, e));
}
#else
template <typename Dim>
inline void TransposeEight(const BFloat16* rows, Dim d, uint32_t (&out)[4][kLanes]) {
  const BFloat16* at[kLanes];
  for (int r = 0; r < kLanes; ++r) at[r] = rows + r * d;
  TransposeTile(at, /*column=*/0, out[0], /*stride=*/kLanes, /*quads=*/1);
}
#endif

// The rows of keys [begin, begin + 16), zeros for those past the count.
inline void KeyRows(const BlockRows& rows, int32_t d, int begin, const BFloat16* (&at)[kLanes]) {
  alignas(64) static constexpr BFloat16 kZeroRow[kMaxHeadDim] = {};
  for (int r = 0; r < kLanes; ++r) {
    at[r] = begin + r < rows.count ? rows.keys + (begin + r) * d : kZeroRow;
  }
}

// words[d / 2][64]: dimensions 2i (low half) and 2i + 1 of every key; rows past the count are zero.
// Calls between() once for every 16 keys x 32 dimensions.
template <typename Between>
inline void TransposeKeys(const BlockRows& rows, int32_t d, uint32_t* words, Between&& between) {
  for (int begin = 0; begin < kBlock; begin += 16) {
    const BFloat16* at[kLanes];
    KeyRows(rows, d, begin, at);
    for (int column = 0; column < d; column += 32) {
      TransposeTile(at, column, words + column / 2 * kBlock + begin);
      between();
    }
  }
}

// A block for few queries, values where they lie.
class RowsBlock {
 public:
  static constexpr int kGroup = kNarrowGroup;
  template <int kN>
  static constexpr int kPass = kNarrowPass<kN>;

  const BlockRows& rows() const { return rows_; }
  // Columns from `column` on of key j, in the order of ToLanes.
  template <int kCount>
  void Value(int j, int32_t column, F32x16 (&value)[kCount]) const {
#pragma GCC unroll 2
    for (int v = 0; v < kCount; v += 2) {
      LoadBf16EvenOdd(rows_.values + int64_t{j} * d_ + column + v * kLanes, value[v], value[v + 1]);
    }
  }
  template <int kCount>
  static void ToLanes(F32x16 (&o)[kCount]) {
#pragma GCC unroll 2
    for (int v = 0; v < kCount; v += 2) Deinterleave(o[v], o[v + 1]);
  }
  template <int kCount>
  static void FromLanes(F32x16 (&o)[kCount]) {
#pragma GCC unroll 2
    for (int v = 0; v < kCount; v += 2) Interleave(o[v], o[v + 1]);
  }

 protected:
  static constexpr int kLine = 64 / sizeof(BFloat16);

  BlockRows rows_;
  int32_t d_ = 0;
};

// For processors whose prefetchers need help: all that is done to a block asks for some of the next one.
class NarrowBlock : public RowsBlock {
 public:
  void Set(const BlockRows& rows, int32_t d) {
    rows_ = rows;
    d_ = d;
    next_line_ = 0;
    TransposeKeys(rows, d, words_, [this] { Prefetch(kLinesATile); });
  }

  // Dimension i of keys [16 v, 16 v + 16).
  F32x16 Key(size_t i, size_t v) const {
    const uint32_t* words = words_ + i / 2 * kBlock + v * kLanes;
    return i % 2 == 0 ? LowBf16(words) : HighBf16(words);
  }
  // Asks for the next `count` of the 4 d lines of K and V that the run's next block has, as long as there
  // are any. In one go they would fill the core's miss buffers, and all else would wait for them; where
  // nothing asks, memory idles. While only scores and values did, a core of an Ice Lake read 9.1 GB/s for 3
  // queries of head_dim 64, now 10.7.
  void Prefetch(int count) const {
    for (int i = 0; i < count; ++i) {
      const int64_t of_keys = 2 * int64_t{d_};
      const BFloat16* const base =
          next_line_ < of_keys ? rows_.keys : rows_.values - of_keys * kLine;
      __builtin_prefetch(base + kBlock * d_ + next_line_ * kLine);
      next_line_ += next_line_ < 2 * of_keys;
    }
  }
  void ReadAhead(int, int32_t) const {}

 private:
  // d lines over the d / 8 tiles of a block.
  static constexpr int kLinesATile = 8;

  mutable int64_t next_line_ = 0;
  alignas(64) uint32_t words_[kMaxHeadDim / 2 * kBlock];
};

// For processors that read ahead by themselves, far and fast, where lines are touched in the order they lie.
// Keys are touched in order 32 at a time, values as they are taken; while scores are computed, which touches
// nothing, the values are asked for, and with the values the next block's keys. Into L2: L1 has too few miss
// buffers for what is on its way, and is full of one block. Two cores of a Zen 4 with 34 GB/s of plain reads read
// 27 for 4 queries of head_dim 128 (18 into L1 and with 4 KiB of the next keys).
// Queries of several groups would transpose the keys several times.
class StreamedBlock : public RowsBlock {
 public:
  void Set(const BlockRows& rows, int32_t d) {
    rows_ = rows;
    d_ = d;
  }
  // The keys [begin, begin + 16) one after the other: where they lie, or in `padded` with zeros for those past
  // the count.
  const BFloat16* Keys(int begin, uint8_t* padded) const {
    const int present = std::clamp(rows_.count - begin, 0, kLanes);
    const BFloat16* const keys = rows_.keys + begin * d_;
    if (present == kLanes) return keys;
    const size_t row_bytes = d_ * sizeof(BFloat16);
    std::memcpy(padded, keys, present * row_bytes);
    std::memset(padded + present * row_bytes, 0, (kLanes - present) * row_bytes);
    return reinterpret_cast<const BFloat16*>(padded);
  }
  // Reads from each line of the keys [begin, end) that exist: transposing takes them out of order.
  void TouchKeys(int begin, int end) const {
    end = std::min(end, rows_.count);
    if (begin < end) Touch(rows_.keys + begin * d_, (end - begin) * d_);
  }
  // Asks for 4 of the 2 d lines of values: once for each of d / 2 tiles of 16 keys x 8 dimensions.
  void PrefetchValues(int tile) const {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) Ask(rows_.values + (4 * tile + i) * kLine);
  }
  // With value j, whose columns below `column` are taken: reads from its other lines and asks for key j of the
  // next block.
  void ReadAhead(int j, int32_t column) const {
    const int32_t lines = d_ / kLine;
    for (int32_t i = 0; i < lines; ++i) Ask(rows_.keys + kBlock * d_ + (lines * j + i) * kLine);
    Touch(rows_.values + int64_t{j} * d_ + column, d_ - column);
  }
  void Prefetch(int) const {}

 private:
  // Into L2.
  static void Ask(const BFloat16* line) { __builtin_prefetch(line, /*rw=*/0, /*locality=*/2); }
  static void Touch(const BFloat16* from, int32_t count) {
    for (int32_t i = 0; i < count; i += kLine) {
      static_cast<void>(*reinterpret_cast<const volatile uint16_t*>(from + i));
    }
  }
};

// K and V of a block for many queries: float32.
class WideBlock {
 public:
  static constexpr int kGroup = kWideGroup;
  template <int kN>
  static constexpr int kPass = kWidePass<kN>;

  void Set(const BlockRows& rows, int32_t d) {
    rows_ = rows;
    d_ = d;
    // The words lie where V will be.
    auto* const words = reinterpret_cast<uint32_t*>(values_);
    TransposeKeys(rows, d, words, [] {});
    for (int32_t i = 0; i < d; i += 2) {
      for (int v = 0; v < kBlockVectors; ++v) {
        const uint32_t* from = words + i / 2 * kBlock + v * kLanes;
        Store(keys_ + i * kBlock + v * kLanes, LowBf16(from));
        Store(keys_ + (i + 1) * kBlock + v * kLanes, HighBf16(from));
      }
    }
    const int64_t present = int64_t{rows.count} * d;
    for (int64_t i = 0; i < present; i += kLanes) Store(values_ + i, LoadBf16(rows.values + i));
  }
  const BlockRows& rows() const { return rows_; }

  F32x16 Key(size_t i, size_t v) const { return Load(keys_ + i * kBlock + v * kLanes); }
  template <int kCount>
  void Value(int j, int32_t column, F32x16 (&value)[kCount]) const {
#pragma GCC unroll 4
    for (int v = 0; v < kCount; ++v) value[v] = Load(values_ + j * d_ + column + v * kLanes);
  }
  void Prefetch(int) const {}
  void ReadAhead(int, int32_t) const {}
  template <int kCount>
  static void ToLanes(F32x16 (&)[kCount]) {}
  template <int kCount>
  static void FromLanes(F32x16 (&)[kCount]) {}

 private:
  BlockRows rows_;
  int32_t d_ = 0;
  alignas(64) float keys_[kMaxHeadDim * kBlock];    // [d][64]
  alignas(64) float values_[kMaxHeadDim * kBlock];  // [64][d]
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
