// SPDX-License-Identifier: BSD-3-Clause
#include "pair_ranking_loss.h"

#include "sweep.h"

namespace ssmkernels::SSM_ISA {
namespace {

// The classes of both sides, numbered in the order of their labels.
template <class Real>
struct RankingClasses {
  RankingClasses(const RankingPairs<Real>& pairs, const RankingLabels& labels)
      : rows(divide_up(pairs.count, kTile) * kTile),
        references(labels.reference_labels ? divide_up(pairs.reference_count, kTile) * kTile : 0) {
    const int64_t n = pairs.count, m = labels.reference_labels ? pairs.reference_count : 0;
    int64_t i = 0, j = 0, same = 0;
    for (Integer<Real> number = 0; i < n || j < m; ++number) {
      const int64_t label = j == m || (i < n && labels.labels[i] < labels.reference_labels[j])
                                ? labels.labels[i]
                                : labels.reference_labels[j];
      const int64_t first_row = i, first_reference = j;
      for (; i < n && labels.labels[i] == label; ++i) rows.data()[i] = number;
      for (; j < m && labels.reference_labels[j] == label; ++j) references.data()[j] = number;
      same += (i - first_row) * (labels.reference_labels ? j - first_reference : i - first_row - 1);
    }
    for (int64_t k = n; k < divide_up(n, kTile) * kTile; ++k) rows.data()[k] = -1;
    for (int64_t k = m; k < divide_up(m, kTile) * kTile; ++k) references.data()[k] = -1;
    pair_counts[0] = same;
    pair_counts[1] = (labels.reference_labels ? n * m : n * (n - 1)) - same;
  }

  const Buffer<Integer<Real>> rows, references;
  int64_t pair_counts[2];
};

template <class Real>
struct LabelSelector {
  const Integer<Real>*left, *right;
  int64_t left_count, right_count;

  TileKind begin(int64_t row_tile, int64_t column_tile, Real*) const {
    const int64_t i = row_tile * kTile, j = column_tile * kTile;
    const bool apart =
        left[min(i + kTile, left_count) - 1] < right[j] || right[min(j + kTile, right_count) - 1] < left[i];
    return apart ? TileKind::negatives : TileKind::mixed;
  }

  Candidates<Real> select(int64_t row_tile, int64_t column_tile, int64_t r, int64_t c, const Real*) const {
    Mask<Real> classes;
    __builtin_memcpy(&classes, right + column_tile * kTile + c, sizeof classes);
    const Mask<Real> same = classes == left[row_tile * kTile + r];
    return {same, ~same};
  }
};

}  // namespace

template <class Real>
void pair_ranking_loss(const RankingPairs<Real>& pairs, const RankingLabels& labels, const RankingLoss<Real>& out,
                       ParallelFor parallel_for) {
  const RankingClasses<Real> classes(pairs, labels);
  const Frame<Real> frame(pairs, parallel_for);
  const RankingRows<Real> rows(pairs.rows, labels.order, pairs.count, pairs.dim, frame, false, parallel_for);
  if (!pairs.references) {
    const LabelSelector<Real> selector{classes.rows.data(), classes.rows.data(), pairs.count, pairs.count};
    return ranking_loss(pairs, rows, rows, selector, classes.pair_counts, out, parallel_for);
  }
  const RankingRows<Real> references(pairs.references, labels.reference_order, pairs.reference_count, pairs.dim, frame,
                                     false, parallel_for);
  const LabelSelector<Real> selector{classes.rows.data(), classes.references.data(), pairs.count,
                                     pairs.reference_count};
  ranking_loss(pairs, rows, references, selector, classes.pair_counts, out, parallel_for);
}

template <class Real>
void pair_ranking_loss_backward(const RankingPairs<Real>& pairs, const RankingLabels& labels,
                                const RankingGradients<Real>& in, ParallelFor parallel_for) {
  const RankingClasses<Real> classes(pairs, labels);
  const Frame<Real> frame(pairs, parallel_for);
  const RankingRows<Real> rows(pairs.rows, labels.order, pairs.count, pairs.dim, frame, true, parallel_for);
  if (!pairs.references) {
    const LabelSelector<Real> selector{classes.rows.data(), classes.rows.data(), pairs.count, pairs.count};
    return ranking_gradient(pairs, rows, rows, selector, in, rows.tiled.tiles, 1, in.rows, parallel_for);
  }
  const RankingRows<Real> references(pairs.references, labels.reference_order, pairs.reference_count, pairs.dim, frame,
                                     true, parallel_for);
  const Integer<Real>*left = classes.rows.data(), *right = classes.references.data();
  const LabelSelector<Real> selector{left, right, pairs.count, pairs.reference_count};
  const LabelSelector<Real> swapped{right, left, pairs.reference_count, pairs.count};
  ranking_gradient(pairs, rows, references, selector, in, references.tiled.tiles, 1, in.rows, parallel_for);
  ranking_gradient(pairs, references, rows, swapped, in, 1, references.tiled.tiles, in.references, parallel_for);
}

#define SSM_INSTANTIATE(Real)                                                                                \
  template void pair_ranking_loss(const RankingPairs<Real>&, const RankingLabels&, const RankingLoss<Real>&, \
                                  ParallelFor);                                                              \
  template void pair_ranking_loss_backward(const RankingPairs<Real>&, const RankingLabels&,                  \
                                           const RankingGradients<Real>&, ParallelFor);
SSM_INSTANTIATE(float)
SSM_INSTANTIATE(double)

}  // namespace ssmkernels::SSM_ISA
