// SPDX-License-Identifier: BSD-3-Clause
// What a sweep of pairs under |x_i − y_j| or x_i∘y_j is given, its tiles, and a block's way through them.
#pragma once

#include "interaction_engine.cuh"
#include "parts.cuh"

namespace ssmkernels::cuda::pairs {

inline constexpr int kTileRows = 8, kTileColumns = 16;

template <class Storage>
struct InteractionSweep {
  using Real = Compute<Storage>;

  PairNetwork<Storage> network;
  NetworkRows<Storage> rows;
  PairHead<Real> head;
  TileGrid grid;
  // listed pairs
  const Slot* order;   // null: as listed
  int side;            // whose rows they are ordered by
  int64_t tiles_each;  // of a block
  Real* grad_logits;   // [p] out: ∂L/∂logit; or null
  // sums
  PairSums* sums;   // [blocks], or null
  uint32_t* masks;  // [blocks][words of h][kTilePairs]: s of a tile
  Real* x_parts;    // [column parts][n][d]; of listed pairs RowParts of the side's rows
  Real* y_parts;    // [row parts][m][d]
  Real* weights;    // [blocks][h][weight_pitch]  T, or null
  Real* biases;     // [blocks][h]  S

  __host__ __device__ int64_t words() const {
    return ceil_div<int64_t>(network.hidden, 64) * 2;
  }
};

inline __host__ __device__ int64_t weight_pitch(int64_t features) {
  return ceil_div<int64_t>(features, 4) * 4;
}

struct TilePair {
  int64_t i, j;
  int64_t offset;  // among all pairs, or -1 past their end
  bool valid;
};

template <class Engine>
struct InteractionTile {
  using Storage = typename Engine::Storage;
  using Real = typename Engine::Real;

  TilePair pairs[kTilePairs];
  PairSums sums[kTilePairs];                     // of this place in all tiles
  const Storage *x[kTilePairs], *y[kTilePairs];  // rows; null where there is no pair
  int64_t own[kTilePairs];                       // row of the side that a list is ordered by, or -1
  Vector<Real> grad_logits[kTilePairs / kVector<Real>];
  Real logits[Engine::kRowWarps][kTilePairs];
  Real maxima[kInteractionWarps];
  double scratch[kInteractionWarps];

  __device__ Real& grad_logit(unsigned p) {
    return grad_logits[p / kVector<Real>].values[p % kVector<Real>];
  }
};

// Dynamic shared memory: φ, w1 and s; later ∂φ.
template <class Engine>
struct InteractionMemory {
  using Storage = typename Engine::Storage;
  using Real = typename Engine::Real;
  static constexpr int kPhi = kTilePairs * Engine::kPitch, kW1 = Engine::kHidden * Engine::kPitch;
  static constexpr int kActive = kTilePairs * Engine::kActivePitch;
  static constexpr int kGradPitch = Engine::kDim + 4;
  static constexpr int64_t kForwardBytes = (kPhi + kW1) * sizeof(Storage),
                           kBytes = kForwardBytes + kActive * sizeof(Storage);
  static_assert(kTilePairs * kGradPitch * sizeof(Real) <= kBytes);

  Storage* phi = reinterpret_cast<Storage*>(dynamic_shared());
  Storage* w1 = phi + kPhi;
  Storage* active = w1 + kW1;
  Real* grads = reinterpret_cast<Real*>(phi);
};

template <class Storage>
__device__ Storage to_operand(Compute<Storage> x) {
  if constexpr (std::is_same_v<Storage, float16>)
    x = x < -65504.0f ? -65504.0f : x > 65504.0f ? 65504.0f : x;  // NaN stays
  return from_real<Storage>(x);
}

// A block's way through its tiles: down the columns of its rectangle, or along its share of the list.
struct Walk {
  unsigned row_part, column_part;     // of the grid
  unsigned row_tile, column_tile;     // the first ones
  unsigned tiles_down, tiles_across;  // of the block
  unsigned down = 0, across = 0;      // the tile's place in the rectangle

  template <class Storage>
  explicit __device__ Walk(const InteractionSweep<Storage>& in) {
    const TileGrid& grid = in.grid;
    if (in.network.pairs) {
      row_part = column_part = column_tile = 0;
      row_tile = blockIdx.x * in.tiles_each;
      tiles_down = min(in.tiles_each, ceil_div<int64_t>(in.network.count, kTilePairs) - row_tile);
      tiles_across = 1;
    } else {
      const unsigned across_parts = static_cast<unsigned>(grid.column_parts);
      row_part = blockIdx.x / across_parts;
      column_part = blockIdx.x % across_parts;
      row_tile = row_part * grid.tiles_down;
      column_tile = column_part * grid.tiles_across;
      tiles_down = min(grid.tiles_down, grid.row_tiles - row_tile);
      tiles_across = min(grid.tiles_across, grid.column_tiles - column_tile);
    }
  }
  __device__ void next() {
    if (++down < tiles_down) return;
    down = 0;
    ++across;
  }
  __device__ bool ended() const {
    return across == tiles_across;
  }
  __device__ bool at_first() const {
    return down == 0 && across == 0;
  }
  __device__ int64_t first_row() const {
    return int64_t{row_tile + down} * kTileRows;
  }
  __device__ int64_t first_column() const {
    return int64_t{column_tile + across} * kTileColumns;
  }
  __device__ int64_t first_position() const {
    return int64_t{row_tile + down} * kTilePairs;
  }
};

// Pair p of the tile.
template <class Storage>
__device__ TilePair tile_pair(const InteractionSweep<Storage>& in, const Walk& walk, unsigned p) {
  const PairNetwork<Storage>& network = in.network;
  if (network.pairs) {
    const int64_t position = walk.first_position() + p;
    if (position >= network.count) return {0, 0, -1, false};
    const int64_t at = in.order ? in.order[position].index : position;
    const ListedPair pair = listed_pair(network.pairs, at, network.x_rows, network.y_rows);
    return {pair.i, pair.j, at, pair.valid};
  }
  const int64_t i = walk.first_row() + p / kTileColumns, j = walk.first_column() + p % kTileColumns;
  const bool inside = i < network.x_rows && j < network.y_rows;
  return {i, j, inside ? i * network.y_rows + j : -1, inside};
}

}  // namespace ssmkernels::cuda::pairs
