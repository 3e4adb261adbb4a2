// SPDX-License-Identifier: BSD-3-Clause
#include "mined_pair_ranking_loss.h"

#include "sweep.h"

namespace ssmkernels::SSM_ISA {
namespace {

// Which pairs have a cosine of at least one threshold or at most the other. Products of unit rows tell it but for
// cosines that are as near to a threshold as they may be wrong. Those are taken again, as r_i·r_j/√(|r_i|²|r_j|²) in
// double, which is exact where that is a number: cosines of 0 and ±1 of rows of whole numbers, above all.
template <class Real>
class CosineSelector {
 public:
  CosineSelector(const RankingBasis<Real>& basis, int64_t count, ParallelFor parallel_for)
      : basis_(basis),
        lengths_(count),
        unit_(
            count, basis.dim, false,
            [&](int64_t k, Real* to) {
              const double inverse = normalize(row(k), basis.dim, to);
              int exponent;
              __builtin_frexp(inverse, &exponent);
              const double scale = inverse > 0 ? __builtin_ldexp(1, exponent) : 0;
              double squares = 0;
              for (int64_t c = 0; c < basis.dim; ++c) squares += row(k)[c] * scale * (row(k)[c] * scale);
              lengths_.data()[k] = {scale, squares};
            },
            parallel_for),
        positive_threshold_(basis.thresholds[0]),
        negative_threshold_(basis.thresholds[1]),
        error_(static_cast<Real>(basis.dim + 8) * (sizeof(Real) == 4 ? Real(6e-8) : Real(1.2e-16))) {}

  TileKind begin(int64_t row_tile, int64_t column_tile, Real* cosines) const {
    multiply_tiles(unit_.columns(row_tile), unit_.columns(column_tile), basis_.dim, cosines);
    return TileKind::mixed;
  }

  Candidates<Real> select(int64_t row_tile, int64_t column_tile, int64_t r, int64_t c, const Real* cosines) const {
    Vec<Real> cosine = load(cosines + r * kTile + c);
    const Mask<Real> unsure = is_near(cosine, positive_threshold_) | is_near(cosine, negative_threshold_);
    if (any(unsure))
      for (int lane = 0; lane < kLanes<Real>; ++lane) {
        const int64_t column = column_tile * kTile + c + lane;
        if (unsure[lane] && column < unit_.count) cosine[lane] = exact_cosine(row_tile * kTile + r, column);
      }
    return {cosine >= positive_threshold_, cosine <= negative_threshold_};
  }

 private:
  struct Length {
    double scale;    // a power of two that brings the row to about unit length; 0 for a row of zeros
    double squares;  // of the row times it
  };

  const Real* row(int64_t k) const {
    return basis_.features + k * basis_.dim;
  }
  Mask<Real> is_near(Vec<Real> cosine, Real threshold) const {
    return (cosine >= threshold - error_) & (cosine <= threshold + error_);
  }
  Real exact_cosine(int64_t i, int64_t j) const {
    const Length a = lengths_.data()[i], b = lengths_.data()[j];
    if (a.scale == 0 || b.scale == 0) return 0;
    double product = 0;
    for (int64_t c = 0; c < basis_.dim; ++c) product += row(i)[c] * a.scale * (row(j)[c] * b.scale);
    return static_cast<Real>(product / __builtin_sqrt(a.squares * b.squares));
  }

  const RankingBasis<Real>& basis_;
  const Buffer<Length> lengths_;
  const TiledRows<Real> unit_;
  const Real positive_threshold_, negative_threshold_, error_;
};

}  // namespace

template <class Real>
void mined_pair_ranking_loss(const RankingPairs<Real>& pairs, const RankingBasis<Real>& basis,
                             const RankingLoss<Real>& out, ParallelFor parallel_for) {
  const Frame<Real> frame(pairs, parallel_for);
  const RankingRows<Real> rows(pairs.rows, nullptr, pairs.count, pairs.dim, frame, false, parallel_for);
  const CosineSelector<Real> selector(basis, pairs.count, parallel_for);
  ranking_loss(pairs, rows, rows, selector, nullptr, out, parallel_for);
}

template <class Real>
void mined_pair_ranking_loss_backward(const RankingPairs<Real>& pairs, const RankingBasis<Real>& basis,
                                      const RankingGradients<Real>& in, ParallelFor parallel_for) {
  const Frame<Real> frame(pairs, parallel_for);
  const RankingRows<Real> rows(pairs.rows, nullptr, pairs.count, pairs.dim, frame, true, parallel_for);
  const CosineSelector<Real> selector(basis, pairs.count, parallel_for);
  ranking_gradient(pairs, rows, rows, selector, in, rows.tiled.tiles, 1, in.rows, parallel_for);
}

#define SSM_INSTANTIATE(Real)                                                                          \
  template void mined_pair_ranking_loss(const RankingPairs<Real>&, const RankingBasis<Real>&,          \
                                        const RankingLoss<Real>&, ParallelFor);                        \
  template void mined_pair_ranking_loss_backward(const RankingPairs<Real>&, const RankingBasis<Real>&, \
                                                 const RankingGradients<Real>&, ParallelFor);
SSM_INSTANTIATE(float)
SSM_INSTANTIATE(double)

}  // namespace ssmkernels::SSM_ISA
