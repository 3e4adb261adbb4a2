// SPDX-License-Identifier: BSD-3-Clause
// How the CPU kernels of this family sweep a bank: queries lie in the lanes.
//
// A panel is kPanel query rows, stored [D][kPanel]; a tile is up to kTile slots of the bank. In both products of a
// sweep (scores, tile·panel, [slots][kPanel]; and means, tileᵀ·weights, [D][kPanel]) an element of the bank is then one
// broadcast operand and a vector is kPanel queries, so the bank is read in place, without packing, and the softmax
// between the two products runs along the lanes without shuffles. Labels select whole vectors: a bank need not be
// sorted, and a class-sorted one only gains locality.
#pragma once

#include "../common/buffer.h"
#include "../common/simd.h"
#include "bank.h"

namespace ssmkernels::SSM_ISA {

template <class Real>
inline constexpr int kPanel = 2 * kLanes<Real>;
inline constexpr int kTile = 128;
inline constexpr int kTasks = 16;  // a small batch is cut along the bank too, until there are this many tasks

template <class Real>
inline constexpr Real kMinusInfinity = -static_cast<Real>(__builtin_inf());

// A maximum of logits that something is less: of none of them, −inf, 0 instead, which makes 0 of e^(−inf − 0) and not
// NaN of −inf + inf.
template <class V>
static inline V to_subtract(V maximum) {
  return maximum == -__builtin_inf() ? V{} : maximum;
}

// How B rows × K slots are cut into tasks: by shape alone, so that the bits do not depend on the threads.
struct Partition {
  int64_t panels;      // of kPanel rows
  int64_t splits;      // of the bank
  int64_t split_size;  // slots, a multiple of kTile
};

template <class Real>
static inline Partition partition_of(int64_t rows, int64_t slots) {
  Partition partition;
  partition.panels = (rows + kPanel<Real> - 1) / kPanel<Real>;
  const int64_t wanted = partition.panels > 0 ? (kTasks + partition.panels - 1) / partition.panels : 1;
  const int64_t tiles = (slots + kTile - 1) / kTile;
  const int64_t tiles_per_split = (tiles + wanted - 1) / wanted > 4 ? (tiles + wanted - 1) / wanted : 4;
  partition.split_size = tiles_per_split * kTile;
  partition.splits = tiles > 0 ? (tiles + tiles_per_split - 1) / tiles_per_split : 0;
  return partition;
}

// packed[d][lane] = scale · rows[first + lane][d], and 0 in the lanes past `count`.
template <class Storage, class Real>
static inline void pack_panel(const Storage* rows, int64_t dim, int64_t first, int64_t count, Real scale,
                              Real* packed) {
  for (int64_t lane = 0; lane < kPanel<Real>; ++lane) {
    const bool inside = first + lane < count;
    const Storage* row = rows + (inside ? first + lane : 0) * dim;
    for (int64_t d = 0; d < dim; ++d)
      packed[d * kPanel<Real> + lane] = inside ? scale * static_cast<Real>(to_real(row[d])) : Real(0);
  }
}

template <class Real>
struct Tile {
  const Real*
      features;  // element (slot, d) at features[slot * stride + d], or at features[d * stride + slot] if transposed
  const int64_t* labels;
  int64_t stride;
  int slots;
  bool transposed;
};

// The scratch a tile needs: none where the bank, [K, D] or [D, K] in memory, can be read in place.
template <class Storage>
static inline int64_t tile_scratch(const Bank<Storage>& bank) {
  const bool in_place =
      sizeof(Storage) == sizeof(Compute<Storage>) && (bank.column_stride == 1 || bank.row_stride == 1);
  return in_place ? 0 : kTile * bank.dim;
}

template <class Storage>
static inline Tile<Compute<Storage>> load_tile(const Bank<Storage>& bank, int64_t first, int64_t end,
                                               Compute<Storage>* scratch) {
  using Real = Compute<Storage>;
  Tile<Real> tile;
  tile.slots = static_cast<int>(end - first < kTile ? end - first : kTile);
  tile.labels = bank.labels + first;
  tile.transposed = false;
  const Storage* from = bank.features + first * bank.row_stride;
  if constexpr (sizeof(Storage) == sizeof(Real)) {
    if (bank.column_stride == 1 || bank.row_stride == 1) {
      tile.features = from;
      tile.transposed = bank.column_stride != 1;
      tile.stride = tile.transposed ? bank.column_stride : bank.row_stride;
      return tile;
    }
  }
  if (bank.column_stride == 1) {
    for (int slot = 0; slot < tile.slots; ++slot)
      for (int64_t d = 0; d < bank.dim; ++d) scratch[slot * bank.dim + d] = to_real(from[slot * bank.row_stride + d]);
  } else {
    for (int64_t d = 0; d < bank.dim; ++d)
      for (int slot = 0; slot < tile.slots; ++slot)
        scratch[slot * bank.dim + d] = to_real(from[slot * bank.row_stride + d * bank.column_stride]);
  }
  tile.features = scratch;
  tile.stride = bank.dim;
  return tile;
}

// out[i] (+)= Σ_k a(i, k)·b[k] for kRows rows of kPanel lanes held in registers; a(i, k) = a[i·stride + k] or,
// transposed, a[k·stride + i].
template <class Real, int kRows, bool kTransposed, bool kAccumulate>
static inline void multiply_block(const Real* a, int64_t stride, int64_t steps, const Real* b, Real* out) {
  Vec<Real> sum[kRows][2];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    sum[i][0] = kAccumulate ? load(out + i * kPanel<Real>) : Vec<Real>{};
    sum[i][1] = kAccumulate ? load(out + i * kPanel<Real> + kLanes<Real>) : Vec<Real>{};
  }
  for (int64_t k = 0; k < steps; ++k) {
    const Vec<Real> b0 = load(b + k * kPanel<Real>), b1 = load(b + k * kPanel<Real> + kLanes<Real>);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const Vec<Real> x = broadcast(kTransposed ? a[k * stride + i] : a[i * stride + k]);
      sum[i][0] += x * b0;
      sum[i][1] += x * b1;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    store(out + i * kPanel<Real>, sum[i][0]);
    store(out + i * kPanel<Real> + kLanes<Real>, sum[i][1]);
  }
}

