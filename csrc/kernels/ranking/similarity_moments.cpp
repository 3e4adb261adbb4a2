// SPDX-License-Identifier: BSD-3-Clause
// Positives are computed class by class, negatives as all pairs less the positives; each from the pairs' cosines where
// there are few rows, and from RᵀR where there are many. Means come first, from the sums of unit rows, so that the
// pairs' variance is a second pass over cosines; from RᵀR it is a difference, which is why that is computed in double.
#include "similarity_moments.h"

#include "tiles.h"

namespace ssmkernels::SSM_ISA {
namespace {

constexpr int64_t kGramRows =
    3;  // RᵀR is worth it with more than kGramRows·d rows: it takes half as many products, at half the rate
constexpr int64_t kGramChunk = 128;  // rows that are converted to double at once

struct Range {
  int64_t begin, end;
  int64_t size() const {
    return end - begin;
  }
};

template <class Real>
class Moments {
 public:
  Moments(const LabeledFeatures<Real>& in, ParallelFor parallel_for)
      : n(in.count),
        dim(in.dim),
        gram_dim(divide_up(in.dim, kTile) * kTile),
        total_by_pairs(in.count <= kGramRows * in.dim),
        inverse_norms(in.count),
        self_cosines(in.count),
        unit(
            in.count, in.dim, true,
            [&](int64_t k, Real* to) {
              inverse_norms.data()[k] = normalize(in.features + in.order[k] * in.dim, in.dim, to);
              self_cosines.data()[k] = dot(to, to, in.dim);
            },
            parallel_for),
        classes_(unit.tiles * kTile),
        runs_(in.count),
        total_(in.dim) {
    for (int64_t k = 0; k < n; ++k) {
      if (k == 0 || in.labels[k] != in.labels[k - 1]) runs_.data()[run_count_++] = {k, k};
      runs_.data()[run_count_ - 1].end = k + 1;
      classes_.data()[k] = static_cast<Integer<Real>>(run_count_ - 1);
    }
    for (int64_t k = n; k < unit.tiles * kTile; ++k) classes_.data()[k] = -1;
    find_means(parallel_for);
  }

  bool is_big(const Range& run) const {
    return !total_by_pairs && run.size() > kGramRows * dim;
  }

  // The column tiles with pairs of a row tile that are computed one by one: of its classes, if not of all, in the order
  // of which rows are.
  Range columns_of(int64_t row_tile) const {
    if (total_by_pairs) return {0, unit.tiles};
    const Integer<Real>* classes = classes_.data() + row_tile * kTile;
    const Range &first = runs_.data()[classes[0]], &last = runs_.data()[classes[unit.size(row_tile) - 1]];
    if (first.begin == last.begin && is_big(first)) return {row_tile, row_tile};
    return {is_big(first) ? row_tile : first.begin / kTile, is_big(last) ? row_tile + 1 : divide_up(last.end, kTile)};
  }

  // Calls each(row, column, cosine, positives, negatives) for the vectors of a tile with pairs that are computed one by
  // one: negatives only where all pairs are.
  template <class Each>
  void for_each_vector(int64_t row_tile, int64_t column_tile, bool upper, Real* cosines, const Each& each) const {
    const Integer<Real>*row_classes = classes_.data() + row_tile * kTile,
          *column_classes = classes_.data() + column_tile * kTile;
    const int64_t rows = unit.size(row_tile), columns = unit.size(column_tile);
    multiply_tiles(unit.columns(row_tile), unit.columns(column_tile), dim, cosines);
    const Mask<Real> lanes = lane_numbers<Real>(), none{};
    for (int64_t r = 0; r < rows; ++r) {
      if (is_big(runs_.data()[row_classes[r]])) continue;
      for (int64_t c = 0; c < columns; c += kLanes<Real>) {
        const Mask<Real> column = lanes + static_cast<Integer<Real>>(c);
        Mask<Real> kept = column < static_cast<Integer<Real>>(columns);
        if (row_tile == column_tile)
          kept &= upper ? column > static_cast<Integer<Real>>(r) : column != static_cast<Integer<Real>>(r);
        Mask<Real> classes;
        __builtin_memcpy(&classes, column_classes + c, sizeof classes);
        const Mask<Real> same = classes == row_classes[r];
        each(r, c, load(cosines + r * kTile + c), same & kept, total_by_pairs ? ~same & kept : none);
      }
    }
  }

