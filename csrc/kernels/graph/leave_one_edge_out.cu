// SPDX-License-Identifier: BSD-3-Clause
// Three kernels. A row's degree and F_i less the middle of its range, once. Then the pairs: a warp takes a stretch of
// entries, keeps those that their row owns, and spreads each over a few lanes; its softmaxes are taken in one sweep
// over the classes, against a reference known beforehand. The backward keeps four numbers of each softmax, and a third
// kernel gathers by rows. Logits are in units of log 2, so that a power of two is one instruction. Of N = 60k, E = 5M,
// C = 100 in float32: 1.0 GB of rows from the L2 cache and 500M powers forward, 2.0 GB and 1000M more in the gather.
#include "../common/mma.cuh"
#include "leave_one_edge_out.h"
#include "row.cuh"

namespace ssmkernels::cuda {
namespace {

using namespace graph;

inline constexpr double kLn2 = 0.69314718055994530942, kLog2e = 1.44269504088896340736;
inline constexpr int kWarps = 8;
inline constexpr int kThreads = 32 * kWarps;
inline constexpr int kGatherWarps = 4;  // many registers each
inline constexpr int kStretch = 128;    // entries of a warp

template <class Real>
struct alignas(4 * sizeof(Real)) Node {
  Real degree;  // D_ii
  Real best;    // the f_ic whose logit D_ii f_ic is the largest, the first reference of its softmaxes
  Real reach;   // max_c |f_ic|
};

// What the backward keeps of Z_ij, with e = 2^{a − D_ii best_i − reference}: not its normaliser, whose rounding would
// scale the whole softmax.
template <class Real>
struct alignas(4 * sizeof(Real)) Softmax {
  Real reference;
  Real sum;      // Σ e; 0 where no row owns the pair
  Real mean;     // Σ e (a − D_ii best_i − reference)/Σ e
  Real overlap;  // Z_ij·Z_ji
};

template <class Real>
struct Problem {
  LeaveOneEdgeOut<Real> in;
  int64_t packs;  // per row of f
  Real inverse_log_classes;
  int32_t* rows;             // [E]  the row of each entry
  Node<Real>* nodes;         // [N]
  Real* f;                   // [N, packs of kWidest]  λ log₂e (F − the middle of its row), 0 past C
  Real* dissimilarity;       // [E]  forward
  Softmax<Real>* softmaxes;  // [E]  backward

