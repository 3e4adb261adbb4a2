// SPDX-License-Identifier: BSD-3-Clause
// One cooperative launch runs all iterations. Columns are cut into tiles that one row of a warp holds in registers; a
// team of blocks solves a tile, then its next one, with barriers of its own. An iteration is three sweeps (q = A p; x
// and r; p) and moves, of N = 60k, E = 5M, C = 100 in float32, 2.0 GB of neighbours' rows from the L2 cache, 40 MB of
// graph and 13 vectors of 24 MB (x is in double precision).
#include "../common/mma.cuh"
#include "convergence.h"
#include "laplacian_solve.h"
#include "row.cuh"

namespace ssmkernels::cuda {
namespace {

using namespace graph;

inline constexpr int kMostWarps = 20;   // of a block: with 96 registers a thread one fills a multiprocessor
inline constexpr int kRowsPerWarp = 8;  // with fewer than that, several tiles are solved at a time
inline constexpr int kRowCost = 8;      // of a row, in entries
inline constexpr int kUnroll = 4;       // rows of neighbours under way

struct Partition {
  int width;  // columns per pack
  int warps;  // of a block: fewer where the device lets no block of kMostWarps run, under a profiler or a sanitizer
  int packs;  // per row of a tile
  int lanes;  // for a row of a tile, so that 32/lanes neighbours are added at a time
  int64_t tiles;
  int64_t teams;
  int64_t parts;  // blocks of a team

  __host__ __device__ int pitch() const {
    return packs * width;
  }
  __host__ __device__ int threads() const {
    return 32 * warps;
  }
  int64_t shared_bytes(size_t real_bytes) const {
    return max<int64_t>(2 * pitch() * real_bytes, sizeof(double)) * warps;
  }
};

template <class Real>
struct Column {
  Convergence state;
  PowerOf2 shrink, grow;    // of b to what is iterated, and of that to x
  double first, second;     // what was reduced last, where it takes two
  Real alpha, beta, fresh;  // x += alpha p; p = fresh z + beta p
};

template <class Real>
struct Solve {
  LaplacianSolve<Real> in;
  LaplacianSolution<Real> out;
  Partition partition;
  Real* value;            // [E]  −A_ij, 0 on its diagonal and where the column is none
  Real* excess;           // [N]  u_i + 2 Σ_j w_dis,ij
  Real* diagonal;         // [N]  A_ii
  double* extremes;       // [blocks][2]  less than or equal to 0 if A is not definite; the largest A_ii, or infinity
  double* x;              // [teams][N][pitch]
  Real* vectors;          // [teams][3][N][pitch]
  double* partials;       // [teams][pitch][2][parts]
  Column<Real>* columns;  // [teams][pitch]
  unsigned long long* arrivals;  // [1 + teams]  of all blocks, and of each team
  int* active;                   // [teams]
};

template <class Real, int kWidth>
class Solver {
  using Columns = Pack<Real, kWidth>;
  using Doubles = Pack<double, kWidth>;

 public:
  explicit __device__ Solver(const Solve<Real>& solve)
      : solve_(solve),
        in_(solve.in),
        partition_(solve.partition),
        team_(blockIdx.x / partition_.parts),
        part_(blockIdx.x % partition_.parts),
        warp_(threadIdx.x / 32),
        lane_(threadIdx.x % 32),
        groups_(32 / partition_.lanes),
        group_(lane_ / partition_.lanes),
        holds_(lane_ % partition_.lanes < partition_.packs),
        at_((holds_ ? lane_ % partition_.lanes : 0) * kWidth),
        columns_(solve.columns + team_ * partition_.pitch()),
        active_(solve.active + team_) {
    const int64_t size = in_.graph.nodes * partition_.pitch();
    x_ = solve.x + team_ * size;
    r_ = solve.vectors + team_ * 3 * size;
    p_ = r_ + size;
    q_ = p_ + size;
  }

