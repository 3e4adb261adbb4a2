// SPDX-License-Identifier: BSD-3-Clause
// Products of tiles in shared memory on the tensor cores: where the operands of a lane lie, and one step of the sums.
// Who stages the tiles, how wide they are and what stays in registers is each family's own.
//
// A step is 32 bytes deep: 16 elements of half types, 8 of float32, taken as tf32. Its left operand has 16 rows to a
// fragment, its right one 8 columns to a block; a thread has of their product what mma.cuh says.
#pragma once

#include "mma.cuh"

namespace ssmkernels::cuda {

// How a tile holds an operand: along the depth, a row of the tile being a row of the left operand or a column of the
// right one; or across it, a row of the tile being a step element (half types only).
enum class Held { along, across };

// Where load_matrices finds what this lane is to name, of 16 rows of the left operand from `first` on.
template <Held kHeld, class Storage>
__device__ const Storage* left_operand(const Storage* tile, int pitch, int first = 0) {
  constexpr int kVector = 16 / sizeof(Storage);
  const int lane = threadIdx.x % 32;
  if constexpr (kHeld == Held::along)
    return tile + (first + lane % 16) * pitch + lane / 16 * kVector;
  else
    return tile + (lane / 16 * 8 + lane % 8) * pitch + first + lane / 8 % 2 * kVector;
}
// Of 16 columns of the right operand, two blocks.
template <Held kHeld, class Storage>
__device__ const Storage* right_operand(const Storage* tile, int pitch, int first = 0) {
  constexpr int kVector = 16 / sizeof(Storage);
  const int lane = threadIdx.x % 32;
  if constexpr (kHeld == Held::along)
    return tile + (first + lane / 16 * 8 + lane % 8) * pitch + lane / 8 % 2 * kVector;
  else
    return tile + lane % 16 * pitch + first + lane / 16 * kVector;
}

template <Held kHeld>
__device__ void load_operand(uint32_t (&to)[4], const void* row) {
  if constexpr (kHeld == Held::along)
    load_matrices(to, row);
  else
    load_matrices_transposed(to, row);
}

// Blocks n and n + 1 of every fragment's row of sums.
template <class Storage, int kFragments, int kBlocks>
__device__ void multiply_blocks(float (&sums)[kFragments][kBlocks][4], const uint32_t (&left)[kFragments][4],
                                const uint32_t (&right)[4], int n) {
#pragma unroll
  for (int m = 0; m < kFragments; ++m) {
    multiply_add<Storage>(sums[m][n], left[m], right[0], right[1]);
    multiply_add<Storage>(sums[m][n + 1], left[m], right[2], right[3]);
  }
}

// sums += left · right over one step. `left_step` is from a fragment to the next, `right_step` from a block.
template <Held kLeft, Held kRight, class Storage, int kFragments, int kBlocks>
__device__ void multiply_step(float (&sums)[kFragments][kBlocks][4], const Storage* left, int left_step,
                              const Storage* right, int right_step) {
  uint32_t a[kFragments][4];
#pragma unroll
  for (int m = 0; m < kFragments; ++m) load_operand<kLeft>(a[m], left + m * left_step);
#pragma unroll
  for (int n = 0; n < kBlocks; n += 2) {
    uint32_t b[4];
    load_operand<kRight>(b, right + n * right_step);
    multiply_blocks<Storage>(sums, a, b, n);
  }
}

}  // namespace ssmkernels::cuda
