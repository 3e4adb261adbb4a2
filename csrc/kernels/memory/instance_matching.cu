// SPDX-License-Identifier: BSD-3-Clause
// Of B = 320, D = 128, K = 128k, L = 1000 in bfloat16: 33 MB of bank, 42 GFLOP of products (two of scores, two of
// means). Its floor is the products, on the tensor cores. Kernels: the class order of a large bank, what the sweep
// needs beside it, the sweep, the merge of the splits.
#include "class_sums.cuh"
#include "class_table.cuh"
#include "instance_matching.h"
#include "means.cuh"
#include "sweep.cuh"

namespace ssmkernels::cuda {
namespace {

using namespace memory;

// What a split knows of a row; sums are of powers of two, relative to their references.
template <class Real>
struct alignas(8 * sizeof(Real)) RowSums {
  Real weak_reference, weak;
  Real target_reference, target;
  Real strong_reference, strong;
  Real target_logit;  // Σ 2^(target − reference) query_strong·bank
  Real unused;
};

template <class Engine, bool kGradient>
class Matching {
  using Real = typename Engine::Real;
  static constexpr int kBlocks = Engine::Shape::kBlocks;

 public:
  static constexpr int kQueries = 2;
  static constexpr int kRowGroups = 1;
  static constexpr int kMeans = kGradient ? 2 : 0;  // target, strong

  struct Arguments {
    const Real* log_probs;  // class table
    int64_t classes;
    Real weak_scale, strong_scale;  // log₂e / t
    RowSums<Real>* rows;            // [splits][padded rows]
    ClassSum<Real>* classes_sums;   // [B][pitch]
    int64_t classes_pitch;
    Means<Real> means;
  };

  __device__ Matching(const Arguments& arguments, const Place& place)
      : arguments_(arguments),
        lane_(place.lane),
        table_(arguments.log_probs, arguments.classes, place),
        runs_(arguments.classes_sums, arguments.classes_pitch, place) {}

  __device__ void fetch(const int* labels) {
    table_.fetch(log_probs_, labels, lane_);
  }

  template <int kCount, int kMeanBlocks>
  __device__ void weigh(Real (&scores)[2][kBlocks][4], Real (&means)[kCount][kMeanBlocks][4], const TileView& tile) {
    const Real weak_scale = arguments_.weak_scale, strong_scale = arguments_.strong_scale;
    mask_scores(scores[0], lane_, tile.count);
    mask_scores(scores[1], lane_, tile.count);
    table_.complete(log_probs_, tile.labels, lane_);
    Real target[kBlocks][4], top_weak[2], top_target[2], top_strong[2];
#pragma unroll
    for (int n = 0; n < kBlocks; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) target[n][i] = scores[0][n][i] * weak_scale + log_probs_[n][i];
    largest(scores[0], top_weak);
    largest(target, top_target);
    largest(scores[1], top_strong);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      top_weak[r] *= weak_scale;
      top_strong[r] *= strong_scale;
    }
    if (__any_sync(kAllLanes, weak_.passed(top_weak) || target_.passed(top_target) || strong_.passed(top_strong))) {
      Real factor[2];
      weak_.raise(top_weak, factor);
      runs_.scale(factor);
      target_.raise(top_target, factor);
      target_logit_[0] *= factor[0];
      target_logit_[1] *= factor[1];
      if constexpr (kGradient) scale_rows(means[0], factor);
      strong_.raise(top_strong, factor);
      if constexpr (kGradient) scale_rows(means[1], factor);
    }
    Real weak_weights[kBlocks][4];
#pragma unroll
    for (int n = 0; n < kBlocks; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int r = i / 2;
        const Real target_weight = exp2_of(target[n][i] - target_.reference[r]);
        const Real strong_weight = exp2_of(scores[1][n][i] * strong_scale - strong_.reference[r]);
        weak_weights[n][i] = exp2_of(scores[0][n][i] * weak_scale - weak_.reference[r]);
        target_.sum[r] += target_weight;
        target_logit_[r] += target_weight * scores[1][n][i];
        strong_.sum[r] += strong_weight;
        scores[0][n][i] = target_weight;
        scores[1][n][i] = strong_weight;
      }
    runs_.add(weak_weights, tile.labels, weak_);
  }

