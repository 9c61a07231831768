// Sixteen float32 lanes on AVX-512 (one register), on AVX2 with FMA (two) or in plain C++ (any
// processor, slow): one source for all, with the same arithmetic per lane, so that results agree to
// the bit between them.
//
// A file that includes this is compiled once per instruction set, in the namespace
// HEADROOM_ISA_NAMESPACE (kernels/CMakeLists.txt). Nothing compiled so may be linked from elsewhere:
// an inline function that one of these files leaves in its object file could be the copy that a
// processor without the instruction set runs (tests/unit/kernels/isa_objects_test.py).
#ifndef HEADROOM_KERNELS_CPU_SIMD_H_
#define HEADROOM_KERNELS_CPU_SIMD_H_

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>

#include "kernels/types.h"

#if defined(__AMX_BF16__)
#define HEADROOM_ISA_NAMESPACE amx
#elif defined(__AVX512F__)
#define HEADROOM_ISA_NAMESPACE avx512
#elif defined(__AVX2__) && defined(__FMA__)
#define HEADROOM_ISA_NAMESPACE avx2
#else
#define HEADROOM_ISA_NAMESPACE portable
#endif

namespace headroom::kernels::cpu::HEADROOM_ISA_NAMESPACE {

inline constexpr int kLanes = 16;

#if defined(__AVX512F__)

struct F32x16 {
  __m512 v;
};
inline F32x16 Zero() { return {_mm512_setzero_ps()}; }
inline F32x16 Broadcast(float x) { return {_mm512_set1_ps(x)}; }
inline F32x16 Load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void Store(float* p, F32x16 a) { _mm512_storeu_ps(p, a.v); }
inline F32x16 Add(F32x16 a, F32x16 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F32x16 Sub(F32x16 a, F32x16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F32x16 Mul(F32x16 a, F32x16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F32x16 Div(F32x16 a, F32x16 b) { return {_mm512_div_ps(a.v, b.v)}; }
// a > b ? a : b, so b where either is NaN.
inline F32x16 Max(F32x16 a, F32x16 b) { return {_mm512_max_ps(a.v, b.v)}; }
// a * b + c, rounded once.
inline F32x16 Fma(F32x16 a, F32x16 b, F32x16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F32x16 LoadBf16(const BFloat16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
inline F32x16 Round(F32x16 a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// a * 2^n for integral n in [-126, 127] and a normal result; NaN stays NaN.
inline F32x16 ScaleByPower(F32x16 a, F32x16 n) { return {_mm512_scalef_ps(a.v, n.v)}; }
// 0 where x < limit, else `a`.
inline F32x16 ZeroWhereBelow(F32x16 a, F32x16 x, float limit) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, _mm512_set1_ps(limit), _CMP_NLT_UQ), a.v)};
}
// Lanes [0, n) of `a`, the others `other`.
inline F32x16 FirstLanes(F32x16 a, int n, float other) {
  const __mmask16 mask = n >= kLanes ? 0xffff : n <= 0 ? 0 : static_cast<__mmask16>((1u << n) - 1);
  return {_mm512_mask_mov_ps(_mm512_set1_ps(other), mask, a.v)};
}
// Lanes from `n` on of `a`, the others `other`.
inline F32x16 LanesFrom(F32x16 a, int n, float other) {
  const unsigned below = n >= kLanes ? 0xffffu : n <= 0 ? 0u : (1u << n) - 1;
  return {_mm512_mask_mov_ps(a.v, static_cast<__mmask16>(below), _mm512_set1_ps(other))};
}
// The bfloat16 in the low (high) half of each of 16 words.
inline F32x16 LowBf16(const void* words) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(words), 16))};
}
inline F32x16 HighBf16(const void* words) {
  return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(words),
                                               _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
}
// Between the natural order of 32 values {a: 0..15, b: 16..31} and {even ones, odd ones}.
inline void Deinterleave(F32x16& a, F32x16& b) {
  const __m512i even =
      _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  const __m512 x = _mm512_permutex2var_ps(a.v, even, b.v);
  b.v = _mm512_permutex2var_ps(a.v, odd, b.v);
  a.v = x;
}
inline void Interleave(F32x16& even, F32x16& odd) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high =
      _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  const __m512 x = _mm512_permutex2var_ps(even.v, low, odd.v);
  odd.v = _mm512_permutex2var_ps(even.v, high, odd.v);
  even.v = x;
}
// Sum and maximum over the lanes, always by the same tree: 16, 8, 4, 2, 1.
inline __m256 HighHalf(F32x16 a) {
  return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a.v), 1));
}
inline __m256 AddHalves(F32x16 a) {
  return _mm256_add_ps(_mm512_castps512_ps256(a.v), HighHalf(a));
}
inline __m256 MaxHalves(F32x16 a) {
  return _mm256_max_ps(_mm512_castps512_ps256(a.v), HighHalf(a));
}

