// SPDX-License-Identifier: BSD-3-Clause
// One cooperative launch runs all iterations. Columns are cut into tiles that one row of a warp holds in registers; a team of blocks solves
// a tile, then its next one, with barriers of its own. An iteration is three sweeps (q = A p; x and r; p) and moves, of N = 60k, E = 5M, C
// = 100 in float32, 2.0 GB of neighbours' rows from the L2 cache, 40 MB of graph and 11 vectors of 24 MB.
#include "../common/mma.cuh"
#include "laplacian_solve.h"
#include "row.cuh"

namespace ssmkernels::cuda {
namespace {

inline constexpr int kWarps = 20;  // with 96 registers a thread: one block fills a multiprocessor
inline constexpr int kThreads = 32 * kWarps;
inline constexpr int kRowsPerWarp = 8;  // with fewer than that, several tiles are solved at a time
inline constexpr int kRowCost = 8;      // of a row, in entries
inline constexpr int kUnroll = 4;       // rows of neighbours under way

struct Plan {
  int width;  // columns per pack
  int packs;  // per row of a tile
  int lanes;  // for a row of a tile, so that 32/lanes neighbours are added at a time
  int64_t tiles;
  int64_t teams;
  int64_t parts;  // blocks of a team

  __host__ __device__ int pitch() const {
    return packs * width;
  }
};

inline Plan plan_of(int64_t nodes, int64_t columns, int widest) {
  Plan plan;
  plan.width = columns == 1 ? 1 : columns == 2 ? 2 : widest;
  const int64_t packs = ceil_div<int64_t>(columns, plan.width);
  const int64_t blocks = device_attribute(cudaDevAttrMultiProcessorCount);  // they wait for each other, so all must run at once
  plan.tiles = ceil_div<int64_t>(packs, 32);
  plan.packs = static_cast<int>(ceil_div(packs, max<int64_t>(plan.tiles, 1)));
  plan.lanes = lanes_for(plan.packs, 32);
  plan.teams = min(max<int64_t>(blocks / max<int64_t>(ceil_div<int64_t>(nodes, kWarps * kRowsPerWarp), 1), 1), plan.tiles);
  plan.parts = min(max<int64_t>(ceil_div<int64_t>(nodes, kWarps), 1), blocks / max<int64_t>(plan.teams, 1));
  return plan;
}

template <class Real>
struct Column {
  double squares;  // r·r
  double norm;     // b·b, shrunk
  double curvature;
  int64_t iterations;
  Real alpha, beta;
  Real shrink, grow;  // powers of 2: exact, and no square of a residual is lost below the smallest number
  int active;
};

template <class Real>
struct Solve {
  LaplacianSolve<Real> in;
  LaplacianSolution<Real> out;
  Plan plan;
  Real* value;                   // [E]  S A S, 0 on its diagonal and where the column is none
  Real* diagonal;                // [N]  A_ii
  Real* least;                   // [blocks]  the least A_ii that no definite matrix has, or 1
  Real* vectors;                 // [teams][4][N][pitch]
  double* partials;              // [teams][pitch][2][parts]
  Column<Real>* columns;         // [teams][pitch]
  unsigned long long* arrivals;  // [1 + teams]  of all blocks, and of each team
  int* active;                   // [teams]
};

template <class Real>
struct Scale {
  Real s, inverse;
  Real diagonal;  // of S A S
};

template <class Real, int kWidth>
class Solver {
  using Columns = Pack<Real, kWidth>;

 public:
  explicit __device__ Solver(const Solve<Real>& solve)
      : solve_(solve),
        in_(solve.in),
        plan_(solve.plan),
        team_(blockIdx.x / plan_.parts),
        part_(blockIdx.x % plan_.parts),
        warp_(threadIdx.x / 32),
        lane_(threadIdx.x % 32),
        groups_(32 / plan_.lanes),
        group_(lane_ / plan_.lanes),
        holds_(lane_ % plan_.lanes < plan_.packs),
        at_((holds_ ? lane_ % plan_.lanes : 0) * kWidth),
        columns_(solve.columns + team_ * plan_.pitch()),
        active_(solve.active + team_) {
    const int64_t size = in_.graph.nodes * plan_.pitch();
    x_ = solve.vectors + team_ * 4 * size;
    r_ = x_ + size;
    p_ = r_ + size;
    q_ = p_ + size;
  }

