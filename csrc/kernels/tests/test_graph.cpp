// SPDX-License-Identifier: BSD-3-Clause
// The graph kernels without torch, on the instruction set in use: against a direct transcription of the equations in
// double, and bit for bit between one thread and several. Run it under the sanitizers too.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "../graph/laplacian_solve.h"
#include "../graph/leave_one_edge_out.h"
#include "harness.h"
#include "unwritten.h"

using namespace ssmkernels;
using namespace ssmkernels::test;

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

template <class Real>
std::vector<Real> unwritten(int64_t size) {
  return std::vector<Real>(size, std::numeric_limits<Real>::quiet_NaN());
}

template <class Real>
std::vector<Real> normal_values(int64_t size, double scale, std::mt19937& random) {
  std::normal_distribution<double> normal(0, scale);
  std::vector<Real> values(size);
  for (Real& value : values) value = static_cast<Real>(normal(random));
  return values;
}

template <class Real>
struct Graph {
  std::vector<int64_t> crow{0}, reverse;
  std::vector<int32_t> col;
  std::vector<Real> weight, dissimilarity;

  int64_t nodes() const {
    return static_cast<int64_t>(crow.size()) - 1;
  }
  int64_t edges() const {
    return static_cast<int64_t>(col.size());
  }
  Csr view() const {
    return {crow.data(), col.data(), nodes(), edges()};
  }
  // Calls each(i, j, e) for the entries whose column is a node.
  template <class F>
  void for_each(const F& each) const {
    for (int64_t i = 0; i < nodes(); ++i)
      for (int64_t e = crow[i]; e < crow[i + 1]; ++e)
        if (col[e] >= 0 && col[e] < nodes()) each(i, int64_t{col[e]}, e);
  }
  // From the columns of every row; symmetric random weights.
  static Graph of_rows(const std::vector<std::vector<int32_t>>& rows, std::mt19937& random) {
    Graph graph;
    for (const auto& row : rows) {
      graph.col.insert(graph.col.end(), row.begin(), row.end());
      graph.crow.push_back(graph.edges());
    }
    graph.reverse.resize(graph.col.size());
    graph.weight.resize(graph.col.size());
    graph.dissimilarity.resize(graph.col.size());
    std::uniform_real_distribution<double> uniform;
    graph.for_each([&](int64_t i, int64_t j, int64_t e) {
      const auto row = graph.col.begin() + graph.crow[j];
      const int64_t mirror = graph.reverse[e] =
          std::lower_bound(row, graph.col.begin() + graph.crow[j + 1], i) - graph.col.begin();
      if (i > j) return;
      graph.weight[e] = graph.weight[mirror] = static_cast<Real>(0.1 + uniform(random));
      graph.dissimilarity[e] = graph.dissimilarity[mirror] =
          static_cast<Real>(uniform(random) < 0.3 ? 0.5 * uniform(random) : 0);
    });
    return graph;
  }
};

bool is_isolated(int64_t node) {
  return node % 7 == 5;
}

// About six neighbours per node, self-loops on every fifth, and a node joined to almost all others.
template <class Real>
Graph<Real> make_graph(int64_t nodes, std::mt19937& random) {
  std::uniform_real_distribution<double> uniform;
  std::vector<std::vector<int32_t>> rows(nodes);
  for (int32_t i = 0; i < nodes; ++i)
    for (int32_t j = 0; j <= i; ++j) {
      if (is_isolated(i) || is_isolated(j)) continue;
      const bool joined = i == j ? i % 5 == 1 : uniform(random) < (j == 2 ? 0.9 : 6.0 / static_cast<double>(nodes));
      if (!joined) continue;
      rows[i].push_back(j);
      if (i != j) rows[j].push_back(i);
    }
  return Graph<Real>::of_rows(rows, random);
}

// A ring whose neighbours have far numbers.
template <class Real>
Graph<Real> make_ring(int64_t nodes, std::mt19937& random) {
  std::vector<int32_t> order(nodes);
  for (int32_t i = 0; i < nodes; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), random);
  std::vector<std::vector<int32_t>> rows(nodes);
  for (int64_t k = 0; k < nodes; ++k) rows[order[k]] = {order[(k + nodes - 1) % nodes], order[(k + 1) % nodes]};
  for (auto& row : rows) std::sort(row.begin(), row.end());
  return Graph<Real>::of_rows(rows, random);
}

// ---- laplacian_solve

template <class Real>
struct System {
  Graph<Real> graph;
  int64_t columns;
  std::vector<Real> diagonal, rhs, initial;  // initial may be empty
  bool has_dissimilarity = true, jacobi = true;
  double rtol = sizeof(Real) == 4 ? 1e-5 : 1e-10;
  int64_t max_iter = 1000;

  System(Graph<Real> of, int64_t columns, std::mt19937& random) : graph(std::move(of)), columns(columns) {
    const int64_t nodes = graph.nodes();
    for (int64_t i = 0; i < nodes; ++i) diagonal.push_back(static_cast<Real>(i % 14 == 5 ? 0 : i % 4 == 0 ? 1 : 0.05));
    rhs = normal_values<Real>(nodes * columns, 1, random);
    for (int64_t i = 0; i < nodes; ++i)
      if (diagonal[i] == 0) std::fill_n(rhs.begin() + i * columns, columns, Real(0));
  }

