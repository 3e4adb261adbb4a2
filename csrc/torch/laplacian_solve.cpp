// SPDX-License-Identifier: BSD-3-Clause
#include "../kernels/graph/laplacian_solve.h"

#include <optional>

#include "graph.h"

namespace ssmkernels::binding {
namespace {

constexpr int kOperations = 16;         // one an iteration, but threads that are awake stay so from one to the next
constexpr int kBackwardOperations = 8;  // one, but two rows of the solution are fetched for it

template <class Real>
Real* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? data<Real>(*tensor) : nullptr;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> laplacian_solve_op(const Tensor& crow, const Tensor& col,
                                                              const Tensor& weight_in,
                                                              const std::optional<Tensor>& dissimilarity_in,
                                                              const Tensor& diagonal_in, const Tensor& rhs_in,
                                                              const std::optional<Tensor>& initial_in, double rtol,
                                                              int64_t max_iter, bool jacobi) {
  const GraphTensors graph(crow, col, rhs_in);
  STD_TORCH_CHECK(rhs_in.dim() == 2, "rhs must be [N, C]");
  STD_TORCH_CHECK(rtol >= 0, "rtol must be at least 0");  // nothing is below a NaN: the iterations would not end
  const int64_t columns = rhs_in.size(1);
  const Tensor rhs = check_matrix(rhs_in, "rhs", graph.nodes(), columns, rhs_in);
  const Tensor weight = check_vector(weight_in, "weight", graph.edges(), rhs);
  const Tensor diagonal = check_vector(diagonal_in, "diagonal", graph.nodes(), rhs);
  std::optional<Tensor> dissimilarity, initial;
  if (dissimilarity_in) dissimilarity = check_vector(*dissimilarity_in, "dissimilarity", graph.edges(), rhs);
  if (initial_in) initial = check_matrix(*initial_in, "initial", graph.nodes(), columns, rhs);
  Tensor solution = new_tensor(rhs, {graph.nodes(), columns}, rhs.scalar_type());
  Tensor iterations = new_tensor(rhs, {columns}, ScalarType::Long);
  Tensor residual = new_tensor(rhs, {columns}, rhs.scalar_type()),
         curvature = new_tensor(rhs, {columns}, rhs.scalar_type());
  dispatch_real(rhs, [&](auto real) {
    using Real = decltype(real);
    const LaplacianSolve<Real> problem{graph.view(),
                                       data<Real>(weight),
                                       data_or_null<Real>(dissimilarity),
                                       data<Real>(diagonal),
                                       data<Real>(rhs),
                                       data_or_null<Real>(initial),
                                       columns,
                                       rtol,
                                       max_iter,
                                       jacobi};
    const LaplacianSolution<Real> result{data<Real>(solution), data<int64_t>(iterations), data<Real>(residual),
                                         data<Real>(curvature)};
    run_on_device(
        rhs, "laplacian_solve",
        [&] { SSM_CALL_ISA(laplacian_solve, problem, result, graph.threads(kOperations, columns)); },
        [&](CudaStream stream) {
          if constexpr (kWithCuda) {
            const Tensor workspace = new_tensor(rhs, {cuda::laplacian_solve_workspace(problem)}, ScalarType::Byte);
            return cuda::laplacian_solve(problem, result, data<void>(workspace), stream);
          }
        });
  });
  return {solution, iterations, residual, curvature};
}

std::tuple<Tensor, Tensor, Tensor> laplacian_solve_backward_op(const Tensor& crow, const Tensor& col,
                                                               const Tensor& grad_rhs_in, const Tensor& solution_in) {
  const GraphTensors graph(crow, col, grad_rhs_in);
  STD_TORCH_CHECK(grad_rhs_in.dim() == 2, "grad_rhs must be [N, C]");
  const int64_t columns = grad_rhs_in.size(1);
  const Tensor grad_rhs = check_matrix(grad_rhs_in, "grad_rhs", graph.nodes(), columns, grad_rhs_in);
  const Tensor solution = check_matrix(solution_in, "solution", graph.nodes(), columns, grad_rhs);
  Tensor grad_weight = new_tensor(grad_rhs, {graph.edges()}, grad_rhs.scalar_type());
  Tensor grad_dissimilarity = new_tensor(grad_rhs, {graph.edges()}, grad_rhs.scalar_type());
  Tensor grad_diagonal = new_tensor(grad_rhs, {graph.nodes()}, grad_rhs.scalar_type());
  dispatch_real(grad_rhs, [&](auto real) {
    using Real = decltype(real);
    const LaplacianSolveBackward<Real> problem{graph.view(),
                                               data<Real>(grad_rhs),
                                               data<Real>(solution),
                                               columns,
                                               data<Real>(grad_weight),
                                               data<Real>(grad_dissimilarity),
                                               data<Real>(grad_diagonal)};
    run_on_device(
        grad_rhs, "laplacian_solve_backward",
        [&] { SSM_CALL_ISA(laplacian_solve_backward, problem, graph.threads(kBackwardOperations, columns)); },
        [&](CudaStream stream) {
          if constexpr (kWithCuda) return cuda::laplacian_solve_backward(problem, stream);
        });
  });
  return {grad_weight, grad_dissimilarity, grad_diagonal};
}

STABLE_TORCH_LIBRARY_FRAGMENT(ssmkernels, library) {
  library.def(
      "laplacian_solve(Tensor crow, Tensor col, Tensor weight, Tensor? dissimilarity, Tensor diagonal, Tensor rhs, "
      "Tensor? initial, "
      "float rtol, int max_iter, bool jacobi) -> (Tensor solution, Tensor iterations, Tensor residual, Tensor "
      "curvature)");
  library.def(
      "laplacian_solve_backward(Tensor crow, Tensor col, Tensor grad_rhs, Tensor solution) -> "
      "(Tensor grad_weight, Tensor grad_dissimilarity, Tensor grad_diagonal)");
}
SSM_REGISTER("laplacian_solve", laplacian_solve_op)
SSM_REGISTER("laplacian_solve_backward", laplacian_solve_backward_op)

}  // namespace
}  // namespace ssmkernels::binding
