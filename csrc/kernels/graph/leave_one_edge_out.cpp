// SPDX-License-Identifier: BSD-3-Clause
// The exponentials are what costs. e^{a_ij} = e^{λ D_ii F_i} e^{−λ w_ij F_j}: the first factor is one per node, and the second's argument
// is small (one edge out of many), so that it mostly is the polynomial alone, without the reduction of its range. Edges where it is large
// take the direct way. Where F_i is a large constant and small differences, the constant is taken off first, which no softmax sees.
#include "leave_one_edge_out.h"

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
    for (int64_t byte = 0; byte < static_cast<int64_t>(2 * stride * sizeof(Real)); byte += 64) __builtin_prefetch(values + byte);
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

template <class Real>
struct Confidences {
  Vec<Real> omega_i, omega_j, overlap;  // ω_ij, ω_ji, Z_ij·Z_ji

  Confidences(const Sums<Real>& s, Real inverse_log_classes)
      : omega_i(1 - (log(s.sum_i) - s.moment_i / s.sum_i) * inverse_log_classes),
        omega_j(1 - (log(s.sum_j) - s.moment_j / s.sum_j) * inverse_log_classes),
        overlap(s.dot / (s.sum_i * s.sum_j)) {}

  Vec<Real> dissimilarity() const {  // rounding alone takes it out of [0, 1]
    const Vec<Real> none{}, product = max(omega_i, none) * max(omega_j, none) * max(1 - overlap, none);
    return product > 1 ? none + 1 : product;
  }
};

// G r_ij = e_ij (constant_i + linear_i a_ij − product e_ji), and r_ji likewise.
template <class Real>
struct Slopes {
  Real constant_i, linear_i, constant_j, linear_j, product;

  Slopes(const Sums<Real>& s, Real inverse_log_classes, Real grad) {
    const Real sum_i = sum_lanes<Real>(s.sum_i), sum_j = sum_lanes<Real>(s.sum_j);
    const Real mean_i = sum_lanes<Real>(s.moment_i) / sum_i, mean_j = sum_lanes<Real>(s.moment_j) / sum_j;
    const Real omega_i = 1 - (log(broadcast(sum_i))[0] - mean_i) * inverse_log_classes;
    const Real omega_j = 1 - (log(broadcast(sum_j))[0] - mean_j) * inverse_log_classes;
    const Real overlap = sum_lanes<Real>(s.dot) / (sum_i * sum_j), both = grad * omega_i * omega_j;
    linear_i = grad * omega_j * (1 - overlap) * inverse_log_classes / sum_i;
    linear_j = grad * omega_i * (1 - overlap) * inverse_log_classes / sum_j;
    constant_i = both * overlap / sum_i - linear_i * mean_i;
    constant_j = both * overlap / sum_j - linear_j * mean_j;
    product = both / (sum_i * sum_j);
  }
};

// Up to one vector of pairs that share node i, waiting to be computed together.
template <class Real>
struct Batch {
  int64_t node = 0;
  int size = 0;
  int64_t entry[kLanes<Real>], mirror[kLanes<Real>], other[kLanes<Real>];
  Real logit_weight[kLanes<Real>], mirrored[kLanes<Real>];

  void fill_up() {  // with copies of the first pair
    for (int k = size; k < kLanes<Real>; ++k) {
      other[k] = other[0];
      logit_weight[k] = logit_weight[0];
      mirrored[k] = mirrored[0];
    }
  }
};

// Pairs in the lanes: the rows of their other nodes, transposed.
template <class Real>
struct Columns {
  Vec<Real> centred[kLanes<Real>], factor[kLanes<Real>];

  Columns(const Nodes<Real>& nodes, const Batch<Real>& batch) {
#pragma GCC unroll 16
    for (int k = 0; k < kLanes<Real>; ++k) {
      const Real* row = nodes.centred(batch.other[k]);
      centred[k] = load(row);
      factor[k] = load(row + kLanes<Real>);
    }
    transpose<Real>(centred);
    transpose<Real>(factor);
  }
};

template <Argument kArgument, class Real>
Sums<Real> narrow_sums(const Columns<Real>& j, const Node<Real>& i, Vec<Real> logit_weight, Vec<Real> mirrored, int64_t classes) {
  const Vec<Real> scale = j.centred[kScaleLane<Real>], top = j.centred[kTopLane<Real>];
  Sums<Real> sums;
  for (int64_t c = 0; c < classes; ++c) {
    const Vec<Real> x_i = j.centred[c] * logit_weight, x_j = mirrored * i.centred[c];
    sums.add(factor_of<kArgument>(x_i) * i.factor[c], (i.scale * i.centred[c] - i.top) - x_i, j.factor[c] * factor_of<kArgument>(x_j),
             (j.centred[c] * scale - top) - x_j);
  }
  return sums;
}

