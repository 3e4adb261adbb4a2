// SPDX-License-Identifier: BSD-3-Clause
// Rows laid out for products of their tiles: of all pairs of rows (left·rightᵀ), and of weights with rows.
#pragma once

#include "../common/arithmetic.h"
#include "../common/buffer.h"
#include "../common/norm.h"
#include "../common/parallel_for.h"
#include "../common/simd.h"
#include "../common/transpose.h"
#include "ranking_pairs.h"

namespace ssmkernels::SSM_ISA {

inline constexpr int64_t kTile = kRankingTile;
inline constexpr int kBlock =
    kVectorBytes == 64 ? 8 : 4;  // rows of a product that are kept in registers, by two vectors
template <class Real>
inline constexpr int64_t kColumns = 2 * kLanes<Real>;
template <class Real>
using Mask = typename VectorOf<Real>::Bits;
template <class Real>
using Integer = std::conditional_t<sizeof(Real) == 4, int32_t, int64_t>;

// sums[r] += Σ_k left[k·left_stride + r·kRowStride] · right[k·right_stride], two vectors of it
template <int kRowStride, class Real>
static inline void multiply(const Real* left, int64_t left_stride, const Real* right, int64_t right_stride,
                            int64_t steps, Vec<Real> (&sums)[kBlock][2]) {
  for (int64_t k = 0; k < steps; ++k) {
    const Vec<Real> first = load(right + k * right_stride), second = load(right + k * right_stride + kLanes<Real>);
#pragma GCC unroll 8
    for (int r = 0; r < kBlock; ++r) {
      const Vec<Real> factor = broadcast(left[k * left_stride + r * kRowStride]);
      sums[r][0] += factor * first;
      sums[r][1] += factor * second;
    }
  }
}

// out[i][j] = left_i·right_j, both tiles as [dim][kTile].
template <class Real>
static void multiply_tiles(const Real* left, const Real* right, int64_t dim, Real* out) {
  for (int64_t j = 0; j < kTile; j += kColumns<Real>)
    for (int64_t i = 0; i < kTile; i += kBlock) {
      Vec<Real> sums[kBlock][2] = {};
      multiply<1>(left + i, kTile, right + j, kTile, dim, sums);
#pragma GCC unroll 8
      for (int r = 0; r < kBlock; ++r) {
        store(out + (i + r) * kTile + j, sums[r][0]);
        store(out + (i + r) * kTile + j + kLanes<Real>, sums[r][1]);
      }
    }
}

// out[i] += Σ_j weights[i][j] rows_j for tiles of kTile rows, weights [kTile][kTile]; stride is a multiple of kColumns.
template <class Real>
static void add_product(const Real* weights, const Real* rows, int64_t stride, Real* out) {
  for (int64_t c = 0; c < stride; c += kColumns<Real>)
    for (int64_t i = 0; i < kTile; i += kBlock) {
      Vec<Real> sums[kBlock][2];
#pragma GCC unroll 8
      for (int r = 0; r < kBlock; ++r) {
        sums[r][0] = load(out + (i + r) * stride + c);
        sums[r][1] = load(out + (i + r) * stride + c + kLanes<Real>);
      }
      multiply<kTile>(weights + i * kTile, 1, rows + c, stride, kTile, sums);
#pragma GCC unroll 8
      for (int r = 0; r < kBlock; ++r) {
        store(out + (i + r) * stride + c, sums[r][0]);
        store(out + (i + r) * stride + c + kLanes<Real>, sums[r][1]);
      }
    }
}

// The same where most weights are 0: those rows are not read.
template <class Real>
static void add_sparse_product(const Real* weights, const Real* rows, int64_t stride, Real* out) {
  constexpr int kAtOnce = 4;  // vectors of an output row in registers
  for (int64_t i = 0; i < kTile; ++i) {
    int column[kTile], count = 0;
    for (int j = 0; j < kTile; ++j) {
      column[count] = j;
      count += weights[i * kTile + j] != 0;
    }
    if (count == 0) continue;
    int64_t c = 0;
    for (; c + kAtOnce * kLanes<Real> <= stride; c += kAtOnce * kLanes<Real>) {
      Vec<Real> sums[kAtOnce];
#pragma GCC unroll 4
      for (int v = 0; v < kAtOnce; ++v) sums[v] = load(out + i * stride + c + v * kLanes<Real>);
      for (int k = 0; k < count; ++k) {
        const Vec<Real> weight = broadcast(weights[i * kTile + column[k]]);
        const Real* row = rows + column[k] * stride + c;
#pragma GCC unroll 4
        for (int v = 0; v < kAtOnce; ++v) sums[v] += weight * load(row + v * kLanes<Real>);
      }
#pragma GCC unroll 4
      for (int v = 0; v < kAtOnce; ++v) store(out + i * stride + c + v * kLanes<Real>, sums[v]);
    }
    for (; c < stride; c += kLanes<Real>) {
      Vec<Real> sum = load(out + i * stride + c);
      for (int k = 0; k < count; ++k)
        sum += broadcast(weights[i * kTile + column[k]]) * load(rows + column[k] * stride + c);
      store(out + i * stride + c, sum);
    }
  }
}

// Rows in the order of a visit, whole tiles of them, zero-padded.
template <class Real>
class TiledRows {
 public:
  // Row k is element(k, c), c < dim. With `keep_rows` they are there as rows too, not only as tiles.
  template <class F>
  TiledRows(int64_t count, int64_t dim, bool keep_rows, const F& fill_row, ParallelFor parallel_for)
      : count(count),
        dim(dim),
        tiles(divide_up(count, kTile)),
        stride(divide_up(dim, kColumns<Real>) * kColumns<Real>),
        columns_(tiles * kTile * stride),
        rows_(keep_rows ? tiles * kTile * stride : 0) {
    parallel_for(tiles, [&](int64_t begin, int64_t end) {
      const Buffer<Real> scratch(keep_rows ? 0 : kTile * stride);
      for (int64_t tile = begin; tile < end; ++tile) {
        Real* to = keep_rows ? rows_.data() + tile * kTile * stride : scratch.data();
        for (int64_t r = 0; r < kTile; ++r) {
          Real* row = to + r * stride;
          const bool present = tile * kTile + r < count;
          if (present) fill_row(tile * kTile + r, row);
          for (int64_t c = present ? dim : 0; c < stride; ++c) row[c] = 0;
        }
        transpose_tile(to, stride, kTile, stride, columns_.data() + tile * kTile * stride, kTile);
      }
    });
  }

