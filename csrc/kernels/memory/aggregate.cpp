// SPDX-License-Identifier: BSD-3-Clause
#include "aggregate.h"

#include "panel.h"

namespace ssmkernels::SSM_ISA {
namespace {

// The running sums of one panel over one split of the bank, each [·][kPanel]; the sums are relative to e^{maximum}.
template <class Real>
struct State {
  Real* maximum;     // [1]
  Real* sum;         // [1]
  Real* class_sums;  // [L + 1]

  static int64_t size(int64_t classes) {
    return (2 + classes + 1) * kPanel<Real>;
  }
  State(Real* memory, int64_t) : maximum(memory), sum(memory + kPanel<Real>), class_sums(memory + 2 * kPanel<Real>) {}
};

template <class Real>
void add_tile(const Tile<Real>& tile, const Real* scores, int64_t classes, int v, const State<Real>& state) {
  const int64_t lane = v * kLanes<Real>;
  const Vec<Real> old = load(state.maximum + lane);
  Vec<Real> top = old;
  for (int slot = 0; slot < tile.slots; ++slot) top = max(top, load(scores + slot * kPanel<Real> + lane));
  if (differ<Real>(top, old)) {
    const Vec<Real> shrink = exp(old - top);
    scale_rows(state.sum, 1, v, shrink);
    scale_rows(state.class_sums, classes + 1, v, shrink);
    store(state.maximum + lane, top);
  }
  for (int slot = 0; slot < tile.slots;) {  // runs of one class
    const int64_t label = tile.labels[slot];
    Vec<Real> run{};
    for (; slot < tile.slots && tile.labels[slot] == label; ++slot)
      run += exp(load(scores + slot * kPanel<Real> + lane) - top);
    Real* at = state.class_sums + class_row(label, classes) * kPanel<Real> + lane;
    store(at, load(at) + run);
    store(state.sum + lane, load(state.sum + lane) + run);
  }
}

template <class Real>
void merge(const State<Real>& state, const State<Real>& other, int64_t classes, int v) {
  const int64_t lane = v * kLanes<Real>;
  const Vec<Real> a = load(state.maximum + lane), b = load(other.maximum + lane), top = max(a, b);
  const Vec<Real> keep = exp(a - top), take = exp(b - top);
  store(state.maximum + lane, top);
  store(state.sum + lane, load(state.sum + lane) * keep + load(other.sum + lane) * take);
  for (int64_t c = 0; c <= classes; ++c) {
    const int64_t at = c * kPanel<Real> + lane;
    store(state.class_sums + at, load(state.class_sums + at) * keep + load(other.class_sums + at) * take);
  }
}

}  // namespace

template <class Storage>
void aggregate(const Aggregate<Storage>& problem, const AggregateResult<Compute<Storage>>& result,
               ParallelFor parallel_for) {
  using Real = Compute<Storage>;
  const Bank<Storage>& bank = problem.bank;
  const Partition partition = partition_of<Real>(problem.rows, bank.slots);
  const int64_t state_size = State<Real>::size(bank.classes);
  Buffer<Real> states(partition.panels * partition.splits * state_size);
  auto state_of = [&](int64_t task) { return State<Real>(states.data() + task * state_size, bank.classes); };

  parallel_for(partition.panels * partition.splits, [&](int64_t begin, int64_t end) {
    Buffer<Real> scratch((bank.dim + kTile) * kPanel<Real> + tile_scratch(bank));
    Real* query = scratch.take(bank.dim * kPanel<Real>);
    Real* scores = scratch.take(kTile * kPanel<Real>);
    Real* converted = scratch.take(tile_scratch(bank));
    for (int64_t task = begin; task < end; ++task) {
      const State<Real> state = state_of(task);
      const int64_t first = task % partition.splits * partition.split_size;
      const int64_t last = first + partition.split_size < bank.slots ? first + partition.split_size : bank.slots;
      pack_panel(problem.query, bank.dim, task / partition.splits * kPanel<Real>, problem.rows,
                 static_cast<Real>(1 / problem.temperature), query);
      fill(state.maximum, kPanel<Real>, kMinusInfinity<Real>);
      fill(state.sum, (1 + bank.classes + 1) * kPanel<Real>, Real(0));
      for (int64_t slot = first; slot < last; slot += kTile) {
        const Tile<Real> tile = load_tile(bank, slot, last, converted);
        scores_of(tile, bank.dim, query, scores);
        for (int v = 0; v < 2; ++v) add_tile(tile, scores, bank.classes, v, state);
      }
    }
  });
  parallel_for(partition.panels, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      const State<Real> state = state_of(panel * partition.splits);
      for (int v = 0; v < 2; ++v) {
        for (int64_t split = 1; split < partition.splits; ++split)
          merge(state, state_of(panel * partition.splits + split), bank.classes, v);
        const int64_t lane = v * kLanes<Real>;
        const Vec<Real> sum = load(state.sum + lane);
        store(state.maximum + lane, load(state.maximum + lane) + log(sum));
        scale_rows(state.class_sums, bank.classes, v, 1 / sum);
      }
      unpack_panel(state.class_sums, bank.classes, panel * kPanel<Real>, problem.rows, result.aggregated);
      unpack_panel(state.maximum, 1, panel * kPanel<Real>, problem.rows, result.log_normalizer);
    }
  });
}

