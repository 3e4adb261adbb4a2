// SPDX-License-Identifier: BSD-3-Clause
// Of B = 320, D = 128, K = 128k in bfloat16: 33 MB of bank read, 164 MB written, 21 GFLOP. Two sweeps: taking the
// scores twice (10.5 GFLOP) is cheaper than writing them, reading them and writing them again (328 MB more).
#include "class_table.cuh"
#include "running_sums.cuh"
#include "sweep.cuh"
#include "unfold.h"

namespace ssmkernels::cuda {
namespace {

using namespace memory;

inline constexpr double kLog2e = 1.44269504088896340736;

// Σ 2^(x − reference) of a row, over a split or the bank.
template <class Real>
struct alignas(2 * sizeof(Real)) Normalizer {
  Real reference;
  Real sum;
};

template <class Engine>
struct UnfoldArguments {
  using Real = typename Engine::Real;
  const Real* log_probs;  // class table
  int64_t classes;
  Real scale;                // log₂e / t
  Normalizer<Real>* splits;  // [splits][padded rows]
  int64_t padded_rows;
  int64_t split_count;
  Real* unfolded;  // [B, K]
  int64_t slots;
};

// First sweep: the normaliser of each row over a split.
template <class Engine>
class Normalize {
  using Real = typename Engine::Real;
  static constexpr int kBlocks = Engine::Shape::kBlocks;

 public:
  static constexpr int kQueries = 1;
  static constexpr int kRowGroups = 1;
  static constexpr int kMeans = 0;
  using Arguments = UnfoldArguments<Engine>;

  __device__ Normalize(const Arguments& arguments, const Place& place)
      : arguments_(arguments), lane_(place.lane), table_(arguments.log_probs, arguments.classes, place) {}

  __device__ void fetch(const int* labels) {
    table_.fetch(log_probs_, labels, lane_);
  }

  template <class Means>
  __device__ void weigh(Real (&scores)[1][kBlocks][4], Means&, const TileView& tile) {
    mask_scores(scores[0], lane_, tile.count);
    Real top[2];
#pragma unroll
    for (int n = 0; n < kBlocks; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[0][n][i] = scores[0][n][i] * arguments_.scale + log_probs_[n][i];
    largest(scores[0], top);
    if (__any_sync(kAllLanes, total_.passed(top))) {
      Real factor[2];
      total_.raise(top, factor);
    }
#pragma unroll
    for (int n = 0; n < kBlocks; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) total_.sum[i / 2] += exp2_of(scores[0][n][i] - total_.reference[i / 2]);
  }

  template <class Means>
  __device__ void finish(const Means&, const Place& place) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const Real sum = row_sum(total_.sum[r]);
      if (place.writes(r))
        arguments_.splits[place.split * arguments_.padded_rows + place.row + 8 * r] = {total_.reference[r], sum};
    }
  }

 private:
  const Arguments& arguments_;
  int lane_;
  TableRows<Real, false> table_;
  RunningLogSum<Real> total_;
  Real log_probs_[kBlocks][4];
};

// Second sweep: the values.
template <class Engine>
class Write {
  using Real = typename Engine::Real;
  static constexpr int kBlocks = Engine::Shape::kBlocks;

 public:
  static constexpr int kQueries = 1;
  static constexpr int kRowGroups = 1;
  static constexpr int kMeans = 0;
  using Arguments = UnfoldArguments<Engine>;

  __device__ Write(const Arguments& arguments, const Place& place)
      : arguments_(arguments), place_(place), table_(arguments.log_probs, arguments.classes, place) {
    // The four lanes of a row merge the splits.
    for (int r = 0; r < 2; ++r) {
      const Normalizer<Real>* parts = arguments.splits + min(place.row + 8 * r, place.last_row);
      const auto part = [&](int64_t s) { return parts[s * arguments.padded_rows]; };
      Real top = kLowest<Real>, sum = 0;
      for (int64_t s = place.lane % 4; s < arguments.split_count; s += 4) top = max(top, part(s).reference);
      top = row_max(top);
      for (int64_t s = place.lane % 4; s < arguments.split_count; s += 4)
        sum += exp2_of(part(s).reference - top) * part(s).sum;
      reference_[r] = top;
      share_[r] = 1 / row_sum(sum);
    }
  }

  __device__ void fetch(const int* labels) {
    table_.fetch(log_probs_, labels, place_.lane);
  }

