// SPDX-License-Identifier: BSD-3-Clause
#include "../kernels/memory/memory_update.h"

#include "common.h"

namespace ssmkernels::binding {
namespace {

void memory_update_op(const Tensor& bank, const Tensor& bank_labels, const Tensor& index, const Tensor& features, const Tensor& labels,
                      double momentum) {
  check_bank(bank, bank_labels, bank);
  const Tensor rows = check_query(features, "features", bank);
  check_like(features, "features", bank.scalar_type(), bank);
  check_shape(index, "index", features.size(0));
  check_shape(labels, "labels", features.size(0));
  check_like(index, "index", ScalarType::Long, bank);
  check_like(labels, "labels", ScalarType::Long, bank);
  if (features.size(0) == 0) return;
  const Tensor slots = as_contiguous(index), classes = as_contiguous(labels);

  dispatch_dtype(bank, [&](auto storage) {
    using Storage = decltype(storage);
    const MemoryUpdate<Storage> problem{
        data<Storage>(bank), data<int64_t>(bank_labels), data<int64_t>(slots), data<Storage>(rows), data<int64_t>(classes), bank.size(0),
        bank.size(1),        features.size(0),           bank.stride(0),       bank.stride(1),      bank_labels.stride(0),  momentum};
    run_on_device(
        bank, "memory_update_", [&] { SSM_CALL_ISA(memory_update, problem, Threads(64. * problem.rows * problem.dim)); },
        [&](CudaStream stream) {
#ifdef SSM_WITH_CUDA
          return cuda::memory_update(problem, stream);
#endif
        });
  });
}

STABLE_TORCH_LIBRARY_FRAGMENT(ssmkernels, library) {
  library.def(
      "memory_update_(Tensor(a!) bank, Tensor(b!) bank_labels, Tensor index, Tensor features, Tensor labels, float momentum) -> ()");
}
SSM_REGISTER("memory_update_", memory_update_op)

}  // namespace
}  // namespace ssmkernels::binding
