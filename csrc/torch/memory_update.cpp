// SPDX-License-Identifier: BSD-3-Clause
#include "../kernels/memory/memory_update.h"

#include <algorithm>
#include <array>
#include <utility>

#include "memory.h"

namespace ssmkernels::binding {
namespace {

// Where the elements of a tensor lie.
struct Extent {
  uintptr_t begin, end;  // bytes

  template <class T>
  static Extent of(const Tensor& tensor) {
    const auto begin = reinterpret_cast<uintptr_t>(tensor.data_ptr());
    if (tensor.numel() == 0) return {begin, begin};
    int64_t last = 0;
    for (int64_t dim = 0; dim < tensor.dim(); ++dim) last += (tensor.size(dim) - 1) * tensor.stride(dim);
    return {begin, begin + (last + 1) * sizeof(T)};
  }
  bool meets(const Extent& other) const {
    return begin < other.end && other.begin < end;
  }
};

// Elements of a tensor that is written share no memory: beyond what one dimension spans, the other one steps.
void check_apart(const Tensor& tensor, const char* name) {
  std::array<std::pair<int64_t, int64_t>, 2> steps{};  // stride and size
  for (int64_t dim = 0; dim < tensor.dim(); ++dim)
    if (tensor.size(dim) > 1) steps[dim] = {tensor.stride(dim), tensor.size(dim)};
  std::sort(steps.begin(), steps.end());
  int64_t reach = 0;
  bool apart = true;
  for (const auto& [stride, size] : steps) {
    if (size == 0) continue;
    apart &= stride > reach;
    reach += stride * (size - 1);
  }
  STD_TORCH_CHECK(apart || tensor.numel() == 0, name,
                  " is written, so that its elements must not share memory, as those of an expanded tensor do");
}

// The operator. Checks come first, before anything is written; those here only keep a direct call of torch.ops from
// reading out of bounds, and ssmkernels/ops/memory.py has the messages for users.
void memory_update_op(const Tensor& bank, const Tensor& bank_labels, const Tensor& index, const Tensor& features,
                      const Tensor& labels, double momentum) {
  check_bank(bank, bank_labels, bank);
  Tensor rows = check_query(features, "features", bank);
  check_like(features, "features", bank.scalar_type(), bank);
  check_shape(index, "index", features.size(0));
  check_shape(labels, "labels", features.size(0));
  check_like(index, "index", ScalarType::Long, bank);
  check_like(labels, "labels", ScalarType::Long, bank);
  if (features.size(0) == 0) return;
  check_apart(bank, "bank");
  check_apart(bank_labels, "bank_labels");
  Tensor slots = as_contiguous(index), classes = as_contiguous(labels);

  dispatch_dtype(bank, [&](auto storage) {
    using Storage = decltype(storage);
    const Extent written = Extent::of<Storage>(bank), labels_written = Extent::of<int64_t>(bank_labels);
    STD_TORCH_CHECK(!written.meets(labels_written), "bank and bank_labels share memory");
    // What is read and shares memory with what is written is read as it was before.
    const auto detach = [&](Tensor& tensor, const Extent& extent) {
      if (extent.meets(written) || extent.meets(labels_written)) tensor = torch::stable::clone(tensor);
    };
    detach(rows, Extent::of<Storage>(rows));
    detach(slots, Extent::of<int64_t>(slots));
    detach(classes, Extent::of<int64_t>(classes));
    const MemoryUpdate<Storage> problem{data<Storage>(bank), data<int64_t>(bank_labels), data<int64_t>(slots),
                                        data<Storage>(rows), data<int64_t>(classes),     bank.size(0),
                                        bank.size(1),        features.size(0),           bank.stride(0),
                                        bank.stride(1),      bank_labels.stride(0),      momentum};
    run_on_device(
        bank, "memory_update_",
        [&] { SSM_CALL_ISA(memory_update, problem, Threads(64. * problem.rows * problem.dim)); },
        [&](CudaStream stream) {
          if constexpr (kWithCuda) return cuda::memory_update(problem, stream);
        });
  });
}

// The schema says which arguments are written, (a!) and (b!). Shapes for fake tensors and derivatives are registered in
// Python.
STABLE_TORCH_LIBRARY_FRAGMENT(ssmkernels, library) {
  library.def(
      "memory_update_(Tensor(a!) bank, Tensor(b!) bank_labels, Tensor index, Tensor features, Tensor labels, float "
      "momentum) -> ()");
}
SSM_REGISTER("memory_update_", memory_update_op)

}  // namespace
}  // namespace ssmkernels::binding
