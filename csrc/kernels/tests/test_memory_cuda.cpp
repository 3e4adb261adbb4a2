// SPDX-License-Identifier: BSD-3-Clause
// The CUDA kernels of the memory family against the equations in double precision. Inputs, outputs and workspace start
// as NaN, so that an unwritten element shows; see cuda_harness.h.
#include <algorithm>
#include <limits>
#include <random>
#include <type_traits>

#include "../memory/aggregate.h"
#include "../memory/instance_matching.h"
#include "../memory/memory_update.h"
#include "../memory/unfold.h"
#include "cuda_harness.h"
#include "rounding.h"

namespace {

using namespace ssmkernels;
using namespace ssmkernels::test;

struct Setup {
  const char* name;
  bool tf32;
};

struct Shape {
  int64_t rows, slots, dim, classes;
  bool sorted = false;
  bool transposed = false;
  int64_t padding = 0;  // of bank rows
  double temperature = 0.1;
  bool wild_labels = false;
  int64_t offset = 0;  // elements before the first of a bank or of queries: they start where 16 bytes do not
};

// What rounding may do to queries and slots of unit length, cf. python_tests/ops/bounds/memory.py.
struct Bounds {
  double logit;   // absolute error of a logit
  double weight;  // relative error of a softmax weight, and absolute of a log-normaliser
  double mean;    // error of the norm of a mean of slots under such weights

  template <class Storage>
  static Bounds of(const Shape& s, bool tf32, Storage) {
    using R = Rounding<Storage>;
    constexpr double kLogs = 100;  // |log p| is below it, and so is log K
    Bounds bounds;
    bounds.logit = (R::gamma(static_cast<double>(s.dim) + 3) + (tf32 ? 2 * kTf32 : 0)) / s.temperature;
    // The exponent is a sum of a logit, log p and a reference, rounded at each; the largest logit is 1/t.
    const double exponent = bounds.logit + R::kUnit * ((kExpUnits + 1) * kLogs + 3 * (1 / s.temperature + kLogs));
    const double slots = static_cast<double>(s.slots);
    bounds.weight = std::expm1(2 * exponent) + R::gamma(slots + 2 * kExpUnits + 8);
    bounds.mean = bounds.weight + R::gamma(slots + 3) + R::kHalf + (tf32 ? 2 * kTf32 : 0);
    if (std::is_same_v<Storage, float16>) bounds.mean += slots * std::ldexp(1.0, -24);  // weights below its range
    return bounds;
  }
};

// Each element to within its share of itself and an absolute error; a half type's subnormal numbers may be 0.
template <class Real>
void compare(const Guarded<Real>& out, const Values& expected, double relative, double absolute, const char* what) {
  double worst = out.size() == expected.size() ? 0 : std::numeric_limits<double>::infinity();
  const double tiny = std::numeric_limits<Real>::min();
  for (size_t i = 0; i < std::min(out.size(), expected.size()); ++i) {
    if (out[i] == expected[i]) continue;  // infinities
    const double error = std::fabs(out[i] - expected[i]), allowed = relative * std::fabs(expected[i]) + absolute + tiny;
    worst = error / allowed <= worst ? worst : error / allowed;  // NaN sticks
  }
  check(worst <= 1, what, worst);
}

// Rows of a matrix, each to within an error of its norm.
template <class Real>
void compare_rows(const Guarded<Real>& out, const Values& expected, int64_t rows, double allowed, const char* what) {
  bool good = out.size() == expected.size();
  const int64_t dim = rows > 0 ? static_cast<int64_t>(expected.size()) / rows : 0;
  double worst = 0;
  for (int64_t i = 0; good && i < rows; ++i) {
    Values difference(dim);
    for (int64_t d = 0; d < dim; ++d) difference[d] = out[i * dim + d] - expected[i * dim + d];
    const double error = norm(difference);
    worst = error <= worst ? worst : error;
  }
  check(good && worst <= allowed + std::numeric_limits<Real>::min(), what, worst / allowed);
}

template <class Storage>
struct Problem {
  using Real = Compute<Storage>;
  Shape shape;
  Guarded<Storage> queries, features;
  Storage *query_weak, *query_strong, *bank;
  Guarded<Real> probs, grad;
  Guarded<int64_t> labels;
  Values weak, strong, slots, class_probs, class_grads;  // as stored

