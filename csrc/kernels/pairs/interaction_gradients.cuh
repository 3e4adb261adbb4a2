// SPDX-License-Identifier: BSD-3-Clause
// The gradients of a tile of pairs whose ∂L/∂logit and bits are known.
#pragma once

#include "interaction_hidden.cuh"

namespace ssmkernels::cuda::pairs {

// ∂φ/∂own, the same for either side.
template <class Real>
__device__ Real interaction_derivative(bool product, Real own, Real other) {
  return product ? other : own > other ? Real(1) : own < other ? Real(-1) : Real(0);
}

// ∂x and ∂y of the 8 rows and 16 columns of a tile, features [first, first + kDim), from ∂φ in shared memory, which is
// 0 where there is no pair. A thread has one feature of all rows and of its share of the columns: each ∂φ is read once,
// x and y are in registers. What the shares have of the rows is then added up.
template <class Engine, bool kProduct>
__device__ void add_grid_rows(const InteractionSweep<typename Engine::Storage>& in, const InteractionTile<Engine>& tile,
                              const Walk& walk, int64_t first, typename Engine::Real* grads) {
  using Real = typename Engine::Real;
  constexpr int kShares = kInteractionThreads / Engine::kDim, kColumns = kTileColumns / kShares;
  static_assert(kShares * kColumns == kTileColumns && kTileRows % kShares == 0);
  const unsigned thread = thread_here();
  const int k = thread % Engine::kDim, share = thread / Engine::kDim;
  const int64_t features = in.network.features, d = first + k;
  const bool inside = d < features;
  const auto value = [&](const typename Engine::Storage* row) {
    return inside && row ? to_real(in_global(row)[d]) : Real(0);
  };
  const auto add = [&](Real* parts, int64_t row, bool first_visit, Real sum) {
    Real* to = parts + row * features + d;
    *to = first_visit ? sum : *to + sum;
  };
  Real x[kTileRows], row_sums[kTileRows] = {};
#pragma unroll
  for (int r = 0; r < kTileRows; ++r) x[r] = value(tile.x[r * kTileColumns]);
#pragma unroll 1
  for (int c = share * kColumns; c < (share + 1) * kColumns; ++c) {
    const Real y = value(tile.y[c]);
    Real sum = 0;
#pragma unroll
    for (int r = 0; r < kTileRows; ++r) {
      const Real grad = grads[(r * kTileColumns + c) * InteractionMemory<Engine>::kGradPitch + k];
      const Real slope = interaction_derivative(kProduct, x[r], y);
      row_sums[r] += grad * slope;
      sum += grad * (kProduct ? x[r] : -slope);
    }
    if (inside && tile.y[c])
      add(in.y_parts, walk.row_part * in.network.y_rows + walk.first_column() + c, walk.down == 0, sum);
  }
  __syncthreads();  // ∂φ is read
#pragma unroll
  for (int r = 0; r < kTileRows; ++r) grads[(share * kTileRows + r) * Engine::kDim + k] = row_sums[r];
  __syncthreads();
#pragma unroll 1
  for (int r = share; r < kTileRows; r += kShares) {
    Real sum = 0;
#pragma unroll
    for (int other = 0; other < kShares; ++other) sum += grads[(other * kTileRows + r) * Engine::kDim + k];
    if (inside && tile.x[r * kTileColumns])
      add(in.x_parts, walk.column_part * in.network.x_rows + walk.first_row() + r, walk.across == 0, sum);
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
             interaction_derivative(product, value, to_real(in_global(other[p])[d]));
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
  const auto add = [&](auto is_whole) {
#pragma unroll
    for (int r = 0; r < Share::kRows; ++r, row += Share::kRowStep * pitch) {
      if (!is_whole() && r * Share::kRowStep >= rows_left) continue;
#pragma unroll
      for (int c = 0; c < Share::kColumns; c += Share::kRun) {
        const int to_right = Share::column(c) - Share::column(0);
        if (!is_whole() && to_right >= columns_left) continue;
        Pack* to = reinterpret_cast<Pack*>(row + to_right);
        Pack pack = first_tile ? Pack{} : *to;
#pragma unroll
        for (int k = 0; k < Share::kRun; ++k) pack.values[k] += sums.at(r, c + k) * factor;
        *to = pack;
      }
    }
  };
  if (in.network.hidden - unit >= Engine::kHidden && pitch - first >= Engine::kDim)
    add(std::true_type());
  else
    add(std::false_type());
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
        if (bits.values[k] >> lane & 1) sum += tile.grad_logit(p + k);
    }
    if (h >= in.network.hidden) continue;
    Real* to = in.biases + blockIdx.x * in.network.hidden + h;
    *to = first_tile ? sum : *to + sum;
  }
}

// All gradients of a tile, whose grad_logits and masks are known.
template <class Engine>
__device__ void add_gradients(const InteractionSweep<typename Engine::Storage>& in, InteractionTile<Engine>& tile,
                              const InteractionMemory<Engine>& memory, const uint32_t* masks, const Walk& walk,
                              typename Engine::Real largest_w2) {
  using Real = typename Engine::Real;
  using PhiGradient = typename Engine::PhiGradient;
  Real largest = 1;
  if constexpr (Engine::kScales) {
    largest = block_max<kInteractionWarps>(threadIdx.x < kTilePairs ? fabs(tile.grad_logit(threadIdx.x)) : Real(0),
                                           tile.maxima);
    if (largest == 0) largest = 1;
  }
  if (in.weights) add_biases(in, tile, masks, walk.at_first());
#pragma unroll 1
  for (int64_t first = 0; first < in.network.features; first += Engine::kDim) {
    if (in.network.features > Engine::kDim) {  // else φ is still there
      __syncthreads();
      stage_phi(in, tile, first, memory.phi);
    }
    PhiGradient phi_gradient;
#pragma unroll 1
    for (int64_t unit = 0; unit < in.network.hidden; unit += Engine::kHidden) {
      __syncthreads();
      stage_w1<Engine, true>(in, unit, first, largest_w2, memory.w1);
      stage_active(tile, masks, unit, largest, memory.active);
      __syncthreads();
      Engine::phi_gradient(phi_gradient, memory.active, memory.w1);
      if (!in.weights) continue;
      typename Engine::WeightGradient weight_gradient;
      Engine::weight_gradient(weight_gradient, memory.active, memory.phi);
      add_weights<Engine>(in, weight_gradient, unit, first, largest, walk.at_first());
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < PhiGradient::kRows; ++r)
#pragma unroll
      for (int c = 0; c < PhiGradient::kColumns; ++c)
        memory.grads[PhiGradient::row(r) * InteractionMemory<Engine>::kGradPitch + PhiGradient::column(c)] =
            phi_gradient.at(r, c) * (largest * largest_w2);
    __syncthreads();
    if (in.network.pairs)
      add_list_rows(in, tile, walk, first, memory.grads);
    else if (in.network.interaction == Interaction::product)
      add_grid_rows<Engine, true>(in, tile, walk, first, memory.grads);
    else
      add_grid_rows<Engine, false>(in, tile, walk, first, memory.grads);
  }
}

}  // namespace ssmkernels::cuda::pairs
