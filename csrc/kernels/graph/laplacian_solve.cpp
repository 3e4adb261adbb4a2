// SPDX-License-Identifier: BSD-3-Clause
// Columns are solved in blocks of one or two cache lines per node: the block's four vectors of CG (x, r, p, q) and nothing else are then
// read and written while it converges, and a neighbour's row is whole lines. Two lines take two thirds of the time per column of one, as
// the matrix is read half as often; four take more, as the vectors leave the cache. The nodes of a large graph are renumbered breadth
// first, so that neighbours lie near each other: that takes a fifth to a third of the time of each iteration. Sums over the nodes are taken
// chunk by chunk, in their order.
#include "laplacian_solve.h"

#include "../common/buffer.h"
#include "../common/simd.h"
#include "../common/transpose.h"

namespace ssmkernels::SSM_ISA {
namespace {

constexpr int64_t kChunk = 128;  // rows
constexpr int kLineBytes = 64;
constexpr int64_t kPrefetch = 24;  // entries ahead

// A row of a block.
template <class Real, int kLines>
struct Row {
  static constexpr int kColumns = kLines * kLineBytes / sizeof(Real);
  static constexpr int kVectors = kColumns / kLanes<Real>;
  Vec<Real> v[kVectors]{};

  static Row at(const Real* from) {
    Row row;
    for (int k = 0; k < kVectors; ++k) row.v[k] = load(from + k * kLanes<Real>);
    return row;
  }
  void put(Real* to) const {
    for (int k = 0; k < kVectors; ++k) store(to + k * kLanes<Real>, v[k]);
  }
  void add(const Row& a, const Row& b) {  // += a b
    for (int k = 0; k < kVectors; ++k) v[k] += a.v[k] * b.v[k];
  }
  void add(Real a, const Row& b) {
    for (int k = 0; k < kVectors; ++k) v[k] += a * b.v[k];
  }
};

constexpr int64_t kRenumbered = 4096;  // nodes, from which on a vector of a block leaves the second cache

// S A S with its nodes renumbered, and its columns checked.
template <class Real>
struct Scaled {
  int64_t nodes, edges, chunks;
  Buffer<int32_t> order;    // [N]  the node that row i is in the arrays of the problem
  Buffer<int64_t> crow;     // [N + 1]
  Buffer<int32_t> col;      // [E]
  Buffer<Real> value;       // [E]
  Buffer<Real> diagonal;    // [N]  what the entries add to is the whole diagonal: 1 with Jacobi
  Buffer<Real> scale;       // [N]  S
  Buffer<Real> inverse;     // [N]  S⁻¹, 0 where S is
  Real least_diagonal = 0;  // min(A_ii, 0), where a diagonal is below 0 (or 0 among entries that are not)
  bool is_indefinite = false;

  Scaled(const LaplacianSolve<Real>& in, ParallelFor parallel_for);

