// SPDX-License-Identifier: BSD-3-Clause
#include "nearest_neighbours.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <mutex>
#include <vector>

#include "../common/arithmetic.h"
#include "../common/buffer.h"
#include "../common/simd.h"

namespace ssmkernels::SSM_ISA {
namespace {

template <class Real>
inline constexpr int kPanel = 2 * kLanes<Real>;  // columns of a product that are in registers
#if defined(__AVX512F__) || defined(SSM_AVX512_LANES)
constexpr int kBlock = 8;  // rows of a product that are in registers, beside two vectors and a broadcast
#else
constexpr int kBlock = 6;
#endif
constexpr int64_t kTile = 192;              // rows, a whole number of panels and of blocks in every instruction set
constexpr int64_t kSteps = 256;             // dimensions of a panel that lie in the first-level cache
constexpr int64_t kTaskProducts = 1 << 30;  // multiply-adds of a task: some tens of milliseconds
constexpr int64_t kAhead = 8;               // offers for which the candidates are fetched from memory
constexpr int64_t kPairsAtOnce = 4096;      // of a task of pair_products

template <class Real>
inline constexpr Real kInfinity = std::numeric_limits<Real>::infinity();

template <class Real>
struct Candidate {
  Real score;
  int32_t id;

  bool operator<(const Candidate& other) const {  // the better one first; without a branch, which would be mispredicted
    return (score > other.score) | ((score == other.score) & (id < other.id));
  }
};

// Moves the best `count` candidates to the front, the last of them at its end: quickselect, whose partitions are
// without a branch, unlike std::nth_element's. Once it has not halved the range often enough, std::nth_element ends it.
template <class Real>
void best_first(Candidate<Real>* begin, Candidate<Real>* end, int64_t count) {
  Candidate<Real>* const last = begin + count - 1;
  for (int64_t rounds = 0; end - begin > 8 && rounds < 16; ++rounds) {
    Candidate<Real>* const middle = begin + (end - begin) / 2;
    if (*middle < *begin) std::swap(*middle, *begin);
    if (*(end - 1) < *begin) std::swap(*(end - 1), *begin);
    if (*(end - 1) < *middle) std::swap(*(end - 1), *middle);
    const Candidate<Real> pivot = *middle;
    std::swap(*middle, *(end - 1));
    Candidate<Real>* worse = begin;  // of those up to `it`, the first that is not better than the pivot
    for (Candidate<Real>* it = begin; it < end - 1; ++it) {
      const Candidate<Real> candidate = *it;
      *it = *worse;
      *worse = candidate;
      worse += candidate < pivot;
    }
    std::swap(*worse, *(end - 1));
    if (worse == last) return;
    if (worse < last)
      begin = worse + 1;
    else
      end = worse;
  }
  std::nth_element(begin, last, end);
}

// Products of kBlock rows with kPanel columns, in registers.
template <class Real>
struct Block {
  Vec<Real> sums[kBlock][2];

  void load_from(const Real* products) {
#pragma GCC unroll 8
    for (int r = 0; r < kBlock; ++r)
      for (int half = 0; half < 2; ++half) sums[r][half] = load(products + r * kPanel<Real> + half * kLanes<Real>);
  }

  void store_to(Real* products) const {
#pragma GCC unroll 8
    for (int r = 0; r < kBlock; ++r)
      for (int half = 0; half < 2; ++half) store(products + r * kPanel<Real> + half * kLanes<Real>, sums[r][half]);
  }

