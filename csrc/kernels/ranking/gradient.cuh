// SPDX-License-Identifier: BSD-3-Clause
// Σ_j K_ij x_j and Σ_j K_ij, tile by tile, for weights K that are a function of products of pairs.
//
// A block owns 64 rows and every parts-th of their column tiles. From a tile's products it makes K in shared memory;
// after kGroup tiles, or at the end, K is multiplied with the columns' rows. Rows of at most one wide chunk have their
// sums in registers all the while; of wider ones they are added to in global memory, where each element belongs to one
// thread of a block. A last kernel adds up the parts.
//
// Of close pairs K (x_j − x_i) is summed instead, by differences of the rows as they were given: K is large there, and
// x_i and x_j nearly equal.
#pragma once

#include "tile.cuh"

namespace ssmkernels::cuda::ranking {

// Tiles of K in shared memory: as many as let a block run where it may have 99 KiB.
template <class Real>
inline constexpr int kGroup = sizeof(Real) == 8 ? 1 : 2;
inline constexpr int64_t kGradientBlocks = 256, kMostParts = 16;

inline int64_t gradient_parts(int64_t row_tiles, int64_t column_tiles) {
  return max<int64_t>(1, min(min(ceil_div(kGradientBlocks, max<int64_t>(row_tiles, 1)), column_tiles), kMostParts));
}

template <class Real>
struct GradientParts {
  Real* sums;        // [parts][padded rows][pitch]  Σ_j K_ij x_j
  Real* weights;     // [parts][padded rows]  Σ_j K_ij, without the close pairs
  uint8_t* touched;  // [parts][row tiles]: whether the block has written any
  int64_t parts, row_tiles, pitch;

  __device__ bool has(int64_t part, int64_t row) const {
    return touched[part * row_tiles + row / kSide];
  }
  __device__ int64_t row_at(int64_t part, int64_t row) const {
    return part * row_tiles * kSide + row;
  }
};

template <class Storage>
GradientParts<Compute<Storage>> take_gradient_parts(const PackedRows<Storage>& rows, const PackedRows<Storage>& columns,
                                                    Workspace& workspace) {
  GradientParts<Compute<Storage>> out{nullptr,      nullptr,   nullptr, gradient_parts(rows.tiles(), columns.tiles()),
                                      rows.tiles(), rows.pitch};
  out.sums = workspace.take<Compute<Storage>>(out.parts * rows.padded() * rows.pitch);
  out.weights = workspace.take<Compute<Storage>>(out.parts * rows.padded());
  out.touched = workspace.take<uint8_t>(out.parts * out.row_tiles);
  return out;
}

// The weights of a sweep: struct Weights {
//   using Engine = …;
//   PackedRows<Storage> rows, columns;
//   bool active(int64_t row_tile, int64_t column_tile) const;  // of kWarpSide: has weights other than 0
//   // Called by the block. The products become weights; those of close pairs 0, with K in `close` instead, and true is
//   returned. bool weigh(Products&, WarpTile, bool active, int64_t block_row, int64_t block_column, Storage* ring,
//   Real* close) const;
//   // x_j − x_i, of the rows as given, element c
//   Real difference(int64_t i, int64_t j, int64_t c) const;
//   int64_t dim() const;
// };

template <class Storage>
inline constexpr int64_t kGradientBytes =
    kRingBytes<Storage> +
    kGroup<Compute<Storage>> * kSide * Layout<Storage>::kWeightPitch * int64_t{sizeof(Compute<Storage>)};

template <class Weights>
class GradientBlock {
  using Engine = typename Weights::Engine;
  using Storage = typename Engine::Storage;
  using Real = typename Engine::Real;
  using Shape = Layout<Storage>;
  using Products = typename Engine::Products;
  using WideSums = typename Engine::WideSums;
  static constexpr int kWeightTile = kSide * Shape::kWeightPitch;
  static constexpr int kCloseTile = kWarpSide * kWarpSide;
  struct alignas(2 * sizeof(Real)) Two {  // neighbouring columns
    Real first, second;
  };

 public:
  __device__ GradientBlock(const Weights& weights, const GradientParts<Real>& parts)
      : in_(weights),
        out_(parts),
        part_(blockIdx.x % static_cast<unsigned>(parts.parts)),
        row_(blockIdx.x / static_cast<unsigned>(parts.parts) * int64_t{kSide}),
        ring_(reinterpret_cast<Storage*>(dynamic_shared())),
        weights_(reinterpret_cast<Real*>(dynamic_shared() + kRingBytes<Storage>)),
        wide_chunks_(ceil_div<int64_t>(parts.pitch, Shape::kWide)) {}

