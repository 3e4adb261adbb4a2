// SPDX-License-Identifier: BSD-3-Clause
// The CUDA kernels of the graph family against the equations in double precision. Inputs, outputs and workspace start
// as NaN, so that an unwritten element shows; see cuda_harness.h.
#include <algorithm>
#include <limits>
#include <random>

#include "../graph/laplacian_solve.h"
#include "../graph/leave_one_edge_out.h"
#include "cuda_harness.h"
#include "rounding.h"

namespace {

using namespace ssmkernels;
using namespace ssmkernels::test;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Graph {
  std::vector<int64_t> crow, reverse;
  std::vector<int32_t> col;
  Values weight, dissimilarity;

  int64_t nodes() const {
    return static_cast<int64_t>(crow.size()) - 1;
  }
  size_t edges() const {
    return col.size();
  }
  template <class F>
  void for_each(const F& each) const {  // each(i, j, e)
    for (int64_t i = 0; i < nodes(); ++i)
      for (int64_t e = crow[i]; e < crow[i + 1]; ++e) each(i, int64_t{col[e]}, static_cast<size_t>(e));
  }
};

// About `degree` neighbours per node; every seventh node alone, half of those and every fifth of the others with a
// self-loop, node 2 joined to almost all. Values as Real stores them.
template <class Real>
Graph make_graph(int64_t nodes, double degree, std::mt19937& random, bool self_loops = true) {
  std::uniform_real_distribution<double> uniform;
  std::vector<Values> weight(nodes, Values(nodes, 0.0)), dissimilarity = weight;
  for (int64_t i = 0; i < nodes; ++i)
    for (int64_t j = 0; j <= i; ++j) {
      const bool alone = i % 7 == 5 || j % 7 == 5;
      if (alone && i != j) continue;
      const bool joined = i == j ? self_loops && (alone ? i % 2 == 1 : i % 5 == 1)
                                 : uniform(random) < (j == 2 ? 0.9 : degree / static_cast<double>(nodes));
      if (!joined) continue;
      weight[i][j] = weight[j][i] = static_cast<Real>(0.1 + uniform(random));
      dissimilarity[i][j] = dissimilarity[j][i] = static_cast<Real>(uniform(random) < 0.3 ? 0.5 * uniform(random) : 0);
    }
  Graph graph;
  graph.crow.push_back(0);
  for (int64_t i = 0; i < nodes; ++i) {
    for (int64_t j = 0; j < nodes; ++j) {
      if (weight[i][j] == 0) continue;
      graph.col.push_back(static_cast<int32_t>(j));
      graph.weight.push_back(weight[i][j]);
      graph.dissimilarity.push_back(dissimilarity[i][j]);
    }
    graph.crow.push_back(static_cast<int64_t>(graph.col.size()));
  }
  graph.for_each([&](int64_t i, int64_t j, size_t) {
    const auto row = graph.col.begin() + graph.crow[j];
    graph.reverse.push_back(std::lower_bound(row, graph.col.begin() + graph.crow[j + 1], i) - graph.col.begin());
  });
  return graph;
}

// A graph on the device.
struct DeviceGraph {
  Guarded<int64_t> crow, reverse;
  Guarded<int32_t> col;

  explicit DeviceGraph(const Graph& graph) : crow(graph.crow), reverse(graph.reverse), col(graph.col) {}
  Csr view() const {
    return {crow.data(), col.data(), static_cast<int64_t>(crow.size()) - 1, static_cast<int64_t>(col.size())};
  }
};

// ---- laplacian_solve

struct System {
  Graph graph;
  bool has_dissimilarity = true, has_initial = false, jacobi = true;
  Values diagonal, rhs, initial;
  int64_t columns = 1;
  double rtol = 1e-5;
  int64_t max_iter = 1000;

