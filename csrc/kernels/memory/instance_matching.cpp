// SPDX-License-Identifier: BSD-3-Clause
#include "instance_matching.h"

#include "panel.h"

namespace ssmkernels::SSM_ISA {
namespace {

// The running sums of one panel over one split of the bank, each [·][kPanel]. Sums are relative to e^{maximum}.
template <class Real>
struct State {
  Real *max_weak, *max_target, *max_strong;  // [1]
  Real *sum_weak, *sum_target, *sum_strong;  // [1]
  Real* target_logit;                        // [1]      Σ e^{target} s
  Real* unknown;                             // [1]      1 where p^w is zero on every class of the bank
  Real* class_sums;                          // [L + 1]  Σ_{j: y_j = c} e^{w}
  Real *target_mean, *strong_mean;           // [D]      Σ e^{target} bank, Σ e^{s} bank; unused without gradient

  static int64_t size(int64_t classes, int64_t dim) {
    return (8 + classes + 1 + 2 * dim) * kPanel<Real>;
  }

  State(Real* memory, int64_t classes, int64_t dim) {
    Real** const scalars[] = {&max_weak,   &max_target, &max_strong,   &sum_weak,
                              &sum_target, &sum_strong, &target_logit, &unknown};
    for (Real** scalar : scalars) {
      *scalar = memory;
      memory += kPanel<Real>;
    }
    class_sums = memory;
    target_mean = class_sums + (classes + 1) * kPanel<Real>;
    strong_mean = target_mean + dim * kPanel<Real>;
  }
};

template <class Storage>
class Sweep {
  using Real = Compute<Storage>;
  static constexpr int kWidth = kLanes<Real>;

 public:
  Sweep(const InstanceMatching<Storage>& problem, bool with_means, const unsigned char* present)
      : problem_(problem),
        bank_(problem.bank),
        with_means_(with_means),
        present_(present),
        scratch_((2 * bank_.dim + bank_.classes + 1 + 2 * kTile) * kPanel<Real> + tile_scratch(bank_)) {
    weak_ = scratch_.take(bank_.dim * kPanel<Real>);
    strong_ = scratch_.take(bank_.dim * kPanel<Real>);
    log_probs_ = scratch_.take((bank_.classes + 1) * kPanel<Real>);
    weak_scores_ = scratch_.take(kTile * kPanel<Real>);
    strong_scores_ = scratch_.take(kTile * kPanel<Real>);
    tile_scratch_ = scratch_.take(tile_scratch(bank_));
  }

  void run(int64_t first_row, int64_t first_slot, int64_t end_slot, const State<Real>& state) {
    pack_panel(problem_.query_weak, bank_.dim, first_row, problem_.rows,
               static_cast<Real>(1 / problem_.temperature_weak), weak_);
    pack_panel(problem_.query_strong, bank_.dim, first_row, problem_.rows,
               static_cast<Real>(1 / problem_.temperature_strong), strong_);
    pack_log_probs(problem_.probs_weak, bank_.classes, first_row, problem_.rows, present_, log_probs_, state.unknown);
    fill(state.max_weak, 3 * kPanel<Real>, kMinusInfinity<Real>);
    fill(state.sum_weak, 4 * kPanel<Real>, Real(0));
    fill(state.class_sums, (bank_.classes + 1 + (with_means_ ? 2 * bank_.dim : 0)) * kPanel<Real>, Real(0));

    for (int64_t slot = first_slot; slot < end_slot; slot += kTile) {
      const Tile<Real> tile = load_tile(bank_, slot, end_slot, tile_scratch_);
      scores_of(tile, bank_.dim, weak_, weak_scores_);
      scores_of(tile, bank_.dim, strong_, strong_scores_);
      for (int v = 0; v < 2; ++v) {
        raise_maxima(tile, v, state);
        exponentiate(tile, v, state);
      }
      if (with_means_) {
        add_means(tile, bank_.dim, weak_scores_, state.target_mean);
        add_means(tile, bank_.dim, strong_scores_, state.strong_mean);
      }
    }
  }

