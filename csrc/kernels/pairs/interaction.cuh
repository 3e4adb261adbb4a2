// SPDX-License-Identifier: BSD-3-Clause
// Pairs under φ = |x_i − y_j| or x_i∘y_j.
//
// A block takes tiles of 128 pairs: 8 rows × 16 columns of all pairs, or 128 of a list. It makes φ of the tile in
// shared memory, a chunk of features at a time, takes the products with chunks of w1, and keeps of each hidden unit one
// bit s: whether it is active. The bits are all that the gradients need once g = ∂L/∂logit is known. With T = Σ g s φᵀ
// and S = Σ g s over the pairs,
//   ∂φ = g (w2∘s) w1,  ∂w1 = w2∘T,  ∂b1 = w2∘S,  and, since relu(z) = s z,  ∂w2_h = w1_h·T_h + b1_h S_h.
// s is exact in every type; what half types round is φ g over its largest in the tile, and w1∘w2 over the largest w2.
//
// T, S and the parts of ∂x and ∂y lie in global memory, where each element belongs to one thread of a block at a time.
// Listed pairs are swept in the order of their rows of x, for all but ∂y, and then in the order of their rows of y.
#pragma once

#include "interaction_engine.cuh"
#include "parts.cuh"

namespace ssmkernels::cuda::pairwise {

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
  Real* slopes;        // [p] out: ∂L/∂logit; or null
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
  Vector<Real> slopes[kTilePairs / kVector<Real>];
  Real logits[Engine::kRowWarps][kTilePairs];
  Real maxima[kInteractionWarps];
  double scratch[kInteractionWarps];

