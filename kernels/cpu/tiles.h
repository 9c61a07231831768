// Products of bfloat16 with float32 sums on tiles of 16 rows of 64 bytes: by AMX, or in plain
// arithmetic for tests. A word is two bfloat16 that are multiplied and added together, the first in
// its low half. The order and the rounding of sums differ between the two.
#ifndef HEADROOM_KERNELS_CPU_TILES_H_
#define HEADROOM_KERNELS_CPU_TILES_H_

#include <cstring>

#include "kernels/cpu/simd.h"

namespace headroom::kernels::cpu::HEADROOM_ISA_NAMESPACE {

inline constexpr int kTile = 16;  // rows of a tile, words or floats of a row

// out[i][row][column] (+)= sum over word < `words` of a[i][row][word] . b[word][column], for i < 2,
// `rows` rows (at most 16), and one or two tiles of 16 columns. `words` is a multiple of 16; strides
// are in words, that of `out` in floats.
struct TileProduct {
  const void* a[2];
  int64_t a_stride;
  const void* b;
  int64_t b_stride;
  int words;
  float* out[2];
  int64_t out_stride;
  bool add;  // to what `out` holds
};

#if defined(__AMX_BF16__)

// This thread's tiles: 0 to 5 (sums and a) hold `rows` rows from now on, 6 and 7 (b) 16. Contents are
// lost. Whoever is done gives them back: a thread without tiles is switched faster.
inline void ConfigureTiles(int rows) {
  alignas(64) uint8_t config[64] = {};
  config[0] = 1;  // palette
  for (int tile = 0; tile < 8; ++tile) {
    config[16 + 2 * tile] = 64;  // bytes of a row
    config[48 + tile] = static_cast<uint8_t>(tile < 6 ? rows : kTile);
  }
  _tile_loadconfig(config);
}
inline void ReleaseTiles() { _tile_release(); }

// REQUIRES: ConfigureTiles(rows). Calls step() for each 16 words.
template <int kColumns, typename Step>
inline void Multiply(const TileProduct& p, int, Step&& step) {
  const int64_t a_bytes = p.a_stride * 4, b_bytes = p.b_stride * 4, out_bytes = p.out_stride * 4;
  if (p.add) {
    _tile_loadd(0, p.out[0], out_bytes);
    _tile_loadd(1, p.out[1], out_bytes);
    if constexpr (kColumns > 1) {
      _tile_loadd(2, p.out[0] + kTile, out_bytes);
      _tile_loadd(3, p.out[1] + kTile, out_bytes);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  const auto* const first = static_cast<const uint32_t*>(p.a[0]);
  const auto* const second = static_cast<const uint32_t*>(p.a[1]);
  const auto* const b = static_cast<const uint32_t*>(p.b);
  for (int word = 0; word < p.words; word += kTile) {
    _tile_loadd(4, first + word, a_bytes);
    _tile_loadd(6, b + word * p.b_stride, b_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, second + word, a_bytes);
    _tile_dpbf16ps(1, 5, 6);
    if constexpr (kColumns > 1) {
      _tile_loadd(7, b + word * p.b_stride + kTile, b_bytes);
      _tile_dpbf16ps(2, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
    step();
  }
  _tile_stored(0, p.out[0], out_bytes);
  _tile_stored(1, p.out[1], out_bytes);
  if constexpr (kColumns > 1) {
    _tile_stored(2, p.out[0] + kTile, out_bytes);
    _tile_stored(3, p.out[1] + kTile, out_bytes);
  }
}

#else

inline void ConfigureTiles(int) {}
inline void ReleaseTiles() {}

template <int kColumns, typename Step>
inline void Multiply(const TileProduct& p, int rows, Step&& step) {
  for (int i = 0; i < 2; ++i) {
    for (int row = 0; row < rows; ++row) {
      const auto* const a = static_cast<const BFloat16*>(p.a[i]) + row * 2 * p.a_stride;
      for (int column = 0; column < kColumns * kTile; column += kTile) {
        float* const out = p.out[i] + row * p.out_stride + column;
        F32x16 sum = p.add ? Load(out) : Zero();
        for (int word = 0; word < p.words; ++word) {
          const uint32_t* const b = static_cast<const uint32_t*>(p.b) + word * p.b_stride + column;
          sum = Fma(Broadcast(ToFloat(a[2 * word])), LowBf16(b), sum);
          sum = Fma(Broadcast(ToFloat(a[2 * word + 1])), HighBf16(b), sum);
        }
        Store(out, sum);
      }
    }
  }
  for (int word = 0; word < p.words; word += kTile) step();
}

#endif

// x less the nearest whole number, and p * 2^n for a whole n; 0 and 0 for -inf.
#if defined(__AVX512DQ__)
inline F32x16 Fraction(F32x16 x) { return {_mm512_reduce_ps(x.v, 8)}; }
inline F32x16 Power(F32x16 p, F32x16 n) { return {_mm512_scalef_ps(p.v, n.v)}; }
#else
inline F32x16 Fraction(F32x16 x) {
  const F32x16 finite = Max(x, Broadcast(-1.0e6f));
  return Sub(finite, Round(finite));
}
inline F32x16 Power(F32x16 p, F32x16 n) {
  return ZeroWhereBelow(ScaleByPower(p, Max(n, Broadcast(-126.0f))), n, -126.0f);
}
#endif

// Floats rounded to bfloat16, halves away from zero, as the low and as the high halves of words whose
// other halves are 0.
#if defined(__AVX512F__)
inline void StoreHalves(F32x16 x, uint32_t* low, uint32_t* high) {
  const __m512i bits =
      _mm512_add_epi32(_mm512_castps_si512(x.v), _mm512_set1_epi32(0x8000));
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

}  // namespace headroom::kernels::cpu::HEADROOM_ISA_NAMESPACE

#endif  // HEADROOM_KERNELS_CPU_TILES_H_
