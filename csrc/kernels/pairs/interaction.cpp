// SPDX-License-Identifier: BSD-3-Clause
// Pairs under φ = |x_i − y_j| or x_i∘y_j: a tile of φ is made in cache, for a few pairs in the lanes, and fed to the
// matrix product with w1. The backward makes the tile and its hidden units again and takes two more products: w1ᵀu for
// ∂φ, and uφᵀ for ∂w1.
#include "../common/transpose.h"
#include "padded.h"
#include "sweep.h"

namespace ssmkernels::SSM_ISA {
namespace {

constexpr int kBlock = kVectorBytes == 64 ? 12 : 6;  // rows of a product that are kept in registers, by two vectors
template <class Real>
constexpr int64_t kPairs = 2 * kLanes<Real>;  // of a tile

// A matrix [rows, depth], element(row, k), in the order in which a product reads it: [rows / kBlock][depth][kBlock],
// zero-padded.
template <class Real>
class Packed {
 public:
  template <class F>
  Packed(int64_t rows, int64_t depth, const F& element)
      : blocks(divide_up(rows, kBlock)), depth_(depth), values_(blocks * depth * kBlock) {
    Real* to = values_.data();
    for (int64_t block = 0; block < blocks; ++block)
      for (int64_t k = 0; k < depth; ++k)
        for (int64_t row = block * kBlock; row < (block + 1) * kBlock; ++row)
          *to++ = row < rows ? element(row, k) : Real(0);
  }

  // Calls each(row, first, second) with every row of the product with an operand [depth][kPairs].
  template <class F>
  void multiply(const Real* operand, const F& each) const {
    for (int64_t block = 0; block < blocks; ++block) {
      const Real* left = values_.data() + block * depth_ * kBlock;
      Vec<Real> sums[kBlock][2] = {};
      for (int64_t k = 0; k < depth_; ++k) {
        const Vec<Real> first = load(operand + k * kPairs<Real>),
                        second = load(operand + k * kPairs<Real> + kLanes<Real>);
#pragma GCC unroll 12
        for (int r = 0; r < kBlock; ++r) {
          const Vec<Real> factor = broadcast(left[k * kBlock + r]);
          sums[r][0] += factor * first;
          sums[r][1] += factor * second;
        }
      }
#pragma GCC unroll 12
      for (int r = 0; r < kBlock; ++r) each(block * kBlock + r, sums[r][0], sums[r][1]);
    }
  }

  const int64_t blocks;

 private:
  int64_t depth_;
  Buffer<Real> values_;
};

template <class Real>
class Interactions {
 public:
  Interactions(const PairNetwork<Real>& network, ParallelFor parallel_for)
      : network(network),
        grid(network, 1, kPairs<Real>),
        x(network.x, network.x_rows, network.features, 1, 1, parallel_for),
        y(network.y, network.y_rows, network.features, 1, 1, parallel_for),
        forward(network.hidden, network.features,
                [&](int64_t h, int64_t c) { return network.w1[h * network.features + c]; }),
        b1(network.b1, 1, network.hidden, 1, 1, parallel_for),
        w2(network.w2, 1, network.hidden, 1, 1, parallel_for) {}

  int64_t stride() const {
    return x.stride;
  }
  int64_t hidden_rows() const {  // h, zero-padded
    return forward.blocks * kBlock;
  }

  // φ of every pair, 0 where there is none.
  void fill_tile(const PairSpan& span, Real* phi) const {
    for (int64_t k = 0; k < kPairs<Real>; ++k) {
      const bool present = k < span.count && is_valid(network, span, k);
      const Real *left = present ? x[span.x_row(k)] : nullptr, *right = present ? y[span.y_row(k)] : nullptr;
      for (int64_t c = 0; c < stride(); c += kLanes<Real>)
        store(phi + k * stride() + c, present ? interact(load(left + c), load(right + c)) : Vec<Real>{});
    }
  }

  Vec<Real> interact(Vec<Real> left, Vec<Real> right) const {
    const Vec<Real> difference = left - right;
    return network.interaction == Interaction::product ? left * right : max(difference, -difference);
  }

