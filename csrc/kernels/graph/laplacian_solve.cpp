// SPDX-License-Identifier: BSD-3-Clause
// Columns are solved in blocks of one or two cache lines per node: the block's four vectors of CG (x, r, p, q) and
// nothing else are then read and written while it converges, and a neighbour's row is whole lines. Two lines take two
// thirds of the time per column of one, as the matrix is read half as often; four take more, as the vectors leave the
// cache. The nodes of a large graph are renumbered breadth first, so that neighbours lie near each other: that takes a
// fifth to a third of the time of each iteration. Sums over the nodes are taken chunk by chunk, in their order.
#include "laplacian_solve.h"

#include <limits>

#include "../common/arithmetic.h"
#include "../common/buffer.h"
#include "../common/simd.h"
#include "../common/transpose.h"
#include "convergence.h"

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
  void add_difference(Real a, const Row& b, const Row& c) {  // += a (b − c)
    for (int k = 0; k < kVectors; ++k) v[k] += a * (b.v[k] - c.v[k]);
  }
};

constexpr int64_t kRenumbered = 4096;  // nodes, from which on a vector of a block leaves the second cache

// A times a power of two that makes its largest diagonal entry about 1, with its nodes renumbered and its columns
// checked.
template <class Real>
struct Matrix {
  int64_t nodes, edges, chunks;
  int exponent = 0;         // A = 2^exponent times what is here
  Buffer<int32_t> order;    // [N]  the node that row i is in the arrays of the problem
  Buffer<int64_t> crow;     // [N + 1]
  Buffer<int32_t> col;      // [E]
  Buffer<Real> value;       // [E]  −A_ij, 0 on the diagonal
  Buffer<Real> excess;      // [N]  the sum of row i, u_i + 2 Σ_j w_dis,ij
  Buffer<Real> diagonal;    // [N]  A_ii
  Buffer<Real> inverse;     // [N]  1/|A_ii|, 0 where A_ii is
  Buffer<Real> step;        // [N]  the preconditioner: the inverse, or 1; 0 where A_ii is
  Real least_diagonal = 0;  // min(A_ii, 0), where a diagonal is below 0 (or 0 among entries that are not)
  bool is_indefinite = false, is_finite = true;

  Matrix(const LaplacianSolve<Real>& in, ParallelFor parallel_for);

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
void Matrix<Real>::renumber(const Csr& graph, int32_t* position) {
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
Matrix<Real>::Matrix(const LaplacianSolve<Real>& in, ParallelFor parallel_for)
    : nodes(in.graph.nodes),
      edges(in.graph.edges),
      chunks((nodes + kChunk - 1) / kChunk),
      order(nodes),
      crow(nodes + 1),
      col(edges),
      value(edges),
      excess(nodes),
      diagonal(nodes),
      inverse(nodes),
      step(nodes) {
  const Csr& graph = in.graph;
  Buffer<int32_t> position(nodes);
  renumber(graph, position.data());
  crow.data()[0] = 0;
  for (int64_t i = 0; i < nodes; ++i) {
    const int64_t node = order.data()[i];
    crow.data()[i + 1] = crow.data()[i] + graph.crow[node + 1] - graph.crow[node];
  }

  struct Extremes {
    double least, largest;  // of A_ii and 0; `largest` is NaN where one is not finite
    bool is_indefinite;
  };
  Buffer<Extremes> extremes(chunks);
  parallel_for(chunks, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      Extremes of{0, 0, false};
      for_rows(chunk, chunk + 1, nodes, [&](int64_t i) {
        const int64_t node = order.data()[i], first = graph.crow[node];
        double sum = in.diagonal[node], whole = sum;
        bool any = false;
        for (int64_t k = 0; k < graph.crow[node + 1] - first; ++k) {
          const int64_t e = first + k, j = graph.col[e], to = crow.data()[i] + k;
          const bool valid = j >= 0 && j < nodes;
          const Real similar = valid ? in.weight[e] : Real(0),
                     dissimilar = valid && in.dissimilarity ? in.dissimilarity[e] : Real(0);
          col.data()[to] = valid ? position.data()[j] : static_cast<int32_t>(i);
          value.data()[to] = j == node ? Real(0) : similar - dissimilar;
          sum += 2 * static_cast<double>(dissimilar);
          whole += j == node ? 2 * static_cast<double>(dissimilar) : static_cast<double>(similar) + dissimilar;
          any |= value.data()[to] != 0;
          if (j == node) whole += 0 * similar;  // which counts for nothing, unless it is NaN
        }
        excess.data()[i] = static_cast<Real>(sum);
        diagonal.data()[i] = static_cast<Real>(whole);
        of.is_indefinite |= whole < 0 || (whole == 0 && any);
        of.least = whole < of.least ? whole : of.least;
        of.largest = largest_or_nan(of.largest, whole - whole == 0 ? whole : whole - whole);
      });
      extremes.data()[chunk] = of;
    }
  });
  Extremes all{0, 0, false};
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const Extremes& of = extremes.data()[chunk];
    all.is_indefinite |= of.is_indefinite;
    all.least = of.least < all.least ? of.least : all.least;
    all.largest = largest_or_nan(all.largest, of.largest);
  }
  is_finite = all.largest == all.largest;
  is_indefinite = all.is_indefinite;
  least_diagonal = static_cast<Real>(all.least);
  exponent = exponent_of(all.largest);

  const PowerOf2 shrink(-exponent);
  const bool jacobi = in.jacobi && !is_indefinite;
  constexpr double kMost = sizeof(Real) == 4 ? 0x1p126 : 0x1p1022;  // and its inverse are normal numbers
  parallel_for(chunks, [&](int64_t begin, int64_t end) {
    for_rows(begin, end, nodes, [&](int64_t i) {
      const double a = shrink * diagonal.data()[i], magnitude = a < 0 ? -a : a, reciprocal = 1 / magnitude;
      diagonal.data()[i] = static_cast<Real>(a);
      excess.data()[i] = static_cast<Real>(shrink * excess.data()[i]);
      inverse.data()[i] = a == 0 ? Real(0) : static_cast<Real>(reciprocal < kMost ? reciprocal : kMost);
      step.data()[i] = jacobi || a == 0 ? inverse.data()[i] : Real(1);
      for (int64_t e = crow.data()[i]; e < crow.data()[i + 1]; ++e)
        value.data()[e] = static_cast<Real>(shrink * value.data()[e]);
    });
  });
}