  __device__ const Real* row(int32_t i) const {
    return row_at(f, i, static_cast<uint32_t>(packs) * 16);
  }
  __device__ bool is_valid(int64_t j, int64_t mirror) const {
    return is_node(in.graph, j) && mirror >= 0 && mirror < in.graph.edges;
  }
};

// One warp per row.
template <class Real>
__global__ void __launch_bounds__(kThreads) prepare_rows(const __grid_constant__ Problem<Real> problem) {
  const LeaveOneEdgeOut<Real>& in = problem.in;
  const int lane = threadIdx.x % 32;
  const int64_t i = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (i >= in.graph.nodes) return;
  const Range entries = entries_of(in.graph, i);
  Real degree = 0;
  for (int64_t e = entries.begin + lane; e < entries.end; e += 32) {
    degree += in.weight[e];
    problem.rows[e] = static_cast<int32_t>(i);
  }
  degree = warp_sum(degree);
  const Real* propagated = in.propagated + i * in.classes;
  Real low = propagated[0], high = low;
  for (int64_t c = lane; c < in.classes; c += 32) {
    low = min(low, propagated[c]);
    high = max(high, propagated[c]);
  }
  low = -warp_max(-low);
  high = warp_max(high);
  const Real middle = low + (high / 2 - low / 2), scale = static_cast<Real>(in.logit_scale * kLog2e);
  const int64_t padded = problem.packs * kWidest<Real>;
  Real* f = problem.f + i * padded;
  for (int64_t c = lane; c < padded; c += 32) f[c] = c < in.classes ? scale * (propagated[c] - middle) : Real(0);
  const Real a = scale * (high - middle), b = scale * (low - middle);
  if (lane == 0) problem.nodes[i] = {degree, degree < 0 ? b : a, max(fabs(a), fabs(b))};
}

// Whether row i is the one to compute the pair (i, j): each pair has one owner, and every row owns about half of its
// pairs.
__device__ inline bool owns(int64_t i, int64_t j) {
  return (i + j) % 2 == 0 ? i <= j : i > j;
}

template <class Real>
struct Pair {
  int64_t mirror;
  int32_t i, j;
  Real weight, mirrored;  // w_ij, w_ji
  int32_t entry;          // in the stretch
};

// The owned pairs of a stretch; their number.
template <class Real>
__device__ int collect_pairs(const Problem<Real>& problem, int64_t first, Pair<Real>* pairs) {
  const LeaveOneEdgeOut<Real>& in = problem.in;
  const unsigned lane = threadIdx.x % 32;
  int count = 0;
#pragma unroll
  for (int base = 0; base < kStretch; base += 32) {
    const int64_t e = first + base + lane;
    Pair<Real> pair{};
    bool owned = false;
    if (e < in.graph.edges) {
      pair = {in.reverse[e], problem.rows[e], in.graph.col[e], in.weight[e], 0, static_cast<int32_t>(base + lane)};
      owned = is_node(in.graph, pair.i) && problem.is_valid(pair.j, pair.mirror) && owns(pair.i, pair.j);
    }
    const unsigned all = __ballot_sync(kAllLanes, owned);
    if (owned) {
      pair.mirrored = in.weight[pair.mirror];
      pairs[count + __popc(all & ((1u << lane) - 1))] = pair;
    }
    count += __popc(all);
  }
  __syncwarp();
  return count;
}

// a_ij less the largest D_ii f_i: 0 there, whatever the rounding, and rounded alike wherever it is taken.
template <class Real>
__device__ Real logit(Real degree, Real own, Real best, Real weight, Real other) {
  return fma(-weight, other, degree * (own - best));
}

// x, 0 where it is negative; NaN stays, which max() drops.
template <class Real>
__device__ Real not_negative(Real x) {
  return x < 0 ? Real(0) : x;
}

// ω, in [0, 1] whatever the rounding: 1 less the entropy log₂ Σ e − Σ e a/Σ e over that of C equal classes.
template <class Real>
__device__ Real confidence(Real sum, Real mean, Real inverse_log_classes) {
  return not_negative(1 - not_negative(log2(sum) - mean) * inverse_log_classes);
}

// 2^x is 0 from here on down in any dtype. Logits are cut here where they are multiplied: 0 times what is below −∞
// would be NaN.
template <class Real>
inline constexpr Real kPowerZero = -2000;
template <class Real>
inline constexpr Real kLargest = sizeof(Real) == 4 ? Real(0x1p127) : Real(0x1p1023);

// Up to this a softmax without a reference of its own, its largest logit, loses less than the logits' own rounding.
template <class Real>
inline constexpr Real kModerate = 8;

// A group of `lanes` lanes takes a pair; its classes go by packs to the lanes in turn.
template <class Real, bool kPadded, bool kBackward>
__global__ void __launch_bounds__(kThreads) compute_pairs(const __grid_constant__ Problem<Real> problem, int lanes) {
  constexpr int kWidth = kWidest<Real>;
  SSM_SHARED(all_pairs, Pair<Real>[kWarps][kStretch]);
  const int lane = threadIdx.x % 32, groups = 32 / lanes, group = lane / lanes, first_pack = lane % lanes;
  const int64_t first = (int64_t{blockIdx.x} * kWarps + threadIdx.x / 32) * kStretch, classes = problem.in.classes;
  if (first >= problem.in.graph.edges) return;
  Pair<Real>* pairs = all_pairs[threadIdx.x / 32];
  const int count = collect_pairs(problem, first, pairs);
  for (int base = 0; base < count; base += groups) {
    const Pair<Real> pair = pairs[min(base + group, count - 1)];
    const Real w_ij = pair.weight, w_ji = pair.mirrored;
    const Node<Real> i = problem.nodes[pair.i], j = problem.nodes[pair.j];
    const Real *f_i = problem.row(pair.i), *f_j = problem.row(pair.j);
    Real reference_i = 0, reference_j = 0;
    const bool moderate = max(fabs(w_ij) * j.reach, fabs(w_ji) * i.reach) <= kModerate<Real>;
    if (__any_sync(kAllLanes, !moderate)) {
      Real top_i = -kLargest<Real>, top_j = -kLargest<Real>;
      for (int64_t pack = first_pack; pack < problem.packs; pack += lanes) {
        const Pack<Real, kWidth> x = load<kWidth>(f_i + pack * kWidth), y = load<kWidth>(f_j + pack * kWidth);
#pragma unroll
        for (int k = 0; k < kWidth; ++k) {
          if (kPadded && pack * kWidth + k >= classes) continue;
          top_i = max(top_i, logit(i.degree, x.v[k], i.best, w_ij, y.v[k]));
          top_j = max(top_j, logit(j.degree, y.v[k], j.best, w_ji, x.v[k]));
        }
      }
      top_i = max_in_group(top_i, lanes);
      top_j = max_in_group(top_j, lanes);
      if (!moderate) {
        reference_i = top_i;
        reference_j = top_j;
      }
    }
    Real sum_i = 0, sum_j = 0, moment_i = 0, moment_j = 0,
         dot = 0;  // with a less its references and e = 2^a: Σ e, Σ e a, Σ e_ij e_ji
#pragma unroll 2
    for (int64_t pack = first_pack; pack < problem.packs; pack += lanes) {
      const Pack<Real, kWidth> x = load<kWidth>(f_i + pack * kWidth), y = load<kWidth>(f_j + pack * kWidth);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        const Real a_i = logit(i.degree, x.v[k], i.best, w_ij, y.v[k]) - reference_i;
        const Real a_j = logit(j.degree, y.v[k], j.best, w_ji, x.v[k]) - reference_j;
        Real e_i = exp2_of(a_i), e_j = exp2_of(a_j);
        if (kPadded && pack * kWidth + k >= classes) e_i = e_j = 0;
        sum_i += e_i;
        sum_j += e_j;
        moment_i += e_i * a_i;
        moment_j += e_j * a_j;
        dot += e_i * e_j;
      }
    }
    sum_i = sum_in_group(sum_i, lanes);
    sum_j = sum_in_group(sum_j, lanes);
    moment_i = sum_in_group(moment_i, lanes);
    moment_j = sum_in_group(moment_j, lanes);
    dot = sum_in_group(dot, lanes);
    if (first_pack != 0 || base + group >= count) continue;
    const Real mean_i = moment_i / sum_i, mean_j = moment_j / sum_j, overlap = dot / (sum_i * sum_j);
    const int64_t entry = first + pair.entry;
    if constexpr (kBackward) {
      problem.softmaxes[entry] = {reference_i, sum_i, mean_i, overlap};
      problem.softmaxes[pair.mirror] = {reference_j, sum_j, mean_j, overlap};
    } else {
      const Real omega_i = confidence(sum_i, mean_i, problem.inverse_log_classes);
      const Real omega_j = confidence(sum_j, mean_j, problem.inverse_log_classes);
      problem.dissimilarity[entry] = problem.dissimilarity[pair.mirror] = omega_i * omega_j * not_negative(1 - overlap);
    }
  }
}

// What the derivatives need of an entry, with a less its references: G r_ij = e_ij (constant_i + linear_i a_ij − both
// e_ji), r_ji likewise.
template <class Real>
struct GradLogits {
  int j;
  Real weight, mirrored, degree_j, best_j;
  Real reference_i, reference_j;
  Real constant_i, linear_i, constant_j, linear_j, both;

