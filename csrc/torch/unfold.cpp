// SPDX-License-Identifier: BSD-3-Clause
#include "../kernels/memory/unfold.h"

#include "memory.h"

namespace ssmkernels::binding {
namespace {

Tensor unfold_op(const Tensor& query, const Tensor& bank, const Tensor& bank_labels, const Tensor& probs,
                 double temperature, bool allow_tf32) {
  const Tensor labels = check_bank(bank, bank_labels, query), rows = check_query(query, "query", bank);
  const int64_t classes = probs.size(-1);
  STD_TORCH_CHECK(bank.size(0) > 0, "bank must have at least one slot");
  check_shape(probs, "probs", query.size(0), classes);
  check_like(probs, "probs", compute_dtype(query), query);
  const Tensor weights = as_contiguous(probs);
  Tensor unfolded = new_tensor(bank, {query.size(0), bank.size(0)}, compute_dtype(query));
  if (query.size(0) == 0) return unfolded;

  dispatch_dtype(query, [&](auto storage) {
    using Storage = decltype(storage);
    using Real = Compute<Storage>;
    const Unfold<Storage> problem{data<Storage>(rows), data<Real>(weights), bank_view<Storage>(bank, labels, classes),
                                  query.size(0),       temperature,         allow_tf32,
                                  data<Real>(unfolded)};
    run_on_device(
        bank, "unfold", [&] { SSM_CALL_ISA(unfold, problem, Threads(bank_work(1, problem.rows, problem.bank))); },
        [&](CudaStream stream) {
          if constexpr (kWithCuda) {
            const Tensor workspace = new_tensor(bank, {cuda::unfold_workspace(problem)}, ScalarType::Byte);
            return cuda::unfold(problem, data<void>(workspace), stream);
          }
        });
  });
  return unfolded;
}

STABLE_TORCH_LIBRARY_FRAGMENT(ssmkernels, library) {
  library.def(
      "unfold(Tensor query, Tensor bank, Tensor bank_labels, Tensor probs, float temperature, bool allow_tf32) -> "
      "Tensor unfolded");
}
SSM_REGISTER("unfold", unfold_op)

}  // namespace
}  // namespace ssmkernels::binding