#elif defined(__AVX2__) && defined(__FMA__)

struct F32x16 {
  __m256 lo, hi;
};
inline F32x16 Zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline F32x16 Broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline F32x16 Load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void Store(float* p, F32x16 a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
inline F32x16 Add(F32x16 a, F32x16 b) {
  return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)};
}
inline F32x16 Sub(F32x16 a, F32x16 b) {
  return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)};
}
inline F32x16 Mul(F32x16 a, F32x16 b) {
  return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)};
}
inline F32x16 Div(F32x16 a, F32x16 b) {
  return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)};
}
inline F32x16 Max(F32x16 a, F32x16 b) {
  return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)};
}
inline F32x16 Fma(F32x16 a, F32x16 b, F32x16 c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
inline __m256 WidenBf16(const BFloat16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline F32x16 LoadBf16(const BFloat16* p) { return {WidenBf16(p), WidenBf16(p + 8)}; }
inline F32x16 Round(F32x16 a) {
  constexpr int kMode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.lo, kMode), _mm256_round_ps(a.hi, kMode)};
}
inline __m256 PowerOfTwo(__m256 n) {
  return _mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
inline F32x16 ScaleByPower(F32x16 a, F32x16 n) {
  return {_mm256_mul_ps(a.lo, PowerOfTwo(n.lo)), _mm256_mul_ps(a.hi, PowerOfTwo(n.hi))};
}
inline F32x16 ZeroWhereBelow(F32x16 a, F32x16 x, float limit) {
  const __m256 l = _mm256_set1_ps(limit);
  return {_mm256_and_ps(a.lo, _mm256_cmp_ps(x.lo, l, _CMP_NLT_UQ)),
          _mm256_and_ps(a.hi, _mm256_cmp_ps(x.hi, l, _CMP_NLT_UQ))};
}
inline F32x16 FirstLanes(F32x16 a, int n, float other) {
  const __m256i index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256 o = _mm256_set1_ps(other);
  const __m256 lo = _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n), index));
  const __m256 hi = _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n - 8), index));
  return {_mm256_blendv_ps(o, a.lo, lo), _mm256_blendv_ps(o, a.hi, hi)};
}
inline F32x16 LanesFrom(F32x16 a, int n, float other) {
  const __m256i index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256 o = _mm256_set1_ps(other);
  const __m256 lo = _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n), index));
  const __m256 hi = _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n - 8), index));
  return {_mm256_blendv_ps(a.lo, o, lo), _mm256_blendv_ps(a.hi, o, hi)};
}
inline __m256i LoadWords(const void* words, int half) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(words) + half);
}
inline F32x16 LowBf16(const void* words) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(LoadWords(words, 0), 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(LoadWords(words, 1), 16))};
}
inline F32x16 HighBf16(const void* words) {
  const __m256i high = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  return {_mm256_castsi256_ps(_mm256_and_si256(LoadWords(words, 0), high)),
          _mm256_castsi256_ps(_mm256_and_si256(LoadWords(words, 1), high))};
}
// Even (odd) elements of 16 values {x: 0..7, y: 8..15}.
template <int kSelect>
inline __m256 EverySecond(__m256 x, __m256 y) {
  const __m256 mixed = _mm256_shuffle_ps(x, y, kSelect);  // x0 y0 x1 y1 in pairs
  return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(mixed), 0xd8));
}
inline void Deinterleave(F32x16& a, F32x16& b) {
  const F32x16 even = {EverySecond<0x88>(a.lo, a.hi), EverySecond<0x88>(b.lo, b.hi)};
  b = {EverySecond<0xdd>(a.lo, a.hi), EverySecond<0xdd>(b.lo, b.hi)};
  a = even;
}
inline F32x16 Zip(__m256 even, __m256 odd) {
  const __m256 low = _mm256_unpacklo_ps(even, odd);
  const __m256 high = _mm256_unpackhi_ps(even, odd);
  return {_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31)};
}
inline void Interleave(F32x16& even, F32x16& odd) {
  const F32x16 a = Zip(even.lo, odd.lo);
  odd = Zip(even.hi, odd.hi);
  even = a;
}
inline __m256 AddHalves(F32x16 a) { return _mm256_add_ps(a.lo, a.hi); }
inline __m256 MaxHalves(F32x16 a) { return _mm256_max_ps(a.lo, a.hi); }