  // The steps are functions of their own so that none keeps values of another in registers.
  __device__ void run() {
    scale_matrix();
    find_rows();
    for (first_ = team_ * partition_.pitch(); first_ < in_.columns; first_ += partition_.teams * partition_.pitch()) {
      start();
      measure(in_.initial != nullptr);
      while (any_active()) converge();
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
    const int64_t warps = partition_.parts * partition_.warps, warp = part_ * partition_.warps + warp_;
    const int64_t each = ceil_div(in_.graph.edges + kRowCost * in_.graph.nodes, warps);
    rows_ = {first_row(each * warp), first_row(each * (warp + 1))};
  }

  __device__ bool any_active() const {
    return *static_cast<volatile int*>(active_) > 0;
  }
  __device__ void wait_for_team() const {
    barrier(solve_.arrivals + 1 + team_, static_cast<unsigned>(partition_.parts));
  }

  // A's diagonal, the sums of its rows, its other entries with both weights merged, and whether the diagonal shows that
  // A is not definite; then all of it times a power of two that makes the largest diagonal entry about 1.
  __device__ __noinline__ void scale_matrix() {
    const Csr& graph = in_.graph;
    const int64_t warps = int64_t{gridDim.x} * partition_.warps, first = int64_t{blockIdx.x} * partition_.warps + warp_;
    double least = 1, largest = 0;
    for (int64_t i = first; i < graph.nodes; i += warps) {
      const Range entries = entries_of(graph, i);
      double whole = 0, excess = 0;
      bool couples = false;
      for (int64_t e = entries.begin + lane_; e < entries.end; e += 32) {
        const int64_t j = graph.col[e];
        const bool valid = is_node(graph, j);
        const Real w = valid ? in_.weight[e] : Real(0), d = valid && in_.dissimilarity ? in_.dissimilarity[e] : Real(0);
        excess += 2 * static_cast<double>(d);
        whole += i == j ? 2 * static_cast<double>(d) + 0 * w : static_cast<double>(w) + d;  // 0 w is NaN where w is
        const Real value = i == j ? Real(0) : w - d;
        couples |= value != 0;
        solve_.value[e] = value;
      }
      whole = in_.diagonal[i] + warp_sum(whole);
      excess = in_.diagonal[i] + warp_sum(excess);
      if (__any_sync(kAllLanes, couples) ? whole <= 0 : whole < 0) least = min(least, whole);
      largest = whole - whole == 0 ? max(largest, whole) : INFINITY;
      if (lane_ == 0) {
        solve_.diagonal[i] = static_cast<Real>(whole);
        solve_.excess[i] = static_cast<Real>(excess);
      }
    }
    double* scratch = reinterpret_cast<double*>(dynamic_shared());
    least = -block_max(-least, scratch, partition_.warps);
    largest = block_max(largest, scratch, partition_.warps);
    if (threadIdx.x == 0) {
      solve_.extremes[2 * blockIdx.x] = least;
      solve_.extremes[2 * blockIdx.x + 1] = largest;
    }
    barrier(solve_.arrivals, gridDim.x);
    for (int64_t block = threadIdx.x; block < gridDim.x; block += partition_.threads()) {
      least = min(least, solve_.extremes[2 * block]);
      largest = max(largest, solve_.extremes[2 * block + 1]);
    }
    least_ = static_cast<Real>(-block_max(-least, scratch, partition_.warps));
    largest = block_max(largest, scratch, partition_.warps);
    is_finite_ = largest < INFINITY;
    exponent_ = exponent_of(largest);
    const PowerOf2 shrink(-exponent_);
    for (int64_t i = first; i < graph.nodes; i += warps) {
      const Range entries = entries_of(graph, i);
      for (int64_t e = entries.begin + lane_; e < entries.end; e += 32)
        solve_.value[e] = static_cast<Real>(shrink * solve_.value[e]);
      if (lane_ > 0) continue;
      solve_.diagonal[i] = static_cast<Real>(shrink * solve_.diagonal[i]);
      solve_.excess[i] = static_cast<Real>(shrink * solve_.excess[i]);
    }
    barrier(solve_.arrivals, gridDim.x);
  }

  // 1/|A_ii|, 0 where A_ii is.
  __device__ Real inverse_of(int64_t i) const {
    constexpr Real kMost = sizeof(Real) == 4 ? Real(0x1p126) : Real(0x1p1022);  // and its inverse are normal numbers
    const Real a = fabs(solve_.diagonal[i]);
    return a == 0 ? Real(0) : min(1 / a, kMost);
  }
  // The preconditioner's.
  __device__ Real step_of(Real inverse) const {
    return in_.jacobi || inverse == 0 ? inverse : Real(1);
  }

  // Row i of A v, in every group of lanes. As the sum of what flows over each edge and not of the terms of the row, so
  // that it is 0 exactly where v is constant and there is no excess: however weak the edges that tie a part of the
  // graph to the rest, rounding among its other edges does not cover them.
  __device__ Columns multiply(const Real* v, int64_t i) const {
    const Csr& graph = in_.graph;
    const uint32_t row_bytes = partition_.pitch() * sizeof(Real);
    const Range entries = entries_of(graph, i);
    const Real* mine = v + at_;
    const int32_t* columns = in_global(graph.col);
    const Real* values = in_global(solve_.value);
    const Columns own = load<kWidth>(row_at(mine, static_cast<int32_t>(i), row_bytes));
    Columns sum{};
    const auto fetch = [&](int64_t e, int& j, Real& value) {
      j = e < entries.end ? __ldcs(columns + e) : -1;
      value = e < entries.end ? __ldcs(values + e) : Real(0);
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
          for (int k = 0; k < kWidth; ++k) sum.v[k] += factors[u] * (own.v[k] - rows[u].v[k]);
      }
      for (; round < rounds; ++round) {
        const int from = round * groups_ + group_;
        const Columns row = load<kWidth>(row_at(mine, __shfl_sync(kAllLanes, j, from), row_bytes));
        const Real factor = __shfl_sync(kAllLanes, value, from);
#pragma unroll
        for (int k = 0; k < kWidth; ++k) sum.v[k] += factor * (own.v[k] - row.v[k]);
      }
    }
    const Real excess = solve_.excess[i];
#pragma unroll
    for (int k = 0; k < kWidth; ++k) sum.v[k] = sum_over_groups(sum.v[k], partition_.lanes) + excess * own.v[k];
    return sum;
  }

