// SPDX-License-Identifier: BSD-3-Clause
// The walk over tiles of pairs that both ranking losses take. A selector says which pairs of a tile are positives and
// which negatives.
//
// Distances come from products, d² = |x_i|² + |x_j|² − 2 x_i·x_j, of rows less their mean, which changes no distance
// and leaves less to cancel, and times a power of two where their squares would leave the range. Where d² is small
// against |x_i|² + |x_j|² all the same, and the pair matters, it is computed again from the rows themselves, and so is
// the pair's gradient.
#pragma once

#include "tiles.h"

namespace ssmkernels::SSM_ISA {

inline constexpr double kClose = 1.0 / 32;    // d² below this share of |x_i|² + |x_j|² is computed again
inline constexpr int kSparse = 3 * 1024 / 8;  // active pairs of a tile up to which rows are added one by one

enum class TileKind { empty, negatives, mixed };

// Pairs of a row and a vector of columns.
template <class Real>
struct Candidates {
  Mask<Real> positives, negatives;
};

// What a thread works in: products and cosines of a tile, K, and gradients with the row sums of K.
template <class Real>
struct TileScratch {
  explicit TileScratch(int64_t stride)
      : memory(3 * kTile * kTile + kTile * stride + kTile),
        products(memory.take(kTile * kTile)),
        cosines(memory.take(kTile * kTile)),
        weights(memory.take(kTile * kTile)),
        sums(memory.take(kTile * stride)),
        row_sums(memory.take(kTile)) {}

  Buffer<Real> memory;
  Real *products, *cosines, *weights;  // [kTile][kTile]
  Real *sums, *row_sums;               // [kTile][stride], [kTile]
};

// What rows are less, and times, before their products are taken: their mean over both sides, and a power of two that
// brings rows whose squares would overflow or underflow to about 1; for others it is 1.
template <class Real>
class Frame {
 public:
  Frame(const RankingPairs<Real>& pairs, ParallelFor parallel_for)
      : count(pairs.count + (pairs.references ? pairs.reference_count : 0)),
        parts(clamp(count / 256, 1, 64)),
        scale(scale_of(pairs, parallel_for)),
        center(pairs.dim) {
    find_center(pairs, parallel_for);
  }

  const int64_t count, parts;  // rows, and runs of them whose sums are added
  const double scale;
  const Buffer<Real> center;  // of the rows times the scale

 private:
  static constexpr int kSafeExponent = sizeof(Real) == 4 ? 50 : 450, kMostExponent = sizeof(Real) == 4 ? 126 : 1022;

  // Calls each(part, row) for all rows.
  template <class Each>
  void for_each_row(const RankingPairs<Real>& pairs, ParallelFor parallel_for, const Each& each) const {
    const int64_t part = divide_up(count, parts);
    parallel_for(parts, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p)
        for (int64_t k = p * part; k < min((p + 1) * part, count); ++k)
          each(p, k < pairs.count ? pairs.rows + k * pairs.dim : pairs.references + (k - pairs.count) * pairs.dim);
    });
  }

  double scale_of(const RankingPairs<Real>& pairs, ParallelFor parallel_for) const {
    const Buffer<Real> largest_of(parts);
    for (int64_t p = 0; p < parts; ++p) largest_of.data()[p] = 0;
    for_each_row(pairs, parallel_for, [&](int64_t p, const Real* row) {
      Real largest = largest_of.data()[p];
      for (int64_t c = 0; c < pairs.dim; ++c) {
        const Real magnitude = row[c] < 0 ? -row[c] : row[c];
        largest = magnitude > largest ? magnitude : largest;  // not NaN
      }
      largest_of.data()[p] = largest;
    });
    Real largest = 0;
    for (int64_t p = 0; p < parts; ++p) largest = largest_of.data()[p] > largest ? largest_of.data()[p] : largest;
    if (!(largest > 0 && largest < static_cast<Real>(__builtin_inf()))) return 1;
    int exponent;
    __builtin_frexp(largest, &exponent);
    if (exponent >= -kSafeExponent && exponent <= kSafeExponent) return 1;
    return __builtin_ldexp(1, static_cast<int>(min(1 - exponent, kMostExponent)));
  }

  void find_center(const RankingPairs<Real>& pairs, ParallelFor parallel_for) const {
    const Buffer<double> sums(parts * pairs.dim);
    for (int64_t k = 0; k < parts * pairs.dim; ++k) sums.data()[k] = 0;
    for_each_row(pairs, parallel_for, [&](int64_t p, const Real* row) {
      double* sum = sums.data() + p * pairs.dim;
      for (int64_t c = 0; c < pairs.dim; ++c) {
        const double entry = row[c] * scale;
        sum[c] += entry - entry == 0 ? entry : 0;  // a NaN or infinity is of its own row alone
      }
    });
    for (int64_t c = 0; c < pairs.dim; ++c) {
      double sum = 0;
      for (int64_t p = 0; p < parts; ++p) sum += sums.data()[p * pairs.dim + c];
      center.data()[c] = static_cast<Real>(sum / static_cast<double>(count > 0 ? count : 1));
    }
  }
};