  // ∂x and ∂y of a pair are each a product of ∂φ with these.
  void derivatives(Vec<Real> left, Vec<Real> right, Vec<Real>& x_derivative, Vec<Real>& y_derivative) const {
    const Vec<Real> none{};
    x_derivative = network.interaction == Interaction::product ? right
                   : left > right                              ? none + 1
                   : left < right                              ? none - 1
                                                               : none;
    y_derivative = network.interaction == Interaction::product ? left : -x_derivative;
  }

  // Calls each(span) for the tiles of a task.
  template <class F>
  void for_each_tile(int64_t task, const F& each) const {
    if (network.pairs) {
      const int64_t begin = task * grid.columns, last = min(begin + grid.columns, network.count);
      for (int64_t at = begin; at < last; at += kPairs<Real>)
        each(PairSpan{network.pairs + 2 * at, 0, 0, at, min(kPairs<Real>, last - at), task});
      return;
    }
    const int64_t first_row = task / grid.column_parts * grid.rows,
                  last_row = min(first_row + grid.rows, network.x_rows);
    const int64_t first_column = task % grid.column_parts * grid.columns,
                  last_column = min(first_column + grid.columns, network.y_rows);
    for (int64_t row = first_row; row < last_row; ++row)
      for (int64_t column = first_column; column < last_column; column += kPairs<Real>)
        each(PairSpan{nullptr, row, column, row * network.y_rows + column, min(kPairs<Real>, last_column - column),
                      task});
  }

  const PairNetwork<Real>& network;
  const TaskGrid grid;
  const Padded<Real> x, y;
  const Packed<Real> forward;
  const Padded<Real> b1, w2;
};

// The tile that a thread works on.
template <class Real>
struct Tile {
  explicit Tile(const Interactions<Real>& in)
      : in(in),
        memory(in.stride() * kPairs<Real> * 2 + in.hidden_rows() * kPairs<Real>),
        rows(memory.take(in.stride() * kPairs<Real>)),
        operand(memory.take(in.stride() * kPairs<Real>)),
        hidden(memory.take(in.hidden_rows() * kPairs<Real>)) {}

  // φ, the hidden units relu(w1·φ + b1) and the logits; a span's values past its end stay finite.
  void compute(const PairSpan& span, Real* logits) {
    in.fill_tile(span, rows);
    transpose_tile(rows, in.stride(), kPairs<Real>, in.stride(), operand, kPairs<Real>);
    Vec<Real> first = broadcast(*in.network.b2), second = first;
    const Real *b1 = in.b1[0], *w2 = in.w2[0];
    in.forward.multiply(operand, [&](int64_t h, Vec<Real> a, Vec<Real> b) {
      const Vec<Real> none{};
      if (h < in.network.hidden) {
        const Vec<Real> bias = broadcast(b1[h]), weight = broadcast(w2[h]);
        a = max(none, a + bias);  // NaN comes through as the second argument
        b = max(none, b + bias);
        first += weight * a;
        second += weight * b;
      } else {  // past the last unit, where 0 times NaN is NaN
        a = b = none;
      }
      store(hidden + h * kPairs<Real>, a);
      store(hidden + h * kPairs<Real> + kLanes<Real>, b);
    });
    store(logits, first);
    store(logits + kLanes<Real>, second);
    for (int64_t k = 0; k < span.count; ++k)
      if (span.pairs && !is_valid(in.network, span, k)) logits[k] = 0;
  }

  const Interactions<Real>& in;
  Buffer<Real> memory;
  Real* rows;     // [kPairs][d]  φ
  Real* operand;  // [d][kPairs]  φ again, then ∂φ
  Real* hidden;   // [h][kPairs]  then u
};

// Gradients of one task, in its part of the partial sums.
template <class Real>
struct Gradients {
  Gradients(const Interactions<Real>& in, int64_t tasks)
      : x(in.grid.x_partials(), in.network.x_rows, in.stride()),
        y(in.grid.y_partials(), in.network.y_rows, in.stride()),
        w1(tasks, in.hidden_rows(), in.stride()),
        w2(tasks, in.hidden_rows(), kLanes<Real>),
        b1(tasks, in.hidden_rows(), kLanes<Real>) {}

