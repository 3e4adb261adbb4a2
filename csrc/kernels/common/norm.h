// SPDX-License-Identifier: BSD-3-Clause
// The length of a vector of any scale: its squares are summed in double, which holds those of every float; of doubles
// whose squares overflow, those of the vector times a power of two. Squares that underflow are of vectors that count as
// zeros here.
#pragma once

#include <cstdint>

#ifndef SSM_ISA
#error "CPU kernels are compiled once per instruction set, with SSM_ISA naming it"
#endif

namespace ssmkernels::SSM_ISA {

// ‖x‖ = norm/scale, so that x/‖x‖ = x·scale/norm.
struct ScaledNorm {
  double norm, scale;
};

inline constexpr double kSmallestNorm = 1e-12;  // a shorter vector has no direction
inline constexpr double kLargestSquares = 1e300;

// element(k), k < size, and the sum of their squares.
template <class F>
static inline ScaledNorm scaled_norm(double squares, int64_t size, const F& element) {
  if (squares < kLargestSquares) return {__builtin_sqrt(squares), 1};
  double largest = 0;
  for (int64_t k = 0; k < size; ++k) {
    const double magnitude = __builtin_fabs(element(k));
    largest = magnitude > largest ? magnitude : largest;
  }
  if (!(largest < __builtin_inf())) return {__builtin_sqrt(squares), 1};
  int exponent;
  __builtin_frexp(largest, &exponent);
  const double scale = __builtin_ldexp(1, 1 - exponent);  // 2^-1023 is the least, which is exact in double
  squares = 0;
  for (int64_t k = 0; k < size; ++k) squares += element(k) * scale * (element(k) * scale);
  return {__builtin_sqrt(squares), scale};
}

}  // namespace ssmkernels::SSM_ISA
