// SPDX-License-Identifier: BSD-3-Clause
// Dissimilarity of the ends of every edge when it is left out, mixed label propagation (CVPR 2023), equations
// (19)-(22).
//
//   a_ij = λ(D_ii F_i − w_ij F_j),  Z_ij = softmax(a_ij)                       (20)
//   ω_ij = 1 − H(Z_ij)/log C                                                   (21)
//   out[e] = ω_ij ω_ji (1 − Z_ij·Z_ji)                                         (22), e = (i, j)
// H = log Σ e^a − Σ e^a a/Σ e^a, so one sweep over the classes yields all of it; out[e] = out[reverse[e]], so each pair
// is computed once. Backward, with t = Z_ij·Z_ji, G_e = g[e] + g[reverse[e]] and
//   r_ij = Z_ij (ω_ji (1 − t)(log Z_ij + H_ij)/log C − ω_ij ω_ji (Z_ji − t)):
//   ∂F_i = λ Σ_{j} G_ij (D_ii r_ij − w_ji r_ji),   ∂w_ij = λ (Σ_{l} G_il r_il·F_i − G_ij r_ij·F_j)
// Every node gathers from its own edges (each pair is computed at both of its ends), so nothing is scattered. The [E,
// C] tensor of Z never exists: memory is O(E + N·C). A column outside [0, N) or a reverse outside [0, E) is never
// followed: such an entry gets 0.
#pragma once

#include "../common/isa.h"
#include "../common/parallel_for.h"
#include "csr.h"

namespace ssmkernels {

template <class Real>
struct LeaveOneEdgeOut {
  Csr graph;
  const int64_t* reverse;  // [E]  position of (j, i)
  const Real* weight;      // [E]  w_ij, symmetric
  const Real* propagated;  // [N, C]  F, rows contiguous
  int64_t classes;         // C >= 2
  double logit_scale;      // λ
};

template <class Real>
struct LeaveOneEdgeOutBackward {
  const Real* grad_dissimilarity;  // [E]  g
  Real* grad_weight;               // [E]  out
  Real* grad_propagated;           // [N, C]  out
};

}  // namespace ssmkernels

SSM_PER_ISA(template <class Real>
            void leave_one_edge_out(const LeaveOneEdgeOut<Real>&, Real* dissimilarity, ParallelFor);
            template <class Real> void leave_one_edge_out_backward(const LeaveOneEdgeOut<Real>&,
                                                                   const LeaveOneEdgeOutBackward<Real>&, ParallelFor);)

namespace ssmkernels::cuda {

template <class Real>
int64_t leave_one_edge_out_workspace(const LeaveOneEdgeOut<Real>&, bool with_gradients);  // bytes
template <class Real>
const char* leave_one_edge_out(const LeaveOneEdgeOut<Real>&, Real* dissimilarity, void* workspace, CudaStream);
template <class Real>
const char* leave_one_edge_out_backward(const LeaveOneEdgeOut<Real>&, const LeaveOneEdgeOutBackward<Real>&,
                                        void* workspace, CudaStream);

}  // namespace ssmkernels::cuda