  __device__ void run() {
    for (bool more = true; more;) {
      const int64_t tile = next_tile();
      more = tile >= 0;
      if (more) add_tile(tile * kSide);
      if (held_ == kGroup<Real> || (!more && held_ > 0)) multiply_held();
    }
    if (threadIdx.x == 0) out_.touched[part_ * out_.row_tiles + row_ / kSide] = touched_;
    if (!touched_) return;
    if (wide_chunks_ == 1) store(0);
    store_row_weights();
  }

 private:
  // The next column tile of this block that has weights, −1 after the last. A warp looks at 32 tiles at a time.
  __device__ int64_t next_tile() {
    const int64_t tiles = in_.columns.tiles();
    while (left_ == 0) {
      if (ahead_ >= tiles) return -1;
      seen_ = ahead_;
      ahead_ += 32 * out_.parts;
      const int64_t mine = seen_ + threadIdx.x % 32 * out_.parts;
      left_ = __ballot_sync(kAllLanes, mine < tiles && tile_active(mine));
    }
    const int64_t tile = seen_ + (__ffs(left_) - 1) * out_.parts;
    left_ &= left_ - 1;
    return tile;
  }

  __device__ bool tile_active(int64_t tile) const {
    const int64_t row = row_ / kWarpSide, column = tile * 2;
    return in_.active(row, column) || in_.active(row, column + 1) || in_.active(row + 1, column) ||
           in_.active(row + 1, column + 1);
  }

  __device__ void add_tile(int64_t column) {
    SSM_SHARED(has_close, bool[kTileWarps]);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const WarpTile tile = WarpTile::of_block(row_, column);
    Products k{};
    Real* close = reinterpret_cast<Real*>(ring_);
    const bool any_close = in_.weigh(k, tile, in_.active(tile.row / kWarpSide, tile.column / kWarpSide), row_, column,
                                     ring_, close + warp * kCloseTile);
    Real* to = weights_ + held_ * kWeightTile + WarpTile::warp_row() * Shape::kWeightPitch + WarpTile::warp_column();
#pragma unroll
    for (int r = 0; r < Products::kRows; ++r)
#pragma unroll
      for (int c = 0; c < Products::kColumns; ++c) {
        const Real rounded = Engine::rounded(k.at(r, c));
        row_weights_[r] += rounded;
        to[Products::row(lane, r) * Shape::kWeightPitch + Products::column(lane, c)] = rounded;
      }
    (held_ == 0 ? columns_[0] : columns_[1]) = column;
    ++held_;
    touched_ = true;
    if constexpr (Weights::kMayBeClose) {
      if (lane == 0) has_close[warp] = any_close;
      __syncthreads();
      bool any = false;
      for (int other = 0; other < kTileWarps; ++other) any |= has_close[other];
      if (any) add_close(column, close, has_close);
    }
  }

  // A warp takes 16 rows of the block.
  __device__ void add_close(int64_t column, const Real* close, const bool* has_close) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (!stored_) {
      Real* all = out_.sums + out_.row_at(part_, row_) * out_.pitch;
      for (int64_t i = threadIdx.x; i < kSide * out_.pitch; i += kTileThreads) all[i] = 0;
      stored_ = true;
      __syncthreads();
    }
    constexpr int kRowsEach = kSide / kTileWarps;
    for (int r = warp * kRowsEach; r < (warp + 1) * kRowsEach; ++r)
      for (int half = 0; half < 2; ++half) {
        const int source = r / kWarpSide * 2 + half;
        if (!has_close[source]) continue;
        const Real mine = close[source * kCloseTile + r % kWarpSide * kWarpSide + lane];
        const unsigned pairs = __ballot_sync(kAllLanes, !(mine == 0));
        if (pairs == 0) continue;
        Real* to = out_.sums + out_.row_at(part_, row_ + r) * out_.pitch;
        for (int64_t c = lane; c < in_.dim(); c += 32) {
          Real sum = to[c];
          for (unsigned left = pairs; left != 0; left &= left - 1) {
            const int j = __ffs(left) - 1;
            sum += close[source * kCloseTile + r % kWarpSide * kWarpSide + j] *
                   in_.difference(row_ + r, column + half * kWarpSide + j, c);
          }
          to[c] = sum;
        }
      }
  }

