// SPDX-License-Identifier: BSD-3-Clause
// What leave_one_edge_out knows of a node before it meets edges, and of the node whose row is computed.
#pragma once

#include "../common/arithmetic.h"
#include "../common/buffer.h"
#include "../common/simd.h"
#include "leave_one_edge_out.h"

namespace ssmkernels::SSM_ISA {
namespace {

constexpr int64_t kRowsPerTask = 32;
constexpr int kAhead = 2;  // pairs between fetching the row of the other node and computing with it
constexpr int kIntoL2 =
    2;  // where fetching waits for the few lines that may be on their way to L1, the work behind it does too

template <class Real>
struct Node {
  const Real* centred;  // [C]  F_i less a constant, and 0 up to the end of the vector
  Real scale;           // λ D_ii
  Real best;            // the centred value whose logit is the node's largest
  Real reach;           // max_c |centred|
};

// Where a row of classes leaves three lanes of one vector free, its last lanes hold scale, best and reach, to be
// transposed with it.
template <class Real>
inline constexpr int kReachLane = kLanes<Real> - 1;
template <class Real>
inline constexpr int kBestLane = kLanes<Real> - 2;
template <class Real>
inline constexpr int kScaleLane = kLanes<Real> > 2 ? kLanes<Real> - 3 : 0;

template <class Real>
Real max_lane(Vec<Real> v) {
  Real top = v[0];
  for (int lane = 1; lane < kLanes<Real>; ++lane) top = max(top, static_cast<Real>(v[lane]));
  return top;
}

template <class Real>
class Nodes {
 public:
  explicit Nodes(const LeaveOneEdgeOut<Real>& in)
      : classes(in.classes),
        stride(divide_up(in.classes, kLanes<Real>) * kLanes<Real>),
        row_(is_narrow() ? stride : stride + max(kLanes<Real>, 4)),
        values_(in.graph.nodes * row_) {}

  Node<Real> operator[](int64_t i) const {
    const Real *values = centred(i), *scalars = values + scalars_at();
    return {values, scalars[0], scalars[1], scalars[2]};
  }

  const Real* centred(int64_t i) const {
    return values_.data() + i * row_;
  }

  bool is_narrow() const {
    return classes <= kScaleLane<Real>;
  }

  // Fetches the values of a node into the cache, while others are computed.
  void prefetch(int64_t i) const {
    const char* values = reinterpret_cast<const char*>(centred(i));
    for (int64_t byte = 0; byte < row_ * static_cast<int64_t>(sizeof(Real)); byte += 64)
      __builtin_prefetch(values + byte, 0, kIntoL2);
  }

  void prepare(const LeaveOneEdgeOut<Real>& in, ParallelFor parallel_for) {
    const int64_t nodes = in.graph.nodes, tasks = (nodes + kRowsPerTask - 1) / kRowsPerTask;
    parallel_for(tasks, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin * kRowsPerTask; i < end * kRowsPerTask && i < nodes; ++i) prepare_node(in, i);
    });
  }

  const int64_t classes;
  const int64_t stride;  // classes rounded up to whole vectors

 private:
  int64_t scalars_at() const {
    return is_narrow() ? kScaleLane<Real> : stride;
  }

  static Real sum_of(const Real* values, int64_t size) {
    Vec<Real> sums{};
    int64_t k = 0;
    for (; k + kLanes<Real> <= size; k += kLanes<Real>) sums += load(values + k);
    Real sum = sum_lanes<Real>(sums);
    for (; k < size; ++k) sum += values[k];
    return sum;
  }

  void prepare_node(const LeaveOneEdgeOut<Real>& in, int64_t i) {
    const Real degree = sum_of(in.weight + in.graph.crow[i], in.graph.crow[i + 1] - in.graph.crow[i]);
    const Real* f = in.propagated + i * classes;
    Vec<Real> least = broadcast(f[0]), largest = least;
    int64_t c = 0;
    for (; c + kLanes<Real> <= classes; c += kLanes<Real>) {
      least = min(least, load(f + c));
      largest = max(largest, load(f + c));
    }
    Real low = -max_lane<Real>(-least), high = max_lane<Real>(largest);
    for (; c < classes; ++c) {
      low = f[c] < low ? f[c] : low;
      high = f[c] > high ? f[c] : high;
    }
    const Real half = high / 2 - low / 2;
    Real middle = low + half;
    if (middle / 2 <= half && -middle / 2 <= half) middle = 0;  // beyond that the subtraction is exact
    const Real lambda = static_cast<Real>(in.logit_scale), scale = lambda * degree;
    Real *centred = values_.data() + i * row_, *scalars = centred + scalars_at();
    for (c = 0; c < classes; ++c) centred[c] = f[c] - middle;
    for (; c < row_; ++c) centred[c] = 0;
    scalars[0] = scale;
    scalars[1] = scale < 0 ? low - middle : high - middle;
    scalars[2] = max(high - middle, middle - low);
  }

  const int64_t row_;  // the classes, and where they leave no lanes for it a vector with scale, best and reach
  Buffer<Real> values_;
};

// The node whose row is computed.
template <class Real>
struct Row {
  Node<Real> node;
  Real* logits;  // [C]  scale·(centred − best)
  Real* factor;  // [C]  e^logits, and 0 up to the end of the vector

  Row(const Nodes<Real>& nodes, int64_t i, Real* scratch)
      : node(nodes[i]), logits(scratch), factor(scratch + nodes.stride) {
    for (int64_t c = 0; c < nodes.stride; c += kLanes<Real>) {
      const Vec<Real> logit = (load(node.centred + c) - node.best) * node.scale;
      store(logits + c, logit);
      store(factor + c, first_lanes<Real>(exp(logit), nodes.classes - c));
    }
  }

  static int64_t scratch(const Nodes<Real>& nodes) {
    return 2 * nodes.stride;
  }
};

}  // namespace
}  // namespace ssmkernels::SSM_ISA