  // gram [gram_dim][gram_dim] = Σ_{begin ≤ k < end} r_k r_kᵀ, in double.
  void fill_gram(const Range& run, double* gram, ParallelFor parallel_for) const {
    const int64_t blocks = gram_dim / kTile;
    parallel_for(blocks, [&](int64_t first, int64_t last) {
      const Buffer<double> chunk(kGramChunk * gram_dim);
      for (int64_t task = first; task < last; ++task) {
        const int64_t top = balanced(task, blocks) * kTile;
        for (int64_t k = top * gram_dim; k < (top + kTile) * gram_dim; ++k) gram[k] = 0;
        for (int64_t k = run.begin; k < run.end; k += kGramChunk) {
          const int64_t rows = min(kGramChunk, run.end - k);
          for (int64_t r = 0; r < rows; ++r) to_double(k + r, chunk.data() + r * gram_dim);
          for (int64_t c = top; c < gram_dim; c += kColumns<double>)
            for (int64_t i = top; i < top + kTile; i += kBlock) {
              Vec<double> sums[kBlock][2];
              for (int r = 0; r < kBlock; ++r)
                for (int v = 0; v < 2; ++v) sums[r][v] = load(gram + (i + r) * gram_dim + c + v * kLanes<double>);
              multiply<1>(chunk.data() + i, gram_dim, chunk.data() + c, gram_dim, rows, sums);
              for (int r = 0; r < kBlock; ++r)
                for (int v = 0; v < 2; ++v) store(gram + (i + r) * gram_dim + c + v * kLanes<double>, sums[r][v]);
            }
        }
      }
    });
    for (int64_t i = 0; i < gram_dim; ++i)
      for (int64_t j = i + 1; j < gram_dim; ++j) gram[j * gram_dim + i] = gram[i * gram_dim + j];
  }

  // Σ s² over the ordered pairs of a run, the pairs (i, i) left out.
  double sum_of_squares(const Range& run, double* gram, ParallelFor parallel_for) const {
    fill_gram(run, gram, parallel_for);
    double sum = 0;
    for (int64_t k = 0; k < gram_dim * gram_dim; ++k) sum += gram[k] * gram[k];
    for (int64_t k = run.begin; k < run.end; ++k) sum -= self_cosines.data()[k] * self_cosines.data()[k];
    return sum;
  }

  // Σ r over a run, in double [dim].
  void sum_rows(const Range& run, double* sum) const {
    for (int64_t c = 0; c < dim; ++c) sum[c] = 0;
    for (int64_t k = run.begin; k < run.end; ++k) add_row(k, sum);
  }

  // r_k in double, zero-padded [gram_dim].
  void to_double(int64_t k, double* to) const {
    const Real* row = unit.rows(0) + k * unit.stride;
    for (int64_t c = 0; c < dim; ++c) to[c] = row[c];
    for (int64_t c = dim; c < gram_dim; ++c) to[c] = 0;
  }

  const Range* runs() const {
    return runs_.data();
  }
  int64_t run_count() const {
    return run_count_;
  }
  Range everything() const {
    return {0, n};
  }
  const double* total() const {  // Σ r [dim]
    return total_.data();
  }

  const int64_t n, dim, gram_dim;
  const bool total_by_pairs;
  const Buffer<double> inverse_norms;  // 1/‖x‖, in the order of the visit; 0 for a row of zeros
  const Buffer<double> self_cosines;   // s_kk: 1 up to rounding, 0 for a row of zeros
  const TiledRows<Real> unit;
  double pairs[2], mean[2];  // of positives, of negatives

 private:
  void add_row(int64_t k, double* sum) const {
    const Real* row = unit.rows(0) + k * unit.stride;
    for (int64_t c = 0; c < dim; ++c) sum[c] += row[c];
  }

