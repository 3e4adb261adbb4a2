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
#include "rounding.h"

namespace {

using namespace ssmkernels;
using namespace ssmkernels::test;

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

// FL and |∂FL/∂logit| of a signed logit with an error, but for their weight, and their errors: FL moves by no more than
// its values at both ends, its derivative by the largest second derivative between them.
struct Focal {
  double loss, slope, loss_error, slope_error;

  // Roundings on a path: an exponential, a logarithm and a power of 2 ulp each, what is added to and divided by them,
  // and those of 1 − p_t once more for its power.
  static double units(double gamma) {
    return 3 * kExpUnits + 12 + gamma * (kExpUnits + 4);
  }

  Focal(double s, double error, double gamma, double unit) {
    const double q = 1 / (1 + std::exp(s)), p = 1 / (1 + std::exp(-s)), log = loss_at(s, 0);
    const double power = std::pow(q, gamma);
    loss = loss_at(s, gamma);
    slope = power * (gamma * p * log + q);
    const double moved = std::max(loss_at(s - error, gamma) - loss, loss - loss_at(s + error, gamma));
    loss_error = moved + units(gamma) * unit * (loss + moved);
    const double bend = power * (gamma * gamma * p * p * log + gamma * q * p * log + (2 * gamma + 1) * q * p);
    slope_error = bend * error * std::exp((gamma + 3) * error) + units(gamma) * unit * slope;
  }

 private:
  static double loss_at(double s, double gamma) {
    const double surprise = std::log1p(std::exp(-std::fabs(s))) + std::max(-s, 0.0);
    return std::pow(1 / (1 + std::exp(s)), gamma) * surprise;
  }
};

struct Gradients {
  Bounded x, y, w1, b1, w2, b2;
};

// The equations pair by pair, and what rounding may do to them, cf. python_tests/ops/bounds/pairs.py: a unit within its
// error of 0 may be on or off, and what comes of it is in doubt.
template <class Storage>
class Reference {
  using R = Rounding<Storage>;
  using Real = Compute<Storage>;

 public:
  explicit Reference(const Problem<Storage>& problem)
      : in(problem), logits(in.count), losses(in.count), grad_logits(in.count), total(1) {
    const FocalLoss focal = in.focal();
    for (int64_t k = 0; k < in.count; ++k) {
      int64_t i, j;
      if (!in.pair(k, i, j)) continue;
      double sum = in.b2[0], sizes = std::fabs(in.b2[0]), moved = 0;
      for (int64_t h = 0; h < in.shape.hidden; ++h) {
        const Unit unit = unit_of(i, j, h);
        const double weight = in.w2[h];
        sizes += std::fabs(weight) * summed(unit, i, j, h);
        if (!unit.possible()) continue;
        sum += weight * std::max(unit.value, 0.0);
        moved += std::fabs(weight) * unit.error;
      }
      logits.set(k, sum, moved + R::gamma(static_cast<double>(in.shape.hidden) + 3) * sizes);
      if (in.x_labels[i] == in.kIgnored || in.y_labels[j] == in.kIgnored) continue;
      ++counted;
      const bool same = in.x_labels[i] == in.y_labels[j];
      const double weight = same ? focal.alpha_same : focal.alpha_other;
      const Focal focal_loss(same ? sum : -sum, logits.error[k], focal.gamma, R::kUnit);
      losses.set(k, weight * focal_loss.loss, weight * focal_loss.loss_error);
      grad_logits.set(k, (same ? -weight : weight) * focal_loss.slope, weight * focal_loss.slope_error);
      total.add(0, losses.value[k], losses.error[k]);
    }
    // Summed in double, and rounded; here too.
    total.error[0] += (R::kUnit + 2 * Rounding<double>::gamma(static_cast<double>(in.count))) * total.value[0];
  }

