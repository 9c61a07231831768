// Sixteen float32 lanes on AVX-512 (one register) or AVX2 with FMA (two): one source for both, with
// the same arithmetic per lane, so that results agree to the bit between the two.
//
// A file that includes this is compiled once per instruction set, in the namespace
// HEADROOM_ISA_NAMESPACE (kernels/CMakeLists.txt); nothing here may leak into other translation units.
#ifndef HEADROOM_KERNELS_CPU_SIMD_H_
#define HEADROOM_KERNELS_CPU_SIMD_H_

#include <immintrin.h>

#include <cstdint>
#include <limits>

#include "kernels/types.h"

#if defined(__AVX512F__)
#define HEADROOM_ISA_NAMESPACE avx512
#else
#define HEADROOM_ISA_NAMESPACE avx2
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
// a * 2^n for integral n in [-126, 127].
inline F32x16 ScaleByPower(F32x16 a, F32x16 n) {
  const __m512i exponent = _mm512_slli_epi32(
      _mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127)), 23);
  return {_mm512_mul_ps(a.v, _mm512_castsi512_ps(exponent))};
}
// Lanes of `a` where x >= limit, else 0.
inline F32x16 KeepWhereAtLeast(F32x16 a, F32x16 x, float limit) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, _mm512_set1_ps(limit), _CMP_GE_OQ), a.v)};
}
// Lanes [0, n) of `a`, the others `other`.
inline F32x16 FirstLanes(F32x16 a, int n, float other) {
  const __mmask16 mask = n >= kLanes ? 0xffff : n <= 0 ? 0 : static_cast<__mmask16>((1u << n) - 1);
  return {_mm512_mask_mov_ps(_mm512_set1_ps(other), mask, a.v)};
}
inline __m256 LowHalf(F32x16 a) { return _mm512_castps512_ps256(a.v); }
inline __m256 HighHalf(F32x16 a) {
  return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a.v), 1));
}

#else

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
inline __m256 WidenBf16(__m128i bits) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline F32x16 LoadBf16(const BFloat16* p) {
  return {WidenBf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          WidenBf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
inline F32x16 Round(F32x16 a) {
  constexpr int kMode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.lo, kMode), _mm256_round_ps(a.hi, kMode)};
}
inline __m256 PowerOfTwo(__m256 n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(
      _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
inline F32x16 ScaleByPower(F32x16 a, F32x16 n) {
  return {_mm256_mul_ps(a.lo, PowerOfTwo(n.lo)), _mm256_mul_ps(a.hi, PowerOfTwo(n.hi))};
}
inline F32x16 KeepWhereAtLeast(F32x16 a, F32x16 x, float limit) {
  const __m256 l = _mm256_set1_ps(limit);
  return {_mm256_and_ps(a.lo, _mm256_cmp_ps(x.lo, l, _CMP_GE_OQ)),
          _mm256_and_ps(a.hi, _mm256_cmp_ps(x.hi, l, _CMP_GE_OQ))};
}
inline F32x16 FirstLanes(F32x16 a, int n, float other) {
  const __m256i index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256 o = _mm256_set1_ps(other);
  const __m256 lo = _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n), index));
  const __m256 hi = _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n - 8), index));
  return {_mm256_blendv_ps(o, a.lo, lo), _mm256_blendv_ps(o, a.hi, hi)};
}
inline __m256 LowHalf(F32x16 a) { return a.lo; }
inline __m256 HighHalf(F32x16 a) { return a.hi; }

#endif

// Sum and maximum over the lanes, always by the same tree: 16, 8, 4, 2, 1.
inline float ReduceAdd(F32x16 a) {
  const __m256 eight = _mm256_add_ps(LowHalf(a), HighHalf(a));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float ReduceMax(F32x16 a) {
  const __m256 eight = _mm256_max_ps(LowHalf(a), HighHalf(a));
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

// exp(x) for x <= 88, within 2 ulp; 0 below -87.3 (the least normal number) and for -inf. Cody-Waite
// reduction by ln 2 and the polynomial of degree 6 that is exp's Taylor series adjusted on
// [-ln2/2, ln2/2] (coefficients of Moshier's Cephes expf).
inline F32x16 Exp(F32x16 x) {
  const F32x16 clamped = Max(x, Broadcast(-88.0f));
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
  return KeepWhereAtLeast(ScaleByPower(p, Max(n, Broadcast(-126.0f))), x, -87.3f);
}
inline float Exp(float x) {
  alignas(64) float lanes[kLanes];
  Store(lanes, Exp(Broadcast(x)));
  return lanes[0];
}

}  // namespace headroom::kernels::cpu::HEADROOM_ISA_NAMESPACE

#endif  // HEADROOM_KERNELS_CPU_SIMD_H_
