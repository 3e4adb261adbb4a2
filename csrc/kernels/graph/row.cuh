// SPDX-License-Identifier: BSD-3-Clause
// What the CUDA kernels of the graph family share: rows of a graph that may not be one (on a GPU its arrays are not
// checked: what lies outside is left out), values that are read and written together, and the lanes of a warp in
// groups.
#pragma once

#include <cstring>

#include "../common/cuda.cuh"
#include "csr.h"

namespace ssmkernels::cuda::graph {

// Numbers that one instruction moves.
template <class Real, int kWidth>
struct alignas(kWidth * sizeof(Real)) Pack {
  Real v[kWidth];
};
template <class Real>
inline constexpr int kWidest = 16 / sizeof(Real);

template <int kWidth, class Real>
__device__ Pack<Real, kWidth> load(const Real* from) {
  return *reinterpret_cast<const Pack<Real, kWidth>*>(in_global(from));
}
template <class Real, int kWidth>
__device__ void store(Real* to, const Pack<Real, kWidth>& pack) {
  *reinterpret_cast<Pack<Real, kWidth>*>(in_global(to)) = pack;
}

// The same of what is not read again soon: it leaves the caches first, so that what many rows share stays in them.
template <int kBytes>
using Words = std::conditional_t<kBytes % 16 == 0, uint4, std::conditional_t<kBytes % 8 == 0, uint2, unsigned>>;

template <int kWidth, class Real>
__device__ Pack<Real, kWidth> load_streaming(const Real* from) {
  using Piece = Words<sizeof(Pack<Real, kWidth>)>;
  Pack<Real, kWidth> pack;
  Piece pieces[sizeof pack / sizeof(Piece)];
#pragma unroll
  for (size_t k = 0; k < sizeof pack / sizeof(Piece); ++k)
    pieces[k] = __ldcs(reinterpret_cast<const Piece*>(in_global(from)) + k);
  memcpy(&pack, pieces, sizeof pack);
  return pack;
}
template <class Real, int kWidth>
__device__ void store_streaming(Real* to, const Pack<Real, kWidth>& pack) {
  using Piece = Words<sizeof(Pack<Real, kWidth>)>;
  Piece pieces[sizeof pack / sizeof(Piece)];
  memcpy(pieces, &pack, sizeof pack);
#pragma unroll
  for (size_t k = 0; k < sizeof pack / sizeof(Piece); ++k)
    __stcs(reinterpret_cast<Piece*>(in_global(to)) + k, pieces[k]);
}

// Row i of a matrix whose rows have `bytes` bytes: one instruction, where 64-bit numbers take seven.
template <class Real>
__device__ const Real* row_at(const Real* matrix, int32_t i, uint32_t bytes) {
  return reinterpret_cast<const Real*>(reinterpret_cast<const char*>(matrix) +
                                       uint64_t{static_cast<uint32_t>(i)} * bytes);
}

struct Range {
  int64_t begin, end;
};

// The entries of row i.
__device__ inline Range entries_of(const Csr& graph, int64_t i) {
  const int64_t begin = min(max(graph.crow[i], int64_t{0}), graph.edges);
  return {begin, min(max(graph.crow[i + 1], begin), graph.edges)};
}

__device__ inline bool is_node(const Csr& graph, int64_t j) {
  return j >= 0 && j < graph.nodes;
}

// A power of two: how many lanes share what takes `packs` of them.
inline int lanes_for(int64_t packs, int most) {
  int lanes = 1;
  while (lanes < most && lanes < packs) lanes *= 2;
  return lanes;
}

// Lanes in groups of `lanes`, a power of two: sums and maxima within a group, and over the lanes of one place in their
// groups.
template <class Real>
__device__ Real sum_in_group(Real x, int lanes) {
  for (int step = 1; step < lanes; step *= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}
template <class Real>
__device__ Real max_in_group(Real x, int lanes) {
  for (int step = 1; step < lanes; step *= 2) x = max(x, __shfl_xor_sync(kAllLanes, x, step));
  return x;
}
template <class Real>
__device__ Real sum_over_groups(Real x, int lanes) {
  for (int step = lanes; step < 32; step *= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}
template <class Real>
__device__ Real max_over_groups(Real x, int lanes) {
  for (int step = lanes; step < 32; step *= 2) x = max(x, __shfl_xor_sync(kAllLanes, x, step));
  return x;
}

}  // namespace ssmkernels::cuda::graph
