// SPDX-License-Identifier: BSD-3-Clause
// Vectors of the instruction set this file is compiled for, as GCC/Clang vector types: + - * / and comparisons work
// lane by lane, and the compiler picks the instructions. Everything lives in the instruction set's namespace, so that
// no two sets share a symbol.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "dtype.h"

#ifndef SSM_ISA
#error "CPU kernels are compiled once per instruction set, with SSM_ISA naming it"
#endif

namespace ssmkernels::SSM_ISA {

// SSM_AVX512_LANES: vectors as wide as AVX-512's, so every sum in its order, out of narrower instructions: the set
// "avx512" can then be tested, if not timed, on a processor without it.
#if defined(__AVX512F__) || defined(SSM_AVX512_LANES)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

template <class Real>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float Values __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Bits __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<double> {
  typedef double Values __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Bits __attribute__((vector_size(kVectorBytes)));
};

template <class Real>
using Vec = typename VectorOf<Real>::Values;
template <class Real>
inline constexpr int kLanes = kVectorBytes / sizeof(Real);

template <class Real>
static inline Vec<Real> load(const Real* from) {
  Vec<Real> v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <class Real>
static inline void store(Real* to, Vec<Real> v) {
  std::memcpy(to, &v, sizeof v);
}

// x − 0 is x, −0 too, and the compiler leaves it out; 0 + x would be one more addition.
template <class Real>
static inline Vec<Real> broadcast(Real x) {
  return x - Vec<Real>{};
}

template <class V>
static inline V max(V a, V b) {
  return a > b ? a : b;
}

// b where either is NaN.
template <class V>
static inline V min(V a, V b) {
  return a < b ? a : b;
}

// v in its first `count` lanes, `otherwise` in the others.
template <class Real>
static inline Vec<Real> first_lanes(Vec<Real> v, int64_t count, Real otherwise = 0) {
  if (count >= kLanes<Real>) return v;
  Vec<Real> lane;
  for (int k = 0; k < kLanes<Real>; ++k) lane[k] = static_cast<Real>(k);
  return lane < static_cast<Real>(count) ? v : broadcast(otherwise);
}

template <class Real>
static inline void store_first(Real* to, Vec<Real> v, int64_t count) {
  if (count >= kLanes<Real>) return store(to, v);
  for (int64_t lane = 0; lane < count; ++lane) to[lane] = v[lane];
}

// Whether any lane differs: an OR over the bits, which the compiler folds.
template <class Real>
static inline bool differ(Vec<Real> a, Vec<Real> b) {
  auto bits = a != b;
  bool any = false;
  for (int lane = 0; lane < kLanes<Real>; ++lane) any |= bits[lane] != 0;
  return any;
}

// Whether any lane of a comparison's result is true.
template <class Bits>
static inline bool any(Bits bits) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)bits, (__m512i)bits) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256((__m256i)bits, (__m256i)bits);
#else
  bool found = false;
  for (unsigned lane = 0; lane < sizeof bits / sizeof bits[0]; ++lane) found |= bits[lane] != 0;
  return found;
#endif
}

// A bit for every lane of a comparison's result, the first lane in the lowest.
template <class Bits>
static inline unsigned lane_bits(Bits bits) {
  [[maybe_unused]] constexpr bool kIsFloat = sizeof bits[0] == sizeof(float);
#if defined(__AVX512F__)
  return kIsFloat ? _mm512_test_epi32_mask((__m512i)bits, (__m512i)bits)
                  : _mm512_test_epi64_mask((__m512i)bits, (__m512i)bits);
#elif defined(__AVX2__)
  return kIsFloat ? _mm256_movemask_ps((__m256)bits) : _mm256_movemask_pd((__m256d)bits);
#else
  unsigned lanes = 0;
  for (unsigned lane = 0; lane < sizeof bits / sizeof bits[0]; ++lane) lanes |= (bits[lane] != 0) << lane;
  return lanes;
#endif
}

// NaN for negative x. With a mask, because GCC 12 warns of its own plain intrinsic.
static inline Vec<float> sqrt(Vec<float> x) {
#if defined(__AVX512F__)
  return _mm512_maskz_sqrt_ps(0xffff, x);
#elif defined(__AVX2__)
  return _mm256_sqrt_ps(x);
#else
  for (int lane = 0; lane < kLanes<float>; ++lane) x[lane] = __builtin_sqrtf(x[lane]);
  return x;
#endif
}

static inline Vec<double> sqrt(Vec<double> x) {
#if defined(__AVX512F__)
  return _mm512_maskz_sqrt_pd(0xff, x);
#elif defined(__AVX2__)
  return _mm256_sqrt_pd(x);
#else
  for (int lane = 0; lane < kLanes<double>; ++lane) x[lane] = __builtin_sqrt(x[lane]);
  return x;
#endif
}