#else

struct F32x16 {
  float v[16];
};
// fn(i) for every lane.
template <typename Fn>
inline F32x16 Lanes(Fn&& fn) {
  F32x16 result;
  for (int i = 0; i < kLanes; ++i) result.v[i] = fn(i);
  return result;
}
inline float FromBits(uint32_t bits) {
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}
inline uint32_t WordAt(const void* words, int i) {
  uint32_t word;
  std::memcpy(&word, static_cast<const uint8_t*>(words) + i * sizeof(word), sizeof(word));
  return word;
}
inline F32x16 Broadcast(float x) {
  return Lanes([&](int) { return x; });
}
inline F32x16 Zero() { return Broadcast(0); }
inline F32x16 Load(const float* p) {
  return Lanes([&](int i) { return p[i]; });
}
inline void Store(float* p, const F32x16& a) { std::memcpy(p, a.v, sizeof(a.v)); }
inline F32x16 Add(const F32x16& a, const F32x16& b) {
  return Lanes([&](int i) { return a.v[i] + b.v[i]; });
}
inline F32x16 Sub(const F32x16& a, const F32x16& b) {
  return Lanes([&](int i) { return a.v[i] - b.v[i]; });
}
inline F32x16 Mul(const F32x16& a, const F32x16& b) {
  return Lanes([&](int i) { return a.v[i] * b.v[i]; });
}
inline F32x16 Div(const F32x16& a, const F32x16& b) {
  return Lanes([&](int i) { return a.v[i] / b.v[i]; });
}
inline F32x16 Max(const F32x16& a, const F32x16& b) {
  return Lanes([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline F32x16 Fma(const F32x16& a, const F32x16& b, const F32x16& c) {
  return Lanes([&](int i) { return __builtin_fmaf(a.v[i], b.v[i], c.v[i]); });
}
inline F32x16 LoadBf16(const BFloat16* p) {
  return Lanes([&](int i) { return FromBits(uint32_t{p[i].bits} << 16); });
}
inline F32x16 Round(const F32x16& a) {
  return Lanes([&](int i) { return __builtin_nearbyintf(a.v[i]); });
}
inline F32x16 ScaleByPower(const F32x16& a, const F32x16& n) {
  return Lanes([&](int i) {
    const int power = n.v[i] >= -126 && n.v[i] <= 127 ? static_cast<int>(n.v[i]) : 0;
    return a.v[i] * FromBits(static_cast<uint32_t>(power + 127) << 23);
  });
}
inline F32x16 ZeroWhereBelow(const F32x16& a, const F32x16& x, float limit) {
  return Lanes([&](int i) { return x.v[i] < limit ? 0.0f : a.v[i]; });
}
inline F32x16 FirstLanes(const F32x16& a, int n, float other) {
  return Lanes([&](int i) { return i < n ? a.v[i] : other; });
}
inline F32x16 LanesFrom(const F32x16& a, int n, float other) {
  return Lanes([&](int i) { return i >= n ? a.v[i] : other; });
}
inline F32x16 LowBf16(const void* words) {
  return Lanes([&](int i) { return FromBits(WordAt(words, i) << 16); });
}
inline F32x16 HighBf16(const void* words) {
  return Lanes([&](int i) { return FromBits(WordAt(words, i) & 0xffff0000u); });
}
inline void Deinterleave(F32x16& a, F32x16& b) {
  const auto at = [&](int i) { return i < kLanes ? a.v[i] : b.v[i - kLanes]; };
  const F32x16 even = Lanes([&](int i) { return at(2 * i); });
  b = Lanes([&](int i) { return at(2 * i + 1); });
  a = even;
}
inline void Interleave(F32x16& even, F32x16& odd) {
  const auto at = [&](int i) { return i % 2 == 0 ? even.v[i / 2] : odd.v[i / 2]; };
  const F32x16 a = Lanes([&](int i) { return at(i); });
  odd = Lanes([&](int i) { return at(kLanes + i); });
  even = a;
}
template <typename Op>
inline float Reduce(F32x16 a, Op&& op) {
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) a.v[i] = op(a.v[i], a.v[i + half]);
  }
  return a.v[0];
}
inline float ReduceAdd(const F32x16& a) {
  return Reduce(a, [](float x, float y) { return x + y; });
}
inline float ReduceMax(const F32x16& a) {
  return Reduce(a, [](float x, float y) { return x > y ? x : y; });
}

#endif

#if defined(__AVX2__) && defined(__FMA__)
inline float ReduceAdd(F32x16 a) {
  const __m256 eight = AddHalves(a);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float ReduceMax(F32x16 a) {
  const __m256 eight = MaxHalves(a);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
#endif

// 32 bfloat16 as their even and their odd elements: one instruction a vector, where widening in order
// takes two and a shuffle unit.
inline void LoadBf16EvenOdd(const BFloat16* p, F32x16& even, F32x16& odd) {
  even = LowBf16(p);
  odd = HighBf16(p);
}

// exp(x) for x <= 88, within 2 ulp; 0 below -87.3 (the least normal number) and for -inf; NaN for
// NaN. Cody-Waite reduction by ln 2 and the polynomial of degree 6 that is exp's Taylor series
// adjusted on [-ln2/2, ln2/2] (coefficients of Moshier's Cephes expf).
inline F32x16 Exp(F32x16 x) {
  const F32x16 clamped = Max(Broadcast(-87.33f), x);  // keeps n >= -126
  const F32x16 n = Round(Mul(clamped, Broadcast(1.44269504088896341f)));
  F32x16 r = Fma(n, Broadcast(-0.693359375f), clamped);
  r = Fma(n, Broadcast(2.12194440e-4f), r);
  F32x16 p = Broadcast(1.9875691500e-4f);
  p = Fma(p, r, Broadcast(1.3981999507e-3f));
  p = Fma(p, r, Broadcast(8.3334519073e-3f));
  p = Fma(p, r, Broadcast(4.1665795894e-2f));
  p = Fma(p, r, Broadcast(1.6666665459e-1f));
  p = Fma(p, r, Broadcast(5.0000001201e-1f));
  p = Fma(p, Mul(r, r), Add(r, Broadcast(1.0f)));
  return ZeroWhereBelow(ScaleByPower(p, n), x, -87.3f);
}
// cap * tanh(x / cap), tanh within 2^-23: 1 - 2 / (1 + exp(2 y)), which is 1 from y = 20 on. A NaN stays
// one.
inline F32x16 Capped(F32x16 x, float cap) {
  const F32x16 negative = Mul(x, Broadcast(-2.0f / cap));
  const F32x16 e = Exp(Sub(Zero(), Max(Broadcast(-40.0f), negative)));
  const F32x16 tanh = Sub(Broadcast(1.0f), Div(Broadcast(2.0f), Add(Broadcast(1.0f), e)));
  return Mul(tanh, Broadcast(cap));
}
inline float Exp(float x) {
  alignas(64) float lanes[kLanes];
  Store(lanes, Exp(Broadcast(x)));
  return lanes[0];
}

}  // namespace headroom::kernels::cpu::HEADROOM_ISA_NAMESPACE

#endif  // HEADROOM_KERNELS_CPU_SIMD_H_
