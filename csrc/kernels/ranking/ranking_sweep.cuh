// SPDX-License-Identifier: BSD-3-Clause
// The ranking loss and its gradients, with positives and negatives by labels or mined.
#pragma once

#include "gradient.cuh"
#include "loss.cuh"

namespace ssmkernels::cuda::ranking {

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
  int64_t blocks = scratch.blocks;
  if (blocks > 0) {
    RankingInput<Storage> in{};
    if (const char* error = prepare<kMined>(pairs, labels, basis, scratch, in, stream)) return error;
    const LossOutput<Storage> output{scratch.parts, out.active, out.reduction == Reduction::mean_nonzero};
    const auto sweep = [&]() -> const char* {
      if constexpr (kHasLargeTiles<Storage, kMined>) {
        const int64_t tiles = large_tiles(in);
        if (takes_large_tiles(in, tiles)) {
          blocks = kLargeBlocks;
          return launch(sweep_large_loss<Engine>, blocks, kLargeThreads, kLargeBytes<Storage>, stream, in, output,
                        static_cast<int>(tiles));
        }
      }
      return launch(sweep_loss<Engine, kMined>, blocks, kTileThreads, kRingBytes<Storage>, stream, in, output,
                    scratch.tiles);
    };
    if (const char* error = sweep()) return error;
  }
  return launch(finish_loss<Compute<Storage>>, 1, kFinishThreads, 0, stream, scratch.parts, blocks,
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