  // Σ_{i≠j} s = ‖Σ r‖² − Σ s_ii, for each class and in total.
  void find_means(ParallelFor parallel_for) {
    const Buffer<double> sums(run_count_);
    parallel_for(run_count_, [&](int64_t begin, int64_t end) {
      const Buffer<double> sum(dim);
      for (int64_t run = begin; run < end; ++run) {
        sum_rows(runs_.data()[run], sum.data());
        double square = 0, self = 0;
        for (int64_t c = 0; c < dim; ++c) square += sum.data()[c] * sum.data()[c];
        for (int64_t k = runs_.data()[run].begin; k < runs_.data()[run].end; ++k) self += self_cosines.data()[k];
        sums.data()[run] = square - self;
      }
    });
    double positive = 0, positive_pairs = 0, square = 0, self = 0;
    for (int64_t run = 0; run < run_count_; ++run) {
      const double size = static_cast<double>(runs_.data()[run].size());
      positive += size > 1 ? sums.data()[run] : 0;  // of a single row, rounding is all there is
      positive_pairs += size * (size - 1);
    }
    const int64_t parts = clamp(n / 256, 1, 64), part = divide_up(n, parts);
    const Buffer<double> part_sums(parts * dim);
    parallel_for(parts, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p)
        sum_rows({min(p * part, n), min((p + 1) * part, n)}, part_sums.data() + p * dim);
    });
    for (int64_t c = 0; c < dim; ++c) {
      total_.data()[c] = 0;
      for (int64_t p = 0; p < parts; ++p) total_.data()[c] += part_sums.data()[p * dim + c];
    }
    for (int64_t c = 0; c < dim; ++c) square += total_.data()[c] * total_.data()[c];
    for (int64_t k = 0; k < n; ++k) self += self_cosines.data()[k];
    pairs[0] = positive_pairs;
    pairs[1] = static_cast<double>(n) * static_cast<double>(n - 1) - positive_pairs;
    mean[0] = pairs[0] > 0 ? positive / pairs[0] : 0;
    mean[1] = pairs[1] > 0 ? (square - self - positive) / pairs[1] : 0;
  }

  const Buffer<Integer<Real>> classes_;
  const Buffer<Range> runs_;
  int64_t run_count_ = 0;
  const Buffer<double> total_;
};

// α + β s is what a cosine's gradient is, apart from the factor of 2 for (i, j) and (j, i).
struct GradSimilarity {
  double alpha, beta;
};

// Σ_j (α + β s_kj) r_j over the rows j ≠ k of a run, added to the gradients of its rows [n][stride].
template <class Real>
void add_gram_gradients(const Moments<Real>& in, const Range& run, const double* sum, GradSimilarity grad_similarity,
                        double* gram, Real* grads, ParallelFor parallel_for) {
  in.fill_gram(run, gram, parallel_for);
  const int64_t tiles = divide_up(run.size(), kTile), width = in.gram_dim;
  parallel_for(tiles, [&](int64_t begin, int64_t end) {
    Buffer<double> memory(3 * kTile * width);
    double *rows = memory.take(kTile * width), *columns = memory.take(kTile * width),
           *products = memory.take(kTile * width);
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t first = run.begin + tile * kTile, count = min(kTile, run.end - first);
      for (int64_t k = 0; k < kTile * width; ++k) rows[k] = 0;
      for (int64_t r = 0; r < count; ++r) in.to_double(first + r, rows + r * width);
      transpose_tile(rows, width, kTile, width, columns, kTile);
      for (int64_t c = 0; c < width; c += kColumns<double>)
        for (int64_t i = 0; i < kTile; i += kBlock) {
          Vec<double> sums[kBlock][2] = {};
          multiply<1>(columns + i, kTile, gram + c, width, width, sums);
          for (int r = 0; r < kBlock; ++r)
            for (int v = 0; v < 2; ++v) store(products + (i + r) * width + c + v * kLanes<double>, sums[r][v]);
        }
      for (int64_t r = 0; r < count; ++r) {
        const double *row = rows + r * width, *product = products + r * width, self = in.self_cosines.data()[first + r];
        Real* to = grads + (first + r) * in.unit.stride;
        for (int64_t c = 0; c < in.dim; ++c)
          to[c] += static_cast<Real>(grad_similarity.alpha * (sum[c] - row[c]) +
                                     grad_similarity.beta * (product[c] - self * row[c]));
      }
    }
  });
}

}  // namespace

