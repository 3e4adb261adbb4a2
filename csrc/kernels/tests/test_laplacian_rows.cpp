// SPDX-License-Identifier: BSD-3-Clause
// Conjugate gradients on split rows without torch, on the instruction set in use: against the definitions in double,
// and bit for bit between one thread and several. Run it under the sanitizers too.
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "../graph/laplacian_rows.h"
#include "harness.h"

using namespace ssmkernels;
using namespace ssmkernels::test;

namespace {

template <class Real>
std::vector<Real> normal_values(int64_t size, std::mt19937& random) {
  std::normal_distribution<double> normal;
  std::vector<Real> values(size);
  for (Real& value : values) value = static_cast<Real>(normal(random));
  return values;
}

template <class Real>
struct Problem {
  int64_t nodes, extended, columns;
  std::vector<int64_t> crow{0}, rows;
  std::vector<int32_t> col;
  std::vector<Real> value, excess, x, residual, inverse;

  // Rows with 0 to 6 entries, every second of which is computed.
  Problem(int64_t nodes, int64_t ghosts, int64_t columns, std::mt19937& random)
      : nodes(nodes), extended(nodes + ghosts), columns(columns) {
    for (int64_t i = 0; i < nodes; ++i) {
      for (int64_t k = 0; k < i % 7; ++k) col.push_back(static_cast<int32_t>(random() % extended));
      crow.push_back(static_cast<int64_t>(col.size()));
      if (i % 2 == 0) rows.push_back(i);
    }
    value = normal_values<Real>(static_cast<int64_t>(col.size()), random);
    excess = normal_values<Real>(nodes, random);
    inverse = normal_values<Real>(nodes, random);
    x = normal_values<Real>(extended * columns, random);
    residual = normal_values<Real>(nodes * columns, random);
  }

  RowsOfLaplacian<Real> matrix() const {
    return {crow.data(), col.data(), value.data(), excess.data(), nodes, extended, columns};
  }

