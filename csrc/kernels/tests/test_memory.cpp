// SPDX-License-Identifier: BSD-3-Clause
// The memory kernels without torch: against a direct transcription of the equations in double, for every instruction
// set of this processor, and bit for bit between one thread and several. Run it under the sanitizers too.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <vector>

#include "../memory/aggregate.h"
#include "../memory/instance_matching.h"
#include "../memory/memory_update.h"
#include "../memory/unfold.h"
#include "harness.h"
#include "unwritten.h"

using namespace ssmkernels;
using namespace ssmkernels::test;

namespace {

template <class Real>
std::vector<double> widen(const std::vector<Real>& values) {
  return {values.begin(), values.end()};
}

// Inputs of one dtype, and the same values in double.
template <class Real>
struct Case {
  int64_t rows, dim, slots, classes;
  std::vector<Real> query_weak, query_strong, bank, probs;
  std::vector<int64_t> labels;
  double temperature_weak = 0.1, temperature_strong = 0.2, alpha = 0.7;

  Case(int64_t rows, int64_t dim, int64_t slots, int64_t classes, bool sorted, bool gaps)
      : rows(rows), dim(dim), slots(slots), classes(classes) {
    std::mt19937 random(static_cast<unsigned>(rows * 1000 + slots));
    std::normal_distribution<double> normal;
    auto fill = [&](std::vector<Real>& values, int64_t size, double scale) {
      values.resize(size);
      for (Real& value : values) value = static_cast<Real>(scale * normal(random));
    };
    fill(query_weak, rows * dim, 1 / std::sqrt(dim));
    fill(query_strong, rows * dim, 1 / std::sqrt(dim));
    fill(bank, slots * dim, 1 / std::sqrt(dim));
    labels.resize(slots);
    for (int64_t& label : labels) label = static_cast<int64_t>(random() % classes);
    if (sorted) std::sort(labels.begin(), labels.end());
    fill(probs, rows * classes, 1);
    for (Real& p : probs) p = gaps && p < 0 ? Real(0) : std::exp(p);
    if (gaps) std::fill(probs.begin(), probs.begin() + classes, Real(0));
  }

  double logit(const std::vector<Real>& query, double temperature, int64_t row, int64_t slot) const {
    double sum = 0;
    for (int64_t d = 0; d < dim; ++d) sum += static_cast<double>(query[row * dim + d]) * bank[slot * dim + d];
    return sum / temperature;
  }

  // Weights e^{logit} p[label], normalised; e^{logit} alone where p is zero on every class of the bank.
  std::vector<double> softmax(const std::vector<Real>& query, double temperature, int64_t row, bool calibrated) const {
    std::vector<double> weights(slots);
    double sum = 0;
    for (int64_t slot = 0; slot < slots; ++slot) {
      weights[slot] =
          std::exp(logit(query, temperature, row, slot)) * (calibrated ? probs[row * classes + labels[slot]] : 1);
      sum += weights[slot];
    }
    if (calibrated && sum == 0) return softmax(query, temperature, row, false);
    for (double& weight : weights) weight /= sum;
    return weights;
  }