  // A x, for [N, columns].
  Values times(const Values& x) const {
    Values out(x.size(), 0.0);
    const auto add = [&](int64_t i, int64_t j, double factor) {
      for (int64_t c = 0; c < columns; ++c) out[i * columns + c] += factor * x[j * columns + c];
    };
    for (int64_t i = 0; i < graph.nodes(); ++i) add(i, i, diagonal[i]);
    graph.for_each([&](int64_t i, int64_t j, size_t e) {
      const double d = has_dissimilarity ? graph.dissimilarity[e] : 0;
      add(i, i, graph.weight[e] + d);
      add(i, j, d - graph.weight[e]);
    });
    return out;
  }
  Values matrix_diagonal() const {
    Values out = diagonal;
    graph.for_each([&](int64_t i, int64_t j, size_t e) {
      const double d = has_dissimilarity ? graph.dissimilarity[e] : 0;
      out[i] += i == j ? 2 * d : graph.weight[e] + d;
    });
    return out;
  }
  Values start() const {
    return has_initial ? initial : Values(rhs.size(), 0.0);
  }
  // Per column, of a solution: what is reported of it, ‖D⁻¹(b − A x)‖/‖D⁻¹b‖ or the largest imbalance of a row, and how
  // much rounding its numbers to `epsilon` changes that.
  struct Left {
    double told = 0, rounding = 0;
  };
  std::vector<Left> left(const Values& x, double epsilon) const {
    const Values product = times(x), whole = matrix_diagonal();
    Values terms(x.size(), 0.0), sums(x.size(), 0.0);
    for (size_t at = 0; at < x.size(); ++at) {
      terms[at] = std::abs(rhs[at]) + std::abs(diagonal[at / columns] * x[at]);
      sums[at] = 2 * std::abs(whole[at / columns] * x[at]);
    }
    graph.for_each([&](int64_t i, int64_t j, size_t e) {
      const double d = has_dissimilarity ? graph.dissimilarity[e] : 0, w = graph.weight[e];
      for (int64_t c = 0; c < columns; ++c) {
        const double own = x[i * columns + c], other = x[j * columns + c];
        terms[i * columns + c] +=
            i == j ? 2 * std::abs(d * own) : std::abs((w - d) * (own - other)) + 2 * std::abs(d * own);
        sums[i * columns + c] += (std::abs(w) + std::abs(d)) * (std::abs(own) + std::abs(other));
      }
    });
    std::vector<Left> out(columns);
    for (int64_t c = 0; c < columns; ++c) {
      double r = 0, b = 0, rounding = 0, imbalance = 0, size = 0, largest_x = 0;
      for (size_t at = c; at < x.size(); at += columns) largest_x = std::max(largest_x, std::abs(x[at]));
      for (size_t at = c; at < rhs.size(); at += columns) {
        const double a = std::abs(whole[at / columns]), own = rhs[at] - product[at];
        size = std::max(size, std::abs(rhs[at]));
        if (a == 0) imbalance = std::max(imbalance, rhs[at] != 0 ? 1.0 : 0.0);
        if (a == 0) continue;
        r += std::pow(own / a, 2);
        b += std::pow(rhs[at] / a, 2);
        rounding += std::pow(epsilon * sums[at] / a, 2);
        if (std::abs(own) > 2 * epsilon * sums[at] + 1e-12 * a * largest_x)
          imbalance = std::max(imbalance, std::abs(own) / terms[at]);
      }
      if (size == 0) continue;
      out[c] = {b > 0 ? std::sqrt(r / b) : 0, b > 0 ? std::sqrt(rounding / b) : 0};
      if (imbalance > 0.1) out[c].told = std::max(out[c].told, imbalance);
    }
    return out;
  }
};

struct Expected {
  Values solution, curvature;
  std::vector<int64_t> iterations;
};

// Textbook conjugate gradients on S A S, column by column.
Expected solve_in_double(const System& system) {
  const int64_t nodes = system.graph.nodes(), columns = system.columns;
  const Values diagonal = system.matrix_diagonal();
  Expected out{system.start(), Values(columns, kInfinity), std::vector<int64_t>(columns, 0)};
  const double least = nodes > 0 ? *std::min_element(diagonal.begin(), diagonal.end()) : 0;
  System one = system;
  one.columns = 1;
  for (int64_t c = 0; c < columns; ++c) {
    Values b(nodes), x(nodes), scale(nodes, 1.0);
    double norm = 0, size = 0;  // of D⁻¹ b, and of b
    for (int64_t i = 0; i < nodes; ++i) {
      b[i] = system.rhs[i * columns + c];
      norm += diagonal[i] > 0 ? std::pow(b[i] / diagonal[i], 2) : 0;
      size += b[i] * b[i];
      scale[i] = diagonal[i] <= 0 ? 0 : system.jacobi ? 1 / std::sqrt(diagonal[i]) : 1;
      x[i] = scale[i] > 0 ? out.solution[i * columns + c] / scale[i] : 0;
    }
    const auto product = [&](const Values& v) {
      Values scaled(nodes);
      for (int64_t i = 0; i < nodes; ++i) scaled[i] = scale[i] * v[i];
      scaled = one.times(scaled);
      for (int64_t i = 0; i < nodes; ++i) scaled[i] *= scale[i];
      return scaled;
    };
    if (least < 0) out.curvature[c] = least;
    if (size == 0)
      for (int64_t i = 0; i < nodes; ++i) out.solution[i * columns + c] = 0;
    if (least < 0 || size == 0) continue;
    const auto dot = [&](const Values& u, const Values& v) {
      double sum = 0;
      for (int64_t i = 0; i < nodes; ++i) sum += u[i] * v[i];
      return sum;
    };
    Values r = product(x);
    for (int64_t i = 0; i < nodes; ++i) r[i] = scale[i] * b[i] - r[i];
    const auto converged = [&] {
      double sum = 0;
      for (int64_t i = 0; i < nodes; ++i) sum += scale[i] > 0 ? std::pow(r[i] / scale[i] / diagonal[i], 2) : 0;
      return sum <= std::pow(system.rtol, 2) * norm;
    };
    Values p = r;
    for (int64_t iteration = 0; iteration < system.max_iter && !converged(); ++iteration) {
      const Values q = product(p);
      const double along = dot(p, q), squares = dot(r, r);
      out.curvature[c] = std::min(out.curvature[c], along / dot(p, p));
      if (!(along > 0)) break;
      for (int64_t i = 0; i < nodes; ++i) {
        x[i] += squares / along * p[i];
        r[i] -= squares / along * q[i];
      }
      const double beta = dot(r, r) / squares;
      for (int64_t i = 0; i < nodes; ++i) p[i] = r[i] + beta * p[i];
      ++out.iterations[c];
    }
    for (int64_t i = 0; i < nodes; ++i)
      if (scale[i] > 0) out.solution[i * columns + c] = scale[i] * x[i];
  }
  return out;
}

template <class Real>
struct Solved {
  Guarded<Real> solution, residual, curvature;
  Guarded<int64_t> iterations;

