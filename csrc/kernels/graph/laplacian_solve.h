// SPDX-License-Identifier: BSD-3-Clause
// Conjugate gradients on a graph Laplacian, all columns at once; mixed label propagation (CVPR 2023), equations (12), (16) and (24).
//
//   A X = B,  A = diag(diagonal) + D − W + D_dis + W_dis,  D = diag(W 1), D_dis = diag(W_dis 1)
// W and W_dis are merged into one array of values, v_e = w_dis,e − w_e. Jacobi's preconditioner is applied by scaling: with S = diag(A)^−½
// the iteration is plain CG on (S A S)(S⁻¹ X) = S B, whose diagonal is 1, so that no vector of preconditioned residuals is kept; the
// residual that decides is the unscaled one, ‖b − A x‖ = ‖S⁻¹ r‖. A row with A_ii = 0 (an isolated node without diagonal) keeps its
// initial value; a diagonal below 0 ends every column at once.
// A column stops when ‖r‖ <= rtol ‖b‖ by the recurrence, or when p·A p <= 0 (A is not positive definite on what CG has seen), and does not
// change any more. Nothing is ever 0/0: a column that starts converged takes 0 iterations, and where b = 0 the solution is 0.
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
  Real* residual;       // [C]  ‖b − A x‖/‖b‖ of the solution itself, not of the recurrence; 0 where b = 0
  Real* curvature;  // [C]  the least p·A p/p·p met, in the scaled system; min(A_ii) if that is below 0, and inf where nothing was iterated
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

SSM_PER_ISA(template <class Real> void laplacian_solve(const LaplacianSolve<Real>&, const LaplacianSolution<Real>&, ParallelFor);
            template <class Real> void laplacian_solve_backward(const LaplacianSolveBackward<Real>&, ParallelFor);)

namespace ssmkernels::cuda {

template <class Real>
int64_t laplacian_solve_workspace(const LaplacianSolve<Real>&);  // bytes
template <class Real>
const char* laplacian_solve(const LaplacianSolve<Real>&, const LaplacianSolution<Real>&, void* workspace, CudaStream);
template <class Real>
const char* laplacian_solve_backward(const LaplacianSolveBackward<Real>&, CudaStream);

}  // namespace ssmkernels::cuda
