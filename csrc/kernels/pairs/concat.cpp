// SPDX-License-Identifier: BSD-3-Clause
// Pairs under φ = [x_i, y_j]: hidden units are relu(A_i + B_j) = max(A_i, −B_j) + B_j, and the second term is a sum per
// row of y:
//   logit_ij = Σ_h w2_h max(A_ih, −B_jh) + c_j,  c_j = Σ_h w2_h B_jh + b2
// which takes two vector operations per element (a NaN comes through: of A as the second argument of max, of B in c).
// The backward takes three: not A_ih ≤ −B_jh, and two additions under that mask. Of all pairs, tiles of four rows by a
// panel of columns are computed with columns in the lanes, their gradients with hidden units in them.
#include "../common/transpose.h"
#include "padded.h"
#include "sweep.h"

namespace ssmkernels::SSM_ISA {
namespace {

constexpr int kRows = 4;  // of a tile
constexpr int kVectors = 4;
template <class Real>
constexpr int64_t kColumns = kVectors * kLanes<Real>;  // of a panel

template <class Real>
class Concat {
 public:
  Concat(const PairNetwork<Real>& network, ParallelFor parallel_for)
      : network(network),
        grid(network, kRows, kColumns<Real>),
        a(network.x, network.x_rows, network.hidden, 1, kRows, parallel_for),
        negated_b(network.y, network.y_rows, network.hidden, -1, kColumns<Real>, parallel_for),
        w2(network.w2, 1, network.hidden, 1, 1, parallel_for),
        panels_(network.pairs ? 0 : negated_b.rows * stride()),
        constants_(negated_b.rows) {
    parallel_for(negated_b.rows / kColumns<Real>, [&](int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; ++panel) prepare_panel(panel);
    });
  }

  int64_t stride() const {
    return a.stride;
  }

  // Logits of four rows from `row` on with the panel of columns from `column` on: [kRows][kColumns].
  void tile_logits(int64_t row, int64_t column, int64_t columns, Real* logits) const {
    switch (divide_up(columns, kLanes<Real>)) {
      case 1:
        return tile_logits<1>(row, column, logits);
      case 2:
        return tile_logits<2>(row, column, logits);
      case 3:
        return tile_logits<3>(row, column, logits);
      default:
        return tile_logits<4>(row, column, logits);
    }
  }

  // Adds Σ_j g_ij s_ij to u [kRows][h] and Σ_i g_ij s_ij to v [kColumns][h], for a tile g [kRows][kColumns].
  void add_gradients(int64_t row, int64_t column, int64_t columns, const Real* g, Real* u, Real* v) const {
    const int64_t hidden = stride();
    for (int64_t j = 0; j < columns; j += kVectors) {
      Vec<Real> grad[kRows][kVectors];
      for (int r = 0; r < kRows; ++r)
        for (int k = 0; k < kVectors; ++k) grad[r][k] = broadcast(g[r * kColumns<Real> + j + k]);
      const Real *a_at = a[row], *b_at = negated_b[column + j];
      Real* v_at = v + j * hidden;
      for (int64_t c = 0; c < hidden; c += kLanes<Real>) {
        Vec<Real> b[kVectors], sum[kVectors];
        for (int k = 0; k < kVectors; ++k) {
          b[k] = load(b_at + k * hidden + c);
          sum[k] = load(v_at + k * hidden + c);
        }
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          const Vec<Real> a_here = load(a_at + r * hidden + c);
          Vec<Real> own = load(u + r * hidden + c);
#pragma GCC unroll 4
          for (int k = 0; k < kVectors; ++k) {
            const auto inactive = a_here <= b[k];  // not of NaN, as in relu's gradient
            own = inactive ? own : own + grad[r][k];
            sum[k] = inactive ? sum[k] : sum[k] + grad[r][k];
          }
          store(u + r * hidden + c, own);
        }
        for (int k = 0; k < kVectors; ++k) store(v_at + k * hidden + c, sum[k]);
      }
    }
  }

  // Logits of listed pairs; hidden units in the lanes.
  void list_logits(const PairSpan& span, Real* logits) const {
    for (int64_t begin = 0; begin < span.count; begin += kLanes<Real>) {
      Vec<Real> sums[kLanes<Real>] = {}, constants{};
      for (int64_t k = begin; k < begin + kLanes<Real> && k < span.count; ++k) {
        if (!is_valid(network, span, k)) continue;
        const Real *a_at = a[span.x_row(k)], *b_at = negated_b[span.y_row(k)];
        for (int64_t c = 0; c < stride(); c += kLanes<Real>)
          sums[k - begin] += load(w2[0] + c) * max(load(b_at + c), load(a_at + c));
        constants[k - begin] = constants_.data()[span.y_row(k)];
      }
      store(logits + begin, sum_lanes<Real>(sums) + constants);
    }
  }

