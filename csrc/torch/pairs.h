// SPDX-License-Identifier: BSD-3-Clause
// What the bindings of the pairs family share.
#pragma once

#include <array>

#include "../kernels/pairs/pair_logits.h"
#include "common.h"

namespace ssmkernels::binding {

inline Tensor new_like(const Tensor& like, Sizes size) {
  return new_tensor(like, size, like.scalar_type());
}

// A matrix in the memory of another one.
inline Tensor view_of(const Tensor& matrix, std::array<int64_t, 2> sizes, std::array<int64_t, 2> strides,
                      int64_t offset) {
  AtenTensorHandle view;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(matrix.get(), 2, sizes.data(), strides.data(), offset, &view));
  return Tensor(view);
}

// out = rows·weightᵀ + bias and out = a·b: the variants of torch's products that are given their result, which autocast
// leaves alone.
inline void linear_out(const Tensor& rows, const Tensor& weight, const Tensor& bias, const Tensor& out) {
  using torch::stable::detail::from;
  std::array<StableIValue, 4> stack{from(rows), from(weight), from(std::optional(bias)), from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "out", stack.data(), TORCH_ABI_VERSION));
  (void)torch::stable::detail::to<Tensor>(stack[0]);
}

inline Tensor transposed(const Tensor& matrix) {
  return view_of(matrix, {matrix.size(1), matrix.size(0)}, {matrix.stride(1), matrix.stride(0)}, 0);
}

inline void mm_out(const Tensor& a, const Tensor& b, const Tensor& out) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(a), from(b), from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  (void)torch::stable::detail::to<Tensor>(stack[0]);
}

// The similarity network and its pairs, contiguous, in the memory of the tensors. For "concat", what the kernels take
// as x and y are left [n, h] and right [m, h], the two parts of w1·[x_i, y_j] + b1 = left_i + right_j: two small matrix
// products of torch's.
struct PairTensors {
  Interaction interaction;
  Tensor x, y, w1, b1, w2, b2, pairs, left, right;

  PairTensors(const Tensor& x_in, const Tensor& y_in, const Tensor& w1_in, const Tensor& b1_in, const Tensor& w2_in,
              const Tensor& b2_in, const std::optional<Tensor>& pairs_in, int64_t interaction_in)
      : interaction(static_cast<Interaction>(interaction_in)),
        x(as_contiguous(x_in)),
        y(as_contiguous(y_in)),
        w1(as_contiguous(w1_in)),
        b1(as_contiguous(b1_in)),
        w2(as_contiguous(w2_in)),
        b2(b2_in) {
    STD_TORCH_CHECK(interaction_in >= 0 && interaction_in <= 2,
                    "interaction must be 0 (concat), 1 (absdiff) or 2 (product)");
    STD_TORCH_CHECK(x.dim() == 2 && y.dim() == 2 && x.size(1) == y.size(1), "x and y must be [n, d] and [m, d]");
    check_like(y, "y", x.scalar_type(), x);
    STD_TORCH_CHECK(w2.dim() == 1 && b2.dim() == 0, "w2 must be [h] and b2 []");
    check_like(w2, "w2", compute_dtype(x), x);
    check_like(b2, "b2", compute_dtype(x), x);
    check_shape(w1, "w1", w2.size(0), (is_concat() ? 2 : 1) * x.size(1));
    check_like(w1, "w1", x.scalar_type(), x);
    check_shape(b1, "b1", w2.size(0));
    check_like(b1, "b1", compute_dtype(x), x);
    if (pairs_in) {
      STD_TORCH_CHECK(pairs_in->dim() == 2 && pairs_in->size(1) == 2, "pairs must be [p, 2]");
      check_like(*pairs_in, "pairs", ScalarType::Long, x);
      pairs = as_contiguous(*pairs_in);
    }
    if (!is_concat()) return;
    STD_TORCH_CHECK(x.scalar_type() == compute_dtype(x), "for concat x, y and w1 must be float32 or float64");
    left = new_like(w2, {x.size(0), w2.size(0)});
    right = new_like(w2, {y.size(0), w2.size(0)});
    linear_out(x, half_of(w1, 0), b1, left);
    mm_out(y, transposed(half_of(w1, 1)), right);
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
            data<Storage>(is_concat() ? left : x),
            data<Storage>(is_concat() ? right : y),
            is_concat() ? nullptr : data<Storage>(w1),
            is_concat() ? nullptr : data<Real>(b1),
            data<Real>(w2),
            data<Real>(b2),
            list(),
            x.size(0),
            y.size(0),
            is_concat() ? w2.size(0) : x.size(1),
            w2.size(0),
            count()};
  }

  // A product for each pair, and with gradients three; for "concat" five operations a hidden unit instead, but threads
  // that wait for each other six times win little with them, so that they count for three.
  Threads threads(bool with_gradients) const {
    const double units = static_cast<double>(count()) * w2.size(0) * (is_concat() ? 1 : x.size(1));
    return Threads((with_gradients ? 3 : 1) * units);
  }

  // [n, m] or [p]
  Tensor new_values() const {
    if (is_listed()) return new_like(w2, {count()});
    return new_like(w2, {x.size(0), y.size(0)});
  }

  Tensor check_grad(const Tensor& grad) const {
    if (is_listed())
      check_shape(grad, "grad", count());
    else
      check_shape(grad, "grad", x.size(0), y.size(0));
    check_like(grad, "grad", w2.scalar_type(), w2);
    return as_contiguous(grad);
  }

  // The columns of w1 that meet x (0) or y (1).
  Tensor half_of(Tensor weight, int64_t which) const {
    return view_of(weight, {weight.size(0), x.size(1)}, {weight.size(1), 1}, which * x.size(1));
  }

 private:
  const int64_t* list() const {
    static constexpr int64_t empty[2] =
        {};  // the memory of a tensor without elements is null, which stands for all pairs
    if (!is_listed()) return nullptr;
    return count() > 0 ? data<int64_t>(pairs) : empty;
  }
};

