// SPDX-License-Identifier: BSD-3-Clause
#include "../kernels/memory/aggregate.h"

#include "memory.h"

namespace ssmkernels::binding {
namespace {

template <class Storage>
Aggregate<Storage> problem_of(const Tensor& query, const Tensor& bank, const Tensor& labels, int64_t classes,
                              double temperature, bool allow_tf32) {
  return {data<Storage>(query), bank_view<Storage>(bank, labels, classes), query.size(0), temperature, allow_tf32};
}

template <class Storage>
Tensor workspace(const Aggregate<Storage>& problem, const Tensor& like) {
  return new_tensor(like, {cuda::aggregate_workspace(problem)}, ScalarType::Byte);
}

std::tuple<Tensor, Tensor> aggregate_op(const Tensor& query, const Tensor& bank, const Tensor& bank_labels,
                                        int64_t num_classes, double temperature, bool allow_tf32) {
  const Tensor labels = check_bank(bank, bank_labels, query), rows = check_query(query, "query", bank);
  STD_TORCH_CHECK(bank.size(0) > 0 && num_classes > 0,
                  "bank must have at least one slot, and num_classes be at least 1");
  Tensor aggregated = new_tensor(bank, {query.size(0), num_classes}, compute_dtype(query));
  Tensor log_normalizer = new_tensor(bank, {query.size(0)}, compute_dtype(query));
  if (query.size(0) == 0) return {aggregated, log_normalizer};

  dispatch_dtype(query, [&](auto storage) {
    using Storage = decltype(storage);
    using Real = Compute<Storage>;
    const auto problem = problem_of<Storage>(rows, bank, labels, num_classes, temperature, allow_tf32);
    const AggregateResult<Real> result{data<Real>(aggregated), data<Real>(log_normalizer)};
    run_on_device(
        bank, "aggregate",
        [&] { SSM_CALL_ISA(aggregate, problem, result, Threads(bank_work(1, problem.rows, problem.bank))); },
        [&](CudaStream stream) {
          if constexpr (kWithCuda) {
            const auto kept = with_kept_order(problem, labels, stream);
            return cuda::aggregate(kept, result, data<void>(workspace(kept, bank)), stream);
          }
        });
  });
  return {aggregated, log_normalizer};
}

Tensor aggregate_backward_op(const Tensor& grad_aggregated, const Tensor& query, const Tensor& bank,
                             const Tensor& bank_labels, const Tensor& aggregated, const Tensor& log_normalizer,
                             double temperature, bool allow_tf32) {
  const Tensor labels = check_bank(bank, bank_labels, query), rows = check_query(query, "query", bank);
  const int64_t classes = aggregated.size(-1);
  STD_TORCH_CHECK(bank.size(0) > 0, "bank must have at least one slot");
  check_shape(grad_aggregated, "grad_aggregated", query.size(0), classes);
  check_shape(aggregated, "aggregated", query.size(0), classes);
  check_shape(log_normalizer, "log_normalizer", query.size(0));
  for (const Tensor* tensor : {&grad_aggregated, &aggregated, &log_normalizer})
    check_like(*tensor, "grad_aggregated, aggregated or log_normalizer", compute_dtype(query), query);
  const Tensor grad = as_contiguous(grad_aggregated), saved = as_contiguous(aggregated);
  const Tensor normalizer = as_contiguous(log_normalizer);
  Tensor grad_query = new_tensor(query, {query.size(0), query.size(1)}, compute_dtype(query));
  if (query.size(0) == 0) return grad_query;

  dispatch_dtype(query, [&](auto storage) {
    using Storage = decltype(storage);
    using Real = Compute<Storage>;
    const auto problem = problem_of<Storage>(rows, bank, labels, classes, temperature, allow_tf32);
    const AggregateBackward<Real> backward{data<Real>(grad), data<Real>(saved), data<Real>(normalizer),
                                           data<Real>(grad_query)};
    run_on_device(
        bank, "aggregate_backward",
        [&] { SSM_CALL_ISA(aggregate_backward, problem, backward, Threads(bank_work(2, problem.rows, problem.bank))); },
        [&](CudaStream stream) {
          if constexpr (kWithCuda)
            return cuda::aggregate_backward(problem, backward, data<void>(workspace(problem, bank)), stream);
        });
  });
  return grad_query;
}

STABLE_TORCH_LIBRARY_FRAGMENT(ssmkernels, library) {
  library.def(
      "aggregate(Tensor query, Tensor bank, Tensor bank_labels, SymInt num_classes, float temperature, bool "
      "allow_tf32) -> "
      "(Tensor aggregated, Tensor log_normalizer)");
  library.def(
      "aggregate_backward(Tensor grad_aggregated, Tensor query, Tensor bank, Tensor bank_labels, Tensor aggregated, "
      "Tensor log_normalizer, "
      "float temperature, bool allow_tf32) -> Tensor grad_query");
}
SSM_REGISTER("aggregate", aggregate_op)
SSM_REGISTER("aggregate_backward", aggregate_backward_op)

}  // namespace
}  // namespace ssmkernels::binding
