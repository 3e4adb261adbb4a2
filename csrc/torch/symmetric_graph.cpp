// SPDX-License-Identifier: BSD-3-Clause
#include "../kernels/graph/symmetric_graph.h"

#include "graph.h"

namespace ssmkernels::binding {
namespace {

constexpr double kOperations = 32;  // an entry: it is sorted, twice, and looked for by its id

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> symmetric_graph_op(const Tensor& ids_in, const Tensor& weights_in) {
  const Tensor ids = as_contiguous(ids_in), weights = as_contiguous(weights_in);
  STD_TORCH_CHECK(ids.dim() == 2, "ids must be [N, k]");
  const int64_t nodes = ids.size(0), neighbours = ids.size(1);
  STD_TORCH_CHECK(nodes < (int64_t{1} << 31), "nodes must be fewer than 2^31");
  check_like(ids, "ids", ScalarType::Int, weights);
  check_shape(weights, "weights", nodes, neighbours);
  const Threads threads(kOperations * static_cast<double>(nodes) * neighbours);
  Tensor starts = new_tensor(ids, {nodes + 2}, ScalarType::Long);
  Tensor positions = new_tensor(ids, {nodes, neighbours}, ScalarType::Long);
  const TransposedLists transposed{data<int64_t>(starts), data<int64_t>(positions)};
  Tensor crow = new_tensor(ids, {nodes + 1}, ScalarType::Long), col, weight, reverse, mutual;
  dispatch_real(weights, [&](auto real) {
    using Real = decltype(real);
    const NeighbourLists<Real> lists{data<int32_t>(ids), data<Real>(weights), nodes, neighbours};
    SSM_CALL_ISA(symmetric_rows, lists, transposed, data<int64_t>(crow), threads);
    const int64_t edges = data<int64_t>(crow)[nodes];
    col = new_tensor(ids, {edges}, ScalarType::Int);
    weight = new_tensor(ids, {edges}, weights.scalar_type());
    reverse = new_tensor(ids, {edges}, ScalarType::Long);
    mutual = new_tensor(ids, {edges}, ScalarType::Bool);
    SSM_CALL_ISA(symmetric_entries, lists, transposed, data<int64_t>(crow), data<int32_t>(col), data<Real>(weight),
                 data<int64_t>(reverse), data<bool>(mutual), threads);
  });
  return {crow, col, weight, reverse, mutual};
}

STABLE_TORCH_LIBRARY_FRAGMENT(ssmkernels, library) {
  library.def(
      "symmetric_graph(Tensor ids, Tensor weights)"
      " -> (Tensor crow, Tensor col, Tensor weight, Tensor reverse, Tensor mutual)");
}
STABLE_TORCH_LIBRARY_IMPL(ssmkernels, CPU, library) {
  library.impl("symmetric_graph", TORCH_BOX(&symmetric_graph_op));
}

}  // namespace
}  // namespace ssmkernels::binding