  __device__ GradLogits from(int lane) const {
    GradLogits at;
    at.j = __shfl_sync(kAllLanes, j, lane);
    at.weight = __shfl_sync(kAllLanes, weight, lane);
    at.mirrored = __shfl_sync(kAllLanes, mirrored, lane);
    at.degree_j = __shfl_sync(kAllLanes, degree_j, lane);
    at.best_j = __shfl_sync(kAllLanes, best_j, lane);
    at.reference_i = __shfl_sync(kAllLanes, reference_i, lane);
    at.reference_j = __shfl_sync(kAllLanes, reference_j, lane);
    at.constant_i = __shfl_sync(kAllLanes, constant_i, lane);
    at.linear_i = __shfl_sync(kAllLanes, linear_i, lane);
    at.constant_j = __shfl_sync(kAllLanes, constant_j, lane);
    at.linear_j = __shfl_sync(kAllLanes, linear_j, lane);
    at.both = __shfl_sync(kAllLanes, both, lane);
    return at;
  }
};

// Of the entry e < end of row i; where there is none, what adds nothing.
template <class Real>
__device__ GradLogits<Real> grad_logits_of(const Problem<Real>& problem, const Real* grad_dissimilarity, int64_t i,
                                           int64_t e, int64_t end) {
  GradLogits<Real> grad_logits{};
  grad_logits.j = static_cast<int>(i);
  grad_logits.reference_i = grad_logits.reference_j = kLargest<Real>;
  if (e >= end) return grad_logits;
  const int64_t j = problem.in.graph.col[e], mirror = problem.in.reverse[e];
  if (!problem.is_valid(j, mirror)) return grad_logits;
  const Softmax<Real> own = problem.softmaxes[e], other = problem.softmaxes[mirror];
  if (own.sum == 0 || other.sum == 0) return grad_logits;
  const Real grad = grad_dissimilarity[e] + grad_dissimilarity[mirror];
  const Real omega_i = confidence(own.sum, own.mean, problem.inverse_log_classes);
  const Real omega_j = confidence(other.sum, other.mean, problem.inverse_log_classes);
  const Real both = grad * omega_i * omega_j, apart = grad * (1 - own.overlap) * problem.inverse_log_classes;
  grad_logits.j = static_cast<int>(j);
  grad_logits.weight = problem.in.weight[e];
  grad_logits.mirrored = problem.in.weight[mirror];
  grad_logits.degree_j = problem.nodes[j].degree;
  grad_logits.best_j = problem.nodes[j].best;
  grad_logits.reference_i = own.reference;
  grad_logits.reference_j = other.reference;
  grad_logits.linear_i = apart * omega_j / own.sum;
  grad_logits.linear_j = apart * omega_i / other.sum;
  grad_logits.constant_i = both * own.overlap / own.sum - grad_logits.linear_i * own.mean;
  grad_logits.constant_j = both * own.overlap / other.sum - grad_logits.linear_j * other.mean;
  grad_logits.both = both / (own.sum * other.sum);
  return grad_logits;
}

// One warp per row: `lanes` lanes hold kPacks packs each of the row's classes, a panel of them at a time, and 32/lanes
// entries are under way.
template <class Real, int kPacks, bool kPadded>
__global__ void __launch_bounds__(32 * kGatherWarps, 2)
    gather_gradients(const __grid_constant__ Problem<Real> problem,
                     const __grid_constant__ LeaveOneEdgeOutBackward<Real> out, int lanes) {
  constexpr int kWidth = kWidest<Real>;
  const LeaveOneEdgeOut<Real>& in = problem.in;
  const int lane = threadIdx.x % 32, groups = 32 / lanes, group = lane / lanes;
  const int64_t i = int64_t{blockIdx.x} * kGatherWarps + threadIdx.x / 32;
  if (i >= in.graph.nodes) return;
  const Range entries = entries_of(in.graph, i);
  const Real degree = problem.nodes[i].degree, best = problem.nodes[i].best;
  Real grad_degree = 0;
  for (int64_t panel = 0; panel < problem.packs; panel += kPacks * lanes) {
    Pack<Real, kWidth> x[kPacks], own[kPacks]{}, others[kPacks]{};  // f_i, Σ_j G r_ij, Σ_j G w_ji r_ji
    int place[kPacks];  // of the pack in a row; lanes without one take the first once more, and do not count
    bool holds[kPacks];
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const int64_t pack = panel + p * lanes + lane % lanes;
      holds[p] = pack < problem.packs;
      place[p] = holds[p] ? static_cast<int>(pack * kWidth) : 0;
      x[p] = load<kWidth>(problem.row(static_cast<int32_t>(i)) + place[p]);
    }
    for (int64_t base = entries.begin; base < entries.end; base += 32) {
      const GradLogits<Real> mine = grad_logits_of(problem, out.grad_dissimilarity, i, base + lane, entries.end);
      const int rounds = ceil_div(static_cast<int>(min<int64_t>(entries.end - base, 32)), groups);
      Real along = 0;  // Σ_c G r_ij f_j of the lane's entry; r sums to 0, so that the middle of F_j makes no difference
#pragma unroll 1
      for (int round = 0; round < rounds; ++round) {
        const GradLogits<Real> s = mine.from(round * groups + group);
        const Real* f_j = problem.row(s.j);
        Real sum = 0;
#pragma unroll
        for (int p = 0; p < kPacks; ++p) {
          const Pack<Real, kWidth> y = load<kWidth>(f_j + place[p]);
#pragma unroll
          for (int k = 0; k < kWidth; ++k) {
            const Real a_i = logit(degree, x[p].v[k], best, s.weight, y.v[k]) - s.reference_i;
            const Real a_j = logit(s.degree_j, y.v[k], s.best_j, s.mirrored, x[p].v[k]) - s.reference_j;
            Real e_i = exp2_of(a_i), e_j = exp2_of(a_j);
            if (!holds[p] || (kPadded && place[p] + k >= in.classes)) e_i = e_j = 0;
            const Real r_i = e_i * (s.constant_i + s.linear_i * max(a_i, kPowerZero<Real>) - s.both * e_j);
            const Real r_j = e_j * (s.constant_j + s.linear_j * max(a_j, kPowerZero<Real>) - s.both * e_i);
            own[p].v[k] += r_i;
            others[p].v[k] += s.mirrored * r_j;
            sum += r_i * y.v[k];
          }
        }
        sum = sum_in_group(sum, lanes);
        const Real of_entry = __shfl_sync(kAllLanes, sum, lane % groups * lanes);
        if (lane / groups == round) along = of_entry;
      }
      if (base + lane < entries.end)
        out.grad_weight[base + lane] = panel == 0 ? along : out.grad_weight[base + lane] + along;
    }
    Real sum = 0;
#pragma unroll
    for (int p = 0; p < kPacks; ++p)
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        const Real total = sum_over_groups(own[p].v[k], lanes), total_others = sum_over_groups(others[p].v[k], lanes);
        const int c = place[p] + k;
        if (group != 0 || !holds[p] || c >= in.classes) continue;
        sum += total * x[p].v[k];
        out.grad_propagated[i * in.classes + c] = static_cast<Real>(in.logit_scale) * (degree * total - total_others);
      }
    grad_degree += warp_sum(sum);
  }
  for (int64_t e = entries.begin + lane; e < entries.end; e += 32)                      // the lane's own
    out.grad_weight[e] = static_cast<Real>(kLn2) * (grad_degree - out.grad_weight[e]);  // λ F = f log 2
}

