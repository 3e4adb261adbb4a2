// SPDX-License-Identifier: BSD-3-Clause
// What the tolerances of the CUDA tests are made of, as those of python_tests/ops/bounds/rounding.py: never of what a
// machine happened to print.
#pragma once

#include <cmath>
#include <limits>
#include <type_traits>

#include "half_types.h"

namespace ssmkernels::test {

// Units of roundoff in an exponential or a logarithm: 2 ulp, which is what ex2.approx and lg2.approx promise.
inline constexpr double kExpUnits = 4;

// Half types are computed in float32.
template <class Storage>
struct Rounding {
  static constexpr double kUnit = std::numeric_limits<Compute<Storage>>::epsilon() / 2;
  static constexpr double kHalf = std::is_same_v<Storage, bfloat16>  ? 1.0 / 256
                                  : std::is_same_v<Storage, float16> ? 1.0 / 2048
                                                                     : 0;  // of operands of the tensor cores

  // What a half type may lose of a number below its range.
  static constexpr double kHalfTiny = std::is_same_v<Storage, float16> ? 1.0 / (1 << 25) : 0;

  // Largest relative error of a sum of `terms` in any order, in units of the sum of their magnitudes.
  static double gamma(double terms) {
    return terms * kUnit / (1 - terms * kUnit);
  }
  // The same of a product of matrices. Tensor cores round sums toward zero, twice as far as to the nearest.
  static double product_gamma(double terms) {
    return gamma(kHalf > 0 ? 2 * terms : terms);
  }
};

inline constexpr double kTf32 = 1.0 / 2048;  // of each operand

}  // namespace ssmkernels::test
