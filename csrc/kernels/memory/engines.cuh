// SPDX-License-Identifier: BSD-3-Clause
// The two products of a sweep, in each type: scores of queries and slots, and means of slots by weights.
//
// In both products a thread has the elements of the tensor cores' accumulator: of 16 rows × 8 columns, with g = lane/4,
// t = lane%4, element i of block n is row g + 8·(i/2) and column 8n + 2t + i%2. The engines differ only in how they
// multiply.
#pragma once

#include "../common/tile_product.cuh"
#include "tile.cuh"

namespace ssmkernels::cuda::memory {

// Half types on the tensor cores, 16 deep.
template <class StorageType>
struct HalfEngine {
  using Storage = StorageType;
  using Real = float;
  using Shape = TileShape<Storage>;
  static constexpr bool kRounds = false;

  // sum[q][n] += query_q · slot; `query` is the warp's first row of query 0.
  template <bool kFull, int kQueries>
  static __device__ void scores(Real (&sum)[kQueries][Shape::kBlocks][4], const Storage* query, const Storage* tile,
                                int depth) {
    const Storage *a_row = left_operand<Held::along>(query, Shape::kPitch),
                  *b_row = right_operand<Held::along>(tile, Shape::kPitch);
#pragma unroll
    for (int k = 0; k < Shape::kDim; k += 16) {
      if (!kFull && k >= depth) break;
      multiply_step<Held::along, Held::along>(sum, a_row + k, kRows * Shape::kPitch, b_row + k, 8 * Shape::kPitch);
    }
  }

  // sum[m][n] += Σ_slot weight_m · slot. The accumulators of two blocks of scores are the operand of one step.
  template <bool kFull, int kMeans, int kQueries>
  static __device__ void means(Real (&sum)[kMeans][Shape::kDim / 8][4],
                               const Real (&weights)[kQueries][Shape::kBlocks][4], const Storage* tile, int depth) {
    uint32_t a[Shape::kBlocks / 2][kMeans][4];
#pragma unroll
    for (int m = 0; m < kMeans; ++m)
#pragma unroll
      for (int k = 0; k < Shape::kBlocks / 2; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          a[k][m][i] = pack<Storage>(weights[m][2 * k + i / 2][i % 2 * 2], weights[m][2 * k + i / 2][i % 2 * 2 + 1]);
    const Storage* b_row = right_operand<Held::across>(tile, Shape::kPitch);
#pragma unroll
    for (int n = 0; n < Shape::kDim / 8; n += 2) {
      if (!kFull && n * 8 >= depth) break;
#pragma unroll
      for (int k = 0; k < Shape::kBlocks / 2; ++k) {
        uint32_t b[4];
        load_operand<Held::across>(b, b_row + k * 16 * Shape::kPitch + n * 8);
        multiply_blocks<Storage>(sum, a[k], b, n);
      }
    }
  }
};

// float32 rounded to tf32 on the tensor cores, 8 deep. What lies in shared memory has been rounded.
struct Tf32Engine {
  using Storage = float;
  using Real = float;
  using Shape = TileShape<float>;
  static constexpr bool kRounds = true;

  static __device__ float rounded(float x) {
    return __uint_as_float(to_tf32(x));
  }

  template <bool kFull, int kQueries>
  static __device__ void scores(Real (&sum)[kQueries][Shape::kBlocks][4], const float* query, const float* tile,
                                int depth) {
    const float *a_row = left_operand<Held::along>(query, Shape::kPitch),
                *b_row = right_operand<Held::along>(tile, Shape::kPitch);
#pragma unroll
    for (int k = 0; k < Shape::kDim; k += 8) {
      if (k >= depth) break;  // also where the chunk is full: more loads ahead would not fit the registers
      multiply_step<Held::along, Held::along>(sum, a_row + k, kRows * Shape::kPitch, b_row + k, 8 * Shape::kPitch);
    }
  }