  const Real* columns(int64_t tile) const {  // [dim][kTile]
    return columns_.data() + tile * kTile * stride;
  }
  const Real* rows(int64_t tile) const {  // [kTile][stride]
    return rows_.data() + tile * kTile * stride;
  }
  int64_t size(int64_t tile) const {
    return min(kTile, count - tile * kTile);
  }

  const int64_t count, dim, tiles, stride;

 private:
  Buffer<Real> columns_, rows_;
};

// a·b in double, in several partial sums, which the compiler makes lanes of.
template <class Real>
static inline double dot(const Real* a, const Real* b, int64_t size) {
  constexpr int kParts = 16;
  double parts[kParts] = {}, sum = 0;
  int64_t c = 0;
  for (; c + kParts <= size; c += kParts)
    for (int k = 0; k < kParts; ++k) parts[k] += static_cast<double>(a[c + k]) * b[c + k];
  for (; c < size; ++c) sum += static_cast<double>(a[c]) * b[c];
  for (const double part : parts) sum += part;
  return sum;
}

// to = row/‖row‖, or zeros where that is no direction; returns 1/‖row‖, or 0.
template <class Real>
static inline double normalize(const Real* row, int64_t dim, Real* to) {
  const auto element = [&](int64_t c) { return static_cast<double>(row[c]); };
  const ScaledNorm length = scaled_norm(dot(row, row, dim), dim, element);
  const double factor = length.norm < kSmallestNorm ? 0 : 1 / length.norm;
  for (int64_t c = 0; c < dim; ++c) to[c] = static_cast<Real>(row[c] * length.scale * factor);
  return length.scale * factor;
}

// The row of tiles that a task has: of those above a diagonal short ones in turn with long ones, so that consecutive
// tasks have equal work.
static inline int64_t balanced(int64_t task, int64_t tiles) {
  return task % 2 == 0 ? task / 2 : tiles - 1 - task / 2;
}

template <class Real>
static inline Mask<Real> lane_numbers() {
  Mask<Real> lanes;
  for (int lane = 0; lane < kLanes<Real>; ++lane) lanes[lane] = lane;
  return lanes;
}

}  // namespace ssmkernels::SSM_ISA
