// SPDX-License-Identifier: BSD-3-Clause
// The op to read first: the shortest with everything that an op has. This header states the problem, in the order of
// the paper: what is computed, the arguments with their shapes, and who may call it. memory_update.cpp and .cu solve
// it, csrc/torch/memory_update.cpp makes an operator of torch of it, ssmkernels/ops/memory.py a documented function,
// ssmkernels/reference/memory.py says in plain PyTorch what is right. CONTRIBUTING.md has the way to add another.
//
// Temporal ensemble of SimMatch (CVPR 2022): slot ← normalise(m·old + (1 − m)·new), label ← new label.
// An index that occurs twice is applied in batch order. Normalising divides by max(‖x‖, 1e-12); a NaN makes NaN of its
// slot. An index outside [0, K) is skipped.
#pragma once

#include "../common/isa.h"
#include "../common/parallel_for.h"
#include "bank.h"

namespace ssmkernels {

// Raw pointers and sizes: a kernel knows nothing of torch. Storage is float, double, bfloat16 or float16; sums and
// products are in Compute<Storage>, float or double.
template <class Storage>
struct MemoryUpdate {
  Storage* features;     // [K, D], element (k, d) at features[k * row_stride + d * column_stride]; read and written
  int64_t* labels;       // [K], element k at labels[k * label_stride]; written
  const int64_t* index;  // [B]
  const Storage* new_features;  // [B, D], rows contiguous
  const int64_t* new_labels;    // [B]
  int64_t slots;                // K
  int64_t dim;                  // D
  int64_t rows;                 // B
  int64_t row_stride;
  int64_t column_stride;
  int64_t label_stride;
  double momentum;
};

}  // namespace ssmkernels

// The CPU kernel, once for each instruction set. The caller brings the threads, as a parallel_for.
SSM_PER_ISA(template <class Storage> void memory_update(const MemoryUpdate<Storage>&, ParallelFor);)

namespace ssmkernels::cuda {

// The CUDA kernel on a stream. Returns null, or the message of CUDA's error.
template <class Storage>
const char* memory_update(const MemoryUpdate<Storage>&, CudaStream);

}  // namespace ssmkernels::cuda