  // Of all six arguments, from ∂L/∂logit of each pair. Sums over pairs are taken in blocks.
  Gradients gradients(const Bounded& g) const {
    const int64_t d = in.width, hidden = in.shape.hidden, n = in.shape.x_rows, m = in.shape.y_rows;
    const bool product = in.shape.interaction == Interaction::product;
    Gradients out{Bounded(n * d),        Bounded(m * d),  Bounded(in.w1.size()),
                  Bounded(in.b1.size()), Bounded(hidden), Bounded(1)};
    double largest_g = 0, largest_w2 = 0;  // what operands of half types are first divided by
    for (const double each : g.value) largest_g = std::max(largest_g, std::fabs(each));
    for (int64_t h = 0; h < hidden; ++h) largest_w2 = std::max(largest_w2, std::fabs(double{in.w2[h]}));
    // g and w1 w2 are rounded to half types, below whose range they lose everything.
    const double tiny = R::kHalfTiny, all = static_cast<double>(in.count),
                 of_row = in.shape.listed < 0 ? static_cast<double>(std::max(n, m)) : all, half = 4 * R::kHalf,
                 rows = gamma_of_sum(of_row, static_cast<double>(hidden) + 6) + half, pairs = gamma_of_sum(all, 6),
                 along = R::gamma(static_cast<double>(d) + 4);
    for (int64_t k = 0; k < in.count; ++k) {
      int64_t i, j;
      if (!in.pair(k, i, j)) continue;
      const double g_error = g.error[k], g_size = std::fabs(g.value[k]) + g_error;
      out.b2.add(0, g.value[k], g_error + pairs * g_size);
      for (int64_t h = 0; h < hidden; ++h) {
        const Unit unit = unit_of(i, j, h);
        if (!unit.possible()) continue;
        const double weight = in.w2[h], size = g_size * std::fabs(weight), u = unit.on() ? g.value[k] * weight : 0;
        const double doubt = (unit.maybe() ? g_size : g_error) * std::fabs(weight);
        const double magnitude = std::fabs(unit.value) + unit.size;
        out.w2.add(h, unit.on() ? g.value[k] * unit.value : 0,
                   (unit.maybe() ? g_size : g_error) * magnitude + (pairs + half + along) * g_size * magnitude);
        if (in.is_concat()) {
          out.x.add(i * d + h, u, doubt + rows * size);
          out.y.add(j * d + h, u, doubt + rows * size);
          continue;
        }
        out.b1.add(h, u, doubt + pairs * size);
        for (int64_t c = 0; c < d; ++c) {
          const double a = host::to_real(in.x[i * d + c]), b = host::to_real(in.y[j * d + c]),
                       w = host::to_real(in.w1[h * d + c]), along_phi = phi(a, b);
          const double lost = largest_g * tiny;
          out.w1.add(h * d + c, u * along_phi,
                     (doubt + (pairs + half) * size + lost * std::fabs(weight)) * std::fabs(along_phi));
          out.w2.error[h] += std::fabs(w * along_phi) * lost;
          const double of_x = product ? b : a > b ? 1 : a < b ? -1 : 0, of_y = product ? a : -of_x;
          const double w_error =
              (doubt + rows * size + lost * std::fabs(weight)) * std::fabs(w) + g_size * largest_w2 * tiny;
          out.x.add(i * d + c, u * w * of_x, w_error * std::fabs(of_x));
          out.y.add(j * d + c, u * w * of_y, w_error * std::fabs(of_y));
        }
      }
    }
    return out;
  }

  const Problem<Storage>& in;
  Bounded logits, losses, grad_logits, total;
  int64_t counted = 0;

 private:
  struct Unit {
    double value, size, error;  // size: Σ |w1 φ| + |b1|, or |A| + |B|, which ∂w2 sums apart

    bool on() const {
      return value > 0;
    }
    bool maybe() const {
      return std::fabs(value) <= error;
    }
    bool possible() const {
      return on() || maybe();
    }
  };

