// SPDX-License-Identifier: BSD-3-Clause
// Of B = 320, D = 128, K = 128k, L = 1000 in bfloat16: forward 33 MB and 10.5 GFLOP (scores), backward 33 MB and 21
// GFLOP (scores, means).
#include <utility>

#include "aggregate.h"
#include "class_sums.cuh"
#include "class_table.cuh"
#include "means.cuh"
#include "sweep.cuh"

namespace ssmkernels::cuda {
namespace {

using namespace memory;

inline constexpr int kMergeWarps = 8;
inline constexpr double kLn2 = 0.69314718055994530942, kLog2e = 1.44269504088896340736;

template <class Real>
struct alignas(2 * sizeof(Real)) RowSum {
  Real reference;
  Real sum;  // Σ 2^(x − reference)
};

// With two groups of rows a block has 128, and a warp 32: each fragment of the bank feeds two products, and the bank
// passes through half as many blocks.
template <class Engine, int kGroups>
class Forward {
  using Real = typename Engine::Real;
  static constexpr int kBlocks = Engine::Shape::kBlocks;

 public:
  static constexpr int kQueries = kGroups;
  static constexpr int kRowGroups = kGroups;
  static constexpr int kMeans = 0;

  struct Arguments {
    Real scale;                    // log₂e / t
    RowSum<Real>* rows;            // [splits][padded rows]
    ClassSum<Real>* classes_sums;  // [B][pitch]
    int64_t classes_pitch;
    int64_t padded_rows;
  };

  __device__ Forward(const Arguments& arguments, const Place& place)
      : Forward(arguments, place, std::make_integer_sequence<int, kGroups>{}) {}

  __device__ void fetch(const int*) {}

  template <class Means>
  __device__ void weigh(Real (&scores)[kGroups][kBlocks][4], Means&, const TileView& tile) {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) groups_[g].weigh(scores[g], tile, arguments_.scale);
  }

  template <class Means>
  __device__ void finish(const Means&, const Place&) {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) groups_[g].finish(arguments_);
  }

 private:
  struct Group {
    Place place;
    ClassRuns<Real, true> runs;
    RunningLogSum<Real> total;

    __device__ Group(const Arguments& arguments, const Place& at)
        : place(at), runs(arguments.classes_sums, arguments.classes_pitch, place) {}
    Group(const Group&) = delete;  // the runs refer to the place

    __device__ void weigh(Real (&scores)[kBlocks][4], const TileView& tile, const Real& scale) {
      Real top[2];
      mask_scores(scores, place.lane, tile.count);
      largest(scores, top);
      top[0] *= scale;
      top[1] *= scale;
      if (__any_sync(kAllLanes, total.passed(top))) {
        Real factor[2];
        total.raise(top, factor);
        runs.scale(factor);
      }
#pragma unroll
      for (int n = 0; n < kBlocks; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[n][i] = exp2_of(scores[n][i] * scale - total.reference[i / 2]);
      runs.add(scores, tile.labels, total);
    }

    __device__ void finish(const Arguments& arguments) {
      runs.close(total);
#pragma unroll
      for (int r = 0; r < 2; ++r)
        if (place.writes(r))
          arguments.rows[place.split * arguments.padded_rows + place.row + 8 * r] = {total.reference[r], total.sum[r]};
    }
  };

  template <int... kGroup>
  __device__ Forward(const Arguments& arguments, const Place& place, std::integer_sequence<int, kGroup...>)
      : arguments_(arguments), groups_{Group(arguments, place.of_group(kGroup))...} {}

  const Arguments& arguments_;
  Group groups_[kGroups];
};

inline int forward_groups(int64_t rows) {
  return rows > kRows ? 2 : 1;
}

// The softmax is taken anew rather than from the forward's log-normaliser, whose rounding at large logits would scale
// the whole gradient.
template <class Engine>
class Backward {
  using Real = typename Engine::Real;
  static constexpr int kBlocks = Engine::Shape::kBlocks;

 public:
  static constexpr int kQueries = 1;
  static constexpr int kRowGroups = 1;
  static constexpr int kMeans = 1;

  struct Arguments {
    const Real* class_grads;  // class table
    int64_t classes;
    Real scale;  // log₂e / t
    RowSum<Real>* rows;
    Means<Real> means;
  };

  __device__ Backward(const Arguments& arguments, const Place& place)
      : arguments_(arguments), lane_(place.lane), table_(arguments.class_grads, arguments.classes, place) {}

