// SPDX-License-Identifier: BSD-3-Clause
#include "../kernels/ranking/similarity_moments.h"

#include "ranking.h"

namespace ssmkernels::binding {
namespace {

struct LabeledTensors {
  Tensor features, order, labels;

  LabeledTensors(const Tensor& features_in, const Tensor& order_in, const Tensor& labels_in)
      : features(as_contiguous(features_in)), order(as_contiguous(order_in)), labels(as_contiguous(labels_in)) {
    STD_TORCH_CHECK(features.dim() == 2, "features must be [n, d]");
    check_label_order(order, labels, "order", features);
  }

  Threads threads() const {
    const double count = static_cast<double>(features.size(0)), dim = static_cast<double>(features.size(1));
    return Threads(2 * count * dim * (count < dim ? count : dim));
  }

  template <class Storage>
  LabeledFeatures<Storage> view() const {
    return {data<Storage>(features), data<int64_t>(order), data<int64_t>(labels), features.size(0), features.size(1)};
  }
};

template <class Cpu, class Cuda>
void run_moments(const LabeledTensors& in, const char* op, bool backward, const Cpu& cpu, const Cuda& cuda_call) {
  dispatch_dtype(in.features, [&](auto storage) {
    using Storage = decltype(storage);
    const LabeledFeatures<Storage> features = in.view<Storage>();
    run_on_device(
        in.features, op,
        [&] {
          if constexpr (std::is_same_v<Storage, Compute<Storage>>)
            cpu(features);
          else
            STD_TORCH_CHECK(false, op, ": half types are float32 on the CPU");
        },
        [&](CudaStream stream) -> const char* {
          if constexpr (kWithCuda) {
            const Tensor workspace =
                new_tensor(in.features, {cuda::similarity_moments_workspace(features, backward)}, ScalarType::Byte);
            return cuda_call(features, data<void>(workspace), stream);
          } else {
            return nullptr;
          }
        });
  });
}

Tensor similarity_moments_op(const Tensor& features, const Tensor& order, const Tensor& labels) {
  const LabeledTensors in(features, order, labels);
  const Tensor moments = new_tensor(in.features, {4}, compute_dtype(in.features));
  run_moments(
      in, "similarity_moments", false,
      [&]<class Real>(const LabeledFeatures<Real>& view) {
        SSM_CALL_ISA(similarity_moments, view, data<Real>(moments), in.threads());
      },
      [&]<class Storage>(const LabeledFeatures<Storage>& view, void* workspace, CudaStream stream) {
        if constexpr (kWithCuda)
          return cuda::similarity_moments(view, data<Compute<Storage>>(moments), workspace, stream);
      });
  return moments;
}

Tensor similarity_moments_backward_op(const Tensor& grad_moments, const Tensor& features, const Tensor& order,
                                      const Tensor& labels, const Tensor& moments) {
  const LabeledTensors in(features, order, labels);
  const ScalarType dtype = compute_dtype(in.features);
  for (const auto& [tensor, name] : {std::pair{grad_moments, "grad_moments"}, std::pair{moments, "moments"}}) {
    check_shape(tensor, name, 4);
    check_like(tensor, name, dtype, in.features);
  }
  const Tensor grad = as_contiguous(grad_moments), values = as_contiguous(moments);
  Tensor out = new_tensor(in.features, {in.features.size(0), in.features.size(1)}, dtype);
  if (!out.is_cpu()) torch::stable::zero_(out);  // on the CPU every row is written, see check_label_order
  run_moments(
      in, "similarity_moments_backward", true,
      [&]<class Real>(const LabeledFeatures<Real>& view) {
        SSM_CALL_ISA(similarity_moments_backward, view, data<Real>(values), data<Real>(grad), data<Real>(out),
                     in.threads());
      },
      [&]<class Storage>(const LabeledFeatures<Storage>& view, void* workspace, CudaStream stream) {
        if constexpr (kWithCuda) {
          using Real = Compute<Storage>;
          return cuda::similarity_moments_backward(view, data<Real>(values), data<Real>(grad), data<Real>(out),
                                                   workspace, stream);
        }
      });
  return out;
}

STABLE_TORCH_LIBRARY_FRAGMENT(ssmkernels, library) {
  library.def("similarity_moments(Tensor features, Tensor order, Tensor labels) -> Tensor moments");
  library.def(
      "similarity_moments_backward(Tensor grad_moments, Tensor features, Tensor order, Tensor labels, Tensor moments) "
      "-> Tensor grad_features");
}
SSM_REGISTER("similarity_moments", similarity_moments_op)
SSM_REGISTER("similarity_moments_backward", similarity_moments_backward_op)

}  // namespace
}  // namespace ssmkernels::binding
