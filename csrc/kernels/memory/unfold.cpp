// SPDX-License-Identifier: BSD-3-Clause
// One product: the logits go to the output as they come, and are normalised where they lie once their row's normaliser
// is known.
#include "unfold.h"

#include "panel.h"

namespace ssmkernels::SSM_ISA {
namespace {

// out[lane][slot] = scores[slot][lane]: blocks small enough to stay in the first cache.
template <class Real>
void transpose_out(const Real* scores, int slots, int64_t lanes, Real* out, int64_t row_stride) {
  for (int64_t lane = 0; lane < lanes; ++lane)
    for (int slot = 0; slot < slots; ++slot) out[lane * row_stride + slot] = scores[slot * kPanel<Real> + lane];
}

// row ← e^{row − maximum}/sum. Dividing by the sum, rather than subtracting its logarithm, saves a rounding of the
// exponent.
template <class Real>
void normalize_row(Real* row, int64_t size, Real maximum, Real sum) {
  const Vec<Real> shift = broadcast(maximum), scale = broadcast(1 / sum);
  int64_t i = 0;
  for (; i + kLanes<Real> <= size; i += kLanes<Real>) store(row + i, exp(load(row + i) - shift) * scale);
  if (i == size) return;
  Real edge[kLanes<Real>] = {};
  for (int64_t k = i; k < size; ++k) edge[k - i] = row[k];
  store(edge, exp(load(edge) - shift) * scale);
  for (int64_t k = i; k < size; ++k) row[k] = edge[k - i];
}

}  // namespace

template <class Storage>
void unfold(const Unfold<Storage>& problem, ParallelFor parallel_for) {
  using Real = Compute<Storage>;
  const Bank<Storage>& bank = problem.bank;
  const Partition partition = partition_of<Real>(problem.rows, bank.slots);
  Buffer<unsigned char> present(bank.classes + 1);
  mark_present(bank.labels, bank.slots, bank.classes, present.data());
  Buffer<Real> normalizers(partition.panels * partition.splits * 2 * kPanel<Real>);  // maximum and sum of each task

  parallel_for(partition.panels * partition.splits, [&](int64_t begin, int64_t end) {
    Buffer<Real> scratch((bank.dim + bank.classes + 1 + 1 + kTile) * kPanel<Real> + tile_scratch(bank));
    Real* query = scratch.take(bank.dim * kPanel<Real>);
    Real* log_probs = scratch.take((bank.classes + 1) * kPanel<Real>);
    Real* unknown = scratch.take(kPanel<Real>);
    Real* scores = scratch.take(kTile * kPanel<Real>);
    Real* converted = scratch.take(tile_scratch(bank));
    for (int64_t task = begin; task < end; ++task) {
      Real* maximum = normalizers.data() + task * 2 * kPanel<Real>;
      Real* sum = maximum + kPanel<Real>;
      const int64_t first_row = task / partition.splits * kPanel<Real>;
      const int64_t first = task % partition.splits * partition.split_size;
      const int64_t last = first + partition.split_size < bank.slots ? first + partition.split_size : bank.slots;
      const int64_t lanes = problem.rows - first_row < kPanel<Real> ? problem.rows - first_row : kPanel<Real>;
      pack_panel(problem.query, bank.dim, first_row, problem.rows, static_cast<Real>(1 / problem.temperature), query);
      pack_log_probs(problem.probs, bank.classes, first_row, problem.rows, present.data(), log_probs, unknown);
      fill(maximum, kPanel<Real>, kMinusInfinity<Real>);
      fill(sum, kPanel<Real>, Real(0));
      for (int64_t slot = first; slot < last; slot += kTile) {
        const Tile<Real> tile = load_tile(bank, slot, last, converted);
        scores_of(tile, bank.dim, query, scores);
        for (int v = 0; v < 2; ++v) {
          const int64_t lane = v * kLanes<Real>;
          const Vec<Real> old = load(maximum + lane);
          Vec<Real> top = old, total{};
          for (int i = 0; i < tile.slots; ++i) {
            Real* at = scores + i * kPanel<Real> + lane;
            const Vec<Real> s =
                load(at) + load(log_probs + class_row(tile.labels[i], bank.classes) * kPanel<Real> + lane);
            store(at, s);
            top = max(top, s);
          }
          const Vec<Real> shift = to_subtract(top);
          for (int i = 0; i < tile.slots; ++i) total += exp(load(scores + i * kPanel<Real> + lane) - shift);
          store(sum + lane, load(sum + lane) * exp(old - shift) + total);
          store(maximum + lane, top);
        }
        transpose_out(scores, tile.slots, lanes, problem.unfolded + first_row * bank.slots + slot, bank.slots);
      }
    }
  });
  parallel_for(problem.rows, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const Real* tasks =
          normalizers.data() + row / kPanel<Real> * partition.splits * 2 * kPanel<Real> + row % kPanel<Real>;
      Real top = tasks[0];
      for (int64_t split = 1; split < partition.splits; ++split) {
        const Real other = tasks[split * 2 * kPanel<Real>];
        top = other > top ? other : top;
      }
      Real sum = 0;
      for (int64_t split = 0; split < partition.splits; ++split) {
        const Real* task = tasks + split * 2 * kPanel<Real>;
        sum += task[kPanel<Real>] * exp(broadcast(task[0] - top))[0];
      }
      normalize_row(problem.unfolded + row * bank.slots, bank.slots, top, sum);
    }
  });
}

template void unfold(const Unfold<float>&, ParallelFor);
template void unfold(const Unfold<double>&, ParallelFor);
template void unfold(const Unfold<bfloat16>&, ParallelFor);
template void unfold(const Unfold<float16>&, ParallelFor);

}  // namespace ssmkernels::SSM_ISA
