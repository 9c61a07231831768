// K and V of a block of 64 keys as attention's arithmetic takes them, in one of three forms with the same
// bits: widened to float32 once for many queries, or for few queries V where it lies and K as transposed
// words of two bfloat16, all of a block's before its scores (NarrowBlock) or eight dimensions at a time
// between them (StreamedBlock).
#ifndef HEADROOM_KERNELS_CPU_KEY_BLOCKS_H_
#define HEADROOM_KERNELS_CPU_KEY_BLOCKS_H_

#include <algorithm>
#include <cstring>

#include "common/kv_layout.h"
#include "kernels/cpu/simd.h"

namespace headroom::kernels::cpu::HEADROOM_ISA_NAMESPACE {

inline constexpr int kBlock = static_cast<int>(kBlockTokens);
inline constexpr int kMaxHeadDim = 256;

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

// Where one block's K and V rows of a head lie.
struct BlockRows {
  const BFloat16* keys = nullptr;    // [count][d]
  const BFloat16* values = nullptr;  // [count][d]
  int64_t first_pos = 0;
  int count = 0;  // rows that exist; others are never read
};

// 16 rows x 32 columns to 16 words of two columns: out[w][row], rows of `out` `stride` apart; with
// fewer `quads`, 4 of the words each. Each vector takes 4 words of every 4th row, so that 4 x 4 transposes
// within its 128-bit lanes are all that is left to shuffle.
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

}  // namespace headroom::kernels::cpu::HEADROOM_ISA_NAMESPACE

#endif  // HEADROOM_KERNELS_CPU_KEY_BLOCKS_H_
