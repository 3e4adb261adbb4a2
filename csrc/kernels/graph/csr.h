// SPDX-License-Identifier: BSD-3-Clause
// A symmetric graph in compressed sparse rows: both directions of an edge are stored, columns ascend within a row.
#pragma once

#include <cstdint>

#include "../common/stream.h"

namespace ssmkernels {

// Node ids are 32 bits wide, positions in the arrays of edges 64.
struct Csr {
  const int64_t* crow;  // [N + 1]  row i has the entries crow[i] … crow[i + 1] − 1
  const int32_t* col;   // [E]      in [0, N)
  int64_t nodes;        // N
  int64_t edges;        // E, each direction counted
};

}  // namespace ssmkernels