  void add_list_gradients(const PairSpan& span, const Real* g, const Partials<Real>& u, const Partials<Real>& v) const {
    for (int64_t k = 0; k < span.count; ++k) {
      if (!is_valid(network, span, k)) continue;
      const Real *a_at = a[span.x_row(k)], *b_at = negated_b[span.y_row(k)];
      Real *u_at = u.row(span.task, span.x_row(k)), *v_at = v.row(span.task, span.y_row(k));
      const Vec<Real> grad = broadcast(g[k]);
      for (int64_t c = 0; c < stride(); c += kLanes<Real>) {
        const auto inactive = load(a_at + c) <= load(b_at + c);
        const Vec<Real> own = load(u_at + c), others = load(v_at + c);
        store(u_at + c, inactive ? own : own + grad);
        store(v_at + c, inactive ? others : others + grad);
      }
    }
  }

  const PairNetwork<Real>& network;
  const TaskGrid grid;
  const Padded<Real> a, negated_b, w2;

 private:
  // −Bᵀ of the panel, and its constants.
  void prepare_panel(int64_t panel) {
    const int64_t hidden = stride();
    for (int64_t k = 0; k < kColumns<Real>; k += kLanes<Real>) {
      const int64_t column = panel * kColumns<Real> + k;
      Vec<Real> sums[kLanes<Real>] = {};
      for (int64_t c = 0; c < hidden; c += kLanes<Real>) {
        Vec<Real> block[kLanes<Real>];
        const Vec<Real> w = load(w2[0] + c);
        for (int l = 0; l < kLanes<Real>; ++l) {
          block[l] = load(negated_b[column + l] + c);
          sums[l] -= w * block[l];
        }
        if (network.pairs) continue;
        transpose<Real>(block);
        for (int l = 0; l < kLanes<Real>; ++l)
          store(panels_.data() + panel * kColumns<Real> * hidden + (c + l) * kColumns<Real> + k, block[l]);
      }
      store(constants_.data() + column, sum_lanes<Real>(sums) + *network.b2);
    }
  }

  template <int kCount>
  void tile_logits(int64_t row, int64_t column, Real* logits) const {
    const int64_t hidden = stride();
    const Real *panel = panels_.data() + column * hidden, *a_at = a[row], *w_at = w2[0];
    Vec<Real> sums[kRows][kCount] = {};
    for (int64_t c = 0; c < network.hidden; ++c) {
      const Vec<Real> w = broadcast(w_at[c]);
      Vec<Real> b[kCount];
#pragma GCC unroll 4
      for (int k = 0; k < kCount; ++k) b[k] = load(panel + c * kColumns<Real> + k * kLanes<Real>);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const Vec<Real> a_here = broadcast(a_at[r * hidden + c]);
#pragma GCC unroll 4
        for (int k = 0; k < kCount; ++k) sums[r][k] += w * max(b[k], a_here);
      }
    }
    for (int r = 0; r < kRows; ++r)
      for (int k = 0; k < kCount; ++k)
        store(logits + r * kColumns<Real> + k * kLanes<Real>,
              sums[r][k] + load(constants_.data() + column + k * kLanes<Real>));
  }

  Buffer<Real> panels_;     // [m / kColumns][h][kColumns]
  Buffer<Real> constants_;  // [m]
};

// Calls each(span, logits) for all pairs of a list's task, whose logits are computed first.
template <class Real, class F>
void for_each_listed(const Concat<Real>& concat, int64_t task, bool with_logits, const F& each) {
  const int64_t begin = task * concat.grid.columns, last = min(begin + concat.grid.columns, concat.network.count);
  for (int64_t at = begin; at < last; at += kSpan) {
    const PairSpan span{concat.network.pairs + 2 * at, 0, 0, at, min(kSpan, last - at), task};
    Real logits[kSpan] = {};
    if (with_logits) concat.list_logits(span, logits);
    each(span, logits);
  }
}

// Calls each(row, column, columns, tile) for all tiles of a task; the head has seen the logits, and past the last row
// and column is 0.
template <class Real, class Clear, class F>
void for_each_tile(const Concat<Real>& concat, int64_t task, bool with_logits, PairHead<Real> head,
                   const Clear& begin_panel, const F& each) {
  const TaskGrid& grid = concat.grid;
  const PairNetwork<Real>& network = concat.network;
  const int64_t first_row = task / grid.column_parts * grid.rows, last_row = min(first_row + grid.rows, network.x_rows);
  const int64_t first_column = task % grid.column_parts * grid.columns,
                last_column = min(first_column + grid.columns, network.y_rows);
  Real tile[kRows * kSpan];
  for (int64_t column = first_column; column < last_column; column += kColumns<Real>) {
    const int64_t columns = min(kColumns<Real>, last_column - column);
    begin_panel(column);
    for (int64_t row = first_row; row < last_row; row += kRows) {
      if (with_logits) concat.tile_logits(row, column, columns, tile);
      for (int64_t r = 0; r < kRows; ++r) {
        Real* values = tile + r * kColumns<Real>;
        const bool inside = row + r < last_row;
        if (inside) head({nullptr, row + r, column, (row + r) * network.y_rows + column, columns, task}, values);
        for (int64_t k = inside ? columns : 0; k < kColumns<Real>; ++k) values[k] = 0;
      }
      each(row, column, columns, tile);
    }
  }
}