  // Row i of A x in double precision, and the sum of the magnitudes of what adds up to it; in every group of lanes.
  __device__ void flows(int64_t i, Doubles& sum, Doubles& terms) const {
    const Csr& graph = in_.graph;
    const Range entries = entries_of(graph, i);
    const double* mine = x_ + at_;
    const Doubles own = load<kWidth>(mine + i * partition_.pitch());
    for (int64_t e = entries.begin + group_; e < entries.end; e += groups_) {
      const int64_t j = graph.col[e];
      const double value = solve_.value[e];
      const Doubles other = load<kWidth>(mine + (is_node(graph, j) ? j : i) * partition_.pitch());
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        const double flow = value * (own.v[k] - other.v[k]);
        sum.v[k] += flow;
        terms.v[k] += fabs(flow);
      }
    }
    const double excess = solve_.excess[i];
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      sum.v[k] = sum_over_groups(sum.v[k], partition_.lanes) + excess * own.v[k];
      terms.v[k] = sum_over_groups(terms.v[k], partition_.lanes) + fabs(excess * own.v[k]);
    }
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

  // body(i, place of the lane's columns in a vector), for the rows of this block; lanes that hold no columns take no
  // part.
  template <class F>
  __device__ void for_rows(const F& body) const {
    const int64_t nodes = in_.graph.nodes, end = nodes * (part_ + 1) / partition_.parts;
    if (!holds_) return;
    for (int64_t i = nodes * part_ / partition_.parts + warp_ * groups_ + group_; i < end;
         i += partition_.warps * groups_)
      body(i, i * partition_.pitch() + at_);
  }