template <class Real>
Problem<Real> take_problem(const LeaveOneEdgeOut<Real>& in, bool with_gradients, Workspace& workspace) {
  Problem<Real> problem{};
  problem.in = in;
  problem.packs = ceil_div<int64_t>(in.classes, kWidest<Real>);
  problem.inverse_log_classes = static_cast<Real>(1 / log2(static_cast<double>(in.classes)));
  problem.rows = workspace.take<int32_t>(in.graph.edges);
  problem.nodes = workspace.take<Node<Real>>(in.graph.nodes);
  problem.f = workspace.take<Real>(in.graph.nodes * problem.packs * kWidest<Real>);
  if (with_gradients) problem.softmaxes = workspace.take<Softmax<Real>>(in.graph.edges);
  return problem;
}

template <bool kBackward, class Real>
const char* launch_pairs(const Problem<Real>& problem, cudaStream_t stream) {
  const Csr& graph = problem.in.graph;
  if (const char* error =
          launch(prepare_rows<Real>, ceil_div<int64_t>(graph.nodes, kWarps), kThreads, 0, stream, problem))
    return error;
  const bool padded = problem.in.classes % kWidest<Real> != 0;
  const auto kernel = padded ? compute_pairs<Real, true, kBackward> : compute_pairs<Real, false, kBackward>;
  // Two packs or more to a lane: what a pair costs beside its classes is shared by fewer lanes. Eight lanes read whole
  // lines.
  const int lanes = lanes_for(ceil_div<int64_t>(problem.packs, 2), 8);
  return launch(kernel, ceil_div<int64_t>(graph.edges, kWarps * kStretch), kThreads, 0, stream, problem, lanes);
}

