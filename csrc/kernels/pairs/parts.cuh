// SPDX-License-Identifier: BSD-3-Clause
// How the pairs are dealt out to blocks, and how what each block has summed becomes one gradient: every sum is taken in
// an order that depends on the shape alone, without atomics.
//
// All pairs are cut into a grid of blocks, each with a rectangle of tiles; a row of x gets one part per column of that
// grid. Listed pairs are sorted by their row, and blocks take equal shares of the sorted list; a row gets a part from
// every share that has pairs of it.
#pragma once

#include "../common/class_order.cuh"
#include "../common/vector_rows.cuh"
#include "head.cuh"

namespace ssmkernels::cuda::pairs {

// 16 bytes of a row.
template <class Storage>
inline constexpr int kVector = 16 / sizeof(Storage);
template <class Storage>
struct alignas(16) Vector {
  Storage values[kVector<Storage>];
};

template <class Storage>
__device__ Vector<Storage> vector_at(const Storage* from) {
  return *reinterpret_cast<const Vector<Storage>*>(from);
}

// Elements from `at` on of a row of `width`, filled up with zeros to whole vectors; 0 past its end, and if there is no
// row.
template <class Storage>
__device__ Vector<Storage> load_padded(const Storage* row, int64_t at, int64_t width) {
  if (!row || at >= width) return {};
  return vector_at(in_global(row) + at);
}

// What a sweep reads 16 bytes at a time: rows of x and y, and of w1 or, for concat, w2.
template <class Storage>
struct NetworkRows {
  const Storage *x, *y, *w;
  int64_t pitch;
};

// Memory for those of them that have to be packed.
template <class Storage>
struct PackedNetwork {
  Storage *x, *y, *w;
};

template <class Storage>
struct NetworkMatrices {
  StridedRows<Storage> x, y, w;

  NetworkMatrices(const PairNetwork<Storage>& network, const Storage* weights, int64_t weight_rows)
      : x{network.x, network.x_rows, network.features, network.features, 1},
        y{network.y, network.y_rows, network.features, network.features, 1},
        w{weights, weight_rows, network.features, network.features, 1} {}

  PackedNetwork<Storage> take(Workspace& workspace) const {
    return {take_packed(x, workspace), take_packed(y, workspace), take_packed(w, workspace)};
  }
  const char* pack(const PackedNetwork<Storage>& packed, NetworkRows<Storage>& rows, cudaStream_t stream) const {
    rows.pitch = vector_pitch<Storage>(x.dim);
    if (const char* error = pack_where_needed(x, packed.x, rows.x, stream)) return error;
    if (const char* error = pack_where_needed(y, packed.y, rows.y, stream)) return error;
    return pack_where_needed(w, packed.w, rows.w, stream);
  }
};

// All pairs in tiles, and the tiles in rectangles, one to a block.
struct TileGrid {
  int64_t row_tiles, column_tiles;
  int64_t tiles_down, tiles_across;  // of a block
  int64_t row_parts, column_parts;   // blocks

  int64_t blocks() const {
    return row_parts * column_parts;
  }
};

// A row of x or y gets at most kGridSide partial sums, unless the other side is small. Without gradients there are
// none.
inline constexpr int64_t kGridSide = 16, kForwardGridSide = 32;
inline constexpr int64_t kMostBlocks = kGridSide * kGridSide;

// By the shape alone. No blocks for listed pairs.
template <class Storage>
TileGrid grid_of(const PairNetwork<Storage>& network, bool with_gradients, int64_t tile_rows, int64_t tile_columns) {
  TileGrid grid{};
  if (network.pairs || network.count == 0) return grid;
  const int64_t side = with_gradients ? kGridSide : kForwardGridSide;
  grid.row_tiles = ceil_div(network.x_rows, tile_rows);
  grid.column_tiles = ceil_div(network.y_rows, tile_columns);
  const int64_t across = min(grid.column_tiles, side * side / min(grid.row_tiles, side));
  grid.tiles_down = ceil_div(grid.row_tiles, min(grid.row_tiles, side * side / across));
  grid.tiles_across = ceil_div(grid.column_tiles, across);
  grid.row_parts = ceil_div(grid.row_tiles, grid.tiles_down);
  grid.column_parts = ceil_div(grid.column_tiles, grid.tiles_across);
  return grid;
}

// Listed pairs, sorted by their rows of one side.
struct SortedPairs {
  int64_t* rows;     // [p] scratch: of a side; -1 for a pair that is skipped
  ClassOrder order;  // slots: positions in the list, by row
};

inline SortedPairs take_sorted_pairs(int64_t count, int64_t x_rows, int64_t y_rows, Workspace& workspace) {
  SortedPairs sorted;
  sorted.rows = workspace.take<int64_t>(count);
  sorted.order = take_class_order({nullptr, count, max(x_rows, y_rows)}, nullptr, workspace);
  return sorted;
}

static __global__ void __launch_bounds__(256)
    rows_of_side(const int64_t* pairs, int64_t count, int64_t x_rows, int64_t y_rows, int side, int64_t* rows) {
  const int64_t at = int64_t{blockIdx.x} * 256 + threadIdx.x;
  if (at >= count) return;
  const ListedPair pair = listed_pair(pairs, at, x_rows, y_rows);
  rows[at] = !pair.valid ? -1 : side == 0 ? pair.i : pair.j;
}

// Side 0 is x, 1 is y. Skipped pairs come last.
inline const char* sort_pairs(const int64_t* pairs, int64_t count, int64_t x_rows, int64_t y_rows, int side,
                              const SortedPairs& sorted, cudaStream_t stream) {
  if (count > 0xffffffff) return "fewer than 2^32 pairs can be listed";
  if (const char* error = launch(rows_of_side, ceil_div<int64_t>(count, 256), 256, 0, stream, pairs, count, x_rows,
                                 y_rows, side, sorted.rows))
    return error;
  return sort_by_class({sorted.rows, count, side == 0 ? x_rows : y_rows}, sorted.order, stream);
}

// The partial sums of a matrix.
template <class Real>
struct RowParts {
  const Real*
      values;  // [parts][rows][width] or, of a sorted list, [rows + shares][width]: row i of share s is row i + s here
  int64_t parts;          // all pairs
  const int64_t* starts;  // sorted list: the pairs of row i are [starts[i], starts[i + 1]); else null
  int64_t share;          // pairs