  // The order of the slots within a step is free as long as both operands keep it: step element t is slot 2t and t + 4
  // is slot 2t + 1, so the accumulators of a block of scores are the operand as they lie.
  template <bool kFull, int kMeans, int kQueries>
  static __device__ void means(Real (&sum)[kMeans][Shape::kDim / 8][4],
                               const Real (&weights)[kQueries][Shape::kBlocks][4], const float* tile, int depth) {
    uint32_t a[kMeans][Shape::kBlocks][4];
#pragma unroll
    for (int m = 0; m < kMeans; ++m)
#pragma unroll
      for (int k = 0; k < Shape::kBlocks; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i) a[m][k][i] = to_tf32(weights[m][k][i % 2 * 2 + i / 2]);
    const int lane = threadIdx.x % 32;
    const uint32_t* b_at = reinterpret_cast<const uint32_t*>(tile) + lane % 4 * 2 * Shape::kPitch + lane / 4;
#pragma unroll
    for (int n = 0; n < Shape::kDim / 8; ++n) {
      if (n * 8 >= depth) break;
#pragma unroll
      for (int k = 0; k < Shape::kBlocks; ++k) {
        const uint32_t b0 = b_at[k * 8 * Shape::kPitch + n * 8], b1 = b_at[(k * 8 + 1) * Shape::kPitch + n * 8];
#pragma unroll
        for (int m = 0; m < kMeans; ++m) multiply_add<float>(sum[m][n], a[m][k], b0, b1);
      }
    }
  }
};

// float32 and float64 without tensor cores.
template <class StorageType>
struct PlainEngine {
  using Storage = StorageType;
  using Real = StorageType;
  using Shape = TileShape<Storage>;

  using Vector = typename Shape::Vector;
  static constexpr bool kRounds = false;

  template <bool kFull, int kQueries>
  static __device__ void scores(Real (&sum)[kQueries][Shape::kBlocks][4], const Storage* query, const Storage* tile,
                                int depth) {
    const int lane = threadIdx.x % 32;
    const Storage* a_row = query + lane / 4 * Shape::kPitch;
    const Storage* b_row = tile + lane % 4 * 2 * Shape::kPitch;
#pragma unroll 1
    for (int k = 0; k < (kFull ? Shape::kDim : depth); k += Shape::kVector) {
      Vector a[kQueries][2];
#pragma unroll
      for (int q = 0; q < kQueries; ++q)
#pragma unroll
        for (int r = 0; r < 2; ++r) a[q][r] = vector_at(a_row + (q * kRows + r * 8) * Shape::kPitch + k);
#pragma unroll
      for (int n = 0; n < Shape::kBlocks; ++n)
#pragma unroll
        for (int column = 0; column < 2; ++column) {
          const Vector b = vector_at(b_row + (n * 8 + column) * Shape::kPitch + k);
#pragma unroll
          for (int q = 0; q < kQueries; ++q)
#pragma unroll
            for (int r = 0; r < 2; ++r)
#pragma unroll
              for (int v = 0; v < Shape::kVector; ++v) sum[q][n][r * 2 + column] += a[q][r].values[v] * b.values[v];
        }
    }
  }

  // The weight of slot 8n + 2t + c lies with lane t of the row's four.
  template <bool kFull, int kMeans, int kQueries>
  static __device__ void means(Real (&sum)[kMeans][Shape::kDim / 8][4],
                               const Real (&weights)[kQueries][Shape::kBlocks][4], const Storage* tile, int depth) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int block = 0; block < Shape::kBlocks; ++block)
#pragma unroll
      for (int column = 0; column < 2; ++column)
#pragma unroll 1
        for (int owner = 0; owner < 4; ++owner) {
          Real weight[kMeans][2];
#pragma unroll
          for (int m = 0; m < kMeans; ++m)
#pragma unroll
            for (int r = 0; r < 2; ++r)
              weight[m][r] = __shfl_sync(kAllLanes, weights[m][block][r * 2 + column], lane / 4 * 4 + owner);
          const Storage* b_row = tile + (block * 8 + owner * 2 + column) * Shape::kPitch + lane % 4 * 2;
#pragma unroll
          for (int n = 0; n < Shape::kDim / 8; ++n) {
            if (!kFull && n * 8 >= depth) break;
#pragma unroll
            for (int c = 0; c < 2; ++c) {
              const Storage b = b_row[n * 8 + c];
#pragma unroll
              for (int m = 0; m < kMeans; ++m)
#pragma unroll
                for (int r = 0; r < 2; ++r) sum[m][n][r * 2 + c] += weight[m][r] * b;
            }
          }
        }
  }

 private:
  static __device__ Vector vector_at(const Storage* from) {
    return *reinterpret_cast<const Vector*>(from);
  }
};

}  // namespace ssmkernels::cuda::memory
