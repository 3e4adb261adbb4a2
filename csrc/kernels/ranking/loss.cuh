// SPDX-License-Identifier: BSD-3-Clause
// The sweep over pairs that adds up the loss.
//
// Where there are many pairs of half types, blocks of 16 warps take tiles of 128 × 128: a row comes from L2 half as
// often as with 64 × 64, and L2 is what half types wait for. A block has a multiprocessor to itself, so that its ring
// of chunks runs on into the next tile, whose first chunks are copied while this one's products become losses.
#pragma once

#include "pair_distances.cuh"

namespace ssmkernels::cuda::ranking {

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

  template <int kWarps>
  __device__ LossPart part() const {
    SSM_SHARED(sums, double[kWarps]);
    SSM_SHARED(counts, int64_t[kWarps]);
    LossPart out;
#pragma unroll
    for (int kind = 0; kind < 2; ++kind) {
      out.sums[kind] = block_sum<kWarps>(sums_[kind], sums);
      out.counts[kind] = block_sum<kWarps>(counts_[kind], counts);
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
    // A warp's place is not kept through the products.
    const WarpTile tile = WarpTile::of_block(at.row * kSide, at.column * kSide, thread_here());
    const bool inside = tile.row < rows && tile.column < columns && !(in.symmetric && tile.row > tile.column);
    typename Engine::Products products;
    const Kinds kinds =
        products_and_kinds<Engine, kMined>(in, tile, inside, true, at.row * kSide, at.column * kSide, ring, products);
    if (!inside) continue;
    const bool active = loss.add(tile, kinds, scratch, products);
    if (threadIdx.x % 32 == 0)
      out.active[tile.row / kWarpSide * ceil_div<int64_t>(columns, kWarpSide) + tile.column / kWarpSide] = active;
  }
  const LossPart part = loss.template part<kTileWarps>();
  if (threadIdx.x == 0) out.parts[blockIdx.x] = part;
}

inline constexpr int kLargeAcross = 4, kLargeWarps = kLargeAcross * kLargeAcross, kLargeThreads = 32 * kLargeWarps;
inline constexpr int kLargeSide = kLargeAcross * kWarpSide;
// As many as an H100 or H200 has multiprocessors, on any device: the order of sums is that of the shape.
inline constexpr int64_t kLargeBlocks = 132;

template <class Storage, bool kMined>
inline constexpr bool kHasLargeTiles = sizeof(Storage) == 2 && !kMined;

template <class Storage>
inline constexpr int kLargeStage = 2 * kLargeSide * Layout<Storage>::kPitch;
// The ring, and what close pairs are taken again in, which is not the ring's: that is at the next tile.
template <class Storage>
inline constexpr int64_t kLargeBytes = kStages * kLargeStage<Storage> * int64_t{sizeof(Storage)} +
                                       kLargeWarps * kWarpSide * kWarpSide * int64_t{sizeof(Compute<Storage>)};

template <class Storage>
int64_t large_tiles(const RankingInput<Storage>& in) {
  const int64_t down = ceil_div<int64_t>(in.rows.packed.count, kLargeSide),
                across = ceil_div<int64_t>(in.columns.packed.count, kLargeSide);
  return in.symmetric ? down * (down + 1) / 2 : down * across;
}

// From two tiles to a block on; fewer would leave multiprocessors idle that 64 × 64 fill. Rows without elements have no
// chunk.
template <class Storage>
bool takes_large_tiles(const RankingInput<Storage>& in, int64_t tiles) {
  return tiles >= 2 * kLargeBlocks && tiles < 0x7fffffff && in.rows.packed.pitch > 0 &&
         device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) >= kLargeBytes<Storage> + 1024;
}

// A block's way through the tiles, every gridDim.x-th: without references down the columns of the upper triangle.
class LargeWalk {
 public:
  __device__ LargeWalk(bool symmetric, unsigned across) {
    const TileAt first =
        symmetric ? upper_tile(blockIdx.x) : TileAt{int64_t{blockIdx.x / across}, int64_t{blockIdx.x % across}};
    row_ = static_cast<unsigned>(first.row);
    column_ = static_cast<unsigned>(first.column);
  }
  __device__ void next(bool symmetric, unsigned across) {
    if (symmetric) {
      row_ += gridDim.x;
      while (row_ > column_) row_ -= ++column_;
    } else {
      row_ += gridDim.x / across;
      column_ += gridDim.x % across;
      if (column_ >= across) {
        column_ -= across;
        ++row_;
      }
    }
  }
  __device__ int64_t row() const {
    return int64_t{row_} * kLargeSide;
  }
  __device__ int64_t column() const {
    return int64_t{column_} * kLargeSide;
  }

