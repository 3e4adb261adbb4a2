// SPDX-License-Identifier: BSD-3-Clause
#include "pairs.h"

namespace ssmkernels::binding {
namespace {

Tensor pair_logits_op(const Tensor& x, const Tensor& y, const Tensor& w1, const Tensor& b1, const Tensor& w2,
                      const Tensor& b2, const std::optional<Tensor>& pairs, int64_t interaction) {
  const PairTensors in(x, y, w1, b1, w2, b2, pairs, interaction);
  Tensor logits = in.new_values();
  if (in.count() == 0) return logits;
  run_pairs(
      in, "pair_logits", false,
      [&]<class Real>(const PairNetwork<Real>& network) {
        SSM_CALL_ISA(pair_logits, network, data<Real>(logits), in.threads(false));
      },
      [&]<class Storage>(const PairNetwork<Storage>& network, void* workspace, CudaStream stream) {
        if constexpr (kWithCuda) return cuda::pair_logits(network, data<Compute<Storage>>(logits), workspace, stream);
      });
  return logits;
}

PairGradientTuple pair_logits_backward_op(const Tensor& grad_logits, const Tensor& x, const Tensor& y, const Tensor& w1,
                                          const Tensor& b1, const Tensor& w2, const Tensor& b2,
                                          const std::optional<Tensor>& pairs, int64_t interaction) {
  const PairTensors in(x, y, w1, b1, w2, b2, pairs, interaction);
  const Tensor grad = in.check_grad(grad_logits);
  PairGradientTensors out(in, true);
  if (in.count() == 0) {
    out.set_zero();
    return out.tuple();
  }
  run_pairs(
      in, "pair_logits_backward", true,
      [&]<class Real>(const PairNetwork<Real>& network) {
        SSM_CALL_ISA(pair_logits_backward, network, data<Real>(grad), out.view<Real>(), in.threads(true));
      },
      [&]<class Storage>(const PairNetwork<Storage>& network, void* workspace, CudaStream stream) {
        if constexpr (kWithCuda) {
          using Real = Compute<Storage>;
          return cuda::pair_logits_backward(network, data<Real>(grad), out.view<Real>(), workspace, stream);
        }
      });
  out.finish(in);
  return out.tuple();
}

STABLE_TORCH_LIBRARY_FRAGMENT(ssmkernels, library) {
  library.def(
      "pair_logits(Tensor x, Tensor y, Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor? pairs, int interaction) -> "
      "Tensor logits");
  library.def(
      "pair_logits_backward(Tensor grad_logits, Tensor x, Tensor y, Tensor w1, Tensor b1, Tensor w2, Tensor b2, "
      "Tensor? pairs, "
      "int interaction) -> (Tensor grad_x, Tensor grad_y, Tensor grad_w1, Tensor grad_b1, Tensor grad_w2, Tensor "
      "grad_b2)");
}
SSM_REGISTER("pair_logits", pair_logits_op)
SSM_REGISTER("pair_logits_backward", pair_logits_backward_op)

}  // namespace
}  // namespace ssmkernels::binding