  Problem(const Shape& s, std::mt19937& random)
      : shape(s),
        queries(s.offset + 2 * s.rows * s.dim),
        features(s.offset +
                 (s.transposed ? s.dim * s.slots : std::max<int64_t>(s.slots * (s.dim + s.padding) - s.padding, 0))),
        query_weak(queries.data() + s.offset),
        query_strong(query_weak + s.rows * s.dim),
        bank(features.data() + s.offset),
        probs(s.rows * s.classes),
        grad(s.rows * s.classes),
        labels(s.slots) {
    std::normal_distribution<double> normal;
    std::uniform_real_distribution<double> uniform;
    const auto unit_rows = [&](int64_t rows, auto at) {
      Values all;
      for (int64_t i = 0; i < rows; ++i) {
        Values row(s.dim);
        for (double& x : row) x = normal(random);
        const double length = norm(row);
        for (int64_t d = 0; d < s.dim; ++d) {
          at(i, d) = host::from_real<Storage>(static_cast<Real>(row[d] / length));
          all.push_back(host::to_real(at(i, d)));
        }
      }
      return all;
    };
    weak = unit_rows(s.rows, [&](int64_t i, int64_t d) -> Storage& { return query_weak[i * s.dim + d]; });
    strong = unit_rows(s.rows, [&](int64_t i, int64_t d) -> Storage& { return query_strong[i * s.dim + d]; });
    slots = unit_rows(s.slots, [&](int64_t i, int64_t d) -> Storage& {
      return bank[s.transposed ? d * s.slots + i : i * (s.dim + s.padding) + d];
    });
    for (int64_t j = 0; j < s.slots; ++j) labels[j] = static_cast<int64_t>(uniform(random) * s.classes);
    if (s.wild_labels)
      for (int64_t j = 0; j < s.slots; j += 5) labels[j] = j % 2 ? -1 : s.classes + j * 1000000007;
    if (s.sorted) std::sort(labels.data(), labels.data() + s.slots);
    for (int64_t i = 0; i < s.rows; ++i)
      for (int64_t c = 0; c < s.classes; ++c) {
        const bool zero = i % 3 == 1 || uniform(random) < 0.2;  // every third row is zero throughout
        probs[i * s.classes + c] = zero ? Real(0) : static_cast<Real>(std::pow(uniform(random), 6));
        grad[i * s.classes + c] = static_cast<Real>(1e-3 * normal(random));
      }
    class_probs.assign(probs.data(), probs.data() + probs.size());
    class_grads.assign(grad.data(), grad.data() + grad.size());
  }