  __device__ void fetch(const int* labels) {
    table_.fetch(class_grads_, labels, lane_);
  }

  template <int kMeanBlocks>
  __device__ void weigh(Real (&scores)[1][kBlocks][4], Real (&means)[1][kMeanBlocks][4], const TileView& tile) {
    Real top[2];
    mask_scores(scores[0], lane_, tile.count);
    largest(scores[0], top);
    top[0] *= arguments_.scale;
    top[1] *= arguments_.scale;
    if (__any_sync(kAllLanes, total_.passed(top))) {
      Real factor[2];
      total_.raise(top, factor);
      scale_rows(means[0], factor);
    }
#pragma unroll
    for (int n = 0; n < kBlocks; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Real weight = exp2_of(scores[0][n][i] * arguments_.scale - total_.reference[i / 2]);
        total_.sum[i / 2] += weight;
        scores[0][n][i] = weight * class_grads_[n][i];
      }
  }

  template <int kMeanBlocks>
  __device__ void finish(const Real (&means)[1][kMeanBlocks][4], const Place& place) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const Real sum = row_sum(total_.sum[r]);
      if (place.writes(r))
        arguments_.rows[place.split * arguments_.means.padded_rows + place.row + 8 * r] = {total_.reference[r], sum};
    }
    arguments_.means.put(means, place);
  }

 private:
  const Arguments& arguments_;
  int lane_;
  TableRows<Real, false> table_;
  RunningLogSum<Real> total_;
  Real class_grads_[kBlocks][4];
};

// (g[c] − Σ_c g[c] q[c]) / row_scale by class, with g 0 for no class, and row_scale the largest such magnitude of the
// row: half types have a narrow range.
template <class Real>
struct GradTable {
  const Real* grad;        // [B, L]
  const Real* aggregated;  // [B, L]
  int64_t rows, classes;
  Real* table;
  Real* row_scale;  // [B]

  __device__ void make(int64_t block) const {
    SSM_SHARED(shift, Real[kTableRows]);
    SSM_SHARED(scale, Real[kTableRows]);
    const int64_t first_row = block * kTableRows;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int64_t row = first_row + warp;
    Real mean = 0, top = 0;
    if (row < rows) {
      for (int64_t c = lane; c < classes; c += 32) mean += grad[row * classes + c] * aggregated[row * classes + c];
      mean = warp_sum(mean);
      for (int64_t c = lane; c < classes; c += 32) top = max(top, fabs(grad[row * classes + c] - mean));
      top = warp_max(max(top, fabs(mean)));
    }
    if (lane == 0) {
      shift[warp] = mean;
      scale[warp] = top > 0 ? top : Real(1);
      if (row < rows) row_scale[row] = scale[warp];
    }
    __syncthreads();
    for (int64_t c = threadIdx.x; c <= classes; c += blockDim.x) {
      Real* out = table + (block * (classes + 1) + c) * kTableRows;
      for (int i = 0; i < kTableRows; ++i) {
        const Real g = c < classes && first_row + i < rows ? grad[(first_row + i) * classes + c] : Real(0);
        out[i] = (g - shift[i]) / scale[i];
      }
    }
  }
};

template <class Real>
struct Merge {
  const RowSum<Real>* rows;
  int64_t padded_rows;
  int64_t splits, split_size;
  // forward
  const ClassSum<Real>* classes_sums;
  const int64_t* starts;
  int64_t classes_pitch, classes;
  AggregateResult<Real> result;
  // backward
  Means<Real> means;
  const Real* row_scale;
  Real scale;  // 1/t
  int64_t dim;
  Real* grad_query;
};

