// SPDX-License-Identifier: BSD-3-Clause
// The exponentials are what costs. e^{a_ij} = e^{λ D_ii F_i} e^{−λ w_ij F_j}: the first factor is one per node, and the second's argument
// is small (one edge out of many), so that it mostly is the polynomial alone, without the reduction of its range. Edges where it is large
// take the direct way. Where F_i is a large constant and small differences, the constant is taken off first, which no softmax sees.
// A vector's worth of consecutive entries of a row is computed at once: for few classes with the pairs in the lanes, the rows of their
// other nodes being transposed; for many with the classes in the lanes, and only what follows from their sums with the pairs there.
#include "leave_one_edge_out.h"

#include "../common/arithmetic.h"
#include "../common/buffer.h"
#include "../common/simd.h"
#include "../common/transpose.h"

namespace ssmkernels::SSM_ISA {
namespace {

constexpr int64_t kRowsPerTask = 32;

template <class Real>
struct Node {
  const Real* centred;  // [C]  F_i less a constant
  const Real* factor;   // [C]  e^{scale·centred − top}, and 0 up to the end of the vector
  Real scale;           // λ D_ii
  Real top;             // max_c scale·centred
  Real reach;           // λ max_c |centred|
};

// Where a row of classes leaves three lanes of one vector free, its last lanes hold scale, top and reach too, to be transposed with it.
template <class Real>
inline constexpr int kReachLane = kLanes<Real> - 1;
template <class Real>
inline constexpr int kTopLane = kLanes<Real> - 2;
template <class Real>
inline constexpr int kScaleLane = kLanes<Real> > 2 ? kLanes<Real> - 3 : 0;

template <class Real>
class Nodes {
 public:
  explicit Nodes(const LeaveOneEdgeOut<Real>& in)
      : classes(in.classes),
        stride((in.classes + kLanes<Real> - 1) / kLanes<Real> * kLanes<Real>),
        values_(in.graph.nodes * 2 * stride),
        scalars_(in.graph.nodes * 4) {}

  Node<Real> operator[](int64_t i) const {
    const Real *values = values_.data() + i * 2 * stride, *scalars = scalars_.data() + i * 4;
    return {values, values + stride, scalars[0], scalars[1], scalars[2]};
  }

  const Real* centred(int64_t i) const {
    return values_.data() + i * 2 * stride;
  }

  bool is_narrow() const {
    return classes <= kScaleLane<Real>;
  }

  // Fetches the values of a node into the cache, while others are computed.
  void prefetch(int64_t i) const {
    const char* values = reinterpret_cast<const char*>(centred(i));
    for (int64_t byte = 0; byte < static_cast<int64_t>((is_narrow() ? 1 : 2) * stride * sizeof(Real)); byte += 64)
      __builtin_prefetch(values + byte);
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
    Real low = f[0], high = f[0];
    for (int64_t c = 1; c < classes; ++c) {
      low = f[c] < low ? f[c] : low;
      high = f[c] > high ? f[c] : high;
    }
    const Real half = (high - low) / 2, far = 2 * half;
    Real middle = low + half;
    if (middle <= far && -middle <= far) middle = 0;  // beyond that the subtraction is exact
    const Real lambda = static_cast<Real>(in.logit_scale), scale = lambda * degree;
    const Real top = max(scale * (high - middle), scale * (low - middle)), reach = lambda * max(high - middle, middle - low);
    Real *centred = values_.data() + i * 2 * stride, *factor = centred + stride, *scalars = scalars_.data() + i * 4;
    for (int64_t c = 0; c < stride; ++c) centred[c] = c < classes ? f[c] - middle : Real(0);
    for (int64_t c = 0; c < stride; c += kLanes<Real>) store(factor + c, exp(load(centred + c) * scale - top));
    for (int64_t c = classes; c < stride; ++c) factor[c] = 0;
    scalars[0] = scale;
    scalars[1] = top;
    scalars[2] = reach;
    if (!is_narrow()) return;
    centred[kScaleLane<Real>] = scale;
    centred[kTopLane<Real>] = top;
    centred[kReachLane<Real>] = reach;
  }