  explicit Solved(const System& system)
      : solution(system.rhs.size()), residual(system.columns), curvature(system.columns), iterations(system.columns) {
    const DeviceGraph graph(system.graph);
    const Guarded<Real> weight(system.graph.weight), dissimilarity(system.graph.dissimilarity),
        diagonal(system.diagonal);
    const Guarded<Real> rhs(system.rhs), initial(system.initial);
    const LaplacianSolve<Real> problem{
        graph.view(),    weight.data(), system.has_dissimilarity ? dissimilarity.data() : nullptr,
        diagonal.data(), rhs.data(),    system.has_initial ? initial.data() : nullptr,
        system.columns,  system.rtol,   system.max_iter,
        system.jacobi};
    const Workspace workspace(cuda::laplacian_solve_workspace(problem));
    const char* error = cuda::laplacian_solve(
        problem, {solution.data(), iterations.data(), residual.data(), curvature.data()}, workspace.data(), nullptr);
    succeeds(error, "laplacian_solve");
  }
  bool same_bits(const Solved& other) const {
    return solution.same_bits(other.solution) && residual.same_bits(other.residual) &&
           curvature.same_bits(other.curvature) && iterations.same_bits(other.iterations);
  }
  Values values() const {
    return Values(solution.data(), solution.data() + solution.size());
  }
};

template <class Real>
System make_system(Graph graph, int64_t columns, std::mt19937& random) {
  std::normal_distribution<double> normal;
  System system;
  system.graph = std::move(graph);
  system.columns = columns;
  system.rtol = sizeof(Real) == 4 ? 1e-4 : 1e-9;
  const int64_t nodes = system.graph.nodes();
  for (int64_t i = 0; i < nodes; ++i) system.diagonal.push_back(static_cast<Real>(i % 3 == 0 ? 0.3 : 0.01));
  for (int64_t i = 0; i < nodes; ++i)
    for (int64_t c = 0; c < columns; ++c) {
      const double size = std::pow(10.0, c % 5 - 2.0);  // columns of very different sizes
      system.rhs.push_back(static_cast<Real>(size * normal(random)));
      system.initial.push_back(static_cast<Real>(size * normal(random)));
    }
  return system;
}

// The solution within what the tolerance allows, the residual that is reported, iterations and curvature near those in
// double precision.
template <class Real>
void test_solve(const System& system, const char* what) {
  context = std::string(what) + " N " + std::to_string(system.graph.nodes()) + " C " + std::to_string(system.columns) +
            " bytes " + std::to_string(sizeof(Real));
  const Expected expected = solve_in_double(system);
  const Solved<Real> solved(system);
  const auto left = system.left(solved.values(), std::numeric_limits<Real>::epsilon());
  for (int64_t c = 0; c < system.columns; ++c) {
    check(std::abs(solved.residual[c] - left[c].told) <= left[c].rounding + 1e-3 * left[c].told,
          "residual is that of the solution", solved.residual[c] - left[c].told);
    // Rounding changes the course of conjugate gradients when they are many.
    const double steps = static_cast<double>(expected.iterations[c]), loose = steps > 20 ? 0.2 : 0;
    const double more =
        static_cast<double>(solved.iterations[c]) - steps;  // where rows are not balanced yet, or the solution is 0
    check(more >= -(sizeof(Real) == 4 ? 2 : 1) - loose * steps && more <= 40 + loose * steps, "iterations", more);
    const bool same_infinity = std::isinf(expected.curvature[c]) == std::isinf(solved.curvature[c]);
    check(same_infinity, "whether there is a curvature", solved.curvature[c]);
    if (same_infinity && std::isfinite(expected.curvature[c]) && more <= 1)
      check(std::abs(solved.curvature[c] - expected.curvature[c]) <=
                ((sizeof(Real) == 4 ? 0.02 : 1e-3) + loose) * std::abs(expected.curvature[c]),
            "curvature", solved.curvature[c] - expected.curvature[c]);
    double error = 0, size = 0;
    for (size_t at = c; at < system.rhs.size(); at += system.columns) {
      error += std::pow(solved.solution[at] - expected.solution[at], 2);
      size += std::pow(expected.solution[at], 2);
    }
    check(std::sqrt(error) <= 100 * system.rtol * std::sqrt(size), "solution", std::sqrt(error / size));
  }
  set_seed(1);  // another order of warps and blocks
  const Solved<Real> again(system);
  set_seed(0);
  check(again.same_bits(solved), "bits");
}

template <class Real>
void test_solve_backward(const Graph& graph, int64_t columns, std::mt19937& random) {
  context = "solve backward N " + std::to_string(graph.nodes()) + " C " + std::to_string(columns);
  std::normal_distribution<double> normal;
  Values x, g;
  for (int64_t k = 0; k < graph.nodes() * columns; ++k) {
    x.push_back(static_cast<Real>(normal(random)));
    g.push_back(static_cast<Real>(normal(random)));
  }
  // Products of C terms in any order, and one more sum of two of them.
  const double rounding = Rounding<Real>::gamma(static_cast<double>(columns) + 2);
  const auto dot = [&](int64_t i, int64_t j, double& size) {
    double sum = 0;
    for (int64_t c = 0; c < columns; ++c) {
      const double term = g[i * columns + c] * x[j * columns + c];
      sum += term;
      size += std::abs(term);
    }
    return sum;
  };
  Bounded weight(graph.edges()), dissimilarity(graph.edges()), diagonal(graph.nodes());
  for (int64_t i = 0; i < graph.nodes(); ++i) {
    double size = 0;
    const double own = dot(i, i, size);
    diagonal.set(i, -own, rounding * size);
  }
  graph.for_each([&](int64_t i, int64_t j, size_t e) {
    double size = 0;
    const double own = dot(i, i, size), other = dot(i, j, size);
    weight.set(e, other - own, rounding * size);
    dissimilarity.set(e, -other - own, rounding * size);
  });
  const DeviceGraph device(graph);
  const Guarded<Real> grad_rhs(g), solution(x);
  for (const bool both : {true, false}) {
    const Guarded<Real> grad_weight(graph.edges()), grad_dissimilarity(graph.edges()), grad_diagonal(graph.nodes());
    const char* error = cuda::laplacian_solve_backward(
        LaplacianSolveBackward<Real>{device.view(), grad_rhs.data(), solution.data(), columns, grad_weight.data(),
                                     both ? grad_dissimilarity.data() : nullptr, grad_diagonal.data()},
        nullptr);
    succeeds(error, "laplacian_solve_backward");
    compare_within(grad_weight, weight, "grad_weight");
    if (both) compare_within(grad_dissimilarity, dissimilarity, "grad_dissimilarity");
    compare_within(grad_diagonal, diagonal, "grad_diagonal");
  }
}

// Powers of two pass through, of the matrix and of the right side.
template <class Real>
void test_solve_scales(std::mt19937& random) {
  context = "scales";
  const int most = sizeof(Real) == 4 ? 100 : 1000;
  const System system = make_system<Real>(make_graph<Real>(40, 5, random), 3, random);
  const Solved<Real> expected(system);
  for (const int of_matrix : {-most, 0, most})
    for (const int of_rhs : {-most, 0, most}) {
      const int of_solution = of_rhs - of_matrix;
      if (of_solution > most || of_solution < -most) continue;
      System scaled = system;
      for (auto* values : {&scaled.graph.weight, &scaled.graph.dissimilarity, &scaled.diagonal})
        for (double& value : *values) value = std::ldexp(value, of_matrix);
      for (double& b : scaled.rhs) b = std::ldexp(b, of_rhs);
      const Solved<Real> ours(scaled);
      bool same = ours.residual.same_bits(expected.residual) && ours.iterations.same_bits(expected.iterations);
      for (size_t at = 0; at < system.rhs.size(); ++at)
        same &= ours.solution[at] == std::ldexp(expected.solution[at], of_solution);
      check(same, "2^k A, 2^l b", of_solution);
    }
  for (const double size : {sizeof(Real) == 4 ? 1e-41 : 1e-315, sizeof(Real) == 4 ? 1e36 : 1e306}) {
    System extreme = system;
    for (double& b : extreme.rhs) b *= size;
    const Solved<Real> ours(extreme);
    for (int64_t c = 0; c < 3; ++c)
      check(ours.residual[c] <= system.rtol && ours.iterations[c] > 0, "extreme b", ours.residual[c]);
  }
}

// NaN or infinity: in a column of the right side or of the start it is that column's; in the matrix it is everybody's.
template <class Real>
void test_solve_nan(std::mt19937& random) {
  context = "NaN";
  System system = make_system<Real>(make_graph<Real>(40, 5, random), 6, random);
  system.has_initial = true;
  const Solved<Real> clean(system);
  for (const double bad : {std::nan(""), kInfinity}) {
    System poisoned = system;
    poisoned.rhs[12 * 6 + 3] = bad;
    poisoned.initial[8 * 6 + 5] = bad;
    const Solved<Real> ours(poisoned);
    bool good = true;
    for (size_t at = 0; at < system.rhs.size(); ++at)
      good &= at % 6 == 3 || at % 6 == 5 ? std::isnan(ours.solution[at]) : ours.solution[at] == clean.solution[at];
    for (size_t c = 0; c < 6; ++c)
      good &= c == 3 || c == 5 ? std::isnan(ours.residual[c]) : ours.residual[c] == clean.residual[c];
    check(good, "in columns");
    for (const int which : {0, 1, 2}) {
      System matrix = system;
      (which == 0 ? matrix.graph.weight : which == 1 ? matrix.graph.dissimilarity : matrix.diagonal)[3] = bad;
      const Solved<Real> all(matrix);
      good = true;
      for (size_t at = 0; at < system.rhs.size(); ++at) good &= std::isnan(all.solution[at]);
      for (size_t c = 0; c < 6; ++c) good &= std::isnan(all.residual[c]);
      check(good, "in the matrix", which);
    }
  }
}

// Label 1 beside an edge of 1e-9 that leads to a path without labels: what reaches that path must pass it.
template <class Real>
void test_weak_bridge() {
  context = "weak bridge";
  constexpr int kHalf = 20;
  System system;
  system.has_dissimilarity = false;
  system.columns = 1;
  system.rtol = 1e-4;
  system.graph.crow = {0};
  for (int i = 0; i < 2 * kHalf; ++i) {
    for (const int j : {i - 1, i + 1}) {
      if (j < 0 || j == 2 * kHalf) continue;
      system.graph.col.push_back(j);
      system.graph.weight.push_back(static_cast<Real>(i / kHalf == j / kHalf ? 1 + (i + j) % 3 : 1e-9));
    }
    system.graph.crow.push_back(static_cast<int64_t>(system.graph.col.size()));
  }
  system.graph.dissimilarity = Values(system.graph.edges(), 0.0);
  system.diagonal = system.rhs = Values(2 * kHalf, 0.0);
  system.diagonal[0] = system.diagonal[kHalf - 1] = static_cast<Real>(0.01);
  system.rhs[0] = -0.5;
  system.rhs[kHalf - 1] = 0.5;
  const Solved<Real> ours(system);
  check(ours.residual[0] <= system.rtol, "residual", ours.residual[0]);
  const double bridge = ours.solution[kHalf - 1];
  bool good = bridge > 0;
  for (int i = kHalf; i < 2 * kHalf; ++i) good &= std::abs(ours.solution[i] - bridge) <= 0.2 * bridge;
  check(good, "the other side", ours.solution[kHalf]);
}

template <class Real>
void test_solves(std::mt19937& random) {
  int turn = 0;
  for (const int64_t nodes : {1, 3, 17, 123})
    for (const int64_t columns : {1, 2, 3, 10, 17, 33, 100, 130}) {
      set_multiprocessors(turn % 4 + 1);
      System system = make_system<Real>(make_graph<Real>(nodes, turn % 3 == 0 ? 4 : 12, random), columns, random);
      system.has_dissimilarity = turn % 3 != 1;
      system.has_initial = turn % 2 == 1;
      system.jacobi = turn % 5 != 2;
      test_solve<Real>(system, "solve");
      test_solve_backward<Real>(system.graph, columns, random);
      ++turn;
    }
  for (const int64_t columns : {1, 10, 300}) {  // a team of five blocks; one of two blocks with several tiles
    set_multiprocessors(columns == 300 ? 2 : 5);
    test_solve<Real>(make_system<Real>(make_graph<Real>(250, 6, random), columns, random), "several blocks");
  }
  for (const int most :
       {160, 32}) {  // a multiprocessor that has no registers left for 640 threads, as under a sanitizer
    set_resident_threads(most);
    test_solve<Real>(make_system<Real>(make_graph<Real>(123, 6, random), 10, random), "smaller blocks");
  }
  set_resident_threads(2048);
  set_cache_bytes(1 << 10);  // tiles of the fewest columns
  test_solve<Real>(make_system<Real>(make_graph<Real>(123, 6, random), 70, random), "narrow tiles");
  set_cache_bytes(50 << 20);

  test_solve_scales<Real>(random);
  test_solve_nan<Real>(random);
  test_weak_bridge<Real>();

  System system = make_system<Real>(make_graph<Real>(123, 5, random), 6, random);
  for (int64_t i = 0; i < 123; ++i) {
    system.rhs[i * 6 + 1] = 0;                                 // b = 0: the solution is 0, whatever the start
    system.rhs[i * 6 + 3] = i % 7 == 5 ? 1 : 0;                // of isolated nodes only: done after one iteration
    system.initial[i * 6 + 4] = static_cast<Real>(i % 2 + 1);  // the start is the solution
  }
  const Values product = system.times(system.initial);
  for (int64_t i = 0; i < 123; ++i) system.rhs[i * 6 + 4] = static_cast<Real>(product[i * 6 + 4]);
  system.has_initial = true;
  test_solve<Real>(system, "frozen columns");
  {
    const Solved<Real> solved(system);
    check(solved.iterations[1] == 0 && solved.residual[1] == 0, "b = 0 takes no iterations",
          static_cast<double>(solved.iterations[1]));
    check(solved.iterations[4] == 0, "nor does an exact start", static_cast<double>(solved.iterations[4]));
    bool kept = true;
    for (int64_t i = 0; i < 123; ++i) kept &= solved.solution[i * 6 + 1] == 0;
    check(kept, "b = 0 gives 0");
    check(solved.iterations[0] > 5, "the others go on", static_cast<double>(solved.iterations[0]));
    // A column that ended keeps its bits while the others go on.
    system.has_initial = false;
    const Solved<Real> whole(system);
    System alone = system;
    alone.max_iter = whole.iterations[3];
    const Solved<Real> stopped(alone);
    bool same = true;
    for (int64_t i = 0; i < 123; ++i) same &= stopped.solution[i * 6 + 3] == whole.solution[i * 6 + 3];
    check(whole.iterations[3] < whole.iterations[0] && same, "a column that ended does not change");
    test_solve<Real>(alone, "max_iter");
    for (const int64_t c : {0, 2, 5})
      check(stopped.iterations[c] == alone.max_iter, "max_iter reached", static_cast<double>(stopped.iterations[c]));
  }
  for (double& b : system.rhs) b *= 1e-30;  // squares of it are below the smallest float
  test_solve<Real>(system, "tiny right side");

  // No diagonal: every component is singular; the right side sums to 0 on each, and isolated nodes keep their start.
  system = make_system<Real>(make_graph<Real>(124, 5, random), 3, random);
  for (double& u : system.diagonal) u = 0;
  system.has_dissimilarity = false;
  system.has_initial = true;
  Values potential = system.initial;
  const Values range = system.times(potential);
  for (size_t at = 0; at < range.size(); ++at) system.rhs[at] = static_cast<Real>(range[at]);
  std::normal_distribution<double> normal;
  for (double& x : system.initial) x = static_cast<Real>(normal(random));
  context = "singular";
  {
    const Solved<Real> solved(system);
    for (int64_t c = 0; c < 3; ++c)
      check(solved.residual[c] <= 10 * system.rtol, "singular components", solved.residual[c]);
    bool kept = true;
    for (int64_t i = 5; i < 124; i += 7)
      for (int64_t c = 0; c < 3; ++c)
        kept &= solved.solution[i * 3 + c] == static_cast<Real>(system.initial[i * 3 + c]);
    check(kept, "rows without a diagonal keep their start");
    system.rhs[5 * 3] = 2;  // which no solution gives: the residual tells, and the rest is solved
    const Solved<Real> rest(system);
    check(rest.residual[0] == 1, "residual of rows without a diagonal", rest.residual[0]);
  }

  // Indefinite: a negative weight of an edge pulls, as in label propagation with dissimilar edges subtracted.
  system = make_system<Real>(make_graph<Real>(123, 8, random, false), 3, random);
  for (double& w : system.graph.dissimilarity) w *= -0.6;
  for (int64_t i = 0; i < 123; ++i) system.diagonal[i] += 0.2;
  system.max_iter = 60;
  context = "indefinite";
  {
    const Expected expected = solve_in_double(system);
    const Solved<Real> solved(system);
    for (int64_t c = 0; c < 3; ++c) {
      check((expected.curvature[c] <= 0) == (solved.curvature[c] <= 0), "indefinite: sign of the curvature",
            solved.curvature[c]);
      check(std::isfinite(solved.residual[c]), "indefinite: residual", solved.residual[c]);
    }
  }
  for (double& w : system.graph.dissimilarity) w *= 20;
  system.has_initial = true;
  test_solve<Real>(system, "negative diagonal");
  {
    const Solved<Real> solved(system);
    bool kept = true;
    for (size_t at = 0; at < system.rhs.size(); ++at)
      kept &= solved.solution[at] == static_cast<Real>(system.initial[at]);
    check(kept && solved.iterations[0] == 0 && solved.curvature[0] < 0, "negative diagonal: nothing is iterated",
          solved.curvature[0]);
  }

  // A cycle with the dissimilarity of all edges and no weight: a positive diagonal, but a curvature of 0 along (1, −1,
  // 1, −1).
  system = System{};
  system.graph.crow = {0, 2, 4, 6, 8};
  system.graph.col = {1, 3, 0, 2, 1, 3, 0, 2};
  system.graph.weight = Values(8, 0.0);
  system.graph.dissimilarity = Values(8, 1.0);
  system.diagonal = Values(4, 0.0);
  system.rhs = {1, -1, 1, -1};
  test_solve<Real>(system, "curvature 0");

  for (const int64_t nodes : {0, 3})
    for (const int64_t columns : {0, 4}) {
      Graph none;
      none.crow.assign(nodes + 1, 0);
      test_solve<Real>(make_system<Real>(none, columns, random), "no edges");
      test_solve_backward<Real>(none, columns, random);
    }

  // Columns and row bounds that no graph has are left out.
  context = "wild";
  system = make_system<Real>(make_graph<Real>(17, 5, random), 3, random);
  Graph& wild = system.graph;
  wild.col[1] = 17;
  wild.col[4] = -1;
  wild.col[7] = 2000000000;
  System without = system;
  for (const int e : {1, 4, 7}) {
    without.graph.weight[e] = without.graph.dissimilarity[e] = 0;
    without.graph.col[e] = 0;
  }
  const Solved<Real> odd(system), plain(without);
  check(odd.solution.same_bits(plain.solution), "a column outside counts as 0");
  wild.crow[3] = 1000000;
  wild.crow[5] = -7;
  Solved<Real>{system};
}

// ---- leave_one_edge_out

struct Dissimilarity {
  Bounded value, grad_weight, grad_propagated;
};

// z = softmax of the logits of an entry, its confidence ω = 1 − H / log C, and what rounding may do to them: where z
// becomes z (1 + ρ), H moves by Σ z |log z + H| ρ + Σ z ρ² at most.
template <class Real>
struct Side {
  using R = Rounding<Real>;
  Values z, relative, surprise;  // surprise: log z + H
  double entropy = 0, entropy_error, omega, omega_error;