  // Sums (maxima) of two quantities over all rows, in the order of the blocks; each(column, first, second) is called
  // once per column.
  template <bool kMax = false, class F>
  __device__ void reduce(const Columns& first, const Columns& second, const F& each) const {
    const auto combine = [](double a, double b) { return kMax ? max(a, b) : a + b; };
    Real* shared = reinterpret_cast<Real*>(dynamic_shared());  // [warps][2][pitch]
    const int pitch = partition_.pitch();
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      const Real a =
          kMax ? max_over_groups(first.v[k], partition_.lanes) : sum_over_groups(first.v[k], partition_.lanes);
      const Real b =
          kMax ? max_over_groups(second.v[k], partition_.lanes) : sum_over_groups(second.v[k], partition_.lanes);
      if (group_ != 0 || !holds_) continue;
      shared[warp_ * 2 * pitch + at_ + k] = a;
      shared[(warp_ * 2 + 1) * pitch + at_ + k] = b;
    }
    __syncthreads();
    double* partials = solve_.partials + team_ * 2 * pitch * partition_.parts;
    for (int at = threadIdx.x; at < 2 * pitch; at += partition_.threads()) {
      double sum = shared[at];
      for (int warp = 1; warp < partition_.warps; ++warp) sum = combine(sum, shared[warp * 2 * pitch + at]);
      partials[(at % pitch * 2 + at / pitch) * partition_.parts + part_] = sum;
    }
    wait_for_team();
    for (int64_t column = part_ + partition_.parts * warp_; column < pitch;
         column += partition_.parts * partition_.warps) {
      const double* of_column = partials + column * 2 * partition_.parts;
      double a = 0, b = 0;  // magnitudes, where it is the maximum that is taken
      for (int64_t part = lane_; part < partition_.parts; part += 32) {
        a = combine(a, of_column[part]);
        b = combine(b, of_column[partition_.parts + part]);
      }
      a = kMax ? warp_max(a) : warp_sum(a);
      b = kMax ? warp_max(b) : warp_sum(b);
      if (lane_ == 0) each(columns_[column], a, b);
    }
    wait_for_team();
  }