  Bank<Storage> view() const {
    return {bank,
            labels.data(),
            shape.slots,
            shape.dim,
            shape.classes,
            shape.transposed ? 1 : shape.dim + shape.padding,
            shape.transposed ? shape.slots : 1};
  }
  bool of_class(int64_t j) const {
    return labels[j] >= 0 && labels[j] < shape.classes;
  }
  Values scores(const Values& query, int64_t row) const {
    Values out(shape.slots);
    for (int64_t j = 0; j < shape.slots; ++j) {
      double dot = 0;
      for (int64_t d = 0; d < shape.dim; ++d) dot += query[row * shape.dim + d] * slots[j * shape.dim + d];
      out[j] = dot / shape.temperature;
    }
    return out;
  }
};

// softmax of x + log factor; returns the log-normaliser.
double softmax(const Values& x, const Values& factor, Values& out) {
  const double infinity = std::numeric_limits<double>::infinity();
  double top = -infinity, sum = 0;
  for (size_t j = 0; j < x.size(); ++j) top = std::max(top, x[j] + std::log(factor[j]));
  out.assign(x.size(), 0);
  if (top == -infinity) return top;
  for (size_t j = 0; j < x.size(); ++j) sum += out[j] = std::exp(x[j] + std::log(factor[j]) - top);
  for (double& q : out) q /= sum;
  return top + std::log(sum);
}

struct Expected {
  Values log_weak, log_target, log_strong, aggregated, target_logit, target_mean, strong_mean;
  Values pseudo_probs, loss, gradient, unfolded, grad_query;
};

constexpr double kAlpha = 0.9;

template <class Storage>
Expected reference(const Problem<Storage>& problem) {
  const Shape& s = problem.shape;
  Expected e;
  for (int64_t i = 0; i < s.rows; ++i) {
    const Values w = problem.scores(problem.weak, i), x = problem.scores(problem.strong, i), ones(s.slots, 1.0);
    Values p(s.slots, 0.0), q_weak, q_strong, q_target;
    for (int64_t j = 0; j < s.slots; ++j)
      if (problem.of_class(j)) p[j] = problem.class_probs[i * s.classes + problem.labels[j]];
    e.log_weak.push_back(softmax(w, ones, q_weak));
    e.log_strong.push_back(softmax(x, ones, q_strong));
    e.log_target.push_back(softmax(w, p, q_target));
    if (std::isinf(e.log_target.back())) q_target = q_weak;
    Values aggregated(s.classes, 0.0), target_mean(s.dim, 0.0), strong_mean(s.dim, 0.0), grad(s.dim, 0.0);
    double logit = 0, mean_grad = 0;
    for (int64_t j = 0; j < s.slots; ++j) {
      logit += q_target[j] * x[j];
      if (!problem.of_class(j)) continue;
      aggregated[problem.labels[j]] += q_weak[j];
      mean_grad += q_weak[j] * problem.class_grads[i * s.classes + problem.labels[j]];
    }
    for (int64_t j = 0; j < s.slots; ++j) {
      const double g = problem.of_class(j) ? problem.class_grads[i * s.classes + problem.labels[j]] : 0;
      for (int64_t d = 0; d < s.dim; ++d) {
        const double value = problem.slots[j * s.dim + d];
        target_mean[d] += q_target[j] * value;
        strong_mean[d] += q_strong[j] * value;
        grad[d] += q_weak[j] * (g - mean_grad) * value / s.temperature;
      }
    }
    e.target_logit.push_back(logit);
    e.loss.push_back(e.log_strong.back() - logit);
    for (int64_t c = 0; c < s.classes; ++c) {
      e.aggregated.push_back(aggregated[c]);
      e.pseudo_probs.push_back(kAlpha * problem.class_probs[i * s.classes + c] + (1 - kAlpha) * aggregated[c]);
    }
    for (int64_t d = 0; d < s.dim; ++d) {
      e.target_mean.push_back(target_mean[d]);
      e.strong_mean.push_back(strong_mean[d]);
      e.gradient.push_back((strong_mean[d] - target_mean[d]) / s.temperature);
      e.grad_query.push_back(grad[d]);
    }
    e.unfolded.insert(e.unfolded.end(), q_target.begin(), q_target.end());
  }
  return e;
}

template <class Storage>
void test_products(const Setup& setup, const Shape& s, std::mt19937& random) {
  using Real = Compute<Storage>;
  context = std::string(setup.name) + " B " + std::to_string(s.rows) + " K " + std::to_string(s.slots) + " D " +
            std::to_string(s.dim) + " L " + std::to_string(s.classes) + (s.sorted ? " sorted" : "") +
            (s.transposed ? " transposed" : "") + " t " + std::to_string(s.temperature);
  const Problem<Storage> problem(s, random);
  const Expected e = reference(problem);
  const Bounds bounds = Bounds::of(s, setup.tf32, Storage{});
  // Σ q̂ s: of the logits, whose largest is 1/t, and of their weights.
  const double steepest = 1 / s.temperature, target_logit_error = 2 * bounds.logit + 2 * bounds.weight * steepest;
  const double gamma6 = Rounding<Storage>::gamma(6);

  const InstanceMatching<Storage> matching{problem.query_weak,
                                           problem.query_strong,
                                           problem.probs.data(),
                                           problem.view(),
                                           s.rows,
                                           s.temperature,
                                           s.temperature,
                                           setup.tf32};
  for (const bool with_gradient : {true, false}) {
    const Workspace workspace(cuda::instance_matching_workspace(matching, with_gradient));
    Guarded<Real> pseudo_probs(s.rows * s.classes), loss(s.rows), gradient(s.rows * s.dim);
    const char* error = cuda::instance_matching(
        matching, {pseudo_probs.data(), loss.data(), with_gradient ? gradient.data() : nullptr, kAlpha},
        workspace.data(), nullptr);
    succeeds(error, "instance_matching");
    compare(pseudo_probs, e.pseudo_probs, bounds.weight + gamma6, 0, "pseudo_probs");
    compare(loss, e.loss, gamma6, bounds.weight + target_logit_error, "loss");
    if (with_gradient) compare_rows(gradient, e.gradient, s.rows, (2 * bounds.mean + gamma6) * steepest, "gradient");
  }
  for (const bool with_means : {true, false}) {
    const Workspace workspace(cuda::instance_matching_workspace(matching, with_means));
    Guarded<Real> log_weak(s.rows), log_target(s.rows), log_strong(s.rows), aggregated(s.rows * s.classes),
        target_logit(s.rows), target_mean(s.rows * s.dim), strong_mean(s.rows * s.dim);
    const char* error = cuda::instance_matching_partial(
        matching,
        {log_weak.data(), log_target.data(), log_strong.data(), aggregated.data(), target_logit.data(),
         with_means ? target_mean.data() : nullptr, with_means ? strong_mean.data() : nullptr},
        workspace.data(), nullptr);
    succeeds(error, "instance_matching_partial");
    compare(log_weak, e.log_weak, gamma6, bounds.weight, "log_weak");
    compare(log_strong, e.log_strong, gamma6, bounds.weight, "log_strong");
    compare(log_target, e.log_target, gamma6, bounds.weight, "log_target");
    compare(target_logit, e.target_logit, 0, target_logit_error, "target_logit");
    compare(aggregated, e.aggregated, bounds.weight, 0, "aggregated");
    if (with_means) {
      compare_rows(target_mean, e.target_mean, s.rows, bounds.mean, "target_mean");
      compare_rows(strong_mean, e.strong_mean, s.rows, bounds.mean, "strong_mean");
    }
  }

  const Aggregate<Storage> aggregation{problem.query_weak, problem.view(), s.rows, s.temperature, setup.tf32};
  {
    const Workspace workspace(cuda::aggregate_workspace(aggregation));
    Guarded<Real> aggregated(s.rows * s.classes), log_normalizer(s.rows), again(s.rows * s.classes),
        grad_query(s.rows * s.dim);
    const char* error =
        cuda::aggregate(aggregation, {aggregated.data(), log_normalizer.data()}, workspace.data(), nullptr);
    succeeds(error, "aggregate");
    compare(aggregated, e.aggregated, bounds.weight, 0, "aggregate");
    compare(log_normalizer, e.log_weak, gamma6, bounds.weight, "log_normalizer");
    set_seed(1);
    const Workspace other_workspace(cuda::aggregate_workspace(aggregation));
    succeeds(cuda::aggregate(aggregation, {again.data(), log_normalizer.data()}, other_workspace.data(), nullptr),
             "aggregate");
    set_seed(0);
    check(std::memcmp(aggregated.data(), again.data(), aggregated.size() * sizeof(Real)) == 0,
          "the same bits in another order of warps");

    const Workspace backward_workspace(cuda::aggregate_workspace(aggregation));
    error = cuda::aggregate_backward(aggregation,
                                     {problem.grad.data(), aggregated.data(), log_normalizer.data(), grad_query.data()},
                                     backward_workspace.data(), nullptr);
    succeeds(error, "aggregate_backward");
    // Each weight's error times what it weighs, g less its mean, and the error of that mean.
    double largest = 0;
    for (const double g : problem.class_grads) largest = std::max(largest, std::fabs(g));
    const double error_of_grads = Rounding<Storage>::gamma(static_cast<double>(s.classes) + 8) + bounds.weight;
    compare_rows(grad_query, e.grad_query, s.rows, 2 * largest * (bounds.mean + error_of_grads) * steepest,
                 "grad_query");
  }
  {
    Guarded<Real> unfolded(s.rows * s.slots);
    const Unfold<Storage> unfolding{problem.query_weak, problem.probs.data(), problem.view(), s.rows,
                                    s.temperature,      setup.tf32,           unfolded.data()};
    const Workspace workspace(cuda::unfold_workspace(unfolding));
    const char* error = cuda::unfold(unfolding, workspace.data(), nullptr);
    succeeds(error, "unfold");
    compare(unfolded, e.unfolded, bounds.weight, 0, "unfolded");
  }
}

template <class Storage>
void test_empty(const Setup& setup, std::mt19937& random) {
  using Real = Compute<Storage>;
  context = std::string(setup.name) + " empty";
  const Problem<Storage> problem({3, 0, 5, 4}, random);
  const InstanceMatching<Storage> matching{
      problem.query_weak, problem.query_strong, problem.probs.data(), problem.view(), 3, 0.1, 0.1, setup.tf32};
  const Workspace workspace(cuda::instance_matching_workspace(matching, true));
  Guarded<Real> logs(9), aggregated(12), logit(3), target_mean(15), strong_mean(15);
  const InstanceMatchingPartial<Real> partial{logs.data(),  logs.data() + 3,    logs.data() + 6,   aggregated.data(),
                                              logit.data(), target_mean.data(), strong_mean.data()};
  const char* error = cuda::instance_matching_partial(matching, partial, workspace.data(), nullptr);
  succeeds(error, "instance_matching_partial");
  for (size_t i = 0; i < logs.size(); ++i) check(std::isinf(logs[i]) && logs[i] < 0, "log-normaliser", logs[i]);
  compare(aggregated, Values(12), 0, 0, "aggregated");
  compare(logit, Values(3), 0, 0, "target_logit");
  compare(target_mean, Values(15), 0, 0, "target_mean");
  compare(strong_mean, Values(15), 0, 0, "strong_mean");

  const Problem<Storage> no_rows({0, 7, 5, 4}, random);
  const InstanceMatching<Storage> none{
      no_rows.query_weak, no_rows.query_strong, no_rows.probs.data(), no_rows.view(), 0, 0.1, 0.1, setup.tf32};
  succeeds(cuda::instance_matching(none, {nullptr, nullptr, nullptr, kAlpha}, nullptr, nullptr), "no rows");
}

template <class Storage>
void test_update(const Setup& setup, int64_t rows, int64_t slots, int64_t dim, bool transposed, std::mt19937& random) {
  using Real = Compute<Storage>;
  context = std::string(setup.name) + " update B " + std::to_string(rows) + " K " + std::to_string(slots) + " D " +
            std::to_string(dim);
  constexpr double kMomentum = 0.7;
  constexpr int64_t kLabelStride = 2;
  Guarded<Storage> bank(slots * dim), added(rows * dim);
  Guarded<int64_t> labels(slots * kLabelStride), index(rows), new_labels(rows);
  std::normal_distribution<double> normal;
  for (size_t i = 0; i < bank.size(); ++i) bank[i] = host::from_real<Storage>(static_cast<Real>(normal(random)));
  for (size_t i = 0; i < added.size(); ++i) added[i] = host::from_real<Storage>(static_cast<Real>(normal(random)));
  for (size_t i = 0; i < labels.size(); ++i) labels[i] = -7;
  for (int64_t i = 0; i < rows; ++i) {
    index[i] = i % 11 == 7 ? (i % 2 ? -1 : slots + i) : static_cast<int64_t>(random() % slots);
    new_labels[i] = i;
  }
  const int64_t row_stride = transposed ? 1 : dim, column_stride = transposed ? slots : 1;
  using R = Rounding<Storage>;
  Bounded expected(bank.size());
  for (size_t i = 0; i < bank.size(); ++i) expected.value[i] = host::to_real(bank[i]);
  std::vector<int64_t> expected_labels(labels.data(), labels.data() + labels.size());
  for (int64_t i = 0; i < rows; ++i) {
    if (index[i] < 0 || index[i] >= slots) continue;
    Values x(dim), errors(dim);
    double along = 0;
    const auto place = [&](int64_t d) { return index[i] * row_stride + d * column_stride; };
    for (int64_t d = 0; d < dim; ++d) {
      const double old = kMomentum * expected.value[place(d)],
                   added_part = (1 - kMomentum) * host::to_real(added[i * dim + d]);
      x[d] = old + added_part;
      errors[d] = kMomentum * expected.error[place(d)] + R::gamma(3) * (std::fabs(old) + std::fabs(added_part));
      along += std::fabs(x[d]) * errors[d];
    }
    // A slot is rounded each time that it is written, and its error goes into the next.
    const double length = std::max(norm(x), 1e-12), length_error = along / length + R::gamma(dim + 3.0) * length;
    for (int64_t d = 0; d < dim; ++d) {
      const double unit = x[d] / length,
                   error = (errors[d] + std::fabs(unit) * length_error) / length + R::gamma(2) * std::fabs(unit);
      expected.set(place(d), unit, error + R::kHalf * (std::fabs(unit) + error) + R::kHalfTiny);
    }
    expected_labels[index[i] * kLabelStride] = i;
  }
  const char* error =
      cuda::memory_update<Storage>({bank.data(), labels.data(), index.data(), added.data(), new_labels.data(), slots,
                                    dim, rows, row_stride, column_stride, kLabelStride, kMomentum},
                                   nullptr);
  succeeds(error, "memory_update");
  Guarded<Real> updated(bank.size());
  for (size_t i = 0; i < bank.size(); ++i) updated[i] = host::to_real(bank[i]);
  compare_within(updated, expected, "features");
  check(std::memcmp(labels.data(), expected_labels.data(), labels.size() * sizeof(int64_t)) == 0, "labels");
}

// NaN in a query shows in that row alone; NaN in a slot in every row.
template <class Storage>
void test_not_finite(const Setup& setup, bool in_slot, std::mt19937& random) {
  using Real = Compute<Storage>;
  constexpr int64_t kRows = 5, kSlots = 70, kDim = 17, kClasses = 4, kRow = 2;
  context = std::string(setup.name) + (in_slot ? " NaN in a slot" : " NaN in a query");
  const Problem<Storage> problem({kRows, kSlots, kDim, kClasses}, random);
  const Storage nan = host::from_real<Storage>(std::numeric_limits<Real>::quiet_NaN());
  if (in_slot) {
    problem.bank[40 * kDim + 3] = nan;
  } else {
    problem.query_weak[kRow * kDim + 3] = problem.query_strong[kRow * kDim + 3] = nan;
  }
  const auto check_rows = [&](const Guarded<Real>& out, const char* what) {
    const int64_t width = static_cast<int64_t>(out.size()) / kRows;
    bool right = true;
    for (int64_t i = 0; i < kRows * width; ++i) right &= std::isnan(out[i]) == (in_slot || i / width == kRow);
    check(right, what);
  };
  const InstanceMatching<Storage> matching{
      problem.query_weak, problem.query_strong, problem.probs.data(), problem.view(), kRows, 0.1, 0.1, setup.tf32};
  {
    const Workspace workspace(cuda::instance_matching_workspace(matching, true));
    const Guarded<Real> pseudo_probs(kRows * kClasses), loss(kRows), gradient(kRows * kDim);
    succeeds(cuda::instance_matching(matching, {pseudo_probs.data(), loss.data(), gradient.data(), kAlpha},
                                     workspace.data(), nullptr),
             "instance_matching");
    check_rows(pseudo_probs, "pseudo_probs");
    check_rows(loss, "loss");
    check_rows(gradient, "gradient");
  }
  {
    const Aggregate<Storage> aggregation{problem.query_weak, problem.view(), kRows, 0.1, setup.tf32};
    const Workspace workspace(cuda::aggregate_workspace(aggregation)),
        backward_workspace(cuda::aggregate_workspace(aggregation));
    const Guarded<Real> aggregated(kRows * kClasses), log_normalizer(kRows), grad_query(kRows * kDim);
    succeeds(cuda::aggregate(aggregation, {aggregated.data(), log_normalizer.data()}, workspace.data(), nullptr),
             "aggregate");
    succeeds(cuda::aggregate_backward(
                 aggregation, {problem.grad.data(), aggregated.data(), log_normalizer.data(), grad_query.data()},
                 backward_workspace.data(), nullptr),
             "aggregate_backward");
    check_rows(aggregated, "aggregated");
    check_rows(log_normalizer, "log_normalizer");
    check_rows(grad_query, "grad_query");
  }
  const Guarded<Real> unfolded(kRows * kSlots);
  const Unfold<Storage> unfolding{problem.query_weak, problem.probs.data(), problem.view(), kRows, 0.1,
                                  setup.tf32,         unfolded.data()};
  const Workspace workspace(cuda::unfold_workspace(unfolding));
  succeeds(cuda::unfold(unfolding, workspace.data(), nullptr), "unfold");
  check_rows(unfolded, "unfolded");
}

// NaN in a new feature makes its slot NaN, and no other.
template <class Storage>
void test_update_not_finite(const Setup& setup) {
  using Real = Compute<Storage>;
  constexpr int64_t kSlots = 4, kDim = 37;
  context = std::string(setup.name) + " update with NaN";
  const Guarded<Storage> bank(kSlots * kDim), added(2 * kDim);
  const Guarded<int64_t> labels(kSlots), index(std::vector<int64_t>{2, 1}), new_labels(std::vector<int64_t>{0, 1});
  for (size_t i = 0; i < bank.size(); ++i) bank[i] = host::from_real<Storage>(Real(1));
  for (size_t i = 0; i < added.size(); ++i) added[i] = host::from_real<Storage>(Real(1));
  added[5] = host::from_real<Storage>(std::numeric_limits<Real>::quiet_NaN());
  succeeds(cuda::memory_update<Storage>({bank.data(), labels.data(), index.data(), added.data(), new_labels.data(),
                                         kSlots, kDim, 2, kDim, 1, 1, 0.7},
                                        nullptr),
           "memory_update");
  bool right = true;
  for (int64_t i = 0; i < kSlots * kDim; ++i) right &= std::isnan(host::to_real(bank[i])) == (i / kDim == 2);
  check(right, "features");
}

// The order of a large bank is kept between calls, and found anew when a label is another than before.
template <class Storage>
void test_kept_order(const Setup& setup, int64_t classes, std::mt19937& random) {
  using Real = Compute<Storage>;
  constexpr int64_t kRows = 3, kSlots = 4200, kDim = 8;
  context = std::string(setup.name) + " kept order of " + std::to_string(classes) + " classes";
  const Problem<Storage> problem({kRows, kSlots, kDim, classes}, random);
  const Guarded<unsigned char> kept(cuda::kept_class_order_bytes(kSlots, classes));
  check(kept.size() > 0, "memory");
  std::memset(kept.data(), 0, kept.size());
  Bank<Storage> remembering = problem.view();
  remembering.class_order = kept.data();
  const auto aggregate = [&](const Bank<Storage>& bank, const Guarded<Real>& out) {
    const Guarded<Real> log_normalizer(kRows);
    const Aggregate<Storage> aggregation{problem.query_weak, bank, kRows, 0.1, setup.tf32};
    const Workspace workspace(cuda::aggregate_workspace(aggregation));
    succeeds(cuda::aggregate(aggregation, {out.data(), log_normalizer.data()}, workspace.data(), nullptr), "aggregate");
  };
  // How often it was sorted stands behind the arrivals at barriers (OrderState).
  const auto sorts = [&] { return reinterpret_cast<const unsigned long long*>(kept.data())[1]; };
  const Guarded<Real> out(kRows * classes), expected(kRows * classes);
  const auto check_call = [&](unsigned long long times, const char* what) {
    aggregate(problem.view(), expected);
    aggregate(remembering, out);
    check(out.same_bits(expected), what);
    check(sorts() == times, "times sorted", static_cast<double>(sorts()));
  };
  check_call(1, "first call");
  check_call(1, "the same labels");
  problem.labels[4199] = (problem.labels[4199] + 1) % classes;
  check_call(2, "another label");
  problem.labels[0] = -1;
  check_call(3, "a label of no class");
  problem.labels[0] = classes + 5;  // of no class either
  check_call(3, "another label of no class");
  std::reverse(problem.labels.data(), problem.labels.data() + kSlots);
  check_call(4, "all labels");
}

#ifdef SSM_CUDA_EMULATOR
// Small calls are three launches, packed or not.
template <class Storage>
void test_launches(const Setup& setup, int64_t dim, std::mt19937& random) {
  using Real = Compute<Storage>;
  constexpr int64_t kRows = 64, kSlots = 4000, kClasses = 10;
  context = std::string(setup.name) + " launches, D " + std::to_string(dim);
  const Problem<Storage> problem({kRows, kSlots, dim, kClasses}, random);
  const auto count = [&](const char* what, const auto& call) {
    const unsigned before = launches();
    succeeds(call(), what);
    check(launches() - before <= 3, what, launches() - before);
  };
  const Guarded<Real> by_class(kRows * kClasses), by_row(kRows), by_dim(kRows * dim), by_slot(kRows * kSlots);
  const InstanceMatching<Storage> matching{
      problem.query_weak, problem.query_strong, problem.probs.data(), problem.view(), kRows, 0.1, 0.1, setup.tf32};
  const Workspace matching_workspace(cuda::instance_matching_workspace(matching, true));
  count("instance_matching", [&] {
    return cuda::instance_matching(matching, {by_class.data(), by_row.data(), by_dim.data(), kAlpha},
                                   matching_workspace.data(), nullptr);
  });
  const Aggregate<Storage> aggregation{problem.query_weak, problem.view(), kRows, 0.1, setup.tf32};
  const Workspace aggregate_workspace(cuda::aggregate_workspace(aggregation));
  count("aggregate", [&] {
    return cuda::aggregate(aggregation, {by_class.data(), by_row.data()}, aggregate_workspace.data(), nullptr);
  });
  count("aggregate_backward", [&] {
    return cuda::aggregate_backward(aggregation, {problem.grad.data(), by_class.data(), by_row.data(), by_dim.data()},
                                    aggregate_workspace.data(), nullptr);
  });
  const Unfold<Storage> unfolding{problem.query_weak, problem.probs.data(), problem.view(), kRows, 0.1,
                                  setup.tf32,         by_slot.data()};
  const Workspace unfold_workspace(cuda::unfold_workspace(unfolding));
  count("unfold", [&] { return cuda::unfold(unfolding, unfold_workspace.data(), nullptr); });
}
#endif

template <class Storage>
void test_all(const Setup& setup) {
  std::mt19937 random(1234);
  const int64_t all_rows[] = {1, 3, 17, 70}, all_slots[] = {1, 17, 123, 507},
                all_dims[] = {0, 1, 3, 17, 64, 128, 200, 512}, all_classes[] = {1, 3, 10, 300};
  // Each pair of sizes meets; wide and long ones are not combined, to keep the time short.
  int turn = 0;
  for (const int64_t dim : all_dims)
    for (const int64_t slots : all_slots) {
      const int64_t rows = all_rows[dim * slots > 30000 ? turn % 3 : turn % 4];
      set_multiprocessors(turn % 3 + 1);
      set_shared_limit((turn % 4 == 1 ? 99 : 227) * 1024);  // sm_89, sm_90
      Shape shape{rows, slots, dim, all_classes[(turn / 4 + turn) % 4]};
      shape.sorted = turn % 2 == 0;
      shape.transposed = turn % 5 == 3;
      shape.padding = !shape.transposed && turn % 3 == 1 ? 3 : 0;
      shape.wild_labels = turn % 4 == 2;
      test_products<Storage>(setup, shape, random);
      ++turn;
    }
  set_multiprocessors(2);
  set_shared_limit(227 * 1024);
  test_products<Storage>(setup, {17, 123, 64, 10, false, false, 0, 1e-4}, random);  // logits to ±1e4
  test_products<Storage>(setup, {3, 507, 8, 3, true, false, 8, 1e-4, true}, random);
  test_products<Storage>(setup, {3, 1100, 16, 5000, false}, random);  // two digits of classes
  test_products<Storage>(setup, {17, 123, 64, 10, false, false, 0, 0.1, false, 1}, random);
  test_products<Storage>(setup, {17, 123, 100, 10, false, true, 0, 0.1, false, 1}, random);
  test_products<Storage>(setup, {3, 4200, 5, 10, false, false, 0, 0.1, true}, random);  // many slots
  test_products<Storage>(setup, {200, 123, 64, 10}, random);  // two groups of rows, the last not whole
  for (const int64_t classes : {7, 2500}) test_kept_order<Storage>(setup, classes, random);
#ifdef SSM_CUDA_EMULATOR
  if (sizeof(Storage) < 8)
    for (const int64_t dim : {5, 16}) test_launches<Storage>(setup, dim, random);
#endif
  test_empty<Storage>(setup, random);
  for (const bool in_slot : {false, true}) test_not_finite<Storage>(setup, in_slot, random);
  test_update_not_finite<Storage>(setup);
  for (const int64_t dim : {0, 1, 3, 17, 128, 200}) {
    test_update<Storage>(setup, 70, 50, dim, false, random);
    test_update<Storage>(setup, 17, 2, dim, true, random);
  }
}

}  // namespace

int main() {
  return run_tests([] {
    test_all<float>({"float32", false});
    test_all<float>({"tf32", true});
    test_all<double>({"float64", false});
    test_all<bfloat16>({"bfloat16", false});
    test_all<float16>({"float16", false});
  });
}