  // Of a sum over pairs: a kernel adds at most 1024 terms before it adds sums of them, here they are added one by one,
  // in double. `more` roundings of each term.
  static double gamma_of_sum(double terms, double more) {
    return R::product_gamma(std::min(terms, 1024 + terms / 1024) + more) + Rounding<double>::gamma(terms);
  }
  // What w2 is multiplied with in a sum, by magnitude: of all pairs under concat max(A, −B) and B, of units that are
  // off too.
  double summed(const Unit& unit, int64_t i, int64_t j, int64_t h) const {
    if (!in.is_concat() || in.shape.listed >= 0) return unit.possible() ? std::fabs(unit.value) + unit.error : 0;
    const double a = host::to_real(in.x[i * in.width + h]), b = host::to_real(in.y[j * in.width + h]);
    return std::fabs(std::max(a, -b)) + std::fabs(b) + unit.error;
  }
  // Half types: rounded, as what decides which units are active.
  double phi(double a, double b) const {
    const double exact = in.shape.interaction == Interaction::product ? a * b : std::fabs(a - b);
    return host::to_real(host::from_real<Storage>(static_cast<Real>(exact)));
  }
  Unit unit_of(int64_t i, int64_t j, int64_t h) const {
    const int64_t d = in.width;
    if (in.is_concat()) {  // a sum of two numbers has the right sign
      const double a = host::to_real(in.x[i * d + h]), b = host::to_real(in.y[j * d + h]), z = a + b;
      return {z, std::fabs(a) + std::fabs(b), z > 0 ? R::kUnit * z : 0};
    }
    double z = in.b1[h], size = std::fabs(in.b1[h]);
    for (int64_t c = 0; c < d; ++c) {
      const double term =
          host::to_real(in.w1[h * d + c]) * phi(host::to_real(in.x[i * d + c]), host::to_real(in.y[j * d + c]));
      z += term;
      size += std::fabs(term);
    }
    return {z, size, R::product_gamma(static_cast<double>(d) + 4) * size};
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
  void check_against(const Gradients& expected, const char* what) const {
    const auto name = [&](const char* of) { return std::string(what) + " " + of; };
    compare_within(x, expected.x, name("∂x").c_str());
    compare_within(y, expected.y, name("∂y").c_str());
    compare_within(w1, expected.w1, name("∂w1").c_str());
    compare_within(b1, expected.b1, name("∂b1").c_str());
    compare_within(w2, expected.w2, name("∂w2").c_str());
    compare_within(b2, expected.b2, name("∂b2").c_str());
  }
  bool same_bits(const Output& other) const {
    return x.same_bits(other.x) && y.same_bits(other.y) && w1.same_bits(other.w1) && b1.same_bits(other.b1) &&
           w2.same_bits(other.w2) && b2.same_bits(other.b2);
  }
};

template <class Storage>
void test_problem(const char* name, const Shape& shape, std::mt19937& random) {
  using Real = Compute<Storage>;
  const char* interactions[] = {"concat", "absdiff", "product"};
  context = std::string(name) + " " + interactions[static_cast<int>(shape.interaction)] + " n " +
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
    const Bounded g = reference.grad_logits.times(scale, 3 * Rounding<Storage>::kUnit);
    const Output<Storage> out(problem), again(problem);
    for (const Output<Storage>* each : {&out, &again}) {
      const Workspace workspace(workspace_bytes(true));
      Guarded<Real> loss(1);
      const PairGradients<Real> gradients = each->view();
      succeeds(cuda::pair_focal_loss_sum(network, focal, {true, loss.data(), &gradients}, workspace.data(), nullptr),
               "pair_focal_loss_sum");
      compare_within(loss, reference.total.times(scale, Rounding<Storage>::kUnit), "mean loss");
      set_seed(1);
    }
    set_seed(0);
    out.check_against(reference.gradients(g), "mean loss");
    check(out.same_bits(again), "the same bits in another order of warps");
  }
  if (shape.brief) return;
  for (const bool mean : {false, true}) {
    const Workspace workspace(workspace_bytes(false));
    Guarded<Real> loss(1);
    succeeds(cuda::pair_focal_loss_sum(network, focal, {mean, loss.data(), nullptr}, workspace.data(), nullptr),
             "pair_focal_loss_sum");
    const double scale = mean ? 1.0 / static_cast<double>(std::max<int64_t>(reference.counted, 1)) : 1;
    compare_within(loss, reference.total.times(scale, Rounding<Storage>::kUnit), "loss alone");
  }
  {
    const Workspace workspace(workspace_bytes(false));
    Guarded<Real> logits(problem.count);
    succeeds(cuda::pair_logits(network, logits.data(), workspace.data(), nullptr), "pair_logits");
    compare_within(logits, reference.logits, "logits");
  }
  {
    const Workspace workspace(workspace_bytes(false));
    Guarded<Real> losses(problem.count);
    succeeds(cuda::pair_focal_loss(network, focal, losses.data(), workspace.data(), nullptr), "pair_focal_loss");
    compare_within(losses, reference.losses, "losses");
  }
  Bounded g(problem.count);
  g.value.assign(problem.grad.data(), problem.grad.data() + problem.count);
  {
    const Workspace workspace(workspace_bytes(true));
    const Output<Storage> out(problem);
    succeeds(cuda::pair_logits_backward(network, problem.grad.data(), out.view(), workspace.data(), nullptr),
             "pair_logits_backward");
    for (int64_t k = 0, i, j; k < problem.count; ++k)
      if (!problem.pair(k, i, j)) g.value[k] = 0;
    out.check_against(reference.gradients(g), "logits");
  }
  {
    const Workspace workspace(workspace_bytes(true));
    const Output<Storage> out(problem);
    succeeds(cuda::pair_focal_loss_backward(network, focal, problem.grad.data(), out.view(), workspace.data(), nullptr),
             "pair_focal_loss_backward");
    for (int64_t k = 0; k < problem.count; ++k) {
      const double given = std::fabs(g.value[k]), slope = reference.grad_logits.value[k];
      g.error[k] = given * (reference.grad_logits.error[k] + Rounding<Storage>::kUnit * std::fabs(slope));
      g.value[k] *= slope;
    }
    out.check_against(reference.gradients(g), "losses");
  }
}

// Logits to ±1e4, exact in every type: each loss and derivative to its own size, down to what the type holds.
template <class Real>
void test_saturated(const char* name) {
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
      const auto slopes_of = [&](int64_t i, int64_t first, int64_t last) {
        for (int64_t k = 0; k < n * m; ++k) grad[k] = k >= i * m + first && k < i * m + last;
        succeeds(cuda::pair_focal_loss_backward(
                     network, focal, grad.data(),
                     {grad_a.data(), grad_b.data(), nullptr, nullptr, grad_w2.data(), grad_b2.data()}, workspace.data(),
                     nullptr),
                 "pair_focal_loss_backward");
        for (int64_t k = 0; k < n; ++k) check(std::isfinite(grad_a[k]), "∂A is finite");
      };
      for (int64_t i = 0; i < n; ++i) {
        // ∂FL/∂logit of one pair is ∂b2, and of each pair of a row ∂B, but for the first, whose hidden unit is at 0.
        slopes_of(i, 0, 1);
        const Real first = grad_b2[0];
        slopes_of(i, 0, m);
        for (int64_t j = 0; j < m; ++j) {
          const bool same = x_labels[i] == y_labels[j];
          const double logit = std::max(double{a[i]} + b[j], 0.0) - 10000, weight = same ? 0.25 : 0.75;
          const Focal focal_loss(same ? logit : -logit, 0, gamma, Rounding<Real>::kUnit);
          const double loss = weight * focal_loss.loss, grad_logit = (same ? -weight : weight) * focal_loss.slope;
          const double tolerance = Focal::units(gamma) * Rounding<Real>::kUnit;
          // An exponential below the range may be 0, and what it is multiplied with is at most 1 + γ.
          const double least = 4 * (1 + gamma) * std::numeric_limits<Real>::min();
          check(std::fabs(losses[i * m + j] - loss) <= tolerance * loss + least, "loss", losses[i * m + j] / loss);
          const Real slope = j == 0 ? first : grad_b[j];
          check(std::fabs(slope - grad_logit) <= tolerance * std::fabs(grad_logit) + least, "grad_logit",
                slope / grad_logit);
        }
      }
    }
  }
}

