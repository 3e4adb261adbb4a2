// SPDX-License-Identifier: BSD-3-Clause
// The CUDA kernels of the pairs family against a double loop over pairs and hidden units in double precision. Inputs,
// outputs and workspace start as NaN, so that an unwritten element shows; see cuda_harness.h.
#include <algorithm>
#include <limits>
#include <random>
#include <type_traits>

#include "../pairs/pair_focal_loss.h"
#include "../pairs/pair_logits.h"
#include "cuda_harness.h"

namespace {

using namespace ssmkernels;
using namespace ssmkernels::test;

struct Setup {
  const char* name;
  double logits;     // relative error of logits, in the norm
  double gradients;  // and of gradients
};

struct Shape {
  Interaction interaction;
  int64_t x_rows, y_rows, features, hidden;  // concat has no features but its hidden units
  int64_t listed = -1;                       // all pairs
  double gamma = 2;
  bool balanced = true;
  bool brief = false;  // the loss with its gradients, and nothing else
  bool ignores_all = false;
  double grad_scale = 1;
};

template <class Storage>
struct Problem {
  using Real = Compute<Storage>;
  Shape shape;
  int64_t width, count;
  Guarded<Storage> x, y, w1;
  Guarded<Real> b1, w2, b2, grad;
  Guarded<int64_t> pairs, x_labels, y_labels;

  Problem(const Shape& s, std::mt19937& random)
      : shape(s),
        width(s.interaction == Interaction::concat ? s.hidden : s.features),
        count(s.listed < 0 ? s.x_rows * s.y_rows : s.listed),
        x(s.x_rows * width),
        y(s.y_rows * width),
        w1(is_concat() ? 0 : s.hidden * width),
        b1(is_concat() ? 0 : s.hidden),
        w2(s.hidden),
        b2(1),
        grad(count),
        pairs(s.listed < 0 ? 0 : 2 * s.listed),
        x_labels(s.x_rows),
        y_labels(s.y_rows) {
    std::normal_distribution<double> normal;
    const auto fill = [&](auto& out, double scale) {
      using Element = std::remove_reference_t<decltype(out[0])>;
      for (size_t i = 0; i < out.size(); ++i)
        out[i] = host::from_real<Element>(static_cast<Compute<Element>>(scale * normal(random)));
    };
    fill(x, 1);
    fill(y, 1);
    fill(w1, 1 / std::sqrt(width + 1.0));
    fill(b1, 0.3);
    fill(w2, 2 / std::sqrt(s.hidden + 1.0));
    fill(b2, 0.3);
    fill(grad, s.grad_scale);
    for (int64_t d = 0; d < width && s.x_rows > 1 && s.y_rows > 1; ++d)
      y[width + d] = x[width + d];  // |x − y| has no derivative there
    const auto label = [&](auto& labels) {
      for (size_t i = 0; i < labels.size(); ++i)
        labels[i] = s.ignores_all || random() % 7 == 0 ? kIgnored : random() % 3;
    };
    label(x_labels);
    label(y_labels);
    for (int64_t k = 0; k < s.listed; ++k) {
      pairs[2 * k] = s.x_rows > 0 ? random() % s.x_rows : 0;
      pairs[2 * k + 1] = s.y_rows > 0 ? random() % s.y_rows : 0;
      if (k % 11 == 3)
        pairs[2 * k + k % 2] = k % 3 == 0 ? -1 : k % 3 == 1 ? (k % 2 ? s.y_rows : s.x_rows) : int64_t{1} << 60;
    }
  }

  static constexpr int64_t kIgnored = -1;

