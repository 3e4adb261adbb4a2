// SPDX-License-Identifier: BSD-3-Clause
// A slot as a sweep meets it.
#pragma once

#include "bank.h"

namespace ssmkernels::cuda {

struct Slot {
  int64_t index;  // in the bank
  int64_t label;  // in [0, L]; L stands for no class
};

__device__ inline int64_t class_row(int64_t label, int64_t classes) {
  return label >= 0 && label < classes ? label : classes;
}

}  // namespace ssmkernels::cuda
