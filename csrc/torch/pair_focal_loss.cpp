// SPDX-License-Identifier: BSD-3-Clause
#include "../kernels/pairs/pair_focal_loss.h"

#include "pairs.h"

namespace ssmkernels::binding {
namespace {

// The labels of x and y, and what is made of them.
struct FocalTensors {
  Tensor x_labels, y_labels;
  FocalLoss view;

  FocalTensors(const PairTensors& in, const Tensor& x_labels_in, const Tensor& y_labels_in, std::optional<double> alpha,
               double gamma, int64_t ignore_index)
      : x_labels(check_labels(x_labels_in, "x_labels", in.x)), y_labels(check_labels(y_labels_in, "y_labels", in.y)) {
    view = {data<int64_t>(x_labels), data<int64_t>(y_labels), ignore_index,
            alpha.value_or(1),       alpha ? 1 - *alpha : 1,  gamma};
  }

 private:
  static Tensor check_labels(const Tensor& labels, const char* name, const Tensor& rows) {
    check_shape(labels, name, rows.size(0));
    check_like(labels, name, ScalarType::Long, rows);
    return as_contiguous(labels);
  }
};

Tensor pair_focal_loss_op(const Tensor& x, const Tensor& y, const Tensor& x_labels, const Tensor& y_labels,
                          const Tensor& w1, const Tensor& b1, const Tensor& w2, const Tensor& b2,
                          const std::optional<Tensor>& pairs, int64_t interaction, std::optional<double> alpha,
                          double gamma, int64_t ignore_index) {
  const PairTensors in(x, y, w1, b1, w2, b2, pairs, interaction);
  const FocalTensors focal(in, x_labels, y_labels, alpha, gamma, ignore_index);
  Tensor losses = in.new_values();
  if (in.count() == 0) return losses;
  run_pairs(
      in, "pair_focal_loss", false,
      [&]<class Real>(const PairNetwork<Real>& network) {
        SSM_CALL_ISA(pair_focal_loss, network, focal.view, data<Real>(losses), in.threads(false));
      },
      [&]<class Storage>(const PairNetwork<Storage>& network, void* workspace, CudaStream stream) {
        if constexpr (kWithCuda)
          return cuda::pair_focal_loss(network, focal.view, data<Compute<Storage>>(losses), workspace, stream);
      });
  return losses;
}

PairGradientTuple pair_focal_loss_backward_op(const Tensor& grad_losses, const Tensor& x, const Tensor& y,
                                              const Tensor& x_labels, const Tensor& y_labels, const Tensor& w1,
                                              const Tensor& b1, const Tensor& w2, const Tensor& b2,
                                              const std::optional<Tensor>& pairs, int64_t interaction,
                                              std::optional<double> alpha, double gamma, int64_t ignore_index) {
  const PairTensors in(x, y, w1, b1, w2, b2, pairs, interaction);
  const FocalTensors focal(in, x_labels, y_labels, alpha, gamma, ignore_index);
  const Tensor grad = in.check_grad(grad_losses);
  PairGradientTensors out(in, true);
  if (in.count() == 0) {
    out.set_zero();
    return out.tuple();
  }
  run_pairs(
      in, "pair_focal_loss_backward", true,
      [&]<class Real>(const PairNetwork<Real>& network) {
        SSM_CALL_ISA(pair_focal_loss_backward, network, focal.view, data<Real>(grad), out.view<Real>(),
                     in.threads(true));
      },
      [&]<class Storage>(const PairNetwork<Storage>& network, void* workspace, CudaStream stream) {
        if constexpr (kWithCuda) {
          using Real = Compute<Storage>;
          return cuda::pair_focal_loss_backward(network, focal.view, data<Real>(grad), out.view<Real>(), workspace,
                                                stream);
        }
      });
  out.finish(in);
  return out.tuple();
}

// The sum or mean and, if wanted, its gradients, in one pass; they are empty if not.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> pair_focal_loss_sum_op(
    const Tensor& x, const Tensor& y, const Tensor& x_labels, const Tensor& y_labels, const Tensor& w1,
    const Tensor& b1, const Tensor& w2, const Tensor& b2, const std::optional<Tensor>& pairs, int64_t interaction,
    std::optional<double> alpha, double gamma, int64_t ignore_index, bool mean, bool with_gradients) {
  const PairTensors in(x, y, w1, b1, w2, b2, pairs, interaction);
  const FocalTensors focal(in, x_labels, y_labels, alpha, gamma, ignore_index);
  Tensor loss = new_tensor(in.w2, {}, in.w2.scalar_type());
  PairGradientTensors out(in, with_gradients);
  if (in.count() == 0) {
    torch::stable::zero_(loss);
    out.set_zero();
    return std::tuple_cat(std::make_tuple(loss), out.tuple());
  }
  run_pairs(
      in, "pair_focal_loss", with_gradients,
      [&]<class Real>(const PairNetwork<Real>& network) {
        const PairGradients<Real> gradients = out.view<Real>();
        const FocalLossSum<Real> sum{mean, data<Real>(loss), with_gradients ? &gradients : nullptr};
        SSM_CALL_ISA(pair_focal_loss_sum, network, focal.view, sum, in.threads(with_gradients));
      },
      [&]<class Storage>(const PairNetwork<Storage>& network, void* workspace, CudaStream stream) {
        if constexpr (kWithCuda) {
          using Real = Compute<Storage>;
          const PairGradients<Real> gradients = out.view<Real>();
          const FocalLossSum<Real> sum{mean, data<Real>(loss), with_gradients ? &gradients : nullptr};
          return cuda::pair_focal_loss_sum(network, focal.view, sum, workspace, stream);
        }
      });
  out.finish(in);
  return std::tuple_cat(std::make_tuple(loss), out.tuple());
}

STABLE_TORCH_LIBRARY_FRAGMENT(ssmkernels, library) {
  library.def(
      "pair_focal_loss(Tensor x, Tensor y, Tensor x_labels, Tensor y_labels, Tensor w1, Tensor b1, Tensor w2, Tensor "
      "b2, Tensor? pairs, "
      "int interaction, float? alpha, float gamma, int ignore_index) -> Tensor losses");
  library.def(
      "pair_focal_loss_backward(Tensor grad_losses, Tensor x, Tensor y, Tensor x_labels, Tensor y_labels, Tensor w1, "
      "Tensor b1, "
      "Tensor w2, Tensor b2, Tensor? pairs, int interaction, float? alpha, float gamma, int ignore_index) -> (Tensor "
      "grad_x, "
      "Tensor grad_y, Tensor grad_w1, Tensor grad_b1, Tensor grad_w2, Tensor grad_b2)");
  library.def(
      "pair_focal_loss_sum(Tensor x, Tensor y, Tensor x_labels, Tensor y_labels, Tensor w1, Tensor b1, Tensor w2, "
      "Tensor b2, "
      "Tensor? pairs, int interaction, float? alpha, float gamma, int ignore_index, bool mean, bool with_gradients) -> "
      "(Tensor loss, "
      "Tensor grad_x, Tensor grad_y, Tensor grad_w1, Tensor grad_b1, Tensor grad_w2, Tensor grad_b2)");
}
SSM_REGISTER("pair_focal_loss", pair_focal_loss_op)
SSM_REGISTER("pair_focal_loss_backward", pair_focal_loss_backward_op)
SSM_REGISTER("pair_focal_loss_sum", pair_focal_loss_sum_op)

}  // namespace
}  // namespace ssmkernels::binding
