// SPDX-License-Identifier: BSD-3-Clause
// What n > d unit rows have in common, without their pairs. With their mean c and t_i = r_i − c, whose sum is 0,
//   s_ij = |c|² + c·t_i + c·t_j + t_i·t_j,  so over all ordered pairs, i = j too, the mean is |c|² and
//   Σ_ij (s_ij − |c|²)² = 2 n Σ_i (c·t_i)² + ‖H‖²_F,  H = Σ_i t_i t_iᵀ,
// a sum of squares, from which nothing cancels. In float64.
#pragma once

#include "tile.cuh"

namespace ssmkernels::cuda::ranking {

inline constexpr int kGramThreads = 256, kGramWarps = kGramThreads / 32;
inline constexpr int kGramRows = 16;  // in shared memory at a time
inline constexpr int64_t kMeanParts = 64, kGramBlocks = 512, kRowBlocks = 256;

// Of one block of rows, then of all.
struct RowSums {
  double projections;  // Σ (c·t_i)²
  double diagonal;     // Σ (s_ii − |c|²)
  double diagonal2;    // Σ (s_ii − |c|²)²
};

struct Gram {
  PackedRows<double> rows;  // r
  int64_t dim;
  PackedRows<double> h;  // [d, d] symmetric; scales: Σ_j H_ij²
  double* mean;          // [pitch]  c
  double* mean_norm;     // [1]  |c|²
  double* mean_parts;    // [kMeanParts, pitch]
  double* h_parts;       // [parts, tiles, kSide, kSide]
  int64_t tiles, parts;  // of the upper triangle of H; of the rows
  RowSums* row_sums;     // [kRowBlocks]
};

inline Gram take_gram(const PackedRows<double>& rows, int64_t dim, Workspace& workspace) {
  Gram gram{};
  gram.rows = rows;
  gram.dim = dim;
  gram.h = take_packed<double>(dim, dim, workspace);
  gram.mean = workspace.take<double>(rows.pitch);
  gram.mean_norm = workspace.take<double>(1);
  gram.mean_parts = workspace.take<double>(kMeanParts * rows.pitch);
  gram.tiles = gram.h.tiles() * (gram.h.tiles() + 1) / 2;
  gram.parts = max<int64_t>(1, min(ceil_div(kGramBlocks, gram.tiles), ceil_div<int64_t>(rows.count, kSide)));
  gram.h_parts = workspace.take<double>(gram.parts * gram.tiles * kSide * kSide);
  gram.row_sums = workspace.take<RowSums>(kRowBlocks);
  return gram;
}

// A block: 32 columns of every kMeanParts-th run of 8 rows.
static __global__ void __launch_bounds__(kGramThreads) sum_columns(const __grid_constant__ Gram gram) {
  SSM_SHARED(sums, double[kGramWarps][32]);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t part = blockIdx.x % kMeanParts, column = blockIdx.x / kMeanParts * 32 + lane;
  double sum = 0;
  if (column < gram.rows.pitch)
#pragma unroll 4
    for (int64_t i = part * kGramWarps + warp; i < gram.rows.count; i += kMeanParts * kGramWarps)
      sum += gram.rows.values[i * gram.rows.pitch + column];
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || column >= gram.rows.pitch) return;
  for (int other = 1; other < kGramWarps; ++other) sum += sums[other][lane];
  gram.mean_parts[part * gram.rows.pitch + column] = sum;
}

static __global__ void __launch_bounds__(kGramThreads) finish_mean(const __grid_constant__ Gram gram) {
  SSM_SHARED(scratch, double[kGramWarps]);
  double norm = 0;
  for (int64_t column = threadIdx.x; column < gram.rows.pitch; column += kGramThreads) {
    double sum = 0;
    for (int64_t part = 0; part < kMeanParts; ++part) sum += gram.mean_parts[part * gram.rows.pitch + column];
    const double mean = sum / static_cast<double>(gram.rows.count);
    gram.mean[column] = mean;
    norm += mean * mean;
  }
  norm = block_sum<kGramWarps>(norm, scratch);
  if (threadIdx.x == 0) *gram.mean_norm = norm;
}

static __global__ void __launch_bounds__(kGramThreads) sum_rows(const __grid_constant__ Gram gram) {
  SSM_SHARED(scratch, double[kGramWarps]);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const double mean_norm = *gram.mean_norm;
  RowSums sums{};
  for (int64_t i = int64_t{blockIdx.x} * kGramWarps + warp; i < gram.rows.count; i += int64_t{gridDim.x} * kGramWarps) {
    double projection = 0, norm = 0;
    for (int64_t c = lane; c < gram.rows.pitch; c += 32) {
      const double x = gram.rows.values[i * gram.rows.pitch + c], mean = gram.mean[c];
      projection += mean * (x - mean);
      norm += x * x;
    }
    projection = warp_sum(projection);
    const double diagonal = warp_sum(norm) - mean_norm;
    if (lane > 0) continue;
    sums.projections += projection * projection;
    sums.diagonal += diagonal;
    sums.diagonal2 += diagonal * diagonal;
  }
  sums.projections = block_sum<kGramWarps>(sums.projections, scratch);
  sums.diagonal = block_sum<kGramWarps>(sums.diagonal, scratch);
  sums.diagonal2 = block_sum<kGramWarps>(sums.diagonal2, scratch);
  if (threadIdx.x == 0) gram.row_sums[blockIdx.x] = sums;
}