// Half types: features whose product passes the largest float16, and gradients that float16 cannot hold.
template <class Storage>
void test_range(const char* name) {
  context = std::string(name) + " range";
  Shape shape{Interaction::product, 9, 17, 5, 3};
  shape.grad_scale = 1e-12;
  std::mt19937 random(5);
  test_problem<Storage>(name, shape, random);
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
void test_not_finite(const char* name, Interaction interaction, int64_t listed, bool in_y) {
  using Real = Compute<Storage>;
  context = std::string(name) + " NaN in " + (in_y ? "y" : "x") + ", interaction " +
            std::to_string(static_cast<int>(interaction)) + " listed " + std::to_string(listed);
  Shape shape{interaction, 9, 17, 5, 6};
  shape.listed = listed;
  std::mt19937 random(11);
  const Problem<Storage> problem(shape, random);
  constexpr int64_t kRow = 2;
  for (int64_t c = 0; c < problem.width; ++c)
    (in_y ? problem.y : problem.x)[kRow * problem.width + c] =
        host::from_real<Storage>(std::numeric_limits<Real>::quiet_NaN());
  const Workspace workspace(cuda::pair_workspace(problem.view(), true));
  Guarded<Real> logits(problem.count);
  succeeds(cuda::pair_logits(problem.view(), logits.data(), workspace.data(), nullptr), "pair_logits");
  bool right = true;
  for (int64_t k = 0; k < problem.count; ++k) {
    int64_t i, j;
    right &= std::isnan(logits[k]) == (problem.pair(k, i, j) && (in_y ? j : i) == kRow);
  }
  check(right, "logits");
  const Output<Storage> out(problem);
  succeeds(cuda::pair_logits_backward(problem.view(), problem.grad.data(), out.view(), workspace.data(), nullptr),
           "pair_logits_backward");
  bool finite = true;
  const Guarded<Real>& of_rows = in_y ? out.y : out.x;
  for (size_t k = 0; k < of_rows.size(); ++k)
    finite &= static_cast<bool>(std::isfinite(of_rows[k])) || k / problem.width == kRow;
  check(finite, "gradients of the other rows");
  check(std::isnan(out.w2[0]), "∂w2");
}

#ifdef SSM_CUDA_EMULATOR
// What small calls launch: the sweep; the sums over blocks; with gradients those of rows, of columns and of w2; for the
// mean one that counts.
template <class Storage>
void test_launches(const char* name, Interaction interaction) {
  using Real = Compute<Storage>;
  context = std::string(name) + " launches, interaction " + std::to_string(static_cast<int>(interaction));
  std::mt19937 random(3);
  const Problem<Storage> problem({interaction, 64, 64, 64, 64}, random);
  const PairNetwork<Storage> network = problem.view();
  const Workspace workspace(cuda::pair_workspace(network, true));
  const Output<Storage> out(problem);
  const PairGradients<Real> gradients = out.view();
  const Guarded<Real> loss(1), logits(problem.count);
  const auto count = [&](const char* what, unsigned expected, const auto& call) {
    const unsigned before = launches();
    succeeds(call(), what);
    check(launches() - before == expected, what, launches() - before);
  };
  count("pair_logits", 1, [&] { return cuda::pair_logits(network, logits.data(), workspace.data(), nullptr); });
  count("pair_logits_backward", 5,
        [&] { return cuda::pair_logits_backward(network, problem.grad.data(), gradients, workspace.data(), nullptr); });
  for (const bool mean : {false, true}) {
    const unsigned counting = mean ? 1 : 0;
    count("loss", 2 + counting, [&] {
      return cuda::pair_focal_loss_sum(network, problem.focal(), {mean, loss.data(), nullptr}, workspace.data(),
                                       nullptr);
    });
    count("loss with gradients", 5 + counting, [&] {
      return cuda::pair_focal_loss_sum(network, problem.focal(), {mean, loss.data(), &gradients}, workspace.data(),
                                       nullptr);
    });
  }
}
#endif

template <class Storage>
void test_concat(const char* name) {
  for (const int64_t listed : {-1, 90})
    for (const bool in_y : {false, true}) test_not_finite<Storage>(name, Interaction::concat, listed, in_y);
  constexpr Interaction kind = Interaction::concat;
  std::mt19937 random(1234);
  const auto test = [&](const Shape& shape) { test_problem<Storage>(name, shape, random); };
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
void test_interactions(const char* name) {
  for (const Interaction interaction : {Interaction::absdiff, Interaction::product})
    for (const int64_t listed : {-1, 90})
      for (const bool in_y : {false, true}) test_not_finite<Storage>(name, interaction, listed, in_y);
  std::mt19937 random(1234);
  const bool half = sizeof(Storage) == 2;
  for (const Interaction kind : {Interaction::absdiff, Interaction::product}) {
    const bool absdiff = kind == Interaction::absdiff;
    const auto test = [&](const Shape& shape) { test_problem<Storage>(name, shape, random); };
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
    test_concat<float>("float32");
    test_concat<double>("float64");
    test_saturated<float>("float32");
    test_saturated<double>("float64");
#ifdef SSM_CUDA_EMULATOR
    test_launches<float>("float32", Interaction::concat);
    test_launches<bfloat16>("bfloat16", Interaction::absdiff);
#endif
    test_interactions<float>("float32");
    test_interactions<double>("float64");
    test_interactions<bfloat16>("bfloat16");
    test_interactions<float16>("float16");
    test_range<bfloat16>("bfloat16");
    test_range<float16>("float16");
  });
}