// a − b·c, rounded once where the processor multiplies and adds in one instruction. Said, and not left to the compiler,
// where a value that is taken in two places must have the same bits in both: what the compiler joins depends on what
// surrounds it.
static inline Vec<float> minus_product(Vec<float> a, Vec<float> b, Vec<float> c) {
#if defined(__AVX512F__)
  return _mm512_fnmadd_ps(b, c, a);
#elif defined(__AVX2__)
  return _mm256_fnmadd_ps(b, c, a);
#elif defined(__FP_FAST_FMAF)
  for (int lane = 0; lane < kLanes<float>; ++lane) a[lane] = __builtin_fmaf(-b[lane], c[lane], a[lane]);
  return a;
#else
  return a - b * c;
#endif
}

static inline Vec<double> minus_product(Vec<double> a, Vec<double> b, Vec<double> c) {
#if defined(__AVX512F__)
  return _mm512_fnmadd_pd(b, c, a);
#elif defined(__AVX2__)
  return _mm256_fnmadd_pd(b, c, a);
#elif defined(__FP_FAST_FMA)
  for (int lane = 0; lane < kLanes<double>; ++lane) a[lane] = __builtin_fma(-b[lane], c[lane], a[lane]);
  return a;
#else
  return a - b * c;
#endif
}

// e^r for |r| <= ln2/2, to 3e-9 and 5e-18: a minimax polynomial, and Taylor's.
inline constexpr double kExpReduced = 0.34657;
static inline Vec<float> exp_reduced(Vec<float> r) {
  Vec<float> p = r * 1.3814614608e-3f + 8.3687091010e-3f;
  p = p * r + 4.1668387294e-2f;
  p = p * r + 1.6666520696e-1f;
  p = p * r + 4.9999993452e-1f;
  p = p * r + 1.0f;
  return p * r + 1.0f;
}

static inline Vec<double> exp_reduced(Vec<double> r) {
  Vec<double> p = r * (1.0 / 6227020800) + 1.0 / 479001600;
  p = p * r + 1.0 / 39916800;
  p = p * r + 1.0 / 3628800;
  p = p * r + 1.0 / 362880;
  p = p * r + 1.0 / 40320;
  p = p * r + 1.0 / 5040;
  p = p * r + 1.0 / 720;
  p = p * r + 1.0 / 120;
  p = p * r + 1.0 / 24;
  p = p * r + 1.0 / 6;
  p = p * r + 0.5;
  p = p * r + 1.0;
  return p * r + 1.0;
}

