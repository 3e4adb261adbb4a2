// SPDX-License-Identifier: BSD-3-Clause
// The ranking loss with mined positives and negatives, SLADE (2021), equation (7): P = {s_ij ≥ T1}, N = {s_ij ≤ T2},
// s_ij the cosine of the feature-basis vectors r_i and r_j (0 with a vector of zeros).
#pragma once

#include "../common/isa.h"
#include "../common/parallel_for.h"
#include "ranking_pairs.h"

namespace ssmkernels {

template <class Storage>
struct RankingBasis {
  const Storage* features;             // r [n, k], contiguous rows
  int64_t dim;                         // k
  const Compute<Storage>* thresholds;  // [2]: T1, T2
};

}  // namespace ssmkernels

SSM_PER_ISA(template <class Real> void mined_pair_ranking_loss(const RankingPairs<Real>&, const RankingBasis<Real>&,
                                                               const RankingLoss<Real>&, ParallelFor);
            template <class Real>
            void mined_pair_ranking_loss_backward(const RankingPairs<Real>&, const RankingBasis<Real>&,
                                                  const RankingGradients<Real>&, ParallelFor);)

namespace ssmkernels::cuda {

template <class Storage>
const char* mined_pair_ranking_loss(const RankingPairs<Storage>&, const RankingBasis<Storage>&,
                                    const RankingLoss<Compute<Storage>>&, void* workspace, CudaStream);
template <class Storage>
const char* mined_pair_ranking_loss_backward(const RankingPairs<Storage>&, const RankingBasis<Storage>&,
                                             const RankingGradients<Compute<Storage>>&, void* workspace, CudaStream);

}  // namespace ssmkernels::cuda
