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

  // Largest relative error of a sum of `terms` in any order, in units of the sum of their magnitudes.
  static double gamma(double terms) {
    return terms * kUnit / (1 - terms * kUnit);
  }
};

inline constexpr double kTf32 = 1.0 / 2048;  // of each operand

}  // namespace ssmkernels::test
