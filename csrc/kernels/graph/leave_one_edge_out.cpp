// SPDX-License-Identifier: BSD-3-Clause
// The exponentials are what costs. On the side of the row that is computed e^{a_ij} = e^{λ D_ii F_i} e^{−λ w_ij F_j}:
// the first factor is one per node, and the second's argument is small (one edge out of many), so that it mostly is the
// polynomial alone, without the reduction of its range. The other side's would have to be read, which costs more than
// it saves. Logits are taken less their node's maximum as soon as they are made, and where F_i is a large constant and
// small differences the constant is taken off first, which no softmax sees. A vector's worth of entries of a row is
// computed at once: for few classes with the pairs in the lanes, the rows of their other nodes being transposed; for
// many with the classes in the lanes, and only what follows from their sums with the pairs there.
#include "leave_one_edge_out.h"

#include <limits>

#include "../common/arithmetic.h"
#include "../common/buffer.h"
#include "../common/simd.h"
#include "../common/transpose.h"

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
  Real top;             // max_c scale·centred
  Real reach;           // λ max_c |centred|
};

// Where a row of classes leaves three lanes of one vector free, its last lanes hold scale, top and reach, to be
// transposed with it.
template <class Real>
inline constexpr int kReachLane = kLanes<Real> - 1;
template <class Real>
inline constexpr int kTopLane = kLanes<Real> - 2;
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
    scalars[1] = max(scale * (high - middle), scale * (low - middle));
    scalars[2] = lambda * max(high - middle, middle - low);
  }

  const int64_t row_;  // the classes, and where they leave no lanes for it a vector with scale, top and reach
  Buffer<Real> values_;
};

// The node whose row is computed.
template <class Real>
struct Row {
  Node<Real> node;
  Real* logits;  // [C]  scale·centred − top
  Real* factor;  // [C]  e^logits, and 0 up to the end of the vector

  Row(const Nodes<Real>& nodes, int64_t i, Real* scratch)
      : node(nodes[i]), logits(scratch), factor(scratch + nodes.stride) {
    for (int64_t c = 0; c < nodes.stride; c += kLanes<Real>) {
      const Vec<Real> logit = load(node.centred + c) * node.scale - node.top;
      store(logits + c, logit);
      store(factor + c, first_lanes<Real>(exp(logit), nodes.classes - c));
    }
  }