  Side(const Values& logits, const Values& errors, double log_classes)
      : z(logits.size()), relative(logits.size()), surprise(logits.size()) {
    const double classes = static_cast<double>(logits.size());
    double top = -kInfinity, sum = 0, mean = 0, away = 0;
    for (const double logit : logits) top = std::max(top, logit);
    for (size_t c = 0; c < z.size(); ++c) sum += z[c] = std::exp(logits[c] - top);
    for (size_t c = 0; c < z.size(); ++c) {
      z[c] /= sum;
      surprise[c] = std::max(logits[c] - top - std::log(sum), -750.0);
      if (z[c] > 0) entropy -= z[c] * surprise[c];
      relative[c] = errors[c] + kExpUnits * R::kUnit;
      mean += z[c] * relative[c];
      away += z[c] * (top - logits[c]);
    }
    double moved = 0;
    for (size_t c = 0; c < z.size(); ++c) {
      surprise[c] += entropy;
      relative[c] = std::expm1(relative[c] + mean + R::gamma(classes + 4));
      if (z[c] > 0) moved += z[c] * (std::abs(surprise[c]) * std::min(relative[c], 1.0) + relative[c] * relative[c]);
    }
    // Taken as log s − Σ e a / s, a being the logits less a reference that is at most 8 powers of two from the largest.
    const double rounded = 2 * R::gamma(classes + 8) * (away + 8 * std::log(2.0) + 1);
    entropy_error = moved + rounded + R::kUnit * kExpUnits * (log_classes + 8);
    omega = 1 - entropy / log_classes;
    omega_error = std::min(entropy_error / log_classes + 3 * R::kUnit, 1.0);
  }
  // Of z. An exponential below the range is 0, about a reference that is at most 8 powers of two above the largest.
  double error(size_t c) const {
    return z[c] * relative[c] + std::ldexp(double{std::numeric_limits<Real>::min()}, 8);
  }
};

// (20)-(22) entry by entry; the derivative of each goes back through its two softmaxes, and is scattered. Bounds as in
// python_tests/ops/bounds/graph.py.
template <class Real>
Dissimilarity leave_one_out_in_double(const Graph& graph, const Values& propagated, int64_t classes, double scale,
                                      const Values& grad) {
  using R = Rounding<Real>;
  Values degree(graph.nodes(), 0.0), reach(graph.nodes(), 0.0);
  double longest = 0;
  for (int64_t i = 0; i < graph.nodes(); ++i)
    longest = std::max(longest, static_cast<double>(graph.crow[i + 1] - graph.crow[i]));
  graph.for_each([&](int64_t i, int64_t, size_t e) { degree[i] += graph.weight[e]; });
  for (int64_t i = 0; i < graph.nodes(); ++i)
    for (int64_t c = 0; c < classes; ++c) reach[i] = std::max(reach[i], std::abs(propagated[i * classes + c]));
  Dissimilarity out{Bounded(graph.edges()), Bounded(graph.edges()), Bounded(propagated.size())};
  Bounded grad_degree(graph.nodes());
  const double log_classes = std::log(classes), of_labels = R::gamma(2 * longest + 6), of_degree = R::gamma(longest),
               of_weights = R::gamma(static_cast<double>(classes) + longest + 6);
  const auto side_of = [&](int64_t i, int64_t j, size_t e) {
    Values logits(classes), errors(classes);
    for (int64_t c = 0; c < classes; ++c) {
      const double own = degree[i] * propagated[i * classes + c], other = graph.weight[e] * propagated[j * classes + c];
      logits[c] = scale * (own - other);
      // D_ii is a sum of the row; the logit is taken less D_ii times its row's largest.
      errors[c] = scale * (R::gamma(longest + 6) * (std::abs(own) + degree[i] * reach[i]) +
                           R::gamma(6) * (std::abs(other) + degree[i] * reach[i]));
    }
    return Side<Real>(logits, errors, log_classes);
  };
  graph.for_each([&](int64_t i, int64_t j, size_t e) {
    const size_t mirror = graph.reverse[e];
    const Side<Real> ij = side_of(i, j, e), ji = side_of(j, i, mirror);
    double overlap = 0, overlap_error = 0;
    for (int64_t c = 0; c < classes; ++c) {
      const double both = ij.z[c] * ji.z[c];
      overlap += both;
      overlap_error += both * (ij.relative[c] + ji.relative[c] + ij.relative[c] * ji.relative[c]);
    }
    overlap_error = std::min(overlap_error + R::gamma(3 * static_cast<double>(classes) + 8) * overlap, 1.0);
    const double apart = 1 - overlap, apart_error = overlap_error + R::kUnit;
    const double ij_omega = std::clamp(ij.omega, 0.0, 1.0), ji_omega = std::clamp(ji.omega, 0.0, 1.0);
    out.value.set(e, ij.omega * ji.omega * apart,
                  (ij.omega_error * (ji_omega + ji.omega_error) + ij_omega * ji.omega_error) * (apart + apart_error) +
                      ij_omega * ji_omega * (apart_error + R::gamma(4) * apart));
    const auto back = [&](const Side<Real>& own, const Side<Real>& other, int64_t from, int64_t to, size_t entry) {
      const double size = std::abs(grad[e]), omega = std::clamp(own.omega, 0.0, 1.0),
                   back_omega = std::clamp(other.omega, 0.0, 1.0);
      // ∂/∂logit = G (ω' (1 − z·z') z (log z + H) / log C − ω ω' z (z' − z·z')). Where rounding takes ω or 1 − z·z'
      // below 0, it is cut off and its part with it.
      const double of_entropy = size * back_omega * apart / log_classes, of_overlap = size * omega * back_omega;
      const double entropy_doubt =
          size * (other.omega_error * (apart + apart_error) + back_omega * apart_error) / log_classes;
      const double overlap_doubt =
          size * (own.omega_error * (back_omega + other.omega_error) + omega * other.omega_error);
      const double entropy_cut = own.omega <= own.omega_error ? 2 : 0, overlap_cut = apart <= apart_error ? 2 : 0;
      for (int64_t c = 0; c < classes; ++c) {
        const double z = own.z[c], z_other = other.z[c];
        const double to_entropy = z * own.surprise[c], to_overlap = z * (z_other - overlap);
        // a and the mean of a, whose difference log z + H is, lie log C and the 8 of a reference further from 0.
        const double log_error = own.relative[c] + own.entropy_error +
                                 R::gamma(6) * (std::abs(own.surprise[c]) + 2 * (log_classes + 8 * std::log(2.0)));
        const double entropy_error = own.error(c) * std::abs(own.surprise[c]) + z * (1 + own.relative[c]) * log_error;
        const double to_overlap_error =
            own.error(c) * std::abs(z_other - overlap) +
            z * (1 + own.relative[c]) * (other.error(c) + overlap_error + R::gamma(6) * (z_other + overlap));
        const double of_logit =
            grad[e] * (back_omega * apart / log_classes * to_entropy - omega * back_omega * to_overlap);
        const double error = entropy_doubt * (std::abs(to_entropy) + entropy_error) +
                             of_entropy * (entropy_cut * std::abs(to_entropy) + entropy_error) +
                             overlap_doubt * (std::abs(to_overlap) + to_overlap_error) +
                             of_overlap * (overlap_cut * std::abs(to_overlap) + to_overlap_error) +
                             R::gamma(6) * (of_entropy * std::abs(to_entropy) + of_overlap * std::abs(to_overlap));
        const double slope = scale * of_logit, slope_size = std::abs(slope), slope_error = scale * error,
                     f_from = propagated[from * classes + c], f_to = propagated[to * classes + c];
        const double w = graph.weight[entry];
        out.grad_propagated.add(from * classes + c, slope * degree[from],
                                degree[from] * (slope_error + (of_degree + of_labels) * slope_size));
        out.grad_propagated.add(to * classes + c, -slope * w, w * (slope_error + of_labels * slope_size));
        grad_degree.add(from, slope * f_from, std::abs(f_from) * (slope_error + of_weights * slope_size));
        out.grad_weight.add(entry, -slope * f_to, std::abs(f_to) * (slope_error + of_weights * slope_size));
      }
    };
    back(ij, ji, i, j, e);
    back(ji, ij, j, i, mirror);
  });
  graph.for_each(
      [&](int64_t i, int64_t, size_t e) { out.grad_weight.add(e, grad_degree.value[i], grad_degree.error[i]); });
  return out;
}

template <class Real>
struct LeftOut {
  Guarded<Real> value, grad_weight, grad_propagated;