  bool is_concat() const {
    return shape.interaction == Interaction::concat;
  }
  PairNetwork<Storage> view() const {
    return {shape.interaction,
            x.data(),
            y.data(),
            w1.data(),
            b1.data(),
            w2.data(),
            b2.data(),
            pairs.size() == 0 ? nullptr : pairs.data(),
            shape.x_rows,
            shape.y_rows,
            width,
            shape.hidden,
            count};
  }
  FocalLoss focal() const {
    return {x_labels.data(),           y_labels.data(),           kIgnored,
            shape.balanced ? 0.25 : 1, shape.balanced ? 0.75 : 1, shape.gamma};
  }
  // Whether there is a pair k: (i, j).
  bool pair(int64_t k, int64_t& i, int64_t& j) const {
    i = shape.listed < 0 ? k / shape.y_rows : pairs[2 * k];
    j = shape.listed < 0 ? k % shape.y_rows : pairs[2 * k + 1];
    return i >= 0 && i < shape.x_rows && j >= 0 && j < shape.y_rows;
  }
};

struct Gradients {
  Values x, y, w1, b1, w2, b2;
};

template <class Storage>
class Reference {
 public:
  explicit Reference(const Problem<Storage>& problem)
      : in(problem), logits(in.count), losses(in.count), grad_logits(in.count) {
    for (int64_t k = 0; k < in.count; ++k) {
      int64_t i, j;
      if (!in.pair(k, i, j)) continue;
      logits[k] = in.b2[0];
      for (int64_t h = 0; h < in.shape.hidden; ++h) logits[k] += in.w2[h] * std::max(unit(i, j, h), 0.0);
      if (in.x_labels[i] == in.kIgnored || in.y_labels[j] == in.kIgnored) continue;
      ++counted;
      const bool same = in.x_labels[i] == in.y_labels[j];
      const FocalLoss focal = in.focal();
      const double s = same ? logits[k] : -logits[k], weight = same ? focal.alpha_same : focal.alpha_other;
      const double surprise = std::log1p(std::exp(-std::fabs(s))) + std::max(-s, 0.0), right = 1 / (1 + std::exp(-s));
      const double wrong = 1 / (1 + std::exp(s)), power = std::pow(wrong, focal.gamma);
      losses[k] = weight * power * surprise;
      grad_logits[k] = -weight * power * (focal.gamma * right * surprise + wrong) * (same ? 1 : -1);
      total += losses[k];
    }
  }

  Gradients gradients(const Values& g) const {
    const int64_t d = in.width, hidden = in.shape.hidden, n = in.shape.x_rows, m = in.shape.y_rows;
    Gradients out{Values(n * d), Values(m * d), Values(in.w1.size()), Values(in.b1.size()), Values(hidden), Values(1)};
    for (int64_t k = 0; k < in.count; ++k) {
      int64_t i, j;
      if (!in.pair(k, i, j)) continue;
      out.b2[0] += g[k];
      for (int64_t h = 0; h < hidden; ++h) {
        const double z = unit(i, j, h);
        if (!(z > 0)) continue;
        out.w2[h] += g[k] * z;
        const double u = g[k] * in.w2[h];
        if (in.is_concat()) {
          out.x[i * d + h] += u;
          out.y[j * d + h] += u;
          continue;
        }
        out.b1[h] += u;
        for (int64_t c = 0; c < d; ++c) {
          const double a = host::to_real(in.x[i * d + c]), b = host::to_real(in.y[j * d + c]),
                       w = host::to_real(in.w1[h * d + c]);
          const bool product = in.shape.interaction == Interaction::product;
          out.w1[h * d + c] += u * phi(a, b);
          out.x[i * d + c] += u * w * (product ? b : a > b ? 1 : a < b ? -1 : 0);
          out.y[j * d + c] += u * w * (product ? a : a > b ? -1 : a < b ? 1 : 0);
        }
      }
    }
    return out;
  }

  const Problem<Storage>& in;
  Values logits, losses, grad_logits;
  double total = 0;
  int64_t counted = 0;

 private:
  // Half types: rounded, as what decides which units are active.
  double phi(double a, double b) const {
    const double exact = in.shape.interaction == Interaction::product ? a * b : std::fabs(a - b);
    return host::to_real(host::from_real<Storage>(static_cast<Compute<Storage>>(exact)));
  }
  double unit(int64_t i, int64_t j, int64_t h) const {
    const int64_t d = in.width;
    if (in.is_concat()) return double{host::to_real(in.x[i * d + h])} + host::to_real(in.y[j * d + h]);
    double z = in.b1[h];
    for (int64_t c = 0; c < d; ++c)
      z += host::to_real(in.w1[h * d + c]) * phi(host::to_real(in.x[i * d + c]), host::to_real(in.y[j * d + c]));
    return z;
  }
};

template <class Storage>
struct Output {
  using Real = Compute<Storage>;
  Guarded<Real> x, y, w1, b1, w2, b2;

