// SPDX-License-Identifier: BSD-3-Clause
// Sums of powers of two that a sweep goes on adding to, over the four lanes that have a row.
#pragma once

#include <limits>

#include "../common/mma.cuh"
#include "tile.cuh"

namespace ssmkernels::cuda::memory {

// Where maxima and references of sums start: finite, so that 2^(−inf − kLowest) is 0 and not NaN.
template <class Real>
inline constexpr Real kLowest = std::numeric_limits<Real>::lowest();

// Running sums of 2^x for the two rows of a thread, relative to 2^reference. A reference is an integer, so that moving
// it rounds nothing, and moves only when a value passes it by more than kSlack: seldom after the first tiles.
template <class Real>
struct RunningLogSum {
  static constexpr Real kSlack = 8;
  Real reference[2] = {kLowest<Real>, kLowest<Real>};
  Real sum[2] = {0, 0};

  __device__ bool passed(const Real (&top)[2]) const {
    return top[0] > reference[0] + kSlack || top[1] > reference[1] + kSlack;
  }
  // Called by whole warps, with each thread's largest values. factor[r] is what sums of row r shrink by.
  __device__ void raise(const Real (&top)[2], Real (&factor)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      Real row_top = max(top[r], __shfl_xor_sync(kAllLanes, top[r], 1));
      row_top = max(row_top, __shfl_xor_sync(kAllLanes, row_top, 2));
      const Real moved = row_top > reference[r] + kSlack ? ceil(row_top) : reference[r];
      factor[r] = exp2_of(reference[r] - moved);
      reference[r] = moved;
      sum[r] *= factor[r];
    }
  }
};

// The four lanes of a row.
template <class Real>
__device__ Real row_sum(Real x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}

template <class Real>
__device__ Real row_max(Real x) {
  x = max(x, __shfl_xor_sync(kAllLanes, x, 1));
  return max(x, __shfl_xor_sync(kAllLanes, x, 2));
}

template <class Real, int kBlocks>
__device__ void scale_rows(Real (&values)[kBlocks][4], const Real (&factor)[2]) {
#pragma unroll
  for (int n = 0; n < kBlocks; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) values[n][i] *= factor[i / 2];
}

// Slots past the end of a tile, which only the last tile of a split has, weigh nothing.
template <class Real, int kBlocks>
__device__ void mask_scores(Real (&scores)[kBlocks][4], int lane, int count) {
  if (count == kBlocks * 8) return;
#pragma unroll
  for (int n = 0; n < kBlocks; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (column_of(lane, n, i) >= count) scores[n][i] = kLowest<Real>;
}

// The largest of each row.
template <class Real, int kBlocks>
__device__ void largest(const Real (&scores)[kBlocks][4], Real (&top)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) top[r] = max(scores[0][r * 2], scores[0][r * 2 + 1]);
#pragma unroll
  for (int n = 1; n < kBlocks; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) top[i / 2] = max(top[i / 2], scores[n][i]);
}

}  // namespace ssmkernels::cuda::memory