  // The powers of two of every column, and x = the start. A column's right side is such that the largest entry of D⁻¹ b
  // (or of the start) is about 1.
  __device__ __noinline__ void start() {
    if (part_ == 0 && threadIdx.x == 0) *active_ = 0;
    Columns top{}, top_start{};
    for_rows([&](int64_t i, int64_t) {
      const Columns b = row_of(in_.rhs, i), x = in_.initial ? row_of(in_.initial, i) : Columns{};
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        top.v[k] = max(top.v[k], fabs(b.v[k]));
        top_start.v[k] = max(top_start.v[k], fabs(x.v[k]));
      }
    });
    reduce<true>(top, top_start, [&](Column<Real>& column, double of_rhs, double of_start) {
      column.first = of_rhs;
      column.second = of_start;
      column.shrink = PowerOf2(-exponent_of(of_rhs));
    });
    Columns jacobi{}, lost{};  // D⁻¹ b, and b in rows of zeros
    for_rows([&](int64_t i, int64_t) {
      const Columns b = row_of(in_.rhs, i);
      const Real inverse = inverse_of(i);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        jacobi.v[k] = max(jacobi.v[k], static_cast<Real>(fabs(columns_[at_ + k].shrink * b.v[k]) * inverse));
        if (inverse == 0) lost.v[k] = max(lost.v[k], fabs(b.v[k]));
      }
    });
    reduce<true>(jacobi, lost, [&](Column<Real>& column, double of_jacobi, double of_lost) {
      int exponent = exponent_of(column.first) + exponent_of(of_jacobi);
      if (column.second > 0) exponent = max(exponent, exponent_of(column.second) + exponent_);
      column.shrink = PowerOf2(-exponent);
      column.grow = PowerOf2(exponent - exponent_);
      column.second = of_lost;
    });
    Columns norm{}, zeros{};  // ‖D⁻¹ b‖², and 0 unless the start has NaN or infinity
    for_rows([&](int64_t i, int64_t at) {
      const Columns b = row_of(in_.rhs, i), start = in_.initial ? row_of(in_.initial, i) : Columns{};
      const Real inverse = inverse_of(i);
      Doubles x;
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        const Real z = static_cast<Real>(columns_[at_ + k].shrink * b.v[k] * inverse);
        norm.v[k] += z * z + 0 * b.v[k];
        zeros.v[k] += 0 * start.v[k];
        x.v[k] = columns_[at_ + k].grow.inverse() * start.v[k];
      }
      store_streaming(x_ + at, x);
      store_streaming(r_ + at, Columns{});
      store(p_ + at, Columns{});
    });
    reduce(norm, zeros, [&](Column<Real>& column, double squares, double nothing) {
      const bool is_finite = is_finite_ && squares - squares == 0 && nothing == 0;
      column.state = Convergence(is_finite, column.first > 0, in_.rtol, in_.max_iter);
      column.state.set_right_side(squares, column.second > 0);
      if (least_ <= 0) column.state.end();
    });
  }

  // q = b − A x in double precision, what it says of the columns, and how many go on.
  __device__ __noinline__ void measure(bool has_solution) {
    Columns along{}, squares{}, worst{}, size{};
    for_rows([&](int64_t, int64_t at) {
      const Doubles x = load_streaming<kWidth>(x_ + at);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) size.v[k] = max(size.v[k], static_cast<Real>(fabs(x.v[k])));
    });
    reduce<true>(size, Columns{}, [](Column<Real>& column, double largest, double) { column.first = largest; });
    for (int64_t i = rows_.begin; i < rows_.end; ++i) {
      Doubles product{}, terms{};
      if (has_solution) flows(i, product, terms);
      if (group_ != 0 || !holds_) continue;
      const int64_t at = i * partition_.pitch() + at_;
      const Columns b = row_of(in_.rhs, i);
      const Doubles x = load_streaming<kWidth>(x_ + at);
      const Real inverse = inverse_of(i), step = step_of(inverse);
      Columns q;
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        const double own = columns_[at_ + k].shrink * b.v[k], r = own - product.v[k], z = inverse * r;
        q.v[k] = static_cast<Real>(r);
        along.v[k] += static_cast<Real>(r * step * r);
        squares.v[k] += static_cast<Real>(z * z);
        if (inverse > 0)
          worst.v[k] = max(worst.v[k], static_cast<Real>(imbalance(r, terms.v[k] + fabs(own), solve_.diagonal[i],
                                                                   x.v[k], columns_[at_ + k].first)));
      }
      store_streaming(q_ + at, q);
    }
    reduce(along, squares, [](Column<Real>& column, double sum, double sum_of_squares) {
      column.first = sum;
      column.second = sum_of_squares;
    });
    reduce<true>(worst, Columns{}, [&](Column<Real>& column, double largest, double) {
      column.state.measure(column.first, column.second, largest);
      if (column.state.judge()) atomicAdd(active_, 1);
      set_direction(column);
    });
  }

  __device__ static void set_direction(Column<Real>& column) {
    column.fresh = column.state.is_active() ? Real(1) : Real(0);
    column.beta = column.state.is_active() ? static_cast<Real>(column.state.beta()) : Real(1);
  }

  // Iterates until no column goes on by the recurrence, and looks at the residuals.
  __device__ __noinline__ void converge() {
    for (resumes_ = true; any_active(); resumes_ = false) iterate();
    measure(true);
  }

  __device__ __noinline__ void iterate() {
    update_directions();
    wait_for_team();
    Columns pq{}, pp{}, along{}, squares{};
    for (int64_t i = rows_.begin; i < rows_.end; ++i) {
      const Columns q = multiply(p_, i);
      if (group_ != 0 || !holds_) continue;
      const int64_t at = i * partition_.pitch() + at_;
      const Columns p = load<kWidth>(p_ + at);
      const Real weight = in_.jacobi ? solve_.diagonal[i] : Real(1);
      store_streaming(q_ + at, q);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        pq.v[k] += p.v[k] * q.v[k];
        pp.v[k] += weight * p.v[k] * p.v[k];
      }
    }
    reduce(pq, pp, [&](Column<Real>& column, double curvature, double length) {
      const bool was_active = column.state.is_active();
      column.alpha = static_cast<Real>(column.state.step(curvature, length));
      if (was_active && !column.state.is_active()) atomicAdd(active_, -1);
    });
    const Columns alpha = of_columns(&Column<Real>::alpha);
    for_rows([&](int64_t i, int64_t at) {
      const Columns p = load<kWidth>(p_ + at), q = load_streaming<kWidth>(q_ + at);
      Doubles x = load_streaming<kWidth>(x_ + at);
      Columns r = load_streaming<kWidth>(r_ + at);
      const Real inverse = inverse_of(i), step = step_of(inverse);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        x.v[k] += static_cast<double>(alpha.v[k]) * p.v[k];
        r.v[k] -= alpha.v[k] * q.v[k];
        const Real z = inverse * r.v[k];
        along.v[k] += r.v[k] * (step * r.v[k]);
        squares.v[k] += z * z;
      }
      store_streaming(x_ + at, x);
      store_streaming(r_ + at, r);
    });
    reduce(along, squares, [&](Column<Real>& column, double sum, double sum_of_squares) {
      if (column.state.is_active() && !column.state.advance(sum, sum_of_squares)) atomicAdd(active_, -1);
      set_direction(column);
    });
  }

  // p = z + β p of the columns under way; those that wait keep theirs. Columns that start again take their residual
  // from q before.
  __device__ void update_directions() const {
    const Columns beta = of_columns(&Column<Real>::beta), fresh = of_columns(&Column<Real>::fresh);
    for_rows([&](int64_t i, int64_t at) {
      Columns r = load_streaming<kWidth>(r_ + at), p = load<kWidth>(p_ + at);
      if (resumes_) {
        const Columns q = load_streaming<kWidth>(q_ + at);
#pragma unroll
        for (int k = 0; k < kWidth; ++k)
          if (columns_[at_ + k].state.restarts()) {
            r.v[k] = q.v[k];
            p.v[k] = 0;
          }
        store_streaming(r_ + at, r);
      }
      const Real step = step_of(inverse_of(i));
#pragma unroll
      for (int k = 0; k < kWidth; ++k) p.v[k] = fresh.v[k] * (step * r.v[k]) + beta.v[k] * p.v[k];
      store(p_ + at, p);
    });
  }

  __device__ __noinline__ void finish() {
    for_rows([&](int64_t i, int64_t at) {
      const Doubles x = load_streaming<kWidth>(x_ + at);
      const bool is_known = solve_.diagonal[i] != 0;
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        const int64_t column = first_ + at_ + k;
        if (column >= in_.columns) continue;
        const int64_t out = i * in_.columns + column;
        const Column<Real>& of = columns_[at_ + k];
        Real value = is_known ? static_cast<Real>(of.grow * x.v[k]) : in_.initial ? in_.initial[out] : Real(0);
        if (!of.state.has_right_side()) value = 0;
        solve_.out.solution[out] = of.state.is_finite() ? value : static_cast<Real>(NAN);
      }
    });
    for (int64_t column = threadIdx.x; column < partition_.pitch() && part_ == 0; column += partition_.threads()) {
      const Convergence& state = columns_[column].state;
      const int64_t out = first_ + column;
      if (out >= in_.columns) break;
      solve_.out.iterations[out] = state.iterations();
      solve_.out.residual[out] = static_cast<Real>(state.residual());
      const double curvature = in_.jacobi ? state.curvature() : PowerOf2(exponent_) * state.curvature();
      solve_.out.curvature[out] = static_cast<Real>(!state.is_finite() ? NAN : least_ > 0 ? curvature : least_);
    }
  }

  const Solve<Real>& solve_;
  const LaplacianSolve<Real>& in_;
  const Partition& partition_;
  const int64_t team_, part_;
  const int warp_, lane_;
  const int groups_, group_;  // of lanes
  const bool holds_;          // some of the tile's columns
  const int at_;              // the first of them, in the tile
  Column<Real>* const columns_;
  int* const active_;
  double* x_;
  Real *r_, *p_, *q_;
  Range rows_;         // this warp's, of a product
  int64_t first_ = 0;  // column of the tile
  Real least_ = 1;
  int exponent_ = 0;  // A = 2^exponent times what is iterated
  bool is_finite_ = true, resumes_ = false;
};

