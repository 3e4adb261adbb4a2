// SPDX-License-Identifier: BSD-3-Clause
// Logits of pairs, and their gradients. With g = ∂L/∂logit and s_ij = 1[w1·φ_ij + b1 > 0] [h]:
//   ∂w2 = Σ g relu(…),  ∂b2 = Σ g,  and with u_ij = g_ij w2∘s_ij:  ∂w1 = Σ u φᵀ,  ∂b1 = Σ u,  ∂φ = w1ᵀ u
// For concat, ∂A_i = Σ_j u_ij and ∂B_j = Σ_i u_ij: two masked additions per element, and ∂w2 = Σ_i A_i∘U_i + Σ_j
// B_j∘V_j of the same sums.
#pragma once

#include "../common/isa.h"
#include "../common/parallel_for.h"
#include "pair_network.h"

SSM_PER_ISA(template <class Real> void pair_logits(const PairNetwork<Real>&, Real* logits, ParallelFor);
            template <class Real> void pair_logits_backward(const PairNetwork<Real>&, const Real* grad_logits,
                                                            const PairGradients<Real>&, ParallelFor);)

// The CUDA kernels return null, or CUDA's message of what went wrong. `workspace` is device memory of the stated size;
// nothing synchronises.
namespace ssmkernels::cuda {

template <class Storage>
int64_t pair_workspace(const PairNetwork<Storage>&, bool with_gradients);  // bytes, for each kernel of the family
template <class Storage>
const char* pair_logits(const PairNetwork<Storage>&, Compute<Storage>* logits, void* workspace, CudaStream);
template <class Storage>
const char* pair_logits_backward(const PairNetwork<Storage>&, const Compute<Storage>* grad_logits,
                                 const PairGradients<Compute<Storage>>&, void* workspace, CudaStream);

}  // namespace ssmkernels::cuda
