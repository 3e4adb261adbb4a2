// SPDX-License-Identifier: BSD-3-Clause
// The CUDA kernels of the ranking family against loops over pairs in double precision. Inputs, outputs and workspace
// start as NaN, so that an unwritten element shows; see cuda_harness.h.
#include <algorithm>
#include <limits>
#include <numeric>
#include <random>

#include "../ranking/mined_pair_ranking_loss.h"
#include "../ranking/pair_ranking_loss.h"
#include "../ranking/similarity_moments.h"
#include "cuda_harness.h"
#include "rounding.h"

namespace {

using namespace ssmkernels;
using namespace ssmkernels::test;

constexpr int kSmallShared = 99 * 1024;  // of a block on sm_86 and sm_89

enum class Spread {
  wide,      // normal, distances about 1.4
  repeated,  // every third row is the one before
  point,     // all near one point
  clusters   // two tight ones far apart
};

struct Shape {
  int64_t rows, references, dim;  // references −1: pairs of rows
  int64_t classes;                // 0: every label is another
  Spread spread = Spread::wide;
  double positive_margin = 0, negative_margin = 1.4;
  int64_t basis_dim = 0;  // mined
  double positive_threshold = 0.2, negative_threshold = -0.1;
  bool brief = false;  // one reduction, once
  bool large = false;  // one reduction, with the shared memory of sm_90
};

template <class Storage>
void fill(const Guarded<Storage>& out, int64_t rows, int64_t dim, Spread spread, std::mt19937& random) {
  using Real = Compute<Storage>;
  std::normal_distribution<double> normal;
  const auto put = [&](int64_t i, int64_t c, double x) {
    out[i * dim + c] = host::from_real<Storage>(static_cast<Real>(x));
  };
  const double scale = 1 / std::sqrt(static_cast<double>(dim));
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t c = 0; c < dim; ++c) {
      const double x = normal(random) * scale;
      if (spread == Spread::repeated && i % 3 == 2)
        out[i * dim + c] = out[(i - 1) * dim + c];
      else if (spread == Spread::point)
        put(i, c, (1 + 0.3 * (c % 5)) + x * 0.02);
      else if (spread == Spread::clusters)
        put(i, c, (i % 2 ? 1 : -1) * (1 + 0.3 * (c % 5)) + x * 0.02);
      else
        put(i, c, x);
    }
}

struct Labels {
  Guarded<int64_t> labels, order, sorted;

  Labels(int64_t count, int64_t classes, std::mt19937& random) : labels(count), order(count), sorted(count) {
    for (int64_t i = 0; i < count; ++i)
      labels[i] = (int64_t{1} << 40) + (classes == 0 ? i * 7 % 1009 : static_cast<int64_t>(random() % classes));
    std::iota(order.data(), order.data() + count, 0);
    std::stable_sort(order.data(), order.data() + count, [&](int64_t a, int64_t b) { return labels[a] < labels[b]; });
    for (int64_t i = 0; i < count; ++i) sorted[i] = labels[order[i]];
  }
};

template <class Storage>
double value(const Guarded<Storage>& matrix, int64_t at) {
  return host::to_real(matrix[at]);
}

template <class Storage>
Values values(const Guarded<Storage>& matrix) {
  Values out(matrix.size());
  for (size_t k = 0; k < matrix.size(); ++k) out[k] = value(matrix, k);
  return out;
}

template <class Storage>
struct Problem {
  using Real = Compute<Storage>;
  Shape shape;
  bool with_references;
  int64_t others;
  Guarded<Storage> rows, references, basis;
  Guarded<Real> thresholds;
  Labels labels, reference_labels;

  Problem(const Shape& s, std::mt19937& random)
      : shape(s),
        with_references(s.references >= 0),
        others(with_references ? s.references : s.rows),
        rows(s.rows * s.dim),
        references(with_references ? s.references * s.dim : 0),
        basis(s.rows * s.basis_dim),
        thresholds(2),
        labels(s.rows, s.classes, random),
        reference_labels(with_references ? s.references : 0, s.classes, random) {
    fill(rows, s.rows, s.dim, s.spread, random);
    if (with_references) {
      fill(references, s.references, s.dim, s.spread, random);
      if (s.spread == Spread::repeated && s.rows > 0 && s.references > 0)
        for (int64_t c = 0; c < s.dim; ++c) references[c] = rows[c];
    }
    if (s.basis_dim > 0) {
      fill(basis, s.rows, s.basis_dim, Spread::wide, random);
      if (s.rows > 4)
        for (int64_t c = 0; c < s.basis_dim; ++c) basis[4 * s.basis_dim + c] = Storage{};  // its cosines are 0
      thresholds[0] = static_cast<Real>(s.positive_threshold);
      thresholds[1] = static_cast<Real>(s.negative_threshold);
    }
  }