// One side of the pairs, in the order of the visit and in a frame.
template <class Real>
struct RankingRows {
  RankingRows(const Real* from, const int64_t* order, int64_t count, int64_t dim, const Frame<Real>& frame,
              bool keep_rows, ParallelFor parallel_for)
      : from(from),
        order(order),
        scale(frame.scale),
        tiled(
            count, dim, keep_rows,
            [&](int64_t k, Real* to) {
              const Real* row = from + place(k) * dim;
              for (int64_t c = 0; c < dim; ++c)
                to[c] = static_cast<Real>(row[c] * frame.scale) - frame.center.data()[c];
            },
            parallel_for),
        squares(tiled.tiles * kTile) {
    parallel_for(tiled.tiles, [&](int64_t begin, int64_t end) {
      for (int64_t tile = begin; tile < end; ++tile)
        for (int64_t j = 0; j < kTile; j += kLanes<Real>) {
          Vec<Real> sum{};
          for (int64_t c = 0; c < dim; ++c) {
            const Vec<Real> x = load(tiled.columns(tile) + c * kTile + j);
            sum += x * x;
          }
          store(squares.data() + tile * kTile + j, sum);
        }
    });
  }

  int64_t place(int64_t k) const {
    return order ? order[k] : k;
  }
  const Real* original(int64_t k) const {
    return from + place(k) * tiled.dim;
  }

  const Real* from;
  const int64_t* order;  // or null
  const double scale;    // of the frame
  const TiledRows<Real> tiled;
  const Buffer<Real> squares;  // |x|²
};

// Pairs (left row, right row); of one set with itself if both are the same.
template <class Real, class Selector>
class RankingSweep {
 public:
  RankingSweep(const RankingPairs<Real>& pairs, const RankingRows<Real>& left, const RankingRows<Real>& right,
               const Selector& selector)
      : left_(left),
        right_(right),
        selector_(selector),
        self_(&left == &right),
        loss_scale_(left.scale < 1 ? left.scale : 1),
        distance_factor_(static_cast<Real>(loss_scale_ / left.scale)),
        positive_margin_(static_cast<Real>(pairs.positive_margin * loss_scale_)),
        negative_margin_(static_cast<Real>(pairs.negative_margin * loss_scale_)),
        negative_square_(square_of_margin(pairs.negative_margin * left.scale)) {}

  // Of the losses: that of the frame, unless it would take margins out of the range.
  double loss_scale() const {
    return loss_scale_;
  }

  struct Sums {
    double loss[2];                // of positives, of negatives; times the scale
    int64_t nonzero[2], pairs[2];  // pairs: only if they are to be counted
  };

