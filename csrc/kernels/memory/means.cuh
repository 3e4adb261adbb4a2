// SPDX-License-Identifier: BSD-3-Clause
// The means of a sweep, by split.
#pragma once

#include "sweep_input.cuh"

namespace ssmkernels::cuda::memory {

// What a split leaves: per row its running sums, and means that are sums relative to a total's reference, rows padded
// to whole tiles, columns to kDepth.
template <class Real>
struct Means {
  Real* values;  // [splits][means][padded rows][pitch]
  int64_t pitch;
  int64_t padded_rows;
  int count;

  __device__ Real* row(int64_t split, int mean, int64_t row) const {
    return values + ((split * count + mean) * padded_rows + row) * pitch;
  }

  // Writes a block's chunk.
  template <int kCount, int kBlocks>
  __device__ void put(const Real (&sums)[kCount][kBlocks][4], const Place& place) const {
    struct alignas(2 * sizeof(Real)) Pair {
      Real a, b;
    };
    const int64_t first = int64_t{place.chunk} * kBlocks * 8;
#pragma unroll
    for (int m = 0; m < kCount; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        Real* to = row(place.split, m, place.row + 8 * r) + first;
#pragma unroll
        for (int n = 0; n < kBlocks; ++n)
          if (first + n * 8 < pitch)
            *reinterpret_cast<Pair*>(to + column_of(place.lane, n, 0)) = {sums[m][n][r * 2], sums[m][n][r * 2 + 1]};
      }
  }
};

template <class Real>
Means<Real> take_means(const Partition& partition, int count, int64_t dim, Workspace& workspace) {
  Means<Real> means{nullptr, ceil_div<int64_t>(dim, kDepth) * kDepth, partition.padded_rows(), count};
  means.values = workspace.take<Real>(partition.splits * count * means.padded_rows * means.pitch);
  return means;
}

}  // namespace ssmkernels::cuda::memory
