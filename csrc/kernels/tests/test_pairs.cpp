// SPDX-License-Identifier: BSD-3-Clause
// The pairs kernels without torch: against a direct transcription of the equations in double, for every instruction set
// of this processor, and bit for bit between one thread and several. Run it under the sanitizers too.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "../pairs/pair_focal_loss.h"
#include "../pairs/pair_logits.h"
#include "harness.h"
#include "unwritten.h"

using namespace ssmkernels;
using namespace ssmkernels::test;

namespace {

// The gradients x, y, w1, b1, w2, b2.
template <class Real>
struct Gradients {
  std::vector<Real> values[6];

  explicit Gradients(const PairNetwork<Real>& in) {
    const int64_t weights = in.interaction == Interaction::concat ? 0 : in.hidden;
    const int64_t sizes[6] = {
        in.x_rows * in.features, in.y_rows * in.features, weights * in.features, weights, in.hidden, 1};
    for (int k = 0; k < 6; ++k) values[k].assign(sizes[k], Real(77));  // every element is to be written
  }
  PairGradients<Real> view() {
    return {values[0].data(), values[1].data(), values[2].data(), values[3].data(), values[4].data(), values[5].data()};
  }
};

template <class Real>
struct Case {
  std::vector<Real> x, y, w1, b1, w2, b2, grad;
  std::vector<int64_t> x_labels, y_labels, pairs;
  PairNetwork<Real> network;
  FocalLoss focal;

  Case(Interaction interaction, int64_t n, int64_t m, int64_t d, int64_t h, int64_t listed, double gamma) {
    std::mt19937 random(static_cast<unsigned>(n * 1000 + m));
    std::normal_distribution<double> normal;
    const bool concat = interaction == Interaction::concat;
    const int64_t features = concat ? h : d;
    const auto fill = [&](std::vector<Real>& values, int64_t size, double scale) {
      values.resize(size);
      for (Real& value : values) value = static_cast<Real>(scale * normal(random));
    };
    fill(x, n * features, 1);
    fill(y, m * features, 1);
    fill(w1, concat ? 0 : h * d, 1 / std::sqrt(d));
    fill(b1, concat ? 0 : h, 0.3);
    fill(w2, h, 1 / std::sqrt(h));
    fill(b2, 1, 1);
    for (int64_t k = 0; k < 2 * listed; ++k)  // some out of range
      pairs.push_back(static_cast<int64_t>(random() % static_cast<unsigned>((k % 2 ? m : n) + 1)) -
                      (random() % 50 == 0));
    for (int64_t i = 0; i < n; ++i) x_labels.push_back(static_cast<int64_t>(random() % 4) - 1);
    for (int64_t j = 0; j < m; ++j) y_labels.push_back(static_cast<int64_t>(random() % 4) - 1);
    const int64_t count = listed ? listed : n * m;
    fill(grad, count, 1);
    network = {interaction,
               x.data(),
               y.data(),
               concat ? nullptr : w1.data(),
               concat ? nullptr : b1.data(),
               w2.data(),
               b2.data(),
               listed ? pairs.data() : nullptr,
               n,
               m,
               features,
               h,
               count};
    focal = {x_labels.data(), y_labels.data(), -1, 0.25, 0.75, gamma};
  }

  // Calls each(k, i, j, valid) for every pair.
  template <class F>
  void for_each_pair(const F& each) const {
    for (int64_t k = 0; k < network.count; ++k) {
      const int64_t i = network.pairs ? network.pairs[2 * k] : k / network.y_rows,
                    j = network.pairs ? network.pairs[2 * k + 1] : k % network.y_rows;
      each(k, i, j, i >= 0 && i < network.x_rows && j >= 0 && j < network.y_rows);
    }
  }

  double phi(int64_t i, int64_t j, int64_t c) const {
    const double left = x[i * network.features + c], right = y[j * network.features + c];
    return network.interaction == Interaction::product ? left * right : std::abs(left - right);
  }

  double hidden(int64_t i, int64_t j, int64_t unit) const {
    if (network.interaction == Interaction::concat)
      return double(x[i * network.hidden + unit]) + double(y[j * network.hidden + unit]);
    double sum = b1[unit];
    for (int64_t c = 0; c < network.features; ++c) sum += w1[unit * network.features + c] * phi(i, j, c);
    return sum;
  }

  double logit(int64_t i, int64_t j) const {
    double sum = b2[0];
    for (int64_t unit = 0; unit < network.hidden; ++unit) sum += w2[unit] * std::max(0.0, hidden(i, j, unit));
    return sum;
  }

  // FL and ∂FL/∂logit.
  void loss_of(int64_t i, int64_t j, double z, double& loss, double& grad_logit) const {
    loss = grad_logit = 0;
    if (x_labels[i] == focal.ignored || y_labels[j] == focal.ignored) return;
    const double sign = x_labels[i] == y_labels[j] ? 1 : -1, alpha = sign > 0 ? focal.alpha_same : focal.alpha_other,
                 s = sign * z;
    const double wrong = 1 / (1 + std::exp(s)),
                 surprise = s > 0 ? std::log1p(std::exp(-s)) : std::log1p(std::exp(s)) - s;
    const double power = std::pow(wrong, focal.gamma);
    loss = alpha * power * surprise;
    grad_logit = -sign * alpha * power * (focal.gamma * (1 - wrong) * surprise + wrong);
  }

