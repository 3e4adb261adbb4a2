// SPDX-License-Identifier: BSD-3-Clause
// Products of pairs of rows, tile by tile, as the kernels of this family take them.
//
// Rows are first packed (pack.cuh): in the order of the sweep, filled up with zeros to whole tiles and chunks, so that
// tiles need no bounds. A block of four warps takes the products of 64 × 64 pairs, chunks of 128 bytes of each row
// passing through a ring in shared memory (cp.async); a warp has 32 × 32 of them, the tile that a flag stands for. The
// gradients are a second product, of a tile of weights K in shared memory with the columns' rows, 256 bytes of these at
// a time. The engines differ in how they multiply and in which elements a thread has.
#pragma once

#include <bit>

#include "../common/cuda.cuh"
#include "../common/tile_product.cuh"
#include "ranking_pairs.h"

namespace ssmkernels::cuda::ranking {

inline constexpr int kTileWarps = 4, kTileThreads = 32 * kTileWarps;
inline constexpr int kWarpSide = kRankingTile;  // rows and columns of a warp's tile
inline constexpr int kSide = 2 * kWarpSide;     // of a block's
inline constexpr int kStages = 3;               // of the ring

// Rows in shared memory are padded by 16 bytes, so that eight of them start in different banks.
template <class Storage>
struct Layout {
  static constexpr int kVector = 16 / sizeof(Storage);
  static constexpr int kDepth = 128 / sizeof(Storage), kPitch = kDepth + kVector;  // of a chunk of a product of pairs
  static constexpr int kWide = 2 * kDepth, kWidePitch = kWide + kVector;           // of a chunk of the second product
  static constexpr int kStage = 2 * kSide * kPitch;                                // elements
  static constexpr int kWeightPitch = kSide + (sizeof(Storage) == 8 ? 2 : 8);      // of a tile of K
  static constexpr int kRowMultiple = sizeof(Storage) == 2 ? 2 * kSide : kSide;    // half types: sweep_large_loss
  static_assert(kSide * kWidePitch <= kStage);
  static_assert(kTileWarps * kWarpSide * kWarpSide * sizeof(Compute<Storage>) <= kStages * kStage * sizeof(Storage));
};

template <class Storage>
inline constexpr int64_t kRingBytes = kStages * Layout<Storage>::kStage * sizeof(Storage);

template <class Storage>
struct PackedRows {
  Storage* values;           // [padded(count), pitch]
  Compute<Storage>* scales;  // [padded(count)]: squared norms, or one over the norms
  int64_t count;
  int64_t pitch;  // of chunks

  __host__ __device__ int64_t tiles() const {
    return ceil_div<int64_t>(count, kSide);
  }
  __host__ __device__ int64_t padded() const {
    return ceil_div<int64_t>(count, Layout<Storage>::kRowMultiple) * Layout<Storage>::kRowMultiple;
  }
};

template <class Storage>
PackedRows<Storage> take_packed(int64_t count, int64_t dim, Workspace& workspace) {
  PackedRows<Storage> rows{nullptr, nullptr, count,
                           ceil_div<int64_t>(dim, Layout<Storage>::kDepth) * Layout<Storage>::kDepth};
  rows.values = workspace.take<Storage>(rows.padded() * rows.pitch);
  rows.scales = workspace.take<Compute<Storage>>(rows.padded());
  return rows;
}

// Half types on the tensor cores. K ranges as far as the ratio of the weights of positives and negatives, which float16
// does not hold: the second product is one of tf32, in which half types are exact.
template <class StorageType>
struct TensorCoreEngine {
  using Storage = StorageType;
  using Real = float;
  using Shape = Layout<Storage>;

  // Of a warp's 32 × 32 pairs.
  struct Products {
    static constexpr int kRows = 4, kColumns = 8;
    float sums[2][4][4] = {};

    static __device__ int row(int lane, int r) {
      return lane / 4 + 8 * r;
    }
    static __device__ int column(int lane, int c) {
      return c / 2 * 8 + lane % 4 * 2 + c % 2;
    }
    __device__ float& at(int r, int c) {
      return sums[r / 2][c / 2][r % 2 * 2 + c % 2];
    }
  };
  // Of a warp's 32 rows and half of a wide chunk.
  struct WideSums {
    static constexpr int kRows = 4, kColumns = 16;
    float sums[2][8][4] = {};

    static __device__ int column(int lane, int c) {
      return Products::column(lane, c);
    }
    __device__ float& at(int r, int c) {
      return sums[r / 2][c / 2][r % 2 * 2 + c % 2];
    }
  };
  static constexpr int kRowLanes = 4;  // neighbouring lanes that share their rows

  static __device__ float rounded(float x) {
    return __uint_as_float(to_tf32(x));
  }