template <int kPacks, class Real>
const char* launch_gather(const Problem<Real>& problem, const LeaveOneEdgeOutBackward<Real>& out, cudaStream_t stream) {
  const bool padded = problem.in.classes % kWidest<Real> != 0;
  const auto kernel = padded ? gather_gradients<Real, kPacks, true> : gather_gradients<Real, kPacks, false>;
  const int lanes = lanes_for(ceil_div<int64_t>(problem.packs, kPacks), 32);
  return launch(kernel, ceil_div<int64_t>(problem.in.graph.nodes, kGatherWarps), 32 * kGatherWarps, 0, stream, problem,
                out, lanes);
}

}  // namespace

template <class Real>
int64_t leave_one_edge_out_workspace(const LeaveOneEdgeOut<Real>& in, bool with_gradients) {
  Workspace workspace(nullptr);
  take_problem(in, with_gradients, workspace);
  return workspace.bytes();
}

template <class Real>
const char* leave_one_edge_out(const LeaveOneEdgeOut<Real>& in, Real* dissimilarity, void* memory, CudaStream stream) {
  if (in.graph.edges == 0) return nullptr;
  Workspace workspace(memory);
  Problem<Real> problem = take_problem(in, false, workspace);
  problem.dissimilarity = dissimilarity;
  // Entries whose pair has no owner stay 0.
  if (const char* error = message(cudaMemsetAsync(dissimilarity, 0, in.graph.edges * sizeof(Real), stream)))
    return error;
  return launch_pairs<false>(problem, stream);
}

