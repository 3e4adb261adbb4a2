// SPDX-License-Identifier: BSD-3-Clause
// The ranking loss and its gradients, with positives and negatives by labels or mined.
//
// With q_i = ‖x_i‖², d² = q_i + q_j − 2 x_i·x_j. Where that is small against q_i + q_j it has lost its digits, and
// where the squares have left the range it never had them: there the distance is taken from the differences of the rows
// as they were given, in double. Equal rows are at distance 0, exactly. Rows of float32 and float64 are packed less
// their center, so that such pairs are few.
#pragma once

#include <bit>
#include <type_traits>

#include "gradient.cuh"
#include "pack.cuh"

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

// ---- the loss

inline constexpr int64_t kLossBlocks = 1024;

// Of a block.
struct LossPart {
  double sums[2];     // of positives and negatives
  int64_t counts[2];  // pairs, or for mean_nonzero those above 0
};

template <class Storage>
struct LossOutput {
  LossPart* parts;  // [blocks]
  uint8_t* active;
  bool nonzero;  // counts
};

template <class Engine, class Storage = typename Engine::Storage>
class LossTile {
  using Products = typename Engine::Products;
  using Real = typename Engine::Real;

 public:
  __device__ LossTile(const RankingInput<Storage>& in, bool nonzero) : in_(in), nonzero_(nonzero) {}

  // Whether a pair is active.
  __device__ bool add(const WarpTile& tile, const Kinds& kinds, Real* scratch, Products& products) {
    if (!nonzero_) {
      counts_[0] += __popc(kinds.positive);
      counts_[1] += __popc(kinds.negative);
    }
    if (!__any_sync(kAllLanes, kinds.positive != 0 || near(tile, kinds, products))) return false;
    const Distances found = take_distances<Engine>(in_, tile, kinds, scratch, products);
    Real sums[2] = {};
    int counts[2] = {};
    bool active = false;
    const auto count = [&](int kind, Real excess) {
      if (excess <= 0) return;
      sums[kind] += excess;
      counts[kind] += excess > 0;
      active = true;
    };
    for_each_pair<Products>([&](int r, int c, uint32_t bit) {
      const Real distance = products.at(r, c);
      if (kinds.positive & bit) count(0, distance - in_.positive_margin);
      if (kinds.negative & found.near & bit) count(1, in_.negative_margin - distance);
    });
    if (!(sums[0] + sums[1] < INFINITY)) {  // too large a sum for Real, or NaN: once more in double
      double wide[2] = {};
      for_each_pair<Products>([&](int r, int c, uint32_t bit) {
        const Real over = products.at(r, c) - in_.positive_margin, under = in_.negative_margin - products.at(r, c);
        if ((kinds.positive & bit) && !(over <= 0)) wide[0] += over;
        if ((kinds.negative & found.near & bit) && !(under <= 0)) wide[1] += under;
      });
      for (int kind = 0; kind < 2; ++kind) {
        sums_[kind] += wide[kind];
        sums[kind] = 0;
      }
    }
#pragma unroll
    for (int kind = 0; kind < 2; ++kind) {
      sums_[kind] += sums[kind];
      if (nonzero_) counts_[kind] += counts[kind];
    }
    return __any_sync(kAllLanes, active);
  }

  __device__ LossPart part() const {
    SSM_SHARED(sums, double[kTileWarps]);
    SSM_SHARED(counts, int64_t[kTileWarps]);
    LossPart out;
#pragma unroll
    for (int kind = 0; kind < 2; ++kind) {
      out.sums[kind] = block_sum<kTileWarps>(sums_[kind], sums);
      out.counts[kind] = block_sum<kTileWarps>(counts_[kind], counts);
    }
    return out;
  }

 private:
  // Whether a negative may be active. A few instructions a pair, and all that most tiles take.
  __device__ bool near(const WarpTile& tile, const Kinds& kinds, Products& products) const {
    const int lane = threadIdx.x % 32;
    uint32_t near = 0;
#pragma unroll
    for (int c = 0; c < Products::kColumns; ++c) {
      const Real column_norm = in_.columns.packed.scales[tile.column + Products::column(lane, c)];
#pragma unroll
      for (int r = 0; r < Products::kRows; ++r) {
        const Real both = in_.rows.packed.scales[tile.row + Products::row(lane, r)] + column_norm;
        if (!(both - 2 * products.at(r, c) > in_.negative_bound + both * kErrorPart<Real>))
          near |= 1u << (r * Products::kColumns + c);
      }
    }
    return (near & kinds.negative) != 0;
  }

  const RankingInput<Storage>& in_;
  const bool nonzero_;
  double sums_[2] = {};
  int64_t counts_[2] = {};
};

