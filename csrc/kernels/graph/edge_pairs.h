// SPDX-License-Identifier: BSD-3-Clause
// The softmaxes of a vector of edges, each of both its ends: with the edges in the lanes, or with the classes.
#pragma once

#include <limits>

#include "../common/transpose.h"
#include "edge_nodes.h"

namespace ssmkernels::SSM_ISA {
namespace {

// Over the classes of one pair, or of a vector of pairs: with e = e^{a − shift} of each side, Σ e, Σ e (a − shift), and
// Σ e_ij e_ji.
template <class Real>
struct Sums {
  Vec<Real> sum_i{}, sum_j{}, moment_i{}, moment_j{}, dot{};

  void add(Vec<Real> e_i, Vec<Real> a_i, Vec<Real> e_j, Vec<Real> a_j) {
    sum_i += e_i;
    sum_j += e_j;
    moment_i += e_i * a_i;
    moment_j += e_j * a_j;
    dot += e_i * e_j;
  }
};

// Up to here the argument of an edge's own factor leaves the node's maximum near enough to the edge's to be its shift.
template <class Real>
constexpr Real kModerate = 4;

template <class Real>
struct Pair {
  const Row<Real>& row;
  Node<Real> other;
  Real logit_weight;  // λ w_ij
  Real mirrored;      // λ w_ji
};

// The values at classes c … of a row, 0 past the last class.
template <class Real>
Vec<Real> load_classes(const Real* row, int64_t c, int64_t classes) {
  return first_lanes<Real>(load(row + c), classes - c);
}

// Of a logit so far below the largest that its exponential is 0 in any dtype; stands for log 0 past the last class.
template <class Real>
constexpr Real kLogZero = -1000;

// Of logits whose product with another number must be finite where their exponentials are 0.
template <class Real>
Vec<Real> bounded(Vec<Real> logits) {
  return max(broadcast(kLogZero<Real>), logits);
}

// Calls each(c, e_i, a_i, e_j, a_j) for every vector of classes of one pair; the a are relative to the shift that the e
// are.
template <class Real, class F>
void for_each_vector(const Pair<Real>& pair, int64_t classes, const F& each) {
  const Row<Real>& row = pair.row;
  const Node<Real>&i = row.node, &j = pair.other;
  Real shift_i = 0, shift_j = 0;
  const auto argument = [&](int64_t c) { return load(j.centred + c) * pair.logit_weight; };
  const auto logit_i = [&](int64_t c) {
    return minus_product(load(row.logits + c), load(j.centred + c), broadcast(pair.logit_weight));
  };
  const auto logit_j = [&](int64_t c) {
    return minus_product((load(j.centred + c) - j.best) * j.scale, load(i.centred + c), broadcast(pair.mirrored));
  };
  const Real reach_i = pair.logit_weight * j.reach, reach_j = pair.mirrored * i.reach;
  if (reach_i <= static_cast<Real>(kExpReduced) && reach_j <= kModerate<Real>) {
    for (int64_t c = 0; c < classes; c += kLanes<Real>) {
      const Vec<Real> a_j = first_lanes<Real>(logit_j(c), classes - c, kLogZero<Real>);
      each(c, exp_reduced(-argument(c)) * load(row.factor + c), logit_i(c), exp(a_j), a_j);
    }
    return;
  }
  if (max(reach_i, reach_j) > kModerate<Real>) {
    constexpr Real kLowest = -std::numeric_limits<Real>::max();
    Vec<Real> top_i = broadcast(kLowest), top_j = top_i;
    for (int64_t c = 0; c < classes; c += kLanes<Real>) {
      top_i = max(top_i, first_lanes<Real>(logit_i(c), classes - c, kLowest));
      top_j = max(top_j, first_lanes<Real>(logit_j(c), classes - c, kLowest));
    }
    shift_i = max_lane<Real>(top_i);
    shift_j = max_lane<Real>(top_j);
  }
  for (int64_t c = 0; c < classes; c += kLanes<Real>) {
    const Vec<Real> a_i = first_lanes<Real>(logit_i(c) - shift_i, classes - c, kLogZero<Real>);
    const Vec<Real> a_j = first_lanes<Real>(logit_j(c) - shift_j, classes - c, kLogZero<Real>);
    each(c, exp(a_i), a_i, exp(a_j), a_j);
  }
}

// Of each pair in the lanes.
template <class Real>
struct Confidences {
  Vec<Real> inverse_i, inverse_j, mean_i, mean_j;  // 1/Σ e and Σ e a/Σ e of each side
  Vec<Real> omega_i, omega_j, overlap;             // ω_ij, ω_ji, Z_ij·Z_ji

