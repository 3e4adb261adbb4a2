// SPDX-License-Identifier: BSD-3-Clause
#include "memory_update.h"

#include "../common/norm.h"
#include "../common/simd.h"

// Compiled once per instruction set, SSM_ISA naming it. What is not declared in the header stands in an anonymous
// namespace, so that no two of those objects share a symbol.
namespace ssmkernels::SSM_ISA {
namespace {

constexpr int64_t kShards =
    16;  // a slot belongs to one shard, so its updates stay in batch order for any number of threads

template <class Storage>
void update_slot(const MemoryUpdate<Storage>& problem, int64_t row) {
  using Real = Compute<Storage>;
  const int64_t slot = problem.index[row];
  Storage* feature = problem.features + slot * problem.row_stride;
  const Storage* fresh = problem.new_features + row * problem.dim;
  const Real momentum = static_cast<Real>(problem.momentum), rest = static_cast<Real>(1 - problem.momentum);
  auto mixed = [&](int64_t d) {
    return momentum * to_real(feature[d * problem.column_stride]) + rest * to_real(fresh[d]);
  };
  double squares = 0;
  for (int64_t d = 0; d < problem.dim; ++d) squares += static_cast<double>(mixed(d)) * mixed(d);
  const ScaledNorm length = scaled_norm(squares, problem.dim, mixed);
  const double factor = 1 / (length.norm < kSmallestNorm ? kSmallestNorm : length.norm);  // NaN stays NaN
  for (int64_t d = 0; d < problem.dim; ++d)
    from_real(static_cast<Real>(mixed(d) * length.scale * factor), &feature[d * problem.column_stride]);
  problem.labels[slot * problem.label_stride] = problem.new_labels[row];
}

}  // namespace

template <class Storage>
void memory_update(const MemoryUpdate<Storage>& problem, ParallelFor parallel_for) {
  const int64_t shards = problem.rows * problem.dim < 1 << 16 ? 1 : kShards;  // a small batch is not worth a thread
  parallel_for(shards, [&](int64_t begin, int64_t end) {
    for (int64_t row = 0; row < problem.rows; ++row) {
      const int64_t slot = problem.index[row];
      if (slot < 0 || slot >= problem.slots) continue;
      const int64_t shard = slot % shards;
      if (shard >= begin && shard < end) update_slot(problem, row);
    }
  });
}

// The binding dispatches among these.
template void memory_update(const MemoryUpdate<float>&, ParallelFor);
template void memory_update(const MemoryUpdate<double>&, ParallelFor);
template void memory_update(const MemoryUpdate<bfloat16>&, ParallelFor);
template void memory_update(const MemoryUpdate<float16>&, ParallelFor);

}  // namespace ssmkernels::SSM_ISA
