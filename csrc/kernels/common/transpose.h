// SPDX-License-Identifier: BSD-3-Clause
// Square blocks of vectors in registers: transposed, or summed along the lanes of each.
#pragma once

#include <utility>

#include "simd.h"

namespace ssmkernels::SSM_ISA {

// Lanes of a and b in turn, in runs of kRun: those of a's even runs and, between them, b's even runs (kOdd: the odd
// ones of both).
template <int kRun, bool kOdd, class V, int... kLane>
static inline V interleave(V a, V b, std::integer_sequence<int, kLane...>) {
  constexpr int lanes = sizeof...(kLane);
  return __builtin_shufflevector(a, b, ((kLane & kRun ? lanes + kLane - kRun : kLane) + (kOdd ? kRun : 0))...);
}

// v[k][l] ← v[l][k]
template <class Real, int kRun = 1>
static inline void transpose(Vec<Real> (&v)[kLanes<Real>]) {
  using Lanes = std::make_integer_sequence<int, kLanes<Real>>;
#pragma GCC unroll 16
  for (int k = 0; k < kLanes<Real>; ++k) {
    if (k & kRun) continue;
    const Vec<Real> a = v[k], b = v[k + kRun];
    v[k] = interleave<kRun, false>(a, b, Lanes{});
    v[k + kRun] = interleave<kRun, true>(a, b, Lanes{});
  }
  if constexpr (2 * kRun < kLanes<Real>) transpose<Real, 2 * kRun>(v);
}

template <int kRun, class V, int... kLane>
static inline V swap_runs(V v, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(v, v, (kLane ^ kRun)...);
}

template <class Real, int kRun = kLanes<Real> / 2>
static inline Real sum_lanes(Vec<Real> v) {
  v += swap_runs<kRun>(v, std::make_integer_sequence<int, kLanes<Real>>{});
  if constexpr (kRun == 1)
    return v[0];
  else
    return sum_lanes<Real, kRun / 2>(v);
}

// Lane k of the result is the sum of the lanes of v[k], which is overwritten.
template <class Real, int kRun = kLanes<Real> / 2>
static inline Vec<Real> sum_lanes(Vec<Real> (&v)[kLanes<Real>]) {
  using Lanes = std::make_integer_sequence<int, kLanes<Real>>;
#pragma GCC unroll 16
  for (int k = 0; k < kRun; ++k)
    v[k] = interleave<kRun, false>(v[k], v[k + kRun], Lanes{}) + interleave<kRun, true>(v[k], v[k + kRun], Lanes{});
  if constexpr (kRun == 1)
    return v[0];
  else
    return sum_lanes<Real, kRun / 2>(v);
}

// to[column][row] = from[row][column]; rows and columns are multiples of kLanes.
template <class Real>
static inline void transpose_tile(const Real* from, int64_t from_stride, int64_t rows, int64_t columns, Real* to,
                                  int64_t to_stride) {
  for (int64_t row = 0; row < rows; row += kLanes<Real>)
    for (int64_t column = 0; column < columns; column += kLanes<Real>) {
      Vec<Real> block[kLanes<Real>];
      for (int k = 0; k < kLanes<Real>; ++k) block[k] = load(from + (row + k) * from_stride + column);
      transpose<Real>(block);
      for (int k = 0; k < kLanes<Real>; ++k) store(to + (column + k) * to_stride + row, block[k]);
    }
}

}  // namespace ssmkernels::SSM_ISA