  RankingPairs<Storage> pairs() const {
    return {rows.data(),
            with_references ? references.data() : nullptr,
            shape.rows,
            others,
            shape.dim,
            shape.positive_margin,
            shape.negative_margin};
  }
  RankingLabels ordered() const {
    return {labels.order.data(), labels.sorted.data(), with_references ? reference_labels.order.data() : nullptr,
            with_references ? reference_labels.sorted.data() : nullptr};
  }
  RankingBasis<Storage> mined() const {
    return {basis.data(), shape.basis_dim, thresholds.data()};
  }
  bool is_mined() const {
    return shape.basis_dim > 0;
  }
  const char* loss(const RankingLoss<Real>& out, void* workspace) const {
    return is_mined() ? cuda::mined_pair_ranking_loss(pairs(), mined(), out, workspace, nullptr)
                      : cuda::pair_ranking_loss(pairs(), ordered(), out, workspace, nullptr);
  }
  const char* backward(const RankingGradients<Real>& out, void* workspace) const {
    return is_mined() ? cuda::mined_pair_ranking_loss_backward(pairs(), mined(), out, workspace, nullptr)
                      : cuda::pair_ranking_loss_backward(pairs(), ordered(), out, workspace, nullptr);
  }
  // Row i in the order of the sweep.
  int64_t at(int64_t position) const {
    return is_mined() ? position : labels.order[position];
  }
  int64_t other_at(int64_t position) const {
    return with_references ? reference_labels.order[position] : at(position);
  }
  double cosine(int64_t i, int64_t j) const {
    double sum = 0, left = 0, right = 0;
    for (int64_t c = 0; c < shape.basis_dim; ++c) {
      const double a = value(basis, i * shape.basis_dim + c), b = value(basis, j * shape.basis_dim + c);
      sum += a * b, left += a * a, right += b * b;
    }
    return sum / (std::max(std::sqrt(left), 1e-12) * std::max(std::sqrt(right), 1e-12));
  }
};

// The loss pair by pair, and what rounding may do to it, cf. python_tests/ops/bounds/ranking.py. A pair whose distance
// is within its error of a margin may count or not; which do is checked by itself.
template <class Storage>
struct Reference {
  using R = Rounding<Storage>;
  double sums[2] = {}, errors[2] = {}, pairs[2] = {}, nonzero[2] = {};
  std::vector<uint8_t> active;    // [row, other]: bit 0 a positive with a loss, bit 1 a negative
  std::vector<uint8_t> doubtful;  // likewise: within its error of the margin
  Values distances, distance_errors;
  int64_t dim;
  Values rows, others;
  Values center;                      // which rows of half types do not have
  Values row_squares, other_squares;  // of distances to the center

  explicit Reference(const Problem<Storage>& in)
      : active(in.shape.rows * in.others),
        doubtful(active.size()),
        distances(active.size()),
        distance_errors(active.size()),
        dim(in.shape.dim),
        rows(values(in.rows)),
        others(in.with_references ? values(in.references) : rows),
        center(dim) {
    for (int64_t i = 0; i < in.shape.rows && sizeof(Storage) > 2; ++i)
      for (int64_t c = 0; c < dim; ++c) center[c] += rows[i * dim + c] / static_cast<double>(in.shape.rows);
    row_squares = squares(rows, in.shape.rows);
    other_squares = squares(others, in.others);
    const double margins = R::kUnit * (std::fabs(in.shape.positive_margin) + std::fabs(in.shape.negative_margin));
    for (int64_t i = 0; i < in.shape.rows; ++i)
      for (int64_t j = 0; j < in.others; ++j) {
        if (!in.with_references && i == j) continue;
        const bool same =
            !in.is_mined() && in.labels.labels[i] == (in.with_references ? in.reference_labels : in.labels).labels[j];
        const double s = in.is_mined() ? in.cosine(i, j) : 0;
        const bool kinds[2] = {in.is_mined() ? s >= in.thresholds[0] : same,
                               in.is_mined() ? s <= in.thresholds[1] : !same};
        const int64_t at = i * in.others + j;
        const double d = distances[at] = distance(i, j), error = distance_errors[at] = error_of(i, j, d);
        const double excess[2] = {d - in.shape.positive_margin, in.shape.negative_margin - d};
        for (int kind = 0; kind < 2; ++kind) {
          if (!kinds[kind]) continue;
          pairs[kind] += 1;
          if (std::fabs(excess[kind]) <= error + margins) doubtful[at] |= 1 << kind;
          if (excess[kind] > -error - margins) errors[kind] += error + margins;
          if (!(excess[kind] > 0)) continue;
          nonzero[kind] += 1;
          sums[kind] += excess[kind];
          active[at] |= 1 << kind;
        }
      }
  }