  explicit Output(const Problem<Storage>& in)
      : x(in.x.size()), y(in.y.size()), w1(in.w1.size()), b1(in.b1.size()), w2(in.w2.size()), b2(1) {}

  PairGradients<Real> view() const {
    return {x.data(), y.data(), w1.data(), b1.data(), w2.data(), b2.data()};
  }
  // Sums that cancel are compared with what they sum.
  void check_against(const Gradients& expected, const Values& g, double tolerance, const char* what) const {
    const auto name = [&](const char* of) { return std::string(what) + " " + of; };
    compare_norms(x, expected.x, tolerance, name("∂x").c_str());
    compare_norms(y, expected.y, tolerance, name("∂y").c_str());
    compare_norms(w1, expected.w1, tolerance, name("∂w1").c_str());
    compare_norms(b1, expected.b1, tolerance, name("∂b1").c_str());
    compare_norms(w2, expected.w2, tolerance, name("∂w2").c_str(), norm(expected.w1));
    compare_norms(b2, expected.b2, tolerance, name("∂b2").c_str(), norm(g));
  }
  bool same_bits(const Output& other) const {
    return x.same_bits(other.x) && y.same_bits(other.y) && w1.same_bits(other.w1) && b1.same_bits(other.b1) &&
           w2.same_bits(other.w2) && b2.same_bits(other.b2);
  }
};

template <class Storage>
void test_problem(const Setup& setup, const Shape& shape, std::mt19937& random) {
  using Real = Compute<Storage>;
  const char* interactions[] = {"concat", "absdiff", "product"};
  context = std::string(setup.name) + " " + interactions[static_cast<int>(shape.interaction)] + " n " +
            std::to_string(shape.x_rows) + " m " + std::to_string(shape.y_rows) + " d " +
            std::to_string(shape.features) + " h " + std::to_string(shape.hidden) + " listed " +
            std::to_string(shape.listed) + " γ " + std::to_string(shape.gamma);
  const Problem<Storage> problem(shape, random);
  const Reference<Storage> reference(problem);
  const PairNetwork<Storage> network = problem.view();
  const FocalLoss focal = problem.focal();
  const auto workspace_bytes = [&](bool with_gradients) { return cuda::pair_workspace(network, with_gradients); };

  {
    const double scale = reference.counted > 0 ? 1.0 / reference.counted : 0;
    Values g = reference.grad_logits;
    for (double& grad_logit : g) grad_logit *= scale;
    const Output<Storage> out(problem), again(problem);
    for (const Output<Storage>* each : {&out, &again}) {
      const Workspace workspace(workspace_bytes(true));
      Guarded<Real> loss(1);
      const PairGradients<Real> gradients = each->view();
      succeeds(cuda::pair_focal_loss_sum(network, focal, {true, loss.data(), &gradients}, workspace.data(), nullptr),
               "pair_focal_loss_sum");
      compare_norms(loss, Values{reference.total * scale}, setup.logits, "mean loss");
      set_seed(1);
    }
    set_seed(0);
    out.check_against(reference.gradients(g), g, setup.gradients, "mean loss");
    check(out.same_bits(again), "the same bits in another order of warps");
  }
  if (shape.brief) return;
  for (const bool mean : {false, true}) {
    const Workspace workspace(workspace_bytes(false));
    Guarded<Real> loss(1);
    succeeds(cuda::pair_focal_loss_sum(network, focal, {mean, loss.data(), nullptr}, workspace.data(), nullptr),
             "pair_focal_loss_sum");
    compare_norms(loss, Values{mean ? reference.total / std::max<int64_t>(reference.counted, 1) : reference.total},
                  setup.logits, "loss alone");
  }
  {
    const Workspace workspace(workspace_bytes(false));
    Guarded<Real> logits(problem.count);
    succeeds(cuda::pair_logits(network, logits.data(), workspace.data(), nullptr), "pair_logits");
    compare_norms(logits, reference.logits, setup.logits, "logits");
  }
  {
    const Workspace workspace(workspace_bytes(false));
    Guarded<Real> losses(problem.count);
    succeeds(cuda::pair_focal_loss(network, focal, losses.data(), workspace.data(), nullptr), "pair_focal_loss");
    compare_norms(losses, reference.losses, setup.logits, "losses");
  }
  Values g(problem.grad.data(), problem.grad.data() + problem.count);
  {
    const Workspace workspace(workspace_bytes(true));
    const Output<Storage> out(problem);
    succeeds(cuda::pair_logits_backward(network, problem.grad.data(), out.view(), workspace.data(), nullptr),
             "pair_logits_backward");
    for (int64_t k = 0, i, j; k < problem.count; ++k)
      if (!problem.pair(k, i, j)) g[k] = 0;
    out.check_against(reference.gradients(g), g, setup.gradients, "logits");
  }
  {
    const Workspace workspace(workspace_bytes(true));
    const Output<Storage> out(problem);
    succeeds(cuda::pair_focal_loss_backward(network, focal, problem.grad.data(), out.view(), workspace.data(), nullptr),
             "pair_focal_loss_backward");
    for (int64_t k = 0; k < problem.count; ++k) g[k] *= reference.grad_logits[k];
    out.check_against(reference.gradients(g), g, setup.gradients, "losses");
  }
}

// Logits to ±1e4, exact in every type: each loss and derivative to its own size, down to what the type holds.
template <class Real>
void test_saturated(const char* name, double tolerance) {
  for (const double gamma : {0.0, 0.5, 2.0, 3.5}) {
    context = std::string(name) + " saturated γ " + std::to_string(gamma);
    const int64_t n = 3, m = 70;
    Guarded<Real> a(n), b(m), w2(1), b2(1), losses(n * m), grad(n * m), grad_a(n), grad_b(m), grad_w2(1), grad_b2(1);
    Guarded<int64_t> x_labels(n), y_labels(m);
    Guarded<int64_t> pairs(2 * n * m);
    w2[0] = 1;
    b2[0] = -10000;
    for (int64_t i = 0; i < n; ++i) a[i] = 10000, x_labels[i] = i;
    for (int64_t j = 0; j < m; ++j) {
      b[j] = static_cast<Real>(j == 0 ? -10000 : j == 1 ? 10000 : (j - 35) * 3.25);
      y_labels[j] = j % 2;
    }
    for (int64_t k = 0; k < n * m; ++k) pairs[2 * k] = k / m, pairs[2 * k + 1] = k % m;
    const FocalLoss focal{x_labels.data(), y_labels.data(), -1, 0.25, 0.75, gamma};
    for (const bool listed : {false, true}) {
      const PairNetwork<Real> network{Interaction::concat,
                                      a.data(),
                                      b.data(),
                                      nullptr,
                                      nullptr,
                                      w2.data(),
                                      b2.data(),
                                      listed ? pairs.data() : nullptr,
                                      n,
                                      m,
                                      1,
                                      1,
                                      n * m};
      const Workspace workspace(cuda::pair_workspace(network, true));
      succeeds(cuda::pair_focal_loss(network, focal, losses.data(), workspace.data(), nullptr), "pair_focal_loss");
      for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < m; ++j) {
          const bool same = x_labels[i] == y_labels[j];
          const double logit = std::max(double{a[i]} + b[j], 0.0) - 10000, s = same ? logit : -logit;
          const double surprise = std::log1p(std::exp(-std::fabs(s))) + std::max(-s, 0.0),
                       wrong = 1 / (1 + std::exp(s));
          const double loss = (same ? 0.25 : 0.75) * std::pow(wrong, gamma) * surprise;
          const double grad_logit =
              -(same ? 0.25 : -0.75) * std::pow(wrong, gamma) * (gamma / (1 + std::exp(-s)) * surprise + wrong);
          const double least = sizeof(Real) == 4 ? 1e-36 : 1e-300;
          check(std::fabs(losses[i * m + j] - loss) <= tolerance * loss + least, "loss", losses[i * m + j] / loss);
          // ∂FL/∂logit alone, as ∂b2.
          for (int64_t k = 0; k < n * m; ++k) grad[k] = k == i * m + j;
          succeeds(cuda::pair_focal_loss_backward(
                       network, focal, grad.data(),
                       {grad_a.data(), grad_b.data(), nullptr, nullptr, grad_w2.data(), grad_b2.data()},
                       workspace.data(), nullptr),
                   "pair_focal_loss_backward");
          check(std::fabs(grad_b2[0] - grad_logit) <= tolerance * std::fabs(grad_logit) + least, "grad_logit",
                grad_b2[0] / grad_logit);
          for (int64_t k = 0; k < n; ++k) check(std::isfinite(grad_a[k]), "∂A is finite");
        }
    }
  }
}