  static int64_t scratch(const Nodes<Real>& nodes) {
    return 2 * nodes.stride;
  }
};

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
  const auto logit_i = [&](int64_t c) { return load(row.logits + c) - argument(c); };
  const auto logit_j = [&](int64_t c) {
    return (load(j.centred + c) * j.scale - j.top) - load(i.centred + c) * pair.mirrored;
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
struct Slopes {
  Vec<Real> constant_i, linear_i, constant_j, linear_j, product;

  Slopes(const Sums<Real>& s, Real inverse_log_classes, Vec<Real> grad) {
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
  const Vec<Real> scale = centred.of[kScaleLane<Real>], top = centred.of[kTopLane<Real>],
                  reach = centred.of[kReachLane<Real>];
  const Vec<Real> logit_weight = load(pairs.logit_weight + at), mirrored = load(pairs.mirrored + at);
  Vec<Real> shift_i{}, shift_j{};
  const auto logit_i = [&](int64_t c) { return row.logits[c] - centred.of[c] * logit_weight; };
  const auto logit_j = [&](int64_t c) { return (centred.of[c] * scale - top) - i.centred[c] * mirrored; };
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

// A pair is computed by one of its rows: by i if j is among the N/2 nodes that follow it, cyclically. Every row then
// owns about half of its pairs, and finds them in two runs of its entries. (With i < j as the rule, a row's partners
// would be spread over more of the memory.)
struct Runs {
  int64_t begin[2], end[2];

  static Runs all(const Csr& graph, int64_t i) {
    return {{graph.crow[i], 0}, {graph.crow[i + 1], 0}};
  }

  static Runs owned(const Csr& graph, int64_t i) {
    const int64_t first = graph.crow[i], last = graph.crow[i + 1], past = i + graph.nodes / 2 + 1;
    // Of two nodes that are N/2 apart in both directions, the smaller owns the pair.
    const int64_t wrapped = max<int64_t>(past - graph.nodes - (graph.nodes % 2 == 0), 0);
    const uint32_t bounds[] = {static_cast<uint32_t>(i), static_cast<uint32_t>(past), static_cast<uint32_t>(wrapped)};
    uint32_t before = 0, within = 0, around = 0;  // entries with a column below each: counting has no branches to miss
    for (int64_t e = first; e < last; ++e) {
      const uint32_t j = static_cast<uint32_t>(graph.col[e]);
      before += j < bounds[0];
      within += j < bounds[1];
      around += j < bounds[2];
    }
    return {{first + before, first}, {first + within, first + min(around, before)}};
  }
};

// Calls each() with `pairs` full of entries of some runs of a row, until there are no more; each() empties them, or
// puts others in their place.
template <class Real, class F>
void for_each_pairs(const LeaveOneEdgeOut<Real>& in, int64_t node, const Runs& runs, Pairs<Real>*& pairs,
                    const F& each) {
  int64_t at = runs.begin[0], next = runs.begin[1];
  while (at < runs.end[0] || next < runs.end[1]) {
    pairs->node = node;
    at = pairs->take(in, at, runs.end[0]);
    if (at == runs.end[0]) next = pairs->take(in, next, runs.end[1]);
    if (pairs->size > 0) each();
  }
}

// What the entries of one row add to the gradients of its node.
template <class Real>
struct RowGradient {
  const Nodes<Real>& nodes;
  const Row<Real>& row;
  Real *own, *others, *saved;
  Real inverse_log_classes;
  Vec<Real> own_of[kLanes<Real>] = {},
            others_of[kLanes<Real>] = {};  // with few classes: of each class, with the pairs in the lanes

  // Σ_c G r_ij F_j of each pair in the lanes; r sums to 0, so that centring F_j changes nothing.
  Vec<Real> add(const Pairs<Real>& pairs, int at, Vec<Real> grad) {
    return nodes.is_narrow() ? add_narrow(pairs, at, grad) : add_wide(pairs, at, grad);
  }

  void finish() {
    if (!nodes.is_narrow()) return;
    store(own, sum_lanes<Real>(own_of));
    store(others, sum_lanes<Real>(others_of));
  }

 private:
  Vec<Real> add_narrow(const Pairs<Real>& pairs, int at, Vec<Real> grad) {
    if (nodes.classes < 2)
      __builtin_unreachable();  // or the compiler warns of arrays that a loop over no classes would leave unset
    const Columns<Real> centred(nodes, pairs.other + at);
    Vec<Real> e_i[kLanes<Real>], a_i[kLanes<Real>], e_j[kLanes<Real>], a_j[kLanes<Real>];
    Sums<Real> sums;
    for_each_class(row, pairs, at, centred, nodes.classes,
                   [&](int64_t c, Vec<Real> ei, Vec<Real> ai, Vec<Real> ej, Vec<Real> aj) {
                     sums.add(ei, ai, ej, aj);
                     e_i[c] = ei;
                     a_i[c] = bounded<Real>(ai);
                     e_j[c] = ej;
                     a_j[c] = bounded<Real>(aj);
                   });
    const Slopes<Real> slopes(sums, inverse_log_classes, grad);
    const Vec<Real> mirrored = load(pairs.mirrored + at);
    Vec<Real> along{};
    for (int64_t c = 0; c < nodes.classes; ++c) {
      const Vec<Real> r_ij = e_i[c] * (slopes.constant_i + slopes.linear_i * a_i[c] - slopes.product * e_j[c]);
      const Vec<Real> r_ji = e_j[c] * (slopes.constant_j + slopes.linear_j * a_j[c] - slopes.product * e_i[c]);
      own_of[c] += r_ij;
      others_of[c] += mirrored * r_ji;
      along += r_ij * centred.of[c];
    }
    return along;
  }

  Vec<Real> add_wide(const Pairs<Real>& pairs, int at, Vec<Real> grad) {
    const int64_t stride = nodes.stride;
    const Sums<Real> sums = wide_sums(
        nodes, row, pairs, at, [&](int k, int64_t c, Vec<Real> e_i, Vec<Real> a_i, Vec<Real> e_j, Vec<Real> a_j) {
          Real* kept = saved + 4 * (k * stride + c);
          store(kept, e_i);
          store(kept + kLanes<Real>, bounded<Real>(a_i));
          store(kept + 2 * kLanes<Real>, e_j);
          store(kept + 3 * kLanes<Real>, bounded<Real>(a_j));
        });
    const Slopes<Real> slopes(sums, inverse_log_classes, grad);
    Vec<Real> along[kLanes<Real>] = {};
    for (int k = 0; k < min(pairs.size - at, kLanes<Real>); ++k) {
      const Real* centred = nodes.centred(pairs.other[at + k]);
      for (int64_t c = 0; c < stride; c += kLanes<Real>) {
        const Real* kept = saved + 4 * (k * stride + c);
        const Vec<Real> e_i = load(kept), a_i = load(kept + kLanes<Real>), e_j = load(kept + 2 * kLanes<Real>),
                        a_j = load(kept + 3 * kLanes<Real>);
        const Vec<Real> r_ij = e_i * (slopes.constant_i[k] + slopes.linear_i[k] * a_i - slopes.product[k] * e_j);
        const Vec<Real> r_ji = e_j * (slopes.constant_j[k] + slopes.linear_j[k] * a_j - slopes.product[k] * e_i);
        store(own + c, load(own + c) + r_ij);
        store(others + c, load(others + c) + pairs.mirrored[at + k] * r_ji);
        along[k] += r_ij * load(centred + c);
      }
    }
    return sum_lanes<Real>(along);
  }
};

template <class Real>
Real inverse_log(int64_t classes) {
  return 1 / log(broadcast(static_cast<Real>(classes)))[0];
}

}  // namespace

template <class Real>
void leave_one_edge_out(const LeaveOneEdgeOut<Real>& in, Real* dissimilarity, ParallelFor parallel_for) {
  Nodes<Real> nodes(in);
  nodes.prepare(in, parallel_for);
  const int64_t tasks = (in.graph.nodes + kRowsPerTask - 1) / kRowsPerTask;
  const Real inverse_log_classes = inverse_log<Real>(in.classes);
  parallel_for(in.graph.edges, [&](int64_t begin, int64_t end) {  // entries that nobody owns stay 0
    for (int64_t e = begin; e < end; ++e) dissimilarity[e] = 0;
  });
  parallel_for(tasks, [&](int64_t begin, int64_t end) {
    Buffer<Real> scratch(Row<Real>::scratch(nodes));
    Pairs<Real> gathered[2];  // one lot is computed while what the other needs is on its way to the cache
    Pairs<Real>*next = gathered, *ready = gathered + 1;
    const auto compute = [&](Pairs<Real>& pairs) {
      pairs.prepare(in);
      const Row<Real> row(nodes, pairs.node, scratch.data());
      for (int at = 0; at < pairs.size; at += kLanes<Real>) {
        const Sums<Real> sums = sums_of(nodes, row, pairs, at);
        store(pairs.mirrored + at, Confidences<Real>(sums, inverse_log_classes).dissimilarity());
      }
      for (int k = 0; k < pairs.size; ++k)
        dissimilarity[pairs.entry[k]] = dissimilarity[pairs.mirror[k]] = pairs.mirrored[k];
      pairs.size = 0;
    };
    for (int64_t i = begin * kRowsPerTask; i < end * kRowsPerTask && i < in.graph.nodes; ++i)
      for_each_pairs(in, i, Runs::owned(in.graph, i), next, [&] {
        for (int k = 0; k < next->size; ++k) {
          if (nodes.is_narrow()) nodes.prefetch(next->other[k]);
          __builtin_prefetch(in.weight + next->mirror[k], 0, kIntoL2);
          __builtin_prefetch(dissimilarity + next->mirror[k], 0, kIntoL2);
        }
        compute(*ready);
        Pairs<Real>* const computed = ready;
        ready = next;
        next = computed;
      });
    compute(*ready);
  });
}

template <class Real>
void leave_one_edge_out_backward(const LeaveOneEdgeOut<Real>& in, const LeaveOneEdgeOutBackward<Real>& out,
                                 ParallelFor parallel_for) {
  Nodes<Real> nodes(in);
  nodes.prepare(in, parallel_for);
  const int64_t stride = nodes.stride, tasks = (in.graph.nodes + kRowsPerTask - 1) / kRowsPerTask;
  const Real lambda = static_cast<Real>(in.logit_scale), inverse_log_classes = inverse_log<Real>(in.classes);
  parallel_for(tasks, [&](int64_t begin, int64_t end) {
    Buffer<Real> scratch((2 + 4 * kLanes<Real>)*stride + Row<Real>::scratch(nodes));
    Real* own = scratch.take(stride);     // Σ_j G r_ij
    Real* others = scratch.take(stride);  // Σ_j G w_ji r_ji
    Real* saved = scratch.take(4 * kLanes<Real> * stride);
    Real* of_row = scratch.take(Row<Real>::scratch(nodes));
    Pairs<Real> gathered, *pairs = &gathered;
    for (int64_t i = begin * kRowsPerTask; i < end * kRowsPerTask && i < in.graph.nodes; ++i) {
      const Row<Real> row(nodes, i, of_row);
      const int64_t first = in.graph.crow[i], last = in.graph.crow[i + 1];
      RowGradient<Real> gradient{nodes, row, own, others, saved, inverse_log_classes};
      for (int64_t c = 0; c < 2 * stride; ++c) own[c] = 0;
      for (int64_t e = first; e < last; ++e) out.grad_weight[e] = 0;
      for_each_pairs(in, i, Runs::all(in.graph, i), pairs, [&] {
        pairs->prepare(in);
        for (int at = 0; at < pairs->size; at += kLanes<Real>) {
          const int size = min(pairs->size - at, kLanes<Real>);
          Real grad[kLanes<Real>] = {};
          for (int k = 0; k < size; ++k)
            grad[k] = out.grad_dissimilarity[pairs->entry[at + k]] + out.grad_dissimilarity[pairs->mirror[at + k]];
          store(grad, -lambda * gradient.add(*pairs, at, load(grad)));
          for (int k = 0; k < size; ++k) out.grad_weight[pairs->entry[at + k]] = grad[k];
        }
        pairs->size = 0;
      });
      gradient.finish();
      Vec<Real> along{};
      for (int64_t c = 0; c < stride; c += kLanes<Real>)
        along += load(own + c) * load_classes(row.node.centred, c, in.classes);
      const Real grad_degree = lambda * sum_lanes<Real>(along);
      for (int64_t e = first; e < last; ++e) out.grad_weight[e] += grad_degree;
      Real* grad = out.grad_propagated + i * in.classes;
      for (int64_t c = 0; c < in.classes; ++c) grad[c] = row.node.scale * own[c] - others[c];
    }
  });
}

#define SSM_INSTANTIATE(Real)                                                                                   \
  template void leave_one_edge_out(const LeaveOneEdgeOut<Real>&, Real*, ParallelFor);                           \
  template void leave_one_edge_out_backward(const LeaveOneEdgeOut<Real>&, const LeaveOneEdgeOutBackward<Real>&, \
                                            ParallelFor);
SSM_INSTANTIATE(float)
SSM_INSTANTIATE(double)

}  // namespace ssmkernels::SSM_ISA
