// SPDX-License-Identifier: BSD-3-Clause
// The tile that a sweep holds in shared memory, and where a thread stands in it.
#pragma once

#include "../common/cuda.cuh"
#include "bank.h"

namespace ssmkernels::cuda::memory {

inline constexpr int kSweepWarps = 4;
inline constexpr int kSweepThreads = 32 * kSweepWarps;
inline constexpr int kWarpRows = 16;
inline constexpr int kRows = kSweepWarps * kWarpRows;  // of a query in a block
inline constexpr int kDepth = 16;                      // chunks are filled up with zeros to a multiple of this
inline constexpr int kSplitTiles = 4;                  // at least, per split

// The tile in shared memory. Rows are padded by 16 bytes, so that eight of them start in different banks.
template <class Storage>
struct TileShape {
  static constexpr int kSlots = sizeof(Storage) == 8 ? 16 : 32;
  static constexpr int kBlocks = kSlots / 8;
  static constexpr int kDim = sizeof(Storage) == 8 ? 64 : 128;  // of a chunk
  static constexpr int kVector = 16 / sizeof(Storage);
  static constexpr int kVectors = kDim / kVector;
  static constexpr int kPitch = kDim + kVector;
  static constexpr int kBuffers =
      sizeof(Storage) == 2 ? 4 : 2;           // tiles in shared memory; two blocks fit a multiprocessor of sm_90
  static constexpr int kRing = 2 * kBuffers;  // tiles whose slots are noted: at least kBuffers + 1

  struct alignas(16) Vector {
    Storage values[kVector];
  };
};

// Where a thread stands.
struct Place {
  unsigned row;       // its first row; the other is eight further
  unsigned last_row;  // B − 1
  unsigned split;
  unsigned chunk;  // of the dimension
  int lane;

  // The same place in another group of the block's rows.
  __device__ Place of_group(int group) const {
    Place other = *this;
    other.row += group * kRows;
    return other;
  }
  // Whether this thread writes what its row r has one of: four lanes have the row, a block per chunk too.
  __device__ bool writes(int r) const {
    return lane % 4 == 0 && chunk == 0 && row + 8 * r <= last_row;
  }
};

// What an operation sees of the tile whose scores it is given.
struct TileView {
  const int* labels;  // [kSlots] in shared memory; the last one repeats past the end
  unsigned first;     // position of slot 0 in the order of the sweep
  int count;          // slots inside
};

__device__ inline int column_of(int lane, int block, int i) {
  return block * 8 + lane % 4 * 2 + i % 2;
}

}  // namespace ssmkernels::cuda::memory