  template <int kCount, int kMeanBlocks>
  __device__ void finish(const Real (&means)[kCount][kMeanBlocks][4], const Place& place) {
    runs_.close(weak_);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const Real target = row_sum(target_.sum[r]), strong = row_sum(strong_.sum[r]),
                 target_logit = row_sum(target_logit_[r]);
      if (place.writes(r))
        arguments_.rows[place.split * arguments_.means.padded_rows + place.row + 8 * r] = {
            weak_.reference[r],   weak_.sum[r], target_.reference[r], target,
            strong_.reference[r], strong,       target_logit,         0};
    }
    if constexpr (kGradient) arguments_.means.put(means, place);
  }

 private:
  const Arguments& arguments_;
  int lane_;
  TableRows<Real, true> table_;
  ClassRuns<Real, false> runs_;
  RunningLogSum<Real> weak_, target_, strong_;
  Real target_logit_[2] = {0, 0};
  Real log_probs_[kBlocks][4];
};

template <class Storage>
struct Scratch {
  using Real = Compute<Storage>;

  PackedInput<Storage> packed;
  ClassOrder order;
  Real* log_probs;
  unsigned char* known;  // [B]
  RowSums<Real>* rows;
  ClassSum<Real>* classes_sums;
  Means<Real> means;
};

template <class Storage>
Scratch<Storage> take_scratch(const InstanceMatching<Storage>& problem, bool with_means, Workspace& workspace) {
  using Real = Compute<Storage>;
  const Bank<Storage>& bank = problem.bank;
  const Partition partition = partition_of(bank, problem.rows, with_means);
  Scratch<Storage> scratch;
  scratch.packed = take_packed_input(bank, problem.query_weak, problem.query_strong, problem.rows, workspace);
  scratch.order = take_class_order(labels_of(bank), bank.class_order, workspace);
  scratch.log_probs = take_class_table<Real>(partition, bank.classes, workspace);
  scratch.known = workspace.take<unsigned char>(problem.rows);
  scratch.rows = workspace.take<RowSums<Real>>(partition.splits * partition.padded_rows());
  scratch.classes_sums = workspace.take<ClassSum<Real>>(problem.rows * class_sums_pitch(bank.classes, partition));
  scratch.means = take_means<Real>(partition, with_means ? 2 : 0, bank.dim, workspace);
  return scratch;
}

inline constexpr int kMergeWarps = 8;
inline constexpr double kLn2 = 0.69314718055994530942, kLog2e = 1.44269504088896340736;

template <class Real>
struct Merge {
  const RowSums<Real>* rows;
  const ClassSum<Real>* classes_sums;
  const int64_t* starts;
  const unsigned char* known;
  const Real* probs;
  Means<Real> means;
  int64_t classes_pitch;
  int64_t classes, dim;
  int64_t splits, split_size;
  Real strong_scale;                      // 1/t_s
  InstanceMatchingPartial<Real> partial;  // or, where its log_weak is null,
  InstanceMatchingResult<Real> result;
};