  double weight(Reduction reduction, int kind) const {
    const double count = reduction == Reduction::mean ? pairs[kind] : nonzero[kind];
    return reduction == Reduction::sum ? 1 : count > 0 ? 1 / count : 0;
  }
  // A thread adds its 32 pairs of a tile, then double takes over.
  Bounded loss(Reduction reduction) const {
    Bounded out(1);
    for (int kind = 0; kind < 2; ++kind) {
      const double w = weight(reduction, kind);
      out.add(0, w * sums[kind], w * (errors[kind] + R::gamma(33) * (sums[kind] + errors[kind])));
    }
    out.error[0] += R::kUnit * out.value[0];
    return out;
  }
  // K (x_i − x_j) of each pair, K = weight/d with the relative error of d, which for half types is rounded to tf32, the
  // same for the row as for the sum; (Σ K) x_i − Σ K x_j of rows less their center.
  void gradients(const Problem<Storage>& in, Reduction reduction, double grad, Bounded& grad_rows,
                 Bounded& grad_references) const {
    Bounded& grad_others = in.with_references ? grad_references : grad_rows;
    const double sum_of_rows = R::product_gamma(static_cast<double>(std::max(in.shape.rows, in.others)) + 8);
    for (int64_t i = 0; i < in.shape.rows; ++i)
      for (int64_t j = 0; j < in.others; ++j) {
        const int64_t at = i * in.others + j;
        const double distance = distances[at];
        if ((active[at] | doubtful[at]) == 0 || distance == 0) continue;
        double k = 0, size = 0, doubt = 0;
        for (int kind = 0; kind < 2; ++kind) {
          const double part = std::fabs(grad) * weight(reduction, kind) / distance;
          if (active[at] >> kind & 1) k += (grad < 0) == (kind == 0) ? -part : part;
          if ((active[at] | doubtful[at]) >> kind & 1) size += part;
          if (doubtful[at] >> kind & 1) doubt += part;
        }
        const double error =
            doubt + size * (distance_errors[at] / distance + 4 * R::kUnit + (R::kHalf > 0 ? kTf32 : 0));
        for (int64_t c = 0; c < dim; ++c) {
          const double left = rows[i * dim + c], right = others[j * dim + c];
          const double bound = error * std::fabs(left - right) +
                               sum_of_rows * size * (std::fabs(left - center[c]) + std::fabs(right - center[c]));
          grad_rows.add(i * dim + c, k * (left - right), bound);
          grad_others.add(j * dim + c, -k * (left - right), bound);
        }
      }
  }

 private:
  // By products d² = q_i + q_j − 2 x_i·x_j has the error of 2 γ (q_i + q_j), and is not taken below 1/32 of q_i + q_j;
  // by differences, in double, d has only that of being rounded. Subtracting the center rounds each coordinate.
  double error_of(int64_t i, int64_t j, double d) const {
    if (d == 0) return 0;
    const double both = row_squares[i] + other_squares[j], by_product = std::min(both / d, 32 * d);
    return R::product_gamma(static_cast<double>(dim) + 6) * by_product + 2 * R::kUnit * std::sqrt(both) +
           4 * R::kUnit * d;
  }
  double distance(int64_t i, int64_t j) const {
    double sum = 0;
    for (int64_t c = 0; c < dim; ++c) {
      const double x = rows[i * dim + c] - others[j * dim + c];
      sum += x * x;
    }
    return std::sqrt(sum);
  }
  Values squares(const Values& of, int64_t count) const {
    Values out(count);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t c = 0; c < dim; ++c) out[i] += std::pow(of[i * dim + c] - center[c], 2);
    return out;
  }
};

