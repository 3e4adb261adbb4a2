// SPDX-License-Identifier: BSD-3-Clause
#include "pair_logits.h"

#include "sweep.h"

namespace ssmkernels::SSM_ISA {

template <class Real>
void pair_logits(const PairNetwork<Real>& network, Real* logits, ParallelFor parallel_for) {
  const auto head = [&](const PairSpan& span, Real* values) {
    for (int64_t k = 0; k < span.count; ++k) logits[span.offset + k] = values[k];
  };
  sweep_logits<Real>(network, head, parallel_for);
}

template <class Real>
void pair_logits_backward(const PairNetwork<Real>& network, const Real* grad_logits,
                          const PairGradients<Real>& gradients, ParallelFor parallel_for) {
  const auto head = [&](const PairSpan& span, Real* values) {
    for (int64_t k = 0; k < span.count; ++k) values[k] = grad_logits[span.offset + k];
  };
  sweep_gradients<Real>(network, false, head, gradients, parallel_for);
}

#define SSM_INSTANTIATE(Real)                                                     \
  template void pair_logits(const PairNetwork<Real>&, Real* logits, ParallelFor); \
  template void pair_logits_backward(const PairNetwork<Real>&, const Real*, const PairGradients<Real>&, ParallelFor);
SSM_INSTANTIATE(float)
SSM_INSTANTIATE(double)

}  // namespace ssmkernels::SSM_ISA