  __device__ Real& slope(unsigned p) {
    return slopes[p / kVector<Real>].values[p % kVector<Real>];
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

// φ of the tile, features [first, first + kDim); with kScaled times g / largest.
template <class Engine, bool kScaled>
__device__ void stage_phi(const InteractionSweep<typename Engine::Storage>& in, InteractionTile<Engine>& tile,
                          int64_t first, typename Engine::Real largest, typename Engine::Storage* to) {
  using Storage = typename Engine::Storage;
  using Real = typename Engine::Real;
  constexpr int kWidth = kVector<Storage>, kVectors = Engine::kDim / kWidth, kStep = kInteractionThreads / kVectors;
  static_assert(kTilePairs % kStep == 0);
  const unsigned thread = thread_here();
  const bool product = in.network.interaction == Interaction::product;
#pragma unroll 2
  for (int step = 0; step < kTilePairs; step += kStep) {
    const int p = step + thread / kVectors, d = thread % kVectors * kWidth;
    const Vector<Storage> x = load_padded(tile.x[p], first + d, in.network.features);
    const Vector<Storage> y = load_padded(tile.y[p], first + d, in.network.features);
    const Real factor = kScaled ? tile.slope(p) / largest : Real(1);
    Vector<Storage> phi;
#pragma unroll
    for (int v = 0; v < kWidth; ++v) {
      const Real a = to_real(x.values[v]), b = to_real(y.values[v]);
      phi.values[v] = to_operand<Storage>((product ? a * b : fabs(a - b)) * factor);
    }
    *reinterpret_cast<Vector<Storage>*>(to + p * Engine::kPitch + d) = phi;
  }
}

// w1 of hidden units from `unit` on, features [first, first + kDim); with kScaled times w2 / largest.
template <class Engine, bool kScaled>
__device__ void stage_w1(const InteractionSweep<typename Engine::Storage>& in, int64_t unit, int64_t first,
                         typename Engine::Real largest, typename Engine::Storage* to) {
  using Storage = typename Engine::Storage;
  using Real = typename Engine::Real;
  constexpr int kWidth = kVector<Storage>, kVectors = Engine::kDim / kWidth, kStep = kInteractionThreads / kVectors;
  static_assert(Engine::kHidden % kStep == 0);
  const unsigned thread = thread_here();
#pragma unroll 2
  for (int step = 0; step < Engine::kHidden; step += kStep) {
    const int r = step + thread / kVectors, d = thread % kVectors * kWidth;
    const int64_t h = unit + r;
    const bool inside = h < in.network.hidden;
    Vector<Storage> w1 = load_padded(inside ? in.rows.w + h * in.rows.pitch : nullptr, first + d, in.network.features);
    if constexpr (kScaled) {
      const Real factor = inside ? in.network.w2[h] / largest : Real(0);
#pragma unroll
      for (int v = 0; v < kWidth; ++v) w1.values[v] = to_operand<Storage>(to_real(w1.values[v]) * factor);
    }
    *reinterpret_cast<Vector<Storage>*>(to + r * Engine::kPitch + d) = w1;
  }
}

// s of hidden units from `unit` on: 1 or 0.
template <class Engine>
__device__ void stage_active(const uint32_t* masks, int64_t unit, typename Engine::Storage* to) {
  using Storage = typename Engine::Storage;
  constexpr int kWidth = kVector<Storage>;
  const Storage one = from_real<Storage>(1), zero = from_real<Storage>(0);
  for (int i = threadIdx.x; i < kTilePairs * (Engine::kHidden / 32); i += kInteractionThreads) {
    const int p = i % kTilePairs, word = i / kTilePairs;
    const uint32_t bits = masks[(unit / 32 + word) * kTilePairs + p];
#pragma unroll
    for (int k = 0; k < 32; k += kWidth) {
      Vector<Storage> active;
#pragma unroll
      for (int v = 0; v < kWidth; ++v) active.values[v] = bits >> (k + v) & 1 ? one : zero;
      *reinterpret_cast<Vector<Storage>*>(to + p * Engine::kActivePitch + word * 32 + k) = active;
    }
  }
}

// The hidden units of the tile: logits without b2 go to tile.logits, bits to `masks` if it is not null.
template <class Engine>
__device__ void hidden_units(const InteractionSweep<typename Engine::Storage>& in, InteractionTile<Engine>& tile,
                             const InteractionMemory<Engine>& memory, uint32_t* masks) {
  using Real = typename Engine::Real;
  using Hidden = typename Engine::Hidden;
  const PairNetwork<typename Engine::Storage>& network = in.network;
  const int lane = threadIdx.x % 32;
  Real logits[Hidden::kRows] = {};
#pragma unroll 1
  for (int64_t unit = 0; unit < network.hidden; unit += Engine::kHidden) {
    Hidden hidden;
#pragma unroll 1
    for (int64_t first = 0; first < network.features; first += Engine::kDim) {
      __syncthreads();
      if (unit == 0 || network.features > Engine::kDim) stage_phi<Engine, false>(in, tile, first, Real(1), memory.phi);
      stage_w1<Engine, false>(in, unit, first, Real(1), memory.w1);
      __syncthreads();
      Engine::hidden(hidden, memory.phi, memory.w1,
                     static_cast<int>(min<int64_t>(Engine::kDim, network.features - first)));
    }
#pragma unroll
    for (int word = 0; word < Engine::kWords; ++word) {
      constexpr int kColumns = Hidden::kColumns / Engine::kWords;
      Real bias[kColumns], weight[kColumns];
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const int64_t h = unit + Hidden::column(word * kColumns + c);
        bias[c] = h < network.hidden ? network.b1[h] : Real(0);
        weight[c] = h < network.hidden ? network.w2[h] : Real(0);
      }
#pragma unroll
      for (int r = 0; r < Hidden::kRows; ++r) {
        uint32_t bits = 0;
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          const Real z = hidden.at(r, word * kColumns + c) + bias[c];
          if (!(z <= 0)) {  // NaN passes, forward and backward
            logits[r] += weight[c] * z;
            bits |= 1u << Hidden::column(word * kColumns + c) % 32;
          }
        }
        if (!masks) continue;
#pragma unroll
        for (int step = 1; step < Engine::kRowLanes; step *= 2) bits |= __shfl_xor_sync(kAllLanes, bits, step);
        if (lane % Engine::kRowLanes == 0)
          masks[(unit + Hidden::column(word * kColumns)) / 32 * kTilePairs + Hidden::row(r)] = bits;
      }
    }
  }
#pragma unroll
  for (int r = 0; r < Hidden::kRows; ++r) {
    Real sum = logits[r];
#pragma unroll
    for (int step = 1; step < Engine::kRowLanes; step *= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
    if (lane % Engine::kRowLanes == 0) tile.logits[threadIdx.x / 32 % Engine::kRowWarps][Hidden::row(r)] = sum;
  }
}

// ∂φ/∂own, the same for either side.
template <class Real>
__device__ Real interaction_slope(bool product, Real own, Real other) {
  return product ? other : own > other ? Real(1) : own < other ? Real(-1) : Real(0);
}

// ∂x and ∂y of the 8 rows and 16 columns of a tile, features [first, first + kDim), from ∂φ in shared memory.
template <class Engine>
__device__ void add_grid_rows(const InteractionSweep<typename Engine::Storage>& in, const InteractionTile<Engine>& tile,
                              const Walk& walk, int64_t first, const typename Engine::Real* grads) {
  using Real = typename Engine::Real;
  const int64_t features = in.network.features;
  const bool product = in.network.interaction == Interaction::product;
  const auto add = [&](Real* parts, int64_t row, int64_t rows, int64_t part, bool first_visit, int64_t d, Real sum) {
    Real* to = parts + (part * rows + row) * features + d;
    *to = first_visit ? sum : *to + sum;
  };
  const auto term = [&](int p, int64_t d, bool of_x) {
    const Real x = to_real(in_global(tile.x[p])[d]), y = to_real(in_global(tile.y[p])[d]),
               grad = grads[p * InteractionMemory<Engine>::kGradPitch + d - first];
    return grad * (of_x ? interaction_slope(product, x, y) : interaction_slope(product, y, x));
  };
#pragma unroll 1
  for (int i = threadIdx.x; i < (kTileRows + kTileColumns) * Engine::kDim; i += kInteractionThreads) {
    const int line = i / Engine::kDim;
    const int64_t d = first + i % Engine::kDim;
    if (d >= features) continue;
    Real sum = 0;
    if (line < kTileRows) {
      if (!tile.x[line * kTileColumns]) continue;
#pragma unroll 4
      for (int c = 0; c < kTileColumns; ++c)
        if (tile.x[line * kTileColumns + c]) sum += term(line * kTileColumns + c, d, true);
      add(in.x_parts, walk.first_row() + line, in.network.x_rows, walk.column_part, walk.across == 0, d, sum);
    } else {
      const int c = line - kTileRows;
      if (!tile.x[c]) continue;
#pragma unroll 4
      for (int r = 0; r < kTileRows; ++r)
        if (tile.x[r * kTileColumns + c]) sum += term(r * kTileColumns + c, d, false);
      add(in.y_parts, walk.first_column() + c, in.network.y_rows, walk.row_part, walk.down == 0, d, sum);
    }
  }
}

// The same of the runs of equal rows in a tile of a sorted list. A run belongs to the threads in whose part of the tile
// it starts.
template <class Engine>
__device__ void add_list_rows(const InteractionSweep<typename Engine::Storage>& in, const InteractionTile<Engine>& tile,
                              const Walk& walk, int64_t first, const typename Engine::Real* grads) {
  using Real = typename Engine::Real;
  constexpr int kSpan = kTilePairs / (kInteractionThreads / Engine::kDim);
  const int64_t features = in.network.features, d = first + threadIdx.x % Engine::kDim;
  const bool product = in.network.interaction == Interaction::product;
  const auto own = in.side == 0 ? tile.x : tile.y, other = in.side == 0 ? tile.y : tile.x;
  int p = threadIdx.x / Engine::kDim * kSpan;
  const int end = p + kSpan;
  if (d >= features) return;
  // The row of the pair before the tile, in this block.
  const int64_t before = !walk.at_first() ? in.order[walk.first_position() - 1].label : -1;
  while (p > 0 && p < end && tile.own[p] == tile.own[p - 1]) ++p;
  while (p < end && tile.own[p] >= 0) {
    const int64_t row = tile.own[p];
    const bool goes_on = p == 0 && row == before;
    const Real value = to_real(in_global(own[p])[d]);
    Real sum = 0;
#pragma unroll 4
    for (; p < kTilePairs && tile.own[p] == row; ++p)
      sum += grads[p * InteractionMemory<Engine>::kGradPitch + d - first] *
             interaction_slope(product, value, to_real(in_global(other[p])[d]));
    Real* to = in.x_parts + (row + blockIdx.x) * features + d;
    *to = goes_on ? *to + sum : sum;
  }
}

template <class Real, int kCount>
struct alignas(kCount * sizeof(Real)) Run {
  Real values[kCount];
};

template <class Engine>
__device__ void add_weights(const InteractionSweep<typename Engine::Storage>& in, typename Engine::WeightGradient& sums,
                            int64_t unit, int64_t first, typename Engine::Real factor, bool first_tile) {
  using Share = typename Engine::WeightGradient;
  using Pack = Run<typename Engine::Real, Share::kRun>;
  const int64_t pitch = weight_pitch(in.network.features), h = unit + Share::row(0), d = first + Share::column(0);
  const int rows_left = static_cast<int>(min<int64_t>(in.network.hidden - h, Engine::kHidden)),
            columns_left = static_cast<int>(min<int64_t>(pitch - d, Engine::kDim));
  typename Engine::Real* row = in.weights + (blockIdx.x * in.network.hidden + h) * pitch + d;
#pragma unroll
  for (int r = 0; r < Share::kRows; ++r, row += Share::kRowStep * pitch) {
    if (r * Share::kRowStep >= rows_left) continue;
#pragma unroll
    for (int c = 0; c < Share::kColumns; c += Share::kRun) {
      const int to_right = Share::column(c) - Share::column(0);
      if (to_right >= columns_left) continue;
      Pack* to = reinterpret_cast<Pack*>(row + to_right);
      Pack pack = first_tile ? Pack{} : *to;
#pragma unroll
      for (int k = 0; k < Share::kRun; ++k) pack.values[k] += sums.at(r, c + k) * factor;
      *to = pack;
    }
  }
}

// S += Σ g s; a lane has the hidden unit of its bit.
template <class Engine>
__device__ void add_biases(const InteractionSweep<typename Engine::Storage>& in, InteractionTile<Engine>& tile,
                           const uint32_t* masks, bool first_tile) {
  using Real = typename Engine::Real;
  const int lane = threadIdx.x % 32;
  for (int64_t word = threadIdx.x / 32; word * 32 < in.network.hidden; word += kInteractionWarps) {
    const int64_t h = word * 32 + lane;
    Real sum = 0;
#pragma unroll 4
    for (int p = 0; p < kTilePairs; p += 4) {
      const Vector<uint32_t> bits = vector_at(masks + word * kTilePairs + p);
#pragma unroll
      for (int k = 0; k < 4; ++k)
        if (bits.values[k] >> lane & 1) sum += tile.slope(p + k);
    }
    if (h >= in.network.hidden) continue;
    Real* to = in.biases + blockIdx.x * in.network.hidden + h;
    *to = first_tile ? sum : *to + sum;
  }
}

// All gradients of a tile, whose slopes and masks are known.
template <class Engine>
__device__ void add_gradients(const InteractionSweep<typename Engine::Storage>& in, InteractionTile<Engine>& tile,
                              const InteractionMemory<Engine>& memory, const uint32_t* masks, const Walk& walk,
                              typename Engine::Real largest_w2) {
  using Real = typename Engine::Real;
  using PhiGradient = typename Engine::PhiGradient;
  Real largest = 1;
  if constexpr (Engine::kScales) {
    largest =
        block_max<kInteractionWarps>(threadIdx.x < kTilePairs ? fabs(tile.slope(threadIdx.x)) : Real(0), tile.maxima);
    if (largest == 0) largest = 1;
  }
  if (in.weights) add_biases(in, tile, masks, walk.at_first());
#pragma unroll 1
  for (int64_t first = 0; first < in.network.features; first += Engine::kDim) {
    __syncthreads();
    stage_phi<Engine, true>(in, tile, first, largest, memory.phi);
    PhiGradient phi_gradient;
#pragma unroll 1
    for (int64_t unit = 0; unit < in.network.hidden; unit += Engine::kHidden) {
      if (unit > 0) __syncthreads();
      stage_w1<Engine, true>(in, unit, first, largest_w2, memory.w1);
      stage_active<Engine>(masks, unit, memory.active);
      __syncthreads();
      Engine::phi_gradient(phi_gradient, memory.active, memory.w1);
      if (!in.weights) continue;
      typename Engine::WeightGradient weight_gradient;
      Engine::weight_gradient(weight_gradient, memory.active, memory.phi);
      add_weights<Engine>(in, weight_gradient, unit, first, largest, walk.at_first());
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < PhiGradient::kRows; ++r) {
      const int p = PhiGradient::row(r);
      const Real factor = tile.slope(p) * largest_w2;
#pragma unroll
      for (int c = 0; c < PhiGradient::kColumns; ++c)
        memory.grads[p * InteractionMemory<Engine>::kGradPitch + PhiGradient::column(c)] =
            phi_gradient.at(r, c) * factor;
    }
    __syncthreads();
    if (in.network.pairs)
      add_list_rows(in, tile, walk, first, memory.grads);
    else
      add_grid_rows(in, tile, walk, first, memory.grads);
  }
}

template <class Engine, bool kGradients>
__global__ void __launch_bounds__(kInteractionThreads, 2)
    sweep_interaction(const __grid_constant__ InteractionSweep<typename Engine::Storage> in) {
  using Real = typename Engine::Real;
  SSM_SHARED(tile, InteractionTile<Engine>);
  const InteractionMemory<Engine> memory;
  const PairNetwork<typename Engine::Storage>& network = in.network;
  uint32_t* masks = kGradients ? in.masks + blockIdx.x * in.words() * kTilePairs : nullptr;
  Real largest_w2 = 1;
  if constexpr (kGradients && Engine::kScales) {
    largest_w2 = 0;
    for (int64_t h = threadIdx.x; h < network.hidden; h += kInteractionThreads)
      largest_w2 = max(largest_w2, fabs(network.w2[h]));
    largest_w2 = block_max<kInteractionWarps>(largest_w2, tile.maxima);
    if (largest_w2 == 0) largest_w2 = 1;
  }
  if (threadIdx.x < kTilePairs) tile.sums[threadIdx.x] = {};
  for (Walk walk(in); !walk.ended(); walk.next()) {
    __syncthreads();  // the tile before is done with
    const unsigned p = thread_here();
    if (p < kTilePairs) {
      const TilePair pair = tile_pair(in, walk, p);
      tile.pairs[p] = pair;
      tile.x[p] = pair.valid ? in.rows.x + pair.i * in.rows.pitch : nullptr;
      tile.y[p] = pair.valid ? in.rows.y + pair.j * in.rows.pitch : nullptr;
      tile.own[p] = !pair.valid ? -1 : in.side == 0 ? pair.i : pair.j;
    }
    __syncthreads();
    hidden_units(in, tile, memory, masks);
    __syncthreads();
    if (p < kTilePairs) {
      const TilePair pair = tile.pairs[p];
      PairSums& sums = tile.sums[p];
      Real logit = *network.b2, slope = 0;
#pragma unroll
      for (int warp = 0; warp < Engine::kRowWarps; ++warp) logit += tile.logits[warp][p];
      if (pair.valid)
        slope = in.head(logit, pair.i, pair.j, pair.offset, sums.values);
      else if (pair.offset >= 0)
        in.head.skip(pair.offset);
      if constexpr (kGradients) {
        tile.slope(p) = slope;
        sums.slopes += slope;
        if (in.slopes && pair.offset >= 0) in.slopes[pair.offset] = slope;
      }
    }
    if constexpr (kGradients) {
      __syncthreads();
      add_gradients(in, tile, memory, masks, walk, largest_w2);
    }
  }
  if (!in.sums) return;
  PairSums sums = threadIdx.x < kTilePairs ? tile.sums[threadIdx.x] : PairSums{};
  sums.values = block_sum<kInteractionWarps>(sums.values, tile.scratch);
  sums.slopes = block_sum<kInteractionWarps>(sums.slopes, tile.scratch);
  if (threadIdx.x == 0) in.sums[blockIdx.x] = sums;
}

// A block per hidden unit: ∂w1, ∂b1 and ∂w2 from the parts of T and S.
template <class Storage>
__global__ void __launch_bounds__(32 * kPartGroups)
    finish_weights(PairNetwork<Storage> network, const Compute<Storage>* weights, const Compute<Storage>* biases,
                   int64_t parts, PairGradients<Compute<Storage>> out) {
  using Real = Compute<Storage>;
  SSM_SHARED(scratch, Real[kPartGroups]);
  const int64_t h = blockIdx.x, features = network.features, pitch = weight_pitch(features);
  const int lane = threadIdx.x % 32;
  const Real weight = network.w2[h];
  Real dot = 0;
  for (int64_t first = 0; first < features; first += 32) {
    const int64_t d = first + lane;
    const Real sum = sum_parts(weights + h * pitch, parts, network.hidden * pitch, d, d < features);
    if (threadIdx.x >= 32 || d >= features) continue;
    out.w1[h * features + d] = weight * sum;
    dot += to_real(network.w1[h * features + d]) * sum;
  }
  Real bias = 0;
  for (int64_t part = threadIdx.x; part < parts; part += 32 * kPartGroups) bias += biases[part * network.hidden + h];
  bias = block_sum<kPartGroups>(bias, scratch);
  dot = block_sum<kPartGroups>(dot, scratch);
  if (threadIdx.x > 0) return;
  out.b1[h] = weight * bias;
  out.w2[h] = dot + network.b1[h] * bias;
}

template <class Storage>
struct InteractionScratch {
  using Real = Compute<Storage>;