  Buffer<Real> values_, scalars_;
};

// Over the classes of one pair, or of a vector of pairs: with e = e^{a − shift} of each side, Σ e, Σ e (a − shift), and Σ e_ij e_ji.
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

// How large the argument of an edge's own factor is. Up to "moderate", the node's maximum is near enough to the edge's to be its shift.
enum class Argument { tiny, moderate, large };

template <class Real>
Argument argument_of(Real largest) {
  return largest <= static_cast<Real>(kExpTiny) ? Argument::tiny : largest <= 4 ? Argument::moderate : Argument::large;
}

template <Argument kArgument, class V>
V factor_of(V x) {  // e^{−x}
  return kArgument == Argument::tiny ? exp_tiny(-x) : exp(-x);
}

template <class Real>
struct Pair {
  Node<Real> i, j;
  Real logit_weight;  // λ w_ij
  Real mirrored;      // λ w_ji
};

// The values at classes c … of a row, 0 past the last class.
template <class Real>
Vec<Real> load_classes(const Real* row, int64_t c, int64_t classes) {
  return first_lanes<Real>(load(row + c), classes - c);
}

template <class Real>
Real max_lane(Vec<Real> v) {
  Real top = v[0];
  for (int lane = 1; lane < kLanes<Real>; ++lane) top = max(top, static_cast<Real>(v[lane]));
  return top;
}

// Calls each(c, e_i, a_i, e_j, a_j) for every vector of classes of one pair; the a are relative to the shift that the e are.
template <Argument kArgument, class Real, class F>
void for_each_vector_factored(const Pair<Real>& pair, int64_t classes, const F& each) {
  const Node<Real>&i = pair.i, &j = pair.j;
  for (int64_t c = 0; c < classes; c += kLanes<Real>) {
    const Vec<Real> f_i = load_classes(i.centred, c, classes), f_j = load_classes(j.centred, c, classes);
    const Vec<Real> x_i = f_j * pair.logit_weight, x_j = f_i * pair.mirrored;
    each(c, load(i.factor + c) * factor_of<kArgument>(x_i), (f_i * i.scale - i.top) - x_i, load(j.factor + c) * factor_of<kArgument>(x_j),
         (f_j * j.scale - j.top) - x_j);
  }
}

template <class Real, class F>
void for_each_vector(const Pair<Real>& pair, int64_t classes, const F& each) {
  const Node<Real>&i = pair.i, &j = pair.j;
  const Argument argument = argument_of(max(pair.logit_weight * j.reach, pair.mirrored * i.reach));
  if (argument == Argument::tiny) return for_each_vector_factored<Argument::tiny>(pair, classes, each);
  if (argument == Argument::moderate) return for_each_vector_factored<Argument::moderate>(pair, classes, each);
  const auto logits = [&](int64_t c, Vec<Real>& a_i, Vec<Real>& a_j) {
    const Vec<Real> f_i = load(i.centred + c), f_j = load(j.centred + c);
    a_i = f_i * i.scale - f_j * pair.logit_weight;
    a_j = f_j * j.scale - f_i * pair.mirrored;
    for (int64_t lane = classes - c; lane < kLanes<Real>; ++lane) a_i[lane] = a_j[lane] = Real(-1e30);  // e^… is 0 there
  };
  Vec<Real> a_i, a_j;
  logits(0, a_i, a_j);
  Vec<Real> top_i = a_i, top_j = a_j;
  for (int64_t c = kLanes<Real>; c < classes; c += kLanes<Real>) {
    logits(c, a_i, a_j);
    top_i = max(top_i, a_i);
    top_j = max(top_j, a_j);
  }
  const Real shift_i = max_lane<Real>(top_i), shift_j = max_lane<Real>(top_j);
  for (int64_t c = 0; c < classes; c += kLanes<Real>) {
    logits(c, a_i, a_j);
    a_i -= shift_i;
    a_j -= shift_j;
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

  Vec<Real> dissimilarity() const {  // rounding alone takes it out of [0, 1]
    const Vec<Real> none{}, product = max(omega_i, none) * max(omega_j, none) * max(1 - overlap, none);
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

// Up to a vector of entries of one row: `head` consecutive ones from `first` on, and the others from `second` on.
struct Batch {
  int64_t node, first, second;
  int head, size;

  int64_t entry(int k) const {
    return k < head ? first + k : second + (k - head);
  }
};

// The pairs of a batch in the lanes; past its size copies of the first.
template <class Real>
struct Pairs {
  int32_t other[kLanes<Real>];
  Real logit_weight[kLanes<Real>], mirrored[kLanes<Real>];  // λ w_ij, λ w_ji

  Pairs(const LeaveOneEdgeOut<Real>& in, const Batch& batch) {
    if (batch.head == kLanes<Real>) {
      __builtin_memcpy(other, in.graph.col + batch.first, sizeof other);
      __builtin_memcpy(logit_weight, in.weight + batch.first, sizeof logit_weight);
#pragma GCC unroll 16
      for (int k = 0; k < kLanes<Real>; ++k) mirrored[k] = in.weight[in.reverse[batch.first + k]];
    } else {
      for (int k = 0; k < kLanes<Real>; ++k) {
        const int64_t entry = batch.entry(k < batch.size ? k : 0);
        other[k] = in.graph.col[entry];
        logit_weight[k] = in.weight[entry];
        mirrored[k] = in.weight[in.reverse[entry]];
      }
    }
    const Real lambda = static_cast<Real>(in.logit_scale);
    store(logit_weight, lambda * load(logit_weight));
    store(mirrored, lambda * load(mirrored));
  }
};

// The rows of the other nodes of a batch, transposed.
template <class Real>
struct Columns {
  Vec<Real> of[kLanes<Real>];

  Columns(const Nodes<Real>& nodes, const Pairs<Real>& pairs, int64_t offset) {
#pragma GCC unroll 16
    for (int k = 0; k < kLanes<Real>; ++k) of[k] = load(nodes.centred(pairs.other[k]) + offset);
    transpose<Real>(of);
  }
};

// Calls each(c, e_i, a_i, e_j, a_j) for every class; the a are relative to the shift that the e are.
template <class Real, class F>
void for_each_class(const Nodes<Real>& nodes, const Node<Real>& i, const Pairs<Real>& pairs, const Columns<Real>& centred, const F& each) {
  const Vec<Real> scale = centred.of[kScaleLane<Real>], top = centred.of[kTopLane<Real>], reach = centred.of[kReachLane<Real>];
  const Vec<Real> logit_weight = load(pairs.logit_weight), mirrored = load(pairs.mirrored);
  Real base[kLanes<Real>];  // the logits of i with all its edges
  store(base, load(i.centred) * i.scale);
  if (max_lane<Real>(max(logit_weight * reach, mirrored * i.reach)) <= static_cast<Real>(kExpTiny)) {
    const Columns<Real> factor(nodes, pairs, kLanes<Real>);
    for (int64_t c = 0; c < nodes.classes; ++c) {
      const Vec<Real> x_i = centred.of[c] * logit_weight, x_j = mirrored * i.centred[c];
      each(c, exp_tiny(-x_i) * i.factor[c], (base[c] - i.top) - x_i, factor.of[c] * exp_tiny(-x_j), (centred.of[c] * scale - top) - x_j);
    }
    return;
  }
  Vec<Real> a_i[kLanes<Real>], a_j[kLanes<Real>], top_i, top_j;
  for (int64_t c = 0; c < nodes.classes; ++c) {
    a_i[c] = base[c] - centred.of[c] * logit_weight;
    a_j[c] = centred.of[c] * scale - mirrored * i.centred[c];
    top_i = c == 0 ? a_i[c] : max(top_i, a_i[c]);
    top_j = c == 0 ? a_j[c] : max(top_j, a_j[c]);
  }
  for (int64_t c = 0; c < nodes.classes; ++c) each(c, exp(a_i[c] - top_i), a_i[c] - top_i, exp(a_j[c] - top_j), a_j[c] - top_j);
}

// Lanes are classes: calls each(k, c, e_i, a_i, e_j, a_j) for every pair k and vector of classes, and sums along the lanes of all pairs at
// once.
template <class Real, class F>
Sums<Real> wide_sums(const Nodes<Real>& nodes, const Node<Real>& i, const Pairs<Real>& pairs, int size, const F& each) {
  Vec<Real> sum_i[kLanes<Real>], sum_j[kLanes<Real>], moment_i[kLanes<Real>], moment_j[kLanes<Real>], dot[kLanes<Real>];
  for (int k = 0; k < kLanes<Real>; ++k) {
    Sums<Real> sums;
    if (k + 1 < size) nodes.prefetch(pairs.other[k + 1]);
    if (k < size)
      for_each_vector<Real>({i, nodes[pairs.other[k]], pairs.logit_weight[k], pairs.mirrored[k]}, nodes.classes,
                            [&](int64_t c, Vec<Real> e_i, Vec<Real> a_i, Vec<Real> e_j, Vec<Real> a_j) {
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
Sums<Real> sums_of(const Nodes<Real>& nodes, const Node<Real>& i, const Pairs<Real>& pairs, int size) {
  if (!nodes.is_narrow()) return wide_sums(nodes, i, pairs, size, [](auto...) {});
  Sums<Real> sums;
  for_each_class(nodes, i, pairs, Columns<Real>(nodes, pairs, 0),
                 [&](int64_t, Vec<Real> e_i, Vec<Real> a_i, Vec<Real> e_j, Vec<Real> a_j) { sums.add(e_i, a_i, e_j, a_j); });
  return sums;
}

// A pair is computed by one of its rows: by i if j is among the N/2 nodes that follow it, cyclically. Every row then owns about half of its
// pairs, and finds them in two runs of its entries. (With i < j as the rule, a row's partners would be spread over more of the memory.)
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

template <class Real>
bool is_valid(const LeaveOneEdgeOut<Real>& in, int64_t entry) {
  return static_cast<uint64_t>(in.graph.col[entry]) < static_cast<uint64_t>(in.graph.nodes) &&
         static_cast<uint64_t>(in.reverse[entry]) < static_cast<uint64_t>(in.graph.edges);
}

// How many of up to a vector of entries from `first` on are to be followed before one that is not.
template <class Real>
int valid_entries(const LeaveOneEdgeOut<Real>& in, int64_t first, int64_t last) {
  if (last - first >= kLanes<Real>) {
    uint32_t bad_columns = 0;  // sums of the width of what is compared, which the compiler turns into vectors
    uint64_t bad_mirrors = 0;
    for (int k = 0; k < kLanes<Real>; ++k) {
      bad_columns |= static_cast<uint32_t>(in.graph.col[first + k]) >= static_cast<uint32_t>(in.graph.nodes);
      bad_mirrors |= static_cast<uint64_t>(in.reverse[first + k]) >= static_cast<uint64_t>(in.graph.edges);
    }
    if (!bad_columns && !bad_mirrors) return kLanes<Real>;
  }
  int count = 0;
  while (count < kLanes<Real> && first + count < last && is_valid(in, first + count)) ++count;
  return count;
}

// Calls each(batch) for the entries of some runs, without those that are not to be followed.
template <class Real, class F>
void for_each_batch(const LeaveOneEdgeOut<Real>& in, int64_t node, const Runs& runs, const F& each) {
  int64_t at = runs.begin[0], end = runs.end[0], next = runs.begin[1], next_end = runs.end[1];
  while (at < end || next < next_end) {
    if (at == end) {
      at = next;
      end = next_end;
      next = next_end;
    }
    Batch batch{node, at, next, valid_entries(in, at, end), 0};
    batch.size = batch.head;
    if (at + batch.head == end && batch.head < kLanes<Real>) {
      const int more = valid_entries(in, next, min(next_end, next + kLanes<Real> - batch.head));
      batch.size += more;
      next += more;
    }
    if (batch.size > 0) each(batch);
    const bool stopped = batch.head < kLanes<Real> && at + batch.head < end;
    at += batch.head + stopped;
  }
}

// What the entries of one row add to the gradients of its node.
template <class Real>
struct RowGradient {
  const Nodes<Real>& nodes;
  const Node<Real>& i;
  Real *own, *others, *saved;
  Real inverse_log_classes;
  Vec<Real> own_of[kLanes<Real>] = {}, others_of[kLanes<Real>] = {};  // with few classes: of each class, with the pairs in the lanes

  // Σ_c G r_ij F_j of each pair in the lanes; r sums to 0, so that centring F_j changes nothing.
  Vec<Real> add(const Pairs<Real>& pairs, int size, Vec<Real> grad) {
    return nodes.is_narrow() ? add_narrow(pairs, grad) : add_wide(pairs, size, grad);
  }

  void finish() {
    if (!nodes.is_narrow()) return;
    store(own, sum_lanes<Real>(own_of));
    store(others, sum_lanes<Real>(others_of));
  }

 private:
  Vec<Real> add_narrow(const Pairs<Real>& pairs, Vec<Real> grad) {
    if (nodes.classes < 2) __builtin_unreachable();  // or the compiler warns of arrays that a loop over no classes would leave unset
    const Columns<Real> centred(nodes, pairs, 0);
    Vec<Real> e_i[kLanes<Real>], a_i[kLanes<Real>], e_j[kLanes<Real>], a_j[kLanes<Real>];
    Sums<Real> sums;
    for_each_class(nodes, i, pairs, centred, [&](int64_t c, Vec<Real> ei, Vec<Real> ai, Vec<Real> ej, Vec<Real> aj) {
      sums.add(ei, ai, ej, aj);
      e_i[c] = ei;
      a_i[c] = ai;
      e_j[c] = ej;
      a_j[c] = aj;
    });
    const Slopes<Real> slopes(sums, inverse_log_classes, grad);
    const Vec<Real> mirrored = load(pairs.mirrored);
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

  Vec<Real> add_wide(const Pairs<Real>& pairs, int size, Vec<Real> grad) {
    const int64_t classes = nodes.classes, stride = nodes.stride;
    const Sums<Real> sums =
        wide_sums(nodes, i, pairs, size, [&](int k, int64_t c, Vec<Real> e_i, Vec<Real> a_i, Vec<Real> e_j, Vec<Real> a_j) {
          Real* at = saved + 4 * (k * stride + c);
          store(at, e_i);
          store(at + kLanes<Real>, a_i);
          store(at + 2 * kLanes<Real>, e_j);
          store(at + 3 * kLanes<Real>, a_j);
        });
    const Slopes<Real> slopes(sums, inverse_log_classes, grad);
    Vec<Real> along[kLanes<Real>] = {};
    for (int k = 0; k < size; ++k) {
      const Real* centred = nodes.centred(pairs.other[k]);
      for (int64_t c = 0; c < stride; c += kLanes<Real>) {
        const Real* at = saved + 4 * (k * stride + c);
        const Vec<Real> e_i = load(at), a_i = load(at + kLanes<Real>), e_j = load(at + 2 * kLanes<Real>), a_j = load(at + 3 * kLanes<Real>);
        const Vec<Real> r_ij = e_i * (slopes.constant_i[k] + slopes.linear_i[k] * a_i - slopes.product[k] * e_j);
        const Vec<Real> r_ji = e_j * (slopes.constant_j[k] + slopes.linear_j[k] * a_j - slopes.product[k] * e_i);
        store(own + c, load(own + c) + r_ij);
        store(others + c, load(others + c) + pairs.mirrored[k] * r_ji);
        along[k] += r_ij * load_classes(centred, c, classes);
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
    Batch waiting{};  // computed while what its successor needs is on its way to the cache
    const auto compute = [&] {
      if (waiting.size == 0) return;
      const Pairs<Real> pairs(in, waiting);
      const Sums<Real> sums = sums_of(nodes, nodes[waiting.node], pairs, waiting.size);
      const Vec<Real> result = Confidences<Real>(sums, inverse_log_classes).dissimilarity();
      for (int k = 0; k < waiting.size; ++k) {
        const int64_t entry = waiting.entry(k);
        dissimilarity[entry] = dissimilarity[in.reverse[entry]] = result[k];
      }
    };
    for (int64_t i = begin * kRowsPerTask; i < end * kRowsPerTask && i < in.graph.nodes; ++i)
      for_each_batch(in, i, Runs::owned(in.graph, i), [&](const Batch& batch) {
        for (int k = 0; k < batch.size; ++k) {
          const int64_t entry = batch.entry(k);
          if (nodes.is_narrow()) nodes.prefetch(in.graph.col[entry]);
          __builtin_prefetch(in.weight + in.reverse[entry]);
          __builtin_prefetch(dissimilarity + in.reverse[entry], 1);
        }
        compute();
        waiting = batch;
      });
    compute();
  });
}

template <class Real>
void leave_one_edge_out_backward(const LeaveOneEdgeOut<Real>& in, const LeaveOneEdgeOutBackward<Real>& out, ParallelFor parallel_for) {
  Nodes<Real> nodes(in);
  nodes.prepare(in, parallel_for);
  const int64_t stride = nodes.stride, tasks = (in.graph.nodes + kRowsPerTask - 1) / kRowsPerTask;
  const Real lambda = static_cast<Real>(in.logit_scale), inverse_log_classes = inverse_log<Real>(in.classes);
  parallel_for(tasks, [&](int64_t begin, int64_t end) {
    Buffer<Real> scratch((2 + 4 * kLanes<Real>)*stride);
    Real* own = scratch.take(stride);     // Σ_j G r_ij
    Real* others = scratch.take(stride);  // Σ_j G w_ji r_ji
    Real* saved = scratch.take(4 * kLanes<Real> * stride);
    for (int64_t i = begin * kRowsPerTask; i < end * kRowsPerTask && i < in.graph.nodes; ++i) {
      const Node<Real> node = nodes[i];
      const int64_t first = in.graph.crow[i], last = in.graph.crow[i + 1];
      RowGradient<Real> row{nodes, node, own, others, saved, inverse_log_classes};
      for (int64_t c = 0; c < 2 * stride; ++c) own[c] = 0;
      for (int64_t e = first; e < last; ++e) out.grad_weight[e] = 0;
      for_each_batch(in, i, Runs::all(in.graph, i), [&](const Batch& batch) {
        Real grad[kLanes<Real>] = {};
        for (int k = 0; k < batch.size; ++k)
          grad[k] = out.grad_dissimilarity[batch.first + k] + out.grad_dissimilarity[in.reverse[batch.first + k]];
        if (!differ<Real>(load(grad), Vec<Real>{})) return;
        store_first(out.grad_weight + batch.first, -lambda * row.add(Pairs<Real>(in, batch), batch.size, load(grad)), batch.size);
      });
      row.finish();
      Vec<Real> along{};
      for (int64_t c = 0; c < stride; c += kLanes<Real>) along += load(own + c) * load_classes(node.centred, c, in.classes);
      const Real grad_degree = lambda * sum_lanes<Real>(along);
      for (int64_t e = first; e < last; ++e) out.grad_weight[e] += grad_degree;
      Real* grad = out.grad_propagated + i * in.classes;
      for (int64_t c = 0; c < in.classes; ++c) grad[c] = node.scale * own[c] - others[c];
    }
  });
}

#define SSM_INSTANTIATE(Real)                                                         \
  template void leave_one_edge_out(const LeaveOneEdgeOut<Real>&, Real*, ParallelFor); \
  template void leave_one_edge_out_backward(const LeaveOneEdgeOut<Real>&, const LeaveOneEdgeOutBackward<Real>&, ParallelFor);
SSM_INSTANTIATE(float)
SSM_INSTANTIATE(double)

}  // namespace ssmkernels::SSM_ISA