  // Adds K · rows over the tiles held to the sums.
  __device__ void multiply_held() {
    constexpr int kVectors = Shape::kWide / Shape::kVector, kStep = kTileThreads / kVectors;
    const int r = threadIdx.x / kVectors, v = threadIdx.x % kVectors * Shape::kVector;
    const unsigned held = held_;
    stream_through(
        ring_, wide_chunks_ * held,
        [&](int64_t step, Storage* to) {
          const int64_t chunk = static_cast<unsigned>(step) / held, at = chunk * Shape::kWide + v;
          const int64_t column = static_cast<unsigned>(step) % held == 0 ? columns_[0] : columns_[1];
          const bool inside = at < out_.pitch;
          const Storage* from = in_.columns.values + (column + r) * out_.pitch + (inside ? at : 0);
          to += r * Shape::kWidePitch + v;
#pragma unroll
          for (int i = 0; i < kSide; i += kStep) copy_async(to + i * Shape::kWidePitch, from + i * out_.pitch, inside);
        },
        [&](int64_t step, const Storage* from) {
          const unsigned slot = static_cast<unsigned>(step) % held;
          Engine::multiply_wide(sums_, weights_ + slot * kWeightTile + WarpTile::warp_row() * Shape::kWeightPitch,
                                from + warp_wide_column());
          if (wide_chunks_ > 1 && slot == held - 1) {
            store(static_cast<unsigned>(step) / held);
            sums_ = {};
          }
        });
    if (wide_chunks_ > 1) stored_ = true;
    held_ = 0;
  }

  static __device__ int warp_wide_column() {
    return threadIdx.x / 32 % 2 * (Shape::kWide / 2);
  }

  __device__ void store(int64_t chunk) {
    const int lane = threadIdx.x % 32;
    const int64_t first = chunk * Shape::kWide + warp_wide_column();
#pragma unroll
    for (int r = 0; r < WideSums::kRows; ++r) {
      Real* to =
          out_.sums + out_.row_at(part_, row_ + WarpTile::warp_row() + Products::row(lane, r)) * out_.pitch + first;
#pragma unroll
      for (int c = 0; c < WideSums::kColumns; c += 2) {
        const int at = WideSums::column(lane, c);
        if (first + at >= out_.pitch) continue;
        Two* two = reinterpret_cast<Two*>(to + at);
        Two sum = stored_ ? *two : Two{};
        sum.first += sums_.at(r, c);
        sum.second += sums_.at(r, c + 1);
        *two = sum;
      }
    }
  }

  __device__ void store_row_weights() {
    SSM_SHARED(sums, Real[2][kSide]);
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int r = 0; r < Products::kRows; ++r) {
      Real sum = row_weights_[r];
      for (int other = 1; other < Engine::kRowLanes; other *= 2) sum += __shfl_xor_sync(kAllLanes, sum, other);
      if (lane % Engine::kRowLanes == 0)
        sums[threadIdx.x / 32 % 2][WarpTile::warp_row() + Products::row(lane, r)] = sum;
    }
    __syncthreads();
    if (threadIdx.x < kSide)
      out_.weights[out_.row_at(part_, row_ + threadIdx.x)] = sums[0][threadIdx.x] + sums[1][threadIdx.x];
  }

  const Weights& in_;  // kernel parameters: references cost no registers
  const GradientParts<Real>& out_;
  const int64_t part_, row_;
  Storage* const ring_;
  Real* const weights_;  // [kGroup] tiles of K
  const int64_t wide_chunks_;

  WideSums sums_;
  Real row_weights_[Products::kRows] = {};
  int64_t seen_ = 0, ahead_ = part_;  // of the tiles looked at the first, and the first not looked at
  unsigned left_ = 0;                 // of those looked at
  int64_t columns_[2];                // of the tiles held
  int held_ = 0;
  bool touched_ = false;
  bool stored_ = false;  // whether the sums in global memory are to be added to
};

template <class Weights>
__global__ void __launch_bounds__(kTileThreads, 2)  // shared memory allows no more
    sweep_gradient(const __grid_constant__ Weights weights,
                   const __grid_constant__ GradientParts<typename Weights::Engine::Real> parts) {
  GradientBlock<Weights>(weights, parts).run();
}

template <class Weights>
const char* launch_sweep_gradient(const Weights& weights, const GradientParts<typename Weights::Engine::Real>& parts,
                                  cudaStream_t stream) {
  return launch(sweep_gradient<Weights>, parts.row_tiles * parts.parts, kTileThreads,
                kGradientBytes<typename Weights::Engine::Storage>, stream, weights, parts);
}

}  // namespace ssmkernels::cuda::ranking