  Confidences(const Sums<Real>& s, Real inverse_log_classes) {
    inverse_i = 1 / s.sum_i;
    inverse_j = 1 / s.sum_j;
    mean_i = s.moment_i * inverse_i;
    mean_j = s.moment_j * inverse_j;
    omega_i = 1 - (log(s.sum_i) - mean_i) * inverse_log_classes;
    omega_j = 1 - (log(s.sum_j) - mean_j) * inverse_log_classes;
    overlap = s.dot * inverse_i * inverse_j;
  }

  Vec<Real> dissimilarity() const {  // rounding alone takes it out of [0, 1]; NaN stays, as the second of max
    const Vec<Real> none{}, product = max(none, omega_i) * max(none, omega_j) * max(none, 1 - overlap);
    return product > 1 ? none + 1 : product;
  }
};

// G r_ij = e_ij (constant_i + linear_i a_ij − product e_ji), and r_ji likewise; of each pair in the lanes.
template <class Real>
struct GradLogits {
  Vec<Real> constant_i, linear_i, constant_j, linear_j, product;

  GradLogits(const Sums<Real>& s, Real inverse_log_classes, Vec<Real> grad) {
    const Confidences<Real> of(s, inverse_log_classes);
    const Vec<Real> both = grad * of.omega_i * of.omega_j, apart = grad * (1 - of.overlap) * inverse_log_classes;
    linear_i = apart * of.omega_j * of.inverse_i;
    linear_j = apart * of.omega_i * of.inverse_j;
    constant_i = both * of.overlap * of.inverse_i - linear_i * of.mean_i;
    constant_j = both * of.overlap * of.inverse_j - linear_j * of.mean_j;
    product = both * of.inverse_i * of.inverse_j;
  }
};

// Entries of one row that are to be followed, several vectors of them.
template <class Real>
struct Pairs {
  static constexpr int kCapacity = 64;
  int64_t node = 0;
  int size = 0;
  int64_t entry[kCapacity], mirror[kCapacity];        // where (i, j) and (j, i) are
  int32_t other[kCapacity];                           // j
  Real logit_weight[kCapacity], mirrored[kCapacity];  // λ w_ij, λ w_ji

  // Takes the entries from `at` up to `end`, as far as they fit; returns where it stopped.
  int64_t take(const LeaveOneEdgeOut<Real>& in, int64_t at, int64_t end) {
    const int count = static_cast<int>(min<int64_t>(end - at, kCapacity - size));
    const uint32_t nodes = static_cast<uint32_t>(in.graph.nodes);
    const uint64_t edges = static_cast<uint64_t>(in.graph.edges);
    uint32_t bad_columns = 0;  // of the width of what is compared, which the compiler turns into vectors
    uint64_t bad_mirrors = 0;
    for (int k = 0; k < count; ++k) {
      entry[size + k] = at + k;
      mirror[size + k] = in.reverse[at + k];
      bad_mirrors |= static_cast<uint64_t>(in.reverse[at + k]) >= edges;
    }
    for (int k = 0; k < count; ++k) {
      other[size + k] = in.graph.col[at + k];
      logit_weight[size + k] = in.weight[at + k];
      bad_columns |= static_cast<uint32_t>(in.graph.col[at + k]) >= nodes;
    }
    const int last = size + count;
    if (!bad_columns && !bad_mirrors) {
      size = last;
      return at + count;
    }
    for (int k = size; k < last; ++k) {
      if (static_cast<uint32_t>(other[k]) >= nodes || static_cast<uint64_t>(mirror[k]) >= edges) continue;
      entry[size] = entry[k];
      mirror[size] = mirror[k];
      other[size] = other[k];
      logit_weight[size++] = logit_weight[k];
    }
    return at + count;
  }

  // Ready for the lanes; past the last pair, up to the end of its vector, are copies of the first.
  void prepare(const LeaveOneEdgeOut<Real>& in) {
    for (int k = size; k % kLanes<Real> != 0; ++k) {
      mirror[k] = mirror[0];
      other[k] = other[0];
      logit_weight[k] = logit_weight[0];
    }
    const Real lambda = static_cast<Real>(in.logit_scale);
    for (int b = 0; b < size; b += kLanes<Real>) {
#pragma GCC unroll 16
      for (int k = b; k < b + kLanes<Real>; ++k) mirrored[k] = in.weight[mirror[k]];
      store(logit_weight + b, lambda * load(logit_weight + b));
      store(mirrored + b, lambda * load(mirrored + b));
    }
  }
};

// The rows of the other nodes of a vector of pairs, transposed.
template <class Real>
struct Columns {
  Vec<Real> of[kLanes<Real>];