  template <class Means>
  __device__ void weigh(Real (&scores)[1][kBlocks][4], Means&, const TileView& tile) {
    struct alignas(2 * sizeof(Real)) Pair {
      Real a, b;
    };
    const bool pairs = arguments_.slots % 2 == 0;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (place_.row + 8 * r > place_.last_row) continue;
      Real* to = arguments_.unfolded + (place_.row + 8 * r) * arguments_.slots + tile.first;
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
        const int column = column_of(place_.lane, n, 0);
        Pair pair;
        pair.a = value(scores[0][n][r * 2], log_probs_[n][r * 2], r);
        pair.b = value(scores[0][n][r * 2 + 1], log_probs_[n][r * 2 + 1], r);
        if (pairs && column + 1 < tile.count) {
          *reinterpret_cast<Pair*>(to + column) = pair;
        } else {
          if (column < tile.count) to[column] = pair.a;
          if (column + 1 < tile.count) to[column + 1] = pair.b;
        }
      }
    }
  }

  template <class Means>
  __device__ void finish(const Means&, const Place&) {}

 private:
  __device__ Real value(Real score, Real log_prob, int r) const {
    return exp2_of(score * arguments_.scale + log_prob - reference_[r]) * share_[r];
  }

  const Arguments& arguments_;
  Place place_;
  TableRows<Real, false> table_;
  Real reference_[2], share_[2];
  Real log_probs_[kBlocks][4];
};

static __global__ void mark_present(const int64_t* labels, int64_t slots, int64_t classes, unsigned char* present) {
  const int64_t at = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (at < slots && labels[at] >= 0 && labels[at] < classes) present[labels[at]] = 1;  // every writer writes the same
}

template <class Storage>
struct Scratch {
  using Real = Compute<Storage>;

  PackedInput<Storage> packed;
  unsigned char* present;  // [L + 1]
  unsigned char* known;    // [B]
  Real* log_probs;
  Normalizer<Real>* splits;
};

template <class Storage>
Scratch<Storage> take_scratch(const Unfold<Storage>& problem, Workspace& workspace) {
  using Real = Compute<Storage>;
  const Partition partition = partition_of(problem.bank, problem.rows, false);
  Scratch<Storage> scratch;
  scratch.packed = take_packed_input(problem.bank, problem.query, problem.query, problem.rows, workspace);
  scratch.present = workspace.take<unsigned char>(problem.bank.classes + 1);
  scratch.known = workspace.take<unsigned char>(problem.rows);
  scratch.log_probs = take_class_table<Real>(partition, problem.bank.classes, workspace);
  scratch.splits = workspace.take<Normalizer<Real>>(partition.splits * partition.padded_rows());
  return scratch;
}

}  // namespace

template <class Storage>
int64_t unfold_workspace(const Unfold<Storage>& problem) {
  Workspace workspace(nullptr);
  take_scratch(problem, workspace);
  return workspace.bytes();
}

template <class Storage>
const char* unfold(const Unfold<Storage>& problem, void* memory, CudaStream stream) {
  using Real = Compute<Storage>;
  const Bank<Storage>& bank = problem.bank;
  if (problem.rows == 0 || bank.slots == 0) return nullptr;
  Workspace workspace(memory);
  const Scratch<Storage> scratch = take_scratch(problem, workspace);
  const SweepInput<Storage> in = sweep_input<Storage>(bank, nullptr, problem.query, problem.query, problem.rows,
                                                      partition_of(bank, problem.rows, false), scratch.packed);
  const bool few = has_few_slots(labels_of(bank));
  if (!few) {
    if (const char* error = message(cudaMemsetAsync(scratch.present, 0, bank.classes + 1, stream))) return error;
    if (const char* error = launch(mark_present, ceil_div<int64_t>(bank.slots, 256), 256, 0, stream, bank.labels,
                                   bank.slots, bank.classes, scratch.present))
      return error;
  }
  Preparation<Storage, LogProbsTable<Real>> preparation;
  prepare_rows(bank, problem.query, problem.query, problem.rows, scratch.packed, preparation);
  preparation.table = {problem.probs, few ? nullptr : scratch.present, labels_of(bank), problem.rows, scratch.log_probs,
                       scratch.known};
  preparation.table_blocks = table_blocks(in.partition);
  if (const char* error = launch_prepare(preparation, stream)) return error;
  return with_engine<Storage>(problem.allow_tf32, [&](auto engine) -> const char* {
    using Engine = decltype(engine);
    const UnfoldArguments<Engine> arguments{scratch.log_probs,
                                            bank.classes,
                                            static_cast<Real>(kLog2e / problem.temperature),
                                            scratch.splits,
                                            in.partition.padded_rows(),
                                            in.partition.splits,
                                            problem.unfolded,
                                            bank.slots};
    if (const char* error = launch_sweep<Engine, Normalize<Engine>>(in, arguments, stream)) return error;
    return launch_sweep<Engine, Write<Engine>>(in, arguments, stream);
  });
}

#define SSM_INSTANTIATE(Storage)                             \
  template int64_t unfold_workspace(const Unfold<Storage>&); \
  template const char* unfold(const Unfold<Storage>&, void*, CudaStream);
SSM_INSTANTIATE(float)
SSM_INSTANTIATE(double)
SSM_INSTANTIATE(bfloat16)
SSM_INSTANTIATE(float16)

}  // namespace ssmkernels::cuda