  __device__ Real sum(int64_t row, int64_t rows, int64_t column, int64_t width) const {
    Real sum = 0;
    if (!starts) {
      for (int64_t part = 0; part < parts; ++part) sum += values[(part * rows + row) * width + column];
    } else if (starts[row] < starts[row + 1]) {
      const int64_t last = (starts[row + 1] - 1) / share;
      for (int64_t s = starts[row] / share; s <= last; ++s) sum += values[(row + s) * width + column];
    }
    return sum;
  }
};

inline constexpr int kFinishThreads = 128;

inline int64_t finish_rows_each(int64_t rows) {
  return max<int64_t>(8, ceil_div<int64_t>(rows, 512));
}
inline int64_t finish_blocks(int64_t rows) {
  return ceil_div(rows, finish_rows_each(rows));
}

template <class Real>
struct FinishRows {
  RowParts<Real> parts;
  int64_t rows, width;
  int64_t rows_each;    // of a block
  const Real* weights;  // [width], or null for 1
  Real* out;            // [rows, width]  Σ parts ∘ weights
  const Real* factors;  // [rows, width], or null
  Real* products;       // [blocks, width]  Σ_i factors_i ∘ Σ parts_i, with factors
};

template <class Real>
__global__ void __launch_bounds__(kFinishThreads, 8) finish_rows(const __grid_constant__ FinishRows<Real> in) {
  const int64_t begin = blockIdx.x * in.rows_each, end = min(begin + in.rows_each, in.rows);
  for (int64_t c = threadIdx.x; c < in.width; c += kFinishThreads) {
    const Real weight = in.weights ? in.weights[c] : Real(1);
    Real product = 0;
    for (int64_t i = begin; i < end; ++i) {
      const Real sum = in.parts.sum(i, in.rows, c, in.width);
      in.out[i * in.width + c] = sum * weight;
      if (in.factors) product += in.factors[i * in.width + c] * sum;
    }
    if (in.factors) in.products[blockIdx.x * in.width + c] = product;
  }
}

template <class Real>
const char* launch_finish_rows(FinishRows<Real> in, cudaStream_t stream) {
  in.rows_each = finish_rows_each(in.rows);
  return launch(finish_rows<Real>, finish_blocks(in.rows), kFinishThreads, 0, stream, in);
}

inline constexpr int kPartGroups = 8;  // warps, each with the sum of every eighth part

// Σ over parts of 32 columns, by a block of kPartGroups warps; the sum is the first warp's.
template <class Real>
__device__ Real sum_parts(const Real* parts, int64_t count, int64_t width, int64_t column, bool inside) {
  SSM_SHARED(sums, Real[kPartGroups][32]);
  const int group = threadIdx.x / 32, lane = threadIdx.x % 32;
  Real sum = 0;
  if (inside) {
#pragma unroll 4
    for (int64_t part = group; part < count; part += kPartGroups) sum += parts[part * width + column];
  }
  __syncthreads();
  sums[group][lane] = sum;
  __syncthreads();
  sum = 0;
  for (int other = 0; other < kPartGroups; ++other) sum += sums[other][lane];
  return sum;
}

template <class Real>
__global__ void __launch_bounds__(32 * kPartGroups)
    finish_columns(const Real* parts, int64_t count, int64_t width, Real* out) {
  const int64_t column = int64_t{blockIdx.x} * 32 + threadIdx.x % 32;
  const Real sum = sum_parts(parts, count, width, column, column < width);
  if (threadIdx.x < 32 && column < width) out[column] = sum;
}

}  // namespace ssmkernels::cuda::pairs
