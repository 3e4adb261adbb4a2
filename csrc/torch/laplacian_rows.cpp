// SPDX-License-Identifier: BSD-3-Clause
#include "../kernels/graph/laplacian_rows.h"

#include <initializer_list>

#include "graph.h"

namespace ssmkernels::binding {
namespace {

constexpr int kOperations = 4;       // an entry and column: a difference, a product and a sum
constexpr int kStepOperations = 16;  // a node and column: five arrays are read and written

// crow, col, value and excess; x [m, C] has a row for every column of the matrix.
struct Matrix {
  GraphTensors graph;
  Tensor value, excess;
  int64_t extended, columns;

  Matrix(const Tensor& crow, const Tensor& col, const Tensor& value_in, const Tensor& excess_in, const Tensor& x)
      : graph(crow, col, x),
        value(check_vector(value_in, "value", graph.edges(), value_in)),
        excess(check_vector(excess_in, "excess", graph.nodes(), value_in)),
        extended(x.size(0)),
        columns(x.size(1)) {
    STD_TORCH_CHECK(extended >= graph.nodes(), "x must have a row for every row of the matrix");
  }

  template <class Real>
  RowsOfLaplacian<Real> view() const {
    const Csr csr = graph.view();
    return {csr.crow, csr.col, data<Real>(value), data<Real>(excess), csr.nodes, extended, columns};
  }
};

void check_written(const Tensor& tensor, const char* name, int64_t rows, int64_t columns, ScalarType dtype,
                   const Tensor& like) {
  check_shape(tensor, name, rows, columns);
  check_like(tensor, name, dtype, like);
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
}

bool share_memory(const Tensor& left, const Tensor& right) {
  const char *a = data<char>(left), *b = data<char>(right);
  return a < b + right.numel() * right.element_size() && b < a + left.numel() * left.element_size();
}

void check_apart(const Tensor& written, std::initializer_list<const Tensor*> others) {
  for (const Tensor* other : others) STD_TORCH_CHECK(!share_memory(written, *other), "what is written shares memory");
}

Tensor laplacian_rows_op(const Tensor& out, const Tensor& crow, const Tensor& col, const Tensor& value,
                         const Tensor& excess, const Tensor& rows_in, const Tensor& x_in, const Tensor& residual_in,
                         const Tensor& inverse_in) {
  STD_TORCH_CHECK(x_in.dim() == 2, "x must be [m, C]");
  const Tensor x = as_contiguous(x_in), rows = as_contiguous(rows_in);
  const Matrix matrix(crow, col, value, excess, x);
  const int64_t nodes = matrix.graph.nodes(), columns = matrix.columns;
  check_like(matrix.value, "value", x.scalar_type(), x);
  STD_TORCH_CHECK(rows.dim() == 1, "rows must be [k]");
  check_like(rows, "rows", ScalarType::Long, x);
  const Tensor residual = check_matrix(residual_in, "residual", nodes, columns, x);
  const Tensor inverse = check_vector(inverse_in, "inverse", nodes, x);
  check_written(out, "out", nodes, columns, x.scalar_type(), x);
  check_apart(out, {&x, &residual, &inverse, &matrix.value, &matrix.excess});
  Tensor sums = new_tensor(x, {3, columns}, ScalarType::Double);
  dispatch_real(x, [&](auto real) {
    using Real = decltype(real);
    const LaplacianRows<Real> problem{matrix.view<Real>(),  data<int64_t>(rows), rows.size(0),    data<Real>(x),
                                      data<Real>(residual), data<Real>(inverse), data<Real>(out), data<double>(sums)};
    SSM_CALL_ISA(laplacian_rows, problem, matrix.graph.threads(kOperations, columns));
  });
  return sums;
}

void laplacian_step_op(const Tensor& x, const Tensor& r, const Tensor& p, const Tensor& s, const Tensor& u,
                       const Tensor& w_in, const Tensor& step_in, const Tensor& fresh_in, const Tensor& beta_in,
                       const Tensor& alpha_in) {
  STD_TORCH_CHECK(r.dim() == 2, "r must be [n, C]");
  const int64_t nodes = r.size(0), columns = r.size(1);
  const Tensor w = check_matrix(w_in, "w", nodes, columns, r), step = check_vector(step_in, "step", nodes, r);
  const Tensor fresh = check_vector(fresh_in, "fresh", columns, r), beta = check_vector(beta_in, "beta", columns, r),
               alpha = check_vector(alpha_in, "alpha", columns, r);
  check_written(x, "x", nodes, columns, ScalarType::Double, r);
  for (const Tensor* written : {&r, &p, &s, &u})
    check_written(*written, "what is written", nodes, columns, r.scalar_type(), r);
  check_apart(x, {&r, &p, &s, &u, &w});
  check_apart(r, {&p, &s, &u, &w});
  check_apart(p, {&s, &u, &w});
  check_apart(s, {&u, &w});
  check_apart(u, {&w});
  dispatch_real(r, [&](auto real) {
    using Real = decltype(real);
    const LaplacianStep<Real> problem{
        nodes,         columns,         data<Real>(fresh), data<Real>(beta), data<Real>(alpha), data<Real>(step),
        data<Real>(w), data<double>(x), data<Real>(r),     data<Real>(p),    data<Real>(s),     data<Real>(u)};
    SSM_CALL_ISA(laplacian_step, problem, Threads(static_cast<double>(kStepOperations) * nodes * columns));
  });
}

std::tuple<Tensor, Tensor> laplacian_residual_op(const Tensor& crow, const Tensor& col, const Tensor& value,
                                                 const Tensor& excess, const Tensor& x_in) {
  STD_TORCH_CHECK(x_in.dim() == 2, "x must be [m, C]");
  const Tensor x = as_contiguous(x_in);
  check_like(x, "x", ScalarType::Double, x);
  const Matrix matrix(crow, col, value, excess, x);
  check_like(matrix.value, "value", matrix.value.scalar_type(), x);
  const int64_t nodes = matrix.graph.nodes(), columns = matrix.columns;
  Tensor sum = new_tensor(x, {nodes, columns}, ScalarType::Double),
         terms = new_tensor(x, {nodes, columns}, ScalarType::Double);
  dispatch_real(matrix.value, [&](auto real) {
    using Real = decltype(real);
    const LaplacianResidual<Real> problem{matrix.view<Real>(), data<double>(x), data<double>(sum), data<double>(terms)};
    SSM_CALL_ISA(laplacian_residual, problem, matrix.graph.threads(kOperations, columns));
  });
  return {sum, terms};
}

STABLE_TORCH_LIBRARY_FRAGMENT(ssmkernels, library) {
  library.def(
      "laplacian_rows_(Tensor(a!) out, Tensor crow, Tensor col, Tensor value, Tensor excess, Tensor rows, Tensor x, "
      "Tensor residual, Tensor inverse) -> Tensor sums");
  library.def(
      "laplacian_step_(Tensor(a!) x, Tensor(b!) r, Tensor(c!) p, Tensor(d!) s, Tensor(e!) u, Tensor w, Tensor step, "
      "Tensor fresh, Tensor beta, Tensor alpha) -> ()");
  library.def(
      "laplacian_residual(Tensor crow, Tensor col, Tensor value, Tensor excess, Tensor x) -> (Tensor sum, Tensor "
      "terms)");
}
STABLE_TORCH_LIBRARY_IMPL(ssmkernels, CPU, library) {
  library.impl("laplacian_rows_", TORCH_BOX(&laplacian_rows_op));
  library.impl("laplacian_step_", TORCH_BOX(&laplacian_step_op));
  library.impl("laplacian_residual", TORCH_BOX(&laplacian_residual_op));
}

}  // namespace
}  // namespace ssmkernels::binding