  // Adds the losses of a tile; whether there is any. Of one set with itself each pair is met once, with i < j.
  bool add_losses(int64_t row_tile, int64_t column_tile, bool count_pairs, TileScratch<Real>& scratch,
                  Sums& out) const {
    Vec<Real> sums[2] = {};
    Mask<Real> nonzero[2] = {}, counted[2] = {};
    const auto count = [&](const Candidates<Real>& pairs) {
      counted[0] -= pairs.positives;  // true is −1
      counted[1] -= pairs.negatives;
    };
    const auto add = [&](int64_t, int64_t, const Candidates<Real>& pairs, Vec<Real> distance, Mask<Real>) {
      distance *= distance_factor_;
      const Vec<Real> none{}, over = distance - positive_margin_, under = negative_margin_ - distance;
      const Mask<Real> positives = pairs.positives & ~(over <= none), negatives = pairs.negatives & ~(under <= none);
      sums[0] += positives ? over : none;
      sums[1] += negatives ? under : none;
      nonzero[0] -= positives;
      nonzero[1] -= negatives;
    };
    for_each_vector(row_tile, column_tile, true, scratch, add, count, count_pairs);
    bool found = false;
    for (int part = 0; part < 2; ++part)
      for (int lane = 0; lane < kLanes<Real>; ++lane) {
        out.loss[part] += sums[part][lane];
        out.nonzero[part] += nonzero[part][lane];
        out.pairs[part] += counted[part][lane];
        found |= nonzero[part][lane] != 0;
      }
    return found;
  }

  // scratch.sums_i += Σ_j K_ij x_j and scratch.row_sums_i += Σ_j K_ij; close pairs add K_ij (e_j − e_i) to the former
  // and nothing else.
  void add_gradients(int64_t row_tile, int64_t column_tile, const Real* part_weights,
                     TileScratch<Real>& scratch) const {
    const int64_t stride = left_.tiled.stride;
    for (int64_t k = 0; k < kTile * kTile; ++k) scratch.weights[k] = 0;
    int active = 0;
    const auto add = [&](int64_t r, int64_t c, const Candidates<Real>& pairs, Vec<Real> distance, Mask<Real> close) {
      const Vec<Real> none{}, compared = distance * distance_factor_;
      const Mask<Real> positives = pairs.positives & ~(compared <= positive_margin_);
      const Mask<Real> negatives = pairs.negatives & ~(compared >= negative_margin_);
      const Vec<Real> numerator =
          (positives ? none + part_weights[0] : none) - (negatives ? none + part_weights[1] : none);
      Vec<Real> weight = distance == none ? none : numerator / distance;
      close &= weight != none;
      if (any(close))
        for (int lane = 0; lane < kLanes<Real>; ++lane)
          if (close[lane]) {
            const double factor = numerator[lane] / static_cast<double>(distance[lane]);  // alone it may be too large
            add_difference(row_tile * kTile + r, column_tile * kTile + c + lane, factor, scratch.sums + r * stride);
            weight[lane] = 0;
          }
      store(scratch.weights + r * kTile + c, weight);
      scratch.row_sums[r] += sum_lanes<Real>(weight);
      for (int lane = 0; lane < kLanes<Real>; ++lane) active += weight[lane] != 0;
    };
    for_each_vector(row_tile, column_tile, false, scratch, add, [](const Candidates<Real>&) {}, false);
    if (active > kSparse)
      add_product(scratch.weights, right_.tiled.rows(column_tile), stride, scratch.sums);
    else if (active > 0)
      add_sparse_product(scratch.weights, right_.tiled.rows(column_tile), stride, scratch.sums);
  }