// One block per row. Splits are merged in their order.
template <class Real>
__global__ void __launch_bounds__(32 * kMergeWarps, sizeof(Real) == 8 ? 3 : 5)
    merge_matching(const __grid_constant__ Merge<Real> in) {
  constexpr int kThreads = 32 * kMergeWarps;
  SSM_SHARED(scratch, Real[kMergeWarps]);
  const int64_t row = blockIdx.x, splits = in.splits;
  Real* target_share = reinterpret_cast<Real*>(dynamic_shared());  // [splits]: what a split's sums count, of the whole
  Real* strong_share = target_share + splits;
  const bool wants_partial = in.partial.log_weak != nullptr;

  Real weak_top = kLowest<Real>, target_top = kLowest<Real>, strong_top = kLowest<Real>;
  for (int64_t s = threadIdx.x; s < splits; s += kThreads) {
    const RowSums<Real> sums = in.rows[s * in.means.padded_rows + row];
    weak_top = max(weak_top, sums.weak_reference);
    target_top = max(target_top, sums.target_reference);
    strong_top = max(strong_top, sums.strong_reference);
  }
  weak_top = block_max<kMergeWarps>(weak_top, scratch);
  target_top = block_max<kMergeWarps>(target_top, scratch);
  strong_top = block_max<kMergeWarps>(strong_top, scratch);
  Real weak = 0, target = 0, strong = 0, target_logit = 0;
  for (int64_t s = threadIdx.x; s < splits; s += kThreads) {
    const RowSums<Real> sums = in.rows[s * in.means.padded_rows + row];
    target_share[s] = exp2_of(sums.target_reference - target_top);
    strong_share[s] = exp2_of(sums.strong_reference - strong_top);
    weak += exp2_of(sums.weak_reference - weak_top) * sums.weak;
    target += target_share[s] * sums.target;
    strong += strong_share[s] * sums.strong;
    target_logit += target_share[s] * sums.target_logit;
  }
  weak = block_sum<kMergeWarps>(weak, scratch);
  target = block_sum<kMergeWarps>(target, scratch);
  strong = block_sum<kMergeWarps>(strong, scratch);
  target_logit = block_sum<kMergeWarps>(target_logit, scratch);
  // An empty bank has sums of zero, and means of zero.
  const Real per_weak = splits > 0 ? 1 / weak : Real(0), per_target = splits > 0 ? 1 / target : Real(0),
             per_strong = splits > 0 ? 1 / strong : Real(0);
  target_logit *= per_target * in.strong_scale;
  const auto log_of = [](Real reference, Real sum) { return (reference + log2(sum)) * static_cast<Real>(kLn2); };

  if (threadIdx.x == 0) {
    const Real log_strong = log_of(strong_top, strong);
    if (wants_partial) {
      in.partial.log_weak[row] = log_of(weak_top, weak);
      in.partial.log_target[row] = in.known[row] ? log_of(target_top, target) : log2(Real(0));
      in.partial.log_strong[row] = log_strong;
      in.partial.target_logit[row] = target_logit;
    } else {
      in.result.loss[row] = log_strong - target_logit;
    }
  }
  for (int64_t c = threadIdx.x; c < in.classes; c += kThreads) {
    Real sum = 0;
    if (splits > 0 && in.starts[c] < in.starts[c + 1]) {
      const int64_t last = (in.starts[c + 1] - 1) / in.split_size;
      for (int64_t s = in.starts[c] / in.split_size; s <= last; ++s) {
        const ClassSum<Real> part = in.classes_sums[row * in.classes_pitch + c + s];
        sum += exp2_of(part.reference - weak_top) * part.value;
      }
    }
    const Real aggregated = sum * per_weak;
    if (wants_partial)
      in.partial.aggregated[row * in.classes + c] = aggregated;
    else
      in.result.pseudo_probs[row * in.classes + c] =
          static_cast<Real>(in.result.alpha) * in.probs[row * in.classes + c] +
          static_cast<Real>(1 - in.result.alpha) * aggregated;
  }
  if (in.means.count == 0) return;
  for (int64_t d = threadIdx.x; d < in.dim; d += kThreads) {
    Real target_mean = 0, strong_mean = 0;
#pragma unroll 4
    for (int64_t s = 0; s < splits; ++s) {
      target_mean += target_share[s] * in.means.row(s, 0, row)[d];
      strong_mean += strong_share[s] * in.means.row(s, 1, row)[d];
    }
    target_mean *= per_target;
    strong_mean *= per_strong;
    if (wants_partial) {
      in.partial.target_mean[row * in.dim + d] = target_mean;
      in.partial.strong_mean[row * in.dim + d] = strong_mean;
    } else {
      in.result.gradient[row * in.dim + d] = (strong_mean - target_mean) * in.strong_scale;
    }
  }
}