  // += Σ_d a[d][r] b[d][lane]
  void multiply(const Real* a, const Real* b, int64_t steps) {
    for (int64_t d = 0; d < steps; ++d) {
      const Vec<Real> first = load(b + d * kPanel<Real>), second = load(b + d * kPanel<Real> + kLanes<Real>);
#pragma GCC unroll 8
      for (int r = 0; r < kBlock; ++r) {
        const Vec<Real> factor = broadcast(a[d * kBlock + r]);
        sums[r][0] += factor * first;
        sums[r][1] += factor * second;
      }
    }
  }
};

// to[block][d][r] = from[first + block·kWide + r][d] of a matrix [rows, dim], zeros beyond the last row.
template <int kWide, class Real>
void pack(const Real* from, int64_t rows, int64_t dim, int64_t first, int64_t count, Real* to) {
  for (int64_t block = 0; block * kWide < count; ++block)
    for (int64_t r = 0; r < kWide; ++r) {
      const int64_t row = first + block * kWide + r;
      Real* at = to + block * kWide * dim + r;
      for (int64_t d = 0; d < dim; ++d) at[d * kWide] = row < rows ? from[row * dim + d] : Real(0);
    }
}

// The best candidates of every row so far, unordered, and the k-th of them, once there are k: what comes has to be
// better. A score that equals the k-th's is better if its id is lower, so among equal rows, which are met in the order
// of their ids but for the first tile, few candidates are taken.
template <class Real>
class Best {
 public:
  Best(int64_t rows, int64_t neighbours)
      : neighbours_(neighbours),
        capacity_(2 * neighbours + 32),
        padded_(divide_up(rows, kTile) * kTile),
        scores_(padded_),
        below_(padded_),
        ids_(padded_),
        counts_(padded_),
        candidates_(rows * capacity_) {
    std::fill_n(counts_.data(), padded_, 0);
    std::fill_n(ids_.data(), padded_, std::numeric_limits<int32_t>::max());
    for (const Buffer<Real>* bounds : {&scores_, &below_}) {
      std::fill_n(bounds->data(), rows, -kInfinity<Real>);
      std::fill(bounds->data() + rows, bounds->data() + padded_, kInfinity<Real>);  // nothing is taken beyond the rows
    }
  }

  // What the score of a candidate has to exceed, whose id is `id` or more, for each row of a tile: [kTile].
  void bounds(int64_t first_row, int64_t id, Real* out) const {
    const Real *scores = scores_.data() + first_row, *below = below_.data() + first_row;
    const int32_t* ids = ids_.data() + first_row;
    for (int64_t r = 0; r < kTile; ++r) out[r] = id > ids[r] ? scores[r] : below[r];
  }

  void prefetch(int64_t row) const {
    __builtin_prefetch(candidates_.data() + row * capacity_ + counts_.data()[row], 1);
  }

  void add(int64_t row, int32_t id, Real score) {
    if (!is_better(row, id, score)) return;
    int32_t& count = counts_.data()[row];
    if (count == capacity_) {
      shrink(row);
      if (!is_better(row, id, score)) return;
    }
    candidates_.data()[row * capacity_ + count++] = {score, id};
  }

  void write(int64_t row, int32_t* ids, Real* scores) {
    if (counts_.data()[row] > neighbours_) shrink(row);
    Candidate<Real>* candidates = candidates_.data() + row * capacity_;
    const int32_t count = counts_.data()[row];
    std::sort(candidates, candidates + count);
    for (int64_t k = 0; k < neighbours_; ++k) {
      ids[k] = k < count ? candidates[k].id : -1;
      scores[k] = k < count ? candidates[k].score : std::numeric_limits<Real>::quiet_NaN();
    }
  }

 private:
  bool is_better(int64_t row, int32_t id, Real score) const {
    const Real least = scores_.data()[row];
    return score > least || (score == least && id < ids_.data()[row]);
  }

  void shrink(int64_t row) {
    Candidate<Real>* candidates = candidates_.data() + row * capacity_;
    const Candidate<Real>& last = candidates[neighbours_ - 1];
    best_first(candidates, candidates + counts_.data()[row], neighbours_);
    counts_.data()[row] = static_cast<int32_t>(neighbours_);
    scores_.data()[row] = last.score;
    below_.data()[row] = std::nextafter(last.score, -kInfinity<Real>);
    ids_.data()[row] = last.id;
  }

