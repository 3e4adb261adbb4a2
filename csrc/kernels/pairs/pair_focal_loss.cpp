// SPDX-License-Identifier: BSD-3-Clause
#include "pair_focal_loss.h"

#include "../common/simd.h"
#include "sweep.h"

namespace ssmkernels::SSM_ISA {
namespace {

// The targets of a span: s = sign·logit, and α_t; both 0 for a pair that does not count.
template <class Real>
struct Targets {
  Real sign[kSpan], weight[kSpan];

  Targets(const PairNetwork<Real>& network, const FocalLoss& focal, const PairSpan& span, double scale) {
    const Real same = static_cast<Real>(focal.alpha_same * scale), other = static_cast<Real>(focal.alpha_other * scale);
    if (!span.pairs) {
      const int64_t label = focal.x_labels[span.row];
      const int64_t* labels = focal.y_labels + span.column;
      for (int64_t k = 0; k < span.count; ++k)
        set(k, label == labels[k], (label != focal.ignored) & (labels[k] != focal.ignored), same, other);
    } else {
      for (int64_t k = 0; k < span.count; ++k) {
        const bool valid = is_valid(network, span, k);
        const int64_t left = valid ? focal.x_labels[span.x_row(k)] : focal.ignored,
                      right = valid ? focal.y_labels[span.y_row(k)] : focal.ignored;
        set(k, left == right, valid && left != focal.ignored && right != focal.ignored, same, other);
      }
    }
    for (int64_t k = span.count; k < kSpan; ++k) sign[k] = weight[k] = 0;
  }