  Partials<Real> x, y, w1, w2, b1;
};

// hidden ← u = g w2∘s, with ∂w2 and ∂b1.
template <class Real>
void add_hidden_gradients(Tile<Real>& tile, const Real* g, Real* w2_sums, Real* b1_sums) {
  const Vec<Real> first = load(g), second = load(g + kLanes<Real>), none{};
  for (int64_t h = 0; h < tile.in.network.hidden; ++h) {
    Real* at = tile.hidden + h * kPairs<Real>;
    const Vec<Real> a = load(at), b = load(at + kLanes<Real>), weight = broadcast(tile.in.w2[0][h]);
    const Vec<Real> u = a <= none ? none : first * weight, v = b <= none ? none : second * weight;
    store(w2_sums + h * kLanes<Real>, load(w2_sums + h * kLanes<Real>) + first * a + second * b);
    store(b1_sums + h * kLanes<Real>, load(b1_sums + h * kLanes<Real>) + u + v);
    store(at, u);
    store(at + kLanes<Real>, v);
  }
}

// w1_sums[h][c] += Σ_p u[h][p] φ[p][c] for kBlock/2 hidden units and kCount vectors of features.
template <int kCount, class Real>
void add_outer(const Real* u, const Real* phi, int64_t stride, Real* sums) {
  Vec<Real> total[kBlock / 2][kCount];
#pragma GCC unroll 6
  for (int r = 0; r < kBlock / 2; ++r)
#pragma GCC unroll 4
    for (int k = 0; k < kCount; ++k) total[r][k] = load(sums + r * stride + k * kLanes<Real>);
  for (int64_t p = 0; p < kPairs<Real>; ++p) {
    Vec<Real> right[kCount];
#pragma GCC unroll 4
    for (int k = 0; k < kCount; ++k) right[k] = load(phi + p * stride + k * kLanes<Real>);
#pragma GCC unroll 6
    for (int r = 0; r < kBlock / 2; ++r) {
      const Vec<Real> left = broadcast(u[r * kPairs<Real> + p]);
#pragma GCC unroll 4
      for (int k = 0; k < kCount; ++k) total[r][k] += left * right[k];
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kBlock / 2; ++r)
#pragma GCC unroll 4
    for (int k = 0; k < kCount; ++k) store(sums + r * stride + k * kLanes<Real>, total[r][k]);
}

template <class Real>
void add_weight_gradients(const Tile<Real>& tile, Real* sums) {
  const int64_t stride = tile.in.stride();
  for (int64_t h = 0; h < tile.in.hidden_rows(); h += kBlock / 2) {
    const Real* u = tile.hidden + h * kPairs<Real>;
    int64_t c = 0;
    for (; c + 4 * kLanes<Real> <= stride; c += 4 * kLanes<Real>)
      add_outer<4>(u, tile.rows + c, stride, sums + h * stride + c);
    for (; c < stride; c += kLanes<Real>) add_outer<1>(u, tile.rows + c, stride, sums + h * stride + c);
  }
}

// ∂φ = w1ᵀu, and from it ∂x and ∂y of every pair.
template <class Real>
void add_row_gradients(Tile<Real>& tile, const Packed<Real>& transposed, const PairSpan& span, Gradients<Real>& out,
                       int64_t x_part, int64_t y_part) {
  const Interactions<Real>& in = tile.in;
  const int64_t stride = in.stride();
  transposed.multiply(tile.hidden, [&](int64_t c, Vec<Real> first, Vec<Real> second) {
    if (c >= stride) return;
    store(tile.operand + c * kPairs<Real>, first);
    store(tile.operand + c * kPairs<Real> + kLanes<Real>, second);
  });
  transpose_tile(tile.operand, kPairs<Real>, stride, kPairs<Real>, tile.rows, stride);
  for (int64_t k = 0; k < span.count; ++k) {
    if (!is_valid(in.network, span, k)) continue;
    const Real *left = in.x[span.x_row(k)], *right = in.y[span.y_row(k)];
    Real *x_sums = out.x.row(x_part, span.x_row(k)), *y_sums = out.y.row(y_part, span.y_row(k));
    for (int64_t c = 0; c < stride; c += kLanes<Real>) {
      Vec<Real> x_derivative, y_derivative;
      in.derivatives(load(left + c), load(right + c), x_derivative, y_derivative);
      const Vec<Real> grad = load(tile.rows + k * stride + c);
      store(x_sums + c, load(x_sums + c) + grad * x_derivative);
      store(y_sums + c, load(y_sums + c) + grad * y_derivative);
    }
  }
}

template <class Real>
void finish_rows(const Partials<Real>& parts, int64_t rows, int64_t columns, Real* out, ParallelFor parallel_for) {
  parallel_for(rows, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t c = 0; c < columns; c += kLanes<Real>)
        store_first(out + i * columns + c, parts.sum(i, c), columns - c);
  });
}

}  // namespace