template <class Storage>
struct Output {
  using Real = Compute<Storage>;
  Guarded<Real> loss, weights, rows, references;
  Guarded<uint8_t> active;

  explicit Output(const Problem<Storage>& in)
      : loss(1),
        weights(2),
        rows(in.rows.size()),
        references(in.references.size()),
        active((in.shape.rows + 31) / 32 * ((in.others + 31) / 32)) {
    std::fill(active.data(), active.data() + active.size(),
              0);  // a flag that is read before it is written says that nothing is active
  }
  bool same_bits(const Output& other) const {
    return loss.same_bits(other.loss) && weights.same_bits(other.weights) && rows.same_bits(other.rows) &&
           references.same_bits(other.references) && active.same_bits(other.active);
  }
  void run(const Problem<Storage>& in, Reduction reduction, const Guarded<Real>& grad) const {
    const Workspace workspace(cuda::ranking_workspace(in.pairs(), in.shape.basis_dim, false));
    succeeds(in.loss({reduction, loss.data(), weights.data(), active.data()}, workspace.data()), "loss");
    backward(in, grad);
  }
  void backward(const Problem<Storage>& in, const Guarded<Real>& grad) const {
    const Workspace workspace(cuda::ranking_workspace(in.pairs(), in.shape.basis_dim, true));
    succeeds(in.backward({grad.data(), weights.data(), active.data(), rows.data(),
                          in.with_references ? references.data() : nullptr},
                         workspace.data()),
             "backward");
  }
};

template <class Storage>
void test_loss(const char* name, const Shape& shape, std::mt19937& random) {
  using Real = Compute<Storage>;
  const Problem<Storage> problem(shape, random);
  const Reference<Storage> reference(problem);
  Guarded<Real> grad(1);
  grad[0] = Real(-1.75);
  for (const Reduction reduction : {Reduction::mean_nonzero, Reduction::mean, Reduction::sum}) {
    if ((shape.brief || shape.large) && reduction != Reduction::mean_nonzero) break;
    context = std::string(name) + " n " + std::to_string(shape.rows) + " m " + std::to_string(shape.references) +
              " d " + std::to_string(shape.dim) + " classes " + std::to_string(shape.classes) + " spread " +
              std::to_string(static_cast<int>(shape.spread)) + " margins " + std::to_string(shape.positive_margin) +
              " " + std::to_string(shape.negative_margin) + " basis " + std::to_string(shape.basis_dim) +
              " reduction " + std::to_string(static_cast<int>(reduction));
    const Output<Storage> out(problem);
    out.run(problem, reduction, grad);
    if (!shape.brief) {
      const Output<Storage> again(problem);
      set_seed(1);
      again.run(problem, reduction, grad);
      set_seed(0);
      check(out.same_bits(again), "the same bits in another order of warps");
    }

    compare_within(out.loss, reference.loss(reduction), "loss");
    for (int kind = 0; kind < 2; ++kind) {
      const double weight = reference.weight(reduction, kind);
      check(std::fabs(out.weights[kind] - weight) <= 2 * Rounding<Storage>::kUnit * weight, "weight",
            out.weights[kind] / weight);
    }
    Bounded rows(out.rows.size()), references(problem.others * shape.dim);
    reference.gradients(problem, reduction, grad[0], rows, references);
    compare_within(out.rows, rows, "∂rows");
    if (problem.with_references) compare_within(out.references, references, "∂references");

    const int64_t across = (problem.others + 31) / 32;
    std::vector<uint8_t> tiles(out.active.size());
    for (int64_t i = 0; i < shape.rows; ++i)
      for (int64_t j = problem.with_references ? 0 : i + 1; j < problem.others; ++j)
        tiles[i / 32 * across + j / 32] |= reference.active[problem.at(i) * problem.others + problem.other_at(j)] != 0;
    bool right = true;
    for (int64_t i = 0; i < (shape.rows + 31) / 32; ++i)
      for (int64_t j = problem.with_references ? 0 : i; j < across; ++j)
        right &= (out.active[i * across + j] != 0) == (tiles[i * across + j] != 0);
    check(right, "active tiles");

    std::fill(out.active.data(), out.active.data() + out.active.size(), 0);
    out.backward(problem, grad);
    check(std::all_of(out.rows.data(), out.rows.data() + out.rows.size(), [](Real x) { return x == 0; }) &&
              std::all_of(out.references.data(), out.references.data() + out.references.size(),
                          [](Real x) { return x == 0; }),
          "nothing from tiles that are not active");
  }
}