template <class Real, int kWidth>
__global__ void __launch_bounds__(32 * kMostWarps, 1) solve_laplacian(const __grid_constant__ Solve<Real> solve) {
  Solver<Real, kWidth>(solve).run();
}

template <class Real>
auto solver_of(const Partition& partition) {
  return partition.width == 1   ? solve_laplacian<Real, 1>
         : partition.width == 2 ? solve_laplacian<Real, 2>
                                : solve_laplacian<Real, kWidest<Real>>;
}

// At most so many packs, of that many bytes in all rows, make a tile: its p, of which every row reads others' rows, is
// to stay in the L2 cache beside what streams through. Narrower tiles read the graph more often.
inline int64_t packs_in_cache(int64_t bytes) {
  constexpr int64_t kMost = 32, kLeast = 8;
  const int64_t share = device_attribute(cudaDevAttrL2CacheSize) / 3;
  int64_t packs = kMost;
  while (packs > kLeast && packs * bytes > share) packs /= 2;
  return packs;
}

template <class Real>
Partition partition_of(int64_t nodes, int64_t columns) {
  Partition partition;
  partition.width = columns == 1 ? 1 : columns == 2 ? 2 : kWidest<Real>;
  const int64_t packs = ceil_div<int64_t>(columns, partition.width);
  partition.tiles = ceil_div<int64_t>(packs, packs_in_cache(nodes * 16));
  partition.packs = static_cast<int>(ceil_div(packs, max<int64_t>(partition.tiles, 1)));
  partition.lanes = lanes_for(partition.packs, 32);
  partition.warps = kMostWarps;
  const auto resident = [&] {
    return resident_blocks(solver_of<Real>(partition), partition.threads(), partition.shared_bytes(sizeof(Real)));
  };
  int64_t blocks = resident();  // they wait for each other, so all must run at once
  while (blocks == 0 && partition.warps > 1) {
    partition.warps /= 2;
    blocks = resident();
  }
  // One fills a multiprocessor; without any the launch says what is wrong.
  blocks = max<int64_t>(min<int64_t>(blocks, device_attribute(cudaDevAttrMultiProcessorCount)), 1);
  partition.teams =
      min(max<int64_t>(blocks / max<int64_t>(ceil_div<int64_t>(nodes, partition.warps * kRowsPerWarp), 1), 1),
          partition.tiles);
  partition.parts =
      min(max<int64_t>(ceil_div<int64_t>(nodes, partition.warps), 1), blocks / max<int64_t>(partition.teams, 1));
  return partition;
}

