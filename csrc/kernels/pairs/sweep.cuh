// SPDX-License-Identifier: BSD-3-Clause
// The walk over pairs that every CUDA kernel of the family takes: it gives each pair's logit to the head, and with
// gradients carries the ∂L/∂logit that the head returns back to the network, in the same pass. Nothing is stored per
// pair, except a number per listed one.
#pragma once

#include "head.cuh"

namespace ssmkernels::cuda::pairs {

// `gradients` may be null. Defined in pair_logits.cu.
template <class Storage>
const char* sweep_pairs(const PairNetwork<Storage>&, const PairHead<Compute<Storage>>&,
                        const PairGradients<Compute<Storage>>* gradients, Workspace&, cudaStream_t);

// How many pairs count, as blocks have counted it.
struct PairCount {
  static constexpr int kBlocks = 256;

  int64_t* parts;  // [kBlocks][2]  rows of x and of y that count; of listed pairs, they and 0
  double* scale;   // [1]  1 / count, or 0
};

inline PairCount take_pair_count(Workspace& workspace) {
  PairCount count;
  count.parts = workspace.take<int64_t>(2 * PairCount::kBlocks);
  count.scale = workspace.take<double>(1);
  return count;
}

}  // namespace ssmkernels::cuda::pairs