// A block: 64 × 64 elements of H over a part of the rows, 4 × 4 to a thread.
static __global__ void __launch_bounds__(kGramThreads) sum_outer_products(const __grid_constant__ Gram gram) {
  struct alignas(16) Two {
    double values[2];
  };
  constexpr int kPitch = kSide / 2 + 1;
  SSM_SHARED(left, Two[kGramRows][kPitch]);
  SSM_SHARED(right, Two[kGramRows][kPitch]);
  const int64_t part = blockIdx.x % gram.parts, t = blockIdx.x / gram.parts, pitch = gram.rows.pitch;
  const TileAt tile = upper_tile(t);
  const int64_t each = ceil_div(gram.rows.count, gram.parts), begin = part * each,
                end = min(begin + each, gram.rows.count);
  const int copied = threadIdx.x % kSide, first_row = threadIdx.x / kSide, y = threadIdx.x / 16 * 4,
            x = threadIdx.x % 16 * 4;
  const int64_t left_column = tile.row * kSide + copied, right_column = tile.column * kSide + copied;
  const double left_mean = left_column < pitch ? gram.mean[left_column] : 0,
               right_mean = right_column < pitch ? gram.mean[right_column] : 0;
  double sums[4][4] = {};
  for (int64_t i = begin; i < end; i += kGramRows) {
    __syncthreads();
#pragma unroll
    for (int r = first_row; r < kGramRows; r += kGramThreads / kSide) {
      const double* row = gram.rows.values + (i + r) * pitch;
      left[r][copied / 2].values[copied % 2] = i + r < end && left_column < pitch ? row[left_column] - left_mean : 0;
      right[r][copied / 2].values[copied % 2] =
          i + r < end && right_column < pitch ? row[right_column] - right_mean : 0;
    }
    __syncthreads();
#pragma unroll 4
    for (int r = 0; r < kGramRows; ++r) {
      Two a[2], b[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        a[half] = left[r][y / 2 + half];
        b[half] = right[r][x / 2 + half];
      }
#pragma unroll
      for (int p = 0; p < 4; ++p)
#pragma unroll
        for (int q = 0; q < 4; ++q) sums[p][q] += a[p / 2].values[p % 2] * b[q / 2].values[q % 2];
    }
  }
  double* to = gram.h_parts + (part * gram.tiles + t) * kSide * kSide;
#pragma unroll
  for (int p = 0; p < 4; ++p)
#pragma unroll
    for (int q = 0; q < 4; ++q) to[(y + p) * kSide + x + q] = sums[p][q];
}

// A block: a row of H.
static __global__ void __launch_bounds__(kGramThreads) finish_gram(const __grid_constant__ Gram gram) {
  SSM_SHARED(scratch, double[kGramWarps]);
  const int64_t i = blockIdx.x;
  double squares = 0;
  for (int64_t j = threadIdx.x; j < gram.h.pitch; j += kGramThreads) {
    double sum = 0;
    if (i < gram.dim && j < gram.dim) {
      const int64_t row = min(i / kSide, j / kSide), column = max(i / kSide, j / kSide);
      const bool turned = i / kSide > j / kSide;
      const double* at = gram.h_parts + (column * (column + 1) / 2 + row) * kSide * kSide +
                         (turned ? j : i) % kSide * kSide + (turned ? i : j) % kSide;
      for (int64_t part = 0; part < gram.parts; ++part) sum += at[part * gram.tiles * kSide * kSide];
    }
    gram.h.values[i * gram.h.pitch + j] = sum;
    squares += sum * sum;
  }
  squares = block_sum<kGramWarps>(squares, scratch);
  if (threadIdx.x == 0) gram.h.scales[i] = squares;
}

inline const char* launch_gram(const Gram& gram, cudaStream_t stream) {
  if (const char* error =
          launch(sum_columns, ceil_div<int64_t>(gram.rows.pitch, 32) * kMeanParts, kGramThreads, 0, stream, gram))
    return error;
  if (const char* error = launch(finish_mean, 1, kGramThreads, 0, stream, gram)) return error;
  if (const char* error = launch(sum_outer_products, gram.tiles * gram.parts, kGramThreads, 0, stream, gram))
    return error;
  return launch(finish_gram, gram.h.padded(), kGramThreads, 0, stream, gram);
}

}  // namespace ssmkernels::cuda::ranking
