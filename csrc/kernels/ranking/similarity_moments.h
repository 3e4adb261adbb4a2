// SPDX-License-Identifier: BSD-3-Clause
// Means and variances of the cosines s_ij of pairs with equal and with different labels, SLADE (2021), equations (5)
// and (6), over all ordered pairs i ≠ j; population variances; 0 without such a pair.
//
// With unit rows r_i: Σ_ij s_ij = ‖Σ r‖² and Σ_ij s_ij² = ‖RᵀR‖²_F, within a class and in total, so that with n > d no
// n×n matrix is needed. ∂L/∂r_i = 2 Σ_{j≠i} (α + β s_ij) r_j with α, β of the pair's kind: 2 (α Σ r + β RᵀR r_i), less
// the pair (i, i).
#pragma once

#include <cstdint>

#include "../common/dtype.h"
#include "../common/isa.h"
#include "../common/parallel_for.h"
#include "../common/stream.h"

namespace ssmkernels {

template <class Storage>
struct LabeledFeatures {
  const Storage* features;  // [n, d], contiguous rows, not normalised
  const int64_t* order;     // [n] rows by label
  const int64_t* labels;    // [n] ascending: label of row order[i]
  int64_t count;            // n
  int64_t dim;              // d
};

}  // namespace ssmkernels

// moments, grad_moments [4]: positive mean, positive variance, negative mean, negative variance; grad_features [n, d].
SSM_PER_ISA(template <class Real> void similarity_moments(const LabeledFeatures<Real>&, Real* moments, ParallelFor);
            template <class Real>
            void similarity_moments_backward(const LabeledFeatures<Real>&, const Real* moments,
                                             const Real* grad_moments, Real* grad_features, ParallelFor);)

namespace ssmkernels::cuda {

template <class Storage>
int64_t similarity_moments_workspace(const LabeledFeatures<Storage>&, bool backward);  // bytes
template <class Storage>
const char* similarity_moments(const LabeledFeatures<Storage>&, Compute<Storage>* moments, void* workspace, CudaStream);
template <class Storage>
const char* similarity_moments_backward(const LabeledFeatures<Storage>&, const Compute<Storage>* moments,
                                        const Compute<Storage>* grad_moments, Compute<Storage>* grad_features,
                                        void* workspace, CudaStream);

}  // namespace ssmkernels::cuda