 private:
  void renumber(const Csr& graph, int32_t* position);
};

// Calls each(i) for the rows of the chunks [begin, end).
template <class F>
void for_rows(int64_t begin, int64_t end, int64_t nodes, const F& each) {
  for (int64_t i = begin * kChunk; i < end * kChunk && i < nodes; ++i) each(i);
}

// order: breadth first, component by component; position: its inverse.
template <class Real>
void Scaled<Real>::renumber(const Csr& graph, int32_t* position) {
  int32_t* queue = order.data();
  if (nodes < kRenumbered) {
    for (int64_t i = 0; i < nodes; ++i) queue[i] = position[i] = static_cast<int32_t>(i);
    return;
  }
  for (int64_t i = 0; i < nodes; ++i) position[i] = -1;
  int64_t found = 0, read = 0;
  const auto visit = [&](int64_t i) {
    if (i < 0 || i >= nodes || position[i] >= 0) return;
    position[i] = static_cast<int32_t>(found);
    queue[found++] = static_cast<int32_t>(i);
  };
  for (int64_t start = 0; start < nodes; ++start) {
    visit(start);
    for (; read < found; ++read)
      for (int64_t e = graph.crow[queue[read]]; e < graph.crow[queue[read] + 1]; ++e) visit(graph.col[e]);
  }
}

template <class Real>
Scaled<Real>::Scaled(const LaplacianSolve<Real>& in, ParallelFor parallel_for)
    : nodes(in.graph.nodes),
      edges(in.graph.edges),
      chunks((nodes + kChunk - 1) / kChunk),
      order(nodes),
      crow(nodes + 1),
      col(edges),
      value(edges),
      diagonal(nodes),
      scale(nodes),
      inverse(nodes) {
  const Csr& graph = in.graph;
  Buffer<int32_t> position(nodes);
  renumber(graph, position.data());
  crow.data()[0] = 0;
  for (int64_t i = 0; i < nodes; ++i) {
    const int64_t node = order.data()[i];
    crow.data()[i + 1] = crow.data()[i] + graph.crow[node + 1] - graph.crow[node];
  }

  Buffer<Real> least(chunks), whole(nodes);
  Buffer<unsigned char> bad(chunks);
  parallel_for(chunks, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      least.data()[chunk] = 0;
      bad.data()[chunk] = 0;
      for_rows(chunk, chunk + 1, nodes, [&](int64_t i) {
        const int64_t node = order.data()[i], first = graph.crow[node];
        Real sum = in.diagonal[node], own = 0;
        bool any = false;
        for (int64_t k = 0; k < graph.crow[node + 1] - first; ++k) {
          const int64_t e = first + k, j = graph.col[e], to = crow.data()[i] + k;
          const bool valid = j >= 0 && j < nodes;
          const Real similar = valid ? in.weight[e] : Real(0), dissimilar = valid && in.dissimilarity ? in.dissimilarity[e] : Real(0);
          col.data()[to] = valid ? position.data()[j] : static_cast<int32_t>(i);
          value.data()[to] = dissimilar - similar;
          sum += similar + dissimilar;
          if (j == node) own += dissimilar - similar;
          any |= value.data()[to] != 0;
        }
        diagonal.data()[i] = sum;
        whole.data()[i] = sum + own;
        if (sum + own < 0 || (sum + own == 0 && any)) {
          bad.data()[chunk] = 1;
          if (sum + own < least.data()[chunk]) least.data()[chunk] = sum + own;
        }
      });
    }
  });
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    is_indefinite |= bad.data()[chunk] != 0;
    if (least.data()[chunk] < least_diagonal) least_diagonal = least.data()[chunk];
  }
  const bool jacobi = in.jacobi && !is_indefinite;
  parallel_for(chunks, [&](int64_t begin, int64_t end) {
    for_rows(begin, end, nodes, [&](int64_t i) {
      const Real a = whole.data()[i];
      scale.data()[i] = !jacobi ? Real(1) : a > 0 ? 1 / __builtin_sqrt(a) : Real(0);
      inverse.data()[i] = !jacobi ? Real(1) : a > 0 ? __builtin_sqrt(a) : Real(0);
    });
  });
  if (!jacobi) return;
  parallel_for(chunks, [&](int64_t begin, int64_t end) {
    for_rows(begin, end, nodes, [&](int64_t i) {
      const Real s = scale.data()[i];
      diagonal.data()[i] *= s * s;
      for (int64_t e = crow.data()[i]; e < crow.data()[i + 1]; ++e) value.data()[e] *= s * scale.data()[col.data()[e]];
    });
  });
}

// Row i of (S A S) p.
template <int kLines, class Real>
Row<Real, kLines> multiply(const Scaled<Real>& matrix, const Real* p, int64_t i) {
  using Row = SSM_ISA::Row<Real, kLines>;
  constexpr int64_t kColumns = Row::kColumns;
  constexpr int kWays = Row::kVectors == 1 ? 4 : Row::kVectors == 2 ? 2 : 1;  // independent sums, to hide the latency of an addition
  const int32_t* col = matrix.col.data();
  const Real* value = matrix.value.data();
  Row sums[kWays];
  sums[0].add(matrix.diagonal.data()[i], Row::at(p + i * kColumns));
  int64_t e = matrix.crow.data()[i];
  const int64_t end = matrix.crow.data()[i + 1], ahead = matrix.edges - kPrefetch - kWays;
  for (; e + kWays <= end; e += kWays) {
    if (e < ahead)
      for (int way = 0; way < kWays; ++way)
        for (int line = 0; line < kLines; ++line)
          __builtin_prefetch(p + int64_t{col[e + way + kPrefetch]} * kColumns + line * (kColumns / kLines));
    for (int way = 0; way < kWays; ++way) sums[way].add(value[e + way], Row::at(p + int64_t{col[e + way]} * kColumns));
  }
  for (; e < end; ++e) sums[0].add(value[e], Row::at(p + int64_t{col[e]} * kColumns));
  for (int way = 1; way < kWays; ++way) sums[0].add(Real(1), sums[way]);
  return sums[0];
}