  // The steps are functions of their own so that none keeps values of another in registers.
  __device__ void run() {
    scale_matrix();
    find_rows();
    const int64_t stride = plan_.teams * plan_.pitch();
    for (first_ = team_ * plan_.pitch(); first_ < in_.columns; first_ += stride) {
      start();
      for (iteration_ = 0; iteration_ < in_.max_iter && any_active(); ++iteration_) iterate();
      finish();
    }
  }

 private:
  // How many rows lie before `cost`, where a row costs its entries and kRowCost. Lanes probe 32 rows at a time.
  __device__ int64_t first_row(int64_t cost) const {
    int64_t low = 0, high = in_.graph.nodes;  // rows before `low` lie before it, `high` does not
    while (low < high) {
      const int64_t step = ceil_div<int64_t>(high - low, 32), row = low + lane_ * step;
      const int count = __popc(__ballot_sync(kAllLanes, row < high && in_.graph.crow[row] + kRowCost * row < cost));
      high = min(high, low + count * step);
      if (count > 0) low += (count - 1) * step + 1;
    }
    return low;
  }

  // Cuts the rows into one range per warp of the team, of equal cost.
  __device__ __noinline__ void find_rows() {
    const int64_t warps = plan_.parts * kWarps, warp = part_ * kWarps + warp_;
    const int64_t each = ceil_div(in_.graph.edges + kRowCost * in_.graph.nodes, warps);
    rows_ = {first_row(each * warp), first_row(each * (warp + 1))};
  }

  __device__ bool any_active() const {
    return *static_cast<volatile int*>(active_) > 0;
  }
  __device__ void wait_for_team() const {
    barrier(solve_.arrivals + 1 + team_, static_cast<unsigned>(plan_.parts));
  }

  // A's diagonal, its other entries with both weights merged, and whether the diagonal shows that A is not definite; then S A S.
  __device__ __noinline__ void scale_matrix() {
    const Csr& graph = in_.graph;
    const int64_t warps = int64_t{gridDim.x} * kWarps, first = int64_t{blockIdx.x} * kWarps + warp_;
    Real least = 1;
    for (int64_t i = first; i < graph.nodes; i += warps) {
      const Range entries = entries_of(graph, i);
      Real sum = 0;
      bool couples = false;
      for (int64_t e = entries.begin + lane_; e < entries.end; e += 32) {
        const int64_t j = graph.col[e];
        const bool valid = is_node(graph, j);
        const Real w = valid ? in_.weight[e] : Real(0), d = valid && in_.dissimilarity ? in_.dissimilarity[e] : Real(0);
        sum += i == j ? 2 * d : w + d;
        const Real value = i == j ? Real(0) : d - w;
        couples |= value != 0;
        solve_.value[e] = value;
      }
      sum = in_.diagonal[i] + warp_sum(sum);
      if (__any_sync(kAllLanes, couples) ? sum <= 0 : sum < 0) least = min(least, sum);
      if (lane_ == 0) solve_.diagonal[i] = sum;
    }
    Real* scratch = reinterpret_cast<Real*>(dynamic_shared());
    least = -block_max<kWarps>(-least, scratch);
    if (threadIdx.x == 0) solve_.least[blockIdx.x] = least;
    barrier(solve_.arrivals, gridDim.x);
    for (int64_t block = threadIdx.x; block < gridDim.x; block += kThreads) least = min(least, solve_.least[block]);
    least_ = -block_max<kWarps>(-least, scratch);
    is_scaled_ = in_.jacobi && least_ > 0;
    if (is_scaled_)
      for (int64_t i = first; i < graph.nodes; i += warps) {
        const Range entries = entries_of(graph, i);
        const Real s = scale_of(i).s;
        for (int64_t e = entries.begin + lane_; e < entries.end; e += 32)
          if (const int64_t j = graph.col[e]; is_node(graph, j)) solve_.value[e] *= s * scale_of(j).s;
      }
    barrier(solve_.arrivals, gridDim.x);
  }

