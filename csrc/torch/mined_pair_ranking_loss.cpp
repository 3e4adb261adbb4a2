// SPDX-License-Identifier: BSD-3-Clause
#include "../kernels/ranking/mined_pair_ranking_loss.h"

#include "ranking.h"

namespace ssmkernels::binding {
namespace {

struct BasisTensors {
  Tensor features, thresholds;

  BasisTensors(const RankingTensors& in, const Tensor& features_in, const Tensor& thresholds_in)
      : features(as_contiguous(features_in)), thresholds(as_contiguous(thresholds_in)) {
    STD_TORCH_CHECK(features.dim() == 2 && features.size(0) == in.rows.size(0), "basis_features must be [",
                    in.rows.size(0), ", k]");
    check_like(features, "basis_features", in.rows.scalar_type(), in.rows);
    check_shape(thresholds, "thresholds", 2);
    check_like(thresholds, "thresholds", compute_dtype(in.rows), in.rows);
  }

  template <class Storage>
  RankingBasis<Storage> view() const {
    return {data<Storage>(features), features.size(1), data<Compute<Storage>>(thresholds)};
  }
};

RankingLossTensors mined_pair_ranking_loss_op(const Tensor& embeddings, const Tensor& basis_features,
                                              const Tensor& thresholds, double positive_margin, double negative_margin,
                                              int64_t reduction) {
  const RankingTensors in(embeddings, std::nullopt, positive_margin, negative_margin);
  const BasisTensors basis(in, basis_features, thresholds);
  const RankingLossTensors out = new_ranking_loss(in);
  run_ranking(
      in, "mined_pair_ranking_loss", basis_features.size(1), false,
      [&]<class Real>(const RankingPairs<Real>& pairs) {
        SSM_CALL_ISA(mined_pair_ranking_loss, pairs, basis.view<Real>(), ranking_loss_view<Real>(out, reduction),
                     in.threads(basis_features.size(1)));
      },
      [&]<class Storage>(const RankingPairs<Storage>& pairs, void* workspace, CudaStream stream) {
        if constexpr (kWithCuda) {
          const auto loss = ranking_loss_view<Compute<Storage>>(out, reduction);
          return cuda::mined_pair_ranking_loss(pairs, basis.view<Storage>(), loss, workspace, stream);
        }
      });
  return out;
}

Tensor mined_pair_ranking_loss_backward_op(const Tensor& grad_loss, const Tensor& embeddings,
                                           const Tensor& basis_features, const Tensor& thresholds,
                                           double positive_margin, double negative_margin, const Tensor& weights,
                                           const Tensor& active) {
  const RankingTensors in(embeddings, std::nullopt, positive_margin, negative_margin);
  const BasisTensors basis(in, basis_features, thresholds);
  const RankingGradientTensors out(in, grad_loss, weights, active);
  run_ranking(
      in, "mined_pair_ranking_loss_backward", basis_features.size(1), true,
      [&]<class Real>(const RankingPairs<Real>& pairs) {
        SSM_CALL_ISA(mined_pair_ranking_loss_backward, pairs, basis.view<Real>(), out.view<Real>(),
                     in.threads(basis_features.size(1)));
      },
      [&]<class Storage>(const RankingPairs<Storage>& pairs, void* workspace, CudaStream stream) {
        if constexpr (kWithCuda)
          return cuda::mined_pair_ranking_loss_backward(pairs, basis.view<Storage>(), out.view<Compute<Storage>>(),
                                                        workspace, stream);
      });
  return out.rows;
}

STABLE_TORCH_LIBRARY_FRAGMENT(ssmkernels, library) {
  library.def(
      "mined_pair_ranking_loss(Tensor embeddings, Tensor basis_features, Tensor thresholds, float positive_margin, "
      "float negative_margin, "
      "int reduction) -> (Tensor loss, Tensor weights, Tensor active)");
  library.def(
      "mined_pair_ranking_loss_backward(Tensor grad_loss, Tensor embeddings, Tensor basis_features, Tensor thresholds, "
      "float positive_margin, float negative_margin, Tensor weights, Tensor active) -> Tensor grad_embeddings");
}
SSM_REGISTER("mined_pair_ranking_loss", mined_pair_ranking_loss_op)
SSM_REGISTER("mined_pair_ranking_loss_backward", mined_pair_ranking_loss_backward_op)

}  // namespace
}  // namespace ssmkernels::binding