template <class Storage>
void test_losses(const char* name) {
  std::mt19937 random(77);
  const auto test = [&](const Shape& shape) { test_loss<Storage>(name, shape, random); };
  test({1, -1, 3, 1});
  test({3, -1, 1, 2});
  test({17, -1, 3, 3});
  test({33, -1, 17, 5, Spread::repeated});
  test({65, -1, 64, 1});
  test({65, -1, 33, 0});
  test({123, -1, 130, 7, Spread::repeated, 0.2, 1.3});
  test({200, -1, 17, 30, Spread::wide, -0.1, 0.7});  // a positive counts at distance 0
  test({200, -1, 300, 12, Spread::wide, 1.35, 1.3});
  test({70, -1, 5, 4, Spread::repeated, 0, -0.5});  // no negative counts
  test({66, -1, 40, 4, Spread::point, 0.01, 0.03});
  test({66, -1, 40, 4, Spread::clusters, 0.01, 0.03});
  test({66, -1, 40, 4, Spread::clusters, 0, 5});
  test({130, -1, 20, 40, Spread::wide, 0, 0.3});  // few tiles are active
  test({3, -1, 2048, 2});
  test({1, 1, 1, 1});
  test({3, 17, 17, 2});
  test({65, 33, 130, 5, Spread::repeated, 0.1, 1.3});
  test({33, 200, 64, 9, Spread::clusters, 0.01, 0.03});
  test({200, 65, 20, 40, Spread::wide, 0, 0.4});
  // Several tiles of K to a block, for one and more chunks of the second product, with and without close pairs.
  for (const Spread spread : {Spread::wide, Spread::clusters})
    for (const int64_t dim : {20, 130}) {
      Shape shape{33, 2200, dim, 5, spread, 0, 5};
      shape.brief = true;
      test(shape);
    }
  if constexpr (sizeof(Storage) == 2) {  // tiles of 128 × 128, at least two to a block, of one and of two chunks
    set_shared_limit(227 * 1024);
    Shape shape{2820, -1, 20, 40, Spread::wide, 0, 0.4};
    shape.large = true;
    if (std::is_same_v<Storage, bfloat16>) test(shape);
    shape = {130, 17000, 70, 40, Spread::repeated, 0, 0.4};
    shape.large = true;
    test(shape);
    set_shared_limit(kSmallShared);
  }
  if constexpr (sizeof(Storage) == 4) {  // several tiles to a block, and to a lane that looks for active ones
    Shape shape{64, 65700, 1, 0};
    shape.negative_margin = 0.001;
    shape.brief = true;
    test(shape);
  }
  test({5, -1, 0, 2});  // all rows are the same point
  test({5, 3, 0, 2});
  test({0, -1, 5, 1});
  test({0, 5, 5, 1});
  test({5, 0, 5, 1});
  // mined
  test({1, -1, 3, 1, Spread::wide, 0, 1.4, 3});
  test({17, -1, 3, 1, Spread::wide, 0, 1.4, 1, 0.5, 0.5});
  test({65, -1, 33, 1, Spread::repeated, 0.1, 1.4, 20});
  test({123, -1, 64, 1, Spread::point, 0.01, 0.03, 64, 0.05, 0.1});  // some pairs are both
  test({130, -1, 130, 1, Spread::wide, 1.4, 1.35, 17, 0.9, -0.9});
  test({40, -1, 7, 1, Spread::wide, 0, 1.4, 130, 0, 0});
  test({0, -1, 5, 1, Spread::wide, 0, 1.4, 3});
}

