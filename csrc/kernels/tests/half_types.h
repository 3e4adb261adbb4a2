// SPDX-License-Identifier: BSD-3-Clause
// Half types on the host, rounded to nearest even.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../common/dtype.h"

namespace ssmkernels::host {

inline float half_to_float(uint16_t bits) {
  const uint32_t exponent = bits >> 10 & 31, fraction = bits & 1023, sign = uint32_t{bits & 0x8000u} << 16;
  if (exponent == 0) return (sign ? -0x1p-24f : 0x1p-24f) * static_cast<float>(fraction);
  const uint32_t whole = sign | (exponent == 31 ? 255 : exponent + 112) << 23 | fraction << 13;
  float x;
  std::memcpy(&x, &whole, sizeof x);
  return x;
}
inline uint16_t float_to_half(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float magnitude = std::fabs(x);
  if (std::isnan(x)) return 0x7fff;
  if (magnitude >= 65520.0f) return sign | 0x7c00;
  int exponent;
  std::frexp(magnitude, &exponent);
  if (exponent < -13 || magnitude == 0) exponent = -13;
  const int fraction = static_cast<int>(
      std::nearbyint(std::ldexp(magnitude, 11 - exponent)));  // of 2^(exponent − 11); 1024 … 2048 if normal
  return static_cast<uint16_t>(sign | (fraction + ((exponent + 13) << 10)));
}
inline float bfloat_to_float(uint16_t bits) {
  const uint32_t whole = uint32_t{bits} << 16;
  float x;
  std::memcpy(&x, &whole, sizeof x);
  return x;
}
inline uint16_t float_to_bfloat(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (std::isnan(x)) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float to_real(float x) {
  return x;
}
inline double to_real(double x) {
  return x;
}
inline float to_real(bfloat16 x) {
  return bfloat_to_float(x.bits);
}
inline float to_real(float16 x) {
  return half_to_float(x.bits);
}

template <class Storage>
Storage from_real(Compute<Storage> x) {
  if constexpr (std::is_same_v<Storage, bfloat16>)
    return {float_to_bfloat(x)};
  else if constexpr (std::is_same_v<Storage, float16>)
    return {float_to_half(x)};
  else
    return x;
}

}  // namespace ssmkernels::host