  __device__ Scale<Real> scale_of(int64_t i) const {
    const Real a = solve_.diagonal[i];
    if (!is_scaled_) return {1, 1, a};
    if (a == 0) return {0, 0, 0};
    const Real root = sqrt(a), s = 1 / root;
    return {s, root, a * (s * s)};  // 1 but for the rounding that the other entries of the row have too
  }

  // Row i of (S A S) v, in every group of lanes.
  __device__ Columns multiply(const Real* v, int64_t i) const {
    const Csr& graph = in_.graph;
    const uint32_t row_bytes = plan_.pitch() * sizeof(Real);
    const Range entries = entries_of(graph, i);
    const Real* mine = v + at_;
    const int32_t* columns = in_global(graph.col);
    const Real* values = in_global(solve_.value);
    Columns sum{};
    const auto fetch = [&](int64_t e, int& j, Real& value) {
      j = e < entries.end ? columns[e] : -1;
      value = e < entries.end ? values[e] : Real(0);
      if (!is_node(graph, j)) j = static_cast<int>(i);  // where the value is 0
    };
    int next_j;
    Real next_value;
    fetch(entries.begin + lane_, next_j, next_value);
    for (int64_t base = entries.begin; base < entries.end; base += 32) {
      const int j = next_j;
      const Real value = next_value;
      fetch(base + 32 + lane_, next_j, next_value);
      const int rounds = ceil_div(static_cast<int>(min<int64_t>(entries.end - base, 32)), groups_);
      int round = 0;
      for (; round + kUnroll <= rounds; round += kUnroll) {
        Columns rows[kUnroll];
        Real factors[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          const int from = (round + u) * groups_ + group_;
          rows[u] = load<kWidth>(row_at(mine, __shfl_sync(kAllLanes, j, from), row_bytes));
          factors[u] = __shfl_sync(kAllLanes, value, from);
        }
#pragma unroll
        for (int u = 0; u < kUnroll; ++u)
#pragma unroll
          for (int k = 0; k < kWidth; ++k) sum.v[k] += factors[u] * rows[u].v[k];
      }
      for (; round < rounds; ++round) {
        const int from = round * groups_ + group_;
        const Columns row = load<kWidth>(row_at(mine, __shfl_sync(kAllLanes, j, from), row_bytes));
        const Real factor = __shfl_sync(kAllLanes, value, from);
#pragma unroll
        for (int k = 0; k < kWidth; ++k) sum.v[k] += factor * row.v[k];
      }
    }
    const Real diagonal = scale_of(i).diagonal;
    const Columns own = load<kWidth>(row_at(mine, static_cast<int32_t>(i), row_bytes));
#pragma unroll
    for (int k = 0; k < kWidth; ++k) sum.v[k] = sum_over_groups(sum.v[k], plan_.lanes) + diagonal * own.v[k];
    return sum;
  }

