// SPDX-License-Identifier: BSD-3-Clause
// What a query row says of each class, laid out for a sweep: table[row / 8][class][row % 8], classes 0 … L, where L
// stands for no class. The eight rows that a warp asks for at once then lie in one 32-byte sector. Rows are padded to
// whole tiles.
#pragma once

#include "prepare.cuh"
#include "sweep_input.cuh"

namespace ssmkernels::cuda::memory {

inline constexpr int kTableRows = 8;  // one warp each while a table is made
static_assert(32 * kTableRows == kPrepareThreads);

template <class Real>
Real* take_class_table(const Partition& partition, int64_t classes, Workspace& workspace) {
  return workspace.take<Real>(partition.padded_rows() * (classes + 1));
}

inline int64_t table_blocks(const Partition& partition) {
  return partition.padded_rows() / kTableRows;
}

// log₂ p, −inf where p is 0 and for no class. A row whose p is zero on every class present is not known, and gets 0
// throughout: there the target distribution is the softmax alone.
template <class Real>
struct LogProbsTable {
  const Real* probs;             // [B, L]
  const unsigned char* present;  // [L + 1], or null: a small bank's classes are its labels'
  Labels labels;
  int64_t rows;
  Real* table;
  unsigned char* known;  // [B]

  __device__ void make(int64_t block) const {
    SSM_SHARED(any, bool[kTableRows]);
    const int64_t first_row = block * kTableRows, classes = labels.classes;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int64_t row = first_row + warp;
    bool weighs = false;
    if (row < rows) {
      const Real* own = probs + row * classes;
      if (present)
        for (int64_t c = lane; c < classes && !weighs; c += 32) weighs = present[c] && own[c] != 0;
      else
        for (int64_t j = lane; j < labels.slots && !weighs; j += 32) {
          const int64_t c = class_row(labels.values[j], classes);
          weighs = c < classes && own[c] != 0;
        }
    }
    weighs = __any_sync(kAllLanes, weighs);
    if (lane == 0) {
      any[warp] = weighs;
      if (row < rows) known[row] = weighs;
    }
    __syncthreads();
    for (int64_t c = threadIdx.x; c <= classes; c += blockDim.x) {
      Real* out = table + (block * (classes + 1) + c) * kTableRows;
      for (int i = 0; i < kTableRows; ++i) {
        const Real p = c < classes && first_row + i < rows ? probs[(first_row + i) * classes + c] : Real(0);
        out[i] = any[i] ? log2(p) : Real(0);
      }
    }
  }
};

// What the rows of a thread have in the class table, for the slots of a tile.
template <class Real, bool kClassOrder>
class TableRows {
 public:
  __device__ TableRows(const Real* table, const int64_t& classes, const Place& place)
      : first_(table + place.row / 8 * (classes + 1) * 8 + place.lane / 4), classes_(classes) {}
  // Before the products: all values, or in class order the first of each row, which most tiles have for all their
  // slots.
  template <int kBlocks>
  __device__ void fetch(Real (&to)[kBlocks][4], const int* labels, int lane) const {
#pragma unroll
    for (int n = 0; n < kBlocks; ++n)
#pragma unroll
      for (int c = 0; c < 2; ++c)
        if (!kClassOrder || (kFetchesFirst && n + c == 0)) load(to, labels, lane, n, c);
  }
  // After them: the others.
  template <int kBlocks>
  __device__ void complete(Real (&to)[kBlocks][4], const int* labels, int lane) const {
    static_assert(kClassOrder);
    const bool one_class = labels[0] == labels[kBlocks * 8 - 1];
    if (!kFetchesFirst) load(to, labels, lane, 0, 0);
#pragma unroll
    for (int n = 0; n < kBlocks; ++n)
#pragma unroll
      for (int c = n == 0; c < 2; ++c)
        if (one_class) {
          to[n][c] = to[0][0];
          to[n][2 + c] = to[0][2];
        } else {
          load(to, labels, lane, n, c);
        }
  }

 private:
  static constexpr bool kFetchesFirst = sizeof(Real) == 4;  // float64 has no registers that the products leave

  template <int kBlocks>
  __device__ void load(Real (&to)[kBlocks][4], const int* labels, int lane, int n, int c) const {
    const Real* at = first_ + int64_t{labels[column_of(lane, n, c)]} * 8;
    to[n][c] = at[0];
    to[n][2 + c] = at[(classes_ + 1) * 8];
  }

  const Real* first_;
  const int64_t& classes_;  // a kernel parameter: a reference costs no register
};

}  // namespace ssmkernels::cuda::memory
