// SPDX-License-Identifier: BSD-3-Clause
// Aggregate of SimMatch (CVPR 2022), equation (9): class sums of the instance similarities, differentiable in the
// query.
//
//   s = query·bankᵀ/t,  q = softmax(s),  aggregated[c] = Σ_{j: y_j = c} q_j
//   ∂/∂query of Σ_c g_c aggregated[c] = Σ_j q_j (g[y_j] − Σ_c g_c aggregated[c]) bank_j / t
// The backward sweeps the bank again with the log-normaliser that the forward left: nothing of size B×K is stored.
// A slot whose label is outside [0, L) counts in the normaliser and in no class (its g is 0).
#pragma once

#include "../common/isa.h"
#include "../common/parallel_for.h"
#include "bank.h"

namespace ssmkernels {

template <class Storage>
struct Aggregate {
  const Storage* query;  // [B, D], rows contiguous
  Bank<Storage> bank;
  int64_t rows;  // B
  double temperature;
  bool allow_tf32;  // CUDA only
};

template <class Real>
struct AggregateResult {
  Real* aggregated;      // [B, L]
  Real* log_normalizer;  // [B]  log Σ_j e^{s_j}
};

template <class Real>
struct AggregateBackward {
  const Real* grad_aggregated;  // [B, L], rows contiguous
  const Real* aggregated;       // [B, L], as the forward left it
  const Real* log_normalizer;   // [B]
  Real* grad_query;             // [B, D]  out
};

}  // namespace ssmkernels

SSM_PER_ISA(template <class Storage>
            void aggregate(const Aggregate<Storage>&, const AggregateResult<Compute<Storage>>&, ParallelFor);
            template <class Storage> void aggregate_backward(const Aggregate<Storage>&,
                                                             const AggregateBackward<Compute<Storage>>&, ParallelFor);)

namespace ssmkernels::cuda {

template <class Storage>
int64_t aggregate_workspace(const Aggregate<Storage>&);  // bytes, forward and backward
template <class Storage>
const char* aggregate(const Aggregate<Storage>&, const AggregateResult<Compute<Storage>>&, void* workspace, CudaStream);
template <class Storage>
const char* aggregate_backward(const Aggregate<Storage>&, const AggregateBackward<Compute<Storage>>&, void* workspace,
                               CudaStream);

}  // namespace ssmkernels::cuda