 private:
  const Real* log_probs_of(int64_t label, int vector) const {
    return log_probs_ + class_row(label, bank_.classes) * kPanel<Real> + vector * kWidth;
  }

  // Online softmax: where the tile raises a maximum, what was summed so far shrinks to the new one.
  void raise_maxima(const Tile<Real>& tile, int v, const State<Real>& state) {
    const Vec<Real> old_weak = load(state.max_weak + v * kWidth), old_target = load(state.max_target + v * kWidth),
                    old_strong = load(state.max_strong + v * kWidth);
    Vec<Real> weak = old_weak, target = old_target, strong = old_strong;
    for (int slot = 0; slot < tile.slots; ++slot) {
      const int64_t at = slot * kPanel<Real> + v * kWidth;
      const Vec<Real> w = load(weak_scores_ + at);
      weak = max(weak, w);
      target = max(target, w + load(log_probs_of(tile.labels[slot], v)));
      strong = max(strong, load(strong_scores_ + at));
    }
    if (differ<Real>(weak, old_weak)) {
      const Vec<Real> shrink = exp(old_weak - weak);
      scale_rows(state.sum_weak, 1, v, shrink);
      scale_rows(state.class_sums, bank_.classes + 1, v, shrink);
      store(state.max_weak + v * kWidth, weak);
    }
    if (differ<Real>(target, old_target)) {
      const Vec<Real> shrink = exp(old_target - to_subtract(target));
      scale_rows(state.sum_target, 1, v, shrink);
      scale_rows(state.target_logit, 1, v, shrink);
      if (with_means_) scale_rows(state.target_mean, bank_.dim, v, shrink);
      store(state.max_target + v * kWidth, target);
    }
    if (differ<Real>(strong, old_strong)) {
      const Vec<Real> shrink = exp(old_strong - strong);
      scale_rows(state.sum_strong, 1, v, shrink);
      if (with_means_) scale_rows(state.strong_mean, bank_.dim, v, shrink);
      store(state.max_strong + v * kWidth, strong);
    }
  }

  // Turns the tile's scores into the weights of the two means, in place, and adds up everything that is not a mean.
  // Sums are taken over the tile, and over runs of one class, before they join the long ones: fewer roundings, and in a
  // class-sorted bank hardly any traffic.
  void exponentiate(const Tile<Real>& tile, int v, const State<Real>& state) {
    const Vec<Real> max_weak = load(state.max_weak + v * kWidth),
                    max_target = to_subtract(load(state.max_target + v * kWidth)),
                    max_strong = load(state.max_strong + v * kWidth);
    Vec<Real> sum_weak{}, sum_target{}, sum_strong{}, target_logit{}, run{};
    int64_t run_label = tile.labels[0];
    const Real* log_probs = log_probs_of(run_label, v);
    auto end_run = [&] {
      Real* at = state.class_sums + class_row(run_label, bank_.classes) * kPanel<Real> + v * kWidth;
      store(at, load(at) + run);
      sum_weak += run;
    };
    for (int slot = 0; slot < tile.slots; ++slot) {
      if (tile.labels[slot] != run_label) {
        end_run();
        run = Vec<Real>{};
        run_label = tile.labels[slot];
        log_probs = log_probs_of(run_label, v);
      }
      Real* weak_at = weak_scores_ + slot * kPanel<Real> + v * kWidth;
      Real* strong_at = strong_scores_ + slot * kPanel<Real> + v * kWidth;
      const Vec<Real> w = load(weak_at), s = load(strong_at);
      const Vec<Real> target = exp(w + load(log_probs) - max_target), strong = exp(s - max_strong);
      run += exp(w - max_weak);
      sum_target += target;
      target_logit += target * s;
      sum_strong += strong;
      store(weak_at, target);
      store(strong_at, strong);
    }
    end_run();
    auto add = [v](Real* to, Vec<Real> x) { store(to + v * kWidth, load(to + v * kWidth) + x); };
    add(state.sum_weak, sum_weak);
    add(state.sum_target, sum_target);
    add(state.sum_strong, sum_strong);
    add(state.target_logit, target_logit);
  }

