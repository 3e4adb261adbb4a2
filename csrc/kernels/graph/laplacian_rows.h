// SPDX-License-Identifier: BSD-3-Clause
// Conjugate gradients on this rank's rows of a matrix that is split over ranks, in the form of Chronopoulos and Gear
// ("s-step iterative methods for symmetric linear systems", 1989), which reduces over ranks once an iteration.
//
// (A x)_i = excess_i x_i + Σ_e value_e (x_i − x_col[e]), as in laplacian_solve.h, of n own rows; columns from n on are
// those of other ranks. What an iteration does:
//   laplacian_rows, of the rows that need no other rank's values, then of the others: w = A u and the sums u·w, r·u and
//   ‖D⁻¹ r‖²;
//   laplacian_step: p ← f u + β p, s ← f w + β s, x += α p, r −= α s, u = M⁻¹ r, in one pass. f is 1, and 0 with β = 1
//   and α = 0 in a column that waits.
// laplacian_residual: A x in double precision, and the sum of the magnitudes of its terms.
#pragma once

#include <cstdint>

#include "../common/isa.h"
#include "../common/parallel_for.h"

namespace ssmkernels {

template <class Real>
struct RowsOfLaplacian {
  const int64_t* crow;  // [n + 1]
  const int32_t* col;   // [E]  in [0, m); others are not followed
  const Real* value;    // [E]  −A_ij
  const Real* excess;   // [n]  the sum of row i
  int64_t nodes;        // n
  int64_t extended;     // m >= n
  int64_t columns;      // C
};

template <class Real>
struct LaplacianRows {
  RowsOfLaplacian<Real> matrix;
  const int64_t* rows;   // [k]  the rows to compute, in [0, n); others are left out
  int64_t count;         // k
  const Real* x;         // [m, C]
  const Real* residual;  // [n, C]
  const Real* inverse;   // [n]  of the diagonal
  Real* out;             // [n, C]  those rows of A x
  double* sums;          // [3, C]  over those rows: x·out, residual·x and ‖inverse residual‖²
};

template <class Real>
struct LaplacianStep {
  int64_t nodes, columns;            // n, C
  const Real *fresh, *beta, *alpha;  // [C]
  const Real* step;                  // [n]  M⁻¹
  const Real* w;                     // [n, C]
  double* x;                         // [n, C]
  Real *r, *p, *s, *u;               // [n, C]
};

template <class Real>
struct LaplacianResidual {
  RowsOfLaplacian<Real> matrix;
  const double* x;      // [m, C]
  double *sum, *terms;  // [n, C]
};

}  // namespace ssmkernels

SSM_PER_ISA(template <class Real> void laplacian_rows(const LaplacianRows<Real>&, ParallelFor);
            template <class Real> void laplacian_step(const LaplacianStep<Real>&, ParallelFor);
            template <class Real> void laplacian_residual(const LaplacianResidual<Real>&, ParallelFor);)