// Blocks of a multiprocessor: as many as leave registers enough. Mined, a few more are needed.
template <class Real, bool kMined>
inline constexpr int kSweepBlocks = (sizeof(Real) == 8 ? 3 : 4) - kMined;

template <class Engine, bool kMined, class Storage = typename Engine::Storage>
__global__ void __launch_bounds__(kTileThreads, kSweepBlocks<typename Engine::Real, kMined>)
    sweep_loss(const __grid_constant__ RankingInput<Storage> in, const __grid_constant__ LossOutput<Storage> out,
               int64_t tiles) {
  Storage* ring = reinterpret_cast<Storage*>(dynamic_shared());
  typename Engine::Real* scratch =
      reinterpret_cast<typename Engine::Real*>(ring) + threadIdx.x / 32 * kWarpSide * kWarpSide;
  const int64_t rows = in.rows.packed.count, columns = in.columns.packed.count,
                column_tiles = in.columns.packed.tiles();
  LossTile<Engine> loss(in, out.nonzero);
  for (int64_t t = blockIdx.x; t < tiles; t += gridDim.x) {
    const TileAt at = in.symmetric ? upper_tile(t) : TileAt{t / column_tiles, t % column_tiles};
    const WarpTile tile(at.row * kSide, at.column * kSide,
                        thread_here());  // a warp's place is not kept through the products
    const bool inside = tile.row < rows && tile.column < columns && !(in.symmetric && tile.row > tile.column);
    typename Engine::Products products;
    const Kinds kinds =
        products_and_kinds<Engine, kMined>(in, tile, inside, true, at.row * kSide, at.column * kSide, ring, products);
    if (!inside) continue;
    const bool active = loss.add(tile, kinds, scratch, products);
    if (threadIdx.x % 32 == 0)
      out.active[tile.row / kWarpSide * ceil_div<int64_t>(columns, kWarpSide) + tile.column / kWarpSide] = active;
  }
  const LossPart part = loss.part();
  if (threadIdx.x == 0) out.parts[blockIdx.x] = part;
}

inline constexpr int kFinishWarps = 8, kFinishThreads = 32 * kFinishWarps;

// `times`: how often a pair that was looked at counts.
template <class Real>
__global__ void __launch_bounds__(kFinishThreads)
    finish_loss(const LossPart* parts, int64_t blocks, int times, RankingLoss<Real> out) {
  SSM_SHARED(sums, double[kFinishWarps]);
  SSM_SHARED(counts, int64_t[kFinishWarps]);
  LossPart all{};
  for (int64_t i = threadIdx.x; i < blocks; i += kFinishThreads)
    for (int kind = 0; kind < 2; ++kind) {
      all.sums[kind] += parts[i].sums[kind];
      all.counts[kind] += parts[i].counts[kind];
    }
  double loss = 0, weights[2];
  for (int kind = 0; kind < 2; ++kind) {
    const double sum = times * block_sum<kFinishWarps>(all.sums[kind], sums);
    const double count = static_cast<double>(times * block_sum<kFinishWarps>(all.counts[kind], counts));
    weights[kind] = out.reduction == Reduction::sum ? 1 : count > 0 ? 1 / count : 0;
    loss += weights[kind] * sum;
  }
  if (threadIdx.x > 0) return;
  *out.loss = static_cast<Real>(loss);
  out.weights[0] = static_cast<Real>(weights[0]);
  out.weights[1] = static_cast<Real>(weights[1]);
}

// ---- the gradients

template <class EngineType, bool kMined>
struct RankingWeights {
  using Engine = EngineType;
  using Storage = typename Engine::Storage;
  using Real = typename Engine::Real;
  using Products = typename Engine::Products;
  static constexpr bool kMayBeClose = true;

  RankingInput<Storage> in;
  PackedRows<Storage> columns;
  const Real* weights;   // w₊, w₋
  const uint8_t* flags;  // of the forward
  int64_t flag_columns;
  bool swapped;  // the rows here are the columns there

  __device__ bool active(int64_t row, int64_t column) const {
    if (row * kWarpSide >= in.rows.packed.count || column * kWarpSide >= in.columns.packed.count) return false;
    const bool turned = in.symmetric ? row > column : swapped;
    return flags[(turned ? column : row) * flag_columns + (turned ? row : column)];
  }

