// SPDX-License-Identifier: BSD-3-Clause
// What the bindings of the graph family share.
#pragma once

#include "../kernels/graph/csr.h"
#include "common.h"

namespace ssmkernels::binding {

// Calls f(Real{}): the graph kernels store what they compute in, float32 or float64.
template <class F>
void dispatch_real(const Tensor& tensor, const F& f) {
  if (tensor.scalar_type() == ScalarType::Float) return f(float{});
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Double, "expected float32 or float64");
  return f(double{});
}

// crow [N + 1] int64 and col [E] int32, contiguous, in the memory of the tensors; on the CPU, where reading is free,
// crow is checked.
struct GraphTensors {
  Tensor crow, col;

  GraphTensors(const Tensor& crow_in, const Tensor& col_in, const Tensor& like)
      : crow(as_contiguous(crow_in)), col(as_contiguous(col_in)) {
    STD_TORCH_CHECK(crow.dim() == 1 && crow.size(0) > 0, "crow must be [N + 1]");
    STD_TORCH_CHECK(col.dim() == 1, "col must be [E]");
    check_like(crow, "crow", ScalarType::Long, like);
    check_like(col, "col", ScalarType::Int, like);
    if (!crow.is_cpu()) return;
    const int64_t* starts = data<int64_t>(crow);
    bool ordered = starts[0] == 0 && starts[nodes()] == edges();
    for (int64_t i = 0; i < nodes(); ++i) ordered &= starts[i] <= starts[i + 1];
    STD_TORCH_CHECK(ordered, "crow must ascend from 0 to E");
  }

  int64_t nodes() const {
    return crow.size(0) - 1;
  }
  int64_t edges() const {
    return col.size(0);
  }
  Csr view() const {
    return {data<int64_t>(crow), data<int32_t>(col), nodes(), edges()};
  }
  // For kernels that take about so many vector operations per stored entry and class.
  Threads threads(int operations, int64_t classes) const {
    return Threads(static_cast<double>(operations) * (edges() + nodes()) * classes);
  }
};

// A contiguous tensor of the dtype and device of `like`, after a look at its shape.
inline Tensor check_vector(const Tensor& tensor, const char* name, int64_t size, const Tensor& like) {
  check_shape(tensor, name, size);
  check_like(tensor, name, like.scalar_type(), like);
  return as_contiguous(tensor);
}

inline Tensor check_matrix(const Tensor& tensor, const char* name, int64_t rows, int64_t columns, const Tensor& like) {
  check_shape(tensor, name, rows, columns);
  check_like(tensor, name, like.scalar_type(), like);
  return as_contiguous(tensor);
}

}  // namespace ssmkernels::binding
