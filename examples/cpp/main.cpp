// SPDX-License-Identifier: BSD-3-Clause
// The kernels from C++, without torch or Python: labels propagated over a ring, and SimMatch's instance matching, both
// on threads of this program's own. Each result is checked against its equation.
#include <ssmkernels/graph/laplacian_solve.h>
#include <ssmkernels/memory/instance_matching.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <thread>
#include <vector>

namespace {

// The kernels have no threads; they take a function object that calls body on parts of [0, n). Four threads here; a
// thread pool or OpenMP would do as well.
constexpr auto my_parallel_for = [](int64_t n, ssmkernels::RangeBody body) {
  constexpr int64_t kThreads = 4;
  std::vector<std::thread> threads;
  for (int64_t t = 0; t < kThreads; ++t) {
    const int64_t begin = n * t / kThreads, end = n * (t + 1) / kThreads;
    if (begin < end) threads.emplace_back([=] { body(begin, end); });
  }
  for (std::thread& thread : threads) thread.join();
};

// (diag(u) + D − W) X = B on a ring of N nodes with weights 1: two labelled nodes, a class each.
bool propagate_labels() {
  constexpr int64_t kNodes = 1000, kClasses = 2;
  std::vector<int64_t> crow{0};
  std::vector<int32_t> col;
  for (int64_t i = 0; i < kNodes; ++i) {
    int32_t neighbours[] = {static_cast<int32_t>((i + kNodes - 1) % kNodes), static_cast<int32_t>((i + 1) % kNodes)};
    std::sort(std::begin(neighbours), std::end(neighbours));  // columns ascend
    col.insert(col.end(), std::begin(neighbours), std::end(neighbours));
    crow.push_back(static_cast<int64_t>(col.size()));
  }
  const std::vector<double> weight(col.size(), 1.0);
  std::vector<double> diagonal(kNodes), rhs(kNodes * kClasses), solution(kNodes * kClasses);
  diagonal[0] = diagonal[400] = 1;
  rhs[0 * kClasses + 0] = rhs[400 * kClasses + 1] = 1;
  std::vector<int64_t> iterations(kClasses);
  std::vector<double> residual(kClasses), curvature(kClasses);

  const ssmkernels::Csr graph{crow.data(), col.data(), kNodes, static_cast<int64_t>(col.size())};
  const ssmkernels::LaplacianSolve<double> problem{
      .graph = graph,
      .weight = weight.data(),
      .dissimilarity = nullptr,
      .diagonal = diagonal.data(),
      .rhs = rhs.data(),
      .initial = nullptr,
      .columns = kClasses,
      .rtol = 1e-10,
      .max_iter = 5000,
      .jacobi = true,
  };
  const ssmkernels::LaplacianSolution<double> result{solution.data(), iterations.data(), residual.data(),
                                                     curvature.data()};
  SSM_CALL_ISA(laplacian_solve, problem, result, my_parallel_for);

  double largest = 0;
  for (int64_t i = 0; i < kNodes; ++i)
    for (int64_t c = 0; c < kClasses; ++c) {
      double value = diagonal[i] * solution[i * kClasses + c];
      for (int64_t e = crow[i]; e < crow[i + 1]; ++e)
        value += solution[i * kClasses + c] - solution[col[e] * kClasses + c];
      largest = std::max(largest, std::abs(value - rhs[i * kClasses + c]));
    }
  // Between nodes 0 and 400, half way along the shorter arc, the classes are level.
  const double level = solution[200 * kClasses] - solution[200 * kClasses + 1];
  std::printf("laplacian_solve: %lld iterations, |A X - B| <= %.1e\n", static_cast<long long>(iterations[0]), largest);
  return largest < 1e-8 && std::abs(level) < 1e-6;
}

// p̂ = α p + (1 − α) q_agg and the loss, against their definition.
bool match_instances() {
  constexpr int64_t kRows = 9, kSlots = 57, kDim = 16, kClasses = 5;
  constexpr double kTemperature = 0.1, kAlpha = 0.9;
  std::mt19937 random(0);
  std::normal_distribution<double> normal;
  auto unit_rows = [&](int64_t rows) {
    std::vector<double> values(rows * kDim);
    for (int64_t i = 0; i < rows; ++i) {
      double length = 0;
      for (int64_t d = 0; d < kDim; ++d) {
        values[i * kDim + d] = normal(random);
        length += values[i * kDim + d] * values[i * kDim + d];
      }
      for (int64_t d = 0; d < kDim; ++d) values[i * kDim + d] /= std::sqrt(length);
    }
    return values;
  };
  const std::vector<double> weak = unit_rows(kRows), strong = unit_rows(kRows), bank = unit_rows(kSlots);
  std::vector<int64_t> labels(kSlots);
  for (int64_t j = 0; j < kSlots; ++j) labels[j] = j % kClasses;
  const std::vector<double> probs(kRows * kClasses, 1.0 / kClasses);
  std::vector<double> pseudo_probs(kRows * kClasses), loss(kRows), gradient(kRows * kDim);

  const ssmkernels::InstanceMatching<double> problem{
      .query_weak = weak.data(),
      .query_strong = strong.data(),
      .probs_weak = probs.data(),
      .bank = {bank.data(), labels.data(), kSlots, kDim, kClasses, /*row_stride=*/kDim, /*column_stride=*/1},
      .rows = kRows,
      .temperature_weak = kTemperature,
      .temperature_strong = kTemperature,
      .allow_tf32 = false,
  };
  const ssmkernels::InstanceMatchingResult<double> result{pseudo_probs.data(), loss.data(), gradient.data(), kAlpha};
  SSM_CALL_ISA(instance_matching, problem, result, my_parallel_for);

  double largest = 0;
  for (int64_t b = 0; b < kRows; ++b) {
    double sum_weak = 0, sum_strong = 0, expected_loss = 0;
    std::vector<double> q_weak(kSlots), log_strong(kSlots), aggregated(kClasses);
    for (int64_t j = 0; j < kSlots; ++j) {
      double w = 0, s = 0;
      for (int64_t d = 0; d < kDim; ++d) {
        w += weak[b * kDim + d] * bank[j * kDim + d] / kTemperature;
        s += strong[b * kDim + d] * bank[j * kDim + d] / kTemperature;
      }
      sum_weak += q_weak[j] = std::exp(w);
      sum_strong += std::exp(log_strong[j] = s);
    }
    for (int64_t j = 0; j < kSlots; ++j) {
      aggregated[labels[j]] += q_weak[j] / sum_weak;
      expected_loss -= q_weak[j] / sum_weak * (log_strong[j] - std::log(sum_strong));  // p is uniform: q̂ = q^w
    }
    largest = std::max(largest, std::abs(loss[b] - expected_loss));
    for (int64_t c = 0; c < kClasses; ++c) {
      const double expected = kAlpha * probs[b * kClasses + c] + (1 - kAlpha) * aggregated[c];
      largest = std::max(largest, std::abs(pseudo_probs[b * kClasses + c] - expected));
    }
  }
  std::printf("instance_matching: off by at most %.1e\n", largest);
  return largest < 1e-12;
}

}  // namespace

int main() {
  std::printf("instruction set: %s\n", ssmkernels::isa_name(ssmkernels::current_isa()));
  const bool propagated = propagate_labels(), matched = match_instances();
  return propagated && matched ? 0 : 1;
}