// NaN in a row shows in the loss, and in the gradients of all rows that have pairs with it.
template <class Storage>
void test_not_finite(const char* name) {
  using Real = Compute<Storage>;
  for (const int64_t basis_dim : {0, 5}) {
    context = std::string(name) + " NaN";
    std::mt19937 random(3);
    Shape shape{70, -1, 9, 7};
    shape.basis_dim = basis_dim;
    shape.positive_threshold = shape.negative_threshold = 0;
    Problem<Storage> problem(shape, random);
    problem.rows[40 * 9 + 3] = host::from_real<Storage>(std::numeric_limits<Real>::quiet_NaN());
    Guarded<Real> grad(1);
    grad[0] = 1;
    for (const Reduction reduction : {Reduction::mean_nonzero, Reduction::mean, Reduction::sum}) {
      const Output<Storage> out(problem);
      out.run(problem, reduction, grad);
      check(std::isnan(out.loss[0]), "loss");
      check(std::isnan(out.rows[40 * 9]) && std::isnan(out.rows[0]), "gradient");
      check(std::isfinite(out.weights[0]) && std::isfinite(out.weights[1]), "weights");
    }
  }
}

// Rows and margins times a power of two whose square leaves the range: the loss is as many times as large, the
// gradients are the same.
template <class Storage>
void test_scales(const char* name) {
  using Real = Compute<Storage>;
  const Shape shape{70, -1, 9, 7};
  Guarded<Real> grad(1);
  grad[0] = 1;
  std::mt19937 random(5);
  const Problem<Storage> plain(shape, random);
  const Output<Storage> expected(plain);
  expected.run(plain, Reduction::mean_nonzero, grad);
  const Reference<Storage> reference(plain);
  const double loss_error = reference.loss(Reduction::mean_nonzero).error[0];
  Bounded rows(plain.rows.size());
  reference.gradients(plain, Reduction::mean_nonzero, 1, rows, rows);
  for (const int exponent : sizeof(Real) == 4 ? std::vector<int>{-90, 90, 120} : std::vector<int>{-900, 600, 1000}) {
    context = std::string(name) + " scale 2^" + std::to_string(exponent);
    std::mt19937 again(5);
    Shape scaled = shape;
    scaled.negative_margin = std::ldexp(shape.negative_margin, exponent);
    const Problem<Storage> problem(scaled, again);
    for (size_t k = 0; k < problem.rows.size(); ++k)
      problem.rows[k] = host::from_real<Storage>(static_cast<Real>(std::ldexp(host::to_real(plain.rows[k]), exponent)));
    const Output<Storage> out(problem);
    out.run(problem, Reduction::mean_nonzero, grad);
    const double loss = std::ldexp(double{out.loss[0]}, -exponent);
    check(std::fabs(loss - expected.loss[0]) <= 2 * loss_error, "loss", loss / expected.loss[0]);
    compare_within(out.rows, rows, "gradients");
  }
}

// A cosine of 0 is 0 exactly, and so at least and at most a threshold of 0.
template <class Storage>
void test_whole_numbers(const char* name) {
  using Real = Compute<Storage>;
  context = std::string(name) + " whole numbers";
  std::mt19937 random(7);
  Shape shape{70, -1, 9, 7};
  shape.basis_dim = 5;
  shape.positive_threshold = shape.negative_threshold = 0;
  const Problem<Storage> problem(shape, random);
  for (size_t k = 0; k < problem.basis.size(); ++k)
    problem.basis[k] = host::from_real<Storage>(static_cast<Real>(static_cast<int>(random() % 5) - 2));
  const Reference<Storage> reference(problem);
  Guarded<Real> grad(1);
  grad[0] = 1;
  const Output<Storage> out(problem);
  out.run(problem, Reduction::mean, grad);
  for (int kind = 0; kind < 2; ++kind)
    check(out.weights[kind] == static_cast<Real>(reference.weight(Reduction::mean, kind)), "pairs");
}

// ---- moments

