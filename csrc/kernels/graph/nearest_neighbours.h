// SPDX-License-Identifier: BSD-3-Clause
// The k best columns of every row by s_ij = x_i·y_j + o_j, exactly, ranked by s and then by index: the nearest
// neighbours by inner product, or by Euclidean distance where o_j = −‖y_j‖²/2.
//
// Products are taken tile by tile, and a score is kept that is as large as the k-th best of its row so far. Where rows
// are searched among themselves a tile is computed once for the pairs (i, j) and (j, i). A product is one chain of
// multiply-adds over the dimensions, in their order, wherever the pair lies in a tile: it is the same for (i, j) and
// (j, i), and for duplicates, so the result does not depend on tiles, their order or threads. Memory is O(N·k) beside a
// copy of the columns. A score that is NaN or −inf is never among the best.
#pragma once

#include "../common/isa.h"
#include "../common/parallel_for.h"

namespace ssmkernels {

template <class Real>
struct NearestNeighbours {
  const Real* rows;     // [N, D] x
  const Real* columns;  // [M, D] y
  const Real* offsets;  // [M] o, or null for 0
  int64_t num_rows;     // N < 2^31
  int64_t num_columns;  // M < 2^31
  int64_t dim;          // D
  int64_t neighbours;   // k in [1, M], or in [1, N) within the rows
  bool within;          // the columns are the rows, and each is searched without itself; M = N then
};

}  // namespace ssmkernels

// ids [N, k] and scores [N, k], best first; −1 and NaN where a row has fewer.
// pair_products: out[p] = x_left[p]·x_right[p] of P pairs of rows [N, D], with the bits that nearest_neighbours ranks
// by.
SSM_PER_ISA(template <class Real>
            void nearest_neighbours(const NearestNeighbours<Real>&, int32_t* ids, Real* scores, ParallelFor);
            template <class Real> void pair_products(const Real* rows, int64_t dim, const int64_t* left,
                                                     const int64_t* right, int64_t pairs, Real* out, ParallelFor);)