// ∂A = w2∘U, ∂B = w2∘V, ∂w2 = Σ_i A_i∘U_i + Σ_j B_j∘V_j, from the parts of U and V.
template <class Real>
void finish(const Concat<Real>& concat, const Partials<Real>& u, const Partials<Real>& v,
            const PairGradients<Real>& out, ParallelFor parallel_for) {
  constexpr int64_t kBlock = 64;  // rows whose sum is added at once, so that rounding does not grow with all of them
  const int64_t hidden = concat.network.hidden;
  const auto gather = [&](const Partials<Real>& parts, const Padded<Real>& values, int64_t rows, int64_t c,
                          Real* grads) {
    const Vec<Real> w = load(concat.w2[0] + c);
    Vec<Real> total{};
    for (int64_t begin = 0; begin < rows; begin += kBlock) {
      Vec<Real> sum{};
      for (int64_t i = begin; i < min(begin + kBlock, rows); ++i) {
        const Vec<Real> grad = parts.sum(i, c);
        sum += load(values[i] + c) * grad;
        store_first(grads + i * hidden + c, grad * w, hidden - c);
      }
      total += sum;
    }
    return total;
  };
  parallel_for(concat.stride() / kLanes<Real>, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin * kLanes<Real>; c < end * kLanes<Real>; c += kLanes<Real>) {
      const Vec<Real> along_a = gather(u, concat.a, concat.network.x_rows, c, out.x);
      const Vec<Real> along_b = gather(v, concat.negated_b, concat.network.y_rows, c, out.y);
      store_first(out.w2 + c, along_a - along_b, hidden - c);
    }
  });
}

}  // namespace

template <class Real>
void concat_logits(const PairNetwork<Real>& network, PairHead<Real> head, ParallelFor parallel_for) {
  const Concat<Real> concat(network, parallel_for);
  parallel_for(concat.grid.tasks(), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      if (network.pairs)
        for_each_listed(concat, task, true, head);
      else
        for_each_tile(concat, task, true, head, [](int64_t) {}, [](int64_t, int64_t, int64_t, const Real*) {});
    }
  });
}

template <class Real>
void concat_gradients(const PairNetwork<Real>& network, bool with_logits, PairHead<Real> head,
                      const PairGradients<Real>& out, ParallelFor parallel_for) {
  const Concat<Real> concat(network, parallel_for);
  const TaskGrid& grid = concat.grid;
  const int64_t hidden = concat.stride();
  const Partials<Real> u(grid.x_partials(), concat.a.rows, hidden), v(grid.y_partials(), concat.negated_b.rows, hidden);
  double sums[kMaxTasks] = {};
  parallel_for(grid.tasks(), [&](int64_t begin, int64_t end) {
    Buffer<Real> own(kRows * hidden);
    for (int64_t task = begin; task < end; ++task) {
      const auto add_sum = [&](const Real* g, int64_t count) {
        for (int64_t k = 0; k < count; ++k) sums[task] += g[k];
      };
      if (network.pairs) {
        u.clear(task, 0, u.rows);
        v.clear(task, 0, v.rows);
        for_each_listed(concat, task, with_logits, [&](const PairSpan& span, Real* values) {
          head(span, values);
          for (int64_t k = 0; k < span.count; ++k) values[k] = is_valid(network, span, k) ? values[k] : 0;
          add_sum(values, span.count);
          concat.add_list_gradients(span, values, u, v);
        });
        continue;
      }
      const int64_t row_part = task / grid.column_parts, column_part = task % grid.column_parts;
      u.clear(column_part, row_part * grid.rows, min((row_part + 1) * grid.rows, u.rows));
      for_each_tile(
          concat, task, with_logits, head, [&](int64_t column) { v.clear(row_part, column, column + kColumns<Real>); },
          [&](int64_t row, int64_t column, int64_t columns, const Real* g) {
            for (int64_t k = 0; k < kRows * hidden; ++k) own.data()[k] = 0;
            add_sum(g, kRows * kColumns<Real>);
            concat.add_gradients(row, column, columns, g, own.data(), v.row(row_part, column));
            Real* to = u.row(column_part, row);
            for (int64_t k = 0; k < kRows * hidden; ++k) to[k] += own.data()[k];
          });
    }
  });
  finish(concat, u, v, out, parallel_for);
  double sum = 0;
  for (const double each : sums) sum += each;
  *out.b2 = static_cast<Real>(sum);
}

#define SSM_INSTANTIATE(Real)                                                                                \
  template void concat_logits(const PairNetwork<Real>&, PairHead<Real>, ParallelFor);                        \
  template void concat_gradients(const PairNetwork<Real>&, bool, PairHead<Real>, const PairGradients<Real>&, \
                                 ParallelFor);
SSM_INSTANTIATE(float)
SSM_INSTANTIATE(double)

}  // namespace ssmkernels::SSM_ISA