template <class Storage>
void aggregate_backward(const Aggregate<Storage>& problem, const AggregateBackward<Compute<Storage>>& backward,
                        ParallelFor parallel_for) {
  using Real = Compute<Storage>;
  const Bank<Storage>& bank = problem.bank;
  const Partition partition = partition_of<Real>(problem.rows, bank.slots);
  const int64_t state_size = bank.dim * kPanel<Real>;
  Buffer<Real> states(partition.panels * partition.splits * state_size);  // grad_query of each split, [D][kPanel]

  parallel_for(partition.panels * partition.splits, [&](int64_t begin, int64_t end) {
    Buffer<Real> scratch((bank.dim + bank.classes + 1 + 1 + kTile) * kPanel<Real> + tile_scratch(bank));
    Real* query = scratch.take(bank.dim * kPanel<Real>);
    Real* class_grads = scratch.take((bank.classes + 1) * kPanel<Real>);  // (g[c] − Σ_c g_c aggregated[c])/t
    Real* log_normalizer = scratch.take(kPanel<Real>);
    Real* weights = scratch.take(kTile * kPanel<Real>);
    Real* converted = scratch.take(tile_scratch(bank));
    for (int64_t task = begin; task < end; ++task) {
      Real* grad = states.data() + task * state_size;
      const int64_t first_row = task / partition.splits * kPanel<Real>;
      const int64_t first = task % partition.splits * partition.split_size;
      const int64_t last = first + partition.split_size < bank.slots ? first + partition.split_size : bank.slots;
      const Real scale = static_cast<Real>(1 / problem.temperature);
      pack_panel(problem.query, bank.dim, first_row, problem.rows, scale, query);
      fill(class_grads, (bank.classes + 1 + 1) * kPanel<Real>, Real(0));
      for (int64_t lane = 0; lane < kPanel<Real> && first_row + lane < problem.rows; ++lane) {
        const Real* g = backward.grad_aggregated + (first_row + lane) * bank.classes;
        const Real* q = backward.aggregated + (first_row + lane) * bank.classes;
        Real mean = 0;
        for (int64_t c = 0; c < bank.classes; ++c) mean += g[c] * q[c];
        for (int64_t c = 0; c < bank.classes; ++c) class_grads[c * kPanel<Real> + lane] = (g[c] - mean) * scale;
        class_grads[bank.classes * kPanel<Real> + lane] = -mean * scale;
        log_normalizer[lane] = backward.log_normalizer[first_row + lane];
      }
      fill(grad, state_size, Real(0));
      for (int64_t slot = first; slot < last; slot += kTile) {
        const Tile<Real> tile = load_tile(bank, slot, last, converted);
        scores_of(tile, bank.dim, query, weights);
        for (int v = 0; v < 2; ++v) {
          const int64_t lane = v * kLanes<Real>;
          const Vec<Real> shift = load(log_normalizer + lane);
          for (int i = 0; i < tile.slots; ++i) {
            Real* at = weights + i * kPanel<Real> + lane;
            store(at, exp(load(at) - shift) *
                          load(class_grads + class_row(tile.labels[i], bank.classes) * kPanel<Real> + lane));
          }
        }
        add_means(tile, bank.dim, weights, grad);
      }
    }
  });
  parallel_for(partition.panels, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      Real* grad = states.data() + panel * partition.splits * state_size;
      for (int64_t split = 1; split < partition.splits; ++split)
        for (int64_t i = 0; i < state_size; ++i) grad[i] += grad[split * state_size + i];
      unpack_panel(grad, bank.dim, panel * kPanel<Real>, problem.rows, backward.grad_query);
    }
  });
}

#define SSM_INSTANTIATE(Storage)                                                                             \
  template void aggregate(const Aggregate<Storage>&, const AggregateResult<Compute<Storage>>&, ParallelFor); \
  template void aggregate_backward(const Aggregate<Storage>&, const AggregateBackward<Compute<Storage>>&, ParallelFor);
SSM_INSTANTIATE(float)
SSM_INSTANTIATE(double)
SSM_INSTANTIATE(bfloat16)
SSM_INSTANTIATE(float16)

}  // namespace ssmkernels::SSM_ISA