  __device__ bool weigh(Products& products, const WarpTile& tile, bool active, int64_t block_row, int64_t block_column,
                        Storage* ring, Real* close) const {
    const Kinds kinds =
        products_and_kinds<Engine, kMined>(in, tile, active, false, block_row, block_column, ring, products);
    if (!active) {
      products = {};
      return false;
    }
    const int lane = threadIdx.x % 32;
    const Distances found = take_distances<Engine>(in, tile, kinds, close, products);
    const Real positive_weight = weights[0], negative_weight = weights[1];
    for_each_pair<Products>([&](int r, int c, uint32_t bit) {
      const Real distance = products.at(r, c);
      const bool negative = kinds.negative & found.near & bit;
      Real k = 0;
      if ((kinds.positive & bit) || negative) {
        Real weight = 0;
        if ((kinds.positive & bit) && !(distance - in.positive_margin <= 0)) weight += positive_weight;
        if (negative && !(in.negative_margin - distance <= 0)) weight -= negative_weight;
        if (!(distance == 0)) k = weight / distance;
      }
      products.at(r, c) = k;
    });
    if (!__any_sync(kAllLanes, found.close != 0)) return false;
    __syncwarp();
    for_each_pair<Products>([&](int r, int c, uint32_t bit) {
      const bool is_close = found.close & bit;
      close[Products::row(lane, r) * kWarpSide + Products::column(lane, c)] = is_close ? products.at(r, c) : Real(0);
      if (is_close) products.at(r, c) = 0;
    });
    return true;
  }

  __device__ Real difference(int64_t i, int64_t j, int64_t c) const {
    return ranking::difference(in, i, j, c);
  }
  __device__ int64_t dim() const {
    return in.dim;
  }
};

template <class Storage>
struct FinishGradient {
  using Real = Compute<Storage>;

  GradientParts<Real> parts;
  PackedRows<Storage> rows;
  const int64_t* order;
  int64_t dim;
  const Real* grad_loss;
  int times;  // how often a pair counts
  Real* out;  // [count, dim]
};

// factor (x_i Σ K − Σ K x): of each part the row's weights times the row, less its sums.
template <class Storage>
__global__ void __launch_bounds__(kFinishThreads) finish_gradient(const __grid_constant__ FinishGradient<Storage> in) {
  using Real = Compute<Storage>;
  const int lane = threadIdx.x % 32;
  const int64_t i = int64_t{blockIdx.x} * kFinishWarps + threadIdx.x / 32;
  if (i >= in.rows.count) return;
  const Real factor = static_cast<Real>(in.times) * *in.grad_loss;
  Real* out = in.out + place_of(in.order, i, in.rows.count) * in.dim;
  for (int64_t c = lane; c < in.dim; c += 32) {
    const Real x = to_real(in.rows.values[i * in.rows.pitch + c]);
    Real sum = 0;
    for (int64_t part = 0; part < in.parts.parts; ++part)
      if (in.parts.has(part, i)) {
        const int64_t at = in.parts.row_at(part, i);
        sum += in.parts.weights[at] * x - in.parts.sums[at * in.parts.pitch + c];
      }
    out[c] = factor * sum;
  }
}

// ---- on the host

template <class Storage>
struct RankingScratch {
  Compute<Storage>* center;  // [dim], float32 and float64
  PackedRows<Storage> rows, references, basis;
  // forward
  LossPart* parts;
  int64_t blocks, tiles;
  // backward
  GradientParts<Compute<Storage>> row_parts, reference_parts;
};

template <class Storage>
RankingScratch<Storage> take_ranking(const RankingPairs<Storage>& pairs, int64_t basis_dim, bool backward,
                                     Workspace& workspace) {
  RankingScratch<Storage> out{};
  if (sizeof(Storage) > 2) out.center = workspace.take<Compute<Storage>>(pairs.dim);
  out.rows = take_packed<Storage>(pairs.count, pairs.dim, workspace);
  out.references = pairs.references ? take_packed<Storage>(pairs.reference_count, pairs.dim, workspace) : out.rows;
  out.basis = take_packed<Storage>(pairs.count, basis_dim, workspace);
  if (backward) {
    out.row_parts = take_gradient_parts(out.rows, out.references, workspace);
    if (pairs.references) out.reference_parts = take_gradient_parts(out.references, out.rows, workspace);
  } else {
    const int64_t tiles = out.rows.tiles();
    out.tiles = pairs.references ? tiles * out.references.tiles() : tiles * (tiles + 1) / 2;
    out.blocks = min(out.tiles, kLossBlocks);
    out.parts = workspace.take<LossPart>(out.blocks);
  }
  return out;
}