  const InstanceMatching<Storage>& problem_;
  const Bank<Storage>& bank_;
  const bool with_means_;
  const unsigned char* present_;
  Buffer<Real> scratch_;
  Real *weak_, *strong_;                // [D], scaled by 1/t
  Real* log_probs_;                     // [L + 1]
  Real *weak_scores_, *strong_scores_;  // [kTile]
  Real* tile_scratch_;
};

// Merges `other` into `state`: both shrink to the larger maximum.
template <class Real>
void merge(const State<Real>& state, const State<Real>& other, int64_t classes, int64_t dim) {
  struct Group {
    Real *max, *other_max;
    struct {
      Real *values, *other;
      int64_t rows;
    } sums[3];
  };
  const Group groups[] = {
      {state.max_weak,
       other.max_weak,
       {{state.sum_weak, other.sum_weak, 1}, {state.class_sums, other.class_sums, classes + 1}, {}}},
      {state.max_target,
       other.max_target,
       {{state.sum_target, other.sum_target, 1},
        {state.target_logit, other.target_logit, 1},
        {state.target_mean, other.target_mean, dim}}},
      {state.max_strong,
       other.max_strong,
       {{state.sum_strong, other.sum_strong, 1}, {state.strong_mean, other.strong_mean, dim}, {}}},
  };
  for (const Group& group : groups) {
    for (int v = 0; v < 2; ++v) {
      const int64_t lane = v * kLanes<Real>;
      const Vec<Real> a = load(group.max + lane), b = load(group.other_max + lane), top = max(a, b),
                      shift = to_subtract(top);
      const Vec<Real> keep = exp(a - shift), take = exp(b - shift);
      store(group.max + lane, top);
      for (const auto& sum : group.sums)
        for (int64_t i = 0; i < sum.rows; ++i) {
          const int64_t at = i * kPanel<Real> + lane;
          store(sum.values + at, load(sum.values + at) * keep + load(sum.other + at) * take);
        }
    }
  }
}

// Sums become what they are sums for: log-normalisers (in the place of the maxima) and means.
template <class Real>
void normalize(const State<Real>& state, int64_t classes, int64_t dim) {
  for (int v = 0; v < 2; ++v) {
    const int64_t lane = v * kLanes<Real>;
    const Vec<Real> weak = load(state.sum_weak + lane), target = load(state.sum_target + lane),
                    strong = load(state.sum_strong + lane);
    store(state.max_weak + lane, load(state.max_weak + lane) + log(weak));
    store(state.max_target + lane, load(state.max_target + lane) + log(target));
    store(state.max_strong + lane, load(state.max_strong + lane) + log(strong));
    scale_rows(state.class_sums, classes, v, 1 / weak);
    scale_rows(state.target_logit, 1, v, 1 / target);
    scale_rows(state.target_mean, dim, v, 1 / target);
    scale_rows(state.strong_mean, dim, v, 1 / strong);
  }
}

// Sweeps every panel over the whole bank and hands each one's normalised state to finish(first_row, state).
template <class Storage, class Finish>
void sweep_bank(const InstanceMatching<Storage>& problem, bool with_means, ParallelFor parallel_for,
                const Finish& finish) {
  using Real = Compute<Storage>;
  const Bank<Storage>& bank = problem.bank;
  const Partition partition = partition_of<Real>(problem.rows, bank.slots);
  const int64_t means = with_means ? bank.dim : 0;
  const int64_t state_size = State<Real>::size(bank.classes, means);
  Buffer<unsigned char> present(bank.classes + 1);
  mark_present(bank.labels, bank.slots, bank.classes, present.data());
  Buffer<Real> states(partition.panels * partition.splits * state_size);
  auto state_of = [&](int64_t task) { return State<Real>(states.data() + task * state_size, bank.classes, means); };

  parallel_for(partition.panels * partition.splits, [&](int64_t begin, int64_t end) {
    Sweep<Storage> sweep(problem, with_means, present.data());
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first_slot = task % partition.splits * partition.split_size,
                    end_slot = first_slot + partition.split_size;
      sweep.run(task / partition.splits * kPanel<Real>, first_slot, end_slot < bank.slots ? end_slot : bank.slots,
                state_of(task));
    }
  });
  parallel_for(partition.panels, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      const State<Real> state = state_of(panel * partition.splits);
      for (int64_t split = 1; split < partition.splits; ++split)
        merge(state, state_of(panel * partition.splits + split), bank.classes, means);
      normalize(state, bank.classes, means);
      finish(panel * kPanel<Real>, state);
    }
  });
}

}  // namespace