  const int64_t neighbours_, capacity_, padded_;
  const Buffer<Real> scores_, below_;  // [N, up to whole tiles]: the k-th score, and the next number below
  const Buffer<int32_t> ids_;          // likewise, the k-th's id
  const Buffer<int32_t> counts_;
  const Buffer<Candidate<Real>> candidates_;  // [N, capacity]
};

enum class Sides { row, both };  // whether a product is of (i, j) alone, or of (j, i) too

template <class Real>
struct Offer {
  int32_t row, id;  // the candidate `id` of a row
  Real score;
};

// What a thread needs to multiply two tiles: no other thread looks into it, and none waits for it.
template <class Real>
struct TilePair {
  explicit TilePair(int64_t dim) : rows(kTile * dim), partial(kTile * kPanel<Real>), offers(2 * kTile * kTile) {}

  const Buffer<Real> rows;     // of the first tile, packed: [blocks][D][kBlock]
  const Buffer<Real> partial;  // products of it with a panel over some of the dimensions
  Real row_bounds[kTile], column_bounds[kTile], row_offsets[kTile] = {}, column_offsets[kTile] = {};
  const Buffer<Offer<Real>> offers;  // what exceeds the bounds
  int64_t num_offers = 0;
};

// Offers the scores of a block at (row, column) within the tiles, whose first rows have the ids `first` and `second`.
template <bool kOffsets, class Real>
inline void select(const Block<Real>& block, int64_t row, int64_t column, int64_t first, int64_t second,
                   TilePair<Real>& tiles) {
  const auto row_score = [&](int r, int half) {
    if constexpr (!kOffsets) return block.sums[r][half];
    return block.sums[r][half] + load(tiles.column_offsets + column + half * kLanes<Real>);
  };
  const auto column_score = [&](int r, int half) {
    if constexpr (!kOffsets) return block.sums[r][half];
    return block.sums[r][half] + broadcast(tiles.row_offsets[row + r]);
  };
  const auto exceeds_row = [&](int r, int half) { return row_score(r, half) > broadcast(tiles.row_bounds[row + r]); };
  const auto exceeds_column = [&](int r, int half) {
    return column_score(r, half) > load(tiles.column_bounds + column + half * kLanes<Real>);
  };
  auto exceeding = exceeds_row(0, 0) | exceeds_column(0, 0);
#pragma GCC unroll 8
  for (int r = 0; r < kBlock; ++r)
    for (int half = 0; half < 2; ++half) exceeding |= exceeds_row(r, half) | exceeds_column(r, half);
  if (!any(exceeding)) return;
  Real scores[kPanel<Real>];
  Offer<Real>* offer = tiles.offers.data() + tiles.num_offers;
#pragma GCC unroll 8
  for (int r = 0; r < kBlock; ++r) {
    const auto i = static_cast<int32_t>(first + row + r), j = static_cast<int32_t>(second + column);
    const uint64_t for_row = lane_bits(exceeds_row(r, 0)) | uint64_t{lane_bits(exceeds_row(r, 1))} << kLanes<Real>;
    const uint64_t for_columns = lane_bits(exceeds_column(r, 0)) | uint64_t{lane_bits(exceeds_column(r, 1))}
                                                                       << kLanes<Real>;
    if (for_row != 0) {
      for (int half = 0; half < 2; ++half) store(scores + half * kLanes<Real>, row_score(r, half));
      for (uint64_t lanes = for_row; lanes != 0; lanes &= lanes - 1) {
        const int lane = __builtin_ctzll(lanes);
        *offer++ = {i, j + lane, scores[lane]};
      }
    }
    if (for_columns != 0) {
      for (int half = 0; half < 2; ++half) store(scores + half * kLanes<Real>, column_score(r, half));
      for (uint64_t lanes = for_columns; lanes != 0; lanes &= lanes - 1) {
        const int lane = __builtin_ctzll(lanes);
        *offer++ = {j + lane, i, scores[lane]};
      }
    }
  }
  tiles.num_offers = offer - tiles.offers.data();
}

// All products of a tile of `rows` rows with a panel, which is column `column` of the other tile; see select.
template <bool kOffsets, class Real>
void multiply_panel(int64_t rows, const Real* panel, int64_t dim, int64_t column, int64_t first, int64_t second,
                    TilePair<Real>& tiles) {
  int64_t d = 0;
  do {
    const int64_t steps = min(kSteps, dim - d);
    const bool is_last = d + steps == dim;
    for (int64_t row = 0; row < rows; row += kBlock) {
      Real* partial = tiles.partial.data() + row * kPanel<Real>;
      Block<Real> block = {};
      if (d > 0) block.load_from(partial);
      block.multiply(tiles.rows.data() + row * dim + d * kBlock, panel + d * kPanel<Real>, steps);
      if (is_last)
        select<kOffsets>(block, row, column, first, second, tiles);
      else
        block.store_to(partial);
    }
    d += steps;
  } while (d < dim);
}

// The candidates of the rows of two tiles, or of one, for one thread. The lower tile is locked first.
class Owned {
 public:
  Owned(std::mutex& lower, std::mutex& upper) : lower_(lower), upper_(upper) {
    lower_.lock();
    if (&upper_ != &lower_) upper_.lock();
  }
  ~Owned() {
    if (&upper_ != &lower_) upper_.unlock();
    lower_.unlock();
  }
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;

