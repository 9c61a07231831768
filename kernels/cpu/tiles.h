// Products of bfloat16 with float32 sums on tiles of 16 rows of 64 bytes: by AMX, or in plain
// arithmetic for tests. A word is two bfloat16 that are multiplied and added together, the first in
// its low half. The order and the rounding of sums differ between the two.
#ifndef HEADROOM_KERNELS_CPU_TILES_H_
#define HEADROOM_KERNELS_CPU_TILES_H_

#include <bit>
#include <cstring>

#include "kernels/cpu/simd.h"

namespace headroom::kernels::cpu::HEADROOM_ISA_NAMESPACE {

inline constexpr int kTile = 16;  // rows of a tile, words or floats of a row

// Tiles lie in memory row by row, kTile words or floats a row, and one after the other: with 16 rows
// kTileWords apart.
inline constexpr int kTileWords = kTile * kTile;

// A step is 32 keys: two tiles of them in scores, 16 words of them in a row of weights.
struct ScoreProduct {
  const BFloat16* keys;     // 32 rows
  int64_t key_stride;       // elements
  const uint32_t* queries;  // [group][words][16 queries]
  int words;                // of a key: a multiple of 16
  float* scores;            // [group][32 keys][16 queries]
  int64_t score_stride;     // floats between groups
};
// Weights in pairs of keys, as V's rows: the sums of 16 queries.
struct PairProduct {
  const uint32_t* weights;  // [step][query][16 words]
  const uint32_t* values;   // [step][two tiles of columns][16 words][16 columns]
  int steps;
  float* sums;  // [two tiles of columns][query][16 columns]
  bool add;     // to what `sums` holds
};
// V's rows where they lie: a word is two columns of a key, so each weight comes once with nothing for
// the odd columns and once with nothing for the even ones.
struct RowProduct {
  const uint32_t* weights;  // [16 keys][even, odd][query][16 words]
  const BFloat16* values;   // 32 columns of `tiles` x 16 rows
  int64_t value_stride;     // elements
  int tiles;
  int queries;  // at most 16
  float* sums;  // [even, odd][query][16 columns]
  bool add;     // to what `sums` holds
};

#if defined(__AMX_BF16__)

// Four of the eight tiles are used: two of sums, one for each factor. Results of loads and products go to
// about 18 physical ones, of which a thread has half while its core's other one is busy, with whatever. With
// all eight in use a product then waited for the one before, 52 cycles: 20 to 26 ns each, its loads included,
// on 16 processors of an H200's host; with four 14, though factors are loaded more often. (Four of sums and
// two of factors take 17, and with 16 vector operations a product 24, where two of sums take 17.)
//
// Not by GCC's intrinsics: version 12's do not say that loads read memory, nor that a configuration has 64
// bytes, and it left out half of one.
#define HEADROOM_LOAD_TILE(tile, from, stride)                                          \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #tile : : "r"(from), "r"(int64_t{stride}) : "memory")

// This thread's tiles, contents lost: 3 holds 16 rows from now on, 0 to 2 `rows`. Whoever is done gives them
// back: a thread without tiles is switched faster.
inline void ConfigureTiles(int rows) {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64};
    uint8_t rows[16] = {};
  } config;
  static_assert(sizeof(config) == 64);
  for (int tile = 0; tile < 3; ++tile) config.rows[tile] = static_cast<uint8_t>(rows);
  config.rows[3] = kTile;
  asm volatile("ldtilecfg %0" : : "m"(config));
}
inline void ReleaseTiles() { _tile_release(); }

// Two tiles of sums from, or to, memory.
inline void BeginSums(bool add, const float* first, const float* second) {
  if (add) {
    HEADROOM_LOAD_TILE(0, first, 64);
    HEADROOM_LOAD_TILE(1, second, 64);
  } else {
    _tile_zero(0);
    _tile_zero(1);
  }
}
inline void EndSums(float* first, float* second) {
  _tile_stored(0, first, 64);
  _tile_stored(1, second, 64);
}

