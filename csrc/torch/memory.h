// SPDX-License-Identifier: BSD-3-Clause
// What the bindings of the memory family share: the bank, and the memory that keeps its class order on a GPU.
#pragma once

#include <algorithm>
#include <mutex>
#include <vector>

#include "../kernels/memory/bank.h"
#include "common.h"

namespace ssmkernels::binding {

template <class Storage>
Bank<Storage> bank_view(const Tensor& bank, const Tensor& labels, int64_t classes) {
  return {data<Storage>(bank), data<int64_t>(labels), bank.size(0), bank.size(1), classes,
          bank.stride(0),      bank.stride(1)};
}

// As many products of all rows with a bank, and the exponentials.
template <class Storage>
double bank_work(int products, int64_t rows, const Bank<Storage>& bank) {
  return static_cast<double>(products) * rows * bank.slots * (bank.dim + 16);
}

// Checks bank [K, D] and bank_labels [K] and returns the labels, contiguous.
inline Tensor check_bank(const Tensor& bank, const Tensor& bank_labels, const Tensor& query) {
  STD_TORCH_CHECK(bank.dim() == 2, "bank must be [K, D]");
  check_like(bank, "bank", query.scalar_type(), query);
  check_like(bank_labels, "bank_labels", ScalarType::Long, query);
  check_shape(bank_labels, "bank_labels", bank.size(0));
  return as_contiguous(bank_labels);
}

inline Tensor check_query(const Tensor& query, const char* name, const Tensor& bank) {
  STD_TORCH_CHECK(query.dim() == 2 && query.size(1) == bank.size(1), name, " must be [B, ", bank.size(1), "]");
  return as_contiguous(query);
}

// The class orders of the banks used last, by stream: none is used by two streams at once. They outlive the calls, and
// the process ends without freeing them, as CUDA may have ended before.
class KeptClassOrders {
 public:
  static KeptClassOrders& instance() {
    static auto* const orders = new KeptClassOrders;
    return *orders;
  }

  // Null for a bank whose order is not kept, where there is no memory, and while a graph is captured: at its replays
  // the memory may be another bank's.
  void* memory_of(const Tensor& labels, int64_t classes, CudaStream stream) {
    if (cuda::is_capturing(stream)) return nullptr;
    const int64_t slots = labels.size(0), bytes = cuda::kept_class_order_bytes(slots, classes);
    if (bytes == 0) return nullptr;
    const Key key{labels.data_ptr(), stream, labels.get_device_index(), slots, classes};
    const std::lock_guard<std::mutex> lock(mutex_);
    for (size_t k = 0; k < entries_.size(); ++k)
      if (entries_[k].key == key) {
        std::rotate(entries_.begin(), entries_.begin() + k, entries_.begin() + k + 1);  // the last used comes first
        return entries_.front().memory;
      }
    void* memory = cuda::allocate_class_order(bytes, stream);
    if (!memory) return nullptr;
    if (entries_.size() == kMostEntries) {
      cuda::free_class_order(entries_.back().memory, entries_.back().key.stream);
      entries_.pop_back();
    }
    entries_.insert(entries_.begin(), Entry{key, memory});
    return memory;
  }

 private:
  struct Key {
    const void* labels;
    CudaStream stream;
    int32_t device;
    int64_t slots, classes;

    bool operator==(const Key&) const = default;
  };
  struct Entry {
    Key key;
    void* memory;
  };
  static constexpr size_t kMostEntries = 4;

  std::mutex mutex_;
  std::vector<Entry> entries_;
};

// The problem with the memory that its bank's class order is kept in.
template <class Problem>
Problem with_kept_order(Problem problem, const Tensor& labels, CudaStream stream) {
  problem.bank.class_order = KeptClassOrders::instance().memory_of(labels, problem.bank.classes, stream);
  return problem;
}

}  // namespace ssmkernels::binding