  // Row i of B or of the initial X.
  __device__ Columns row_of(const Real* matrix, int64_t i) const {
    Columns row;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      const int64_t column = first_ + at_ + k;
      row.v[k] = column < in_.columns ? matrix[i * in_.columns + column] : Real(0);
    }
    return row;
  }
  __device__ Columns of_columns(Real Column<Real>::* member) const {
    Columns out;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) out.v[k] = columns_[at_ + k].*member;
    return out;
  }
  __device__ static void add_squares(Columns& sum, const Columns& x) {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) sum.v[k] += x.v[k] * x.v[k];
  }

  // body(i, place of the lane's columns in a vector), for the rows of this block; lanes that hold no columns take no part.
  template <class F>
  __device__ void for_rows(const F& body) const {
    const int64_t nodes = in_.graph.nodes, end = nodes * (part_ + 1) / plan_.parts;
    if (!holds_) return;
    for (int64_t i = nodes * part_ / plan_.parts + warp_ * groups_ + group_; i < end; i += kWarps * groups_)
      body(i, i * plan_.pitch() + at_);
  }

  // body(i, row i of (S A S) v, place), where the same rows of v are read by others; v may be null, for 0.
  template <class F>
  __device__ void for_products(const Real* v, const F& body) const {
    for (int64_t i = rows_.begin; i < rows_.end; ++i) {
      const Columns product = v ? multiply(v, i) : Columns{};
      if (group_ == 0 && holds_) body(i, product, i * plan_.pitch() + at_);
    }
  }

  // Sums (maxima) of two quantities over all rows, in the order of the blocks; each(column, first, second) is called once per column.
  template <bool kMax = false, class F>
  __device__ void reduce(const Columns& first, const Columns& second, const F& each) const {
    const auto combine = [](double a, double b) { return kMax ? max(a, b) : a + b; };
    Real* shared = reinterpret_cast<Real*>(dynamic_shared());  // [warps][2][pitch]
    const int pitch = plan_.pitch();
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      const Real a = kMax ? max_over_groups(first.v[k], plan_.lanes) : sum_over_groups(first.v[k], plan_.lanes);
      const Real b = kMax ? max_over_groups(second.v[k], plan_.lanes) : sum_over_groups(second.v[k], plan_.lanes);
      if (group_ != 0 || !holds_) continue;
      shared[warp_ * 2 * pitch + at_ + k] = a;
      shared[(warp_ * 2 + 1) * pitch + at_ + k] = b;
    }
    __syncthreads();
    double* partials = solve_.partials + team_ * 2 * pitch * plan_.parts;
    for (int at = threadIdx.x; at < 2 * pitch; at += kThreads) {
      double sum = shared[at];
      for (int warp = 1; warp < kWarps; ++warp) sum = combine(sum, shared[warp * 2 * pitch + at]);
      partials[(at % pitch * 2 + at / pitch) * plan_.parts + part_] = sum;
    }
    wait_for_team();
    for (int64_t column = part_ + plan_.parts * warp_; column < pitch; column += plan_.parts * kWarps) {
      const double* of_column = partials + column * 2 * plan_.parts;
      double a = 0, b = 0;  // magnitudes, where it is the maximum that is taken
      for (int64_t part = lane_; part < plan_.parts; part += 32) {
        a = combine(a, of_column[part]);
        b = combine(b, of_column[plan_.parts + part]);
      }
      a = kMax ? warp_max(a) : warp_sum(a);
      b = kMax ? warp_max(b) : warp_sum(b);
      if (lane_ == 0) each(columns_[column], a, b);
    }
    wait_for_team();
  }

  // S b less (S A S) x, and the squares of S⁻¹ of it; where S is 0, of b itself.
  __device__ Columns residual_row(int64_t i, const Columns& product, const Columns& shrink, Columns& squares) const {
    const Scale<Real> scale = scale_of(i);
    Columns r = row_of(in_.rhs, i), unscaled;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      const Real b = r.v[k] * shrink.v[k];
      r.v[k] = scale.s * b - product.v[k];
      unscaled.v[k] = scale.s == 0 ? b : r.v[k] * scale.inverse;
    }
    add_squares(squares, unscaled);
    return r;
  }

  __device__ __noinline__ void start() {
    if (part_ == 0 && threadIdx.x == 0) *active_ = 0;
    Columns top{}, norm{}, squares{}, unscaled{};
    for_rows([&](int64_t i, int64_t) {
      const Columns b = row_of(in_.rhs, i);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) top.v[k] = max(top.v[k], max(b.v[k], -b.v[k]));
    });
    reduce<true>(top, Columns{}, [&](Column<Real>& column, double largest, double) {
      constexpr int kMost = sizeof(Real) == 4 ? 126 : 1022;  // 2^±kMost is a normal number
      int exponent = 0;
      frexp(largest, &exponent);
      exponent = min(max(exponent, -kMost), kMost);
      column.shrink = largest > 0 ? static_cast<Real>(ldexp(1.0, -exponent)) : Real(0);
      column.grow = largest > 0 ? static_cast<Real>(ldexp(1.0, exponent)) : Real(0);
    });
    const Columns shrink = of_columns(&Column<Real>::shrink);
    for_rows([&](int64_t i, int64_t at) {
      Columns b = row_of(in_.rhs, i), x{};
      if (in_.initial) x = row_of(in_.initial, i);
      const Real inverse = scale_of(i).inverse;
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        b.v[k] *= shrink.v[k];
        x.v[k] *= inverse * shrink.v[k];
      }
      add_squares(norm, b);
      store(x_ + at, x);
    });
    reduce(norm, Columns{}, [](Column<Real>& column, double sum, double) { column.norm = sum; });
    for_products(in_.initial ? x_ : nullptr, [&](int64_t i, const Columns& product, int64_t at) {
      const Columns r = residual_row(i, product, shrink, unscaled);
      store(r_ + at, r);
      add_squares(squares, r);
    });
    reduce(squares, unscaled, [&](Column<Real>& column, double sum, double sum_unscaled) {
      column.squares = sum;
      column.curvature = INFINITY;
      column.iterations = 0;
      column.alpha = column.beta = 0;
      column.active = column.norm > 0 && sum > 0 && sum_unscaled > limit(column) && least_ > 0;
      if (column.active) atomicAdd(active_, 1);
    });
  }

  __device__ double limit(const Column<Real>& column) const {
    return in_.rtol * in_.rtol * column.norm;
  }
  __device__ void stop(Column<Real>& column) const {  // nothing of it changes any more
    column.active = 0;
    column.alpha = column.beta = 0;
    atomicAdd(active_, -1);
  }

  __device__ __noinline__ void iterate() {
    const Columns beta = of_columns(&Column<Real>::beta);
    for_rows([&](int64_t, int64_t at) {
      Columns p = load<kWidth>(r_ + at);
      if (iteration_ > 0) {
        const Columns old = load<kWidth>(p_ + at);
#pragma unroll
        for (int k = 0; k < kWidth; ++k) p.v[k] += beta.v[k] * old.v[k];
      }
      store(p_ + at, p);
    });
    wait_for_team();
    Columns pq{}, pp{}, squares{}, unscaled{};
    for_products(p_, [&](int64_t, const Columns& q, int64_t at) {
      const Columns p = load<kWidth>(p_ + at);
      store(q_ + at, q);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) pq.v[k] += p.v[k] * q.v[k];
      add_squares(pp, p);
    });
    reduce(pq, pp, [&](Column<Real>& column, double along, double length) {
      if (!column.active) return;
      const double curvature = length > 0 ? along / length : 0;
      column.curvature = min(curvature, column.curvature);
      if (curvature > 0)
        column.alpha = static_cast<Real>(column.squares / along);
      else
        stop(column);
    });
    const Columns alpha = of_columns(&Column<Real>::alpha);
    for_rows([&](int64_t i, int64_t at) {
      const Columns p = load<kWidth>(p_ + at), q = load<kWidth>(q_ + at);
      Columns x = load<kWidth>(x_ + at), r = load<kWidth>(r_ + at), s;
      const Real inverse = scale_of(i).inverse;
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        x.v[k] += alpha.v[k] * p.v[k];
        r.v[k] -= alpha.v[k] * q.v[k];
        s.v[k] = inverse * r.v[k];
      }
      store(x_ + at, x);
      store(r_ + at, r);
      add_squares(squares, r);
      add_squares(unscaled, s);
    });
    reduce(squares, unscaled, [&](Column<Real>& column, double sum, double sum_unscaled) {
      if (!column.active) return;
      ++column.iterations;
      column.beta = static_cast<Real>(sum / column.squares);
      column.squares = sum;
      if (!(sum_unscaled > limit(column)) || sum == 0) stop(column);
    });
  }

  __device__ __noinline__ void finish() {
    const Columns shrink = of_columns(&Column<Real>::shrink), grow = of_columns(&Column<Real>::grow);
    Columns unscaled{};
    for_products(x_, [&](int64_t i, const Columns& product, int64_t at) {
      residual_row(i, product, shrink, unscaled);
      const Columns x = load<kWidth>(x_ + at);
      const Real s = scale_of(i).s;
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        const int64_t column = first_ + at_ + k;
        if (column >= in_.columns) continue;
        const int64_t out = i * in_.columns + column;
        solve_.out.solution[out] = s > 0 ? s * x.v[k] * grow.v[k] : in_.initial && grow.v[k] > 0 ? in_.initial[out] : Real(0);
      }
    });
    reduce(unscaled, Columns{}, [&](Column<Real>& column, double sum, double) {
      const int64_t out = first_ + (&column - columns_);
      if (out >= in_.columns) return;
      solve_.out.iterations[out] = column.iterations;
      solve_.out.residual[out] = column.norm > 0 ? static_cast<Real>(sqrt(sum / column.norm)) : Real(0);
      solve_.out.curvature[out] = least_ > 0 ? static_cast<Real>(column.curvature) : least_;
    });
  }

  const Solve<Real>& solve_;
  const LaplacianSolve<Real>& in_;
  const Plan& plan_;
  const int64_t team_, part_;
  const int warp_, lane_;
  const int groups_, group_;  // of lanes
  const bool holds_;          // some of the tile's columns
  const int at_;              // the first of them, in the tile
  Column<Real>* const columns_;
  int* const active_;
  Real *x_, *r_, *p_, *q_;
  Range rows_;         // this warp's, of a product
  int64_t first_ = 0;  // column of the tile
  int64_t iteration_ = 0;
  Real least_ = 1;
  bool is_scaled_ = false;
};

