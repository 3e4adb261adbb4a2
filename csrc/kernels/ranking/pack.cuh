// SPDX-License-Identifier: BSD-3-Clause
// Rows in the form that tile.cuh takes.
#pragma once

#include "tile.cuh"

namespace ssmkernels::cuda::ranking {

inline constexpr int kPackWarps = 8, kPackThreads = 32 * kPackWarps;
inline constexpr int kCenterRows = 256;

// About the middle of the rows: the mean of at most kCenterRows of them. Where a column has no finite mean, 0.
template <class Real>
__global__ void __launch_bounds__(kPackThreads)
    find_center(const Real* rows, int64_t count, int64_t dim, Real* center) {
  SSM_SHARED(sums, Real[kPackWarps][32]);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t column = int64_t{blockIdx.x} * 32 + lane, taken = min<int64_t>(count, kCenterRows);
  Real sum = 0;
  if (column < dim)
    for (int64_t i = warp; i < taken; i += kPackWarps)
      sum += rows[i * (count / taken) * dim + column] / static_cast<Real>(taken);
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || column >= dim) return;
  for (int other = 1; other < kPackWarps; ++other) sum += sums[other][lane];
  center[column] = sum - sum == 0 ? sum : Real(0);
}

template <class Storage>
struct PackInput {
  const Storage* rows;             // [count, dim]
  const int64_t* order;            // [count], or null: as they lie
  const Compute<Storage>* center;  // [dim], or null
  int64_t dim;
};

// Where the row at this position lies. An order that names no row would be read out of bounds, and to look at it on the
// host would synchronise.
__device__ inline int64_t place_of(const int64_t* order, int64_t position, int64_t count) {
  return order ? min(max<int64_t>(order[position], 0), count - 1) : position;
}

// Rows less the center, and their squared norms. Half types have no center: what they are less it would have to be
// rounded.
template <class Storage>
__global__ void __launch_bounds__(kPackThreads) pack_rows(PackInput<Storage> in, PackedRows<Storage> out) {
  using Real = Compute<Storage>;
  const int lane = threadIdx.x % 32;
  const int64_t position = int64_t{blockIdx.x} * kPackWarps + threadIdx.x / 32;
  const bool inside = position < out.count;
  const Storage* row = inside ? in.rows + place_of(in.order, position, out.count) * in.dim : nullptr;
  Real norm = 0;
  for (int64_t c = lane; c < out.pitch; c += 32) {
    Real x = 0;
    if (inside && c < in.dim) x = to_real(row[c]) - (in.center ? in.center[c] : Real(0));
    out.values[position * out.pitch + c] = from_real<Storage>(x);
    norm += x * x;
  }
  norm = warp_sum(norm);
  if (lane == 0) out.scales[position] = norm;
}

// Rows of unit length, zeros where a row has no direction, and what they are multiplied with; of half types the rows as
// they are.
template <class Storage, class Packed>
__global__ void __launch_bounds__(kPackThreads) pack_normalized(PackInput<Storage> in, PackedRows<Packed> out) {
  const int lane = threadIdx.x % 32;
  const int64_t position = int64_t{blockIdx.x} * kPackWarps + threadIdx.x / 32;
  const bool inside = position < out.count;
  const Storage* row = inside ? in.rows + place_of(in.order, position, out.count) * in.dim : nullptr;
  const ScaledNorm length = warp_norm(inside ? in.dim : 0, [&](int64_t c) { return to_real(row[c]); });
  const double factor = length.norm < 1e-12 ? 0 : 1 / length.norm;
  for (int64_t c = lane; c < out.pitch; c += 32) {
    Packed x{};
    if (inside && c < in.dim) {
      if constexpr (sizeof(Packed) == 2)
        x = row[c];
      else
        x = static_cast<Packed>(to_real(row[c]) * length.scale * factor);
    }
    out.values[position * out.pitch + c] = x;
  }
  if (lane == 0) out.scales[position] = static_cast<Compute<Packed>>(length.scale * factor);
}

template <class Storage>
const char* launch_find_center(const Storage* rows, int64_t count, int64_t dim, Storage* center, cudaStream_t stream) {
  return launch(find_center<Storage>, ceil_div<int64_t>(dim, 32), kPackThreads, 0, stream, rows, count, dim, center);
}
template <class Storage>
const char* launch_pack_rows(const PackInput<Storage>& in, const PackedRows<Storage>& out, cudaStream_t stream) {
  return launch(pack_rows<Storage>, out.padded() / kPackWarps, kPackThreads, 0, stream, in, out);
}
template <class Packed, class Storage>
const char* launch_pack_normalized(const PackInput<Storage>& in, const PackedRows<Packed>& out, cudaStream_t stream) {
  return launch(pack_normalized<Storage, Packed>, out.padded() / kPackWarps, kPackThreads, 0, stream, in, out);
}

}  // namespace ssmkernels::cuda::ranking
