// SPDX-License-Identifier: BSD-3-Clause
#include "mined_pair_ranking_loss.h"
#include "pair_ranking_loss.h"
#include "ranking_sweep.cuh"

namespace ssmkernels::cuda {

template <class Storage>
int64_t ranking_workspace(const RankingPairs<Storage>& pairs, int64_t basis_dim, bool backward) {
  Workspace workspace(nullptr);
  ranking::take_ranking(pairs, basis_dim, backward, workspace);
  return workspace.bytes();
}

template <class Storage>
const char* pair_ranking_loss(const RankingPairs<Storage>& pairs, const RankingLabels& labels,
                              const RankingLoss<Compute<Storage>>& out, void* workspace, CudaStream stream) {
  return ranking::run_loss<Storage, false>(pairs, labels, {}, out, workspace, stream);
}

template <class Storage>
const char* pair_ranking_loss_backward(const RankingPairs<Storage>& pairs, const RankingLabels& labels,
                                       const RankingGradients<Compute<Storage>>& out, void* workspace,
                                       CudaStream stream) {
  return ranking::run_gradients<Storage, false>(pairs, labels, {}, out, workspace, stream);
}

#define SSM_INSTANTIATE(Storage)                                                                      \
  template int64_t ranking_workspace(const RankingPairs<Storage>&, int64_t, bool);                    \
  template const char* pair_ranking_loss(const RankingPairs<Storage>&, const RankingLabels&,          \
                                         const RankingLoss<Compute<Storage>>&, void*, CudaStream);    \
  template const char* pair_ranking_loss_backward(const RankingPairs<Storage>&, const RankingLabels&, \
                                                  const RankingGradients<Compute<Storage>>&, void*, CudaStream);
SSM_INSTANTIATE(float)
SSM_INSTANTIATE(double)
SSM_INSTANTIATE(bfloat16)
SSM_INSTANTIATE(float16)

}  // namespace ssmkernels::cuda