 private:
  std::mutex &lower_, &upper_;
};

struct Task {
  int64_t tile, first, end;  // a tile of rows, and the tiles of columns that it meets
};

template <class Real>
class Search {
 public:
  explicit Search(const NearestNeighbours<Real>& in)
      : in_(in),
        panels_(divide_up(in.num_columns, kPanel<Real>)),
        packed_(panels_ * kPanel<Real> * in.dim),
        best_(in.num_rows, in.neighbours),
        owned_(divide_up(in.num_rows, kTile)) {}

  void run(int32_t* ids, Real* scores, ParallelFor parallel_for) {
    parallel_for(panels_, [&](int64_t begin, int64_t end) {
      pack<kPanel<Real>>(in_.columns, in_.num_columns, in_.dim, begin * kPanel<Real>, (end - begin) * kPanel<Real>,
                         packed_.data() + begin * kPanel<Real> * in_.dim);
    });
    for (const std::vector<Task>& tasks : {diagonal_tasks(), other_tasks()})
      parallel_for(static_cast<int64_t>(tasks.size()), [&](int64_t begin, int64_t end) {
        TilePair<Real> tiles(in_.dim);
        int64_t packed_tile = -1;
        for (int64_t t = begin; t < end; ++t) {
          const int64_t tile = tasks[t].tile;
          if (tile != packed_tile)
            pack<kBlock>(in_.rows, in_.num_rows, in_.dim, tile * kTile, kTile, tiles.rows.data());
          packed_tile = tile;
          for (int64_t other = tasks[t].first; other < tasks[t].end; ++other)
            in_.offsets ? meet<true>(tile, other, tiles) : meet<false>(tile, other, tiles);
        }
      });
    parallel_for(in_.num_rows, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) best_.write(i, ids + i * in_.neighbours, scores + i * in_.neighbours);
    });
  }

 private:
  // Among themselves rows first meet those of their own tile: in data that are sorted in any way these are near, and
  // little that comes later is taken and given up again.
  std::vector<Task> diagonal_tasks() const {
    std::vector<Task> tasks;
    for (int64_t tile = 0; in_.within && tile < row_tiles(); ++tile) tasks.push_back({tile, tile, tile + 1});
    return tasks;
  }

  std::vector<Task> other_tasks() const {
    const int64_t column_tiles = divide_up(in_.num_columns, kTile);
    const int64_t longest = max<int64_t>(1, kTaskProducts / (kTile * kTile * max<int64_t>(in_.dim, 1)));
    std::vector<Task> tasks;
    for (int64_t tile = 0; tile < row_tiles(); ++tile)
      for (int64_t first = in_.within ? tile + 1 : 0; first < column_tiles; first += longest)
        tasks.push_back({tile, first, min(first + longest, column_tiles)});
    return tasks;
  }

  int64_t row_tiles() const {
    return divide_up(in_.num_rows, kTile);
  }