  double dissimilarity(int64_t e) const {
    return has_dissimilarity ? graph.dissimilarity[e] : 0;
  }
  double start(int64_t i, int64_t c) const {
    return initial.empty() ? 0 : initial[i * columns + c];
  }
  Values column(const std::vector<Real>& values, int64_t c) const {
    Values out(graph.nodes());
    for (int64_t i = 0; i < graph.nodes(); ++i) out[i] = values[i * columns + c];
    return out;
  }
  Values times(const Values& x) const {  // (diag + D − W + D_dis + W_dis) x
    Values out(x.size());
    for (size_t i = 0; i < x.size(); ++i) out[i] = diagonal[i] * x[i];
    graph.for_each([&](int64_t i, int64_t j, int64_t e) {
      out[i] += graph.weight[e] * (x[i] - x[j]) + dissimilarity(e) * (x[i] + x[j]);
    });
    return out;
  }
  Values matrix_diagonal() const {
    Values out(diagonal.begin(), diagonal.end());
    graph.for_each([&](int64_t i, int64_t j, int64_t e) {
      out[i] += i == j ? 2 * dissimilarity(e) : graph.weight[e] + dissimilarity(e);
    });
    return out;
  }
};

// D⁻¹ v, 0 where D is.
Values jacobi(const Values& diagonal, Values v) {
  for (size_t i = 0; i < v.size(); ++i) v[i] = diagonal[i] > 0 ? v[i] / diagonal[i] : 0;
  return v;
}