template <class Real, int kWidth>
__global__ void __launch_bounds__(kThreads, 1) solve_laplacian(const __grid_constant__ Solve<Real> solve) {
  Solver<Real, kWidth>(solve).run();
}

template <class Real>
Solve<Real> take_solve(const LaplacianSolve<Real>& in, Workspace& workspace) {
  Solve<Real> solve{};
  const Plan plan = plan_of(in.graph.nodes, in.columns, kWidest<Real>);
  solve.in = in;
  solve.plan = plan;
  solve.arrivals = workspace.take<unsigned long long>(1 + plan.teams);
  solve.active = workspace.take<int>(plan.teams);
  solve.least = workspace.take<Real>(plan.teams * plan.parts);
  solve.columns = workspace.take<Column<Real>>(plan.teams * plan.pitch());
  solve.partials = workspace.take<double>(plan.teams * plan.pitch() * 2 * plan.parts);
  solve.diagonal = workspace.take<Real>(in.graph.nodes);
  solve.value = workspace.take<Real>(in.graph.edges);
  solve.vectors = workspace.take<Real>(plan.teams * 4 * in.graph.nodes * plan.pitch());
  return solve;
}

inline constexpr int kBackwardWarps = 8;
inline constexpr int kOwn = 4;  // columns of a lane that stay in registers