// The same where the shift has to be the largest logit of the pair itself.
template <class Real>
Sums<Real> narrow_sums_of_logits(const Columns<Real>& j, const Node<Real>& i, Vec<Real> logit_weight, Vec<Real> mirrored, int64_t classes) {
  const Vec<Real> scale = j.centred[kScaleLane<Real>];
  Vec<Real> a_i[kLanes<Real>], a_j[kLanes<Real>], top_i, top_j;
  for (int64_t c = 0; c < classes; ++c) {
    a_i[c] = i.scale * i.centred[c] - j.centred[c] * logit_weight;
    a_j[c] = j.centred[c] * scale - mirrored * i.centred[c];
    top_i = c == 0 ? a_i[c] : max(top_i, a_i[c]);
    top_j = c == 0 ? a_j[c] : max(top_j, a_j[c]);
  }
  Sums<Real> sums;
  for (int64_t c = 0; c < classes; ++c) sums.add(exp(a_i[c] - top_i), a_i[c] - top_i, exp(a_j[c] - top_j), a_j[c] - top_j);
  return sums;
}

// Lanes are classes: the sums of each pair, then along the lanes of all pairs at once.
template <class Real>
Sums<Real> wide_sums(const Nodes<Real>& nodes, const Batch<Real>& batch, const Batch<Real>& next) {
  Vec<Real> sum_i[kLanes<Real>], sum_j[kLanes<Real>], moment_i[kLanes<Real>], moment_j[kLanes<Real>], dot[kLanes<Real>];
  const Node<Real> node = nodes[batch.node];
  for (int k = 0; k < kLanes<Real>; ++k) {
    if (k < next.size) nodes.prefetch(next.other[k]);
    Sums<Real> sums;
    if (k < batch.size)
      for_each_vector<Real>({node, nodes[batch.other[k]], batch.logit_weight[k], batch.mirrored[k]}, nodes.classes,
                            [&](int64_t, Vec<Real> e_i, Vec<Real> a_i, Vec<Real> e_j, Vec<Real> a_j) { sums.add(e_i, a_i, e_j, a_j); });
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
Sums<Real> sums_of(const Nodes<Real>& nodes, const Batch<Real>& batch, const Batch<Real>& next) {
  if (!nodes.is_narrow()) return wide_sums(nodes, batch, next);
  const Columns<Real> columns(nodes, batch);
  const Node<Real> node = nodes[batch.node];
  const Vec<Real> logit_weight = load(batch.logit_weight), mirrored = load(batch.mirrored);
  switch (argument_of(max_lane<Real>(max(logit_weight * columns.centred[kReachLane<Real>], mirrored * node.reach)))) {
    case Argument::tiny:
      return narrow_sums<Argument::tiny>(columns, node, logit_weight, mirrored, nodes.classes);
    case Argument::moderate:
      return narrow_sums<Argument::moderate>(columns, node, logit_weight, mirrored, nodes.classes);
    default:
      return narrow_sums_of_logits(columns, node, logit_weight, mirrored, nodes.classes);
  }
}

// A pair is computed by one of its rows: by i if j is among the N/2 nodes that follow it, cyclically. Every row then owns about half of its
// pairs, and finds them in two runs of its entries.
struct Runs {
  int64_t begin[2], end[2];

  Runs(const Csr& graph, int64_t i) {
    const int64_t first = graph.crow[i], last = graph.crow[i + 1], half = graph.nodes / 2, past = i + half + 1;
    // Of two nodes that are N/2 apart in both directions, the smaller owns the pair.
    const int64_t wrapped = past - graph.nodes - (graph.nodes % 2 == 0);
    int64_t before = 0, within = 0,
            around = 0;  // entries with a column below i, below past, below wrapped: counting has no branches to miss
    for (int64_t e = first; e < last; ++e) {
      before += graph.col[e] < i;
      within += graph.col[e] < past;
      around += graph.col[e] < wrapped;
    }
    begin[0] = first + before;
    end[0] = first + within;
    begin[1] = first;
    end[1] = first + (around < before ? around : before);
  }
};

template <class Real>
bool is_valid(const LeaveOneEdgeOut<Real>& in, int64_t entry) {
  const int64_t j = in.graph.col[entry], mirror = in.reverse[entry];
  return j >= 0 && j < in.graph.nodes && mirror >= 0 && mirror < in.graph.edges;
}

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
  const Real lambda = static_cast<Real>(in.logit_scale), inverse_log_classes = inverse_log<Real>(in.classes);
  parallel_for(in.graph.edges, [&](int64_t begin, int64_t end) {  // entries that nobody owns stay 0
    for (int64_t e = begin; e < end; ++e) dissimilarity[e] = 0;
  });
  parallel_for(tasks, [&](int64_t begin, int64_t end) {
    Batch<Real> batches[2];  // one that is filled, and the one before it, which is computed once its successor can be fetched
    int at = 0;
    const auto flush = [&] {
      Batch<Real>& batch = batches[1 - at];
      if (batch.size > 0) {
        for (int k = 0; k < batch.size; ++k) batch.mirrored[k] = lambda * in.weight[batch.mirror[k]];
        batch.fill_up();
        const Vec<Real> result = Confidences<Real>(sums_of(nodes, batch, batches[at]), inverse_log_classes).dissimilarity();
        for (int k = 0; k < batch.size; ++k) dissimilarity[batch.entry[k]] = dissimilarity[batch.mirror[k]] = result[k];
      }
      at = 1 - at;
      batches[at].size = 0;
    };
    for (int64_t i = begin * kRowsPerTask; i < end * kRowsPerTask && i < in.graph.nodes; ++i) {
      const Runs runs(in.graph, i);
      for (int run = 0; run < 2; ++run) {
        for (int64_t e = runs.begin[run]; e < runs.end[run]; ++e) {
          if (!is_valid(in, e)) continue;
          Batch<Real>& batch = batches[at];
          const int k = batch.size++;
          batch.entry[k] = e;
          batch.mirror[k] = in.reverse[e];
          batch.other[k] = in.graph.col[e];
          batch.logit_weight[k] = lambda * in.weight[e];
          batch.node = i;
          if (nodes.is_narrow()) nodes.prefetch(in.graph.col[e]);
          __builtin_prefetch(in.weight + in.reverse[e]);
          __builtin_prefetch(dissimilarity + in.reverse[e], 1);
          if (batch.size == kLanes<Real>) flush();
        }
      }
      if (batches[at].size > 0) flush();
    }
    if (batches[1 - at].size > 0) flush();
  });
}

template <class Real>
void leave_one_edge_out_backward(const LeaveOneEdgeOut<Real>& in, const LeaveOneEdgeOutBackward<Real>& out, ParallelFor parallel_for) {
  Nodes<Real> nodes(in);
  nodes.prepare(in, parallel_for);
  const int64_t stride = nodes.stride, tasks = (in.graph.nodes + kRowsPerTask - 1) / kRowsPerTask;
  const Real lambda = static_cast<Real>(in.logit_scale), inverse_log_classes = inverse_log<Real>(in.classes);
  parallel_for(tasks, [&](int64_t begin, int64_t end) {
    Buffer<Real> scratch(6 * stride);
    Real* own = scratch.take(stride);     // Σ_j G r_ij
    Real* others = scratch.take(stride);  // Σ_j G w_ji r_ji
    Real* saved = scratch.take(4 * stride);
    for (int64_t i = begin * kRowsPerTask; i < end * kRowsPerTask && i < in.graph.nodes; ++i) {
      const Node<Real> node = nodes[i];
      for (int64_t c = 0; c < 2 * stride; ++c) own[c] = 0;
      for (int64_t e = in.graph.crow[i]; e < in.graph.crow[i + 1]; ++e) {
        out.grad_weight[e] = 0;
        if (!is_valid(in, e)) continue;
        const int64_t mirror = in.reverse[e];
        const Real grad = out.grad_dissimilarity[e] + out.grad_dissimilarity[mirror];
        if (grad == 0) continue;
        const Pair<Real> pair{node, nodes[in.graph.col[e]], lambda * in.weight[e], lambda * in.weight[mirror]};
        if (e + 1 < in.graph.crow[i + 1] && is_valid(in, e + 1)) nodes.prefetch(in.graph.col[e + 1]);
        Sums<Real> sums;
        for_each_vector(pair, in.classes, [&](int64_t c, Vec<Real> e_i, Vec<Real> a_i, Vec<Real> e_j, Vec<Real> a_j) {
          sums.add(e_i, a_i, e_j, a_j);
          Real* at = saved + 4 * c;
          store(at, e_i);
          store(at + kLanes<Real>, a_i);
          store(at + 2 * kLanes<Real>, e_j);
          store(at + 3 * kLanes<Real>, a_j);
        });
        const Slopes<Real> slopes(sums, inverse_log_classes, grad);
        Vec<Real> along{};
        for (int64_t c = 0; c < stride; c += kLanes<Real>) {
          const Real* at = saved + 4 * c;
          const Vec<Real> e_i = load(at), a_i = load(at + kLanes<Real>), e_j = load(at + 2 * kLanes<Real>),
                          a_j = load(at + 3 * kLanes<Real>);
          const Vec<Real> r_ij = e_i * (slopes.constant_i + slopes.linear_i * a_i - slopes.product * e_j);
          const Vec<Real> r_ji = e_j * (slopes.constant_j + slopes.linear_j * a_j - slopes.product * e_i);
          store(own + c, load(own + c) + r_ij);
          store(others + c, load(others + c) + pair.mirrored * r_ji);
          along += r_ij * load_classes(pair.j.centred, c, in.classes);  // r sums to 0, so that centring F_j changes nothing
        }
        out.grad_weight[e] = -lambda * sum_lanes<Real>(along);
      }
      Vec<Real> along{};
      for (int64_t c = 0; c < stride; c += kLanes<Real>) along += load(own + c) * load_classes(node.centred, c, in.classes);
      const Real grad_degree = lambda * sum_lanes<Real>(along);
      for (int64_t e = in.graph.crow[i]; e < in.graph.crow[i + 1]; ++e) out.grad_weight[e] += grad_degree;
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
