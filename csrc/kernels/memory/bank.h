// SPDX-License-Identifier: BSD-3-Clause
// The labelled memory buffer of SimMatch: K slots, each a feature and a class.
#pragma once

#include <cstdint>

#include "../common/dtype.h"
#include "../common/stream.h"

namespace ssmkernels {

template <class Storage>
struct Bank {
  const Storage* features;  // [K, D], element (k, d) at features[k * row_stride + d * column_stride]
  const int64_t* labels;    // [K]; a label outside [0, classes) belongs to no class
  int64_t slots;            // K
  int64_t dim;              // D
  int64_t classes;          // L
  int64_t row_stride;
  int64_t column_stride;
  void* class_order = nullptr;  // CUDA only: what kept_class_order_bytes says; null: the order is found anew
};

}  // namespace ssmkernels

namespace ssmkernels::cuda {

// Of device memory that holds the class order of a bank between calls with as many slots and classes, for one stream at
// a time; 0 before its first use. No bytes for a small bank, whose order is not kept. Each call compares the order with
// the labels on the device, whoever wrote them.
int64_t kept_class_order_bytes(int64_t slots, int64_t classes);

// Such memory, in the order of the stream; null where there is none. It is CUDA's and not an allocator's that gives a
// graph memory of its own: what outlives a call must not lie there.
void* allocate_class_order(int64_t bytes, CudaStream stream);
void free_class_order(void* memory, CudaStream stream);

// Whether what is launched on the stream becomes part of a graph, which must find its memory at each replay.
bool is_capturing(CudaStream stream);

}  // namespace ssmkernels::cuda