// Rows of the register block: 2 vectors each, beside 2 for b and 1 for the broadcast, in 32 registers (AVX-512) or 16.
#if defined(__AVX512F__) || defined(SSM_AVX512_LANES)
inline constexpr int kBlock = 8;
#else
inline constexpr int kBlock = 6;
#endif

template <class Real, int kRows, bool kTransposed, bool kAccumulate>
static inline void multiply_edge(int64_t rows, const Real* a, int64_t stride, int64_t steps, const Real* b, Real* out) {
  if constexpr (kRows > 0) {
    if (rows == kRows)
      multiply_block<Real, kRows, kTransposed, kAccumulate>(a, stride, steps, b, out);
    else
      multiply_edge<Real, kRows - 1, kTransposed, kAccumulate>(rows, a, stride, steps, b, out);
  }
}

template <class Real, bool kTransposed, bool kAccumulate>
static void multiply(int64_t rows, const Real* a, int64_t stride, int64_t steps, const Real* b, Real* out) {
  int64_t i = 0;
  for (; i + kBlock <= rows; i += kBlock)
    multiply_block<Real, kBlock, kTransposed, kAccumulate>(a + (kTransposed ? i : i * stride), stride, steps, b,
                                                           out + i * kPanel<Real>);
  multiply_edge<Real, kBlock - 1, kTransposed, kAccumulate>(rows - i, a + (kTransposed ? i : i * stride), stride, steps,
                                                            b, out + i * kPanel<Real>);
}

// scores[slot][lane] = bank_slot · query_lane
template <class Real>
static inline void scores_of(const Tile<Real>& tile, int64_t dim, const Real* packed, Real* scores) {
  if (tile.transposed)
    multiply<Real, true, false>(tile.slots, tile.features, tile.stride, dim, packed, scores);
  else
    multiply<Real, false, false>(tile.slots, tile.features, tile.stride, dim, packed, scores);
}

// sums[d][lane] += Σ_slot weights[slot][lane] · bank_slot[d]
template <class Real>
static inline void add_means(const Tile<Real>& tile, int64_t dim, const Real* weights, Real* sums) {
  if (tile.transposed)
    multiply<Real, false, true>(dim, tile.features, tile.stride, tile.slots, weights, sums);
  else
    multiply<Real, true, true>(dim, tile.features, tile.stride, tile.slots, weights, sums);
}

// The row of a [L + 1] table that a label belongs to: the last one stands for labels of no class.
static inline int64_t class_row(int64_t label, int64_t classes) {
  return label >= 0 && label < classes ? label : classes;
}

template <class Real>
static inline void scale_rows(Real* values, int64_t rows, int vector, Vec<Real> factor) {
  for (int64_t i = 0; i < rows; ++i) {
    Real* at = values + i * kPanel<Real> + vector * kLanes<Real>;
    store(at, load(at) * factor);
  }
}

template <class Real>
static inline void fill(Real* values, int64_t size, Real value) {
  for (int64_t i = 0; i < size; ++i) values[i] = value;
}

// present[c] = 1 where a slot of the bank has class c.
static inline void mark_present(const int64_t* labels, int64_t slots, int64_t classes, unsigned char* present) {
  for (int64_t c = 0; c <= classes; ++c) present[c] = 0;
  for (int64_t slot = 0; slot < slots; ++slot) present[class_row(labels[slot], classes)] = 1;
}

// log_probs[c][lane] = log probs[first + lane][c], −inf where it is 0 or of no class. A lane whose probs are 0 on every
// class present is marked unknown and gets 0 throughout: there q̂ = q^w.
template <class Real>
static inline void pack_log_probs(const Real* probs, int64_t classes, int64_t first, int64_t count,
                                  const unsigned char* present, Real* log_probs, Real* unknown) {
  fill(unknown, kPanel<Real>, Real(1));
  for (int64_t c = 0; c < classes; ++c) {
    Real* out = log_probs + c * kPanel<Real>;
    for (int64_t lane = 0; lane < kPanel<Real>; ++lane) {
      out[lane] = first + lane < count ? probs[(first + lane) * classes + c] : Real(0);
      if (present[c] && out[lane] != 0) unknown[lane] = 0;
    }
    for (int v = 0; v < 2; ++v) {
      const Vec<Real> p = load(out + v * kLanes<Real>);
      store(out + v * kLanes<Real>, p == Real(0) ? broadcast(kMinusInfinity<Real>) : log(p));
    }
  }
  fill(log_probs + classes * kPanel<Real>, kPanel<Real>, kMinusInfinity<Real>);
  for (int64_t lane = 0; lane < kPanel<Real>; ++lane)
    if (unknown[lane] != 0)
      for (int64_t c = 0; c <= classes; ++c) log_probs[c * kPanel<Real> + lane] = 0;
}

// out[(first + lane)·columns + i] = values[i][lane] for the lanes that are rows.
template <class Real>
static inline void unpack_panel(const Real* values, int64_t columns, int64_t first, int64_t count, Real* out) {
  for (int64_t lane = 0; lane < kPanel<Real> && first + lane < count; ++lane)
    for (int64_t i = 0; i < columns; ++i) out[(first + lane) * columns + i] = values[i * kPanel<Real> + lane];
}

}  // namespace ssmkernels::SSM_ISA