// One block of columns.
template <class Real, int kLines>
class Block {
  using Row = SSM_ISA::Row<Real, kLines>;
  static constexpr int kColumns = Row::kColumns, kVectors = Row::kVectors;

 public:
  Block(const LaplacianSolve<Real>& in, const Scaled<Real>& matrix, const LaplacianSolution<Real>& out, ParallelFor parallel_for)
      : in_(in),
        matrix_(matrix),
        out_(out),
        parallel_for_(parallel_for),
        vectors_(4 * matrix.nodes * kColumns),
        partials_(matrix.chunks * 2 * kColumns),
        x_(vectors_.take(matrix.nodes * kColumns)),
        r_(vectors_.take(matrix.nodes * kColumns)),
        p_(vectors_.take(matrix.nodes * kColumns)),
        q_(vectors_.take(matrix.nodes * kColumns)) {}

  // Columns first … first + count − 1, at most kColumns.
  void solve(int64_t first, int64_t count) {
    first_ = first;
    count_ = static_cast<int>(count);
    start();
    for (int64_t iteration = 0; iteration < in_.max_iter && active_ > 0; ++iteration) iterate();
    finish();
  }

 private:
  // body(i, first dot, second dot) for every row; the sums of the two dots over all rows, per column, in the order of the chunks.
  template <class F>
  void sum_rows(double (&first)[kColumns], double (&second)[kColumns], const F& body) {
    parallel_for_(matrix_.chunks, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        Row a, b;
        for_rows(chunk, chunk + 1, matrix_.nodes, [&](int64_t i) { body(i, a, b); });
        a.put(partials_.data() + chunk * 2 * kColumns);
        b.put(partials_.data() + (chunk * 2 + 1) * kColumns);
      }
    });
    for (int c = 0; c < kColumns; ++c) first[c] = second[c] = 0;
    for (int64_t chunk = 0; chunk < matrix_.chunks; ++chunk)
      for (int c = 0; c < kColumns; ++c) {
        first[c] += partials_.data()[chunk * 2 * kColumns + c];
        second[c] += partials_.data()[(chunk * 2 + 1) * kColumns + c];
      }
  }

  // Where the row begins, of this block's columns, in the matrices of the problem.
  int64_t at(int64_t i) const {
    return matrix_.order.data()[i] * in_.columns + first_;
  }

  // Row i of B or of the initial X, the columns of this block.
  Row row_of(const Real* matrix, int64_t i) const {
    const Real* row = matrix + at(i);
    if (count_ == kColumns) return Row::at(row);
    Real padded[kColumns] = {};
    for (int c = 0; c < count_; ++c) padded[c] = row[c];
    return Row::at(padded);
  }

  // S b less (S A S) x, and the sum of squares of S⁻¹ of it; where S is 0, of b itself.
  Row residual_row(int64_t i, Row& squares) const {
    const Real s = matrix_.scale.data()[i], inverse = matrix_.inverse.data()[i];
    const Row b = row_of(in_.rhs, i), product = multiply<kLines>(matrix_, x_, i);
    Row r, unscaled;
    for (int k = 0; k < kVectors; ++k) {
      const Vec<Real> scaled = b.v[k] * load(shrink_ + k * kLanes<Real>);
      r.v[k] = s * scaled - product.v[k];
      unscaled.v[k] = s == 0 ? scaled : r.v[k] * inverse;
    }
    squares.add(unscaled, unscaled);
    return r;
  }

  void start() {
    for (int c = 0; c < kColumns; ++c) top_[c] = 0;
    Row magnitude;
    for (int64_t i = 0; i < matrix_.nodes; ++i) {
      const Row b = row_of(in_.rhs, i);
      for (int k = 0; k < kVectors; ++k) magnitude.v[k] = max(magnitude.v[k], max(b.v[k], -b.v[k]));
    }
    magnitude.put(top_);
    for (int c = 0; c < kColumns; ++c) {  // powers of 2: exact, and no square of a residual is lost below the smallest number
      int exponent = 0;
      __builtin_frexp(top_[c], &exponent);
      grow_[c] = top_[c] > 0 ? static_cast<Real>(__builtin_ldexp(1.0, exponent)) : Real(0);
      shrink_[c] = top_[c] > 0 ? static_cast<Real>(__builtin_ldexp(1.0, -exponent)) : Real(0);
    }
    parallel_for_(matrix_.chunks, [&](int64_t begin, int64_t end) {
      for_rows(begin, end, matrix_.nodes, [&](int64_t i) {
        Row x = in_.initial ? row_of(in_.initial, i) : Row{};
        for (int k = 0; k < kVectors; ++k) x.v[k] *= matrix_.inverse.data()[i] * load(shrink_ + k * kLanes<Real>);
        x.put(x_ + i * kColumns);
      });
    });
    double norms[kColumns], ignored[kColumns];
    sum_rows(norms, ignored, [&](int64_t i, Row& a, Row&) {
      Row b = row_of(in_.rhs, i);
      for (int k = 0; k < kVectors; ++k) b.v[k] *= load(shrink_ + k * kLanes<Real>);
      a.add(b, b);
    });
    double unscaled[kColumns];
    sum_rows(rr_, unscaled, [&](int64_t i, Row& dot, Row& squares) {
      const Row r = residual_row(i, squares);
      r.put(r_ + i * kColumns);
      r.put(p_ + i * kColumns);
      dot.add(r, r);
    });
    active_ = 0;
    for (int c = 0; c < kColumns; ++c) {
      norm_[c] = norms[c];
      iterations_[c] = 0;
      curvature_[c] = __builtin_inf();
      is_active_[c] = c < count_ && norms[c] > 0 && rr_[c] > 0 && unscaled[c] > limit(c) && !matrix_.is_indefinite;
      active_ += is_active_[c];
    }
  }

  double limit(int c) const {
    return in_.rtol * in_.rtol * norm_[c];
  }

  void iterate() {
    double pq[kColumns], pp[kColumns];
    sum_rows(pq, pp, [&](int64_t i, Row& along, Row& squares) {
      const Row q = multiply<kLines>(matrix_, p_, i), p = Row::at(p_ + i * kColumns);
      q.put(q_ + i * kColumns);
      along.add(p, q);
      squares.add(p, p);
    });
    Real alpha[kColumns], beta[kColumns];
    for (int c = 0; c < kColumns; ++c) {
      alpha[c] = beta[c] = 0;
      if (!is_active_[c]) continue;
      const double curvature = pp[c] > 0 ? pq[c] / pp[c] : 0;
      if (curvature < curvature_[c]) curvature_[c] = curvature;
      if (curvature > 0)
        alpha[c] = static_cast<Real>(rr_[c] / pq[c]);
      else
        stop(c);
    }
    double rr[kColumns], unscaled[kColumns];
    sum_rows(rr, unscaled, [&](int64_t i, Row& dot, Row& squares) {
      const Row p = Row::at(p_ + i * kColumns), q = Row::at(q_ + i * kColumns);
      Row x = Row::at(x_ + i * kColumns), r = Row::at(r_ + i * kColumns), s;
      for (int k = 0; k < kVectors; ++k) {
        const Vec<Real> a = load(alpha + k * kLanes<Real>);
        x.v[k] += a * p.v[k];
        r.v[k] -= a * q.v[k];
        s.v[k] = matrix_.inverse.data()[i] * r.v[k];
      }
      x.put(x_ + i * kColumns);
      r.put(r_ + i * kColumns);
      dot.add(r, r);
      squares.add(s, s);
    });
    for (int c = 0; c < kColumns; ++c) {
      if (!is_active_[c]) continue;
      ++iterations_[c];
      if (!(unscaled[c] > limit(c)) || rr[c] == 0) stop(c);
      beta[c] = is_active_[c] ? static_cast<Real>(rr[c] / rr_[c]) : Real(0);
      rr_[c] = rr[c];
    }
    if (active_ == 0) return;
    parallel_for_(matrix_.chunks, [&](int64_t begin, int64_t end) {
      for_rows(begin, end, matrix_.nodes, [&](int64_t i) {
        Row p = Row::at(r_ + i * kColumns), old = Row::at(p_ + i * kColumns);
        for (int k = 0; k < kVectors; ++k) p.v[k] += load(beta + k * kLanes<Real>) * old.v[k];
        p.put(p_ + i * kColumns);
      });
    });
  }

  void stop(int c) {
    is_active_[c] = false;
    --active_;
  }

  void finish() {
    double ignored[kColumns], unscaled[kColumns];
    sum_rows(ignored, unscaled, [&](int64_t i, Row&, Row& squares) {
      residual_row(i, squares);
      const Real s = matrix_.scale.data()[i];
      Real* out = out_.solution + at(i);
      const Real* x = x_ + i * kColumns;
      for (int c = 0; c < count_; ++c)
        out[c] = s > 0 ? s * x[c] * grow_[c] : in_.initial && grow_[c] > 0 ? in_.initial[at(i) + c] : Real(0);
    });
    for (int c = 0; c < count_; ++c) {
      out_.iterations[first_ + c] = iterations_[c];
      out_.residual[first_ + c] = norm_[c] > 0 ? static_cast<Real>(__builtin_sqrt(unscaled[c] / norm_[c])) : Real(0);
      out_.curvature[first_ + c] = matrix_.is_indefinite ? matrix_.least_diagonal : static_cast<Real>(curvature_[c]);
    }
  }

  const LaplacianSolve<Real>& in_;
  const Scaled<Real>& matrix_;
  const LaplacianSolution<Real>& out_;
  ParallelFor parallel_for_;
  Buffer<Real> vectors_, partials_;
  Real *x_, *r_, *p_, *q_;

  int64_t first_ = 0;  // column
  int count_ = 0, active_ = 0;
  bool is_active_[kColumns];
  int64_t iterations_[kColumns];
  double rr_[kColumns], norm_[kColumns], curvature_[kColumns];
  Real top_[kColumns], grow_[kColumns], shrink_[kColumns];
};

}  // namespace

