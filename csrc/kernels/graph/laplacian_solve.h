// SPDX-License-Identifier: BSD-3-Clause
// Conjugate gradients on a graph Laplacian, all columns at once; mixed label propagation (CVPR 2023), equations (12),
// (16) and (24).
//
//   A X = B,  A = diag(diagonal) + D − W + D_dis + W_dis,  D = diag(W 1), D_dis = diag(W_dis 1)
// A is kept as what flows over each edge, v_e = w_e − w_dis,e, and the sum of each row, u_i = diagonal_i + 2 Σ_j
// w_dis,ij: (A x)_i = u_i x_i + Σ_j v_ij (x_i − x_j), exact for a constant x, where the sum of a row's terms would
// leave its rounding. These numbers determine the inverse of a diagonally dominant M-matrix to their own relative
// precision, whatever its condition (Alfa, Xue and Ye, "Entrywise perturbation theory for diagonally dominant
// M-matrices with applications", 2002). CG, preconditioned by D = diag(A), runs in Real, the solution is summed up and
// its residual r = b − A x computed in double precision.
//
// A column is solved when both hold, which scaling of A, of b, or of rows of A x = b against each other leaves as they
// are:
//   1. ‖D⁻¹ r‖ <= rtol ‖D⁻¹ b‖, the preconditioned residual: every row counts alike, however small its weights;
//   2. every row is balanced: |r_i| is at most a tenth of its terms |u_i x_i| + Σ_j |v_ij (x_i − x_j)| + |b_i|, the
//   componentwise backward
//      error (Oettli and Prager, 1964) for u, v and b, or 1e-12 A_ii |x_i| + 2e-15 A_ii ‖x‖_∞. So the solution has
//      passed every edge, also one that ties a part of the graph to the rest by 1e-9 of its weights, which no norm
//      sees.
// Then it does not change any more. Otherwise it ends at max_iter, where p·A p <= 0 (A is not positive definite on what
// CG has seen), or where rounding lets the residual fall no further. A row with A_ii = 0 (an isolated node without
// diagonal) keeps its initial value; a diagonal below 0 ends every column at once. Nothing is ever 0/0: a column that
// starts solved takes 0 iterations, and where b = 0 the solution is 0. NaN or infinity in a column of B or of the start
// makes the column NaN, in A all columns.
//
// Backward of X = A⁻¹ B, given ∂B = A⁻¹ ∂X (one more solve), is a product sampled on the pattern:
//   ∂w_e = ∂B_i·(X_j − X_i),  ∂w_dis,e = −∂B_i·(X_i + X_j),  ∂diagonal_i = −∂B_i·X_i,  e = (i, j)
#pragma once

#include "../common/isa.h"
#include "../common/parallel_for.h"
#include "csr.h"

namespace ssmkernels {

template <class Real>
struct LaplacianSolve {
  Csr graph;
  const Real* weight;         // [E]
  const Real* dissimilarity;  // [E] or null
  const Real* diagonal;       // [N]
  const Real* rhs;            // [N, C], rows contiguous
  const Real* initial;        // [N, C], rows contiguous, or null for 0
  int64_t columns;            // C
  double rtol;
  int64_t max_iter;
  bool jacobi;
};

template <class Real>
struct LaplacianSolution {
  Real* solution;       // [N, C]
  int64_t* iterations;  // [C]
  Real* residual;   // [C]  ‖D⁻¹r‖/‖D⁻¹b‖, before x is rounded to Real; a row's share of its terms where that is above
                    // .1; 0 where b = 0
  Real* curvature;  // [C]  the least p·A p/p·D p met; min(A_ii) if that is below 0, and inf where nothing was iterated
};

template <class Real>
struct LaplacianSolveBackward {
  Csr graph;
  const Real* grad_rhs;  // [N, C]  ∂B
  const Real* solution;  // [N, C]  X
  int64_t columns;
  Real* grad_weight;         // [E]  out
  Real* grad_dissimilarity;  // [E]  out, or null
  Real* grad_diagonal;       // [N]  out
};

}  // namespace ssmkernels

SSM_PER_ISA(template <class Real>
            void laplacian_solve(const LaplacianSolve<Real>&, const LaplacianSolution<Real>&, ParallelFor);
            template <class Real> void laplacian_solve_backward(const LaplacianSolveBackward<Real>&, ParallelFor);)

namespace ssmkernels::cuda {

template <class Real>
int64_t laplacian_solve_workspace(const LaplacianSolve<Real>&);  // bytes
template <class Real>
const char* laplacian_solve(const LaplacianSolve<Real>&, const LaplacianSolution<Real>&, void* workspace, CudaStream);
template <class Real>
const char* laplacian_solve_backward(const LaplacianSolveBackward<Real>&, CudaStream);

}  // namespace ssmkernels::cuda
