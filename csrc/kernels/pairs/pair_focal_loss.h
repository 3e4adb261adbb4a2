// SPDX-License-Identifier: BSD-3-Clause
// Focal loss on pairs, MLSN (2020), equations (1) to (3) and section 2.3: the target t of a pair is whether its labels
// match; a pair with an ignored label counts nowhere.
//
//   FL = −α_t (1 − p_t)^γ log p_t,   p_t = σ(s), s = ±logit, α_t = α or 1 − α
//   ∂FL/∂s = −α_t (1 − p_t)^γ (γ p_t softplus(−s) + 1 − p_t)
#pragma once

#include "../common/isa.h"
#include "../common/parallel_for.h"
#include "pair_network.h"

namespace ssmkernels {

struct FocalLoss {
  const int64_t* x_labels;  // [n]
  const int64_t* y_labels;  // [m]
  int64_t ignored;
  double alpha_same;   // α; 1 without balancing
  double alpha_other;  // 1 − α; 1 without balancing
  double gamma;        // γ >= 0
};

// Sum of the losses, or their mean over the pairs that count (0 if none does), and its gradients if they are wanted.
template <class Real>
struct FocalLossSum {
  bool mean;
  Real* loss;                            // [1] out
  const PairGradients<Real>* gradients;  // null when not wanted
};

}  // namespace ssmkernels

SSM_PER_ISA(template <class Real>
            void pair_focal_loss(const PairNetwork<Real>&, const FocalLoss&, Real* losses, ParallelFor);
            template <class Real>
            void pair_focal_loss_backward(const PairNetwork<Real>&, const FocalLoss&, const Real* grad_losses,
                                          const PairGradients<Real>&, ParallelFor);
            template <class Real> void pair_focal_loss_sum(const PairNetwork<Real>&, const FocalLoss&,
                                                           const FocalLossSum<Real>&, ParallelFor);)

namespace ssmkernels::cuda {

template <class Storage>
const char* pair_focal_loss(const PairNetwork<Storage>&, const FocalLoss&, Compute<Storage>* losses, void* workspace,
                            CudaStream);
template <class Storage>
const char* pair_focal_loss_backward(const PairNetwork<Storage>&, const FocalLoss&, const Compute<Storage>* grad_losses,
                                     const PairGradients<Compute<Storage>>&, void* workspace, CudaStream);
template <class Storage>
const char* pair_focal_loss_sum(const PairNetwork<Storage>&, const FocalLoss&, const FocalLossSum<Compute<Storage>>&,
                                void* workspace, CudaStream);

}  // namespace ssmkernels::cuda