  // out += rows · columns over one chunk.
  static __device__ void multiply(Products& out, const Storage* rows, const Storage* columns) {
    const Storage *a_at = left_operand<Held::along>(rows, Shape::kPitch),
                  *b_at = right_operand<Held::along>(columns, Shape::kPitch);
#pragma unroll
    for (int k = 0; k < Shape::kDepth; k += 16)
      multiply_step<Held::along, Held::along>(out.sums, a_at + k, 16 * Shape::kPitch, b_at + k, 8 * Shape::kPitch);
  }

  // out += K · rows. The order of the rows within a step of 8 is free as long as both operands keep it: step element t
  // is row 2t and t + 4 is row 2t + 1, as they lie in the registers of transposed matrices.
  static __device__ void multiply_wide(WideSums& out, const float* weights, const Storage* rows) {
    const int lane = threadIdx.x % 32;
    const float* a_at = weights + lane / 4 * Shape::kWeightPitch + lane % 4 * 2;
    const Storage* b_at = rows + lane % 16 * Shape::kWidePitch + lane / 16 * 8;
#pragma unroll 1
    for (int k = 0; k < kSide; k += 16) {
      uint32_t a[2][2][4];
#pragma unroll
      for (int step = 0; step < 2; ++step)
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const Pair pair =
                *reinterpret_cast<const Pair*>(a_at + (m * 16 + half * 8) * Shape::kWeightPitch + k + step * 8);
            a[step][m][half] = std::bit_cast<uint32_t>(pair.first);
            a[step][m][2 + half] = std::bit_cast<uint32_t>(pair.second);
          }
#pragma unroll
      for (int n = 0; n < 8; n += 2) {
        uint32_t b[4];
        load_matrices_transposed(b, b_at + k * Shape::kWidePitch + n * 8);
#pragma unroll
        for (int step = 0; step < 2; ++step)
#pragma unroll
          for (int side = 0; side < 2; ++side) {
            const uint32_t pair = b[side * 2 + step];
            const uint32_t b0 = widened(static_cast<uint16_t>(pair)), b1 = widened(static_cast<uint16_t>(pair >> 16));
#pragma unroll
            for (int m = 0; m < 2; ++m) multiply_add<float>(out.sums[m][n + side], a[step][m], b0, b1);
          }
      }
    }
  }

 private:
  struct alignas(8) Pair {
    float first, second;
  };
  static __device__ uint32_t widened(uint16_t bits) {
    return std::bit_cast<uint32_t>(to_real(Storage{bits}));
  }
};

// float32 and float64 without tensor cores.
template <class StorageType>
struct PlainEngine {
  using Storage = StorageType;
  using Real = StorageType;
  using Shape = Layout<Storage>;
  static constexpr int kVector = Shape::kVector;

  struct alignas(16) Vector {
    Real values[kVector];
  };
  struct Products {
    static constexpr int kRows = 8, kColumns = 4;
    Real sums[8][4] = {};

    static __device__ int row(int lane, int r) {
      return lane / 8 + 4 * r;
    }
    static __device__ int column(int lane, int c) {
      return lane % 8 + 8 * c;
    }
    __device__ Real& at(int r, int c) {
      return sums[r][c];
    }
  };
  struct WideSums {
    static constexpr int kRows = 8, kColumns = kVector;
    Real sums[8][kVector] = {};

    static __device__ int column(int lane, int c) {
      return lane % 8 * kVector + c;
    }
    __device__ Real& at(int r, int c) {
      return sums[r][c];
    }
  };
  static_assert(8 * kVector == Shape::kWide / 2);
  static constexpr int kRowLanes = 8;

  static __device__ Real rounded(Real x) {
    return x;
  }

  static __device__ void multiply(Products& out, const Real* rows, const Real* columns) {
    const int lane = threadIdx.x % 32;
    const Real *a_at = rows + Products::row(lane, 0) * Shape::kPitch,
               *b_at = columns + Products::column(lane, 0) * Shape::kPitch;
#pragma unroll 2
    for (int k = 0; k < Shape::kDepth; k += kVector) {
      Vector a[8];
#pragma unroll
      for (int r = 0; r < 8; ++r) a[r] = vector_at(a_at + r * 4 * Shape::kPitch + k);
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const Vector b = vector_at(b_at + c * 8 * Shape::kPitch + k);
#pragma unroll
        for (int v = 0; v < kVector; ++v)
#pragma unroll
          for (int r = 0; r < 8; ++r) out.sums[r][c] += a[r].values[v] * b.values[v];
      }
    }
  }

  static __device__ void multiply_wide(WideSums& out, const Real* weights, const Real* rows) {
    const int lane = threadIdx.x % 32;
    const Real *a_at = weights + Products::row(lane, 0) * Shape::kWeightPitch, *b_at = rows + WideSums::column(lane, 0);
#pragma unroll 2
    for (int k = 0; k < kSide; k += kVector) {
      Vector a[8];
#pragma unroll
      for (int r = 0; r < 8; ++r) a[r] = vector_at(a_at + r * 4 * Shape::kWeightPitch + k);
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        const Vector b = vector_at(b_at + (k + v) * Shape::kWidePitch);
#pragma unroll
        for (int r = 0; r < 8; ++r)
#pragma unroll
          for (int c = 0; c < kVector; ++c) out.sums[r][c] += a[r].values[v] * b.values[c];
      }
    }
  }

 private:
  static __device__ Vector vector_at(const Real* from) {
    return *reinterpret_cast<const Vector*>(from);
  }
};