  LeftOut(const Graph& graph, const Values& f, int64_t classes, double scale, const Values& grad)
      : value(graph.edges()), grad_weight(graph.edges()), grad_propagated(f.size()) {
    const DeviceGraph device(graph);
    const Guarded<Real> weight(graph.weight), propagated(f), grad_dissimilarity(grad);
    const LeaveOneEdgeOut<Real> problem{device.view(), device.reverse.data(), weight.data(), propagated.data(), classes,
                                        scale};
    const int64_t bytes = cuda::leave_one_edge_out_workspace(problem, false),
                  both = cuda::leave_one_edge_out_workspace(problem, true);
    check(both - bytes >= static_cast<int64_t>(4 * sizeof(Real) * graph.edges()),
          "the forward reserves nothing for a backward");
    {
      const Workspace workspace(bytes);
      const char* error = cuda::leave_one_edge_out(problem, value.data(), workspace.data(), nullptr);
      succeeds(error, "leave_one_edge_out");
    }
    const Workspace workspace(both);
    const char* error = cuda::leave_one_edge_out_backward(
        problem, {grad_dissimilarity.data(), grad_weight.data(), grad_propagated.data()}, workspace.data(), nullptr);
    succeeds(error, "leave_one_edge_out_backward");
  }
};

template <class Real>
void test_left_out(const Graph& graph, int64_t classes, double size, std::mt19937& random) {
  context = "leave one out N " + std::to_string(graph.nodes()) + " C " + std::to_string(classes) + " size " +
            std::to_string(size) + " bytes " + std::to_string(sizeof(Real));
  std::normal_distribution<double> normal;
  Values propagated, grad;
  for (int64_t i = 0; i < graph.nodes(); ++i) {
    const double offset = 100 * normal(random);  // a constant per row changes nothing; exact in float
    for (int64_t c = 0; c < classes; ++c)
      propagated.push_back(static_cast<float>(std::round(offset) / 16) +
                           std::round(size * normal(random) * 4096) / 4096);
  }
  if (graph.nodes() > 3)
    for (int64_t c = 0; c < classes; ++c) propagated[3 * classes + c] = 0.25;  // one row is constant
  for (size_t e = 0; e < graph.edges(); ++e) grad.push_back(static_cast<Real>(e % 4 == 3 ? 0 : normal(random)));
  for (double& f : propagated) f = static_cast<Real>(f);
  const double scale = 4;
  // The reference sees each row less the middle of its range, as the kernel, which is exact and changes nothing: with
  // the constant, its own rounding would show.
  Values centered = propagated;
  for (int64_t i = 0; i < graph.nodes(); ++i) {
    const auto row = centered.begin() + i * classes;
    const auto [low, high] = std::minmax_element(row, row + classes);
    const double middle = (*low + *high) / 2;
    for (int64_t c = 0; c < classes; ++c) row[c] -= middle;
  }
  const Dissimilarity expected = leave_one_out_in_double<Real>(graph, centered, classes, scale, grad);
  const LeftOut<Real> out(graph, propagated, classes, scale, grad), again(graph, propagated, classes, scale, grad);
  compare_within(out.value, expected.value, "dissimilarity");
  compare_within(out.grad_propagated, expected.grad_propagated, "grad_propagated");
  compare_within(out.grad_weight, expected.grad_weight, "grad_weight");
  bool symmetric = true;
  for (size_t e = 0; e < graph.edges(); ++e) symmetric &= out.value[e] == out.value[graph.reverse[e]];
  check(symmetric, "the same both ways");
  check(out.value.same_bits(again.value) && out.grad_weight.same_bits(again.grad_weight) &&
            out.grad_propagated.same_bits(again.grad_propagated),
        "bits");
}

// Logits of any size: the value is exact and the gradient finite.
template <class Real>
void test_huge_left_out(std::mt19937& random) {
  context = "huge";
  std::normal_distribution<double> normal;
  for (const int64_t classes : {2, 10, 130})
    for (const double size : {1e10, sizeof(Real) == 4 ? 1e30 : 1e150, sizeof(Real) == 4 ? 1e35 : 1e300}) {
      const Graph graph =
          make_graph<Real>(40, 4, random, false);  // the logits of a node that only has a loop are all rounding
      Values propagated;
      for (int64_t k = 0; k < 40 * classes; ++k) propagated.push_back(static_cast<Real>(size * normal(random)));
      const Values grad(graph.edges(), 1.0);
      const LeftOut<Real> out(graph, propagated, classes, 4, grad);
      compare_within(out.value, leave_one_out_in_double<Real>(graph, propagated, classes, 4, grad).value,
                     "dissimilarity");
      bool finite = true;
      for (size_t e = 0; e < graph.edges(); ++e) finite &= std::isfinite(out.grad_weight[e]);
      for (size_t k = 0; k < propagated.size(); ++k) finite &= std::isfinite(out.grad_propagated[k]);
      check(finite, "gradient");
    }
}

// Edges that weigh next to nothing against their nodes: a node's own logit is as large as its largest one's rounding.
// Two classes may be closer than rounding: only what holds for any.
template <class Real>
void test_huge_logits_of_light_edges(std::mt19937& random) {
  context = "light edges";
  std::normal_distribution<double> normal;
  for (const int64_t classes : {2, 10, 130})
    for (const double size : {1e6, 1e12, 1e20, sizeof(Real) == 4 ? 1e34 : 1e290})
      for (const double light : {1e-3, 1e-13, 1e-25}) {
        Graph graph = make_graph<Real>(40, 4, random);
        graph.for_each([&](int64_t i, int64_t j, size_t e) {
          if ((i + j) % 3 == 0) graph.weight[e] = static_cast<Real>(graph.weight[e] * light);
        });
        Values propagated;
        for (int64_t k = 0; k < 40 * classes; ++k) propagated.push_back(static_cast<Real>(size * normal(random)));
        // The scale is no power of two, which would round nothing.
        const LeftOut<Real> out(graph, propagated, classes, 3.3, Values(graph.edges(), 1.0));
        bool bounded = true, finite = true;
        for (size_t e = 0; e < graph.edges(); ++e) {
          bounded &= out.value[e] >= 0 && out.value[e] <= 1;
          finite &= std::isfinite(out.grad_weight[e]);
        }
        for (size_t k = 0; k < propagated.size(); ++k) finite &= std::isfinite(out.grad_propagated[k]);
        check(bounded, "in [0, 1]");
        check(finite, "gradient");
      }
}

// NaN in F or in a weight: NaN on the edges of its row and in the gradients of their ends, and nowhere else.
template <class Real>
void test_nan_left_out(std::mt19937& random) {
  context = "NaN";
  const int64_t row = 11;
  std::normal_distribution<double> normal;
  for (const int64_t classes : {2, 10, 130})
    for (const bool in_weight : {true, false}) {
      Graph graph = make_graph<Real>(40, 4, random);
      Values propagated;
      for (int64_t k = 0; k < 40 * classes; ++k) propagated.push_back(normal(random));
      (in_weight ? graph.weight[graph.crow[row]] : propagated[row * classes + 1]) = std::nan("");
      const LeftOut<Real> out(graph, propagated, classes, 4, Values(graph.edges(), 1.0));
      std::vector<bool> touched(graph.nodes());
      bool good = true;
      graph.for_each([&](int64_t i, int64_t j, size_t e) {
        if (i == row || j == row) touched[i] = touched[j] = true;
        good &= std::isnan(out.value[e]) == (i == row || j == row);
      });
      check(good, "edges");
      for (int64_t k = 0; k < 40 * classes; ++k) good &= std::isnan(out.grad_propagated[k]) == touched[k / classes];
      check(good, "gradient");
    }
}

template <class Real>
void test_all_left_out(std::mt19937& random) {
  int turn = 0;
  for (const int64_t nodes : {1, 3, 17, 123})
    for (const int64_t classes : {2, 3, 10, 17, 33, 100, 130}) {
      const Graph graph = make_graph<Real>(nodes, turn % 3 == 0 ? 3 : 9, random);
      test_left_out<Real>(graph, classes, turn % 2 ? 0.02 : 0.2, random);
      ++turn;
    }
  test_left_out<Real>(make_graph<Real>(17, 5, random), 1000, 0.3, random);  // panels of classes
  for (const int64_t classes : {2, 10, 130}) {
    const Graph graph = make_graph<Real>(40, 4, random);
    test_left_out<Real>(graph, classes, 3, random);  // references that are not those of the node
    // Saturated: nothing is NaN, and the value lies in [0, 1].
    Values propagated, grad(graph.edges(), 1.0);
    std::normal_distribution<double> normal;
    for (int64_t k = 0; k < 40 * classes; ++k) propagated.push_back(1e4 * normal(random));
    context = "saturated";
    const LeftOut<Real> out(graph, propagated, classes, 4, grad);
    bool good = true;
    for (size_t e = 0; e < graph.edges(); ++e)
      good &= out.value[e] >= 0 && out.value[e] <= 1 && std::isfinite(out.grad_weight[e]);
    for (size_t k = 0; k < propagated.size(); ++k) good &= std::isfinite(out.grad_propagated[k]);
    check(good, "finite");
  }
  for (const int64_t nodes : {0, 3}) {
    Graph none;
    none.crow.assign(nodes + 1, 0);
    test_left_out<Real>(none, 5, 1, random);
  }
  test_huge_left_out<Real>(random);
  test_huge_logits_of_light_edges<Real>(random);
  test_nan_left_out<Real>(random);

  // What no graph has is not followed.
  context = "wild";
  Graph graph = make_graph<Real>(17, 5, random);
  const size_t first = graph.reverse[1], second = graph.reverse[6];
  graph.col[1] = 17;
  graph.reverse[first] = static_cast<int64_t>(graph.edges());
  graph.reverse[6] = -1;
  graph.col[second] = -5;
  Values propagated;
  std::normal_distribution<double> normal;
  for (int k = 0; k < 17 * 10; ++k) propagated.push_back(normal(random));
  const Values grad(graph.edges(), 1.0);
  const LeftOut<Real> out(graph, propagated, 10, 4, grad);
  for (const size_t e : {size_t{1}, first, size_t{6}, second})
    check(out.value[e] == 0, "an invalid entry gets 0", out.value[e]);
  bool good = true;
  for (const Real g : Values(out.grad_propagated.data(), out.grad_propagated.data() + propagated.size()))
    good &= std::isfinite(g);
  check(good, "wild: finite");
  graph.crow[3] = 1000000;
  graph.crow[5] = -7;
  LeftOut<Real>(graph, propagated, 10, 4, grad);
}

template <class Real>
void test_all() {
  std::mt19937 random(1234);
  test_solves<Real>(random);
  test_all_left_out<Real>(random);
}

}  // namespace

int main() {
  return run_tests([] {
    test_all<float>();
    test_all<double>();
  });
}