template <class Real>
void laplacian_solve(const LaplacianSolve<Real>& in, const LaplacianSolution<Real>& out, ParallelFor parallel_for) {
  const Scaled<Real> matrix(in, parallel_for);
  constexpr int64_t kOneLine = Row<Real, 1>::kColumns, kTwoLines = Row<Real, 2>::kColumns;
  int64_t first = 0;
  if (in.columns > kOneLine) {
    Block<Real, 2> block(in, matrix, out, parallel_for);
    for (; in.columns - first > kOneLine; first += kTwoLines)
      block.solve(first, in.columns - first < kTwoLines ? in.columns - first : kTwoLines);
  }
  if (first < in.columns) Block<Real, 1>(in, matrix, out, parallel_for).solve(first, in.columns - first);
}

template <class Real>
void laplacian_solve_backward(const LaplacianSolveBackward<Real>& in, ParallelFor parallel_for) {
  const Csr& graph = in.graph;
  const int64_t columns = in.columns, whole = columns / kLanes<Real> * kLanes<Real>;
  const auto dot = [=](const Real* a, const Real* b) {
    Vec<Real> sums{};
    for (int64_t c = 0; c < whole; c += kLanes<Real>) sums += load(a + c) * load(b + c);
    Real sum = sum_lanes<Real>(sums);
    for (int64_t c = whole; c < columns; ++c) sum += a[c] * b[c];
    return sum;
  };
  parallel_for((graph.nodes + kChunk - 1) / kChunk, [&](int64_t begin, int64_t end) {
    for_rows(begin, end, graph.nodes, [&](int64_t i) {
      const Real* grad = in.grad_rhs + i * columns;
      const Real own = dot(grad, in.solution + i * columns);
      in.grad_diagonal[i] = -own;
      for (int64_t e = graph.crow[i]; e < graph.crow[i + 1]; ++e) {
        const int64_t j = graph.col[e];
        const bool valid = j >= 0 && j < graph.nodes;
        const Real other = valid ? dot(grad, in.solution + j * columns) : own;
        in.grad_weight[e] = other - own;
        if (in.grad_dissimilarity) in.grad_dissimilarity[e] = valid ? -own - other : Real(0);
      }
    });
  });
}

#define SSM_INSTANTIATE(Real)                                                                              \
  template void laplacian_solve(const LaplacianSolve<Real>&, const LaplacianSolution<Real>&, ParallelFor); \
  template void laplacian_solve_backward(const LaplacianSolveBackward<Real>&, ParallelFor);
SSM_INSTANTIATE(float)
SSM_INSTANTIATE(double)

}  // namespace ssmkernels::SSM_ISA
