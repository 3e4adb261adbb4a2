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
constexpr int64_t kPairsAtOnce = 4096;      // of a task of pair_products

template <class Real>
inline constexpr Real kInfinity = std::numeric_limits<Real>::infinity();

template <class Real>
struct Candidate {
  Real score;
  int32_t id;

  bool operator<(const Candidate& other) const {  // the better one first
    return score != other.score ? score > other.score : id < other.id;
  }
};

// out[r][lane] (+)= Σ_d a[d][r] b[d][lane] for kBlock rows and kPanel lanes.
template <class Real>
inline void multiply_block(const Real* a, const Real* b, int64_t steps, bool accumulate, Real* out) {
  Vec<Real> sums[kBlock][2] = {};
  if (accumulate)
    for (int r = 0; r < kBlock; ++r)
      for (int half = 0; half < 2; ++half) sums[r][half] = load(out + r * kPanel<Real> + half * kLanes<Real>);
  for (int64_t d = 0; d < steps; ++d) {
    const Vec<Real> first = load(b + d * kPanel<Real>), second = load(b + d * kPanel<Real> + kLanes<Real>);
#pragma GCC unroll 8
    for (int r = 0; r < kBlock; ++r) {
      const Vec<Real> factor = broadcast(a[d * kBlock + r]);
      sums[r][0] += factor * first;
      sums[r][1] += factor * second;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kBlock; ++r) {
    store(out + r * kPanel<Real>, sums[r][0]);
    store(out + r * kPanel<Real> + kLanes<Real>, sums[r][1]);
  }
}

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

// products [rows, up to a whole number of blocks][kPanel] of packed rows with a packed panel.
template <class Real>
void multiply_panel(const Real* a, int64_t rows, const Real* panel, int64_t dim, Real* products) {
  if (dim == 0) std::fill(products, products + divide_up(rows, kBlock) * kBlock * kPanel<Real>, Real(0));
  for (int64_t d = 0; d < dim; d += kSteps)
    for (int64_t block = 0; block * kBlock < rows; ++block)
      multiply_block(a + (block * dim + d) * kBlock, panel + d * kPanel<Real>, min(kSteps, dim - d), d > 0,
                     products + block * kBlock * kPanel<Real>);
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
        padded_(divide_up(rows, kPanel<Real>) * kPanel<Real>),
        scores_(padded_),
        below_(padded_),
        ids_(padded_),
        counts_(rows),
        candidates_(rows * capacity_) {
    std::fill_n(counts_.data(), rows, 0);
    std::fill_n(ids_.data(), rows, std::numeric_limits<int32_t>::max());
    std::fill(ids_.data() + rows, ids_.data() + padded_, -1);
    for (const Buffer<Real>* bounds : {&scores_, &below_}) {
      std::fill_n(bounds->data(), rows, -kInfinity<Real>);
      std::fill(bounds->data() + rows, bounds->data() + padded_, kInfinity<Real>);  // nothing is taken beyond the rows
    }
  }

  // What the score of a candidate has to exceed, whose id is `id` or more.
  Real bound(int64_t row, int64_t id) const {
    return (id > ids_.data()[row] ? scores_ : below_).data()[row];
  }

  // The same for a panel of rows: [kPanel].
  const Real* panel_bounds(int64_t row, int64_t id) const {
    bool later = true;
    for (int64_t r = row; r < row + kPanel<Real>; ++r) later &= id > ids_.data()[r];
    return (later ? scores_ : below_).data() + row;
  }

  void add(int64_t row, int64_t id, Real score) {
    if (!is_better(row, id, score)) return;
    int32_t& count = counts_.data()[row];
    if (count == capacity_) {
      shrink(row);
      if (!is_better(row, id, score)) return;
    }
    candidates_.data()[row * capacity_ + count++] = {score, static_cast<int32_t>(id)};
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
  bool is_better(int64_t row, int64_t id, Real score) const {
    const Real least = scores_.data()[row];
    return score > least || (score == least && id < ids_.data()[row]);
  }

  void shrink(int64_t row) {
    Candidate<Real>* candidates = candidates_.data() + row * capacity_;
    const Candidate<Real>& last = candidates[neighbours_ - 1];
    std::nth_element(candidates, candidates + neighbours_ - 1, candidates + counts_.data()[row]);
    counts_.data()[row] = static_cast<int32_t>(neighbours_);
    scores_.data()[row] = last.score;
    below_.data()[row] = std::nextafter(last.score, -kInfinity<Real>);
    ids_.data()[row] = last.id;
  }

  const int64_t neighbours_, capacity_, padded_;
  const Buffer<Real> scores_, below_;  // [N, up to a whole number of panels]: the k-th score, and the next number below
  const Buffer<int32_t> ids_;          // likewise, the k-th's id
  const Buffer<int32_t> counts_;
  const Buffer<Candidate<Real>> candidates_;  // [N, capacity]
};

enum class Sides { row, both };  // whether a product is of (i, j) alone, or of (j, i) too

// Offers the products of rows [first, first + rows) with columns [column, column + kPanel).
template <bool kOffsets, class Real>
void select(const NearestNeighbours<Real>& in, const Real* products, int64_t first, int64_t rows, int64_t column,
            Sides sides, Best<Real>& best) {
  const Vec<Real> infinite = broadcast(kInfinity<Real>);
  const bool mirrored = sides == Sides::both;
  const Real* column_bounds = mirrored ? best.panel_bounds(column, first) : nullptr;
  Vec<Real> column_offsets[2] = {};
  if constexpr (kOffsets)
    for (int64_t j = column; j < min(column + kPanel<Real>, in.num_columns); ++j)
      column_offsets[(j - column) / kLanes<Real>][(j - column) % kLanes<Real>] = in.offsets[j];
  for (int64_t i = first; i < first + rows; ++i) {
    const Vec<Real> row_bound = broadcast(best.bound(i, column));
    for (int half = 0; half < 2; ++half, products += kLanes<Real>) {
      Vec<Real> scores = load(products), mirrored_scores = scores;
      if constexpr (kOffsets) {
        scores += column_offsets[half];
        mirrored_scores += broadcast(mirrored ? in.offsets[i] : Real(0));
      }
      const int64_t j = column + half * kLanes<Real>;
      const auto for_row = scores > row_bound;
      const auto for_columns = mirrored_scores > (mirrored ? load(column_bounds + half * kLanes<Real>) : infinite);
      if (!any(for_row | for_columns)) continue;
      for (unsigned lanes = lane_bits(for_row); lanes != 0; lanes &= lanes - 1) {
        const int lane = __builtin_ctz(lanes);
        if (j + lane < in.num_columns && !(in.within && j + lane == i)) best.add(i, j + lane, scores[lane]);
      }
      const unsigned mirrored_lanes = lane_bits(for_columns);
      for (unsigned lanes = mirrored_lanes; lanes != 0; lanes &= lanes - 1) {
        const int lane = __builtin_ctz(lanes);
        best.add(j + lane, i, mirrored_scores[lane]);
      }
      if (mirrored_lanes != 0) column_bounds = best.panel_bounds(column, i);  // a k-th may have a higher id than before
    }
  }
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
        const Buffer<Real> products(kTile * kPanel<Real>), tile(kTile * in_.dim);
        int64_t packed_tile = -1;
        for (int64_t t = begin; t < end; ++t) {
          if (tasks[t].tile != packed_tile)
            pack<kBlock>(in_.rows, in_.num_rows, in_.dim, tasks[t].tile * kTile, kTile, tile.data());
          packed_tile = tasks[t].tile;
          meet(tasks[t], tile.data(), products.data());
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

  void meet(const Task& task, const Real* tile, Real* products) {
    const int64_t first = task.tile * kTile, rows = min(kTile, in_.num_rows - first);
    for (int64_t other = task.first; other < task.end; ++other) {
      const Sides sides = in_.within && other != task.tile ? Sides::both : Sides::row;
      std::mutex& lower = owned_[task.tile];
      std::mutex& upper = sides == Sides::both ? owned_[other] : lower;
      for (int64_t column = other * kTile; column < min((other + 1) * kTile, in_.num_columns); column += kPanel<Real>) {
        multiply_panel(tile, rows, packed_.data() + column * in_.dim, in_.dim, products);
        const Owned own(lower, upper);
        in_.offsets ? select<true>(in_, products, first, rows, column, sides, best_)
                    : select<false>(in_, products, first, rows, column, sides, best_);
      }
    }
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