template <class Storage>
void test_moments(const char* name, int64_t n, int64_t d, int64_t classes, Spread spread, std::mt19937& random) {
  using Real = Compute<Storage>;
  context = std::string(name) + " moments n " + std::to_string(n) + " d " + std::to_string(d) + " classes " +
            std::to_string(classes) + " spread " + std::to_string(static_cast<int>(spread));
  Guarded<Storage> features(n * d);
  fill(features, n, d, spread, random);
  if (n > 5 && spread != Spread::point)
    for (int64_t c = 0; c < d; ++c) features[5 * d + c] = Storage{};
  const Labels labels(n, classes, random);
  const LabeledFeatures<Storage> in{features.data(), labels.order.data(), labels.sorted.data(), n, d};

  // Everything is computed in double and rounded at the end. Unit rows have a relative error of `row_error`, cosines
  // one of `cosine_error` Σ_d |r_i||r_j|; sums over all pairs, from which the others are taken off, are of n rows and
  // d² products.
  const double u = Rounding<double>::kUnit, rounds = Rounding<Storage>::kUnit, sizes_of = static_cast<double>(d),
               row_error = Rounding<double>::gamma(sizes_of + 6),
               cosine_error = Rounding<double>::gamma(sizes_of + 2) + 2 * row_error,
               all_pairs = Rounding<double>::gamma(2 * (static_cast<double>(n) + sizes_of) + 8);
  Values unit(n * d), norms(n), cosines(n * n), sizes(n * n);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t c = 0; c < d; ++c) norms[i] += value(features, i * d + c) * value(features, i * d + c);
    norms[i] = norms[i] > 0 ? std::sqrt(norms[i]) : std::numeric_limits<double>::infinity();  // zeros have no direction
    for (int64_t c = 0; c < d; ++c) unit[i * d + c] = value(features, i * d + c) / norms[i];
  }
  double counts[2] = {}, all_sizes = 0, all_squares = 0;
  Bounded expected(4);
  const auto kind = [&](int64_t i, int64_t j) { return labels.labels[i] == labels.labels[j] ? 0 : 1; };
  const auto each = [&](auto f) {
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < n; ++j)
        if (i != j) f(i, j, kind(i, j));
  };
  each([&](int64_t i, int64_t j, int k) {
    double sum = 0, size = 0;
    for (int64_t c = 0; c < d; ++c) {
      const double product = unit[i * d + c] * unit[j * d + c];
      sum += product;
      size += std::fabs(product);
    }
    cosines[i * n + j] = sum;
    sizes[i * n + j] = size;
    all_sizes += size;
    all_squares += size * size + size;
    counts[k] += 1;
    expected.add(2 * k, sum, cosine_error * size);
  });
  for (int k = 0; k < 2; ++k) {
    const double share = 1 / std::max(counts[k], 1.0);
    expected.value[2 * k] *= share;
    expected.error[2 * k] = share * (expected.error[2 * k] + (counts[k] > 0) * all_pairs * all_sizes) +
                            2 * u * std::fabs(expected.value[2 * k]);
  }
  each([&](int64_t i, int64_t j, int k) {
    const double apart = cosines[i * n + j] - expected.value[2 * k], size = std::fabs(expected.value[2 * k]),
                 moved = cosine_error * sizes[i * n + j] + u * (size + std::fabs(apart));
    expected.add(2 * k + 1, apart * apart / counts[k], (2 * std::fabs(apart) * moved + moved * moved) / counts[k]);
  });
  for (int k = 0; k < 2; ++k)
    expected.error[2 * k + 1] += Rounding<double>::gamma(static_cast<double>(n) + 1024) * expected.value[2 * k + 1] +
                                 std::pow(expected.error[2 * k], 2) +
                                 4 * all_pairs * all_squares / std::max(counts[k], 1.0) * (counts[k] > 0);
  if (counts[1] > 0) expected.error[3] += counts[0] / counts[1] * expected.error[1];
  for (int k = 0; k < 4; ++k) expected.error[k] += rounds * std::fabs(expected.value[k]);

  Guarded<Real> moments(4), again(4);
  {
    const Workspace workspace(cuda::similarity_moments_workspace(in, false));
    succeeds(cuda::similarity_moments(in, moments.data(), workspace.data(), nullptr), "similarity_moments");
    const Workspace other(cuda::similarity_moments_workspace(in, false));
    set_seed(1);
    succeeds(cuda::similarity_moments(in, again.data(), other.data(), nullptr), "similarity_moments");
    set_seed(0);
  }
  check(moments.same_bits(again), "the same bits in another order of warps");
  compare_within(moments, expected, "moment");

  Guarded<Real> grads(4), gradient(n * d), gradient_again(n * d);
  const double given[4] = {1.5, -2, 0.75, 3};
  for (int k = 0; k < 4; ++k) grads[k] = static_cast<Real>(given[k]);
  {
    const Workspace workspace(cuda::similarity_moments_workspace(in, true));
    succeeds(
        cuda::similarity_moments_backward(in, moments.data(), grads.data(), gradient.data(), workspace.data(), nullptr),
        "similarity_moments_backward");
    const Workspace other(cuda::similarity_moments_workspace(in, true));
    set_seed(1);
    succeeds(cuda::similarity_moments_backward(in, moments.data(), grads.data(), gradient_again.data(), other.data(),
                                               nullptr),
             "similarity_moments_backward");
    set_seed(0);
  }
  check(gradient.same_bits(gradient_again), "the same bits of the gradient in another order of warps");
  // (I − r rᵀ) Σ_j c_ij r_j / ‖x‖. Where all pairs get the negatives' c, a positive pair's is a difference. The means
  // that c is about are those given, rounded.
  Bounded grad_unit(n * d), expected_gradient(n * d);
  each([&](int64_t i, int64_t j, int k) {
    const double share = 2 / counts[k], beta = 2 * given[2 * k + 1] * share, mean = expected.value[2 * k];
    const double weight = given[2 * k] * share + beta * (cosines[i * n + j] - mean);
    double error = 0, size = 0;
    for (int of = 0; of < 2; ++of) {
      if (of != k && of == 0) continue;
      const double of_share = counts[of] > 0 ? 2 / counts[of] : 0,
                   of_beta = 2 * std::fabs(given[2 * of + 1]) * of_share;
      const double magnitude = std::fabs(given[2 * of]) * of_share +
                               of_beta * (std::fabs(cosines[i * n + j]) + std::fabs(expected.value[2 * of]));
      size += magnitude;
      error += of_beta * (cosine_error * sizes[i * n + j] + expected.error[2 * of]) + 4 * u * magnitude;
    }
    const double sum = Rounding<double>::gamma(static_cast<double>(n) + 6) + row_error;
    for (int64_t c = 0; c < d; ++c)
      grad_unit.add(i * d + c, weight * unit[j * d + c], (error + sum * size) * std::fabs(unit[j * d + c]));
  });
  for (int64_t i = 0; i < n; ++i) {
    double along = 0, along_size = 0, along_error = 0;
    for (int64_t c = 0; c < d; ++c) {
      const double r = unit[i * d + c], v = grad_unit.value[i * d + c];
      along += v * r;
      along_size += std::fabs(v * r);
      along_error += std::fabs(r) * grad_unit.error[i * d + c];
    }
    for (int64_t c = 0; c < d; ++c) {
      const double r = unit[i * d + c], v = grad_unit.value[i * d + c], exact = (v - along * r) / norms[i];
      const double bound = grad_unit.error[i * d + c] + std::fabs(r) * along_error +
                           (4 * row_error + 4 * u) * (std::fabs(v) + 2 * std::fabs(r) * along_size);
      expected_gradient.set(i * d + c, exact, bound / norms[i] + rounds * std::fabs(exact));
    }
  }
  compare_within(gradient, expected_gradient, "∂features");
}

