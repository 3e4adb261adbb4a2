// SPDX-License-Identifier: BSD-3-Clause
#include "../kernels/graph/nearest_neighbours.h"

#include <optional>

#include "graph.h"

namespace ssmkernels::binding {
namespace {

Tensor check_points(const Tensor& points, const char* name) {
  STD_TORCH_CHECK(points.dim() == 2, name, " must be [N, D]");
  STD_TORCH_CHECK(points.size(0) < (int64_t{1} << 31), name, " must be fewer than 2^31");
  return as_contiguous(points);
}

std::tuple<Tensor, Tensor> nearest_neighbours_op(const Tensor& rows_in, const std::optional<Tensor>& columns_in,
                                                 const std::optional<Tensor>& offsets_in, int64_t neighbours) {
  const Tensor rows = check_points(rows_in, "rows");
  const Tensor columns = columns_in ? check_points(*columns_in, "columns") : rows;
  const int64_t num_rows = rows.size(0), num_columns = columns.size(0), dim = rows.size(1);
  check_like(columns, "columns", rows.scalar_type(), rows);
  STD_TORCH_CHECK(columns.size(1) == dim, "columns must be [M, ", dim, "]");
  const std::optional<Tensor> offsets =
      offsets_in ? std::optional(check_vector(*offsets_in, "offsets", num_columns, rows)) : std::nullopt;
  const int64_t most = columns_in ? num_columns : num_columns - 1;
  STD_TORCH_CHECK(neighbours >= 1 && neighbours <= most, "neighbours must be in [1, ", most, "]");
  Tensor ids = new_tensor(rows, {num_rows, neighbours}, ScalarType::Int);
  Tensor scores = new_tensor(rows, {num_rows, neighbours}, rows.scalar_type());
  dispatch_real(rows, [&](auto real) {
    using Real = decltype(real);
    const NearestNeighbours<Real> problem{
        data<Real>(rows), data<Real>(columns), offsets ? data<Real>(*offsets) : nullptr, num_rows, num_columns, dim,
        neighbours,       !columns_in};
    const double pairs = static_cast<double>(num_rows) * num_columns / (columns_in ? 1 : 2);
    const Threads threads(pairs * (dim + 4));
    SSM_CALL_ISA(nearest_neighbours, problem, data<int32_t>(ids), data<Real>(scores), threads);
  });
  return {ids, scores};
}

Tensor pair_products_op(const Tensor& rows_in, const Tensor& left_in, const Tensor& right_in) {
  const Tensor rows = check_points(rows_in, "rows"), left = as_contiguous(left_in), right = as_contiguous(right_in);
  STD_TORCH_CHECK(left.dim() == 1, "left must be [P]");
  const int64_t pairs = left.size(0);
  check_like(left, "left", ScalarType::Long, rows);
  check_like(right, "right", ScalarType::Long, rows);
  check_shape(right, "right", pairs);
  bool inside = true;
  for (const Tensor& ends : {left, right}) {
    const int64_t* values = data<int64_t>(ends);
    for (int64_t p = 0; p < pairs; ++p) inside &= values[p] >= 0 && values[p] < rows.size(0);
  }
  STD_TORCH_CHECK(inside, "left and right must be in [0, N)");
  Tensor out = new_tensor(rows, {pairs}, rows.scalar_type());
  dispatch_real(rows, [&](auto real) {
    using Real = decltype(real);
    const Threads threads(static_cast<double>(pairs) * (rows.size(1) + 8));
    SSM_CALL_ISA(pair_products, data<Real>(rows), rows.size(1), data<int64_t>(left), data<int64_t>(right), pairs,
                 data<Real>(out), threads);
  });
  return out;
}

STABLE_TORCH_LIBRARY_FRAGMENT(ssmkernels, library) {
  library.def(
      "nearest_neighbours(Tensor rows, Tensor? columns, Tensor? offsets, int neighbours) -> (Tensor ids, Tensor "
      "scores)");
  library.def("pair_products(Tensor rows, Tensor left, Tensor right) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(ssmkernels, CPU, library) {
  library.impl("nearest_neighbours", TORCH_BOX(&nearest_neighbours_op));
  library.impl("pair_products", TORCH_BOX(&pair_products_op));
}

}  // namespace
}  // namespace ssmkernels::binding
