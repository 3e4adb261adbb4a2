// SPDX-License-Identifier: BSD-3-Clause
// The similarity network of MLSN (2020), section 2.1, on pairs of rows.
//
//   logit_ij = w2·relu(w1·φ(x_i, y_j) + b1) + b2
// φ is [x_i, y_j], |x_i − y_j| or x_i∘y_j. For the first, w1·φ + b1 = A_i + B_j with two small matrix products that are
// not done here: the kernels take A and B for x and y. No [n, m, h] or [n, m, d] tensor exists, forward or backward:
// hidden units are computed where they are needed, and again in the backward.
#pragma once

#include <cstdint>

#include "../common/dtype.h"
#include "../common/stream.h"

namespace ssmkernels {

enum class Interaction { concat, absdiff, product };

// All matrices have contiguous rows.
template <class Storage>
struct PairNetwork {
  Interaction interaction;
  const Storage* x;            // [n, d]; for concat A [n, h]
  const Storage* y;            // [m, d]; for concat B [m, h]
  const Storage* w1;           // [h, d]; for concat null
  const Compute<Storage>* b1;  // [h]; for concat null
  const Compute<Storage>* w2;  // [h]
  const Compute<Storage>* b2;  // [1]
  const int64_t* pairs;  // [p, 2] rows of x and y, or null for all n·m of them; one outside is skipped, its logit is 0
  int64_t x_rows, y_rows;  // n, m
  int64_t features;        // d; for concat h
  int64_t hidden;          // h
  int64_t count;           // p; n·m if pairs is null
};

// Of a scalar, with respect to what PairNetwork holds. Every element is written.
template <class Real>
struct PairGradients {
  Real* x;   // [n, d]; for concat [n, h]
  Real* y;   // [m, d]; for concat [m, h]
  Real* w1;  // [h, d]; for concat null
  Real* b1;  // [h]; for concat null
  Real* w2;  // [h]
  Real* b2;  // [1]
};

}  // namespace ssmkernels