// Packs the rows.
template <bool kMined, class Storage>
const char* prepare(const RankingPairs<Storage>& pairs, const RankingLabels& labels, const RankingBasis<Storage>& basis,
                    const RankingScratch<Storage>& scratch, RankingInput<Storage>& in, cudaStream_t stream) {
  using Real = Compute<Storage>;
  if constexpr (sizeof(Storage) > 2)
    if (const char* error = launch_find_center(pairs.rows, pairs.count, pairs.dim, scratch.center, stream))
      return error;
  if (const char* error = launch_pack_rows(PackInput<Storage>{pairs.rows, labels.order, scratch.center, pairs.dim},
                                           scratch.rows, stream))
    return error;
  in.rows = {scratch.rows, pairs.rows, labels.order, labels.labels};
  in.columns = in.rows;
  in.symmetric = !pairs.references;
  if (pairs.references) {
    if (const char* error =
            launch_pack_rows(PackInput<Storage>{pairs.references, labels.reference_order, scratch.center, pairs.dim},
                             scratch.references, stream))
      return error;
    in.columns = {scratch.references, pairs.references, labels.reference_order, labels.reference_labels};
  }
  if constexpr (kMined) {
    if (const char* error = launch_pack_normalized<Storage>(
            PackInput<Storage>{basis.features, nullptr, nullptr, basis.dim}, scratch.basis, stream))
      return error;
    in.basis = scratch.basis;
    in.basis_rows = basis.features;
    in.basis_dim = basis.dim;
    in.thresholds = basis.thresholds;
  }
  in.dim = pairs.dim;
  in.positive_margin = static_cast<Real>(pairs.positive_margin);
  in.negative_margin = static_cast<Real>(pairs.negative_margin);
  in.negative_bound = pairs.negative_margin < 0
                          ? Real(-1)
                          : static_cast<Real>(pairs.negative_margin * pairs.negative_margin * (1 + 1e-5));
  return nullptr;
}

template <class Storage, bool kMined>
const char* run_loss(const RankingPairs<Storage>& pairs, const RankingLabels& labels,
                     const RankingBasis<Storage>& basis, const RankingLoss<Compute<Storage>>& out, void* memory,
                     cudaStream_t stream) {
  using Engine = typename EngineFor<Storage>::type;
  Workspace workspace(memory);
  const RankingScratch<Storage> scratch = take_ranking(pairs, basis.dim, false, workspace);
  if (scratch.blocks > 0) {
    RankingInput<Storage> in{};
    if (const char* error = prepare<kMined>(pairs, labels, basis, scratch, in, stream)) return error;
    const LossOutput<Storage> output{scratch.parts, out.active, out.reduction == Reduction::mean_nonzero};
    if (const char* error = launch(sweep_loss<Engine, kMined>, scratch.blocks, kTileThreads, kRingBytes<Storage>,
                                   stream, in, output, scratch.tiles))
      return error;
  }
  return launch(finish_loss<Compute<Storage>>, 1, kFinishThreads, 0, stream, scratch.parts, scratch.blocks,
                pairs.references ? 1 : 2, out);
}

template <class Storage, bool kMined>
const char* run_gradients(const RankingPairs<Storage>& pairs, const RankingLabels& labels,
                          const RankingBasis<Storage>& basis, const RankingGradients<Compute<Storage>>& out,
                          void* memory, cudaStream_t stream) {
  using Engine = typename EngineFor<Storage>::type;
  Workspace workspace(memory);
  const RankingScratch<Storage> scratch = take_ranking(pairs, basis.dim, true, workspace);
  RankingInput<Storage> in{};
  if (const char* error = prepare<kMined>(pairs, labels, basis, scratch, in, stream)) return error;
  const int64_t flag_columns = ceil_div<int64_t>(pairs.references ? pairs.reference_count : pairs.count, kWarpSide);
  const auto take = [&](const Side<Storage>& rows, const Side<Storage>& columns, bool swapped,
                        const GradientParts<Compute<Storage>>& parts, Compute<Storage>* gradient) -> const char* {
    RankingInput<Storage> turned = in;
    turned.rows = rows;
    turned.columns = columns;
    const RankingWeights<Engine, kMined> weights{turned,     columns.packed, out.weights,
                                                 out.active, flag_columns,   swapped};
    if (const char* error = launch_sweep_gradient(weights, parts, stream)) return error;
    return launch(finish_gradient<Storage>, ceil_div<int64_t>(rows.packed.count, kFinishWarps), kFinishThreads, 0,
                  stream,
                  FinishGradient<Storage>{parts, rows.packed, rows.order, pairs.dim, out.grad_loss,
                                          in.symmetric ? 2 : 1, gradient});
  };
  if (const char* error = take(in.rows, in.columns, false, scratch.row_parts, out.rows)) return error;
  if (!pairs.references || !out.references) return nullptr;
  return take(in.columns, in.rows, true, scratch.reference_parts, out.references);
}

}  // namespace ssmkernels::cuda::ranking
