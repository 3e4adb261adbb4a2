// SPDX-License-Identifier: BSD-3-Clause
#include "symmetric_graph.h"

#include <algorithm>

#include "../common/arithmetic.h"
#include "../common/buffer.h"

namespace ssmkernels::SSM_ISA {
namespace {

template <class Real>
bool is_entry(const NeighbourLists<Real>& lists, int64_t position) {
  const int32_t id = lists.ids[position];
  return id >= 0 && id < lists.nodes && lists.weights[position] > 0;
}

// Positions of the entries of list i, ascending by their ids: how many there are.
template <class Real>
int64_t sort_list(const NeighbourLists<Real>& lists, int64_t i, int64_t* positions) {
  int64_t count = 0;
  for (int64_t position = i * lists.neighbours; position < (i + 1) * lists.neighbours; ++position)
    if (is_entry(lists, position)) positions[count++] = position;
  std::sort(positions, positions + count,
            [&](int64_t left, int64_t right) { return lists.ids[left] < lists.ids[right]; });
  return count;
}

// Calls add(j, weight, mutual) for every entry of row i of W, with j ascending. `listed` is scratch [k].
template <class Real, class Add>
void merge_row(const NeighbourLists<Real>& lists, const TransposedLists& transposed, int64_t i, int64_t* listed,
               const Add& add) {
  const int64_t *mine = listed, *mine_end = listed + sort_list(lists, i, listed);
  const int64_t *other = transposed.positions + transposed.starts[i],
                *other_end = transposed.positions + transposed.starts[i + 1];
  while (mine < mine_end || other < other_end) {
    const int64_t my_id = mine < mine_end ? lists.ids[*mine] : lists.nodes;
    const int64_t other_id = other < other_end ? *other / lists.neighbours : lists.nodes;
    Real weight = 0;
    if (my_id <= other_id) weight += lists.weights[*mine++];
    if (other_id <= my_id) weight += lists.weights[*other++];
    add(min(my_id, other_id), weight, my_id == other_id);
  }
}

template <class Real>
void transpose(const NeighbourLists<Real>& lists, const TransposedLists& transposed) {
  const int64_t size = lists.nodes * lists.neighbours;
  int64_t* starts = transposed.starts;
  std::fill_n(starts, lists.nodes + 2, 0);
  for (int64_t position = 0; position < size; ++position)
    if (is_entry(lists, position)) ++starts[lists.ids[position] + 2];
  for (int64_t j = 2; j < lists.nodes + 2; ++j) starts[j] += starts[j - 1];
  for (int64_t position = 0; position < size; ++position)  // starts[j + 1] moves from where j begins to where it ends
    if (is_entry(lists, position)) transposed.positions[starts[lists.ids[position] + 1]++] = position;
}

}  // namespace

template <class Real>
void symmetric_rows(const NeighbourLists<Real>& lists, const TransposedLists& transposed, int64_t* crow,
                    ParallelFor parallel_for) {
  transpose(lists, transposed);
  crow[0] = 0;
  parallel_for(lists.nodes, [&](int64_t begin, int64_t end) {
    const Buffer<int64_t> listed(lists.neighbours);
    for (int64_t i = begin; i < end; ++i) {
      int64_t count = 0;
      merge_row(lists, transposed, i, listed.data(), [&](int64_t, Real, bool) { ++count; });
      crow[i + 1] = count;
    }
  });
  for (int64_t i = 0; i < lists.nodes; ++i) crow[i + 1] += crow[i];
}

template <class Real>
void symmetric_entries(const NeighbourLists<Real>& lists, const TransposedLists& transposed, const int64_t* crow,
                       int32_t* col, Real* weight, int64_t* reverse, bool* mutual, ParallelFor parallel_for) {
  parallel_for(lists.nodes, [&](int64_t begin, int64_t end) {
    const Buffer<int64_t> listed(lists.neighbours);
    int64_t e = crow[begin];
    for (int64_t i = begin; i < end; ++i)
      merge_row(lists, transposed, i, listed.data(), [&](int64_t j, Real sum, bool both) {
        col[e] = static_cast<int32_t>(j);
        weight[e] = sum;
        mutual[e++] = both;
      });
  });
  // Rows in ascending order meet the entries of row j in ascending order of its columns.
  const Buffer<int64_t> next(lists.nodes);
  std::copy_n(crow, lists.nodes, next.data());
  for (int64_t e = 0; e < crow[lists.nodes]; ++e) reverse[e] = next.data()[col[e]]++;
}

#define SSM_INSTANTIATE(Real)                                                                                          \
  template void symmetric_rows<Real>(const NeighbourLists<Real>&, const TransposedLists&, int64_t*, ParallelFor);      \
  template void symmetric_entries<Real>(const NeighbourLists<Real>&, const TransposedLists&, const int64_t*, int32_t*, \
                                        Real*, int64_t*, bool*, ParallelFor);
SSM_INSTANTIATE(float)
SSM_INSTANTIATE(double)
#undef SSM_INSTANTIATE

}  // namespace ssmkernels::SSM_ISA