template <class Storage>
const char* run(const InstanceMatching<Storage>& problem, const InstanceMatchingPartial<Compute<Storage>>& partial,
                const InstanceMatchingResult<Compute<Storage>>& result, bool with_means, void* memory,
                cudaStream_t stream) {
  using Real = Compute<Storage>;
  const Bank<Storage>& bank = problem.bank;
  if (problem.rows == 0) return nullptr;
  Workspace workspace(memory);
  const Scratch<Storage> scratch = take_scratch(problem, with_means, workspace);
  const SweepInput<Storage> in =
      sweep_input(bank, scratch.order.slots, problem.query_weak, problem.query_strong, problem.rows,
                  partition_of(bank, problem.rows, with_means), scratch.packed);
  const int64_t pitch = class_sums_pitch(bank.classes, in.partition);

  if (bank.slots > 0) {
    Preparation<Storage, LogProbsTable<Real>> preparation;
    if (const char* error = prepare_order(bank, scratch.order, preparation, stream)) return error;
    prepare_rows(bank, problem.query_weak, problem.query_strong, problem.rows, scratch.packed, preparation);
    const bool ordered = preparation.order_blocks == 0;
    preparation.table = {problem.probs_weak, ordered ? scratch.order.present : nullptr,
                         labels_of(bank),    problem.rows,
                         scratch.log_probs,  scratch.known};
    preparation.table_blocks = table_blocks(in.partition);
    if (const char* error = launch_prepare(preparation, stream)) return error;
    const char* error = with_engine<Storage>(problem.allow_tf32, [&](auto engine) {
      using Engine = decltype(engine);
      const auto sweep_with = [&](auto operation) {
        using Operation = typename decltype(operation)::type;
        return launch_sweep<Engine, Operation>(
            in,
            {scratch.log_probs, bank.classes, static_cast<Real>(kLog2e / problem.temperature_weak),
             static_cast<Real>(kLog2e / problem.temperature_strong), scratch.rows, scratch.classes_sums, pitch,
             scratch.means},
            stream);
      };
      return with_means ? sweep_with(std::type_identity<Matching<Engine, true>>{})
                        : sweep_with(std::type_identity<Matching<Engine, false>>{});
    });
    if (error) return error;
  }
  return launch(merge_matching<Real>, problem.rows, 32 * kMergeWarps, 2 * in.partition.splits * sizeof(Real), stream,
                Merge<Real>{scratch.rows, scratch.classes_sums, scratch.order.starts, scratch.known, problem.probs_weak,
                            scratch.means, pitch, bank.classes, bank.dim, in.partition.splits, in.partition.split_size,
                            static_cast<Real>(1 / problem.temperature_strong), partial, result});
}

}  // namespace

template <class Storage>
int64_t instance_matching_workspace(const InstanceMatching<Storage>& problem, bool with_gradient) {
  Workspace workspace(nullptr);
  take_scratch(problem, with_gradient, workspace);
  return workspace.bytes();
}

template <class Storage>
const char* instance_matching(const InstanceMatching<Storage>& problem,
                              const InstanceMatchingResult<Compute<Storage>>& result, void* workspace,
                              CudaStream stream) {
  return run(problem, {}, result, result.gradient != nullptr, workspace, stream);
}

template <class Storage>
const char* instance_matching_partial(const InstanceMatching<Storage>& problem,
                                      const InstanceMatchingPartial<Compute<Storage>>& partial, void* workspace,
                                      CudaStream stream) {
  return run(problem, partial, {}, partial.target_mean != nullptr, workspace, stream);
}

#define SSM_INSTANTIATE(Storage)                                                                              \
  template int64_t instance_matching_workspace(const InstanceMatching<Storage>&, bool);                       \
  template const char* instance_matching(const InstanceMatching<Storage>&,                                    \
                                         const InstanceMatchingResult<Compute<Storage>>&, void*, CudaStream); \
  template const char* instance_matching_partial(const InstanceMatching<Storage>&,                            \
                                                 const InstanceMatchingPartial<Compute<Storage>>&, void*, CudaStream);
SSM_INSTANTIATE(float)
SSM_INSTANTIATE(double)
SSM_INSTANTIATE(bfloat16)
SSM_INSTANTIATE(float16)

}  // namespace ssmkernels::cuda