double dot(const Values& a, const Values& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

// Textbook conjugate gradients of one column, preconditioned by M⁻¹ = diag(A)⁻¹ or 1; the number of iterations, and x
// in place.
template <class Real>
int64_t conjugate_gradients(const System<Real>& system, int64_t c, Values& x) {
  const Values b = system.column(system.rhs, c), product = system.times(x), diagonal = system.matrix_diagonal();
  Values r(b.size()), p(b.size()), z(b.size());
  const auto precondition = [&] {
    for (size_t i = 0; i < b.size(); ++i) z[i] = !system.jacobi ? r[i] : diagonal[i] > 0 ? r[i] / diagonal[i] : 0;
  };
  for (size_t i = 0; i < b.size(); ++i) r[i] = b[i] - product[i];
  precondition();
  p = z;
  double rz = dot(r, z);
  const double target = system.rtol * norm(jacobi(diagonal, b));
  int64_t iteration = 0;
  for (; iteration < system.max_iter && target > 0 && norm(jacobi(diagonal, r)) > target; ++iteration) {
    const Values q = system.times(p);
    const double alpha = rz / dot(p, q);
    for (size_t i = 0; i < b.size(); ++i) {
      x[i] += alpha * p[i];
      r[i] -= alpha * q[i];
    }
    precondition();
    const double last = rz;
    rz = dot(r, z);
    for (size_t i = 0; i < b.size(); ++i) p[i] = z[i] + rz / last * p[i];
  }
  return iteration;
}

template <class Real>
struct Solution {
  std::vector<Real> solution, residual, curvature;
  std::vector<int64_t> iterations;

  bool operator==(const Solution& other) const {
    return same_bits(solution, other.solution) && same_bits(residual, other.residual) &&
           same_bits(curvature, other.curvature) && iterations == other.iterations;
  }
};

template <class Real>
Solution<Real> solve(const System<Real>& system, ParallelFor parallel_for = serial_for) {
  const int64_t columns = system.columns;
  Solution<Real> out{unwritten<Real>(system.graph.nodes() * columns), unwritten<Real>(columns),
                     unwritten<Real>(columns), std::vector<int64_t>(columns, -1)};
  const LaplacianSolve<Real> problem{system.graph.view(),
                                     system.graph.weight.data(),
                                     system.has_dissimilarity ? system.graph.dissimilarity.data() : nullptr,
                                     system.diagonal.data(),
                                     system.rhs.data(),
                                     system.initial.empty() ? nullptr : system.initial.data(),
                                     columns,
                                     system.rtol,
                                     system.max_iter,
                                     system.jacobi};
  const LaplacianSolution<Real> result{out.solution.data(), out.iterations.data(), out.residual.data(),
                                       out.curvature.data()};
  SSM_CALL_ISA(laplacian_solve, problem, result, parallel_for);
  return out;
}

// What the solution of column c leaves: ‖D⁻¹(b − A x)‖/‖D⁻¹b‖, and how much of it the rounding of x to Real accounts
// for.
struct Left {
  double residual = 0, rounding = 0;
};

template <class Real>
Left left_of(const System<Real>& system, const std::vector<Real>& solution, int64_t c) {
  const Values x = system.column(solution, c), b = system.column(system.rhs, c), diagonal = system.matrix_diagonal();
  Values r = system.times(x), rounding(x.size());
  for (size_t i = 0; i < r.size(); ++i) {
    r[i] = b[i] - r[i];
    rounding[i] = 2 * diagonal[i] * std::abs(x[i]);
  }
  system.graph.for_each([&](int64_t i, int64_t j, int64_t e) {
    rounding[i] += (system.graph.weight[e] + system.dissimilarity(e)) * (std::abs(x[i]) + std::abs(x[j]));
  });
  const double size = norm(jacobi(diagonal, b));
  if (size == 0) return {};
  return {norm(jacobi(diagonal, r)) / size,
          std::numeric_limits<Real>::epsilon() * norm(jacobi(diagonal, rounding)) / size};
}

// The residual of what was returned, the number of iterations, and nodes that nothing is known of.
template <class Real>
void check_converged(const System<Real>& system) {
  const Solution<Real> ours = solve(system);
  const Values diagonal = system.matrix_diagonal();
  for (int64_t c = 0; c < system.columns; ++c) {
    const Values x = system.column(ours.solution, c), b = system.column(system.rhs, c);
    Values reference(x.size());
    for (size_t i = 0; i < x.size(); ++i) {
      reference[i] = system.start(i, c);
      if (diagonal[i] == 0)
        check(dot(b, b) == 0 || x[i] == reference[i], "laplacian_solve keeps what it knows nothing of");
    }
    const int64_t iterations = conjugate_gradients(system, c, reference);
    const Left left = left_of(system, ours.solution, c);
    check(std::abs(ours.iterations[c] - iterations) <= 2 + iterations / 5, "laplacian_solve iterations");
    check(ours.residual[c] <= system.rtol, "laplacian_solve converges");
    check(std::abs(ours.residual[c] - left.residual) <= left.rounding, "laplacian_solve residual");
    check(ours.iterations[c] > 0 ? ours.curvature[c] > 0 : ours.curvature[c] == kInfinity, "laplacian_solve curvature");
  }
}

template <class Real>
void check_bits(const System<Real>& system) {
  check(solve(system) == solve(system, threads_for), "laplacian_solve bits");
}

template <class Real>
void test_solve(int64_t nodes, int64_t columns) {
  std::mt19937 random(static_cast<unsigned>(1000 * nodes + columns));
  System<Real> system(make_graph<Real>(nodes, random), columns, random);
  check_converged(system);
  system.initial = normal_values<Real>(nodes * columns, 1, random);
  check_converged(system);
  check_bits(system);
  system.jacobi = false;
  check_converged(system);
  system.has_dissimilarity = false;
  check_converged(system);

  // Powers of two pass through: neither squares that overflow nor ones that vanish change a bit.
  const Solution<Real> ours = solve(system);
  for (const int exponent : {-100, 100}) {
    System<Real> scaled = system;
    Solution<Real> expected = ours;
    for (auto* values : {&scaled.rhs, &scaled.initial, &expected.solution})
      for (Real& value : *values) value = std::ldexp(value, exponent);
    check(solve(scaled) == expected, "laplacian_solve of 2^k b");
  }
}

// Weights, diagonals and right sides of any size: a power of two passes through, and 10^k changes rounding alone.
template <class Real>
void test_solve_scales() {
  std::mt19937 random(12);
  const System<Real> system(make_graph<Real>(40, random), 13, random);
  const Solution<Real> ours = solve(system);
  const int most = sizeof(Real) == 4 ? 100 : 1000;
  const auto scaled = [](System<Real> of, const auto& matrix, const auto& rhs) {
    for (auto* values : {&of.graph.weight, &of.graph.dissimilarity, &of.diagonal})
      for (Real& value : *values) value = matrix(value);
    for (Real& b : of.rhs) b = rhs(b);
    return of;
  };
  const auto times = [](double factor) { return [factor](Real value) { return static_cast<Real>(value * factor); }; };
  const auto shift = [](int exponent) { return [exponent](Real value) { return std::ldexp(value, exponent); }; };
  for (const int of_matrix : {-most, 0, most})
    for (const int of_rhs : {-most, 0, most}) {
      if (of_rhs - of_matrix > most || of_matrix - of_rhs > most) continue;
      Solution<Real> expected = ours;
      for (Real& x : expected.solution) x = std::ldexp(x, of_rhs - of_matrix);
      check(solve(scaled(system, shift(of_matrix), shift(of_rhs))) == expected, "laplacian_solve of 2^k A, 2^l b");
    }
  for (const double size : {1e-30, 1e-12, 1e12, 1e30}) check_converged(scaled(system, times(size), times(1)));

  // Subnormal right sides, and ones near the largest number.
  for (const double size : {sizeof(Real) == 4 ? 1e-41 : 1e-315, sizeof(Real) == 4 ? 1e37 : 1e307}) {
    const System<Real> extreme = scaled(system, times(sizeof(Real) == 4 ? 1e3 : 1e5), times(size));
    const Solution<Real> out = solve(extreme);
    for (int64_t c = 0; c < 13; ++c)
      check(out.residual[c] <= system.rtol && out.iterations[c] > 0, "laplacian_solve of extreme b");
    for (const Real x : out.solution) check(std::isfinite(x), "laplacian_solve of extreme b: finite");
  }
}

// Labels 0 and 1 in one half of a graph, the other tied to the node of label 1 by a weak edge: what reaches the weak
// half must pass it.
template <class Real>
void test_weak_bridge() {
  std::mt19937 random(13);
  constexpr int32_t kHalf = 60;
  std::vector<std::vector<int32_t>> rows(2 * kHalf);
  for (int32_t i = 0; i < 2 * kHalf; ++i)
    for (int32_t j = 0; j < 2 * kHalf; ++j) {
      const bool same_half = i / kHalf == j / kHalf;
      if (i != j &&
          (same_half ? (i + j) % 7 < 2 || std::abs(i - j) == 1 : i + j == 2 * kHalf - 1 && std::abs(i - j) == 1))
        rows[i].push_back(j);
    }
  System<Real> system(Graph<Real>::of_rows(rows, random), 2, random);
  system.has_dissimilarity = false;
  system.rtol = 1e-4;
  for (const double scale : {1e-12, 1e-6, 1.0, 1e6}) {
    System<Real> tied = system;
    tied.diagonal.assign(2 * kHalf, 0);
    tied.rhs.assign(4 * kHalf, 0);
    for (const int32_t label : {0, 1}) {
      const int32_t node = label == 0 ? 0 : kHalf - 1;
      tied.diagonal[node] = Real(0.01);
      for (const int32_t c : {0, 1}) tied.rhs[node * 2 + c] = c == label ? Real(0.5) : Real(-0.5);
    }
    tied.graph.for_each([&](int64_t i, int64_t j, int64_t e) {
      const bool is_bridge = i / kHalf != j / kHalf;
      tied.graph.weight[e] = static_cast<Real>(scale * (is_bridge ? 1e-9 : 1 + (i + j) % 3));
    });
    const Solution<Real> ours = solve(tied);
    check(ours.residual[0] <= tied.rtol && ours.residual[1] <= tied.rtol, "weak bridge: converges");
    const Real bridge = ours.solution[(kHalf - 1) * 2 + 1];
    check(bridge > 0, "weak bridge: sign");
    for (int64_t i = kHalf; i < 2 * kHalf; ++i)  // no current flows in the other half
      check(std::abs(ours.solution[i * 2 + 1] - bridge) <= 0.2 * bridge, "weak bridge");
  }
}

// Clusters with few and weak edges between them: the recurrence alone would stop far from the residual it tells of.
template <class Real>
void test_drift() {
  std::mt19937 random(14);
  constexpr int32_t kClusters = 20, kSize = 40, kNodes = kClusters * kSize;
  std::vector<std::vector<int32_t>> rows(kNodes);
  for (int32_t i = 0; i < kNodes; ++i)
    for (int32_t j = 0; j < kNodes; ++j) {
      const bool near = i / kSize == j / kSize ? (i * j) % 4 != 1 : i % kSize == 0 && j % kSize == 0;
      if (i != j && near) rows[i].push_back(j);
    }
  System<Real> system(Graph<Real>::of_rows(rows, random), kClusters, random);
  system.has_dissimilarity = false;
  system.rtol = sizeof(Real) == 4 ? 1e-6 : 1e-10;
  system.diagonal.assign(kNodes, 0);
  system.rhs.assign(kNodes * kClusters, 0);
  for (int32_t cluster = 0; cluster < kClusters; ++cluster) {
    const int32_t node = cluster * kSize + 1;
    system.diagonal[node] = Real(0.01);
    for (int32_t c = 0; c < kClusters; ++c)
      system.rhs[node * kClusters + c] = (c == cluster ? Real(1) : Real(0)) - Real(1) / kClusters;
  }
  system.graph.for_each([&](int64_t i, int64_t j, int64_t e) {
    if (i / kSize != j / kSize) system.graph.weight[e] = static_cast<Real>(1e-5);
  });
  const Solution<Real> ours = solve(system);
  for (int64_t c = 0; c < kClusters; ++c) check(ours.residual[c] <= system.rtol, "drift: residual");
  check_bits(system);
}

// NaN or infinity: in a column of the right side or of the start it is that column's; in the matrix it is everybody's.
template <class Real>
void test_solve_nan() {
  std::mt19937 random(15);
  System<Real> system(make_graph<Real>(40, random), 17, random);
  system.initial = normal_values<Real>(40 * 17, 1, random);
  for (const double bad : {std::nan(""), kInfinity, -kInfinity}) {
    const Solution<Real> clean = solve(system);
    System<Real> poisoned = system;
    poisoned.rhs[12 * 17 + 3] = static_cast<Real>(bad);
    poisoned.initial[8 * 17 + 5] = static_cast<Real>(bad);
    const Solution<Real> ours = solve(poisoned);
    for (int64_t c = 0; c < 17; ++c) {
      const bool is_bad = c == 3 || c == 5;
      check(is_bad ? std::isnan(ours.residual[c]) : ours.residual[c] == clean.residual[c], "NaN column: residual");
      check(ours.iterations[c] == (is_bad ? 0 : clean.iterations[c]), "NaN column: iterations");
      for (int64_t i = 0; i < 40; ++i) {
        const Real x = ours.solution[i * 17 + c];
        check(is_bad ? std::isnan(x) : x == clean.solution[i * 17 + c], "NaN column: solution");
      }
    }
    for (const int which : {0, 1, 2}) {
      System<Real> matrix = system;
      (which == 0   ? matrix.graph.weight
       : which == 1 ? matrix.graph.dissimilarity
                    : matrix.diagonal)[3] = static_cast<Real>(bad);
      if (which == 2 && bad < 0) continue;  // a diagonal below 0
      const Solution<Real> all = solve(matrix);
      for (const Real x : all.solution) check(std::isnan(x), "NaN in the matrix: solution");
      for (const Real residual : all.residual) check(std::isnan(residual), "NaN in the matrix: residual");
    }
  }
}

template <class Real>
void test_max_iter() {
  std::mt19937 random(3);
  for (const bool jacobi : {true, false}) {
    System<Real> system(make_graph<Real>(129, random), 13, random);
    system.initial = normal_values<Real>(129 * 13, 1, random);
    system.jacobi = jacobi;
    system.max_iter = 4;
    system.rtol = 1e-14;
    const Solution<Real> ours = solve(system);
    Values expected(ours.solution.size());
    for (int64_t c = 0; c < system.columns; ++c) {
      Values x(129);
      for (int64_t i = 0; i < 129; ++i) x[i] = system.start(i, c);
      conjugate_gradients(system, c, x);
      for (int64_t i = 0; i < 129; ++i) expected[i * system.columns + c] = x[i];
      check(ours.iterations[c] == 4, "max_iter");
    }
    expect_close("laplacian_solve after 4 iterations", ours.solution, expected, sizeof(Real) == 4 ? 1e-3 : 1e-11);
  }
}

// Columns that end before they begin.
template <class Real>
void test_no_iterations() {
  std::mt19937 random(4);
  System<Real> system(make_graph<Real>(40, random), 17, random);
  const auto all_zero = [](const auto& values) {
    return std::all_of(values.begin(), values.end(), [](auto x) { return x == 0; });
  };

  // b = 0 in column 3 only: 0 whatever the start, and no concern of the other columns.
  system.initial = normal_values<Real>(40 * 17, 1, random);
  for (int64_t i = 0; i < 40; ++i) system.rhs[i * 17 + 3] = 0;
  check_converged(system);
  const Solution<Real> ours = solve(system);
  check(all_zero(system.column(ours.solution, 3)), "b = 0: solution");
  check(ours.iterations[3] == 0 && ours.residual[3] == 0 && ours.iterations[2] > 0, "b = 0: counts");

  // Where the solution is 0 and the start is not, nothing is left to balance but rounding.
  System<Real> zero(make_ring<Real>(40, random), 1, random);
  zero.graph.for_each([&](int64_t i, int64_t j, int64_t e) {
    if (i / 20 != j / 20) zero.graph.weight[e] = zero.graph.dissimilarity[e] = 0;
  });
  zero.initial = normal_values<Real>(40, 1, random);
  for (int64_t i = 0; i < 20; ++i) zero.rhs[i] = 0;
  const Solution<Real> vanished = solve(zero);
  check(vanished.residual[0] <= zero.rtol && vanished.iterations[0] <= 120, "solution 0 in a component");

  // The exact start, of small integers, with weights that are integers too.
  system.jacobi = false;
  for (auto* values : {&system.graph.weight, &system.graph.dissimilarity, &system.diagonal, &system.initial})
    for (Real& value : *values) value = std::round(4 * value);
  for (int64_t c = 0; c < 17; ++c) {
    const Values b = system.times(system.column(system.initial, c));
    for (int64_t i = 0; i < 40; ++i) system.rhs[i * 17 + c] = static_cast<Real>(b[i]);
  }
  const Solution<Real> exact = solve(system);
  check(same_bits(exact.solution, system.initial), "exact start: solution");
  check(all_zero(exact.iterations) && all_zero(exact.residual), "exact start: counts");
  System<Real> mixed = system;  // one column iterates, the others wait
  mixed.rhs[5] += 1;
  const Solution<Real> beside = solve(mixed);
  int64_t changed = 0;
  for (int64_t i = 0; i < 40 * 17; ++i) changed += i % 17 != 5 && beside.solution[i] != system.initial[i];
  check(changed == 0 && beside.iterations[5] > 0, "exact start beside a column that iterates");
  system.jacobi = true;
  check(all_zero(solve(system).iterations), "exact start, jacobi: iterations");
}

// Without any diagonal the matrix is singular. Where b sums to 0 there is a solution, and the start's mean under the
// weights A_ii (equal weights without the preconditioner) decides which.
template <class Real>
void test_singular() {
  std::mt19937 random(5);
  for (const bool jacobi : {true, false}) {
    System<Real> system(make_ring<Real>(40, random), 3, random);
    system.jacobi = jacobi;
    system.has_dissimilarity = false;
    system.diagonal.assign(40, 0);
    system.initial = normal_values<Real>(40 * 3, 1, random);
    for (int64_t c = 0; c < 3; ++c) {
      for (int64_t i = 0; i < 40; ++i) system.rhs[i * 3 + c] = static_cast<Real>((i + c) % 2 == 0 ? 1 : -1);
    }
    const Solution<Real> ours = solve(system);
    const Values diagonal = jacobi ? system.matrix_diagonal() : Values(40, 1.0);
    for (int64_t c = 0; c < 3; ++c) {
      check(ours.residual[c] <= 3 * system.rtol, "singular: residual");
      const Values x = system.column(ours.solution, c);
      const double drift = dot(diagonal, x) - dot(diagonal, system.column(system.initial, c));
      check(std::abs(drift) <= (sizeof(Real) == 4 ? 1e-5 : 1e-13) * norm(diagonal) * norm(x), "singular: mean");
    }
  }
}

template <class Real>
void test_indefinite() {
  std::mt19937 random(6);
  System<Real> system(make_graph<Real>(40, random), 10, random);
  system.initial = normal_values<Real>(40 * 10, 1, random);
  system.diagonal[5] = Real(-0.25);  // isolated
  system.diagonal[12] = Real(-0.5);  // isolated
  const Solution<Real> ours = solve(system);
  check_bits(system);
  expect_close("negative diagonal: solution", ours.solution, Values(system.initial.begin(), system.initial.end()),
               1e-6);
  for (int64_t c = 0; c < 10; ++c) {
    check(ours.curvature[c] == Real(-0.5), "negative diagonal: curvature");
    check(ours.iterations[c] == 0 && ours.residual[c] > 0, "negative diagonal: counts");
  }

  // [1 2; 2 1] has the eigenvalues 3 on (1, 1) and −1 on (1, −1): the first column is solved, the second given up
  // untouched.
  System<Real> pair(Graph<Real>::of_rows({{1}, {0}}, random), 2, random);
  pair.has_dissimilarity = false;
  pair.graph.weight = {-2, -2};
  pair.diagonal = {3, 3};
  pair.rhs = {1, 1, 1, -1};
  const Solution<Real> two = solve(pair);
  expect_close("indefinite: solution", two.solution, {1.0 / 3, 0, 1.0 / 3, 0}, 1e-6);
  expect_close("indefinite: curvature", two.curvature, {3, -1}, 1e-6);
  pair.jacobi = false;
  pair.diagonal = {6, 6};
  expect_close("indefinite: curvature without a preconditioner", solve(pair).curvature, {6, 2}, 1e-6);
  expect_close("indefinite: residual", two.residual, {0, 1}, 1e-6);
}

// Entries of no node are as if they were not there.
template <class Real>
void test_solve_ids_out_of_range() {
  std::mt19937 random(7);
  System<Real> system(make_graph<Real>(40, random), 10, random);
  for (int64_t e = 0; e < system.graph.edges(); ++e) {
    const int64_t mirror = system.graph.reverse[e];
    if (e % 9 != 0 || system.graph.col[e] < 0 || system.graph.col[mirror] < 0) continue;
    system.graph.col[e] = std::numeric_limits<int32_t>::min();
    system.graph.col[mirror] = mirror % 2 == 0 ? -1 : 40 + 1000000;
  }
  check_converged(system);
}

template <class Real>
void test_solve_backward(const Graph<Real>& graph, int64_t columns) {
  std::mt19937 random(static_cast<unsigned>(columns));
  const int64_t nodes = graph.nodes(), edges = graph.edges();
  const auto grad_rhs = normal_values<Real>(nodes * columns, 1, random),
             x = normal_values<Real>(nodes * columns, 1, random);
  Values weight(edges), dissimilarity(edges), diagonal(nodes);
  const auto product = [&](int64_t i, int64_t j) {
    double sum = 0;
    for (int64_t c = 0; c < columns; ++c) sum += static_cast<double>(grad_rhs[i * columns + c]) * x[j * columns + c];
    return sum;
  };
  for (int64_t i = 0; i < nodes; ++i) diagonal[i] = -product(i, i);
  graph.for_each([&](int64_t i, int64_t j, int64_t e) {
    weight[e] = product(i, j) - product(i, i);
    dissimilarity[e] = -product(i, i) - product(i, j);
  });
  struct Out {
    std::vector<Real> weight, dissimilarity, diagonal;
  };
  const auto run = [&](ParallelFor parallel_for, bool with_dissimilarity) {
    Out out{unwritten<Real>(edges), unwritten<Real>(edges), unwritten<Real>(nodes)};
    const LaplacianSolveBackward<Real> problem{
        graph.view(),       grad_rhs.data(),
        x.data(),           columns,
        out.weight.data(),  with_dissimilarity ? out.dissimilarity.data() : nullptr,
        out.diagonal.data()};
    SSM_CALL_ISA(laplacian_solve_backward, problem, parallel_for);
    return out;
  };
  const Out out = run(serial_for, true), again = run(threads_for, true), without = run(serial_for, false);
  const double tolerance = sizeof(Real) == 4 ? 2e-5 : 1e-13;
  expect_close("laplacian_solve_backward weight", out.weight, weight, tolerance * columns);
  expect_close("laplacian_solve_backward dissimilarity", out.dissimilarity, dissimilarity, tolerance * columns);
  expect_close("laplacian_solve_backward diagonal", out.diagonal, diagonal, tolerance * columns);
  check(same_bits(out.weight, again.weight) && same_bits(out.dissimilarity, again.dissimilarity) &&
            same_bits(out.diagonal, again.diagonal),
        "laplacian_solve_backward bits");
  check(same_bits(out.weight, without.weight) && same_bits(out.diagonal, without.diagonal),
        "laplacian_solve_backward without W_dis");
}

// ---- leave_one_edge_out

template <class Real>
struct Edges {
  Graph<Real> graph;
  int64_t classes;
  std::vector<Real> propagated, grad;  // F, and the gradient of the result
  double logit_scale = 4;

  Edges(Graph<Real> of, int64_t classes, double scale, std::mt19937& random)
      : graph(std::move(of)),
        classes(classes),
        propagated(normal_values<Real>(graph.nodes() * classes, scale, random)),
        grad(normal_values<Real>(graph.edges(), 1, random)) {}

  bool is_valid(int64_t e) const {
    return graph.col[e] >= 0 && graph.col[e] < graph.nodes() && graph.reverse[e] >= 0 &&
           graph.reverse[e] < graph.edges();
  }
  double f(int64_t i, int64_t c) const {
    return propagated[i * classes + c];
  }
};

struct Expected {
  Values dissimilarity, grad_weight, grad_propagated;
};

// Equations (19) to (22) step by step with Z [E, C] in full, then their derivatives in the opposite order.
template <class Real>
Expected expected_of(const Edges<Real>& in) {
  const Graph<Real>& graph = in.graph;
  const int64_t nodes = graph.nodes(), edges = graph.edges(), classes = in.classes;
  const double log_classes = std::log(static_cast<double>(classes));
  Values degree(nodes), z(edges * classes), log_z(edges * classes), omega(edges), grad_degree(nodes),
      grad_z(edges * classes), grad_omega(edges);
  Expected out{Values(edges), Values(edges), Values(nodes * classes)};
  for (int64_t i = 0; i < nodes; ++i)
    for (int64_t e = graph.crow[i]; e < graph.crow[i + 1]; ++e) degree[i] += graph.weight[e];
  const auto for_each = [&](const auto& each) {
    graph.for_each([&](int64_t i, int64_t j, int64_t e) {
      if (in.is_valid(e)) each(i, j, e, graph.reverse[e]);
    });
  };

  for_each([&](int64_t i, int64_t j, int64_t e, int64_t) {
    Values a(classes);
    for (int64_t c = 0; c < classes; ++c)
      a[c] = in.logit_scale * (degree[i] * in.f(i, c) - graph.weight[e] * in.f(j, c));
    const double top = *std::max_element(a.begin(), a.end());
    double sum = 0;
    for (const double logit : a) sum += std::exp(logit - top);
    omega[e] = 1;
    for (int64_t c = 0; c < classes; ++c) {
      log_z[e * classes + c] = a[c] - top - std::log(sum);
      z[e * classes + c] = std::exp(log_z[e * classes + c]);
      omega[e] += z[e * classes + c] * log_z[e * classes + c] / log_classes;
    }
  });
  for_each([&](int64_t, int64_t, int64_t e, int64_t mirror) {
    double overlap = 0;
    for (int64_t c = 0; c < classes; ++c) overlap += z[e * classes + c] * z[mirror * classes + c];
    out.dissimilarity[e] = omega[e] * omega[mirror] * (1 - overlap);
    grad_omega[e] += in.grad[e] * omega[mirror] * (1 - overlap);
    grad_omega[mirror] += in.grad[e] * omega[e] * (1 - overlap);
    for (int64_t c = 0; c < classes; ++c) {
      grad_z[e * classes + c] -= in.grad[e] * omega[e] * omega[mirror] * z[mirror * classes + c];
      grad_z[mirror * classes + c] -= in.grad[e] * omega[e] * omega[mirror] * z[e * classes + c];
    }
  });
  for_each([&](int64_t i, int64_t j, int64_t e, int64_t) {
    double mean = 0;
    for (int64_t c = 0; c < classes; ++c) {
      grad_z[e * classes + c] += grad_omega[e] * (log_z[e * classes + c] + 1) / log_classes;
      mean += z[e * classes + c] * grad_z[e * classes + c];
    }
    for (int64_t c = 0; c < classes; ++c) {
      const double grad_logit = in.logit_scale * z[e * classes + c] * (grad_z[e * classes + c] - mean);
      out.grad_propagated[i * classes + c] += degree[i] * grad_logit;
      out.grad_propagated[j * classes + c] -= graph.weight[e] * grad_logit;
      grad_degree[i] += in.f(i, c) * grad_logit;
      out.grad_weight[e] -= in.f(j, c) * grad_logit;
    }
  });
  for (int64_t i = 0; i < nodes; ++i)
    for (int64_t e = graph.crow[i]; e < graph.crow[i + 1]; ++e) out.grad_weight[e] += grad_degree[i];
  return out;
}

double largest(const Values& values) {
  double top = 1;
  for (const double value : values) top = std::max(top, std::abs(value));
  return top;
}

template <class Real>
struct LeftOut {
  std::vector<Real> dissimilarity, grad_weight, grad_propagated;
};

template <class Real>
LeftOut<Real> left_out(const Edges<Real>& in, ParallelFor parallel_for = serial_for) {
  LeftOut<Real> out{unwritten<Real>(in.graph.edges()), unwritten<Real>(in.graph.edges()),
                    unwritten<Real>(in.graph.nodes() * in.classes)};
  const LeaveOneEdgeOut<Real> problem{
      in.graph.view(), in.graph.reverse.data(), in.graph.weight.data(), in.propagated.data(),
      in.classes,      in.logit_scale};
  SSM_CALL_ISA(leave_one_edge_out, problem, out.dissimilarity.data(), parallel_for);
  const LeaveOneEdgeOutBackward<Real> backward{in.grad.data(), out.grad_weight.data(), out.grad_propagated.data()};
  SSM_CALL_ISA(leave_one_edge_out_backward, problem, backward, parallel_for);
  return out;
}

template <class Real>
void check_edges(const Edges<Real>& in, double tolerance) {
  const LeftOut<Real> out = left_out(in), again = left_out(in, threads_for);
  const Expected expected = expected_of(in);
  expect_close("leave_one_edge_out", out.dissimilarity, expected.dissimilarity, tolerance);
  expect_close("leave_one_edge_out_backward weight", out.grad_weight, expected.grad_weight,
               tolerance * largest(expected.grad_weight));
  expect_close("leave_one_edge_out_backward propagated", out.grad_propagated, expected.grad_propagated,
               tolerance * largest(expected.grad_propagated));
  check(same_bits(out.dissimilarity, again.dissimilarity), "leave_one_edge_out bits");
  check(same_bits(out.grad_weight, again.grad_weight) && same_bits(out.grad_propagated, again.grad_propagated),
        "leave_one_edge_out_backward bits");
  for (int64_t e = 0; e < in.graph.edges(); ++e) {
    check(out.dissimilarity[e] >= 0 && out.dissimilarity[e] <= 1, "leave_one_edge_out in [0, 1]");
    if (in.is_valid(e))
      check(out.dissimilarity[e] == out.dissimilarity[in.graph.reverse[e]], "leave_one_edge_out is symmetric");
  }
}

template <class Real>
void test_edges(int64_t nodes, int64_t classes) {
  std::mt19937 random(static_cast<unsigned>(1000 * nodes + classes));
  const double tolerance = sizeof(Real) == 4 ? 1e-4 : 1e-11;
  // Edges that weigh little against their nodes, somewhat, and most: each has its own way to the exponentials.
  for (const double scale : {0.05, 0.5, 4.0})
    check_edges(Edges<Real>(make_graph<Real>(nodes, random), classes, scale, random), tolerance);

  // A large constant per node, which no softmax sees.
  Edges<Real> shifted(make_graph<Real>(nodes, random), classes, 0.3, random);
  for (int64_t i = 0; i < nodes; ++i)
    for (int64_t c = 0; c < classes; ++c)
      shifted.propagated[i * classes + c] += static_cast<Real>(i % 3 == 0 ? -40 : 50);
  check_edges(shifted, sizeof(Real) == 4 ? 5e-4 : tolerance);
}

// λ and F, of which only the product counts: whatever a logit's size is judged by has to know λ once.
template <class Real>
void test_logit_scales() {
  std::mt19937 random(14);
  for (const int64_t classes : {3, 6, 17, 40})
    for (const double scale : {0.05, 0.5, 4.0})
      for (const double logit_scale : {1e-3, 0.02, 0.5, 100.0}) {
        Edges<Real> in(make_graph<Real>(40, random), classes, scale * 4 / logit_scale, random);
        in.logit_scale = logit_scale;
        check_edges(in, sizeof(Real) == 4 ? 1e-4 : 1e-11);
      }
}

// An entry that leads nowhere, or whose reverse does, gets 0; its weight still counts to the degree.
template <class Real>
void test_edge_ids_out_of_range() {
  std::mt19937 random(8);
  for (const int64_t classes : {3, 17}) {
    Edges<Real> in(make_graph<Real>(40, random), classes, 0.5, random);
    Graph<Real>& graph = in.graph;
    for (const int64_t i : {3, 11, 29}) {  // the last entry of a row, so that the columns still ascend
      const int64_t e = graph.crow[i + 1] - 1, mirror = graph.reverse[e];
      graph.col[e] = i == 3 ? 40 : std::numeric_limits<int32_t>::max();
      graph.reverse[mirror] = i == 3 ? -1 : i == 11 ? graph.edges() : std::numeric_limits<int64_t>::min();
    }
    check_edges(in, sizeof(Real) == 4 ? 1e-4 : 1e-11);
  }
}

// Logits of any size: where the softmaxes are 0 and 1 the value is exact and the gradient finite, wherever the logits
// are representable.
template <class Real>
void test_huge_edges() {
  std::mt19937 random(10);
  for (const int64_t classes : {2, 3, 17, 40}) {
    Edges<Real> in(make_graph<Real>(40, random), classes, 1, random);
    for (const double size : {1e10, sizeof(Real) == 4 ? 1e30 : 1e150, sizeof(Real) == 4 ? 1e35 : 1e300}) {
      Edges<Real> huge = in;
      for (Real& f : huge.propagated) f = static_cast<Real>(f * size);
      check_edges(huge, sizeof(Real) == 4 ? 1e-4 : 1e-11);
    }
  }
}

// Edges that weigh next to nothing against their nodes: a node's own logit is as large as its largest one's rounding,
// and their softmaxes are as good as the node's. Two classes may be closer than rounding: only what holds for any.
template <class Real>
void test_huge_logits_of_light_edges() {
  std::mt19937 random(12);
  for (const int64_t classes : {2, 3, 10, 17, 40})
    for (const double size : {1e6, 1e12, 1e20, sizeof(Real) == 4 ? 1e34 : 1e290})
      for (const double light : {1e-3, 1e-8, 1e-13, 1e-25}) {
        Edges<Real> in(make_graph<Real>(40, random), classes, 1, random);
        in.logit_scale = 3.3;  // no power of two, which would round nothing
        in.graph.for_each([&](int64_t i, int64_t j, int64_t e) {
          if ((i + j) % 3 == 0) in.graph.weight[e] *= static_cast<Real>(light);
        });
        for (Real& f : in.propagated) f = static_cast<Real>(f * size);
        const LeftOut<Real> out = left_out(in);
        for (const Real value : out.dissimilarity) check(value >= 0 && value <= 1, "light edges: in [0, 1]");
        for (const Real grad : out.grad_weight) check(std::isfinite(grad), "light edges: gradient of weight");
        for (const Real grad : out.grad_propagated) check(std::isfinite(grad), "light edges: gradient of F");
      }
}

// NaN in F or in a weight: NaN on the edges of its row, everything else as if it were not there.
template <class Real>
void test_nan_edges() {
  std::mt19937 random(11);
  for (const int64_t classes : {3, 17, 40})
    for (const bool in_weight : {true, false}) {
      Edges<Real> clean(make_graph<Real>(40, random), classes, 0.5, random), poisoned = clean;
      const Graph<Real>& graph = clean.graph;
      const int64_t row = 11, entry = graph.crow[row];
      (in_weight ? poisoned.graph.weight[entry] : poisoned.propagated[row * classes + 1]) =
          std::numeric_limits<Real>::quiet_NaN();
      const LeftOut<Real> expected = left_out(clean), ours = left_out(poisoned);
      std::vector<bool> touched(graph.nodes());
      graph.for_each([&](int64_t i, int64_t j, int64_t e) {
        const bool depends = i == row || j == row;
        if (depends) touched[i] = touched[j] = true;
        check(depends == std::isnan(ours.dissimilarity[e]), "NaN row: its edges");
        check(depends || ours.dissimilarity[e] == expected.dissimilarity[e], "NaN row: other edges");
      });
      for (int64_t i = 0; i < graph.nodes(); ++i)
        for (int64_t c = 0; c < classes; ++c) {
          const int64_t at = i * classes + c;
          check(touched[i] ? std::isnan(ours.grad_propagated[at])
                           : ours.grad_propagated[at] == expected.grad_propagated[at],
                "NaN row: gradient");
        }
    }
}

template <class Real>
void test_all() {
  for (const int64_t nodes : {1, 3, 40, 129})
    for (const int64_t columns : {1, 2, 3, 10, 13, 17, 33}) {
      test_solve<Real>(nodes, columns);
      std::mt19937 random(static_cast<unsigned>(nodes));
      Graph<Real> graph = make_graph<Real>(nodes, random);
      test_solve_backward(graph, columns);
      if (nodes == 40) {
        graph.col[7] = -3;
        graph.col[19] = 40;
        test_solve_backward(graph, columns);
      }
      if (columns > 1) test_edges<Real>(nodes, columns);
    }
  test_solve_scales<Real>();
  test_weak_bridge<Real>();
  test_drift<Real>();
  test_solve_nan<Real>();
  test_max_iter<Real>();
  test_no_iterations<Real>();
  test_singular<Real>();
  test_indefinite<Real>();
  test_solve_ids_out_of_range<Real>();
  test_edge_ids_out_of_range<Real>();
  test_logit_scales<Real>();
  test_huge_edges<Real>();
  test_huge_logits_of_light_edges<Real>();
  test_nan_edges<Real>();

  std::mt19937 random(9);
  System<Real> ring(make_ring<Real>(4099, random), 3, random);  // large enough for its nodes to be renumbered
  ring.initial = normal_values<Real>(4099 * 3, 1, random);
  check_converged(ring);
  check_bits(ring);
}

}  // namespace

int main() {
  context = isa_name(current_isa());
  test_all<double>();
  test_all<float>();
  return report();
}