  // Adds g times the gradient of one logit.
  void add_gradients(int64_t i, int64_t j, double g, std::vector<double> (&sums)[6]) const {
    const int64_t features = network.features;
    sums[5][0] += g;
    for (int64_t unit = 0; unit < network.hidden; ++unit) {
      const double value = hidden(i, j, unit);
      if (!(value > 0)) continue;
      const double u = g * w2[unit];
      sums[4][unit] += g * value;
      if (network.interaction == Interaction::concat) {
        sums[0][i * features + unit] += u;
        sums[1][j * features + unit] += u;
        continue;
      }
      sums[3][unit] += u;
      for (int64_t c = 0; c < features; ++c) {
        const double left = x[i * features + c], right = y[j * features + c], along = u * w1[unit * features + c];
        sums[2][unit * features + c] += u * phi(i, j, c);
        const bool product = network.interaction == Interaction::product;
        const double sign = left > right ? 1 : left < right ? -1 : 0;
        sums[0][i * features + c] += along * (product ? right : sign);
        sums[1][j * features + c] += along * (product ? left : -sign);
      }
    }
  }
};

// To the largest of what is expected, or of 1.
template <class Real>
void check_close(const char* what, const std::vector<Real>& ours, const Values& expected) {
  double largest = 1;
  for (const double value : expected) largest = std::max(largest, std::abs(value));
  expect_close(what, ours, expected, 20 * (sizeof(Real) == 8 ? 1e-13 : 1e-5) * largest);
}

template <class Real>
void check_close(const char* what, const Gradients<Real>& ours, const std::vector<double> (&expected)[6]) {
  for (int k = 0; k < 6; ++k) check_close(what, ours.values[k], expected[k]);
}

template <class Real>
bool same(const Gradients<Real>& a, const Gradients<Real>& b) {
  bool equal = true;
  for (int k = 0; k < 6; ++k) equal &= a.values[k] == b.values[k];
  return equal;
}

template <class Real>
void check_network(Interaction interaction, int64_t n, int64_t m, int64_t d, int64_t h, int64_t listed, double gamma) {
  Case<Real> in(interaction, n, m, d, h, listed, gamma);
  const PairNetwork<Real>& network = in.network;
  std::vector<double> logits(network.count), losses(network.count), of_logits[6], of_losses[6], of_mean[6];
  const Gradients<Real> shape(network);
  for (auto* sums : {&of_logits, &of_losses, &of_mean})
    for (int k = 0; k < 6; ++k) (*sums)[k].resize(shape.values[k].size());
  double counted = 0, total = 0;
  in.for_each_pair([&](int64_t, int64_t i, int64_t j, bool valid) {
    counted += valid && in.x_labels[i] != in.focal.ignored && in.y_labels[j] != in.focal.ignored;
  });
  in.for_each_pair([&](int64_t k, int64_t i, int64_t j, bool valid) {
    if (!valid) return;
    double grad_logit;
    logits[k] = in.logit(i, j);
    in.loss_of(i, j, logits[k], losses[k], grad_logit);
    total += losses[k];
    in.add_gradients(i, j, in.grad[k], of_logits);
    in.add_gradients(i, j, in.grad[k] * grad_logit, of_losses);
    in.add_gradients(i, j, grad_logit / counted, of_mean);
  });

  std::vector<Real> values(network.count), again(network.count);
  SSM_CALL_ISA(pair_logits, network, values.data(), serial_for);
  SSM_CALL_ISA(pair_logits, network, again.data(), threads_for);
  check_close("logits", values, logits);
  check(values == again, "logits: the same bits on any number of threads");
  SSM_CALL_ISA(pair_focal_loss, network, in.focal, values.data(), threads_for);
  check_close("losses", values, losses);

  Gradients<Real> gradients(network), others(network);
  SSM_CALL_ISA(pair_logits_backward, network, in.grad.data(), gradients.view(), serial_for);
  SSM_CALL_ISA(pair_logits_backward, network, in.grad.data(), others.view(), threads_for);
  check_close("gradients of logits", gradients, of_logits);
  check(same(gradients, others), "gradients of logits: the same bits on any number of threads");
  SSM_CALL_ISA(pair_focal_loss_backward, network, in.focal, in.grad.data(), gradients.view(), threads_for);
  check_close("gradients of losses", gradients, of_losses);

  std::vector<Real> sum(1), mean(1), both(1);
  SSM_CALL_ISA(pair_focal_loss_sum, network, in.focal, (FocalLossSum<Real>{false, sum.data(), nullptr}), threads_for);
  SSM_CALL_ISA(pair_focal_loss_sum, network, in.focal, (FocalLossSum<Real>{true, mean.data(), nullptr}), serial_for);
  const PairGradients<Real> view = gradients.view();
  SSM_CALL_ISA(pair_focal_loss_sum, network, in.focal, (FocalLossSum<Real>{true, both.data(), &view}), threads_for);
  check_close("sum", sum, {total});
  check_close("mean", mean, {total / counted});
  check_close("gradients of the mean", gradients, of_mean);
  check(mean == both, "the mean is the same with gradients");
}

}  // namespace

int main() {
  context = isa_name(current_isa());
  for (const Interaction interaction : {Interaction::concat, Interaction::absdiff, Interaction::product})
    for (const int64_t listed : {0, 333})
      for (const double gamma : {0.0, 1.5, 2.0}) {
        check_network<float>(interaction, 37, 70, 19, 33, listed, gamma);
        check_network<double>(interaction, 70, 133, 5, 17, listed, gamma);
      }
  return report();
}