// One block per row. Splits are merged in their order.
template <class Real, bool kBackward>
__global__ void __launch_bounds__(32 * kMergeWarps) merge_aggregate(const __grid_constant__ Merge<Real> in) {
  constexpr int kThreads = 32 * kMergeWarps;
  SSM_SHARED(scratch, Real[kMergeWarps]);
  const int64_t row = blockIdx.x;
  Real top = kLowest<Real>, sum = 0;
  for (int64_t s = threadIdx.x; s < in.splits; s += kThreads)
    top = max(top, in.rows[s * in.padded_rows + row].reference);
  top = block_max<kMergeWarps>(top, scratch);
  for (int64_t s = threadIdx.x; s < in.splits; s += kThreads) {
    const RowSum<Real> part = in.rows[s * in.padded_rows + row];
    sum += exp2_of(part.reference - top) * part.sum;
  }
  sum = block_sum<kMergeWarps>(sum, scratch);

  if constexpr (kBackward) {
    const Real factor = in.splits > 0 ? in.row_scale[row] * in.scale / sum : Real(0);
    for (int64_t d = threadIdx.x; d < in.dim; d += kThreads) {
      Real mean = 0;
#pragma unroll 4
      for (int64_t s = 0; s < in.splits; ++s)
        mean += exp2_of(in.rows[s * in.padded_rows + row].reference - top) * in.means.row(s, 0, row)[d];
      in.grad_query[row * in.dim + d] = mean * factor;
    }
  } else {
    if (threadIdx.x == 0) in.result.log_normalizer[row] = (top + log2(sum)) * static_cast<Real>(kLn2);
    for (int64_t c = threadIdx.x; c < in.classes; c += kThreads) {
      Real mass = 0;
      if (in.splits > 0 && in.starts[c] < in.starts[c + 1]) {
        const int64_t last = (in.starts[c + 1] - 1) / in.split_size;
        for (int64_t s = in.starts[c] / in.split_size; s <= last; ++s) {
          const ClassSum<Real> part = in.classes_sums[row * in.classes_pitch + c + s];
          mass += exp2_of(part.reference - top) * part.value;
        }
      }
      in.result.aggregated[row * in.classes + c] = in.splits > 0 ? mass / sum : Real(0);
    }
  }
}

template <class Storage>
struct ForwardScratch {
  using Real = Compute<Storage>;

  PackedInput<Storage> packed;
  ClassOrder order;
  RowSum<Real>* rows;
  ClassSum<Real>* classes_sums;
};

template <class Storage>
ForwardScratch<Storage> take_forward(const Aggregate<Storage>& problem, Workspace& workspace) {
  using Real = Compute<Storage>;
  const Partition partition = partition_of(problem.bank, problem.rows, false, forward_groups(problem.rows));
  ForwardScratch<Storage> scratch;
  scratch.packed = take_packed_input(problem.bank, problem.query, problem.query, problem.rows, workspace);
  scratch.order = take_class_order(labels_of(problem.bank), problem.bank.class_order, workspace);
  scratch.rows = workspace.take<RowSum<Real>>(partition.splits * partition.padded_rows());
  scratch.classes_sums =
      workspace.take<ClassSum<Real>>(problem.rows * class_sums_pitch(problem.bank.classes, partition));
  return scratch;
}

template <class Storage>
struct BackwardScratch {
  using Real = Compute<Storage>;

  PackedInput<Storage> packed;
  Real* class_grads;
  Real* row_scale;  // [B]
  RowSum<Real>* rows;
  Means<Real> means;
};

template <class Storage>
BackwardScratch<Storage> take_backward(const Aggregate<Storage>& problem, Workspace& workspace) {
  using Real = Compute<Storage>;
  const Partition partition = partition_of(problem.bank, problem.rows, true);
  BackwardScratch<Storage> scratch;
  scratch.packed = take_packed_input(problem.bank, problem.query, problem.query, problem.rows, workspace);
  scratch.class_grads = take_class_table<Real>(partition, problem.bank.classes, workspace);
  scratch.row_scale = workspace.take<Real>(problem.rows);
  scratch.rows = workspace.take<RowSum<Real>>(partition.splits * partition.padded_rows());
  scratch.means = take_means<Real>(partition, 1, problem.bank.dim, workspace);
  return scratch;
}

}  // namespace

template <class Storage>
int64_t aggregate_workspace(const Aggregate<Storage>& problem) {
  Workspace forward(nullptr), backward(nullptr);
  take_forward(problem, forward);
  take_backward(problem, backward);
  return forward.bytes() > backward.bytes() ? forward.bytes() : backward.bytes();
}

