// SPDX-License-Identifier: BSD-3-Clause
// Unfold of SimMatch (CVPR 2022), equations (7) and (8): the calibrated instance similarities, materialised.
//
//   s = query·bankᵀ/t,  unfolded_j = e^{s_j} p[y_j] / Σ_k e^{s_k} p[y_k]
// Where p is zero on every class of the bank, unfolded = softmax(s).
#pragma once

#include "../common/isa.h"
#include "../common/parallel_for.h"
#include "bank.h"

namespace ssmkernels {

template <class Storage>
struct Unfold {
  const Storage* query;           // [B, D], rows contiguous
  const Compute<Storage>* probs;  // [B, L], rows contiguous, >= 0
  Bank<Storage> bank;
  int64_t rows;  // B
  double temperature;
  bool allow_tf32;             // CUDA only
  Compute<Storage>* unfolded;  // [B, K]  out
};

}  // namespace ssmkernels

SSM_PER_ISA(template <class Storage> void unfold(const Unfold<Storage>&, ParallelFor);)

namespace ssmkernels::cuda {

template <class Storage>
int64_t unfold_workspace(const Unfold<Storage>&);  // bytes
template <class Storage>
const char* unfold(const Unfold<Storage>&, void* workspace, CudaStream);

}  // namespace ssmkernels::cuda
