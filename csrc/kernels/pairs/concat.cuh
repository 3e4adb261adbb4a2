// SPDX-License-Identifier: BSD-3-Clause
// Pairs under φ = [x_i, y_j]: hidden units are relu(A_i + B_j) = max(A_i, −B_j) + B_j, and of all pairs the second term
// is a sum per row of y, as on the CPU:
//   logit_ij = Σ_h w2_h max(A_ih, −B_jh) + c_j,  c_j = Σ_h w2_h B_jh + b2
//
// All pairs: a block of four warps takes tiles of 32 rows × 64 columns. Their logits are summed over chunks of hidden
// units that pass through shared memory, 4 × 4 pairs to a thread. ∂L/∂logit then lies in shared memory, and each warp
// takes 32 hidden units, one to a lane, through the whole tile, with A and U of its rows in registers: a comparison and
// two masked additions per element,
//   U_ih = Σ_j g_ij 1[A_ih + B_jh > 0],  V_jh = Σ_i g_ij 1[A_ih + B_jh > 0].
// Every element of U and V is only ever touched by one thread of a block, so they lie in global memory without a
// barrier.
//
// Listed pairs: a warp takes the logits of eight pairs at a time; U and V are gathered from the list sorted by rows of
// x, then of y.
#pragma once

#include "../common/mma.cuh"
#include "parts.cuh"

namespace ssmkernels::cuda::pairs {

inline constexpr int kConcatThreads = 128, kConcatWarps = kConcatThreads / 32;
inline constexpr int kConcatRows = 32, kConcatColumns = 64;     // of a tile
inline constexpr int kThreadRows = 4, kThreadColumns = 4;       // of a thread: every eighth row, every sixteenth column
inline constexpr int kChunkVectors = 8;                         // of hidden units in shared memory
inline constexpr int kChunkPitch = kChunkVectors + 1;           // vectors: rows start in different banks
inline constexpr int kStaged = kConcatThreads / kChunkVectors;  // rows of a chunk that the threads load at once
static_assert(kConcatRows % kStaged == 0 && kConcatColumns % kStaged == 0 && 32 % kChunkVectors == 0);

template <class Real>
struct ConcatSweep {
  const Real *a, *b, *w2, *b2;
  int64_t rows, columns, hidden;
  int64_t pitch;  // of a, b and w2
  TileGrid grid;
  PairHead<Real> head;
  PairSums* sums;  // [blocks]
  Real* u;         // [column parts][n][h]
  Real* v;         // [row parts][m][h]
};

template <class Real>
struct ConcatTile {
  static constexpr int kGradPitch = kConcatRows + kVector<Real>;

  Vector<Real> a[kConcatRows * kChunkPitch], b[kConcatColumns * kChunkPitch], w2[kChunkVectors];
  Vector<Real> values[kConcatColumns * kGradPitch / kVector<Real>];  // logits, then ∂L/∂logit: [column][row]
  Real constants[kConcatColumns];                                    // c_j, which the logits here are without

