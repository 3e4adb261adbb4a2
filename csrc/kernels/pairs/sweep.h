// SPDX-License-Identifier: BSD-3-Clause
// The walk over pairs that every CPU kernel of the family takes: hidden units and logits of a few pairs at a time, in
// cache.
#pragma once

#include "../common/parallel_for.h"
#include "pair_network.h"

#ifndef SSM_ISA
#error "CPU kernels are compiled once per instruction set, with SSM_ISA naming it"
#endif

namespace ssmkernels::SSM_ISA {

// Consecutive pairs: (row, column), (row, column + 1), … or, from a list, pairs[0], pairs[1], …
struct PairSpan {
  const int64_t* pairs;  // [count, 2], or null
  int64_t row, column;
  int64_t offset;  // of the first one among all pairs
  int64_t count;   // at most kSpan
  int64_t task;    // a task meets its pairs in the same order in every run

  int64_t x_row(int64_t k) const {
    return pairs ? pairs[2 * k] : row;
  }
  int64_t y_row(int64_t k) const {
    return pairs ? pairs[2 * k + 1] : column + k;
  }
};

template <class Real>
static inline bool is_valid(const PairNetwork<Real>& network, const PairSpan& span, int64_t k) {
  const int64_t i = span.x_row(k), j = span.y_row(k);
  return i >= 0 && i < network.x_rows && j >= 0 && j < network.y_rows;
}

inline constexpr int64_t kSpan = 64;
inline constexpr int64_t kMaxTasks = 64;  // how far the walk is cut: by shape alone

// Told the logits of a span, in `values`; when gradients are wanted, it leaves ∂L/∂logit in their place.
template <class Real>
using PairHead = FunctionRef<void(const PairSpan&, Real* values)>;

// For φ = [x, y]: concat.cpp; for |x − y| and x∘y: interaction.cpp. Without `with_logits`, the head is given nothing
// and gives ∂L/∂logit.
template <class Real>
void concat_logits(const PairNetwork<Real>&, PairHead<Real>, ParallelFor);
template <class Real>
void concat_gradients(const PairNetwork<Real>&, bool with_logits, PairHead<Real>, const PairGradients<Real>&,
                      ParallelFor);
template <class Real>
void interaction_logits(const PairNetwork<Real>&, PairHead<Real>, ParallelFor);
template <class Real>
void interaction_gradients(const PairNetwork<Real>&, bool with_logits, PairHead<Real>, const PairGradients<Real>&,
                           ParallelFor);

template <class Real>
static inline void sweep_logits(const PairNetwork<Real>& network, PairHead<Real> head, ParallelFor parallel_for) {
  if (network.interaction == Interaction::concat) return concat_logits(network, head, parallel_for);
  interaction_logits(network, head, parallel_for);
}

template <class Real>
static inline void sweep_gradients(const PairNetwork<Real>& network, bool with_logits, PairHead<Real> head,
                                   const PairGradients<Real>& out, ParallelFor parallel_for) {
  if (network.interaction == Interaction::concat)
    return concat_gradients(network, with_logits, head, out, parallel_for);
  interaction_gradients(network, with_logits, head, out, parallel_for);
}

}  // namespace ssmkernels::SSM_ISA