 private:
  void set(int64_t k, bool is_same, bool counts, Real same, Real other) {
    sign[k] = !counts ? Real(0) : is_same ? Real(1) : Real(-1);
    weight[k] = !counts ? Real(0) : is_same ? same : other;
  }
};

enum class Gamma { zero, two, any };

// Calls each(k, loss, grad_logit) for every vector of a span, grad_logit being ∂FL/∂logit.
template <Gamma kGamma, class Real, class F>
void for_each_loss(const Targets<Real>& targets, const Real* logits, int64_t count, Real gamma, const F& each) {
  const Vec<Real> none{};
  for (int64_t k = 0; k < count; k += kLanes<Real>) {
    const Vec<Real> sign = load(targets.sign + k), weight = load(targets.weight + k);
    const Vec<Real> s = sign == none ? none : load(logits + k) * sign;  // what does not count may be NaN
    const Vec<Real> e = exp(s > none ? -s : s), inverse = 1 / (1 + e);
    const Vec<Real> wrong = (s > none ? e : none + 1) * inverse,
                    right = (s > none ? none + 1 : e) * inverse;  // 1 − p_t and p_t
    const Vec<Real> surprise = log1p_unit(e) + max(-s, none);     // −log p_t
    const Vec<Real> power = kGamma == Gamma::zero ? none + 1
                            : kGamma == Gamma::two
                                ? wrong * wrong
                                : exp((log1p_unit(e) + max(s, none)) * -gamma);  // log(1 − p_t) = −softplus(s)
    each(k, weight * power * surprise, -sign * weight * power * (gamma * right * surprise + wrong));
  }
}

template <class Real, class F>
void for_each_loss(const FocalLoss& focal, const Targets<Real>& targets, const Real* logits, int64_t count,
                   const F& each) {
  const Real gamma = static_cast<Real>(focal.gamma);
  if (gamma == 0) return for_each_loss<Gamma::zero>(targets, logits, count, gamma, each);
  if (gamma == 2) return for_each_loss<Gamma::two>(targets, logits, count, gamma, each);
  return for_each_loss<Gamma::any>(targets, logits, count, gamma, each);
}

template <class Real>
int64_t counted_pairs(const PairNetwork<Real>& network, const FocalLoss& focal) {
  const auto counted = [&](const int64_t* labels, int64_t rows) {
    int64_t count = 0;
    for (int64_t i = 0; i < rows; ++i) count += labels[i] != focal.ignored;
    return count;
  };
  if (!network.pairs) return counted(focal.x_labels, network.x_rows) * counted(focal.y_labels, network.y_rows);
  int64_t count = 0;
  for (int64_t k = 0; k < network.count; ++k) {
    const int64_t i = network.pairs[2 * k], j = network.pairs[2 * k + 1];
    if (i < 0 || i >= network.x_rows || j < 0 || j >= network.y_rows) continue;
    count += focal.x_labels[i] != focal.ignored && focal.y_labels[j] != focal.ignored;
  }
  return count;
}

}  // namespace

template <class Real>
void pair_focal_loss(const PairNetwork<Real>& network, const FocalLoss& focal, Real* losses, ParallelFor parallel_for) {
  const auto head = [&](const PairSpan& span, Real* values) {
    const Targets<Real> targets(network, focal, span, 1);
    for_each_loss(focal, targets, values, span.count,
                  [&](int64_t k, Vec<Real> loss, Vec<Real>) { store(values + k, loss); });
    for (int64_t k = 0; k < span.count; ++k) losses[span.offset + k] = values[k];
  };
  sweep_logits<Real>(network, head, parallel_for);
}

template <class Real>
void pair_focal_loss_backward(const PairNetwork<Real>& network, const FocalLoss& focal, const Real* grad_losses,
                              const PairGradients<Real>& gradients, ParallelFor parallel_for) {
  const auto head = [&](const PairSpan& span, Real* values) {
    const Targets<Real> targets(network, focal, span, 1);
    for_each_loss(focal, targets, values, span.count,
                  [&](int64_t k, Vec<Real>, Vec<Real> grad_logit) { store(values + k, grad_logit); });
    for (int64_t k = 0; k < span.count; ++k) values[k] *= grad_losses[span.offset + k];
  };
  sweep_gradients<Real>(network, true, head, gradients, parallel_for);
}

template <class Real>
void pair_focal_loss_sum(const PairNetwork<Real>& network, const FocalLoss& focal, const FocalLossSum<Real>& out,
                         ParallelFor parallel_for) {
  const int64_t counted = out.mean ? counted_pairs(network, focal) : 1;
  const double scale = counted > 0 ? 1 / static_cast<double>(counted) : 0;
  double sums[kMaxTasks] = {};
  const auto head = [&](const PairSpan& span, Real* values) {
    const Targets<Real> targets(network, focal, span, 1);
    Vec<Real> sum{};
    for_each_loss(focal, targets, values, span.count, [&](int64_t k, Vec<Real> loss, Vec<Real> grad_logit) {
      sum += loss;
      store(values + k, grad_logit * static_cast<Real>(scale));
    });
    double span_sum = 0;
    for (int lane = 0; lane < kLanes<Real>; ++lane) span_sum += sum[lane];
    sums[span.task] += span_sum;
  };
  if (out.gradients)
    sweep_gradients<Real>(network, true, head, *out.gradients, parallel_for);
  else
    sweep_logits<Real>(network, head, parallel_for);
  double sum = 0;
  for (const double each : sums) sum += each;
  *out.loss = static_cast<Real>(sum * scale);
}

#define SSM_INSTANTIATE(Real)                                                                     \
  template void pair_focal_loss(const PairNetwork<Real>&, const FocalLoss&, Real*, ParallelFor);  \
  template void pair_focal_loss_backward(const PairNetwork<Real>&, const FocalLoss&, const Real*, \
                                         const PairGradients<Real>&, ParallelFor);                \
  template void pair_focal_loss_sum(const PairNetwork<Real>&, const FocalLoss&, const FocalLossSum<Real>&, ParallelFor);
SSM_INSTANTIATE(float)
SSM_INSTANTIATE(double)

}  // namespace ssmkernels::SSM_ISA