 private:
  // Calls each(row, column, pairs, distances, close) for the vectors of a tile in which a pair may be active, and
  // count(pairs) for all.
  template <class Each, class Count>
  void for_each_vector(int64_t row_tile, int64_t column_tile, bool upper, TileScratch<Real>& scratch, const Each& each,
                       const Count& count, bool count_pairs) const {
    const TileKind kind = selector_.begin(row_tile, column_tile, scratch.cosines);
    if (kind == TileKind::empty) return;
    const Real *row_squares = left_.squares.data() + row_tile * kTile,
               *column_squares = right_.squares.data() + column_tile * kTile;
    multiply_tiles(left_.tiled.columns(row_tile), right_.tiled.columns(column_tile), left_.tiled.dim, scratch.products);
    const int64_t rows = left_.tiled.size(row_tile), columns = right_.tiled.size(column_tile);
    const bool diagonal = self_ && row_tile == column_tile, masked = diagonal || columns < kTile;
    if (kind == TileKind::negatives && !masked && !any_near(rows, row_squares, column_squares, scratch.products))
      return;
    const Mask<Real> lanes = lane_numbers<Real>();
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < columns; c += kLanes<Real>) {
        Candidates<Real> pairs = selector_.select(row_tile, column_tile, r, c, scratch.cosines);
        if (masked) {
          const Mask<Real> column = lanes + static_cast<Integer<Real>>(c);
          const Integer<Real> row = static_cast<Integer<Real>>(r);
          Mask<Real> kept = column < static_cast<Integer<Real>>(columns);
          if (diagonal) kept &= upper ? column > row : column != row;
          pairs = {pairs.positives & kept, pairs.negatives & kept};
        }
        if (count_pairs) count(pairs);
        const Vec<Real> scale = row_squares[r] + load(column_squares + c);
        Vec<Real> square = scale - 2 * load(scratch.products + r * kTile + c);
        const Mask<Real> wanted = pairs.positives | (pairs.negatives & ~(square >= near(scale)));
        if (!any(wanted)) continue;
        const Mask<Real> close = wanted & (square < scale * static_cast<Real>(kClose));
        Vec<Real> distance = sqrt(max(Vec<Real>{}, square));
        if (any(close))
          for (int lane = 0; lane < kLanes<Real>; ++lane)
            if (close[lane])
              distance[lane] = static_cast<Real>(distance_of(row_tile * kTile + r, column_tile * kTile + c + lane));
        each(r, c, pairs, distance, close);
      }
  }

  // d² from here on, a negative pair is surely not active.
  Vec<Real> near(Vec<Real> scale) const {
    return max(scale * static_cast<Real>(kClose), broadcast(negative_square_));
  }

  bool any_near(int64_t rows, const Real* row_squares, const Real* column_squares, const Real* products) const {
    Mask<Real> found{};
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < kTile; c += kLanes<Real>) {
        const Vec<Real> scale = row_squares[r] + load(column_squares + c);
        found |= ~(scale - 2 * load(products + r * kTile + c) >= near(scale));
      }
    return any(found);
  }

  // From the rows as they were given, in double, which holds the squares of all floats.
  double distance_of(int64_t i, int64_t j) const {
    constexpr int kParts = 16;  // which the compiler makes lanes of
    const Real *a = left_.original(i), *b = right_.original(j);
    const int64_t dim = left_.tiled.dim;
    double parts[kParts] = {}, sum = 0;
    int64_t c = 0;
    for (; c + kParts <= dim; c += kParts)
      for (int k = 0; k < kParts; ++k) {
        const double difference = a[c + k] * left_.scale - b[c + k] * left_.scale;
        parts[k] += difference * difference;
      }
    for (; c < dim; ++c) sum += (a[c] * left_.scale - b[c] * left_.scale) * (a[c] * left_.scale - b[c] * left_.scale);
    for (const double part : parts) sum += part;
    return __builtin_sqrt(sum);
  }

  void add_difference(int64_t i, int64_t j, double factor, Real* sums) const {
    const Real *a = left_.original(i), *b = right_.original(j);
    for (int64_t c = 0; c < left_.tiled.dim; ++c)
      sums[c] += static_cast<Real>(factor * (b[c] * left_.scale - a[c] * left_.scale));
  }

  // Larger than 0 for a margin that is, so that rows at the same place are near.
  static Real square_of_margin(double margin) {
    const Real square = static_cast<Real>(margin * margin), least = sizeof(Real) == 4 ? Real(1e-45) : Real(5e-324);
    return !(margin > 0) ? Real(-1) : square > 0 ? square : least;
  }

  const RankingRows<Real>&left_, &right_;
  const Selector& selector_;
  const bool self_;
  const double loss_scale_;
  const Real distance_factor_;  // from the frame's scale to that of the losses
  const Real positive_margin_, negative_margin_, negative_square_;
};