// Row i of A p. As the sum of what flows over each edge and not of the terms of the row, so that it is 0 exactly where
// p is constant and there is no excess: however weak the edges that tie a part of the graph to the rest, rounding among
// its other edges does not cover them.
template <int kLines, class Real>
Row<Real, kLines> multiply(const Matrix<Real>& matrix, const Real* p, int64_t i) {
  using Row = SSM_ISA::Row<Real, kLines>;
  constexpr int64_t kColumns = Row::kColumns;
  constexpr int kWays = Row::kVectors == 1   ? 4
                        : Row::kVectors == 2 ? 2
                                             : 1;  // independent sums, to hide the latency of an addition
  const int32_t* col = matrix.col.data();
  const Real* value = matrix.value.data();
  const Row own = Row::at(p + i * kColumns);
  Row sums[kWays];
  sums[0].add(matrix.excess.data()[i], own);
  int64_t e = matrix.crow.data()[i];
  const int64_t end = matrix.crow.data()[i + 1], ahead = matrix.edges - kPrefetch - kWays;
  for (; e + kWays <= end; e += kWays) {
    if (e < ahead)
      for (int way = 0; way < kWays; ++way)
        for (int line = 0; line < kLines; ++line)
          __builtin_prefetch(p + int64_t{col[e + way + kPrefetch]} * kColumns + line * (kColumns / kLines));
    for (int way = 0; way < kWays; ++way)
      sums[way].add_difference(value[e + way], own, Row::at(p + int64_t{col[e + way]} * kColumns));
  }
  for (; e < end; ++e) sums[0].add_difference(value[e], own, Row::at(p + int64_t{col[e]} * kColumns));
  for (int way = 1; way < kWays; ++way) sums[0].add(Real(1), sums[way]);
  return sums[0];
}

// One block of columns. Its iterates are numbers of the problem times powers of two: a column's right side is such that
// the largest entry of D⁻¹ b (or of the start) is about 1.
template <class Real, int kLines>
class Block {
  using Row = SSM_ISA::Row<Real, kLines>;
  static constexpr int kColumns = Row::kColumns, kVectors = Row::kVectors;

  // Of all rows, per column.
  struct Totals {
    double sum[2][kColumns] = {}, most[2][kColumns] = {};

