// SPDX-License-Identifier: BSD-3-Clause
// The exponentials are what costs. On the side of the row that is computed e^{a_ij} = e^{λ D_ii F_i} e^{−λ w_ij F_j}:
// the first factor is one per node, and the second's argument is small (one edge out of many), so that it mostly is the
// polynomial alone, without the reduction of its range. The other side's would have to be read, which costs more than
// it saves. Logits are taken less their node's maximum as soon as they are made, and where F_i is a large constant and
// small differences the constant is taken off first, which no softmax sees. A vector's worth of entries of a row is
// computed at once: for few classes with the pairs in the lanes, the rows of their other nodes being transposed; for
// many with the classes in the lanes, and only what follows from their sums with the pairs there.
#include "leave_one_edge_out.h"

#include "edge_pairs.h"

namespace ssmkernels::SSM_ISA {
namespace {

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
    const GradLogits<Real> grad_logits(sums, inverse_log_classes, grad);
    const Vec<Real> mirrored = load(pairs.mirrored + at);
    Vec<Real> along{};
    for (int64_t c = 0; c < nodes.classes; ++c) {
      const Vec<Real> r_ij =
          e_i[c] * (grad_logits.constant_i + grad_logits.linear_i * a_i[c] - grad_logits.product * e_j[c]);
      const Vec<Real> r_ji =
          e_j[c] * (grad_logits.constant_j + grad_logits.linear_j * a_j[c] - grad_logits.product * e_i[c]);
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
    const GradLogits<Real> grad_logits(sums, inverse_log_classes, grad);
    Vec<Real> along[kLanes<Real>] = {};
    for (int k = 0; k < min(pairs.size - at, kLanes<Real>); ++k) {
      const Real* centred = nodes.centred(pairs.other[at + k]);
      for (int64_t c = 0; c < stride; c += kLanes<Real>) {
        const Real* kept = saved + 4 * (k * stride + c);
        const Vec<Real> e_i = load(kept), a_i = load(kept + kLanes<Real>), e_j = load(kept + 2 * kLanes<Real>),
                        a_j = load(kept + 3 * kLanes<Real>);
        const Vec<Real> r_ij =
            e_i * (grad_logits.constant_i[k] + grad_logits.linear_i[k] * a_i - grad_logits.product[k] * e_j);
        const Vec<Real> r_ji =
            e_j * (grad_logits.constant_j[k] + grad_logits.linear_j[k] * a_j - grad_logits.product[k] * e_i);
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