  template <bool kOffsets>
  void meet(int64_t tile, int64_t other, TilePair<Real>& tiles) {
    const int64_t first = tile * kTile, second = other * kTile;
    const Sides sides = in_.within && other != tile ? Sides::both : Sides::row;
    std::mutex& lower = owned_[tile];
    std::mutex& upper = sides == Sides::both ? owned_[other] : lower;
    {
      const Owned own(lower, upper);
      best_.bounds(first, second, tiles.row_bounds);
      if (sides == Sides::both) best_.bounds(second, first, tiles.column_bounds);
    }
    if (sides == Sides::row) std::fill_n(tiles.column_bounds, kTile, kInfinity<Real>);
    if constexpr (kOffsets) {
      std::copy_n(in_.offsets + second, min(kTile, in_.num_columns - second), tiles.column_offsets);
      if (sides == Sides::both)
        std::copy_n(in_.offsets + first, min(kTile, in_.num_columns - first), tiles.row_offsets);
    }
    tiles.num_offers = 0;
    const int64_t rows = min(kTile, in_.num_rows - first);
    for (int64_t column = 0; column < min(kTile, in_.num_columns - second); column += kPanel<Real>)
      multiply_panel<kOffsets>(rows, packed_.data() + (second + column) * in_.dim, in_.dim, column, first, second,
                               tiles);
    const Owned own(lower, upper);
    for (int64_t o = 0; o < tiles.num_offers; ++o) {
      const Offer<Real>& offer = tiles.offers.data()[o];
      best_.prefetch(min<int64_t>(tiles.offers.data()[min(o + kAhead, tiles.num_offers - 1)].row, in_.num_rows - 1));
      if (is_pair(offer.row, offer.id)) best_.add(offer.row, offer.id, offer.score);
    }
  }

  // Blocks and panels go beyond the last row and column.
  bool is_pair(int32_t row, int32_t id) const {
    return row < in_.num_rows && id < in_.num_columns && !(in_.within && row == id);
  }

  const NearestNeighbours<Real>& in_;
  const int64_t panels_;
  const Buffer<Real> packed_;
  Best<Real> best_;
  std::vector<std::mutex> owned_;  // of each tile of rows: who adds candidates
};

}  // namespace

template <class Real>
void nearest_neighbours(const NearestNeighbours<Real>& in, int32_t* ids, Real* scores, ParallelFor parallel_for) {
  Search<Real>(in).run(ids, scores, parallel_for);
}

template <class Real>
void pair_products(const Real* rows, int64_t dim, const int64_t* left, const int64_t* right, int64_t pairs, Real* out,
                   ParallelFor parallel_for) {
  constexpr int64_t kChains = kLanes<Real>;  // pairs, one in each lane of a vector
  constexpr int64_t kLaidOut = 32;           // dimensions of them that are laid out at once
  parallel_for(divide_up(pairs, kPairsAtOnce), [&](int64_t begin, int64_t end) {
    Real a[kLaidOut * kChains], b[kLaidOut * kChains];
    for (int64_t p = begin * kPairsAtOnce; p < min(end * kPairsAtOnce, pairs); p += kChains) {
      const int64_t count = min(kChains, min(end * kPairsAtOnce, pairs) - p);
      Vec<Real> sums = {};
      for (int64_t first = 0; first < dim; first += kLaidOut) {
        const int64_t steps = min(kLaidOut, dim - first);
        for (int64_t lane = 0; lane < kChains; ++lane) {
          const int64_t pair = p + min(lane, count - 1);
          const Real *from = rows + left[pair] * dim + first, *to = rows + right[pair] * dim + first;
          for (int64_t d = 0; d < steps; ++d) {
            a[d * kChains + lane] = from[d];
            b[d * kChains + lane] = to[d];
          }
        }
        for (int64_t d = 0; d < steps; ++d) sums += load(a + d * kChains) * load(b + d * kChains);
      }
      store_first(out + p, sums, count);
    }
  });
}

#define SSM_INSTANTIATE(Real)                                                                           \
  template void nearest_neighbours<Real>(const NearestNeighbours<Real>&, int32_t*, Real*, ParallelFor); \
  template void pair_products<Real>(const Real*, int64_t, const int64_t*, const int64_t*, int64_t, Real*, ParallelFor);
SSM_INSTANTIATE(float)
SSM_INSTANTIATE(double)
#undef SSM_INSTANTIATE

}  // namespace ssmkernels::SSM_ISA
