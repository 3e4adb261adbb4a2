// SPDX-License-Identifier: BSD-3-Clause
#include "../kernels/graph/leave_one_edge_out.h"

#include "graph.h"

namespace ssmkernels::binding {
namespace {

constexpr int kOperations = 25;  // a pair takes 45

struct Inputs {
  GraphTensors graph;
  Tensor reverse, weight, propagated;
  double logit_scale;

  Inputs(const Tensor& crow, const Tensor& col, const Tensor& reverse_in, const Tensor& weight_in,
         const Tensor& propagated_in, double scale)
      : graph(crow, col, propagated_in),
        reverse(as_contiguous(reverse_in)),
        weight(check_vector(weight_in, "weight", graph.edges(), propagated_in)),
        logit_scale(scale) {
    STD_TORCH_CHECK(propagated_in.dim() == 2 && propagated_in.size(1) >= 2, "propagated must be [N, C], C >= 2");
    propagated = check_matrix(propagated_in, "propagated", graph.nodes(), propagated_in.size(1), propagated_in);
    check_shape(reverse, "reverse", graph.edges());
    check_like(reverse, "reverse", ScalarType::Long, propagated);
  }

  template <class Real>
  LeaveOneEdgeOut<Real> problem() const {
    return {graph.view(),           data<int64_t>(reverse), data<Real>(weight),
            data<Real>(propagated), propagated.size(1),     logit_scale};
  }

  Threads threads(int operations) const {
    return graph.threads(operations, propagated.size(1));
  }

  template <class Real>
  Tensor workspace(bool with_gradients) const {
    return new_tensor(weight, {cuda::leave_one_edge_out_workspace(problem<Real>(), with_gradients)}, ScalarType::Byte);
  }
};

Tensor leave_one_edge_out_op(const Tensor& crow, const Tensor& col, const Tensor& reverse, const Tensor& weight,
                             const Tensor& propagated, double logit_scale) {
  const Inputs in(crow, col, reverse, weight, propagated, logit_scale);
  Tensor dissimilarity = new_tensor(weight, {in.graph.edges()}, weight.scalar_type());
  if (in.graph.edges() == 0) return dissimilarity;
  dispatch_real(weight, [&](auto real) {
    using Real = decltype(real);
    run_on_device(
        weight, "leave_one_edge_out",
        [&] {
          SSM_CALL_ISA(leave_one_edge_out, in.problem<Real>(), data<Real>(dissimilarity), in.threads(kOperations));
        },
        [&](CudaStream stream) {
          if constexpr (kWithCuda)
            return cuda::leave_one_edge_out(in.problem<Real>(), data<Real>(dissimilarity),
                                            data<void>(in.workspace<Real>(false)), stream);
        });
  });
  return dissimilarity;
}

std::tuple<Tensor, Tensor> leave_one_edge_out_backward_op(const Tensor& grad_dissimilarity, const Tensor& crow,
                                                          const Tensor& col, const Tensor& reverse,
                                                          const Tensor& weight, const Tensor& propagated,
                                                          double logit_scale) {
  const Inputs in(crow, col, reverse, weight, propagated, logit_scale);
  const Tensor grad = check_vector(grad_dissimilarity, "grad_dissimilarity", in.graph.edges(), weight);
  Tensor grad_weight = new_tensor(weight, {in.graph.edges()}, weight.scalar_type());
  Tensor grad_propagated = new_tensor(weight, {in.graph.nodes(), propagated.size(1)}, weight.scalar_type());
  if (in.graph.nodes() == 0) return {grad_weight, grad_propagated};
  dispatch_real(weight, [&](auto real) {
    using Real = decltype(real);
    const LeaveOneEdgeOutBackward<Real> backward{data<Real>(grad), data<Real>(grad_weight),
                                                 data<Real>(grad_propagated)};
    run_on_device(
        weight, "leave_one_edge_out_backward",
        [&] { SSM_CALL_ISA(leave_one_edge_out_backward, in.problem<Real>(), backward, in.threads(2 * kOperations)); },
        [&](CudaStream stream) {
          if constexpr (kWithCuda)
            return cuda::leave_one_edge_out_backward(in.problem<Real>(), backward, data<void>(in.workspace<Real>(true)),
                                                     stream);
        });
  });
  return {grad_weight, grad_propagated};
}

STABLE_TORCH_LIBRARY_FRAGMENT(ssmkernels, library) {
  library.def(
      "leave_one_edge_out(Tensor crow, Tensor col, Tensor reverse, Tensor weight, Tensor propagated, float "
      "logit_scale) -> Tensor "
      "dissimilarity");
  library.def(
      "leave_one_edge_out_backward(Tensor grad_dissimilarity, Tensor crow, Tensor col, Tensor reverse, Tensor weight, "
      "Tensor propagated, "
      "float logit_scale) -> (Tensor grad_weight, Tensor grad_propagated)");
}
SSM_REGISTER("leave_one_edge_out", leave_one_edge_out_op)
SSM_REGISTER("leave_one_edge_out_backward", leave_one_edge_out_backward_op)

}  // namespace
}  // namespace ssmkernels::binding
