// SPDX-License-Identifier: BSD-3-Clause
// Which pairs of a tile are positives and negatives, by labels or mined, and their distances.
//
// With q_i = ‖x_i‖², d² = q_i + q_j − 2 x_i·x_j. Where that is small against q_i + q_j it has lost its digits, and
// where the squares have left the range it never had them: there the distance is taken from the differences of the rows
// as they were given, in double. Equal rows are at distance 0, exactly. Rows of float32 and float64 are packed less
// their center, so that such pairs are few.
#pragma once

#include <bit>
#include <type_traits>

#include "pack.cuh"
#include "pair_ranking_loss.h"
#include "tile.cuh"

namespace ssmkernels::cuda::ranking {

template <class Storage>
struct Side {
  PackedRows<Storage> packed;
  const Storage* raw;     // [count, dim]
  const int64_t* order;   // or null
  const int64_t* labels;  // [count] ascending; null if mined

  __device__ const Storage* row(int64_t position, int64_t dim) const {
    return raw + place_of(order, position, packed.count) * dim;
  }
};

template <class Storage>
struct RankingInput {
  using Real = Compute<Storage>;

  Side<Storage> rows, columns;  // the same without references
  bool symmetric;               // no references: pairs i ≠ j
  int64_t dim;
  Real positive_margin, negative_margin;
  Real negative_bound;  // a little over the squared margin: no negative further apart counts
  // mined
  PackedRows<Storage> basis;
  const Storage* basis_rows;  // [n, k]
  int64_t basis_dim;          // k
  const Real* thresholds;
};

// The pairs of a thread, bit r·kColumns + c each.
struct Kinds {
  uint32_t positive = 0, negative = 0;
};

// Which pairs of the tile exist: inside, and without references i ≠ j or, for `upper`, i < j.
template <class Engine, class Storage>
__device__ uint32_t existing_pairs(const RankingInput<Storage>& in, const WarpTile& tile, bool upper) {
  using Products = typename Engine::Products;
  const int64_t rows = in.rows.packed.count, columns = in.columns.packed.count;
  const bool whole = tile.row + kWarpSide <= rows && tile.column + kWarpSide <= columns;
  if (whole && !(in.symmetric && tile.row == tile.column)) return ~0u;
  const int lane = threadIdx.x % 32;
  uint32_t pairs = 0;
  for_each_pair<Products>([&](int r, int c, uint32_t bit) {
    const int64_t i = tile.row + Products::row(lane, r), j = tile.column + Products::column(lane, c);
    const bool exists = i < rows && j < columns && !(in.symmetric && (upper ? i >= j : i == j));
    if (exists) pairs |= bit;
  });
  return pairs;
}

template <class Storage>
__device__ bool labels_overlap(const RankingInput<Storage>& in, const WarpTile& tile) {
  const int64_t last_row = min(tile.row + kWarpSide, in.rows.packed.count) - 1;
  const int64_t last_column = min(tile.column + kWarpSide, in.columns.packed.count) - 1;
  return in.rows.labels[tile.row] <= in.columns.labels[last_column] &&
         in.columns.labels[tile.column] <= in.rows.labels[last_row];
}

template <class Engine, class Storage>
__device__ Kinds kinds_by_label(const RankingInput<Storage>& in, const WarpTile& tile, uint32_t pairs) {
  using Products = typename Engine::Products;
  if (!labels_overlap(in, tile)) return {0, pairs};
  const int lane = threadIdx.x % 32;
  int64_t row_labels[Products::kRows];
#pragma unroll
  for (int r = 0; r < Products::kRows; ++r)
    row_labels[r] = in.rows.labels[min(tile.row + Products::row(lane, r), in.rows.packed.count - 1)];
  uint32_t same = 0;
#pragma unroll
  for (int c = 0; c < Products::kColumns; ++c) {
    const int64_t label = in.columns.labels[min(tile.column + Products::column(lane, c), in.columns.packed.count - 1)];
#pragma unroll
    for (int r = 0; r < Products::kRows; ++r)
      if (row_labels[r] == label) same |= 1u << (r * Products::kColumns + c);
  }
  return {same & pairs, ~same & pairs};
}

// Takes the pairs of each lane's bits again, by whole warps, as exact(i, j): pair number k of a lane at scratch[k·32 +
// lane].
template <class Engine, class Exact>
__device__ void retake(const WarpTile& tile, uint32_t bits, typename Engine::Real* scratch, Exact exact) {
  using Products = typename Engine::Products;
  const int lane = threadIdx.x % 32;
  for (unsigned lanes = __ballot_sync(kAllLanes, bits != 0); lanes != 0; lanes &= lanes - 1) {
    const int owner = __ffs(lanes) - 1;
    for (uint32_t left = __shfl_sync(kAllLanes, bits, owner); left != 0; left &= left - 1) {
      const int pair = __ffs(left) - 1;
      const typename Engine::Real value = exact(tile.row + Products::row(owner, pair / Products::kColumns),
                                                tile.column + Products::column(owner, pair % Products::kColumns));
      if (lane == owner) scratch[pair * 32 + lane] = value;
    }
  }
}

// r_i·r_j/√(|r_i|²|r_j|²) in double, by a warp: exact where it is 0 or ±1 and the rows are whole numbers.
template <class Storage>
__device__ Compute<Storage> exact_cosine(const RankingInput<Storage>& in, int64_t i, int64_t j) {
  if (in.basis.scales[i] == 0 || in.basis.scales[j] == 0) return 0;
  const auto scale_of =
      [&](int64_t row) -> double {                // a power of two that brings a row of doubles to about unit length
    if constexpr (sizeof(Storage) < 8) return 1;  // double holds the squares of the others
    return std::bit_cast<double>(std::bit_cast<uint64_t>(double{in.basis.scales[row]}) & uint64_t{0x7ff} << 52);
  };
  const double row_scale = scale_of(i), column_scale = scale_of(j);
  double product = 0, row_squares = 0, column_squares = 0;
  for (int64_t c = threadIdx.x % 32; c < in.basis_dim; c += 32) {
    const double a = to_real(in.basis_rows[i * in.basis_dim + c]) * row_scale,
                 b = to_real(in.basis_rows[j * in.basis_dim + c]) * column_scale;
    product += a * b;
    row_squares += a * a;
    column_squares += b * b;
  }
  return static_cast<Compute<Storage>>(warp_sum(product) / sqrt(warp_sum(row_squares) * warp_sum(column_squares)));
}

// From the products of the basis. Cosines that are as near to a threshold as they may be wrong are taken again. Called
// by whole warps; `scratch` has kWarpSide² elements, the warp's own.
template <class Engine, class Storage>
__device__ Kinds kinds_by_cosine(const RankingInput<Storage>& in, const WarpTile& tile, uint32_t pairs,
                                 typename Engine::Real* scratch, typename Engine::Products& products) {
  using Products = typename Engine::Products;
  using Real = Compute<Storage>;
  const int lane = threadIdx.x % 32;
  const Real positive_threshold = in.thresholds[0], negative_threshold = in.thresholds[1];
  const Real error = static_cast<Real>(in.basis_dim + 8) * (sizeof(Real) == 4 ? Real(6e-8) : Real(1.2e-16));
  Kinds kinds;
  uint32_t unsure = 0;
#pragma unroll
  for (int c = 0; c < Products::kColumns; ++c) {
    const Real column_scale = in.basis.scales[tile.column + Products::column(lane, c)];
#pragma unroll
    for (int r = 0; r < Products::kRows; ++r) {
      Real cosine = products.at(r, c);
      if constexpr (sizeof(Storage) == 2) cosine *= column_scale * in.basis.scales[tile.row + Products::row(lane, r)];
      const uint32_t bit = 1u << (r * Products::kColumns + c);
      if (cosine >= positive_threshold) kinds.positive |= bit;
      if (cosine <= negative_threshold) kinds.negative |= bit;
      if (fabs(cosine - positive_threshold) <= error || fabs(cosine - negative_threshold) <= error) unsure |= bit;
    }
  }
  unsure &= pairs;
  retake<Engine>(tile, unsure, scratch, [&](int64_t i, int64_t j) { return exact_cosine(in, i, j); });
  for_each_pair<Products>([&](int r, int c, uint32_t bit) {
    if (!(unsure & bit)) return;
    const Real cosine = scratch[(r * Products::kColumns + c) * 32 + lane];
    kinds.positive = cosine >= positive_threshold ? kinds.positive | bit : kinds.positive & ~bit;
    kinds.negative = cosine <= negative_threshold ? kinds.negative | bit : kinds.negative & ~bit;
  });
  return {kinds.positive & pairs, kinds.negative & pairs};
}

// The products of the tile's rows, and which pairs are what. Called by the block; the kinds of a warp's tile outside
// are none.
template <class Engine, bool kMined, class Storage = typename Engine::Storage>
__device__ Kinds products_and_kinds(const RankingInput<Storage>& in, const WarpTile& tile, bool inside, bool upper,
                                    int64_t block_row, int64_t block_column, Storage* ring,
                                    typename Engine::Products& products) {
  Kinds kinds;
  if constexpr (kMined) {
    multiply_pairs<Engine>(products, in.basis, block_row, in.basis, block_column, ring);
    auto* scratch = reinterpret_cast<typename Engine::Real*>(ring) + threadIdx.x / 32 * kWarpSide * kWarpSide;
    if (inside) kinds = kinds_by_cosine<Engine>(in, tile, existing_pairs<Engine>(in, tile, upper), scratch, products);
    products = {};
  }
  multiply_pairs<Engine>(products, in.rows.packed, block_row, in.columns.packed, block_column, ring);
  if constexpr (!kMined)
    if (inside) kinds = kinds_by_label<Engine>(in, tile, existing_pairs<Engine>(in, tile, upper));
  return kinds;
}

template <class Storage>
__device__ Compute<Storage> difference(const RankingInput<Storage>& in, int64_t i, int64_t j, int64_t c) {
  return to_real(in.columns.row(j, in.dim)[c]) - to_real(in.rows.row(i, in.dim)[c]);
}

// By a warp.
template <class Storage>
__device__ Compute<Storage> exact_distance(const RankingInput<Storage>& in, int64_t i, int64_t j) {
  const ScaledNorm length = warp_norm(in.dim, [&](int64_t c) { return difference(in, i, j, c); });
  return static_cast<Compute<Storage>>(length.norm / length.scale);
}

// Where q_i + q_j has all its digits, and d² will not be too large.
template <class Real>
inline constexpr Real kLeastSquares = sizeof(Real) == 4 ? Real(1e-34) : Real(1e-290);
template <class Real>
inline constexpr Real kMostSquares = sizeof(Real) == 4 ? Real(1e37) : Real(1e300);

// Parts of q_i + q_j. Squared distances of less than the first have lost their digits; none is wrong by more than the
// second, which is the bound of d roundings of float32 for d = 4096.
template <class Real>
inline constexpr Real kClosePart = Real(1) / 32;
template <class Real>
inline constexpr Real kErrorPart = Real(1) / 4096;

// Pairs of a thread, as in Kinds.
struct Distances {
  uint32_t near = 0;   // may be within the negatives' margin
  uint32_t close = 0;  // taken from the differences of the rows
};

// Products become distances, of the positives and of the negatives that are near; the others are left as they are. NaN
// is near and close. `scratch` has kWarpSide² elements, the warp's own.
template <class Engine, class Storage = typename Engine::Storage>
__device__ Distances take_distances(const RankingInput<Storage>& in, const WarpTile& tile, const Kinds& kinds,
                                    typename Engine::Real* scratch, typename Engine::Products& products) {
  using Products = typename Engine::Products;
  using Real = typename Engine::Real;
  const int lane = threadIdx.x % 32;
  Distances out;
#pragma unroll
  for (int c = 0; c < Products::kColumns; ++c) {
    const Real column_norm = in.columns.packed.scales[tile.column + Products::column(lane, c)];
#pragma unroll
    for (int r = 0; r < Products::kRows; ++r) {
      const Real both = in.rows.packed.scales[tile.row + Products::row(lane, r)] + column_norm;
      const Real squared = both - 2 * products.at(r, c);
      products.at(r, c) = sqrt(squared);
      const uint32_t bit = 1u << (r * Products::kColumns + c);
      if (!(squared >= both * kClosePart<Real> && both >= kLeastSquares<Real> && both <= kMostSquares<Real>))
        out.close |= bit;
      if (!(squared > in.negative_bound + both * kErrorPart<Real>)) out.near |= bit;
    }
  }
  out.close &= kinds.positive | (kinds.negative & out.near);
  retake<Engine>(tile, out.close, scratch, [&](int64_t i, int64_t j) { return exact_distance(in, i, j); });
  if (out.close != 0)
    for_each_pair<Products>([&](int r, int c, uint32_t bit) {
      if (out.close & bit) products.at(r, c) = scratch[(r * Products::kColumns + c) * 32 + lane];
    });
  return out;
}

}  // namespace ssmkernels::cuda::ranking