template <class Real>
void interaction_logits(const PairNetwork<Real>& network, PairHead<Real> head, ParallelFor parallel_for) {
  const Interactions<Real> in(network, parallel_for);
  parallel_for(in.grid.tasks(), [&](int64_t begin, int64_t end) {
    Tile<Real> tile(in);
    for (int64_t task = begin; task < end; ++task)
      in.for_each_tile(task, [&](const PairSpan& span) {
        Real logits[kSpan];
        tile.compute(span, logits);
        head(span, logits);
      });
  });
}

template <class Real>
void interaction_gradients(const PairNetwork<Real>& network, bool with_logits, PairHead<Real> head,
                           const PairGradients<Real>& out, ParallelFor parallel_for) {
  const Interactions<Real> in(network, parallel_for);
  const TaskGrid& grid = in.grid;
  const int64_t features = network.features;
  const Packed<Real> transposed(features, in.hidden_rows(), [&](int64_t c, int64_t h) {
    return h < network.hidden ? network.w1[h * features + c] : Real(0);
  });
  Gradients<Real> sums(in, grid.tasks());
  double b2_sums[kMaxTasks] = {};
  parallel_for(grid.tasks(), [&](int64_t begin, int64_t end) {
    Tile<Real> tile(in);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row_part = task / grid.column_parts, column_part = task % grid.column_parts;
      const int64_t x_part = column_part, y_part = network.pairs ? task : row_part;
      if (network.pairs) {
        sums.x.clear(task, 0, network.x_rows);
        sums.y.clear(task, 0, network.y_rows);
      } else {
        sums.x.clear(x_part, row_part * grid.rows, min((row_part + 1) * grid.rows, network.x_rows));
        sums.y.clear(y_part, column_part * grid.columns, min((column_part + 1) * grid.columns, network.y_rows));
      }
      sums.w1.clear(task, 0, in.hidden_rows());
      sums.w2.clear(task, 0, in.hidden_rows());
      sums.b1.clear(task, 0, in.hidden_rows());
      in.for_each_tile(task, [&](const PairSpan& span) {
        Real g[kSpan];
        tile.compute(span, g);
        head(span, g);
        for (int64_t k = 0; k < kPairs<Real>; ++k) {
          if (k >= span.count || !is_valid(in.network, span, k)) g[k] = 0;
          b2_sums[task] += g[k];
        }
        add_hidden_gradients(tile, g, sums.w2.row(task, 0), sums.b1.row(task, 0));
        add_weight_gradients(tile, sums.w1.row(task, 0));
        add_row_gradients(tile, transposed, span, sums, x_part, y_part);
      });
    }
  });
  finish_rows(sums.x, network.x_rows, features, out.x, parallel_for);
  finish_rows(sums.y, network.y_rows, features, out.y, parallel_for);
  finish_rows(sums.w1, network.hidden, features, out.w1, parallel_for);
  double b2 = 0;
  for (const double each : b2_sums) b2 += each;
  *out.b2 = static_cast<Real>(b2);
  for (int64_t h = 0; h < network.hidden; ++h) {
    out.w2[h] = sum_lanes<Real>(sums.w2.sum(h, 0));
    out.b1[h] = sum_lanes<Real>(sums.b1.sum(h, 0));
  }
}

#define SSM_INSTANTIATE(Real)                                                                                     \
  template void interaction_logits(const PairNetwork<Real>&, PairHead<Real>, ParallelFor);                        \
  template void interaction_gradients(const PairNetwork<Real>&, bool, PairHead<Real>, const PairGradients<Real>&, \
                                      ParallelFor);
SSM_INSTANTIATE(float)
SSM_INSTANTIATE(double)

}  // namespace ssmkernels::SSM_ISA