// REQUIRES: ConfigureTiles(16). Calls beside() for each 16 keys x 16 words.
template <int kGroups, typename Beside>
inline void Multiply(const ScoreProduct& p, Beside&& beside) {
  const int64_t key_bytes = p.key_stride * 2;
  const BFloat16* const more = p.keys + kTile * p.key_stride;
  if constexpr (kGroups == 1) {
    BeginSums(false, nullptr, nullptr);
    for (int word = 0; word < p.words; word += kTile) {
      HEADROOM_LOAD_TILE(3, p.queries + word * kTile, 64);
      HEADROOM_LOAD_TILE(2, p.keys + 2 * word, key_bytes);
      _tile_dpbf16ps(0, 2, 3);
      beside();
      HEADROOM_LOAD_TILE(2, more + 2 * word, key_bytes);
      _tile_dpbf16ps(1, 2, 3);
      beside();
    }
    EndSums(p.scores, p.scores + kTileWords);
  } else {
    const uint32_t* const second = p.queries + p.words * kTile;
    for (int half = 0; half < 2; ++half) {
      const BFloat16* const keys = half == 0 ? p.keys : more;
      float* const scores = p.scores + half * kTileWords;
      BeginSums(false, nullptr, nullptr);
      for (int word = 0; word < p.words; word += kTile) {
        HEADROOM_LOAD_TILE(2, keys + 2 * word, key_bytes);
        HEADROOM_LOAD_TILE(3, p.queries + word * kTile, 64);
        _tile_dpbf16ps(0, 2, 3);
        HEADROOM_LOAD_TILE(3, second + word * kTile, 64);
        _tile_dpbf16ps(1, 2, 3);
        beside();
      }
      EndSums(scores, scores + p.score_stride);
    }
  }
}

// REQUIRES: ConfigureTiles(16). Calls beside(step) before each step is multiplied: the values of the next may
// be written there.
template <typename Beside>
inline void Multiply(const PairProduct& p, Beside&& beside) {
  BeginSums(p.add, p.sums, p.sums + kTileWords);
  for (int step = 0; step < p.steps; ++step) {
    beside(step);
    const uint32_t* const values = p.values + step * 2 * kTileWords;
    HEADROOM_LOAD_TILE(2, p.weights + step * kTileWords, 64);
    HEADROOM_LOAD_TILE(3, values, 64);
    _tile_dpbf16ps(0, 2, 3);
    HEADROOM_LOAD_TILE(3, values + kTileWords, 64);
    _tile_dpbf16ps(1, 2, 3);
  }
  EndSums(p.sums, p.sums + kTileWords);
}

// REQUIRES: ConfigureTiles(p.queries). Calls beside() for each 16 keys.
template <typename Beside>
inline void Multiply(const RowProduct& p, Beside&& beside) {
  const int64_t tile = p.queries * kTile;
  BeginSums(p.add, p.sums, p.sums + tile);
  for (int i = 0; i < p.tiles; ++i) {
    HEADROOM_LOAD_TILE(3, p.values + i * kTile * p.value_stride, p.value_stride * 2);
    HEADROOM_LOAD_TILE(2, p.weights + 2 * i * tile, 64);
    _tile_dpbf16ps(0, 2, 3);
    HEADROOM_LOAD_TILE(2, p.weights + (2 * i + 1) * tile, 64);
    _tile_dpbf16ps(1, 2, 3);
    beside();
  }
  EndSums(p.sums, p.sums + tile);
}
#undef HEADROOM_LOAD_TILE

#else

inline void ConfigureTiles(int) {}
inline void ReleaseTiles() {}

// sum + a b of a row of `words` words with as many rows of 16 words, `stride` words apart.
inline F32x16 MultiplyRow(const void* a, const void* b, int64_t stride, int words, F32x16 sum) {
  for (int word = 0; word < words; ++word) {
    uint32_t pair;
    std::memcpy(&pair, static_cast<const uint8_t*>(a) + word * sizeof(pair), sizeof(pair));
    const auto low = static_cast<uint16_t>(pair), high = static_cast<uint16_t>(pair >> 16);
    const BFloat16* const row = static_cast<const BFloat16*>(b) + word * 2 * stride;
    sum = Fma(Broadcast(ToFloat({low})), LowBf16(row), sum);
    sum = Fma(Broadcast(ToFloat({high})), HighBf16(row), sum);
  }
  return sum;
}
template <int kGroups, typename Beside>
inline void Multiply(const ScoreProduct& p, Beside&& beside) {
  for (int g = 0; g < kGroups; ++g) {
    for (int key = 0; key < 2 * kTile; ++key) {
      Store(p.scores + g * p.score_stride + key * kTile,
            MultiplyRow(p.keys + key * p.key_stride, p.queries + g * p.words * kTile, kTile, p.words,
                        Zero()));
    }
  }
  for (int word = 0; word < 2 * p.words; word += kTile) beside();
}
template <typename Beside>
inline void Multiply(const PairProduct& p, Beside&& beside) {
  for (int step = 0; step < p.steps; ++step) {
    beside(step);
    const uint32_t* const weights = p.weights + step * kTileWords;
    const uint32_t* const values = p.values + step * 2 * kTileWords;
    for (int i = 0; i < 2 * kTile; ++i) {
      float* const sums = p.sums + i * kTile;
      Store(sums, MultiplyRow(weights + i % kTile * kTile, values + i / kTile * kTileWords, kTile,
                              kTile, step > 0 || p.add ? Load(sums) : Zero()));
    }
  }
}
template <typename Beside>
inline void Multiply(const RowProduct& p, Beside&& beside) {
  for (int i = 0; i < 2 * p.queries; ++i) {
    float* const sums = p.sums + i * kTile;
    F32x16 sum = p.add ? Load(sums) : Zero();
    for (int at = 0; at < p.tiles; ++at) {
      sum = MultiplyRow(p.weights + (2 * at * p.queries + i) * kTile,
                        p.values + at * kTile * p.value_stride, p.value_stride / 2, kTile, sum);
    }
    Store(sums, sum);
  }
  for (int at = 0; at < p.tiles; ++at) beside();
}