template <class Real>
void similarity_moments(const LabeledFeatures<Real>& features, Real* moments, ParallelFor parallel_for) {
  const Moments<Real> in(features, parallel_for);
  // Σ (s − mean)² over i < j, in tiles of pairs.
  const int64_t tiles = in.unit.tiles;
  const Buffer<double> parts(2 * tiles);
  const Vec<Real> positive_mean = broadcast(static_cast<Real>(in.mean[0])),
                  negative_mean = broadcast(static_cast<Real>(in.mean[1]));
  parallel_for(tiles, [&](int64_t begin, int64_t end) {
    const Buffer<Real> cosines(kTile * kTile);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row_tile = balanced(task, tiles);
      double* part = parts.data() + 2 * row_tile;
      part[0] = part[1] = 0;
      for (int64_t column_tile = row_tile; column_tile < in.columns_of(row_tile).end; ++column_tile) {
        Vec<Real> sums[2] = {};
        in.for_each_vector(row_tile, column_tile, true, cosines.data(),
                           [&](int64_t, int64_t, Vec<Real> cosine, Mask<Real> positives, Mask<Real> negatives) {
                             const Vec<Real> none{}, to_positive = cosine - positive_mean,
                                                     to_negative = cosine - negative_mean;
                             sums[0] += positives ? to_positive * to_positive : none;
                             sums[1] += negatives ? to_negative * to_negative : none;
                           });
        for (int k = 0; k < 2; ++k)
          for (int lane = 0; lane < kLanes<Real>; ++lane) part[k] += sums[k][lane];
      }
    }
  });
  double spread[2] = {};
  for (int64_t tile = 0; tile < tiles; ++tile)
    for (int k = 0; k < 2; ++k) spread[k] += 2 * parts.data()[2 * tile + k];
  if (!in.total_by_pairs) {
    const Buffer<double> gram(in.gram_dim * in.gram_dim);
    for (int64_t run = 0; run < in.run_count(); ++run)
      if (in.is_big(in.runs()[run])) {
        // Σ (s − mean)² = Σ s² − mean (2 Σ s − mean·count), Σ s being ‖Σ r‖² less the pairs (i, i)
        const double size = static_cast<double>(in.runs()[run].size());
        const Buffer<double> sum(in.dim);
        in.sum_rows(in.runs()[run], sum.data());
        double cosines = 0;
        for (int64_t c = 0; c < in.dim; ++c) cosines += sum.data()[c] * sum.data()[c];
        for (int64_t k = in.runs()[run].begin; k < in.runs()[run].end; ++k) cosines -= in.self_cosines.data()[k];
        spread[0] += in.sum_of_squares(in.runs()[run], gram.data(), parallel_for) -
                     in.mean[0] * (2 * cosines - in.mean[0] * size * (size - 1));
      }
    // All pairs about the negatives' mean, less the positives.
    const double gap = in.mean[0] - in.mean[1], all_sum = in.pairs[0] * in.mean[0] + in.pairs[1] * in.mean[1];
    const double all = in.sum_of_squares(in.everything(), gram.data(), parallel_for) -
                       in.mean[1] * (2 * all_sum - in.mean[1] * (in.pairs[0] + in.pairs[1]));
    spread[1] = all - (spread[0] + in.pairs[0] * gap * gap);
  }
  for (int k = 0; k < 2; ++k) {
    const double variance = in.pairs[k] > 0 ? spread[k] / in.pairs[k] : 0;
    moments[2 * k] = static_cast<Real>(in.mean[k]);
    moments[2 * k + 1] = static_cast<Real>(variance < 0 ? 0 : variance);
  }
}