// e^x: x = n ln2 + r with |r| <= ln2/2 and ln2 in two parts, then e^r times 2^n. About 1 ulp. Below the smallest normal
// number: exactly 0 (−inf too). NaN stays NaN. The arguments here are logits less their maximum: the top of the range
// is not looked after.
#if defined(__AVX512F__)
static inline Vec<float> exp(Vec<float> x) {
  const Vec<float> n =
      _mm512_maskz_roundscale_ps(0xffff, x * 1.44269504088896341f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Vec<float> r = x - n * 0.693359375f + n * 2.12194440e-4f;
  const auto normal = _mm512_cmp_ps_mask(x, broadcast(-87.3f), _CMP_NLT_UQ);
  return _mm512_maskz_scalef_ps(normal, exp_reduced(r), n);
}

static inline Vec<double> exp(Vec<double> x) {
  const Vec<double> n =
      _mm512_maskz_roundscale_pd(0xff, x * 1.4426950408889634074, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Vec<double> r = x - n * 6.93145751953125e-1 - n * 1.42860682030941723212e-6;
  const auto normal = _mm512_cmp_pd_mask(x, broadcast(-708.0), _CMP_NLT_UQ);
  return _mm512_maskz_scalef_pd(normal, exp_reduced(r), n);
}
#else
static inline Vec<float> exp(Vec<float> x) {
  using V = Vec<float>;
  using Bits = VectorOf<float>::Bits;
  const V clamped = min(broadcast(88.0f), x);
  const V shifter = broadcast(12582912.0f + 127);  // adding 1.5·2^23 rounds to an integer; 127 is the exponent of 1
  const V n_shifted = clamped * 1.44269504088896341f + shifter;
  const V n = n_shifted - shifter;
  const V r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
  const V result = exp_reduced(r) * (V)((Bits)n_shifted << 23);  // the low bits of n_shifted are n + 127
  return x < -87.3f ? V{} : result;
}

static inline Vec<double> exp(Vec<double> x) {
  using V = Vec<double>;
  using Bits = VectorOf<double>::Bits;
  const V clamped = min(broadcast(709.0), x);
  const V shifter = broadcast(6755399441055744.0 + 1023);  // 1.5·2^52
  const V n_shifted = clamped * 1.4426950408889634074 + shifter;
  const V n = n_shifted - shifter;
  const V r = clamped - n * 6.93145751953125e-1 - n * 1.42860682030941723212e-6;
  const V result = exp_reduced(r) * (V)((Bits)n_shifted << 52);
  return x < -708.0 ? V{} : result;
}
#endif

// log x for x > 0 (subnormal too); inf and NaN stay what they are: x = 2^n m with m in [√½, √2), log m = 2 artanh((m −
// 1)/(m + 1)).
static inline Vec<float> log(Vec<float> x) {
  using V = Vec<float>;
  using Bits = VectorOf<float>::Bits;
  const auto tiny = x < 1.17549435e-38f;
  const Bits bits = (Bits)(tiny ? x * 8388608.0f : x) - 0x3f3504f3;  // √½
  V n = __builtin_convertvector(bits >> 23, V);
  n = tiny ? n - 23.0f : n;
  const V m = (V)((bits & 0x007fffff) + 0x3f3504f3);
  const V s = (m - 1.0f) / (m + 1.0f), z = s * s;
  V p = broadcast(2.0f / 11);
  p = p * z + 2.0f / 9;
  p = p * z + 2.0f / 7;
  p = p * z + 2.0f / 5;
  p = p * z + 2.0f / 3;
  const V result = n * 0.693359375f + (s * (z * p + 2.0f) - n * 2.12194440e-4f);
  return x < __builtin_inff() ? result : x;
}

static inline Vec<double> log(Vec<double> x) {
  using V = Vec<double>;
  using Bits = VectorOf<double>::Bits;
  const auto tiny = x < 2.2250738585072014e-308;
  const Bits bits = (Bits)(tiny ? x * 4503599627370496.0 : x) - 0x3fe6a09e667f3bcdLL;
  V n = __builtin_convertvector(bits >> 52, V);
  n = tiny ? n - 52.0 : n;
  const V m = (V)((bits & 0x000fffffffffffffLL) + 0x3fe6a09e667f3bcdLL);
  const V s = (m - 1.0) / (m + 1.0), z = s * s;
  V p = broadcast(2.0 / 23);
  p = p * z + 2.0 / 21;
  p = p * z + 2.0 / 19;
  p = p * z + 2.0 / 17;
  p = p * z + 2.0 / 15;
  p = p * z + 2.0 / 13;
  p = p * z + 2.0 / 11;
  p = p * z + 2.0 / 9;
  p = p * z + 2.0 / 7;
  p = p * z + 2.0 / 5;
  p = p * z + 2.0 / 3;
  const V result = n * 6.93145751953125e-1 + (s * (z * p + 2.0) + n * 1.42860682030941723212e-6);
  return x < __builtin_inf() ? result : x;
}

// log(1 + x) for x in [0, 1], to the precision of x itself: 2 artanh(x/(2 + x)).
static inline Vec<float> log1p_unit(Vec<float> x) {
  const Vec<float> s = x / (x + 2.0f), z = s * s;
  Vec<float> p = broadcast(2.0f / 13);
  p = p * z + 2.0f / 11;
  p = p * z + 2.0f / 9;
  p = p * z + 2.0f / 7;
  p = p * z + 2.0f / 5;
  p = p * z + 2.0f / 3;
  return s * (z * p + 2.0f);
}

static inline Vec<double> log1p_unit(Vec<double> x) {
  const Vec<double> s = x / (x + 2.0), z = s * s;
  Vec<double> p = broadcast(2.0 / 33);
  for (int odd = 31; odd > 1; odd -= 2) p = p * z + 2.0 / odd;
  return s * (z * p + 2.0);
}

static inline float to_real(float x) {
  return x;
}
static inline double to_real(double x) {
  return x;
}
static inline float to_real(bfloat16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}
// float16 has 5 bits of exponent: moved to float's place and scaled by 2^112, subnormals come out right; inf and NaN
// keep their exponent.
static inline float to_real(float16 x) {
  const uint32_t magnitude = (uint32_t{x.bits} & 0x7fff) << 13;
  float scaled;
  std::memcpy(&scaled, &magnitude, sizeof scaled);
  scaled *= 5.192296858534828e33f;  // 2^112
  uint32_t bits;
  std::memcpy(&bits, &scaled, sizeof bits);
  bits |= (magnitude >= 0x0f800000 ? 0x7f800000 : 0) | (uint32_t{x.bits} & 0x8000) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

static inline void from_real(float x, float* to) {
  *to = x;
}
static inline void from_real(double x, double* to) {
  *to = x;
}
// Round to nearest even; NaN stays NaN.
static inline void from_real(float x, bfloat16* to) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const bool nan = x != x;
  to->bits = nan ? uint16_t{0x7fc0} : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
static inline void from_real(float x, float16* to) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00;
  } else if (magnitude >= 0x477ff000) {  // rounds to 65536 or more
    half = 0x7c00;
  } else if (magnitude < 0x38800000) {  // subnormal: adding 0.5 leaves the rounded fraction in the low bits
    float value;
    std::memcpy(&value, &magnitude, sizeof value);
    value += 0.5f;
    std::memcpy(&half, &value, sizeof half);
    half -= 0x3f000000;
  } else {
    half = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  }
  to->bits = static_cast<uint16_t>(sign | half);
}

}  // namespace ssmkernels::SSM_ISA