// One warp per row; a neighbour takes `lanes` lanes, so that 32/lanes are under way at a time.
template <class Real>
__global__ void __launch_bounds__(32 * kBackwardWarps) sample_products(const __grid_constant__ LaplacianSolveBackward<Real> in, int lanes) {
  const Csr& graph = in.graph;
  const int64_t i = int64_t{blockIdx.x} * kBackwardWarps + threadIdx.x / 32, columns = in.columns;
  if (i >= graph.nodes) return;
  const int lane = threadIdx.x % 32, groups = 32 / lanes, group = lane / lanes, first = lane % lanes;
  const Real* grad = in.grad_rhs + i * columns;
  Real own[kOwn];
#pragma unroll
  for (int k = 0; k < kOwn; ++k) own[k] = first + k * lanes < columns ? grad[first + k * lanes] : Real(0);
  const auto dot = [&](int64_t j) {  // ∂B_i·X_j, of the group
    const Real* x = in.solution + j * columns;
    Real sum = 0;
#pragma unroll
    for (int k = 0; k < kOwn; ++k)
      if (first + k * lanes < columns) sum += own[k] * x[first + k * lanes];
#pragma unroll 4
    for (int64_t c = first + kOwn * lanes; c < columns; c += lanes) sum += grad[c] * x[c];
    return sum_in_group(sum, lanes);
  };
  const Real own_dot = dot(i);
  if (lane == 0) in.grad_diagonal[i] = -own_dot;
  const Range entries = entries_of(graph, i);
  for (int64_t base = entries.begin; base < entries.end; base += 32) {
    const int64_t e = base + lane;
    int j = e < entries.end ? graph.col[e] : -1;
    const bool valid = is_node(graph, j);
    if (!valid) j = static_cast<int>(i);
    Real other = 0;
    const int rounds = ceil_div(static_cast<int>(min<int64_t>(entries.end - base, 32)), groups);
#pragma unroll 2
    for (int round = 0; round < rounds; ++round) {
      const Real sum = dot(__shfl_sync(kAllLanes, j, round * groups + group));
      const Real mine = __shfl_sync(kAllLanes, sum, lane % groups * lanes);
      if (lane / groups == round) other = mine;
    }
    if (e >= entries.end) continue;
    in.grad_weight[e] = other - own_dot;
    if (in.grad_dissimilarity) in.grad_dissimilarity[e] = valid ? -own_dot - other : Real(0);
  }
}

}  // namespace