#endif

// x less the nearest whole number, and p * 2^n for a whole n; 0 and 0 for -inf. Without AVX-512 n is taken as
// at most 127.
#if defined(__AVX512DQ__)
inline F32x16 Fraction(F32x16 x) { return {_mm512_reduce_ps(x.v, 8)}; }
inline F32x16 Power(F32x16 p, F32x16 n) { return {_mm512_scalef_ps(p.v, n.v)}; }
#else
inline F32x16 Fraction(F32x16 x) {
  const F32x16 finite = Max(Broadcast(-1.0e6f), x);  // x where it is NaN
  return Sub(finite, Round(finite));
}
inline F32x16 Power(F32x16 p, F32x16 n) {
  const F32x16 least = Broadcast(-127.0f);  // of -n
  const F32x16 scale = Max(Sub(Zero(), Max(Sub(Zero(), n), least)), Broadcast(-126.0f));
  return ZeroWhereBelow(ScaleByPower(p, scale), n, -126.0f);
}
#endif

// Words of floats rounded to bfloat16, halves away from zero.
#if defined(__AVX512BW__)
inline F32x16 PairsOf(F32x16 low, F32x16 high) {
  const __m512i half = _mm512_set1_epi32(0x8000);
  const __m512i l = _mm512_srli_epi32(_mm512_add_epi32(_mm512_castps_si512(low.v), half), 16);
  const __m512i h = _mm512_add_epi32(_mm512_castps_si512(high.v), half);
  return {_mm512_castsi512_ps(_mm512_mask_blend_epi16(0xaaaaaaaau, l, h))};
}
#else
inline F32x16 PairsOf(F32x16 low, F32x16 high) {
  uint32_t l[kLanes], h[kLanes];
  Store(reinterpret_cast<float*>(l), low);
  Store(reinterpret_cast<float*>(h), high);
  for (int i = 0; i < kLanes; ++i) {
    l[i] = ((l[i] + 0x8000u) >> 16) | ((h[i] + 0x8000u) & 0xffff0000u);
  }
  F32x16 pairs;
  std::memcpy(&pairs, l, sizeof(pairs));
  return pairs;
}
#endif

// sum + the low and + the high halves of words, each a bfloat16.
#if defined(__AVX512BF16__)
inline F32x16 AddWords(F32x16 sum, F32x16 words) {
  const __m512bh ones = std::bit_cast<__m512bh>(_mm512_set1_epi32(0x3f803f80));
  return {_mm512_dpbf16_ps(sum.v, std::bit_cast<__m512bh>(words.v), ones)};
}
#else
inline F32x16 AddWords(F32x16 sum, const F32x16& words) {
  return Add(sum, Add(LowBf16(&words), HighBf16(&words)));
}
#endif

