// SPDX-License-Identifier: BSD-3-Clause
#include "pair_focal_loss.h"
#include "sweep.cuh"

namespace ssmkernels::cuda {
namespace {

using pairs::PairCount;

constexpr int kCountThreads = 256, kCountWarps = kCountThreads / 32;
constexpr int64_t kCountAlone = 4 * kCountThreads;  // rows that one block counts, which then needs no second launch

struct CountInput {
  FocalLoss focal;
  const int64_t* pairs;
  int64_t x_rows, y_rows, count;
};

__device__ void set_scale(const PairCount& count, int64_t left, int64_t right, bool listed) {
  const double counted = static_cast<double>(left) * (listed ? 1.0 : static_cast<double>(right));
  *count.scale = counted > 0 ? 1 / counted : 0;
}

__global__ void __launch_bounds__(kCountThreads) count_pairs(CountInput in, PairCount out) {
  SSM_SHARED(scratch, int64_t[kCountWarps]);
  const int64_t first = int64_t{blockIdx.x} * kCountThreads + threadIdx.x, step = int64_t{gridDim.x} * kCountThreads;
  int64_t left = 0, right = 0;
  if (in.pairs) {
    for (int64_t at = first; at < in.count; at += step) {
      const pairs::ListedPair pair = pairs::listed_pair(in.pairs, at, in.x_rows, in.y_rows);
      left +=
          pair.valid && in.focal.x_labels[pair.i] != in.focal.ignored && in.focal.y_labels[pair.j] != in.focal.ignored;
    }
  } else {
    for (int64_t i = first; i < in.x_rows; i += step) left += in.focal.x_labels[i] != in.focal.ignored;
    for (int64_t j = first; j < in.y_rows; j += step) right += in.focal.y_labels[j] != in.focal.ignored;
  }
  left = block_sum<kCountWarps>(left, scratch);
  right = block_sum<kCountWarps>(right, scratch);
  if (threadIdx.x > 0) return;
  if (gridDim.x == 1) return set_scale(out, left, right, in.pairs);
  out.parts[2 * blockIdx.x] = left;
  out.parts[2 * blockIdx.x + 1] = right;
}

__global__ void __launch_bounds__(PairCount::kBlocks) finish_count(PairCount count, int64_t blocks, bool listed) {
  constexpr int kWarps = PairCount::kBlocks / 32;
  SSM_SHARED(scratch, int64_t[kWarps]);
  const bool mine = threadIdx.x < blocks;
  const int64_t left = block_sum<kWarps>(mine ? count.parts[2 * threadIdx.x] : int64_t{0}, scratch);
  const int64_t right = block_sum<kWarps>(mine ? count.parts[2 * threadIdx.x + 1] : int64_t{0}, scratch);
  if (threadIdx.x == 0) set_scale(count, left, right, listed);
}

}  // namespace

template <class Storage>
const char* pair_focal_loss(const PairNetwork<Storage>& network, const FocalLoss& focal, Compute<Storage>* losses,
                            void* memory, CudaStream stream) {
  Workspace workspace(memory);
  const pairs::PairHead<Compute<Storage>> head{focal, losses, nullptr, nullptr, nullptr};
  return pairs::sweep_pairs<Storage>(network, head, nullptr, workspace, stream);
}

template <class Storage>
const char* pair_focal_loss_backward(const PairNetwork<Storage>& network, const FocalLoss& focal,
                                     const Compute<Storage>* grad_losses,
                                     const PairGradients<Compute<Storage>>& gradients, void* memory,
                                     CudaStream stream) {
  Workspace workspace(memory);
  const pairs::PairHead<Compute<Storage>> head{focal, nullptr, grad_losses, nullptr, nullptr};
  return pairs::sweep_pairs<Storage>(network, head, &gradients, workspace, stream);
}

template <class Storage>
const char* pair_focal_loss_sum(const PairNetwork<Storage>& network, const FocalLoss& focal,
                                const FocalLossSum<Compute<Storage>>& out, void* memory, CudaStream stream) {
  Workspace workspace(memory);
  const PairCount count = pairs::take_pair_count(workspace);
  if (out.mean) {
    const int64_t rows = network.pairs ? network.count : max(network.x_rows, network.y_rows);
    const int64_t blocks =
        rows <= kCountAlone ? 1 : min<int64_t>(ceil_div<int64_t>(rows, kCountThreads), PairCount::kBlocks);
    const CountInput in{focal, network.pairs, network.x_rows, network.y_rows, network.count};
    if (const char* error = launch(count_pairs, blocks, kCountThreads, 0, stream, in, count)) return error;
    if (blocks > 1)
      if (const char* error =
              launch(finish_count, 1, PairCount::kBlocks, 0, stream, count, blocks, network.pairs != nullptr))
        return error;
  }
  const pairs::PairHead<Compute<Storage>> head{focal, nullptr, nullptr, out.mean ? count.scale : nullptr, out.loss};
  return pairs::sweep_pairs<Storage>(network, head, out.gradients, workspace, stream);
}

#define SSM_INSTANTIATE(Storage)                                                                                 \
  template const char* pair_focal_loss(const PairNetwork<Storage>&, const FocalLoss&, Compute<Storage>*, void*,  \
                                       CudaStream);                                                              \
  template const char* pair_focal_loss_backward(const PairNetwork<Storage>&, const FocalLoss&,                   \
                                                const Compute<Storage>*, const PairGradients<Compute<Storage>>&, \
                                                void*, CudaStream);                                              \
  template const char* pair_focal_loss_sum(const PairNetwork<Storage>&, const FocalLoss&,                        \
                                           const FocalLossSum<Compute<Storage>>&, void*, CudaStream);
SSM_INSTANTIATE(float)
SSM_INSTANTIATE(double)
SSM_INSTANTIATE(bfloat16)
SSM_INSTANTIATE(float16)

}  // namespace ssmkernels::cuda
