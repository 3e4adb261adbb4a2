// SPDX-License-Identifier: BSD-3-Clause
#include "mined_pair_ranking_loss.h"

#include "sweep.h"

namespace ssmkernels::SSM_ISA {
namespace {

template <class Real>
TiledRows<Real> unit_rows(const RankingBasis<Real>& basis, int64_t count, ParallelFor parallel_for) {
  return {count, basis.dim, false, [&](int64_t k, Real* to) { normalize(basis.features + k * basis.dim, basis.dim, to); }, parallel_for};
}

template <class Real>
struct CosineSelector {
  const TiledRows<Real>& basis;
  Real positive_threshold, negative_threshold;

  TileKind begin(int64_t row_tile, int64_t column_tile, Real* cosines) const {
    multiply_tiles(basis.columns(row_tile), basis.columns(column_tile), basis.dim, cosines);
    return TileKind::mixed;
  }

  Candidates<Real> select(int64_t, int64_t, int64_t r, int64_t c, const Real* cosines) const {
    const Vec<Real> cosine = load(cosines + r * kTile + c);
    return {cosine >= positive_threshold, cosine <= negative_threshold};
  }
};

}  // namespace

template <class Real>
void mined_pair_ranking_loss(const RankingPairs<Real>& pairs, const RankingBasis<Real>& basis, const RankingLoss<Real>& out,
                             ParallelFor parallel_for) {
  const Buffer<Real> center(pairs.dim);
  mean_row(pairs, center.data(), parallel_for);
  const RankingRows<Real> rows(pairs.rows, nullptr, pairs.count, pairs.dim, center.data(), false, parallel_for);
  const TiledRows<Real> unit = unit_rows(basis, pairs.count, parallel_for);
  const CosineSelector<Real> selector{unit, basis.thresholds[0], basis.thresholds[1]};
  ranking_loss(pairs, rows, rows, selector, nullptr, out, parallel_for);
}

template <class Real>
void mined_pair_ranking_loss_backward(const RankingPairs<Real>& pairs, const RankingBasis<Real>& basis, const RankingGradients<Real>& in,
                                      ParallelFor parallel_for) {
  const Buffer<Real> center(pairs.dim);
  mean_row(pairs, center.data(), parallel_for);
  const RankingRows<Real> rows(pairs.rows, nullptr, pairs.count, pairs.dim, center.data(), true, parallel_for);
  const TiledRows<Real> unit = unit_rows(basis, pairs.count, parallel_for);
  const CosineSelector<Real> selector{unit, basis.thresholds[0], basis.thresholds[1]};
  ranking_gradient(pairs, rows, rows, selector, in, rows.tiled.tiles, 1, in.rows, parallel_for);
}

#define SSM_INSTANTIATE(Real)                                                                                                         \
  template void mined_pair_ranking_loss(const RankingPairs<Real>&, const RankingBasis<Real>&, const RankingLoss<Real>&, ParallelFor); \
  template void mined_pair_ranking_loss_backward(const RankingPairs<Real>&, const RankingBasis<Real>&, const RankingGradients<Real>&, \
                                                 ParallelFor);
SSM_INSTANTIATE(float)
SSM_INSTANTIATE(double)

}  // namespace ssmkernels::SSM_ISA