template <class Real>
const char* leave_one_edge_out_backward(const LeaveOneEdgeOut<Real>& in, const LeaveOneEdgeOutBackward<Real>& out,
                                        void* memory, CudaStream stream) {
  if (in.graph.nodes == 0) return nullptr;
  Workspace workspace(memory);
  const Problem<Real> problem = take_problem(in, true, workspace);
  if (const char* error =
          message(cudaMemsetAsync(problem.softmaxes, 0, in.graph.edges * sizeof *problem.softmaxes, stream)))
    return error;
  if (const char* error = launch_pairs<true>(problem, stream)) return error;
  return problem.packs == 1    ? launch_gather<1>(problem, out, stream)
         : problem.packs <= 16 ? launch_gather<2>(problem, out, stream)
                               : launch_gather<4>(problem, out, stream);
}

#define SSM_INSTANTIATE(Real)                                                                                          \
  template int64_t leave_one_edge_out_workspace(const LeaveOneEdgeOut<Real>&, bool);                                   \
  template const char* leave_one_edge_out(const LeaveOneEdgeOut<Real>&, Real*, void*, CudaStream);                     \
  template const char* leave_one_edge_out_backward(const LeaveOneEdgeOut<Real>&, const LeaveOneEdgeOutBackward<Real>&, \
                                                   void*, CudaStream);
SSM_INSTANTIATE(float)
SSM_INSTANTIATE(double)

}  // namespace ssmkernels::cuda