template <class Storage>
void test_all_moments(const char* name) {
  std::mt19937 random(5);
  const auto test = [&](int64_t n, int64_t d, int64_t classes, Spread spread = Spread::wide) {
    test_moments<Storage>(name, n, d, classes, spread, random);
  };
  test(5, 0, 2);
  test(0, 3, 1);
  test(1, 3, 1);
  test(3, 1, 2);
  test(3, 17, 2);
  test(17, 17, 3);
  test(33, 3, 1);
  test(65, 130, 0);
  test(65, 64, 4);
  test(123, 200, 10);
  test(123, 33, 0);
  test(200, 70, 3);
  test(200, 17, 40, Spread::repeated);
  test(70, 20, 4, Spread::point);
  test(40, 64, 4, Spread::point);
  test(330, 5, 2, Spread::clusters);
}

template <class Storage>
void test_all(const char* name) {
  test_losses<Storage>(name);
  test_not_finite<Storage>(name);
  test_whole_numbers<Storage>(name);
  if constexpr (!std::is_same_v<Storage, float16>) test_scales<Storage>(name);
  test_all_moments<Storage>(name);
}

}  // namespace

int main() {
  return run_tests([] {
    set_shared_limit(kSmallShared);
    test_all<float>("float32");
    test_all<double>("float64");
    test_all<bfloat16>("bfloat16");
    test_all<float16>("float16");
  });
}