// Half types: features whose product passes the largest float16, and gradients that float16 cannot hold.
template <class Storage>
void test_range(const Setup& setup) {
  context = std::string(setup.name) + " range";
  Shape shape{Interaction::product, 9, 17, 5, 3};
  shape.grad_scale = 1e-12;
  std::mt19937 random(5);
  test_problem<Storage>(setup, shape, random);
  Problem<Storage> problem(shape, random);
  for (size_t i = 0; i < problem.x.size(); ++i) problem.x[i] = host::from_real<Storage>(i % 2 ? 300.0f : -300.0f);
  for (size_t i = 0; i < problem.y.size(); ++i) problem.y[i] = host::from_real<Storage>(300.0f);
  const Workspace workspace(cuda::pair_workspace(problem.view(), true));
  const Output<Storage> out(problem);
  Guarded<float> loss(1);
  const PairGradients<float> gradients = out.view();
  succeeds(cuda::pair_focal_loss_sum(problem.view(), problem.focal(), {true, loss.data(), &gradients}, workspace.data(),
                                     nullptr),
           "sum");
  bool finite = std::isfinite(loss[0]);
  for (const auto* each : {&out.x, &out.y, &out.w1, &out.b1, &out.w2, &out.b2})
    for (size_t i = 0; i < each->size(); ++i) finite &= static_cast<bool>(std::isfinite((*each)[i]));
  check(finite, "finite");
}

