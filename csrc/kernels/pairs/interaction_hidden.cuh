// SPDX-License-Identifier: BSD-3-Clause
// The hidden units of a tile of pairs: what is staged in shared memory for the products, logits, and bits.
#pragma once

#include "interaction_tile.cuh"

namespace ssmkernels::cuda::pairs {

// φ of the tile, features [first, first + kDim).
template <class Engine>
__device__ void stage_phi(const InteractionSweep<typename Engine::Storage>& in, InteractionTile<Engine>& tile,
                          int64_t first, typename Engine::Storage* to) {
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
    Vector<Storage> phi;
#pragma unroll
    for (int v = 0; v < kWidth; ++v) {
      const Real a = to_real(x.values[v]), b = to_real(y.values[v]);
      phi.values[v] = to_operand<Storage>(product ? a * b : fabs(a - b));
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
  const int row = thread / kVectors, d = thread % kVectors * kWidth;
  const int rows_left = first + d < in.network.features
                            ? static_cast<int>(min<int64_t>(in.network.hidden - unit, Engine::kHidden)) - row
                            : 0;
  const Storage* from = in.rows.w + (unit + row) * in.rows.pitch + first + d;
  const Real* weight = in.network.w2 + unit + row;
  to += row * Engine::kPitch + d;
#pragma unroll 2
  for (int step = 0; step < Engine::kHidden; step += kStep) {
    Vector<Storage> w1{};
    if (step < rows_left) {
      w1 = vector_at(in_global(from));
      if constexpr (kScaled) {
        const Real factor = weight[step] / largest;
#pragma unroll
        for (int v = 0; v < kWidth; ++v) w1.values[v] = to_operand<Storage>(to_real(w1.values[v]) * factor);
      }
    }
    *reinterpret_cast<Vector<Storage>*>(to) = w1;
    from += kStep * in.rows.pitch;
    to += kStep * Engine::kPitch;
  }
}

// g / largest of the pairs where hidden units from `unit` on are active, 0 where they are not.
template <class Engine>
__device__ void stage_active(InteractionTile<Engine>& tile, const uint32_t* masks, int64_t unit,
                             typename Engine::Real largest, typename Engine::Storage* to) {
  using Storage = typename Engine::Storage;
  constexpr int kWidth = kVector<Storage>;
  const Storage zero = from_real<Storage>(0);
  for (int i = threadIdx.x; i < kTilePairs * (Engine::kHidden / 32); i += kInteractionThreads) {
    const int p = i % kTilePairs, word = i / kTilePairs;
    const Storage grad = from_real<Storage>(tile.grad_logit(p) / largest);
    const uint32_t bits = masks[(unit / 32 + word) * kTilePairs + p];
#pragma unroll
    for (int k = 0; k < 32; k += kWidth) {
      Vector<Storage> active;
#pragma unroll
      for (int v = 0; v < kWidth; ++v) active.values[v] = bits >> (k + v) & 1 ? grad : zero;
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
      if (unit == 0 || network.features > Engine::kDim) stage_phi(in, tile, first, memory.phi);
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

}  // namespace ssmkernels::cuda::pairs