template <class Storage>
struct EngineFor {
  using type = TensorCoreEngine<Storage>;
};
template <>
struct EngineFor<float> {
  using type = PlainEngine<float>;
};
template <>
struct EngineFor<double> {
  using type = PlainEngine<double>;
};

// A warp's tile, at these positions of the two sides. Warps of a block stand kAcross × kAcross.
struct WarpTile {
  int64_t row, column;

  template <int kAcross = 2>
  static __device__ WarpTile of_block(int64_t block_row, int64_t block_column, unsigned thread = threadIdx.x) {
    return {block_row + warp_row<kAcross>(thread), block_column + warp_column<kAcross>(thread)};
  }
  template <int kAcross = 2>
  static __device__ int warp_row(unsigned thread = threadIdx.x) {
    return thread / 32 / kAcross * kWarpSide;
  }
  template <int kAcross = 2>
  static __device__ int warp_column(unsigned thread = threadIdx.x) {
    return thread / 32 % kAcross * kWarpSide;
  }
};

// Copies steps 0, 1, … through the ring, kStages − 1 ahead of their use. `copy(step, to)` starts the copies of this
// thread, `use(step, from)` is called when a step is there for all threads. The ring is free before and after.
template <class Storage, int kStage = Layout<Storage>::kStage, class Copy, class Use>
__device__ void stream_through(Storage* ring, int64_t steps, Copy copy, Use use) {
  __syncthreads();
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps) copy(step, ring + step * kStage);
    copy_async_commit();
  }
  int at = 0, ahead = kStages - 1;
#pragma unroll 1
  for (int64_t step = 0; step < steps; ++step) {
    copy_async_wait<kStages - 2>();
    __syncthreads();
    if (step + kStages - 1 < steps) copy(step + kStages - 1, ring + ahead * kStage);
    copy_async_commit();
    use(step, ring + at * kStage);
    at = at == kStages - 1 ? 0 : at + 1;
    ahead = ahead == kStages - 1 ? 0 : ahead + 1;
  }
  copy_async_wait<0>();
  __syncthreads();
}

// out += the products of rows [row, row + kSide) of one side with [column, column + kSide) of the other.
template <class Engine, class Storage = typename Engine::Storage>
__device__ void multiply_pairs(typename Engine::Products& out, const PackedRows<Storage>& rows, int64_t row,
                               const PackedRows<Storage>& columns, int64_t column, Storage* ring) {
  using Shape = Layout<Storage>;
  constexpr int kVectors = Shape::kDepth / Shape::kVector, kStep = kTileThreads / kVectors;
  const int r = threadIdx.x / kVectors, v = threadIdx.x % kVectors * Shape::kVector;
  const int64_t pitch = rows.pitch;
  const Storage *row_at = rows.values + (row + r) * pitch + v, *column_at = columns.values + (column + r) * pitch + v;
  stream_through(
      ring, pitch / Shape::kDepth,
      [&](int64_t step, Storage* to) {
        to += r * Shape::kPitch + v;
#pragma unroll
        for (int i = 0; i < kSide; i += kStep) {
          copy_async(to + i * Shape::kPitch, row_at + i * pitch + step * Shape::kDepth, true);
          copy_async(to + (kSide + i) * Shape::kPitch, column_at + i * pitch + step * Shape::kDepth, true);
        }
      },
      [&](int64_t, const Storage* from) {
        Engine::multiply(out, from + WarpTile::warp_row() * Shape::kPitch,
                         from + (kSide + WarpTile::warp_column()) * Shape::kPitch);
      });
}

// f(r, c, bit) for each of a thread's 32 pairs, unrolled.
template <class Products, class F>
__device__ void for_each_pair(F f) {
#pragma unroll
  for (int r = 0; r < Products::kRows; ++r)
#pragma unroll
    for (int c = 0; c < Products::kColumns; ++c) f(r, c, 1u << (r * Products::kColumns + c));
}

// Tile t of the upper triangle, down its columns.
struct TileAt {
  int64_t row, column;
};
__device__ inline TileAt upper_tile(int64_t t) {
  int64_t column = static_cast<int64_t>((sqrt(8.0 * static_cast<double>(t) + 1) - 1) / 2);
  while (column * (column + 1) / 2 > t) --column;
  while ((column + 1) * (column + 2) / 2 <= t) ++column;
  return {t - column * (column + 1) / 2, column};
}

}  // namespace ssmkernels::cuda::ranking