// A row of NaN makes NaN of its own logits and of no gradient of another row.
template <class Storage>
void test_not_finite(const Setup& setup, Interaction interaction, int64_t listed) {
  using Real = Compute<Storage>;
  context = std::string(setup.name) + " NaN, interaction " + std::to_string(static_cast<int>(interaction)) +
            " listed " + std::to_string(listed);
  Shape shape{interaction, 9, 17, 5, 6};
  shape.listed = listed;
  std::mt19937 random(11);
  const Problem<Storage> problem(shape, random);
  constexpr int64_t kRow = 2;
  for (int64_t c = 0; c < problem.width; ++c)
    problem.x[kRow * problem.width + c] = host::from_real<Storage>(std::numeric_limits<Real>::quiet_NaN());
  const Workspace workspace(cuda::pair_workspace(problem.view(), true));
  Guarded<Real> logits(problem.count);
  succeeds(cuda::pair_logits(problem.view(), logits.data(), workspace.data(), nullptr), "pair_logits");
  bool right = true;
  for (int64_t k = 0; k < problem.count; ++k) {
    int64_t i, j;
    right &= std::isnan(logits[k]) == (problem.pair(k, i, j) && i == kRow);
  }
  check(right, "logits");
  const Output<Storage> out(problem);
  succeeds(cuda::pair_logits_backward(problem.view(), problem.grad.data(), out.view(), workspace.data(), nullptr),
           "pair_logits_backward");
  bool finite = true;
  for (size_t k = 0; k < out.x.size(); ++k)
    finite &= static_cast<bool>(std::isfinite(out.x[k])) || k / problem.width == kRow;
  check(finite, "∂x of the other rows");
  check(std::isnan(out.w2[0]), "∂w2");
}