template <class Storage>
void instance_matching(const InstanceMatching<Storage>& problem, const InstanceMatchingResult<Compute<Storage>>& result,
                       ParallelFor parallel_for) {
  using Real = Compute<Storage>;
  const int64_t classes = problem.bank.classes, dim = problem.bank.dim, rows = problem.rows;
  sweep_bank(problem, result.gradient != nullptr, parallel_for, [&](int64_t first, const State<Real>& state) {
    const Real alpha = static_cast<Real>(result.alpha), scale = static_cast<Real>(1 / problem.temperature_strong);
    for (int64_t lane = 0; lane < kPanel<Real> && first + lane < rows; ++lane) {
      const int64_t row = first + lane;
      result.loss[row] = state.max_strong[lane] - state.target_logit[lane];
      for (int64_t c = 0; c < classes; ++c)
        result.pseudo_probs[row * classes + c] =
            alpha * problem.probs_weak[row * classes + c] + (1 - alpha) * state.class_sums[c * kPanel<Real> + lane];
      if (!result.gradient) continue;
      for (int64_t d = 0; d < dim; ++d)
        result.gradient[row * dim + d] =
            scale * (state.strong_mean[d * kPanel<Real> + lane] - state.target_mean[d * kPanel<Real> + lane]);
    }
  });
}

template <class Storage>
void instance_matching_partial(const InstanceMatching<Storage>& problem,
                               const InstanceMatchingPartial<Compute<Storage>>& partial, ParallelFor parallel_for) {
  using Real = Compute<Storage>;
  const int64_t classes = problem.bank.classes, dim = problem.bank.dim, rows = problem.rows;
  if (problem.bank.slots == 0) {
    for (Real* log_normalizer : {partial.log_weak, partial.log_target, partial.log_strong})
      fill(log_normalizer, rows, kMinusInfinity<Real>);
    fill(partial.aggregated, rows * classes, Real(0));
    fill(partial.target_logit, rows, Real(0));
    if (partial.target_mean) fill(partial.target_mean, rows * dim, Real(0));
    if (partial.strong_mean) fill(partial.strong_mean, rows * dim, Real(0));
    return;
  }
  sweep_bank(problem, partial.target_mean != nullptr, parallel_for, [&](int64_t first, const State<Real>& state) {
    for (int64_t lane = 0; lane < kPanel<Real>; ++lane)
      if (state.unknown[lane] != 0) state.max_target[lane] = kMinusInfinity<Real>;
    unpack_panel(state.max_weak, 1, first, rows, partial.log_weak);
    unpack_panel(state.max_target, 1, first, rows, partial.log_target);
    unpack_panel(state.max_strong, 1, first, rows, partial.log_strong);
    unpack_panel(state.class_sums, classes, first, rows, partial.aggregated);
    unpack_panel(state.target_logit, 1, first, rows, partial.target_logit);
    if (!partial.target_mean) return;
    unpack_panel(state.target_mean, dim, first, rows, partial.target_mean);
    unpack_panel(state.strong_mean, dim, first, rows, partial.strong_mean);
  });
}

#define SSM_INSTANTIATE(Storage)                                                                                     \
  template void instance_matching(const InstanceMatching<Storage>&, const InstanceMatchingResult<Compute<Storage>>&, \
                                  ParallelFor);                                                                      \
  template void instance_matching_partial(const InstanceMatching<Storage>&,                                          \
                                          const InstanceMatchingPartial<Compute<Storage>>&, ParallelFor);
SSM_INSTANTIATE(float)
SSM_INSTANTIATE(double)
SSM_INSTANTIATE(bfloat16)
SSM_INSTANTIATE(float16)

}  // namespace ssmkernels::SSM_ISA
