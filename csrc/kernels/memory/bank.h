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
};

}  // namespace ssmkernels