template <class Storage>
void test_concat(const Setup& setup) {
  for (const int64_t listed : {-1, 90}) test_not_finite<Storage>(setup, Interaction::concat, listed);
  constexpr Interaction kind = Interaction::concat;
  std::mt19937 random(1234);
  const auto test = [&](const Shape& shape) { test_problem<Storage>(setup, shape, random); };
  test({kind, 1, 1, 0, 1});
  test({kind, 3, 17, 0, 3, -1, 0});
  test({kind, 33, 65, 0, 130, -1, 0.5});
  test({kind, 70, 130, 0, 64, -1, 2, false});
  test({kind, 1, 300, 0, 17, -1, 3.5});
  test({kind, 123, 1, 0, 33});
  test({kind, 17, 3, 0, 5, -1, 2, true, false, true});  // nothing counts
  test({kind, 545, 1100, 0, 5, -1, 2, true, true});     // several tiles to a block
  test({kind, 0, 5, 0, 7});
  test({kind, 5, 0, 0, 7});
  test({kind, 4, 6, 0, 0});
  test({kind, 1, 1, 0, 1, 1});
  test({kind, 3, 17, 0, 3, 40, 0});
  test({kind, 33, 65, 0, 130, 777, 1.5});
  test({kind, 5, 700, 0, 64, 1500});            // rows that span shares of the list
  test({kind, 2100, 9, 0, 17, 600, 2, false});  // two digits of rows
  test({kind, 17, 3, 0, 5, 64, 2, true, false, true});
  test({kind, 6, 5, 0, 7, 0});
  test({kind, 0, 5, 0, 7, 3});
  test({kind, 3, 4, 0, 3, 40000, 2, true, true});  // shares longer than a warp
}

template <class Storage>
void test_interactions(const Setup& setup) {
  for (const Interaction interaction : {Interaction::absdiff, Interaction::product})
    for (const int64_t listed : {-1, 90}) test_not_finite<Storage>(setup, interaction, listed);
  std::mt19937 random(1234);
  const bool half = sizeof(Storage) == 2;
  for (const Interaction kind : {Interaction::absdiff, Interaction::product}) {
    const bool absdiff = kind == Interaction::absdiff;
    const auto test = [&](const Shape& shape) { test_problem<Storage>(setup, shape, random); };
    test({kind, 1, 1, 1, 1});
    test({kind, 3, 17, 3, 3, -1, 0});
    test({kind, 9, 33, 17, 70, -1, 0.5});
    test({kind, 9, 17, 136, 65, -1, 2, false, true});  // two chunks of each
    if (absdiff) test({kind, 17, 3, 64, 5, -1, 2, true, false, true});
    if (!half || absdiff) test({kind, 141, 273, 3, 2, -1, 2, true, true});  // several tiles to a block
    test({kind, 0, 5, 3, 7});
    test({kind, 5, 0, 3, 7});
    test({kind, 4, 6, 3, 0});
    test({kind, 4, 6, 0, 3});
    test({kind, 1, 1, 1, 1, 1});
    test({kind, 3, 17, 3, 3, 200, 1.5});
    test({kind, 33, 65, 64, 65, 300, 2, true, true});
    test({kind, 5, 9, 130, 20, 129, 2, false, true});
    test({kind, 6, 5, 3, 7, 0});
    test({kind, 0, 5, 3, 7, 3});
    if (!half)
      test({kind, 2, 2100, 3, 2, 33000, 2, true,
            true});  // several tiles to a block, runs over all of them, two digits of rows
  }
}

}  // namespace

int main() {
  return run_tests([] {
    set_shared_limit(99 * 1024);  // sm_86, sm_89
    test_concat<float>({"float32", 1e-5, 2e-5});
    test_concat<double>({"float64", 1e-12, 1e-11});
    test_saturated<float>("float32", 2e-5);
    test_saturated<double>("float64", 1e-12);
    test_interactions<float>({"float32", 1e-5, 2e-5});
    test_interactions<double>({"float64", 1e-12, 1e-11});
    const Setup bfloat{"bfloat16", 1e-2, 2e-2}, half{"float16", 2e-3, 3e-3};
    test_interactions<bfloat16>(bfloat);
    test_interactions<float16>(half);
    test_range<bfloat16>(bfloat);
    test_range<float16>(half);
  });
}