    void combine(const Totals& other) {
      for (int k = 0; k < 2; ++k)
        for (int c = 0; c < kColumns; ++c) {
          sum[k][c] += other.sum[k][c];
          most[k][c] = largest_or_nan(most[k][c], other.most[k][c]);
        }
    }
  };

 public:
  Block(const LaplacianSolve<Real>& in, const Matrix<Real>& matrix, const LaplacianSolution<Real>& out,
        ParallelFor parallel_for)
      : in_(in),
        matrix_(matrix),
        out_(out),
        parallel_for_(parallel_for),
        solution_(matrix.nodes * kColumns),
        vectors_(3 * matrix.nodes * kColumns),
        partials_(matrix.chunks),
        x_(solution_.data()),
        r_(vectors_.take(matrix.nodes * kColumns)),
        p_(vectors_.take(matrix.nodes * kColumns)),
        q_(vectors_.take(matrix.nodes * kColumns)) {}

  // Columns first … first + count − 1, at most kColumns.
  void solve(int64_t first, int64_t count) {
    first_ = first;
    count_ = static_cast<int>(count);
    start();
    while (judge() > 0) {
      resume();
      while (iterate() > 0) update_directions();
      measure();
    }
    finish();
  }

 private:
  // body(first row, end, totals) for every chunk; its totals over all chunks, in their order.
  template <class F>
  Totals reduce(const F& body) {
    parallel_for_(matrix_.chunks, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        Totals of_chunk;
        body(chunk, of_chunk);
        partials_.data()[chunk] = of_chunk;
      }
    });
    Totals all;
    for (int64_t chunk = 0; chunk < matrix_.chunks; ++chunk) all.combine(partials_.data()[chunk]);
    return all;
  }

  // body(i, first dot, second dot) for every row.
  template <class F>
  Totals sum_rows(const F& body) {
    return reduce([&](int64_t chunk, Totals& of_chunk) {
      Row dots[2];
      for_rows(chunk, chunk + 1, matrix_.nodes, [&](int64_t i) { body(i, dots[0], dots[1]); });
      Real values[kColumns];
      for (int k = 0; k < 2; ++k) {
        dots[k].put(values);
        for (int c = 0; c < kColumns; ++c) of_chunk.sum[k][c] = values[c];
      }
    });
  }

  // body(i, totals) for every row.
  template <class F>
  Totals reduce_rows(const F& body) {
    return reduce([&](int64_t chunk, Totals& of_chunk) {
      for_rows(chunk, chunk + 1, matrix_.nodes, [&](int64_t i) { body(i, of_chunk); });
    });
  }

  // Where the row begins, of this block's columns, in the matrices of the problem.
  int64_t at(int64_t i) const {
    return matrix_.order.data()[i] * in_.columns + first_;
  }

  // The powers of two of every column, and x = the start.
  void start() {
    const Totals top = reduce_rows([&](int64_t i, Totals& of) {
      for (int c = 0; c < count_; ++c) {
        of.most[0][c] = largest_or_nan(of.most[0][c], magnitude(in_.rhs[at(i) + c]));
        if (in_.initial) of.most[1][c] = largest_or_nan(of.most[1][c], magnitude(in_.initial[at(i) + c]));
      }
    });
    PowerOf2 unit[kColumns];
    for (int c = 0; c < count_; ++c) unit[c] = PowerOf2(-exponent_of(top.most[0][c]));
    const Totals jacobi = reduce_rows([&](int64_t i, Totals& of) {  // D⁻¹ b
      for (int c = 0; c < count_; ++c)
        of.most[0][c] =
            largest_or_nan(of.most[0][c], magnitude(unit[c] * in_.rhs[at(i) + c] * matrix_.inverse.data()[i]));
    });
    for (int c = 0; c < count_; ++c) {
      const bool is_finite =
          matrix_.is_finite && top.most[0][c] - top.most[0][c] == 0 && top.most[1][c] - top.most[1][c] == 0;
      int exponent = exponent_of(top.most[0][c]) + exponent_of(jacobi.most[0][c]);
      if (top.most[1][c] > 0) exponent = max<int>(exponent, exponent_of(top.most[1][c]) + matrix_.exponent);
      shrink_[c] = PowerOf2(-exponent);
      grow_[c] = PowerOf2(exponent - matrix_.exponent);
      column_[c] = Convergence(is_finite, top.most[0][c] > 0, in_.rtol, in_.max_iter);
      if (matrix_.is_indefinite) column_[c].end();
    }
    parallel_for_(matrix_.chunks, [&](int64_t begin, int64_t end) {
      for_rows(begin, end, matrix_.nodes, [&](int64_t i) {
        double* x = x_ + i * kColumns;
        // A column that needs no iteration keeps these while others iterate: times 0 they are added to its solution.
        for (int c = 0; c < kColumns; ++c) x[c] = r_[i * kColumns + c] = p_[i * kColumns + c] = 0;
        if (!in_.initial) return;
        for (int c = 0; c < count_; ++c) x[c] = grow_[c].inverse() * in_.initial[at(i) + c];
      });
    });
    const Totals norm = reduce_rows([&](int64_t i, Totals& of) {
      for (int c = 0; c < count_; ++c) {
        const double b = shrink_[c] * in_.rhs[at(i) + c], z = b * matrix_.inverse.data()[i];
        of.sum[0][c] += z * z;
        if (matrix_.inverse.data()[i] == 0) of.most[0][c] = largest_or_nan(of.most[0][c], magnitude(b));
      }
    });
    for (int c = 0; c < count_; ++c) column_[c].set_right_side(norm.sum[0][c], norm.most[0][c] > 0);
    measure();
  }

  // q = b − A x in double precision, and what it says of the columns.
  void measure() {
    const Totals size = reduce_rows([&](int64_t i, Totals& of) {
      for (int c = 0; c < kColumns; ++c) of.most[0][c] = largest_or_nan(of.most[0][c], magnitude(x_[i * kColumns + c]));
    });
    const Totals totals = reduce_rows([&](int64_t i, Totals& of) {
      const double *x = x_ + i * kColumns, excess = matrix_.excess.data()[i], diagonal = matrix_.diagonal.data()[i];
      const double inverse = matrix_.inverse.data()[i], step = matrix_.step.data()[i];
      double sum[kColumns], terms[kColumns];
      for (int c = 0; c < kColumns; ++c) {
        sum[c] = excess * x[c];
        terms[c] = magnitude(sum[c]);
      }
      for (int64_t e = matrix_.crow.data()[i]; e < matrix_.crow.data()[i + 1]; ++e) {
        const double value = matrix_.value.data()[e], *other = x_ + int64_t{matrix_.col.data()[e]} * kColumns;
        for (int c = 0; c < kColumns; ++c) {
          const double flow = value * (x[c] - other[c]);
          sum[c] += flow;
          terms[c] += magnitude(flow);
        }
      }
      for (int c = 0; c < count_; ++c) {
        const double b = shrink_[c] * in_.rhs[at(i) + c], r = b - sum[c], z = inverse * r;
        q_[i * kColumns + c] = static_cast<Real>(r);
        of.sum[0][c] += r * step * r;
        of.sum[1][c] += z * z;
        if (inverse > 0)
          of.most[0][c] =
              largest_or_nan(of.most[0][c], imbalance(r, terms[c] + magnitude(b), diagonal, x[c], size.most[0][c]));
      }
      for (int c = count_; c < kColumns; ++c) q_[i * kColumns + c] = 0;
    });
    for (int c = 0; c < count_; ++c) column_[c].measure(totals.sum[0][c], totals.sum[1][c], totals.most[0][c]);
  }

  // How many columns go on.
  int judge() {
    int active = 0;
    for (int c = 0; c < count_; ++c) active += column_[c].judge();
    return active;
  }

  // The residual of the columns that start again, from q, and the directions of all that go on.
  void resume() {
    parallel_for_(matrix_.chunks, [&](int64_t begin, int64_t end) {
      for_rows(begin, end, matrix_.nodes, [&](int64_t i) {
        for (int c = 0; c < kColumns; ++c)
          if (c >= count_ || column_[c].restarts()) {
            r_[i * kColumns + c] = q_[i * kColumns + c];
            p_[i * kColumns + c] = 0;
          }
      });
    });
    update_directions();
  }

  // One step of every column that is under way; how many still are.
  int iterate() {
    const Totals along = sum_rows([&](int64_t i, Row& pq, Row& pp) {
      const Row q = multiply<kLines>(matrix_, p_, i), p = Row::at(p_ + i * kColumns);
      q.put(q_ + i * kColumns);
      pq.add(p, q);
      const Real weight = in_.jacobi ? matrix_.diagonal.data()[i] : Real(1);
      for (int k = 0; k < kVectors; ++k) pp.v[k] += weight * p.v[k] * p.v[k];
    });
    Real alpha[kColumns] = {};
    for (int c = 0; c < count_; ++c) alpha[c] = static_cast<Real>(column_[c].step(along.sum[0][c], along.sum[1][c]));
    const Totals squares = sum_rows([&](int64_t i, Row& rz, Row& zz) {
      const Row q = Row::at(q_ + i * kColumns);
      Row r = Row::at(r_ + i * kColumns);
      const Real step = matrix_.step.data()[i], inverse = matrix_.inverse.data()[i];
      for (int k = 0; k < kVectors; ++k) {
        r.v[k] -= load(alpha + k * kLanes<Real>) * q.v[k];
        rz.v[k] += r.v[k] * (step * r.v[k]);
        const Vec<Real> z = inverse * r.v[k];
        zz.v[k] += z * z;
      }
      r.put(r_ + i * kColumns);
      double* x = x_ + i * kColumns;
      const Real* direction = p_ + i * kColumns;
      for (int c = 0; c < kColumns; ++c) x[c] += static_cast<double>(alpha[c]) * direction[c];
    });
    int active = 0;
    for (int c = 0; c < count_; ++c) active += column_[c].advance(squares.sum[0][c], squares.sum[1][c]);
    return active;
  }

  // p = z + β p of the columns under way; those that wait keep theirs.
  void update_directions() {
    Real fresh[kColumns] = {}, beta[kColumns];
    for (int c = 0; c < kColumns; ++c) {
      const bool moves = c < count_ && column_[c].is_active();
      fresh[c] = moves ? Real(1) : Real(0);
      beta[c] = moves ? static_cast<Real>(column_[c].beta()) : Real(1);
    }
    parallel_for_(matrix_.chunks, [&](int64_t begin, int64_t end) {
      for_rows(begin, end, matrix_.nodes, [&](int64_t i) {
        const Row r = Row::at(r_ + i * kColumns), old = Row::at(p_ + i * kColumns);
        const Real step = matrix_.step.data()[i];
        Row p;
        for (int k = 0; k < kVectors; ++k) {
          const int64_t c = k * kLanes<Real>;
          p.v[k] = load(fresh + c) * (step * r.v[k]) + load(beta + c) * old.v[k];
        }
        p.put(p_ + i * kColumns);
      });
    });
  }

  void finish() {
    constexpr Real kNaN = std::numeric_limits<Real>::quiet_NaN();
    parallel_for_(matrix_.chunks, [&](int64_t begin, int64_t end) {
      for_rows(begin, end, matrix_.nodes, [&](int64_t i) {
        const bool is_known = matrix_.inverse.data()[i] != 0;
        for (int c = 0; c < count_; ++c) {
          Real value = is_known      ? static_cast<Real>(grow_[c] * x_[i * kColumns + c])
                       : in_.initial ? in_.initial[at(i) + c]
                                     : Real(0);
          if (!column_[c].has_right_side()) value = 0;
          out_.solution[at(i) + c] = column_[c].is_finite() ? value : kNaN;
        }
      });
    });
    for (int c = 0; c < count_; ++c) {
      const Convergence& column = column_[c];
      out_.iterations[first_ + c] = column.iterations();
      out_.residual[first_ + c] = static_cast<Real>(column.residual());
      const double curvature = in_.jacobi ? column.curvature() : PowerOf2(matrix_.exponent) * column.curvature();
      out_.curvature[first_ + c] = !column.is_finite()     ? kNaN
                                   : matrix_.is_indefinite ? matrix_.least_diagonal
                                                           : static_cast<Real>(curvature);
    }
  }

  const LaplacianSolve<Real>& in_;
  const Matrix<Real>& matrix_;
  const LaplacianSolution<Real>& out_;
  ParallelFor parallel_for_;
  Buffer<double> solution_;
  Buffer<Real> vectors_;
  Buffer<Totals> partials_;
  double* x_;  // in double precision: where the solution is a large constant and small differences, these decide
  Real *r_, *p_, *q_;

  int64_t first_ = 0;  // column
  int count_ = 0;
  Convergence column_[kColumns];
  PowerOf2 shrink_[kColumns], grow_[kColumns];
};

}  // namespace

template <class Real>
void laplacian_solve(const LaplacianSolve<Real>& in, const LaplacianSolution<Real>& out, ParallelFor parallel_for) {
  const Matrix<Real> matrix(in, parallel_for);
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
