// SPDX-License-Identifier: BSD-3-Clause
// Pairs under φ = |x_i − y_j| or x_i∘y_j.
//
// A block takes tiles of 128 pairs: 8 rows × 16 columns of all pairs, or 128 of a list. It makes φ of the tile in
// shared memory, a chunk of features at a time, takes the products with chunks of w1, and keeps of each hidden unit one
// bit s: whether it is active. The bits are all that the gradients need once g = ∂L/∂logit is known. With T = Σ g s φᵀ
// and S = Σ g s over the pairs,
//   ∂φ = g (w2∘s) w1,  ∂w1 = w2∘T,  ∂b1 = w2∘S,  and, since relu(z) = s z,  ∂w2_h = w1_h·T_h + b1_h S_h.
// What half types round is φ, g over its largest in the tile, and w1∘w2 over the largest w2; the products' operand of
// hidden units is g s.
//
// T, S and the parts of ∂x and ∂y lie in global memory, where each element belongs to one thread of a block at a time.
// Listed pairs are swept in the order of their rows of x, for all but ∂y, and then in the order of their rows of y.
#pragma once

#include "interaction_gradients.cuh"

namespace ssmkernels::cuda::pairs {

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
      Real logit = *network.b2, grad_logit = 0;
#pragma unroll
      for (int warp = 0; warp < Engine::kRowWarps; ++warp) logit += tile.logits[warp][p];
      if (pair.valid)
        grad_logit = in.head(logit, pair.i, pair.j, pair.offset, sums.values);
      else if (pair.offset >= 0)
        in.head.skip(pair.offset);
      if constexpr (kGradients) {
        tile.grad_logit(p) = grad_logit;
        sums.grad_logits += grad_logit;
        if (in.grad_logits && pair.offset >= 0) in.grad_logits[pair.offset] = grad_logit;
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
  sums.grad_logits = block_sum<kInteractionWarps>(sums.grad_logits, tile.scratch);
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
  Real* grad_logits;  // listed pairs
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
    scratch.grad_logits = workspace.take<Real>(network.count);
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
    sweep.grad_logits = scratch.grad_logits;
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
    sweep.head = {{}, nullptr, scratch.grad_logits, nullptr, nullptr};
    sweep.grad_logits = nullptr;
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

}  // namespace ssmkernels::cuda::pairs
