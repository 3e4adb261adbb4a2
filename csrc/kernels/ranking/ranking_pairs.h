// SPDX-License-Identifier: BSD-3-Clause
// Pairs of rows and their ranking loss, SLADE (2021), equation (1), with d_ij = ‖e_i − e_j‖:
//
//   L = w₊ Σ_{(i, j) ∈ P} [d_ij − m_pos]_+  +  w₋ Σ_{(i, j) ∈ N} [m_neg − d_ij]_+
//   ∂L/∂e_i = Σ_j (K_ij + K_ji)(e_i − e_j),  K_ij = w₊/d_ij on pairs of P with d > m_pos, −w₋/d_ij on pairs of N with d
//   < m_neg
// and 0 where d_ij = 0. All ordered pairs i ≠ j of the rows; or, with references, (row i, reference j). P and N are
// found by labels (pair_ranking_loss.h) or mined by similarity (mined_pair_ranking_loss.h). Nothing of size n×m exists:
// distances are computed tile by tile, and again in the backward, there only in the tiles that have an active pair.
#pragma once

#include <cstdint>

#include "../common/dtype.h"
#include "../common/stream.h"

namespace ssmkernels {

enum class Reduction { mean_nonzero, mean, sum };

inline constexpr int64_t kRankingTile = 32;  // rows by columns of a tile of pairs

// All matrices have contiguous rows.
template <class Storage>
struct RankingPairs {
  const Storage* rows;        // e [n, d]
  const Storage* references;  // [m, d], or null: the pairs i ≠ j of rows, and m = n
  int64_t count;              // n
  int64_t reference_count;    // m
  int64_t dim;                // d
  double positive_margin;     // m_pos
  double negative_margin;     // m_neg
};

template <class Real>
struct RankingLoss {
  Reduction reduction;
  Real* loss;       // [1] out
  Real* weights;    // [2] out: w₊, w₋; 1 for a sum, else one over the pairs counted, 0 without any
  uint8_t* active;  // [⌈n / tile⌉, ⌈m / tile⌉] zeros, set where the backward has to look at a tile; without references
                    // only on and above the diagonal
};

template <class Real>
struct RankingGradients {
  const Real* grad_loss;  // [1]
  const Real* weights;    // [2]
  const uint8_t* active;  // [⌈n / tile⌉, ⌈m / tile⌉]
  Real* rows;             // [n, d] out
  Real* references;       // [m, d] out, or null
};

}  // namespace ssmkernels

namespace ssmkernels::cuda {

// The CUDA kernels return null, or CUDA's message of what went wrong. `workspace` is device memory of the stated size;
// nothing else is allocated. `basis_dim` is 0 with labels.
template <class Storage>
int64_t ranking_workspace(const RankingPairs<Storage>&, int64_t basis_dim, bool backward);  // bytes

}  // namespace ssmkernels::cuda
