// SPDX-License-Identifier: BSD-3-Clause
// Instance matching of SimMatch (CVPR 2022), equations (3)-(10), in one sweep over the bank.
//
// With w = query_weak·bankᵀ/t_w, s = query_strong·bankᵀ/t_s and y_j the class of slot j:
//   q^w = softmax(w)                                        (3)
//   q^s = softmax(s)                                        (4)
//   q̂_j = q^w_j p^w[y_j] / Σ_k q^w_k p^w[y_k]               (7), (8): unfold
//   q_agg[c] = Σ_{j: y_j = c} q^w_j                         (9): aggregate
//   p̂   = α p^w + (1 − α) q_agg                             (10)
//   loss = −Σ_j q̂_j log q^s_j = log Σ_j e^{s_j} − Σ_j q̂_j s_j
//   ∂loss/∂query_strong = (mˢ − m̂)/t_s,  mˢ = Σ_j q^s_j bank_j,  m̂ = Σ_j q̂_j bank_j
// Every sum over j is the mean of something under a softmax (of w, of w + log p^w[y], of s), so it is kept with its
// log-normaliser while the sweep goes on (online softmax), two parts of a bank merge by their log-normalisers, and
// nothing of size B×K is stored. Where p^w is zero on every class of the bank, q̂ = q^w.
#pragma once

#include "../common/isa.h"
#include "../common/parallel_for.h"
#include "bank.h"

namespace ssmkernels {

template <class Storage>
struct InstanceMatching {
  const Storage* query_weak;           // [B, D], rows contiguous
  const Storage* query_strong;         // [B, D], rows contiguous
  const Compute<Storage>* probs_weak;  // [B, L], rows contiguous, >= 0
  Bank<Storage> bank;
  int64_t rows;  // B
  double temperature_weak;
  double temperature_strong;
  bool allow_tf32;  // CUDA only: float32 products on the tensor cores, as torch's own setting says
};

// What is known after part of a bank: log-normalisers, and means under the distributions they normalise.
template <class Real>
struct InstanceMatchingPartial {
  Real* log_weak;      // [B]     log Σ_j e^{w_j}
  Real* log_target;    // [B]     log Σ_j e^{w_j} p^w[y_j]; −inf where p^w is zero on every class here, then q̂ is q^w
  Real* log_strong;    // [B]     log Σ_j e^{s_j}
  Real* aggregated;    // [B, L]  q_agg
  Real* target_logit;  // [B]     Σ_j q̂_j s_j
  Real* target_mean;   // [B, D]  m̂; null when no gradient is wanted
  Real* strong_mean;   // [B, D]  mˢ; null when no gradient is wanted
};

// What the user sees.
template <class Real>
struct InstanceMatchingResult {
  Real* pseudo_probs;  // [B, L]  p̂
  Real* loss;          // [B]
  Real* gradient;      // [B, D]  ∂loss/∂query_strong; null when not wanted
  double alpha;
};

}  // namespace ssmkernels

SSM_PER_ISA(template <class Storage>
            void instance_matching(const InstanceMatching<Storage>&, const InstanceMatchingResult<Compute<Storage>>&,
                                   ParallelFor);
            template <class Storage>
            void instance_matching_partial(const InstanceMatching<Storage>&,
                                           const InstanceMatchingPartial<Compute<Storage>>&, ParallelFor);)

// The CUDA kernels return null, or CUDA's message of what went wrong. `workspace` is device memory of the stated size;
// nothing synchronises.
namespace ssmkernels::cuda {

template <class Storage>
int64_t instance_matching_workspace(const InstanceMatching<Storage>&, bool with_gradient);  // bytes

template <class Storage>
const char* instance_matching(const InstanceMatching<Storage>&, const InstanceMatchingResult<Compute<Storage>>&,
                              void* workspace, CudaStream);
template <class Storage>
const char* instance_matching_partial(const InstanceMatching<Storage>&,
                                      const InstanceMatchingPartial<Compute<Storage>>&, void* workspace, CudaStream);

}  // namespace ssmkernels::cuda