template <class Real>
int64_t laplacian_solve_workspace(const LaplacianSolve<Real>& in) {
  Workspace workspace(nullptr);
  take_solve(in, workspace);
  return workspace.bytes();
}

template <class Real>
const char* laplacian_solve(const LaplacianSolve<Real>& in, const LaplacianSolution<Real>& out, void* memory, CudaStream stream) {
  if (in.columns == 0) return nullptr;
  Workspace workspace(memory);
  Solve<Real> solve = take_solve(in, workspace);
  solve.out = out;
  const Plan& plan = solve.plan;
  if (const char* error = message(cudaMemsetAsync(solve.arrivals, 0, (1 + plan.teams) * sizeof *solve.arrivals, stream))) return error;
  const auto kernel = plan.width == 1   ? solve_laplacian<Real, 1>
                      : plan.width == 2 ? solve_laplacian<Real, 2>
                                        : solve_laplacian<Real, kWidest<Real>>;
  return launch<true>(kernel, plan.teams * plan.parts, kThreads, max<int64_t>(2 * plan.pitch(), 1) * kWarps * sizeof(Real), stream, solve);
}

template <class Real>
const char* laplacian_solve_backward(const LaplacianSolveBackward<Real>& in, CudaStream stream) {
  const int lanes = lanes_for(ceil_div<int64_t>(in.columns, kOwn), 32);
  return launch(sample_products<Real>, ceil_div<int64_t>(in.graph.nodes, kBackwardWarps), 32 * kBackwardWarps, 0, stream, in, lanes);
}

#define SSM_INSTANTIATE(Real)                                                                                           \
  template int64_t laplacian_solve_workspace(const LaplacianSolve<Real>&);                                              \
  template const char* laplacian_solve(const LaplacianSolve<Real>&, const LaplacianSolution<Real>&, void*, CudaStream); \
  template const char* laplacian_solve_backward(const LaplacianSolveBackward<Real>&, CudaStream);
SSM_INSTANTIATE(float)
SSM_INSTANTIATE(double)

}  // namespace ssmkernels::cuda