// L and w₊, w₋; pair_counts are those of positives and negatives, null if the sweep shall count.
template <class Real, class Selector>
static void ranking_loss(const RankingPairs<Real>& pairs, const RankingRows<Real>& left, const RankingRows<Real>& right,
                         const Selector& selector, const int64_t* pair_counts, const RankingLoss<Real>& out,
                         ParallelFor parallel_for) {
  using Sweep = RankingSweep<Real, Selector>;
  const Sweep sweep(pairs, left, right, selector);
  const bool self = &left == &right, count_pairs = out.reduction == Reduction::mean && !pair_counts;
  const int64_t row_tiles = left.tiled.tiles, column_tiles = right.tiled.tiles;
  const Buffer<typename Sweep::Sums> parts(row_tiles);
  parallel_for(row_tiles, [&](int64_t begin, int64_t end) {
    TileScratch<Real> scratch(0);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row_tile = self ? balanced(task, row_tiles) : task;
      typename Sweep::Sums& sums = parts.data()[row_tile] = {};
      for (int64_t column_tile = self ? row_tile : 0; column_tile < column_tiles; ++column_tile)
        out.active[row_tile * column_tiles + column_tile] =
            sweep.add_losses(row_tile, column_tile, count_pairs, scratch, sums);
    }
  });
  const int64_t times = self ? 2 : 1;  // (i, j) and (j, i)
  double loss = 0;
  for (int part = 0; part < 2; ++part) {
    double sum = 0;
    int64_t nonzero = 0, counted = 0;
    for (int64_t tile = 0; tile < row_tiles; ++tile) {
      sum += static_cast<double>(times) * parts.data()[tile].loss[part];
      nonzero += times * parts.data()[tile].nonzero[part];
      counted += times * parts.data()[tile].pairs[part];
    }
    if (pair_counts) counted = pair_counts[part];
    const int64_t divisor = out.reduction == Reduction::sum ? 1 : out.reduction == Reduction::mean ? counted : nonzero;
    const double weight = divisor > 0 ? 1 / static_cast<double>(divisor) : 0;
    out.weights[part] = static_cast<Real>(weight);
    loss += weight * sum;
  }
  *out.loss = static_cast<Real>(loss / sweep.loss_scale());
}

// ∂L/∂(left rows). `active` of the tile of (left, right) is at row_tile·row_step + column_tile·column_step.
template <class Real, class Selector>
static void ranking_gradient(const RankingPairs<Real>& pairs, const RankingRows<Real>& left,
                             const RankingRows<Real>& right, const Selector& selector, const RankingGradients<Real>& in,
                             int64_t row_step, int64_t column_step, Real* out, ParallelFor parallel_for) {
  const RankingSweep<Real, Selector> sweep(pairs, left, right, selector);
  const bool self = &left == &right;
  const int64_t row_tiles = left.tiled.tiles, dim = left.tiled.dim, stride = left.tiled.stride;
  const Real factor = *in.grad_loss * static_cast<Real>(self ? 2 : 1);  // K_ij + K_ji
  parallel_for(row_tiles, [&](int64_t begin, int64_t end) {
    TileScratch<Real> scratch(stride);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row_tile = balanced(task, row_tiles);
      for (int64_t k = 0; k < kTile * stride; ++k) scratch.sums[k] = 0;
      for (int64_t r = 0; r < kTile; ++r) scratch.row_sums[r] = 0;
      for (int64_t column_tile = 0; column_tile < right.tiled.tiles; ++column_tile) {
        const bool mirrored = self && column_tile < row_tile;  // the forward met the pairs with i < j
        const int64_t row = mirrored ? column_tile : row_tile, column = mirrored ? row_tile : column_tile;
        if (in.active[row * row_step + column * column_step])
          sweep.add_gradients(row_tile, column_tile, in.weights, scratch);
      }
      for (int64_t r = 0; r < left.tiled.size(row_tile); ++r) {
        const Real *row = left.tiled.rows(row_tile) + r * stride, *sums = scratch.sums + r * stride;
        Real* to = out + left.place(row_tile * kTile + r) * dim;
        for (int64_t c = 0; c < dim; ++c) to[c] = factor * (scratch.row_sums[r] * row[c] - sums[c]);
      }
    }
  });
}

}  // namespace ssmkernels::SSM_ISA
