// SPDX-License-Identifier: BSD-3-Clause
// Storage types of tensors, and the type each is computed in.
#pragma once

#include <cstdint>

namespace ssmkernels {

struct bfloat16 {
  uint16_t bits;
};

struct float16 {
  uint16_t bits;
};

// Half types are read and written, never computed with: sums and statistics of theirs are float32.
template <class Storage>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};
template <class Storage>
using Compute = typename ComputeType<Storage>::type;

}  // namespace ssmkernels
