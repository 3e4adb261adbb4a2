// SPDX-License-Identifier: BSD-3-Clause
// What a query row says of each class, laid out for a sweep: table[row / 8][class][row % 8], classes 0 … L, where L
// stands for no class. The eight rows that a warp asks for at once then lie in one 32-byte sector. Rows are padded to
// whole tiles.
#pragma once

#include "sweep.cuh"

namespace ssmkernels::cuda {

inline constexpr int kTableRows = 8;  // one warp each while a table is made

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
__global__ void __launch_bounds__(32 * kTableRows)
    log_probs_table(const Real* probs, const unsigned char* present, int64_t rows, int64_t classes, Real* table,
                    unsigned char* known) {
  SSM_SHARED(any, bool[kTableRows]);
  const int64_t first_row = int64_t{blockIdx.x} * kTableRows;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t row = first_row + warp;
  bool found = false;
  if (row < rows)
    for (int64_t c = lane; c < classes && !found; c += 32) found = present[c] && probs[row * classes + c] != 0;
  found = __any_sync(kAllLanes, found);
  if (lane == 0) {
    any[warp] = found;
    if (row < rows) known[row] = found;
  }
  __syncthreads();
  for (int64_t c = threadIdx.x; c <= classes; c += blockDim.x) {
    Real* out = table + (int64_t{blockIdx.x} * (classes + 1) + c) * kTableRows;
    for (int i = 0; i < kTableRows; ++i) {
      const Real p = c < classes && first_row + i < rows ? probs[(first_row + i) * classes + c] : Real(0);
      out[i] = any[i] ? log2(p) : Real(0);
    }
  }
}

}  // namespace ssmkernels::cuda
