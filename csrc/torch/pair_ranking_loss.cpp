// SPDX-License-Identifier: BSD-3-Clause
#include "../kernels/ranking/pair_ranking_loss.h"

#include "ranking.h"

namespace ssmkernels::binding {
namespace {

// The order of the rows by label, and their labels in it.
struct LabelTensors {
  Tensor order, labels, reference_order, reference_labels;

  LabelTensors(const RankingTensors& in, const Tensor& order_in, const Tensor& labels_in,
               const std::optional<Tensor>& reference_order_in, const std::optional<Tensor>& reference_labels_in)
      : order(as_contiguous(order_in)), labels(as_contiguous(labels_in)) {
    check_label_order(order, labels, "order", in.rows);
    const bool given = in.references.defined();
    STD_TORCH_CHECK(reference_order_in.has_value() == given && reference_labels_in.has_value() == given,
                    "reference_order and reference_labels come with references");
    if (!given) return;
    reference_order = as_contiguous(*reference_order_in);
    reference_labels = as_contiguous(*reference_labels_in);
    check_label_order(reference_order, reference_labels, "reference_order", in.references);
  }

  RankingLabels view() const {
    static constexpr int64_t none[1] = {};
    const auto of = [](const Tensor& tensor) -> const int64_t* {
      return !tensor.defined() ? nullptr : tensor.numel() > 0 ? data<int64_t>(tensor) : none;
    };
    return {of(order), of(labels), of(reference_order), of(reference_labels)};
  }
};

RankingLossTensors pair_ranking_loss_op(const Tensor& embeddings, const Tensor& order, const Tensor& labels,
                                        const std::optional<Tensor>& references,
                                        const std::optional<Tensor>& reference_order,
                                        const std::optional<Tensor>& reference_labels, double positive_margin,
                                        double negative_margin, int64_t reduction) {
  const RankingTensors in(embeddings, references, positive_margin, negative_margin);
  const LabelTensors by_label(in, order, labels, reference_order, reference_labels);
  const RankingLossTensors out = new_ranking_loss(in);
  run_ranking(
      in, "pair_ranking_loss", 0, false,
      [&]<class Real>(const RankingPairs<Real>& pairs) {
        SSM_CALL_ISA(pair_ranking_loss, pairs, by_label.view(), ranking_loss_view<Real>(out, reduction), in.threads(0));
      },
      [&]<class Storage>(const RankingPairs<Storage>& pairs, void* workspace, CudaStream stream) {
        if constexpr (kWithCuda)
          return cuda::pair_ranking_loss(pairs, by_label.view(), ranking_loss_view<Compute<Storage>>(out, reduction),
                                         workspace, stream);
      });
  return out;
}

std::tuple<Tensor, Tensor> pair_ranking_loss_backward_op(const Tensor& grad_loss, const Tensor& embeddings,
                                                         const Tensor& order, const Tensor& labels,
                                                         const std::optional<Tensor>& references,
                                                         const std::optional<Tensor>& reference_order,
                                                         const std::optional<Tensor>& reference_labels,
                                                         double positive_margin, double negative_margin,
                                                         const Tensor& weights, const Tensor& active) {
  const RankingTensors in(embeddings, references, positive_margin, negative_margin);
  const LabelTensors by_label(in, order, labels, reference_order, reference_labels);
  const RankingGradientTensors out(in, grad_loss, weights, active);
  run_ranking(
      in, "pair_ranking_loss_backward", 0, true,
      [&]<class Real>(const RankingPairs<Real>& pairs) {
        SSM_CALL_ISA(pair_ranking_loss_backward, pairs, by_label.view(), out.view<Real>(), in.threads(0));
      },
      [&]<class Storage>(const RankingPairs<Storage>& pairs, void* workspace, CudaStream stream) {
        if constexpr (kWithCuda)
          return cuda::pair_ranking_loss_backward(pairs, by_label.view(), out.view<Compute<Storage>>(), workspace,
                                                  stream);
      });
  return {out.rows, out.references};
}

STABLE_TORCH_LIBRARY_FRAGMENT(ssmkernels, library) {
  library.def(
      "pair_ranking_loss(Tensor embeddings, Tensor order, Tensor labels, Tensor? references, Tensor? reference_order, "
      "Tensor? reference_labels, float positive_margin, float negative_margin, int reduction) -> (Tensor loss, Tensor "
      "weights, "
      "Tensor active)");
  library.def(
      "pair_ranking_loss_backward(Tensor grad_loss, Tensor embeddings, Tensor order, Tensor labels, Tensor? "
      "references, "
      "Tensor? reference_order, Tensor? reference_labels, float positive_margin, float negative_margin, Tensor "
      "weights, Tensor active) "
      "-> (Tensor grad_embeddings, Tensor grad_references)");
}
SSM_REGISTER("pair_ranking_loss", pair_ranking_loss_op)
SSM_REGISTER("pair_ranking_loss_backward", pair_ranking_loss_backward_op)

}  // namespace
}  // namespace ssmkernels::binding
