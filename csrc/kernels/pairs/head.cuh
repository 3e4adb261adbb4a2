// SPDX-License-Identifier: BSD-3-Clause
// What is made of a pair once its logit is known.
#pragma once

#include "../common/cuda.cuh"
#include "pair_focal_loss.h"

namespace ssmkernels::cuda::pairs {

struct ListedPair {
  int64_t i, j;
  bool valid;
};

__device__ inline ListedPair listed_pair(const int64_t* pairs, int64_t at, int64_t x_rows, int64_t y_rows) {
  const int64_t i = pairs[2 * at], j = pairs[2 * at + 1];
  return {i, j, i >= 0 && i < x_rows && j >= 0 && j < y_rows};
}

// The value of a pair is its logit or, with labels, its focal loss.
template <class Real>
struct PairHead {
  FocalLoss focal;          // without labels: null
  Real* values;             // [n, m] or [p], or null
  const Real* grad_values;  // likewise; null: ∂L/∂value is *scale for every pair
  const double* scale;      // [1], or null for 1
  Real* total;              // [1] Σ values · scale, or null

  __host__ __device__ bool needs_logits() const {
    return focal.x_labels || values;
  }

  // Writes the value and adds it to `sum`; returns ∂L/∂logit.
  __device__ Real operator()(Real logit, int64_t i, int64_t j, int64_t offset, double& sum) const {
    Real value = logit, grad_logit = 1;
    if (focal.x_labels) focal_loss(focal.x_labels[i], focal.y_labels[j], logit, value, grad_logit);
    if (values) values[offset] = value;
    sum += value;
    if (grad_values) return grad_logit * grad_values[offset];
    return scale ? grad_logit * static_cast<Real>(*scale) : grad_logit;
  }

  __device__ void skip(int64_t offset) const {
    if (values) values[offset] = 0;
  }

 private:
  // FL and ∂FL/∂logit; both 0 where the pair does not count.
  __device__ void focal_loss(int64_t left, int64_t right, Real logit, Real& loss, Real& grad_logit) const {
    loss = grad_logit = 0;
    if (left == focal.ignored || right == focal.ignored) return;
    const bool same = left == right;
    const Real s = same ? logit : -logit, weight = static_cast<Real>(same ? focal.alpha_same : focal.alpha_other);
    const Real gamma = static_cast<Real>(focal.gamma), e = std::exp(-fabs(s)), inverse = 1 / (1 + e);
    const Real right_share = s > 0 ? inverse : e * inverse,
               wrong_share = s > 0 ? e * inverse : inverse;  // p_t and 1 − p_t
    const Real surprise = std::log1p(e) + max(-s, Real(0));  // −log p_t
    const Real power = gamma == 2 ? wrong_share * wrong_share : std::pow(wrong_share, gamma);
    loss = weight * power * surprise;
    grad_logit = (same ? -weight : weight) * power * (gamma * right_share * surprise + wrong_share);
  }
};

// Of the pairs a block has seen.
struct PairSums {
  double values;
  double grad_logits;
};

// Σ over the blocks, in their order: the total and ∂b2.
template <class Real>
__global__ void __launch_bounds__(256)
    finish_sums(const PairSums* sums, int64_t blocks, const double* scale, Real* total, Real* grad_b2) {
  SSM_SHARED(scratch, double[8]);
  double values = 0, grad_logits = 0;
  for (int64_t block = threadIdx.x; block < blocks; block += 256) {
    values += sums[block].values;
    grad_logits += sums[block].grad_logits;
  }
  values = block_sum<8>(values, scratch);
  grad_logits = block_sum<8>(grad_logits, scratch);
  if (threadIdx.x > 0) return;
  if (total) *total = static_cast<Real>(scale ? values * *scale : values);
  if (grad_b2) *grad_b2 = static_cast<Real>(grad_logits);
}

}  // namespace ssmkernels::cuda::pairs
