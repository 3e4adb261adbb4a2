// SPDX-License-Identifier: BSD-3-Clause
// The ranking kernels without torch: against a direct transcription of the equations in double, for every instruction
// set of this processor, and bit for bit between one thread and several. Run it under the sanitizers too.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

#include "../ranking/mined_pair_ranking_loss.h"
#include "../ranking/pair_ranking_loss.h"
#include "../ranking/similarity_moments.h"
#include "harness.h"
#include "unwritten.h"

using namespace ssmkernels;
using namespace ssmkernels::test;

namespace {

// Rows with labels, and their order by label.
template <class Real>
struct Side {
  std::vector<Real> rows;
  std::vector<int64_t> labels, order, sorted;

  Side(int64_t n, int64_t d, int64_t classes, std::mt19937& random) {
    std::normal_distribution<double> normal;
    for (int64_t i = 0; i < n; ++i) {
      labels.push_back(static_cast<int64_t>(random() % static_cast<unsigned>(classes)) - 1);
      for (int64_t c = 0; c < d; ++c)
        rows.push_back(static_cast<Real>(0.4 * normal(random) + (c == labels.back() % d)));
    }
    for (int64_t i = 3; i < n; i += 7)  // a distance of 0
      std::copy_n(rows.begin() + (i - 2) * d, d, rows.begin() + i * d);
    order.resize(n);
    std::iota(order.begin(), order.end(), int64_t{0});
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return labels[a] < labels[b]; });
    for (const int64_t place : order) sorted.push_back(labels[place]);
  }
};

template <class Real>
struct Case {
  int64_t n, m, d;
  bool alone;
  Side<Real> left, right;
  std::vector<Real> basis, thresholds{Real(0.3), Real(-0.2)};
  RankingPairs<Real> pairs;
  static constexpr int64_t basis_dim = 5;

  Case(int64_t n, int64_t m, int64_t d, int64_t classes, double negative_margin, std::mt19937 random = std::mt19937(7))
      : n(n), m(m > 0 ? m : n), d(d), alone(m == 0), left(n, d, classes, random), right(m, d, classes, random) {
    std::normal_distribution<double> normal;
    for (int64_t k = 0; k < n * basis_dim; ++k) basis.push_back(static_cast<Real>(normal(random)));
    pairs = {left.rows.data(), alone ? nullptr : right.rows.data(), n, this->m, d, 0.1, negative_margin};
  }

  RankingLabels labels() const {
    return {left.order.data(), left.sorted.data(), alone ? nullptr : right.order.data(),
            alone ? nullptr : right.sorted.data()};
  }

  double cosine(const std::vector<Real>& rows, int64_t dim, int64_t i, int64_t j) const {
    double product = 0, a = 0, b = 0;
    for (int64_t c = 0; c < dim; ++c) {
      product += double(rows[i * dim + c]) * rows[j * dim + c];
      a += double(rows[i * dim + c]) * rows[i * dim + c];
      b += double(rows[j * dim + c]) * rows[j * dim + c];
    }
    return product / std::sqrt(a * b);
  }

  // Loss and gradients of both sides, straight from equation (1).
  void direct(bool mined, Reduction reduction, double& loss, Values& left_grad, Values& right_grad) const {
    const std::vector<Real>& others = alone ? left.rows : right.rows;
    const std::vector<int64_t>& other_labels = alone ? left.labels : right.labels;
    double sums[2] = {}, nonzero[2] = {}, counts[2] = {};
    Values left_parts[2], right_parts[2];
    for (int part = 0; part < 2; ++part) {
      left_parts[part].assign(n * d, 0);
      right_parts[part].assign(m * d, 0);
    }
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < m; ++j) {
        if (alone && i == j) continue;
        double square = 0;
        for (int64_t c = 0; c < d; ++c) square += std::pow(double(left.rows[i * d + c]) - others[j * d + c], 2);
        const double distance = std::sqrt(square), s = mined ? cosine(basis, basis_dim, i, j) : 0;
        const bool kinds[2] = {mined ? s >= thresholds[0] : left.labels[i] == other_labels[j],
                               mined ? s <= thresholds[1] : left.labels[i] != other_labels[j]};
        for (int part = 0; part < 2; ++part) {
          if (!kinds[part]) continue;
          const double excess = part == 0 ? distance - pairs.positive_margin : pairs.negative_margin - distance;
          counts[part] += 1;
          if (excess <= 0) continue;
          nonzero[part] += 1;
          sums[part] += excess;
          if (distance == 0) continue;
          for (int64_t c = 0; c < d; ++c) {
            const double derivative =
                (part == 0 ? 1 : -1) * (double(left.rows[i * d + c]) - others[j * d + c]) / distance;
            left_parts[part][i * d + c] += derivative;
            right_parts[part][j * d + c] -= derivative;
          }
        }
      }
    loss = 0;
    left_grad.assign(n * d, 0);
    right_grad.assign(m * d, 0);
    for (int part = 0; part < 2; ++part) {
      const double divisor = reduction == Reduction::sum    ? 1
                             : reduction == Reduction::mean ? counts[part]
                                                            : nonzero[part];
      if (divisor == 0) continue;
      loss += sums[part] / divisor;
      for (int64_t k = 0; k < n * d; ++k) left_grad[k] += left_parts[part][k] / divisor;
      for (int64_t k = 0; k < m * d; ++k) (alone ? left_grad : right_grad)[k] += right_parts[part][k] / divisor;
    }
  }

  // Mean and variance of cosines with equal and with different labels.
  Values direct_moments() const {
    Values moments(4);
    for (int kind = 0; kind < 2; ++kind) {
      double count = 0, sum = 0, squares = 0;
      for (int pass = 0; pass < 2; ++pass)
        for (int64_t i = 0; i < n; ++i)
          for (int64_t j = 0; j < n; ++j) {
            if (i == j || (left.labels[i] == left.labels[j]) != (kind == 0)) continue;
            const double s = cosine(left.rows, d, i, j);
            if (pass == 0) count += 1, sum += s;
            if (pass == 1) squares += std::pow(s - sum / count, 2);
          }
      if (count > 0) moments[2 * kind] = sum / count, moments[2 * kind + 1] = squares / count;
    }
    return moments;
  }
};