// Floats rounded to bfloat16 as PairsOf does, as the low and as the high halves of words whose other
// halves are 0.
#if defined(__AVX512F__)
inline void StoreHalves(F32x16 x, uint32_t* low, uint32_t* high) {
  const __m512i bits = _mm512_add_epi32(_mm512_castps_si512(x.v), _mm512_set1_epi32(0x8000));
  _mm512_store_si512(low, _mm512_srli_epi32(bits, 16));
  _mm512_store_si512(high, _mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}
#else
inline void StoreHalves(F32x16 x, uint32_t* low, uint32_t* high) {
  uint32_t bits[kLanes];
  Store(reinterpret_cast<float*>(bits), x);
  for (int i = 0; i < kLanes; ++i) {
    low[i] = (bits[i] + 0x8000u) >> 16;
    high[i] = (bits[i] + 0x8000u) & 0xffff0000u;
  }
}
#endif

// Whether some x > limit; NaN is not.
#if defined(__AVX512F__)
inline bool SomeAbove(F32x16 x, float limit) {
  return _mm512_cmp_ps_mask(x.v, _mm512_set1_ps(limit), _CMP_GT_OQ) != 0;
}
#else
inline bool SomeAbove(F32x16 x, float limit) {
  float v[kLanes];
  Store(v, x);
  bool some = false;
  for (float each : v) some |= each > limit;
  return some;
}
#endif

// 32 columns of two rows as words of both: of columns 8 i + j, j < 4, word 4 i + j in `low`, of the
// others in `high`, which is one instruction each; and back, of the sums of these columns.
#if defined(__AVX512BW__)
inline void PairRows(const BFloat16* first, const BFloat16* second, uint32_t* low, uint32_t* high) {
  const __m512i a = _mm512_loadu_si512(first), b = _mm512_loadu_si512(second);
  _mm512_store_si512(low, _mm512_unpacklo_epi16(a, b));
  _mm512_store_si512(high, _mm512_unpackhi_epi16(a, b));
}
inline void StoreColumns(F32x16 low, F32x16 high, float* to) {
  const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
  const __m512i second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  const __m512d l = _mm512_castps_pd(low.v), h = _mm512_castps_pd(high.v);
  _mm512_storeu_pd(to, _mm512_permutex2var_pd(l, first, h));
  _mm512_storeu_pd(to + kLanes, _mm512_permutex2var_pd(l, second, h));
}
#else
inline void PairRows(const BFloat16* first, const BFloat16* second, uint32_t* low, uint32_t* high) {
  for (int i = 0; i < 2 * kLanes; ++i) {
    uint32_t* const to = i % 8 < 4 ? low : high;
    to[i / 8 * 4 + i % 4] = first[i].bits | static_cast<uint32_t>(second[i].bits) << 16;
  }
}
inline void StoreColumns(F32x16 low, F32x16 high, float* to) {
  float halves[2][kLanes];
  Store(halves[0], low);
  Store(halves[1], high);
  for (int i = 0; i < 2 * kLanes; ++i) to[i] = halves[i % 8 / 4][i / 8 * 4 + i % 4];
}
#endif
inline void LoadColumns(const float* from, float* low, float* high) {
  for (int i = 0; i < 2 * kLanes; ++i) {
    float* const to = i % 8 < 4 ? low : high;
    to[i / 8 * 4 + i % 4] = from[i];
  }
}

// For four queries a vector holds four keys: quarter j of vector i has key 4 j + i of 16, from rows of
// 16 scores; and four such vectors become rows, one a query, of 16 keys in order.
#if defined(__AVX512F__)
inline F32x16 FourOfRows(const float* rows, int i) {
  const float* const at = rows + i * kTile;
  __m512 v = _mm512_castps128_ps512(_mm_load_ps(at));
  v = _mm512_insertf32x4(v, _mm_load_ps(at + 4 * kTile), 1);
  v = _mm512_insertf32x4(v, _mm_load_ps(at + 8 * kTile), 2);
  return {_mm512_insertf32x4(v, _mm_load_ps(at + 12 * kTile), 3)};
}
inline void ToRows(F32x16 (&v)[4]) {
  const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(v[0].v, v[1].v));
  const __m512d b = _mm512_castps_pd(_mm512_unpacklo_ps(v[2].v, v[3].v));
  const __m512d c = _mm512_castps_pd(_mm512_unpackhi_ps(v[0].v, v[1].v));
  const __m512d d = _mm512_castps_pd(_mm512_unpackhi_ps(v[2].v, v[3].v));
  v[0].v = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
  v[1].v = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
  v[2].v = _mm512_castpd_ps(_mm512_unpacklo_pd(c, d));
  v[3].v = _mm512_castpd_ps(_mm512_unpackhi_pd(c, d));
}
#else
inline F32x16 FourOfRows(const float* rows, int i) {
  float v[kLanes];
  for (int at = 0; at < kLanes; ++at) v[at] = rows[(at / 4 * 4 + i) * kTile + at % 4];
  return Load(v);
}
inline void ToRows(F32x16 (&v)[4]) {
  float rows[4][kLanes];
  for (int i = 0; i < 4; ++i) {
    float of_keys[kLanes];
    Store(of_keys, v[i]);
    for (int at = 0; at < kLanes; ++at) rows[at % 4][at / 4 * 4 + i] = of_keys[at];
  }
  for (int i = 0; i < 4; ++i) v[i] = Load(rows[i]);
}
#endif
// The same of 16 floats, one a query, in each quarter.
inline F32x16 FourTimes(const float* four) {
  float v[kLanes];
  for (int at = 0; at < kLanes; ++at) v[at] = four[at % 4];
  return Load(v);
}

}  // namespace headroom::kernels::cpu::HEADROOM_ISA_NAMESPACE

#endif  // HEADROOM_KERNELS_CPU_TILES_H_
