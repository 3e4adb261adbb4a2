// SPDX-License-Identifier: BSD-3-Clause
// A row's entries are met once for every kWide vectors of columns, whose sums are in registers: the entries of a row
// stay in the first-level cache. Sums over the rows are taken chunk by chunk, in their order.
#include "laplacian_rows.h"

#include <algorithm>
#include <type_traits>

#include "../common/arithmetic.h"
#include "../common/buffer.h"
#include "../common/simd.h"

namespace ssmkernels::SSM_ISA {
namespace {

constexpr int64_t kChunk = 128;  // rows
constexpr int kWide = 4;         // vectors of columns at a time
constexpr int kSums = 3;

// Numbers [kCount] of a row: vectors, or one number where what is left of the columns fills none.
template <class Real, int kVectors>
struct Columns {
  static constexpr int kCount = kVectors * kLanes<Real>;
  Vec<Real> v[kVectors]{};

  static Columns at(const Real* from) {
    Columns columns;
    for (int k = 0; k < kVectors; ++k) columns.v[k] = load(from + k * kLanes<Real>);
    return columns;
  }
  void put(Real* to) const {
    for (int k = 0; k < kVectors; ++k) store(to + k * kLanes<Real>, v[k]);
  }
  void add(Real a, const Columns& b) {
    for (int k = 0; k < kVectors; ++k) v[k] += a * b.v[k];
  }
  void add_difference(Real a, const Columns& b, const Columns& c) {
    for (int k = 0; k < kVectors; ++k) v[k] += a * (b.v[k] - c.v[k]);
  }
};

template <class Real>
struct Columns<Real, 0> {
  static constexpr int kCount = 1;
  Real v{};

  static Columns at(const Real* from) {
    return {*from};
  }
  void put(Real* to) const {
    *to = v;
  }
  void add(Real a, const Columns& b) {
    v += a * b.v;
  }
  void add_difference(Real a, const Columns& b, const Columns& c) {
    v += a * (b.v - c.v);
  }
};

// Columns c … of row i of A x.
template <int kVectors, class Real>
void multiply(const LaplacianRows<Real>& in, int64_t i, int64_t c) {
  using Columns = SSM_ISA::Columns<Real, kVectors>;
  const auto& [crow, col, value, excess, nodes, extended, columns] = in.matrix;
  const Columns own = Columns::at(in.x + i * columns + c);
  Columns sum;
  sum.add(excess[i], own);
  for (int64_t e = crow[i]; e < crow[i + 1]; ++e) {
    const int64_t j = col[e];
    if (j >= 0 && j < extended) sum.add_difference(value[e], own, Columns::at(in.x + j * columns + c));
  }
  sum.put(in.out + i * columns + c);
}

// each(kVectors as an integral constant, c) for the columns, as many at once as registers take.
template <class Real, class F>
void for_columns(int64_t columns, const F& each) {
  int64_t c = 0;
  for (; c + kWide * kLanes<Real> <= columns; c += kWide * kLanes<Real>) each(std::integral_constant<int, kWide>(), c);
  for (; c + kLanes<Real> <= columns; c += kLanes<Real>) each(std::integral_constant<int, 1>(), c);
  for (; c < columns; ++c) each(std::integral_constant<int, 0>(), c);
}

}  // namespace

template <class Real>
void laplacian_rows(const LaplacianRows<Real>& in, ParallelFor parallel_for) {
  const int64_t columns = in.matrix.columns, chunks = divide_up(in.count, kChunk);
  const Buffer<double> partials(chunks * kSums * columns);
  parallel_for(chunks, [&](int64_t begin, int64_t end) {
    const Buffer<Real> of_chunk(kSums * columns);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      Real *along = of_chunk.data(), *across = along + columns, *squares = across + columns;
      std::fill_n(along, kSums * columns, Real(0));
      for (int64_t k = chunk * kChunk; k < min((chunk + 1) * kChunk, in.count); ++k) {
        const int64_t i = in.rows[k];
        if (i < 0 || i >= in.matrix.nodes) continue;
        for_columns<Real>(columns, [&](auto vectors, int64_t c) { multiply<vectors>(in, i, c); });
        const Real *x = in.x + i * columns, *out = in.out + i * columns, *r = in.residual + i * columns;
        const Real inverse = in.inverse[i];
        for (int64_t c = 0; c < columns; ++c) {
          const Real z = inverse * r[c];
          along[c] += x[c] * out[c];
          across[c] += r[c] * x[c];
          squares[c] += z * z;
        }
      }
      for (int64_t k = 0; k < kSums * columns; ++k) partials.data()[chunk * kSums * columns + k] = along[k];
    }
  });
  std::fill_n(in.sums, kSums * columns, 0.0);
  for (int64_t chunk = 0; chunk < chunks; ++chunk)
    for (int64_t k = 0; k < kSums * columns; ++k) in.sums[k] += partials.data()[chunk * kSums * columns + k];
}

template <class Real>
void laplacian_step(const LaplacianStep<Real>& in, ParallelFor parallel_for) {
  parallel_for(divide_up(in.nodes, kChunk), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * kChunk; i < min(end * kChunk, in.nodes); ++i) {
      const int64_t at = i * in.columns;
      const Real step = in.step[i];
      const Real* w = in.w + at;
      Real *r = in.r + at, *p = in.p + at, *s = in.s + at, *u = in.u + at;
      double* x = in.x + at;
#pragma GCC ivdep
      for (int64_t c = 0; c < in.columns; ++c) {
        p[c] = in.fresh[c] * u[c] + in.beta[c] * p[c];
        s[c] = in.fresh[c] * w[c] + in.beta[c] * s[c];
        x[c] += static_cast<double>(in.alpha[c]) * p[c];
        r[c] -= in.alpha[c] * s[c];
        u[c] = step * r[c];
      }
    }
  });
}

template <class Real>
void laplacian_residual(const LaplacianResidual<Real>& in, ParallelFor parallel_for) {
  parallel_for(divide_up(in.matrix.nodes, kChunk), [&](int64_t begin, int64_t end) {
    const auto& [crow, col, value, excess, nodes, extended, columns] = in.matrix;
    for (int64_t i = begin * kChunk; i < min(end * kChunk, nodes); ++i) {
      const double *own = in.x + i * columns, of_row = excess[i];
      double *sum = in.sum + i * columns, *terms = in.terms + i * columns;
      for (int64_t c = 0; c < columns; ++c) {
        sum[c] = of_row * own[c];
        terms[c] = sum[c] < 0 ? -sum[c] : sum[c];
      }
      for (int64_t e = crow[i]; e < crow[i + 1]; ++e) {
        const int64_t j = col[e];
        if (j < 0 || j >= extended) continue;
        const double *other = in.x + j * columns, weight = value[e];
#pragma GCC ivdep
        for (int64_t c = 0; c < columns; ++c) {
          const double flow = weight * (own[c] - other[c]);
          sum[c] += flow;
          terms[c] += flow < 0 ? -flow : flow;
        }
      }
    }
  });
}

#define SSM_INSTANTIATE(Real)                                                  \
  template void laplacian_rows<Real>(const LaplacianRows<Real>&, ParallelFor); \
  template void laplacian_step<Real>(const LaplacianStep<Real>&, ParallelFor); \
  template void laplacian_residual<Real>(const LaplacianResidual<Real>&, ParallelFor);
SSM_INSTANTIATE(float)
SSM_INSTANTIATE(double)
#undef SSM_INSTANTIATE

}  // namespace ssmkernels::SSM_ISA