template <class Real>
bool close(const std::vector<Real>& ours, const Values& exact, double tolerance) {
  double scale = 1e-3;
  for (const double value : exact) scale = std::max(scale, std::abs(value));
  for (size_t k = 0; k < exact.size(); ++k)
    if (!(std::abs(double(ours[k]) - exact[k]) <= tolerance * scale)) return false;
  return ours.size() == exact.size();
}

// Loss, then the gradients of both sides.
template <class Real>
std::vector<Real> run_ranking(const Case<Real>& in, bool mined, Reduction reduction, ParallelFor parallel_for) {
  const auto tiles = [](int64_t rows) { return (rows + kRankingTile - 1) / kRankingTile; };
  std::vector<uint8_t> active(tiles(in.n) * tiles(in.m));
  std::vector<Real> out(1 + (in.n + (in.alone ? 0 : in.m)) * in.d, Real(77)),
      weights(2);  // every element is to be written
  const RankingLoss<Real> loss{reduction, out.data(), weights.data(), active.data()};
  const Real one = 1;
  const RankingGradients<Real> gradients{&one, weights.data(), active.data(), out.data() + 1,
                                         in.alone ? nullptr : out.data() + 1 + in.n * in.d};
  if (mined) {
    const RankingBasis<Real> basis{in.basis.data(), in.basis_dim, in.thresholds.data()};
    SSM_CALL_ISA(mined_pair_ranking_loss, in.pairs, basis, loss, parallel_for);
    SSM_CALL_ISA(mined_pair_ranking_loss_backward, in.pairs, basis, gradients, parallel_for);
  } else {
    SSM_CALL_ISA(pair_ranking_loss, in.pairs, in.labels(), loss, parallel_for);
    SSM_CALL_ISA(pair_ranking_loss_backward, in.pairs, in.labels(), gradients, parallel_for);
  }
  return out;
}

// Moments, then the gradient of their weighted sum.
template <class Real>
std::vector<Real> run_moments(const Case<Real>& in, const std::vector<Real>& grads, ParallelFor parallel_for) {
  const LabeledFeatures<Real> features{in.left.rows.data(), in.left.order.data(), in.left.sorted.data(), in.n, in.d};
  std::vector<Real> out(4 + in.n * in.d, Real(77));
  SSM_CALL_ISA(similarity_moments, features, out.data(), parallel_for);
  SSM_CALL_ISA(similarity_moments_backward, features, out.data(), grads.data(), out.data() + 4, parallel_for);
  return out;
}

template <class Real>
void test_all(double tolerance) {
  struct Size {
    int64_t n, m, d, classes;
  };
  for (const Size size :
       {Size{0, 0, 3, 2}, {2, 0, 1, 1}, {5, 3, 7, 2}, {33, 0, 17, 3}, {70, 45, 40, 4}, {100, 0, 3, 200}})
    for (const double margin : {0.5, 2.5})
      for (const Reduction reduction : {Reduction::mean_nonzero, Reduction::mean, Reduction::sum}) {
        const Case<Real> in(size.n, size.m, size.d, size.classes, margin);
        for (const bool mined : {false, true}) {
          if (mined && !in.alone) continue;
          double loss;
          Values left, right;
          in.direct(mined, reduction, loss, left, right);
          Values exact{loss};
          exact.insert(exact.end(), left.begin(), left.end());
          if (!in.alone) exact.insert(exact.end(), right.begin(), right.end());
          const std::vector<Real> serial = run_ranking(in, mined, reduction, serial_for);
          check(close(serial, exact, tolerance), mined ? "mined_pair_ranking_loss" : "pair_ranking_loss");
          check(same_bits(serial, run_ranking(in, mined, reduction, threads_for)),
                "bits of the ranking losses on threads");
        }
      }
  for (const Size size :
       {Size{0, 0, 3, 2}, {1, 0, 4, 2}, {20, 0, 9, 3}, {80, 0, 30, 1}, {120, 0, 5, 2}, {150, 0, 6, 60}}) {
    const Case<Real> in(size.n, 0, size.d, size.classes, 0.5);
    const std::vector<Real> grads{Real(0.7), Real(-1.1), Real(0.4), Real(1.9)};
    const std::vector<Real> serial = run_moments(in, grads, serial_for);
    check(close(std::vector<Real>(serial.begin(), serial.begin() + 4), in.direct_moments(), tolerance),
          "similarity_moments");
    check(same_bits(serial, run_moments(in, grads, threads_for)), "bits of similarity_moments on threads");
    if constexpr (sizeof(Real) == 8)  // by differences of the moments themselves
      for (int64_t k = 0; k < size.n * size.d; k += 17) {
        Case<Real> moved = in;
        double difference = 0;
        for (const double step : {1e-5, -1e-5}) {
          moved.left.rows[k] = in.left.rows[k] + step;
          const Values moments = moved.direct_moments();
          for (int part = 0; part < 4; ++part) difference += grads[part] * moments[part] / (2 * step);
        }
        check(std::abs(difference - serial[4 + k]) < 1e-7, "gradient of similarity_moments");
      }
  }
}

}  // namespace

int main() {
  context = isa_name(current_isa());
  test_all<float>(2e-5);
  test_all<double>(1e-11);
  return report();
}