  InstanceMatching<Real> problem() const {
    return {query_weak.data(), query_strong.data(), probs.data(), view(), rows,
            temperature_weak,  temperature_strong,  false};
  }
  Bank<Real> view() const {
    return {bank.data(), labels.data(), slots, dim, classes, dim, 1};
  }
};

template <class Real>
void test_instance_matching(const Case<Real>& c, double tolerance) {
  std::vector<double> probs(c.rows * c.classes), loss(c.rows), gradient(c.rows * c.dim);
  for (int64_t row = 0; row < c.rows; ++row) {
    const auto weak = c.softmax(c.query_weak, c.temperature_weak, row, false),
               target = c.softmax(c.query_weak, c.temperature_weak, row, true);
    const auto strong = c.softmax(c.query_strong, c.temperature_strong, row, false);
    for (int64_t k = 0; k < c.classes; ++k) probs[row * c.classes + k] = c.alpha * c.probs[row * c.classes + k];
    for (int64_t slot = 0; slot < c.slots; ++slot) {
      probs[row * c.classes + c.labels[slot]] += (1 - c.alpha) * weak[slot];
      loss[row] -= target[slot] * std::log(strong[slot]);
      for (int64_t d = 0; d < c.dim; ++d)
        gradient[row * c.dim + d] += (strong[slot] - target[slot]) * c.bank[slot * c.dim + d] / c.temperature_strong;
    }
  }
  struct Out {
    std::vector<Real> probs, loss, gradient;
  };
  auto run = [&](ParallelFor parallel_for) {
    Out out{std::vector<Real>(c.rows * c.classes), std::vector<Real>(c.rows), std::vector<Real>(c.rows * c.dim)};
    const auto problem = c.problem();
    const InstanceMatchingResult<Real> result{out.probs.data(), out.loss.data(), out.gradient.data(), c.alpha};
    SSM_CALL_ISA(instance_matching, problem, result, parallel_for);
    return out;
  };
  const Out out = run(serial_for), again = run(threads_for);
  expect_close("instance_matching pseudo_probs", widen(out.probs), probs, tolerance);
  expect_close("instance_matching loss", widen(out.loss), loss, tolerance);
  expect_close("instance_matching gradient", widen(out.gradient), gradient, tolerance);
  check(out.probs == again.probs && out.loss == again.loss && out.gradient == again.gradient, "instance_matching bits");
}

template <class Real>
void test_partial(const Case<Real>& c, double tolerance) {
  std::vector<Real> log_weak(c.rows), log_target(c.rows), log_strong(c.rows), logit(c.rows),
      aggregated(c.rows * c.classes), target_mean(c.rows * c.dim), strong_mean(c.rows * c.dim);
  const InstanceMatchingPartial<Real> partial{log_weak.data(), log_target.data(),  log_strong.data(), aggregated.data(),
                                              logit.data(),    target_mean.data(), strong_mean.data()};
  auto problem = c.problem();
  SSM_CALL_ISA(instance_matching_partial, problem, partial, serial_for);
  std::vector<double> expected(c.rows), sums(c.rows);
  for (int64_t row = 0; row < c.rows; ++row) {
    for (int64_t slot = 0; slot < c.slots; ++slot) {
      const double weight = std::exp(c.logit(c.query_weak, c.temperature_weak, row, slot));
      sums[row] += weight;
      expected[row] += weight * c.probs[row * c.classes + c.labels[slot]];
    }
    sums[row] = std::log(sums[row]);
    expected[row] = std::log(expected[row]);  // −inf where p is zero throughout
  }
  expect_close("partial log_weak", widen(log_weak), sums, tolerance);
  expect_close("partial log_target", widen(log_target), expected, tolerance);

  problem.bank.slots = 0;
  SSM_CALL_ISA(instance_matching_partial, problem, partial, serial_for);
  const Real minus_inf = -std::numeric_limits<Real>::infinity();
  check(std::all_of(log_strong.begin(), log_strong.end(), [&](Real x) { return x == minus_inf; }) &&
            std::all_of(strong_mean.begin(), strong_mean.end(), [](Real x) { return x == 0; }),
        "partial of nothing");
}

template <class Real>
void test_aggregate(const Case<Real>& c, double tolerance) {
  std::vector<double> aggregated(c.rows * c.classes), grad_query(c.rows * c.dim);
  std::vector<Real> grad(c.rows * c.classes);
  for (size_t i = 0; i < grad.size(); ++i) grad[i] = static_cast<Real>(std::sin(i));
  for (int64_t row = 0; row < c.rows; ++row) {
    const auto q = c.softmax(c.query_strong, c.temperature_strong, row, false);
    double mean = 0;
    for (int64_t slot = 0; slot < c.slots; ++slot) {
      aggregated[row * c.classes + c.labels[slot]] += q[slot];
      mean += q[slot] * grad[row * c.classes + c.labels[slot]];
    }
    for (int64_t slot = 0; slot < c.slots; ++slot)
      for (int64_t d = 0; d < c.dim; ++d)
        grad_query[row * c.dim + d] +=
            q[slot] * (grad[row * c.classes + c.labels[slot]] - mean) * c.bank[slot * c.dim + d] / c.temperature_strong;
  }
  std::vector<Real> out(c.rows * c.classes), normalizer(c.rows), out_grad(c.rows * c.dim), again(c.rows * c.dim);
  const Aggregate<Real> problem{c.query_strong.data(), c.view(), c.rows, c.temperature_strong, false};
  const AggregateResult<Real> result{out.data(), normalizer.data()};
  SSM_CALL_ISA(aggregate, problem, result, threads_for);
  const AggregateBackward<Real> backward{grad.data(), out.data(), normalizer.data(), out_grad.data()};
  const AggregateBackward<Real> repeat{grad.data(), out.data(), normalizer.data(), again.data()};
  SSM_CALL_ISA(aggregate_backward, problem, backward, serial_for);
  SSM_CALL_ISA(aggregate_backward, problem, repeat, threads_for);
  expect_close("aggregate", widen(out), aggregated, tolerance);
  expect_close("aggregate_backward", widen(out_grad), grad_query, tolerance);
  check(out_grad == again, "aggregate_backward bits");
}

template <class Real>
void test_unfold(const Case<Real>& c, double tolerance) {
  std::vector<double> expected;
  for (int64_t row = 0; row < c.rows; ++row) {
    const auto target = c.softmax(c.query_weak, c.temperature_weak, row, true);
    expected.insert(expected.end(), target.begin(), target.end());
  }
  std::vector<Real> out(c.rows * c.slots), again(c.rows * c.slots), transposed(c.bank.size());
  Unfold<Real> problem{c.query_weak.data(), c.probs.data(), c.view(), c.rows, c.temperature_weak, false, out.data()};
  SSM_CALL_ISA(unfold, problem, serial_for);
  for (int64_t slot = 0; slot < c.slots; ++slot)
    for (int64_t d = 0; d < c.dim; ++d) transposed[d * c.slots + slot] = c.bank[slot * c.dim + d];
  problem.bank.features = transposed.data();
  problem.bank.row_stride = 1;
  problem.bank.column_stride = c.slots;
  problem.unfolded = again.data();
  SSM_CALL_ISA(unfold, problem, threads_for);
  expect_close("unfold", widen(out), expected, tolerance);
  check(out == again, "unfold of a transposed bank, bits");
}

void test_labels_of_no_class() {
  Case<float> c(5, 8, 40, 3, false, false);
  c.labels[4] = -1;
  c.labels[9] = 3;
  c.labels[11] = std::numeric_limits<int64_t>::max();
  std::vector<float> probs(15), loss(5), gradient(40);
  const auto problem = c.problem();
  const InstanceMatchingResult<float> result{probs.data(), loss.data(), gradient.data(), 0};
  SSM_CALL_ISA(instance_matching, problem, result, serial_for);
  for (int row = 0; row < 5; ++row)
    check(probs[row * 3] + probs[row * 3 + 1] + probs[row * 3 + 2] < 1, "mass outside the classes");
}

void test_memory_update() {
  const int64_t rows = 3000, dim = 40, slots = 70;
  std::vector<double> bank(slots * dim, 0.5), fresh(rows * dim);
  std::vector<int64_t> labels(slots), index(rows), fresh_labels(rows);
  std::mt19937 random(0);
  for (double& x : fresh) x = static_cast<double>(random()) / random.max() - 0.5;
  for (int64_t i = 0; i < rows; ++i) {
    index[i] = static_cast<int64_t>(random() % (slots + 2)) - 1;  // −1 and 70 are outside, and skipped
    fresh_labels[i] = i;
  }
  std::vector<double> expected = bank;
  std::vector<int64_t> expected_labels = labels;
  for (int64_t i = 0; i < rows; ++i) {
    if (index[i] < 0 || index[i] >= slots) continue;
    double square = 0;
    for (int64_t d = 0; d < dim; ++d) {
      double& x = expected[index[i] * dim + d];
      x = 0.7 * x + 0.3 * fresh[i * dim + d];
      square += x * x;
    }
    for (int64_t d = 0; d < dim; ++d) expected[index[i] * dim + d] /= std::sqrt(square);
    expected_labels[index[i]] = i;
  }
  const MemoryUpdate<double> problem{
      bank.data(), labels.data(), index.data(), fresh.data(), fresh_labels.data(), slots, dim, rows, dim, 1, 1, 0.7};
  SSM_CALL_ISA(memory_update, problem, threads_for);
  expect_close("memory_update", bank, expected, 1e-12);
  check(labels == expected_labels, "memory_update labels");
}

template <class Real>
void test_all(double tolerance) {
  const int64_t sizes[][4] = {{1, 1, 1, 1},      {3, 17, 17, 3},    {17, 3, 123, 10},
                              {40, 33, 507, 10}, {2, 5, 1500, 300}, {123, 7, 130, 7}};
  for (const auto& s : sizes)
    for (bool sorted : {false, true}) {
      const Case<Real> c(s[0], s[1], s[2], s[3], sorted, sorted);
      test_instance_matching(c, tolerance);
      test_partial(c, tolerance);
      test_aggregate(c, tolerance);
      test_unfold(c, tolerance);
    }
}

}  // namespace

int main() {
  for (const char* isa : {"baseline", "avx2", "avx512"}) {
    if (!set_isa(isa)) continue;
    context = isa;
    test_all<double>(1e-10);
    test_all<float>(2e-4);
    test_labels_of_no_class();
    test_memory_update();
  }
  return report();
}
