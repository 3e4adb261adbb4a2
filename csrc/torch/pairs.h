// SPDX-License-Identifier: BSD-3-Clause
// What the bindings of the pairs family share.
#pragma once

#include "../kernels/pairs/pair_logits.h"
#include "common.h"

namespace ssmkernels::binding {

using torch::stable::contiguous;
using PairGradientTensors =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;  // x, y, w1, b1, w2, b2; empty for what there is not

// The similarity network and its pairs, contiguous, in the memory of the tensors.
struct PairTensors {
  Interaction interaction;
  Tensor x, y, w1, b1, w2, b2, pairs;

  PairTensors(const Tensor& x_in, const Tensor& y_in, const std::optional<Tensor>& w1_in, const std::optional<Tensor>& b1_in,
              const Tensor& w2_in, const Tensor& b2_in, const std::optional<Tensor>& pairs_in, int64_t interaction_in)
      : interaction(static_cast<Interaction>(interaction_in)), x(contiguous(x_in)), y(contiguous(y_in)), w2(contiguous(w2_in)), b2(b2_in) {
    STD_TORCH_CHECK(interaction_in >= 0 && interaction_in <= 2, "interaction must be 0 (concat), 1 (absdiff) or 2 (product)");
    STD_TORCH_CHECK(x.dim() == 2 && y.dim() == 2 && x.size(1) == y.size(1), "x and y must be [n, d] and [m, d]");
    check_like(y, "y", x.scalar_type(), x);
    STD_TORCH_CHECK(w2.dim() == 1 && b2.dim() == 0, "w2 must be [h] and b2 []");
    check_like(w2, "w2", compute_dtype(x), x);
    check_like(b2, "b2", compute_dtype(x), x);
    if (is_concat()) {
      STD_TORCH_CHECK(!w1_in && !b1_in && w2.size(0) == x.size(1), "for concat x and y are [n, h] and [m, h], and there is no w1 or b1");
    } else {
      STD_TORCH_CHECK(w1_in && b1_in, "w1 and b1 are missing");
      check_shape(*w1_in, "w1", w2.size(0), x.size(1));
      check_like(*w1_in, "w1", x.scalar_type(), x);
      check_shape(*b1_in, "b1", w2.size(0));
      check_like(*b1_in, "b1", compute_dtype(x), x);
      w1 = contiguous(*w1_in);
      b1 = contiguous(*b1_in);
    }
    if (!pairs_in) return;
    STD_TORCH_CHECK(pairs_in->dim() == 2 && pairs_in->size(1) == 2, "pairs must be [p, 2]");
    check_like(*pairs_in, "pairs", ScalarType::Long, x);
    pairs = contiguous(*pairs_in);
  }

  bool is_concat() const {
    return interaction == Interaction::concat;
  }
  bool is_listed() const {
    return pairs.defined();
  }
  int64_t count() const {
    return is_listed() ? pairs.size(0) : x.size(0) * y.size(0);
  }

  template <class Storage>
  PairNetwork<Storage> view() const {
    using Real = Compute<Storage>;
    return {interaction,
            data<Storage>(x),
            data<Storage>(y),
            is_concat() ? nullptr : data<Storage>(w1),
            is_concat() ? nullptr : data<Real>(b1),
            data<Real>(w2),
            data<Real>(b2),
            list(),
            x.size(0),
            y.size(0),
            x.size(1),
            w2.size(0),
            count()};
  }

  // [n, m] or [p]
  Tensor new_values() const {
    if (is_listed()) return new_tensor(w2, {count()}, w2.scalar_type());
    return new_tensor(w2, {x.size(0), y.size(0)}, w2.scalar_type());
  }

  Tensor check_grad(const Tensor& grad) const {
    if (is_listed())
      check_shape(grad, "grad", count());
    else
      check_shape(grad, "grad", x.size(0), y.size(0));
    check_like(grad, "grad", w2.scalar_type(), w2);
    return contiguous(grad);
  }

  PairGradientTensors new_gradients() const {
    const auto like = [&](const Tensor& tensor) { return tensor.defined() ? new_like(tensor) : new_tensor(w2, {0}, w2.scalar_type()); };
    return {like(x), like(y), like(w1), like(b1), like(w2), new_tensor(w2, {}, w2.scalar_type())};
  }

 private:
  const int64_t* list() const {
    static constexpr int64_t empty[2] = {};  // the memory of a tensor without elements is null, which stands for all pairs
    if (!is_listed()) return nullptr;
    return count() > 0 ? data<int64_t>(pairs) : empty;
  }

  Tensor new_like(const Tensor& tensor) const {
    if (tensor.dim() == 1) return new_tensor(w2, {tensor.size(0)}, w2.scalar_type());
    return new_tensor(w2, {tensor.size(0), tensor.size(1)}, w2.scalar_type());
  }
};

template <class Real>
PairGradients<Real> gradients_view(const PairGradientTensors& tensors) {
  const auto& [x, y, w1, b1, w2, b2] = tensors;
  return {data<Real>(x), data<Real>(y), data<Real>(w1), data<Real>(b1), data<Real>(w2), data<Real>(b2)};
}

// Runs cpu(network) with a network of float32 or float64, or cuda(network, workspace, stream) with one of any dtype.
template <class Cpu, class Cuda>
void run_pairs(const PairTensors& in, const char* op, bool with_gradients, const Cpu& cpu, [[maybe_unused]] const Cuda& cuda_call) {
  dispatch_dtype(in.x, [&](auto storage) {
    using Storage = decltype(storage);
    const PairNetwork<Storage> network = in.view<Storage>();
    run_on_device(
        in.x, op,
        [&] {
          if constexpr (std::is_same_v<Storage, Compute<Storage>>)
            cpu(network);
          else
            STD_TORCH_CHECK(false, op, ": half types are float32 on the CPU");
        },
        [&](CudaStream stream) -> const char* {
#ifdef SSM_WITH_CUDA
          const Tensor workspace = new_tensor(in.x, {cuda::pair_workspace(network, with_gradients)}, ScalarType::Byte);
          return cuda_call(network, data<void>(workspace), stream);
#else
          return nullptr;
#endif
        });
  });
}

}  // namespace ssmkernels::binding