  PackedNetwork<Storage> packed;
  PairSums* sums;
  // gradients
  uint32_t* masks;
  Real *x_parts, *y_parts;  // of listed pairs the same: one side after the other
  Real *weights, *biases;
  Real* slopes;  // listed pairs
  SortedPairs sorted;
};

inline int64_t list_tiles_each(int64_t count) {
  return max<int64_t>(1, ceil_div(ceil_div<int64_t>(count, kTilePairs), kMostBlocks));
}

template <class Storage>
int64_t interaction_blocks(const PairNetwork<Storage>& network, bool with_gradients) {
  if (network.pairs) return ceil_div<int64_t>(network.count, kTilePairs * list_tiles_each(network.count));
  return grid_of(network, with_gradients, kTileRows, kTileColumns).blocks();
}

template <class Storage>
NetworkMatrices<Storage> interaction_matrices(const PairNetwork<Storage>& network) {
  return {network, network.w1, network.hidden};
}

template <class Storage>
InteractionScratch<Storage> take_interaction(const PairNetwork<Storage>& network, bool with_gradients,
                                             Workspace& workspace) {
  using Real = Compute<Storage>;
  const int64_t n = network.x_rows, m = network.y_rows, h = network.hidden, d = network.features,
                blocks = interaction_blocks(network, with_gradients);
  const TileGrid grid = grid_of(network, with_gradients, kTileRows, kTileColumns);
  InteractionScratch<Storage> scratch{};
  scratch.packed = interaction_matrices(network).take(workspace);
  scratch.sums = workspace.take<PairSums>(blocks);
  if (!with_gradients) return scratch;
  scratch.masks = workspace.take<uint32_t>(blocks * ceil_div<int64_t>(h, 64) * 2 * kTilePairs);
  scratch.weights = workspace.take<Real>(blocks * h * weight_pitch(d));
  scratch.biases = workspace.take<Real>(blocks * h);
  if (network.pairs) {
    scratch.slopes = workspace.take<Real>(network.count);
    scratch.x_parts = scratch.y_parts = workspace.take<Real>((max(n, m) + blocks) * d);
    scratch.sorted = take_sorted_pairs(network.count, n, m, workspace);
  } else {
    scratch.x_parts = workspace.take<Real>(grid.column_parts * n * d);
    scratch.y_parts = workspace.take<Real>(grid.row_parts * m * d);
  }
  return scratch;
}

template <class Storage>
const char* sweep_interaction_pairs(const PairNetwork<Storage>& network, const PairHead<Compute<Storage>>& head,
                                    const PairGradients<Compute<Storage>>* gradients, Workspace& workspace,
                                    cudaStream_t stream) {
  using Real = Compute<Storage>;
  using Engine = typename EngineFor<Storage>::type;
  using Memory = InteractionMemory<Engine>;
  const InteractionScratch<Storage> scratch = take_interaction(network, gradients != nullptr, workspace);
  const int64_t blocks = interaction_blocks(network, gradients != nullptr);
  InteractionSweep<Storage> sweep{};
  sweep.network = network;
  if (const char* error = interaction_matrices(network).pack(scratch.packed, sweep.rows, stream)) return error;
  sweep.head = head;
  sweep.grid = grid_of(network, gradients != nullptr, kTileRows, kTileColumns);
  sweep.tiles_each = list_tiles_each(network.count);
  sweep.sums = scratch.sums;
  if (gradients) {
    sweep.masks = scratch.masks;
    sweep.x_parts = scratch.x_parts;
    sweep.y_parts = scratch.y_parts;
    sweep.weights = scratch.weights;
    sweep.biases = scratch.biases;
    sweep.slopes = scratch.slopes;
  }
  const bool sorts = gradients && network.pairs && network.count > 0;
  const auto sort = [&](int side) {
    sweep.side = side;
    sweep.order = scratch.sorted.order.slots;
    return sort_pairs(network.pairs, network.count, network.x_rows, network.y_rows, side, scratch.sorted, stream);
  };
  const auto finish = [&](int side) {
    FinishRows<Real> rows{};
    rows.parts.values = side == 0 ? scratch.x_parts : scratch.y_parts;
    rows.parts.parts = side == 0 ? sweep.grid.column_parts : sweep.grid.row_parts;
    rows.parts.starts = sorts ? scratch.sorted.order.starts : nullptr;
    rows.parts.share = sweep.tiles_each * kTilePairs;
    rows.rows = side == 0 ? network.x_rows : network.y_rows;
    rows.width = network.features;
    rows.out = side == 0 ? gradients->x : gradients->y;
    return launch_finish_rows(rows, stream);
  };

  if (sorts)
    if (const char* error = sort(0)) return error;
  if (const char* error =
          launch(gradients ? sweep_interaction<Engine, true> : sweep_interaction<Engine, false>, blocks,
                 kInteractionThreads, gradients ? Memory::kBytes : Memory::kForwardBytes, stream, sweep))
    return error;
  if (head.total || gradients)
    if (const char* error = launch(finish_sums<Real>, 1, 256, 0, stream, scratch.sums, blocks, head.scale, head.total,
                                   gradients ? gradients->b2 : nullptr))
      return error;
  if (!gradients) return nullptr;
  if (const char* error = finish(0)) return error;
  if (sorts) {
    if (const char* error = sort(1)) return error;
    sweep.head = {{}, nullptr, scratch.slopes, nullptr, nullptr};
    sweep.slopes = nullptr;
    sweep.sums = nullptr;
    sweep.weights = nullptr;
    if (const char* error =
            launch(sweep_interaction<Engine, true>, blocks, kInteractionThreads, Memory::kBytes, stream, sweep))
      return error;
  }
  if (const char* error = finish(1)) return error;
  return launch(finish_weights<Storage>, network.hidden, 32 * kPartGroups, 0, stream, network, scratch.weights,
                scratch.biases, blocks, *gradients);
}

}  // namespace ssmkernels::cuda::pairwise