// Gradients of x, y, w1, b1, w2 and b2; empty if they are not wanted. For "concat" the kernels give those of left and
// right, and `finish` makes the others of them.
struct PairGradientTensors {
  Tensor x, y, w1, b1, w2, b2, left, right;

  PairGradientTensors(const PairTensors& in, bool wanted) {
    const auto like = [&](const Tensor& tensor) {
      if (!wanted) return new_like(in.w2, {0});
      return tensor.dim() == 2 ? new_like(in.w2, {tensor.size(0), tensor.size(1)}) : new_like(in.w2, {tensor.size(0)});
    };
    x = like(in.x);
    y = like(in.y);
    w1 = like(in.w1);
    b1 = like(in.b1);
    w2 = like(in.w2);
    b2 = wanted ? new_like(in.w2, {}) : new_like(in.w2, {0});
    if (!wanted || !in.is_concat()) return;
    left = like(in.left);
    right = like(in.right);
  }

  template <class Real>
  PairGradients<Real> view() const {
    if (left.defined()) return {data<Real>(left), data<Real>(right), nullptr, nullptr, data<Real>(w2), data<Real>(b2)};
    return {data<Real>(x), data<Real>(y), data<Real>(w1), data<Real>(b1), data<Real>(w2), data<Real>(b2)};
  }

  // Of no pairs: exactly 0, where a NaN in the network would make products with 0 NaN.
  void set_zero() {
    for (Tensor* gradient : {&x, &y, &w1, &b1, &w2, &b2}) torch::stable::zero_(*gradient);
  }

  void finish(const PairTensors& in) {
    if (!left.defined()) return;
    mm_out(left, in.half_of(in.w1, 0), x);
    mm_out(right, in.half_of(in.w1, 1), y);
    mm_out(transposed(left), in.x, in.half_of(w1, 0));
    mm_out(transposed(right), in.y, in.half_of(w1, 1));
    const int64_t rows[] = {0};
    torch::stable::sum_out(b1, left, rows);
  }

  auto tuple() const {
    return std::make_tuple(x, y, w1, b1, w2, b2);
  }
};

using PairGradientTuple = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Runs cpu(network) with a network of float32 or float64, or cuda(network, workspace, stream) with one of any dtype.
template <class Cpu, class Cuda>
void run_pairs(const PairTensors& in, const char* op, bool with_gradients, const Cpu& cpu, const Cuda& cuda_call) {
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
          if constexpr (kWithCuda) {
            const Tensor workspace =
                new_tensor(in.x, {cuda::pair_workspace(network, with_gradients)}, ScalarType::Byte);
            return cuda_call(network, data<void>(workspace), stream);
          } else {
            return nullptr;
          }
        });
  });
}

}  // namespace ssmkernels::binding
