// SPDX-License-Identifier: BSD-3-Clause
// The ranking loss with positives and negatives by labels: pairs with equal ones are positives, the others negatives.
#pragma once

#include "../common/isa.h"
#include "../common/parallel_for.h"
#include "ranking_pairs.h"

namespace ssmkernels {

// Rows are visited in the order of their labels, so that positives lie in few tiles.
struct RankingLabels {
  const int64_t* order;             // [n] rows by label
  const int64_t* labels;            // [n] ascending: label of row order[i]
  const int64_t* reference_order;   // [m], null without references
  const int64_t* reference_labels;  // [m], null without references
};

}  // namespace ssmkernels

SSM_PER_ISA(template <class Real> void pair_ranking_loss(const RankingPairs<Real>&, const RankingLabels&,
                                                         const RankingLoss<Real>&, ParallelFor);
            template <class Real> void pair_ranking_loss_backward(const RankingPairs<Real>&, const RankingLabels&,
                                                                  const RankingGradients<Real>&, ParallelFor);)

namespace ssmkernels::cuda {

template <class Storage>
const char* pair_ranking_loss(const RankingPairs<Storage>&, const RankingLabels&, const RankingLoss<Compute<Storage>>&,
                              void* workspace, CudaStream);
template <class Storage>
const char* pair_ranking_loss_backward(const RankingPairs<Storage>&, const RankingLabels&,
                                       const RankingGradients<Compute<Storage>>&, void* workspace, CudaStream);

}  // namespace ssmkernels::cuda