template <class Real>
Solve<Real> take_solve(const LaplacianSolve<Real>& in, Workspace& workspace) {
  Solve<Real> solve{};
  const Partition partition = partition_of<Real>(in.graph.nodes, in.columns);
  solve.in = in;
  solve.partition = partition;
  solve.arrivals = workspace.take<unsigned long long>(1 + partition.teams);
  solve.active = workspace.take<int>(partition.teams);
  solve.extremes = workspace.take<double>(2 * partition.teams * partition.parts);
  solve.columns = workspace.take<Column<Real>>(partition.teams * partition.pitch());
  solve.partials = workspace.take<double>(partition.teams * partition.pitch() * 2 * partition.parts);
  solve.excess = workspace.take<Real>(in.graph.nodes);
  solve.diagonal = workspace.take<Real>(in.graph.nodes);
  solve.value = workspace.take<Real>(in.graph.edges);
  solve.x = workspace.take<double>(partition.teams * in.graph.nodes * partition.pitch());
  solve.vectors = workspace.take<Real>(partition.teams * 3 * in.graph.nodes * partition.pitch());
  return solve;
}

inline constexpr int kBackwardWarps = 8;
inline constexpr int kOwn = 4;  // columns of a lane that stay in registers

// One warp per row; a neighbour takes `lanes` lanes, so that 32/lanes are under way at a time.
template <class Real>
__global__ void __launch_bounds__(32 * kBackwardWarps)
    sample_products(const __grid_constant__ LaplacianSolveBackward<Real> in, int lanes) {
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
const char* laplacian_solve(const LaplacianSolve<Real>& in, const LaplacianSolution<Real>& out, void* memory,
                            CudaStream stream) {
  if (in.columns == 0) return nullptr;
  Workspace workspace(memory);
  Solve<Real> solve = take_solve(in, workspace);
  solve.out = out;
  const Partition& partition = solve.partition;
  if (const char* error =
          message(cudaMemsetAsync(solve.arrivals, 0, (1 + partition.teams) * sizeof *solve.arrivals, stream)))
    return error;
  return launch<true>(solver_of<Real>(partition), partition.teams * partition.parts, partition.threads(),
                      partition.shared_bytes(sizeof(Real)), stream, solve);
}

template <class Real>
const char* laplacian_solve_backward(const LaplacianSolveBackward<Real>& in, CudaStream stream) {
  const int lanes = lanes_for(ceil_div<int64_t>(in.columns, kOwn), 32);
  return launch(sample_products<Real>, ceil_div<int64_t>(in.graph.nodes, kBackwardWarps), 32 * kBackwardWarps, 0,
                stream, in, lanes);
}

#define SSM_INSTANTIATE(Real)                                                                              \
  template int64_t laplacian_solve_workspace(const LaplacianSolve<Real>&);                                 \
  template const char* laplacian_solve(const LaplacianSolve<Real>&, const LaplacianSolution<Real>&, void*, \
                                       CudaStream);                                                        \
  template const char* laplacian_solve_backward(const LaplacianSolveBackward<Real>&, CudaStream);
SSM_INSTANTIATE(float)
SSM_INSTANTIATE(double)

}  // namespace ssmkernels::cuda