  // Row i of A x, and of the magnitudes of its terms.
  void multiply(int64_t i, int64_t c, double& sum, double& terms) const {
    const double own = x[i * columns + c];
    sum = excess[i] * own;
    terms = std::abs(sum);
    for (int64_t e = crow[i]; e < crow[i + 1]; ++e) {
      if (col[e] < 0 || col[e] >= extended) continue;
      const double flow = value[e] * (own - x[col[e] * columns + c]);
      sum += flow;
      terms += std::abs(flow);
    }
  }
};

template <class Real>
constexpr double kEpsilon = std::numeric_limits<Real>::epsilon();

template <class Real>
void test_rows(const Problem<Real>& problem) {
  const int64_t size = problem.nodes * problem.columns;
  struct Result {
    std::vector<Real> out;
    Values sums;
  };
  const auto run = [&](ParallelFor parallel_for) {
    Result result{std::vector<Real>(size, Real(7)), Values(3 * problem.columns, -1)};
    SSM_CALL_ISA(laplacian_rows,
                 LaplacianRows<Real>{problem.matrix(), problem.rows.data(), static_cast<int64_t>(problem.rows.size()),
                                     problem.x.data(), problem.residual.data(), problem.inverse.data(),
                                     result.out.data(), result.sums.data()},
                 parallel_for);
    return result;
  };
  const Result one = run(serial_for), several = run(threads_for);
  check(same_bits(one.out, several.out) && same_bits(one.sums, several.sums), "bits of rows on several threads");
  Values sums(3 * problem.columns), terms(3 * problem.columns);
  bool within = true;
  for (const int64_t i : problem.rows)
    for (int64_t c = 0; c < problem.columns; ++c) {
      double sum, magnitude;
      problem.multiply(i, c, sum, magnitude);
      const double ours = one.out[i * problem.columns + c], x = problem.x[i * problem.columns + c];
      within &= std::abs(ours - sum) <= 10 * kEpsilon<Real> * magnitude;  // 7 terms, of two roundings each
      const double r = problem.residual[i * problem.columns + c], z = problem.inverse[i] * r;
      const double parts[] = {ours * x, r * x, z * z};
      for (int k = 0; k < 3; ++k) {
        sums[k * problem.columns + c] += parts[k];
        terms[k * problem.columns + c] += std::abs(parts[k]);
      }
    }
  check(within, "rows");
  within = true;
  for (size_t k = 0; k < sums.size(); ++k)  // 128 terms in Real, of three roundings each
    within &= std::abs(one.sums[k] - sums[k]) <= 132 * kEpsilon<Real> * terms[k];
  check(within, "sums of rows");
  bool untouched = true;
  for (int64_t i = 1; i < problem.nodes; i += 2) untouched &= one.out[i * problem.columns] == 7;
  check(untouched, "rows that were not asked for");
}

template <class Real>
void test_residual(const Problem<Real>& problem) {
  const Values x(problem.x.begin(), problem.x.end());
  const int64_t size = problem.nodes * problem.columns;
  Values sum(size), terms(size);
  SSM_CALL_ISA(laplacian_residual, LaplacianResidual<Real>{problem.matrix(), x.data(), sum.data(), terms.data()},
               threads_for);
  bool within = true;
  for (int64_t i = 0; i < problem.nodes; ++i)
    for (int64_t c = 0; c < problem.columns; ++c) {
      double expected, magnitude;
      problem.multiply(i, c, expected, magnitude);
      const int64_t at = i * problem.columns + c;
      within &= std::abs(sum[at] - expected) <= 10 * kEpsilon<double> * magnitude;
      within &= std::abs(terms[at] - magnitude) <= 10 * kEpsilon<double> * magnitude;
    }
  check(within, "product in double precision");
}

template <class Real>
void test_step(int64_t nodes, int64_t columns, std::mt19937& random) {
  const auto draw = [&](int64_t size) { return normal_values<Real>(size, random); };
  const int64_t size = nodes * columns;
  auto r = draw(size), p = draw(size), s = draw(size), u = draw(size);
  const auto w = draw(size), step = draw(nodes), beta = draw(columns), alpha = draw(columns);
  Values x = normal_values<double>(size, random);
  std::vector<Real> fresh(columns);
  for (int64_t c = 0; c < columns; ++c) fresh[c] = static_cast<Real>(c % 2);
  Values expected[5];
  for (int64_t at = 0; at < size; ++at) {
    const int64_t i = at / columns, c = at % columns;
    const double direction = double(fresh[c]) * u[at] + double(beta[c]) * p[at],
                 product = double(fresh[c]) * w[at] + double(beta[c]) * s[at],
                 residual = r[at] - double(alpha[c]) * product;
    const double values[] = {x[at] + double(alpha[c]) * direction, residual, direction, product, step[i] * residual};
    for (int k = 0; k < 5; ++k) expected[k].push_back(values[k]);
  }
  SSM_CALL_ISA(laplacian_step,
               LaplacianStep<Real>{nodes, columns, fresh.data(), beta.data(), alpha.data(), step.data(), w.data(),
                                   x.data(), r.data(), p.data(), s.data(), u.data()},
               threads_for);
  const double tolerance = 500 * kEpsilon<Real>;  // of numbers up to 5 each
  expect_close("solution of a step", x, expected[0], tolerance);
  expect_close("residual of a step", r, expected[1], tolerance);
  expect_close("direction of a step", p, expected[2], tolerance);
  expect_close("its product", s, expected[3], tolerance);
  expect_close("preconditioned residual of a step", u, expected[4], tolerance);
}

template <class Real>
void test_all() {
  std::mt19937 random(1);
  for (const int64_t nodes : {0, 1, 5, 300})
    for (const int64_t columns : {1, 3, 16, 37, 70}) {
      Problem<Real> problem(nodes, nodes / 4, columns, random);
      test_rows(problem);
      test_residual(problem);
      test_step<Real>(nodes, columns, random);
      if (problem.col.size() < 4) continue;
      problem.col[0] = -3;
      problem.col[3] = std::numeric_limits<int32_t>::max();
      problem.rows.insert(problem.rows.begin() + 1, {-1, nodes, int64_t{1} << 40});
      const int64_t size = nodes * columns;
      std::vector<Real> out(size);
      Values sums(3 * columns);
      SSM_CALL_ISA(laplacian_rows,
                   LaplacianRows<Real>{problem.matrix(), problem.rows.data(), static_cast<int64_t>(problem.rows.size()),
                                       problem.x.data(), problem.residual.data(), problem.inverse.data(), out.data(),
                                       sums.data()},
                   serial_for);
      test_residual(problem);
    }
}

}  // namespace

int main() {
  context = isa_name(current_isa());
  test_all<double>();
  test_all<float>();
  return report();
}
