// SPDX-License-Identifier: BSD-3-Clause
// Of B = 320, D = 128 in bfloat16: 0.25 MB, a few FLOP per element; the launch is the cost.
#include "../common/cuda.cuh"
#include "../common/mma.cuh"
#include "memory_update.h"

namespace ssmkernels::cuda {
namespace {

inline constexpr int kUpdateWarps = 4;

// One warp per element of the batch. The first one of an index applies the whole chain of its duplicates, in batch
// order; each application rounds to storage, as a loop over the batch would. A lane reads and writes its own columns
// only.
template <class Storage>
__global__ void __launch_bounds__(32 * kUpdateWarps) update_slots(const __grid_constant__ MemoryUpdate<Storage> in) {
  using Real = Compute<Storage>;
  const int lane = threadIdx.x % 32;
  const int64_t first = int64_t{blockIdx.x} * kUpdateWarps + threadIdx.x / 32;
  if (first >= in.rows) return;
  const int64_t slot = in.index[first];
  if (slot < 0 || slot >= in.slots) return;
  for (int64_t base = 0; base < first; base += 32)
    if (__any_sync(kAllLanes, base + lane < first && in.index[base + lane] == slot)) return;

  const Real keep = static_cast<Real>(in.momentum), take = static_cast<Real>(1 - in.momentum);
  Storage* features = in.features + slot * in.row_stride;
  for (int64_t base = first; base < in.rows; base += 32) {
    unsigned same = __ballot_sync(kAllLanes, base + lane < in.rows && in.index[base + lane] == slot);
    for (; same != 0; same &= same - 1) {
      const int64_t row = base + __ffs(same) - 1;
      const Storage* added = in.new_features + row * in.dim;
      const auto mixed = [&](int64_t d) {
        return keep * to_real(features[d * in.column_stride]) + take * to_real(added[d]);
      };
      const ScaledNorm length = warp_norm(in.dim, mixed);
      const double factor = 1 / (length.norm < 1e-12 ? 1e-12 : length.norm);  // NaN stays NaN
      for (int64_t d = lane; d < in.dim; d += 32)
        features[d * in.column_stride] = from_real<Storage>(static_cast<Real>(mixed(d) * length.scale * factor));
      if (lane == 0) in.labels[slot * in.label_stride] = in.new_labels[row];
    }
  }
}

}  // namespace

template <class Storage>
const char* memory_update(const MemoryUpdate<Storage>& problem, CudaStream stream) {
  return launch(update_slots<Storage>, ceil_div<int64_t>(problem.rows, kUpdateWarps), 32 * kUpdateWarps, 0, stream,
                problem);
}

#define SSM_INSTANTIATE(Storage) template const char* memory_update(const MemoryUpdate<Storage>&, CudaStream);
SSM_INSTANTIATE(float)
SSM_INSTANTIATE(double)
SSM_INSTANTIATE(bfloat16)
SSM_INSTANTIATE(float16)

}  // namespace ssmkernels::cuda