template <class Storage>
const char* aggregate(const Aggregate<Storage>& problem, const AggregateResult<Compute<Storage>>& result, void* memory,
                      CudaStream stream) {
  using Real = Compute<Storage>;
  const Bank<Storage>& bank = problem.bank;
  if (problem.rows == 0) return nullptr;
  Workspace workspace(memory);
  const ForwardScratch<Storage> scratch = take_forward(problem, workspace);
  const SweepInput<Storage> in =
      sweep_input(bank, scratch.order.slots, problem.query, problem.query, problem.rows,
                  partition_of(bank, problem.rows, false, forward_groups(problem.rows)), scratch.packed);
  Merge<Real> merge{};
  merge.rows = scratch.rows;
  merge.padded_rows = in.partition.padded_rows();
  merge.splits = in.partition.splits;
  merge.split_size = in.partition.split_size;
  merge.classes_sums = scratch.classes_sums;
  merge.starts = scratch.order.starts;
  merge.classes_pitch = class_sums_pitch(bank.classes, in.partition);
  merge.classes = bank.classes;
  merge.result = result;
  if (bank.slots > 0) {
    Preparation<Storage, NoTable> preparation;
    if (const char* error = prepare_order(bank, scratch.order, preparation, stream)) return error;
    prepare_rows(bank, problem.query, problem.query, problem.rows, scratch.packed, preparation);
    if (const char* error = launch_prepare(preparation, stream)) return error;
    const char* error = with_engine<Storage>(problem.allow_tf32, [&](auto engine) {
      using Engine = decltype(engine);
      const auto sweep_with = [&](auto operation) {
        using Operation = typename decltype(operation)::type;
        return launch_sweep<Engine, Operation>(in,
                                               {static_cast<Real>(kLog2e / problem.temperature), scratch.rows,
                                                scratch.classes_sums, merge.classes_pitch, merge.padded_rows},
                                               stream);
      };
      return forward_groups(problem.rows) == 2 ? sweep_with(std::type_identity<Forward<Engine, 2>>{})
                                               : sweep_with(std::type_identity<Forward<Engine, 1>>{});
    });
    if (error) return error;
  }
  return launch(merge_aggregate<Real, false>, problem.rows, 32 * kMergeWarps, 0, stream, merge);
}

template <class Storage>
const char* aggregate_backward(const Aggregate<Storage>& problem, const AggregateBackward<Compute<Storage>>& backward,
                               void* memory, CudaStream stream) {
  using Real = Compute<Storage>;
  const Bank<Storage>& bank = problem.bank;
  if (problem.rows == 0) return nullptr;
  Workspace workspace(memory);
  const BackwardScratch<Storage> scratch = take_backward(problem, workspace);
  const SweepInput<Storage> in = sweep_input<Storage>(bank, nullptr, problem.query, problem.query, problem.rows,
                                                      partition_of(bank, problem.rows, true), scratch.packed);
  if (bank.slots > 0) {
    Preparation<Storage, GradTable<Real>> preparation;
    prepare_rows(bank, problem.query, problem.query, problem.rows, scratch.packed, preparation);
    preparation.table = {backward.grad_aggregated, backward.aggregated, problem.rows, bank.classes,
                         scratch.class_grads,      scratch.row_scale};
    preparation.table_blocks = table_blocks(in.partition);
    if (const char* error = launch_prepare(preparation, stream)) return error;
    const char* error = with_engine<Storage>(problem.allow_tf32, [&](auto engine) {
      using Engine = decltype(engine);
      return launch_sweep<Engine, Backward<Engine>>(
          in,
          {scratch.class_grads, bank.classes, static_cast<Real>(kLog2e / problem.temperature), scratch.rows,
           scratch.means},
          stream);
    });
    if (error) return error;
  }
  Merge<Real> merge{};
  merge.rows = scratch.rows;
  merge.padded_rows = in.partition.padded_rows();
  merge.splits = in.partition.splits;
  merge.split_size = in.partition.split_size;
  merge.means = scratch.means;
  merge.row_scale = scratch.row_scale;
  merge.scale = static_cast<Real>(1 / problem.temperature);
  merge.dim = bank.dim;
  merge.grad_query = backward.grad_query;
  return launch(merge_aggregate<Real, true>, problem.rows, 32 * kMergeWarps, 0, stream, merge);
}

#define SSM_INSTANTIATE(Storage)                                                                                 \
  template int64_t aggregate_workspace(const Aggregate<Storage>&);                                               \
  template const char* aggregate(const Aggregate<Storage>&, const AggregateResult<Compute<Storage>>&, void*,     \
                                 CudaStream);                                                                    \
  template const char* aggregate_backward(const Aggregate<Storage>&, const AggregateBackward<Compute<Storage>>&, \
                                          void*, CudaStream);
SSM_INSTANTIATE(float)
SSM_INSTANTIATE(double)
SSM_INSTANTIATE(bfloat16)
SSM_INSTANTIATE(float16)

}  // namespace ssmkernels::cuda