  Columns(const Nodes<Real>& nodes, const int32_t* others) {
#pragma GCC unroll 16
    for (int k = 0; k < kLanes<Real>; ++k) of[k] = load(nodes.centred(others[k]));
    transpose<Real>(of);
  }
};

// Calls each(c, e_i, a_i, e_j, a_j) for every class; the a are relative to the shift that the e are.
template <class Real, class F>
void for_each_class(const Row<Real>& row, const Pairs<Real>& pairs, int at, const Columns<Real>& centred,
                    int64_t classes, const F& each) {
  const Node<Real>& i = row.node;
  const Vec<Real> scale = centred.of[kScaleLane<Real>], best = centred.of[kBestLane<Real>],
                  reach = centred.of[kReachLane<Real>];
  const Vec<Real> logit_weight = load(pairs.logit_weight + at), mirrored = load(pairs.mirrored + at);
  Vec<Real> shift_i{}, shift_j{};
  const auto logit_i = [&](int64_t c) { return minus_product(broadcast(row.logits[c]), centred.of[c], logit_weight); };
  const auto logit_j = [&](int64_t c) {
    return minus_product((centred.of[c] - best) * scale, broadcast(i.centred[c]), mirrored);
  };
  if (max_lane<Real>(max(logit_weight * reach, mirrored * i.reach)) > kModerate<Real>) {
    Vec<Real> top_i = logit_i(0), top_j = logit_j(0);
    for (int64_t c = 1; c < classes; ++c) {
      top_i = max(top_i, logit_i(c));
      top_j = max(top_j, logit_j(c));
    }
    shift_i = top_i;
    shift_j = top_j;
  }
  for (int64_t c = 0; c < classes; ++c) {
    const Vec<Real> a_i = logit_i(c) - shift_i, a_j = logit_j(c) - shift_j;
    each(c, exp(a_i), a_i, exp(a_j), a_j);
  }
}

// Lanes are classes: calls each(k, c, e_i, a_i, e_j, a_j) for every pair k and vector of classes, and sums along the
// lanes of all pairs at once.
template <class Real, class F>
Sums<Real> wide_sums(const Nodes<Real>& nodes, const Row<Real>& row, const Pairs<Real>& pairs, int at, const F& each) {
  const int size = min(pairs.size - at, kLanes<Real>);
  Vec<Real> sum_i[kLanes<Real>], sum_j[kLanes<Real>], moment_i[kLanes<Real>], moment_j[kLanes<Real>], dot[kLanes<Real>];
  for (int k = 0; k < kLanes<Real>; ++k) {
    Sums<Real> sums;
    if (at + k + kAhead < pairs.size) nodes.prefetch(pairs.other[at + k + kAhead]);
    if (k < size)
      for_each_vector<Real>({row, nodes[pairs.other[at + k]], pairs.logit_weight[at + k], pairs.mirrored[at + k]},
                            nodes.classes, [&](int64_t c, Vec<Real> e_i, Vec<Real> a_i, Vec<Real> e_j, Vec<Real> a_j) {
                              sums.add(e_i, a_i, e_j, a_j);
                              each(k, c, e_i, a_i, e_j, a_j);
                            });
    else
      sums.sum_i = sums.sum_j = broadcast(Real(1));
    sum_i[k] = sums.sum_i;
    sum_j[k] = sums.sum_j;
    moment_i[k] = sums.moment_i;
    moment_j[k] = sums.moment_j;
    dot[k] = sums.dot;
  }
  Sums<Real> total;
  total.sum_i = sum_lanes<Real>(sum_i);
  total.sum_j = sum_lanes<Real>(sum_j);
  total.moment_i = sum_lanes<Real>(moment_i);
  total.moment_j = sum_lanes<Real>(moment_j);
  total.dot = sum_lanes<Real>(dot);
  return total;
}

template <class Real>
Sums<Real> sums_of(const Nodes<Real>& nodes, const Row<Real>& row, const Pairs<Real>& pairs, int at) {
  if (!nodes.is_narrow()) return wide_sums(nodes, row, pairs, at, [](auto...) {});
  Sums<Real> sums;
  for_each_class(
      row, pairs, at, Columns<Real>(nodes, pairs.other + at), nodes.classes,
      [&](int64_t, Vec<Real> e_i, Vec<Real> a_i, Vec<Real> e_j, Vec<Real> a_j) { sums.add(e_i, a_i, e_j, a_j); });
  return sums;
}

}  // namespace
}  // namespace ssmkernels::SSM_ISA