 private:
  unsigned row_, column_;
};

template <class Engine, class Storage = typename Engine::Storage>
__global__ void __launch_bounds__(kLargeThreads, 1)
    sweep_large_loss(const __grid_constant__ RankingInput<Storage> in, const __grid_constant__ LossOutput<Storage> out,
                     int tiles) {
  using Shape = Layout<Storage>;
  constexpr int kVectors = Shape::kDepth / Shape::kVector, kStep = kLargeThreads / kVectors;
  Storage* ring = reinterpret_cast<Storage*>(dynamic_shared());
  const int64_t rows = in.rows.packed.count, columns = in.columns.packed.count, pitch = in.rows.packed.pitch;
  const unsigned across = static_cast<unsigned>(ceil_div<int64_t>(columns, kLargeSide));
  const int chunks = static_cast<int>(pitch / Shape::kDepth);

  // What is copied next: a chunk of the two sides of a tile, by this thread's vectors of them.
  LargeWalk copied(in.symmetric, across);
  int chunks_left = 0;
  const Storage *row_at = nullptr, *column_at = nullptr;
  const auto copy = [&](int64_t, Storage* to) {
    const unsigned thread = thread_here(), r = thread / kVectors, v = thread % kVectors * Shape::kVector;
    if (chunks_left == 0) {
      row_at = in.rows.packed.values + (copied.row() + r) * pitch + v;
      column_at = in.columns.packed.values + (copied.column() + r) * pitch + v;
      copied.next(in.symmetric, across);
      chunks_left = chunks;
    }
    --chunks_left;
    to += r * Shape::kPitch + v;
#pragma unroll
    for (int i = 0; i < kLargeSide; i += kStep) {
      copy_async(to + i * Shape::kPitch, row_at + i * pitch, true);
      copy_async(to + (kLargeSide + i) * Shape::kPitch, column_at + i * pitch, true);
    }
    row_at += Shape::kDepth;
    column_at += Shape::kDepth;
  };

  LossTile<Engine> loss(in, out.nonzero);
  typename Engine::Products products;
  LargeWalk used(in.symmetric, across);
  int chunk = 0;
  const auto use = [&](int64_t, const Storage* from) {
    Engine::multiply(products, from + WarpTile::warp_row<kLargeAcross>() * Shape::kPitch,
                     from + (kLargeSide + WarpTile::warp_column<kLargeAcross>()) * Shape::kPitch);
    if (++chunk < chunks) return;
    const unsigned thread = thread_here();
    const WarpTile tile = WarpTile::of_block<kLargeAcross>(used.row(), used.column(), thread);
    if (tile.row < rows && tile.column < columns && !(in.symmetric && tile.row > tile.column)) {
      auto* scratch = reinterpret_cast<typename Engine::Real*>(ring + kStages * kLargeStage<Storage>) +
                      thread / 32 * kWarpSide * kWarpSide;
      const Kinds kinds = kinds_by_label<Engine>(in, tile, existing_pairs<Engine>(in, tile, true));
      const bool active = loss.add(tile, kinds, scratch, products);
      if (thread % 32 == 0)
        out.active[tile.row / kWarpSide * ceil_div<int64_t>(columns, kWarpSide) + tile.column / kWarpSide] = active;
    }
    products = {};
    chunk = 0;
    used.next(in.symmetric, across);
  };
  stream_through<Storage, kLargeStage<Storage>>(ring, int64_t{ceil_div(tiles - blockIdx.x, gridDim.x)} * chunks, copy,
                                                use);
  const LossPart part = loss.template part<kLargeWarps>();
  if (thread_here() == 0) out.parts[blockIdx.x] = part;
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

}  // namespace ssmkernels::cuda::ranking