  __device__ Real& value(int row, int column) {
    return values[(column * kGradPitch + row) / kVector<Real>].values[row % kVector<Real>];
  }
};

// The logits of a tile, without c_j, and c_j.
template <class Real>
__device__ void tile_logits(const ConcatSweep<Real>& in, int64_t first_row, int64_t first_column,
                            ConcatTile<Real>& tile) {
  constexpr int kWidth = kVector<Real>;
  const int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
  const int staged_row = threadIdx.x / kChunkVectors, staged_vector = threadIdx.x % kChunkVectors;
  Real sums[kThreadRows][kThreadColumns] = {};
  Real constants[kConcatColumns / kStaged] = {};  // what this thread's vectors add to c_j of its columns
  __syncthreads();                                // the tile before is done with
  for (int64_t chunk = 0; chunk < in.hidden; chunk += kChunkVectors * kWidth) {
    const int64_t at = chunk + staged_vector * kWidth;
    const Vector<Real> weights = load_padded(in.w2, at, in.hidden);
    if (staged_row == 0) tile.w2[staged_vector] = weights;
#pragma unroll
    for (int k = 0; k < kConcatRows / kStaged; ++k) {
      const int r = staged_row + k * kStaged;
      const int64_t row = first_row + r;
      tile.a[r * kChunkPitch + staged_vector] =
          load_padded(row < in.rows ? in.a + row * in.pitch : nullptr, at, in.hidden);
    }
#pragma unroll
    for (int k = 0; k < kConcatColumns / kStaged; ++k) {
      const int c = staged_row + k * kStaged;
      const int64_t column = first_column + c;
      const Vector<Real> b = load_padded(column < in.columns ? in.b + column * in.pitch : nullptr, at, in.hidden);
      tile.b[c * kChunkPitch + staged_vector] = b;
#pragma unroll
      for (int v = 0; v < kWidth; ++v) constants[k] += weights.values[v] * b.values[v];
    }
    __syncthreads();
#pragma unroll(sizeof(Real) == 8 ? 1 : 2)
    for (int k = 0; k < kChunkVectors; ++k) {
      const Vector<Real> w = tile.w2[k];
      Vector<Real> a[kThreadRows];
#pragma unroll
      for (int r = 0; r < kThreadRows; ++r) a[r] = tile.a[(ty + 8 * r) * kChunkPitch + k];
#pragma unroll
      for (int c = 0; c < kThreadColumns; ++c) {
        const Vector<Real> b = tile.b[(tx + 16 * c) * kChunkPitch + k];
#pragma unroll
        for (int r = 0; r < kThreadRows; ++r)
#pragma unroll
          for (int v = 0; v < kWidth; ++v) sums[r][c] += w.values[v] * larger(a[r].values[v], -b.values[v]);
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int r = 0; r < kThreadRows; ++r)
#pragma unroll
    for (int c = 0; c < kThreadColumns; ++c) tile.value(ty + 8 * r, tx + 16 * c) = sums[r][c];
#pragma unroll
  for (int k = 0; k < kConcatColumns / kStaged; ++k) {
#pragma unroll
    for (int step = 1; step < kChunkVectors; step *= 2) constants[k] += __shfl_xor_sync(kAllLanes, constants[k], step);
    if (staged_vector == 0) tile.constants[staged_row + k * kStaged] = constants[k] + *in.b2;
  }
}

// U and V of a tile. The block has met these rows and columns before unless it is the first visit.
template <class Real>
__device__ void add_gradients(const ConcatSweep<Real>& in, int64_t first_row, int64_t first_column, Real* u, Real* v,
                              bool first_visit_of_rows, bool first_visit_of_columns, const ConcatTile<Real>& tile) {
  constexpr int kGroup = 128 / sizeof(Real);  // rows in registers
  const int columns = static_cast<int>(min<int64_t>(kConcatColumns, in.columns - first_column));
  for (int64_t h = threadIdx.x; h < in.hidden; h += kConcatThreads) {
#pragma unroll 1
    for (int group = 0; group < kConcatRows; group += kGroup) {
      Real a[kGroup], own[kGroup];
#pragma unroll
      for (int r = 0; r < kGroup; ++r) {
        const int64_t row = first_row + group + r;
        a[r] = row < in.rows ? in.a[row * in.pitch + h] : Real(0);
        own[r] = 0;
      }
      const bool fresh = first_visit_of_columns && group == 0;
      const Real* b_at = in.b + first_column * in.pitch + h;
      Real *v_at = v + first_column * in.hidden + h, b = *b_at;
#pragma unroll 1
      for (int c = 0; c < columns; ++c, v_at += in.hidden) {
        const Real threshold = -b, before = fresh ? Real(0) : *v_at;
        b_at += in.pitch;
        if (c + 1 < columns) b = *b_at;
        Real others = 0;
#pragma unroll
        for (int r = 0; r < kGroup; r += kVector<Real>) {
          const Vector<Real> g = tile.values[(c * ConcatTile<Real>::kGradPitch + group + r) / kVector<Real>];
#pragma unroll
          for (int k = 0; k < kVector<Real>; ++k)
            if (!(a[r + k] <= threshold)) {  // NaN passes, as in relu's gradient
              own[r + k] += g.values[k];
              others += g.values[k];
            }
        }
        *v_at = before + others;
      }
#pragma unroll
      for (int r = 0; r < kGroup; ++r) {
        const int64_t row = first_row + group + r;
        if (row >= in.rows) continue;
        Real* u_at = u + row * in.hidden + h;
        *u_at = first_visit_of_rows ? own[r] : *u_at + own[r];
      }
    }
  }
}

template <class Real, bool kGradients>
__global__ void __launch_bounds__(kConcatThreads, kGradients ? 3 : 4)
    sweep_concat(const __grid_constant__ ConcatSweep<Real> in) {
  SSM_SHARED(tile, ConcatTile<Real>);
  SSM_SHARED(scratch, double[kConcatWarps]);
  const TileGrid& grid = in.grid;
  const int64_t row_part = blockIdx.x / grid.column_parts, column_part = blockIdx.x % grid.column_parts;
  const int64_t row_begin = row_part * grid.tiles_down, row_end = min(row_begin + grid.tiles_down, grid.row_tiles);
  const int64_t column_begin = column_part * grid.tiles_across,
                column_end = min(column_begin + grid.tiles_across, grid.column_tiles);
  PairSums sums{};
  for (int64_t column_tile = column_begin; column_tile < column_end; ++column_tile)
    for (int64_t row_tile = row_begin; row_tile < row_end; ++row_tile) {
      const int64_t first_row = row_tile * kConcatRows, first_column = column_tile * kConcatColumns;
      if (in.head.needs_logits()) tile_logits(in, first_row, first_column, tile);
      __syncthreads();
#pragma unroll 1
      for (int e = threadIdx.x; e < kConcatRows * kConcatColumns; e += kConcatThreads) {
        const int r = e / kConcatColumns, c = e % kConcatColumns;
        const int64_t i = first_row + r, j = first_column + c;
        Real& value = tile.value(r, c);
        const Real grad_logit = i < in.rows && j < in.columns
                                    ? in.head(value + tile.constants[c], i, j, i * in.columns + j, sums.values)
                                    : Real(0);
        if constexpr (kGradients) {
          value = grad_logit;
          sums.grad_logits += grad_logit;
        }
      }
      if constexpr (kGradients) {
        __syncthreads();
        add_gradients(in, first_row, first_column, in.u + column_part * in.rows * in.hidden,
                      in.v + row_part * in.columns * in.hidden, column_tile == column_begin, row_tile == row_begin,
                      tile);
      }
    }
  sums.values = block_sum<kConcatWarps>(sums.values, scratch);
  sums.grad_logits = block_sum<kConcatWarps>(sums.grad_logits, scratch);
  if (threadIdx.x == 0) in.sums[blockIdx.x] = sums;
}

inline constexpr int kListWarps = 8;
inline constexpr int kListBatch = 8;  // pairs under way in a warp
inline constexpr int64_t kListBlocks = 1024;

template <class Real>
struct ConcatList {
  const Real *a, *b, *w2, *b2;
  const int64_t* pairs;
  int64_t rows, columns, hidden, count;
  int64_t pitch;  // of a, b and w2
  PairHead<Real> head;
  PairSums* sums;     // [blocks]
  Real* grad_logits;  // [p] ∂L/∂logit, or null
};

template <class Real>
__global__ void __launch_bounds__(32 * kListWarps) list_concat(const __grid_constant__ ConcatList<Real> in) {
  constexpr int kWidth = kVector<Real>;
  SSM_SHARED(place_sums, PairSums[kListWarps][kListBatch]);  // of this place in all batches
  SSM_SHARED(scratch, double[kListWarps]);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Real bias = *in.b2;
  if (lane < kListBatch) place_sums[warp][lane] = {};
  for (int64_t begin = (int64_t{blockIdx.x} * kListWarps + warp) * kListBatch; begin < in.count;
       begin += int64_t{gridDim.x} * kListWarps * kListBatch) {
    const int64_t at = begin + lane;
    const bool mine = lane < kListBatch && at < in.count;
    const ListedPair pair = mine ? listed_pair(in.pairs, at, in.rows, in.columns) : ListedPair{0, 0, false};
    Real logit = 0;
    if (in.head.needs_logits()) {
      const Real *a_rows[kListBatch], *b_rows[kListBatch];
      Real dots[kListBatch] = {};
#pragma unroll
      for (int k = 0; k < kListBatch; ++k) {
        const int64_t i = __shfl_sync(kAllLanes, pair.i, k), j = __shfl_sync(kAllLanes, pair.j, k);
        const bool valid = __shfl_sync(kAllLanes, int{pair.valid}, k);
        a_rows[k] = valid ? in.a + i * in.pitch : nullptr;
        b_rows[k] = valid ? in.b + j * in.pitch : nullptr;
      }
      for (int64_t h = lane * kWidth; h < in.hidden; h += 32 * kWidth) {
        const Vector<Real> w = load_padded(in.w2, h, in.hidden);
#pragma unroll
        for (int k = 0; k < kListBatch; ++k) {
          const Vector<Real> a = load_padded(a_rows[k], h, in.hidden), b = load_padded(b_rows[k], h, in.hidden);
#pragma unroll
          for (int v = 0; v < kWidth; ++v) dots[k] += w.values[v] * relu(a.values[v] + b.values[v]);
        }
      }
#pragma unroll
      for (int k = 0; k < kListBatch; ++k) {
        const Real dot = warp_sum(dots[k]);
        if (lane == k) logit = dot + bias;
      }
    }
    if (!mine) continue;
    PairSums& sums = place_sums[warp][lane];
    Real grad_logit = 0;
    if (pair.valid)
      grad_logit = in.head(logit, pair.i, pair.j, at, sums.values);
    else
      in.head.skip(at);
    sums.grad_logits += grad_logit;
    if (in.grad_logits) in.grad_logits[at] = grad_logit;
  }
  PairSums sums = lane < kListBatch ? place_sums[warp][lane] : PairSums{};
  sums.values = block_sum<kListWarps>(sums.values, scratch);
  sums.grad_logits = block_sum<kListWarps>(sums.grad_logits, scratch);
  if (threadIdx.x == 0) in.sums[blockIdx.x] = sums;
}

inline constexpr int kGatherWarps = 4;
inline constexpr int kGatherBatch = 4;  // rows under way

// A warp takes a share of the sorted list, and 32 vectors of hidden units.
template <class Real>
struct ConcatGather {
  const Slot* order;
  const int64_t* pairs;
  const Real* grad_logits;
  const Real *own, *others;  // A and B, or B and A
  int side;                  // 0 or 1
  int64_t rows, hidden, count;
  int64_t share, shares;
  int64_t chunks;  // of the hidden units
  int64_t pitch;   // of own and others
  Real* sums;      // RowParts
};

template <class Real>
__global__ void __launch_bounds__(32 * kGatherWarps) gather_concat(const __grid_constant__ ConcatGather<Real> in) {
  constexpr int kWidth = kVector<Real>;
  const int lane = threadIdx.x % 32;
  const int64_t task = int64_t{blockIdx.x} * kGatherWarps + threadIdx.x / 32;
  if (task >= in.shares * in.chunks) return;
  const int64_t share = task / in.chunks, h = (task % in.chunks * 32 + lane) * kWidth;
  const int64_t end = min((share + 1) * in.share, in.count);

  int64_t row = -1;
  Vector<Real> own{}, sum{};
  const auto close_row = [&] {
    if (row < 0) return;
    Real* to = in.sums + (row + share) * in.hidden;
#pragma unroll
    for (int v = 0; v < kWidth; ++v)
      if (h + v < in.hidden) to[h + v] = sum.values[v];
  };
  for (int64_t begin = share * in.share; begin < end; begin += 32) {
    // What the 32 lanes each know of a pair: its row, or -1 if it is skipped or past the end.
    int64_t own_row = -1, other_row = 0;
    Real grad_logit = 0;
    if (begin + lane < end) {
      const Slot slot = in.order[begin + lane];
      if (slot.label < in.rows) {
        own_row = slot.label;
        other_row = in.pairs[2 * slot.index + 1 - in.side];
        grad_logit = in.grad_logits[slot.index];
      }
    }
#pragma unroll 1
    for (int first = 0; first < 32; first += kGatherBatch) {
      int64_t rows[kGatherBatch];
      Vector<Real> others[kGatherBatch];
#pragma unroll
      for (int k = 0; k < kGatherBatch; ++k) {
        rows[k] = __shfl_sync(kAllLanes, own_row, first + k);
        const int64_t other = __shfl_sync(kAllLanes, other_row, first + k);
        others[k] = load_padded(rows[k] < 0 ? nullptr : in.others + other * in.pitch, h, in.hidden);
      }
#pragma unroll
      for (int k = 0; k < kGatherBatch; ++k) {
        const Real g = __shfl_sync(kAllLanes, grad_logit, first + k);
        if (rows[k] < 0) continue;
        if (rows[k] != row) {
          close_row();
          row = rows[k];
          own = load_padded(in.own + row * in.pitch, h, in.hidden);
          sum = {};
        }
#pragma unroll
        for (int v = 0; v < kWidth; ++v)
          if (!(own.values[v] <= -others[k].values[v])) sum.values[v] += g;
      }
    }
  }
  close_row();
}

template <class Real>
struct ConcatScratch {
  PackedNetwork<Real> packed;
  PairSums* sums;
  // gradients
  Real *x_parts, *y_parts;  // of listed pairs the same: one side after the other
  Real* products;           // [blocks that finish x and y][h]
  Real* grad_logits;        // listed pairs
  SortedPairs sorted;
};

inline int64_t list_blocks(int64_t count) {
  return min(ceil_div<int64_t>(count, kListWarps * kListBatch), kListBlocks);
}
inline int64_t list_share(int64_t count) {
  return max<int64_t>(32, ceil_div<int64_t>(count, 1024));
}

template <class Real>
NetworkMatrices<Real> concat_matrices(const PairNetwork<Real>& network) {
  return {network, network.w2, 1};
}

template <class Real>
ConcatScratch<Real> take_concat(const PairNetwork<Real>& network, bool with_gradients, Workspace& workspace) {
  const int64_t n = network.x_rows, m = network.y_rows, h = network.hidden;
  const TileGrid grid = grid_of(network, with_gradients, kConcatRows, kConcatColumns);
  ConcatScratch<Real> scratch{};
  scratch.packed = concat_matrices(network).take(workspace);
  scratch.sums = workspace.take<PairSums>(network.pairs ? list_blocks(network.count) : grid.blocks());
  if (!with_gradients) return scratch;
  scratch.products = workspace.take<Real>((finish_blocks(n) + finish_blocks(m)) * h);
  if (network.pairs) {
    scratch.grad_logits = workspace.take<Real>(network.count);
    scratch.x_parts = scratch.y_parts =
        workspace.take<Real>((max(n, m) + ceil_div(network.count, list_share(network.count))) * h);
    scratch.sorted = take_sorted_pairs(network.count, n, m, workspace);
  } else {
    scratch.x_parts = workspace.take<Real>(grid.column_parts * n * h);
    scratch.y_parts = workspace.take<Real>(grid.row_parts * m * h);
  }
  return scratch;
}

// ∂A = w2∘U and ∂B = w2∘V of listed pairs, whose grad_logits are known.
template <class Real>
const char* finish_concat_side(const PairNetwork<Real>& network, int side, const NetworkRows<Real>& rows,
                               const ConcatScratch<Real>& scratch, FinishRows<Real> finish, cudaStream_t stream) {
  if (network.pairs && network.count > 0) {
    if (const char* error =
            sort_pairs(network.pairs, network.count, network.x_rows, network.y_rows, side, scratch.sorted, stream))
      return error;
    ConcatGather<Real> gather{};
    gather.order = scratch.sorted.order.slots;
    gather.pairs = network.pairs;
    gather.grad_logits = scratch.grad_logits;
    gather.own = side == 0 ? rows.x : rows.y;
    gather.others = side == 0 ? rows.y : rows.x;
    gather.side = side;
    gather.rows = finish.rows;
    gather.hidden = network.hidden;
    gather.count = network.count;
    gather.share = list_share(network.count);
    gather.shares = ceil_div(network.count, gather.share);
    gather.chunks = ceil_div<int64_t>(network.hidden, 32 * kVector<Real>);
    gather.pitch = rows.pitch;
    gather.sums = scratch.x_parts;
    finish.parts.starts = scratch.sorted.order.starts;
    finish.parts.share = gather.share;
    if (const char* error = launch(gather_concat<Real>, ceil_div<int64_t>(gather.shares * gather.chunks, kGatherWarps),
                                   32 * kGatherWarps, 0, stream, gather))
      return error;
  }
  return launch_finish_rows(finish, stream);
}

template <class Real>
const char* sweep_concat_pairs(const PairNetwork<Real>& network, const PairHead<Real>& head,
                               const PairGradients<Real>* gradients, Workspace& workspace, cudaStream_t stream) {
  const int64_t n = network.x_rows, m = network.y_rows, h = network.hidden;
  const ConcatScratch<Real> scratch = take_concat(network, gradients != nullptr, workspace);
  const TileGrid grid = grid_of(network, gradients != nullptr, kConcatRows, kConcatColumns);
  NetworkRows<Real> rows{};
  if (const char* error = concat_matrices(network).pack(scratch.packed, rows, stream)) return error;
  int64_t blocks;
  if (network.pairs) {
    blocks = list_blocks(network.count);
    const ConcatList<Real> list{rows.x,        rows.y,     rows.w, network.b2,   network.pairs,      n, m, h,
                                network.count, rows.pitch, head,   scratch.sums, scratch.grad_logits};
    if (const char* error = launch(list_concat<Real>, blocks, 32 * kListWarps, 0, stream, list)) return error;
  } else {
    blocks = grid.blocks();
    const ConcatSweep<Real> sweep{rows.x, rows.y,       rows.w,          network.b2,     n, m, h, rows.pitch, grid,
                                  head,   scratch.sums, scratch.x_parts, scratch.y_parts};
    if (const char* error = launch(gradients ? sweep_concat<Real, true> : sweep_concat<Real, false>, blocks,
                                   kConcatThreads, 0, stream, sweep))
      return error;
  }
  if (head.total || gradients)
    if (const char* error = launch(finish_sums<Real>, 1, 256, 0, stream, scratch.sums, blocks, head.scale, head.total,
                                   gradients ? gradients->b2 : nullptr))
      return error;
  if (!gradients) return nullptr;

  const int64_t x_blocks = finish_blocks(n), y_blocks = finish_blocks(m);
  const FinishRows<Real> x{
      {scratch.x_parts, grid.column_parts, nullptr, 0}, n, h, 0, network.w2, gradients->x, network.x, scratch.products};
  const FinishRows<Real> y{{scratch.y_parts, grid.row_parts, nullptr, 0},
                           m,
                           h,
                           0,
                           network.w2,
                           gradients->y,
                           network.y,
                           scratch.products + x_blocks * h};
  if (const char* error = finish_concat_side(network, 0, rows, scratch, x, stream)) return error;
  if (const char* error = finish_concat_side(network, 1, rows, scratch, y, stream)) return error;
  return launch(finish_columns<Real>, ceil_div<int64_t>(h, 32), 32 * kPartGroups, 0, stream, scratch.products,
                x_blocks + y_blocks, h, gradients->w2);
}

}  // namespace ssmkernels::cuda::pairs