template <class Real>
void similarity_moments_backward(const LabeledFeatures<Real>& features, const Real* moments, const Real* grad_moments,
                                 Real* grad_features, ParallelFor parallel_for) {
  const Moments<Real> in(features, parallel_for);
  const int64_t tiles = in.unit.tiles, dim = in.dim, stride = in.unit.stride;
  // ∂mean/∂s = 1/count, ∂var/∂s = 2 (s − mean)/count; a pair is met as (i, j) and as (j, i).
  GradSimilarity grad_similarities[2];
  double grad_at_mean[2];
  for (int k = 0; k < 2; ++k) {
    const double count = in.pairs[k] > 0 ? in.pairs[k] : 1;
    grad_similarities[k].beta = in.pairs[k] > 0 ? 4 * grad_moments[2 * k + 1] / count : 0;
    grad_at_mean[k] = in.pairs[k] > 0 ? 2 * grad_moments[2 * k] / count : 0;
    grad_similarities[k].alpha = grad_at_mean[k] - grad_similarities[k].beta * in.mean[k];
  }
  const GradSimilarity difference{grad_similarities[0].alpha - grad_similarities[1].alpha,
                                  grad_similarities[0].beta - grad_similarities[1].beta};
  const Buffer<Real> grads(tiles * kTile * stride);
  parallel_for(tiles, [&](int64_t begin, int64_t end) {
    Buffer<Real> memory(2 * kTile * kTile);
    Real *cosines = memory.take(kTile * kTile), *weights = memory.take(kTile * kTile);
    const auto grad_similarity_of = [&](int k, Vec<Real> cosine) {
      return (cosine - static_cast<Real>(in.mean[k])) * static_cast<Real>(grad_similarities[k].beta) +
             static_cast<Real>(grad_at_mean[k]);
    };
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row_tile = balanced(task, tiles);
      Real* to = grads.data() + row_tile * kTile * stride;
      for (int64_t k = 0; k < kTile * stride; ++k) to[k] = 0;
      const Range columns = in.columns_of(row_tile);
      for (int64_t column_tile = columns.begin; column_tile < columns.end; ++column_tile) {
        for (int64_t k = 0; k < kTile * kTile; ++k) weights[k] = 0;
        in.for_each_vector(row_tile, column_tile, false, cosines,
                           [&](int64_t r, int64_t c, Vec<Real> cosine, Mask<Real> positives, Mask<Real> negatives) {
                             const Vec<Real> none{}, positive = grad_similarity_of(0, cosine),
                                                     negative = grad_similarity_of(1, cosine);
                             // By RᵀR all pairs get the negatives' grad_similarity.
                             const Vec<Real> own = in.total_by_pairs ? positive : positive - negative;
                             store(weights + r * kTile + c, positives ? own : negatives ? negative : none);
                           });
        add_product(weights, in.unit.rows(column_tile), stride, to);
      }
    }
  });
  if (!in.total_by_pairs) {
    const Buffer<double> gram(in.gram_dim * in.gram_dim), sum(dim);
    add_gram_gradients(in, in.everything(), in.total(), grad_similarities[1], gram.data(), grads.data(), parallel_for);
    for (int64_t run = 0; run < in.run_count(); ++run)
      if (in.is_big(in.runs()[run])) {
        in.sum_rows(in.runs()[run], sum.data());
        add_gram_gradients(in, in.runs()[run], sum.data(), difference, gram.data(), grads.data(), parallel_for);
      }
  }
  // r = x/‖x‖: ∂x = (∂r − (r·∂r) r)/‖x‖.
  parallel_for(in.n, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const Real *row = in.unit.rows(0) + k * stride, *grad = grads.data() + k * stride;
      const double along = dot(row, grad, dim), factor = in.inverse_norms.data()[k];
      Real* to = grad_features + features.order[k] * dim;
      for (int64_t c = 0; c < dim; ++c) to[c] = static_cast<Real>(factor * (grad[c] - along * row[c]));
    }
  });
}

#define SSM_INSTANTIATE(Real)                                                         \
  template void similarity_moments(const LabeledFeatures<Real>&, Real*, ParallelFor); \
  template void similarity_moments_backward(const LabeledFeatures<Real>&, const Real*, const Real*, Real*, ParallelFor);
SSM_INSTANTIATE(float)
SSM_INSTANTIATE(double)

}  // namespace ssmkernels::SSM_ISA
