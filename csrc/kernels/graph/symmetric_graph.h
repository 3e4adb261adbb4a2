// SPDX-License-Identifier: BSD-3-Clause
// W = A + Aᵀ as a graph, from lists of neighbours: row i of A holds the weights of the k neighbours of node i, which is
// equation (15) of mixed label propagation. A neighbour whose id is no node, or whose weight is not above 0, is left
// out.
//
// The lists are transposed by a counting sort, and a row of W is the merge of a sorted list and a transposed one.
// Beside the result, memory is one position an entry of A.
#pragma once

#include <cstdint>

#include "../common/isa.h"
#include "../common/parallel_for.h"

namespace ssmkernels {

template <class Real>
struct NeighbourLists {
  const int32_t* ids;   // [N, k], none twice in a list
  const Real* weights;  // [N, k]
  int64_t nodes;        // N
  int64_t neighbours;   // k
};

// Who lists a node: the entries positions[starts[j] .. starts[j + 1]) of A have the id j, and ascend. The caller's
// memory.
struct TransposedLists {
  int64_t* starts;     // [N + 2], of which the last is scratch
  int64_t* positions;  // [N·k], as many as A has entries
};

}  // namespace ssmkernels

// First symmetric_rows, for the transposed lists, crow [N + 1] and with it E; then symmetric_entries for col, weight,
// reverse (the position of the entry (j, i)) and mutual (both nodes list each other), all [E].
SSM_PER_ISA(template <class Real>
            void symmetric_rows(const NeighbourLists<Real>&, const TransposedLists&, int64_t* crow, ParallelFor);
            template <class Real>
            void symmetric_entries(const NeighbourLists<Real>&, const TransposedLists&, const int64_t* crow,
                                   int32_t* col, Real* weight, int64_t* reverse, bool* mutual, ParallelFor);)
