// SPDX-License-Identifier: BSD-3-Clause
#include "mined_pair_ranking_loss.h"
#include "pair_ranking_loss.h"
#include "ranking_sweep.cuh"

namespace ssmkernels::cuda {

template <class Storage>
const char* mined_pair_ranking_loss(const RankingPairs<Storage>& pairs, const RankingBasis<Storage>& basis,
                                    const RankingLoss<Compute<Storage>>& out, void* workspace, CudaStream stream) {
  return ranking::run_loss<Storage, true>(pairs, {}, basis, out, workspace, stream);
}

template <class Storage>
const char* mined_pair_ranking_loss_backward(const RankingPairs<Storage>& pairs, const RankingBasis<Storage>& basis,
                                             const RankingGradients<Compute<Storage>>& out, void* workspace,
                                             CudaStream stream) {
  return ranking::run_gradients<Storage, true>(pairs, {}, basis, out, workspace, stream);
}

#define SSM_INSTANTIATE(Storage)                                                                                    \
  template const char* mined_pair_ranking_loss(const RankingPairs<Storage>&, const RankingBasis<Storage>&,          \
                                               const RankingLoss<Compute<Storage>>&, void*, CudaStream);            \
  template const char* mined_pair_ranking_loss_backward(const RankingPairs<Storage>&, const RankingBasis<Storage>&, \
                                                        const RankingGradients<Compute<Storage>>&, void*, CudaStream);
SSM_INSTANTIATE(float)
SSM_INSTANTIATE(double)
SSM_INSTANTIATE(bfloat16)
SSM_INSTANTIATE(float16)

}  // namespace ssmkernels::cuda
