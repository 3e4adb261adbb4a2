// SPDX-License-Identifier: BSD-3-Clause
// What a query row says of each class, laid out for a sweep: table[row / 8][class][row % 8], classes 0 … L, where L
// stands for no class. The eight rows that a warp asks for at once then lie in one 32-byte sector. Rows are padded to
// whole tiles.
#pragma once

#include "prepare.cuh"
#include "sweep.cuh"

namespace ssmkernels::cuda {

inline constexpr int kTableRows = 8;  // one warp each while a table is made
static_assert(32 * kTableRows == kPrepareThreads);

template <class Real>
Real* take_class_table(const Cut& cut, int64_t classes, Workspace& workspace) {
  return workspace.take<Real>(cut.padded_rows() * (classes + 1));
}

inline int64_t table_blocks(const Cut& cut) {
  return cut.padded_rows() / kTableRows;
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

}  // namespace ssmkernels::cuda
