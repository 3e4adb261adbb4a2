// SPDX-License-Identifier: BSD-3-Clause
// The three matrix products of a tile of 128 pairs, by a block of eight warps, with operands in shared memory:
//   hidden units [pairs, h] = φ w1ᵀ,  ∂φ [pairs, d] = s w1,  ∂w1 [h, d] = sᵀ φ,  s [pairs, h] being ∂L/∂logit where a
//   unit is active, else 0.
// The engines differ in how they multiply and in which elements of a product a thread has; they all give rows and
// columns of these.
#pragma once

#include "../common/cuda.cuh"
#include "../common/tile_product.cuh"
#include "parts.cuh"

namespace ssmkernels::cuda::pairs {

inline constexpr int kInteractionWarps = 8, kInteractionThreads = 32 * kInteractionWarps;
inline constexpr int kTilePairs = 128;

// A thread's share of a product on tensor cores: two fragments of 16 rows, kBlocks of 8 columns; warps stand kAcross to
// a row.
template <int kAcross, int kBlocks>
struct FragmentShare {
  static constexpr int kRows = 4, kColumns = 2 * kBlocks;
  static constexpr int kRowStep = 8;  // from a row to the next
  static constexpr int kRun = 2;      // neighbouring columns

  float sums[2][kBlocks][4] = {};

  static __device__ int first_row() {
    return threadIdx.x / 32 / kAcross * 32;
  }
  static __device__ int first_column() {
    return threadIdx.x / 32 % kAcross * kBlocks * 8;
  }
  static __device__ int row(int r) {
    return first_row() + threadIdx.x % 32 / 4 + kRowStep * r;
  }
  static __device__ int column(int c) {
    return first_column() + c / 2 * 8 + threadIdx.x % 4 * 2 + c % 2;
  }
  __device__ float& at(int r, int c) {
    return sums[r / 2][c / 2][r % 2 * 2 + c % 2];
  }
};

// Half types on the tensor cores, 16 deep.
template <class StorageType>
struct TensorCoreEngine {
  using Storage = StorageType;
  using Real = float;
  static constexpr int kHidden = 64, kDim = 128;    // of a tile
  static constexpr int kPitch = kDim + 8;           // of φ and w1: eight rows start in different banks
  static constexpr int kActivePitch = kHidden + 8;  // of s
  static constexpr bool kScales = true;             // what is rounded to half is first scaled to at most 1

  using Hidden = FragmentShare<2, 4>;
  using PhiGradient = FragmentShare<2, 8>;
  using WeightGradient = FragmentShare<4, 4>;
  static constexpr int kRowLanes = 4;  // neighbouring lanes that share the rows of Hidden
  static constexpr int kRowWarps = 2;  // and warps
  static constexpr int kWords = 1;     // of 32 hidden units that a thread of Hidden has columns of

  // sums += φ w1ᵀ over the first `depth` features.
  static __device__ void hidden(Hidden& out, const Storage* phi, const Storage* w1, int depth) {
    const int lane = threadIdx.x % 32;
    const Storage* a_at = phi + (Hidden::first_row() + lane % 16) * kPitch + lane / 16 * 8;
    const Storage* b_at = w1 + (Hidden::first_column() + lane / 16 * 8 + lane % 8) * kPitch + lane / 8 % 2 * 8;
#pragma unroll 2
    for (int k = 0; k < depth; k += 16) {
      uint32_t a[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m) load_matrices(a[m], a_at + m * 16 * kPitch + k);
#pragma unroll
      for (int n = 0; n < 4; n += 2) {
        uint32_t b[4];
        load_matrices(b, b_at + n * 8 * kPitch + k);
        multiply_blocks<Storage>(out.sums, a, b, n);
      }
    }
  }

  // sums += s w1.
  static __device__ void phi_gradient(PhiGradient& out, const Storage* active, const Storage* w1) {
    const int lane = threadIdx.x % 32;
    const Storage* a_at = active + (PhiGradient::first_row() + lane % 16) * kActivePitch + lane / 16 * 8;
    const Storage* b_at = w1 + lane % 16 * kPitch + PhiGradient::first_column() + lane / 16 * 8;
#pragma unroll 1
    for (int k = 0; k < kHidden; k += 16) {
      uint32_t a[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m) load_matrices(a[m], a_at + m * 16 * kActivePitch + k);
#pragma unroll
      for (int n = 0; n < 8; n += 2) {
        uint32_t b[4];
        load_matrices_transposed(b, b_at + k * kPitch + n * 8);
        multiply_blocks<Storage>(out.sums, a, b, n);
      }
    }
  }

  // sums += sᵀ φ.
  static __device__ void weight_gradient(WeightGradient& out, const Storage* active, const Storage* phi) {
    const int lane = threadIdx.x % 32;
    const Storage* a_at =
        active + (lane / 16 * 8 + lane % 8) * kActivePitch + WeightGradient::first_row() + lane / 8 % 2 * 8;
    const Storage* b_at = phi + lane % 16 * kPitch + WeightGradient::first_column() + lane / 16 * 8;
#pragma unroll 1
    for (int k = 0; k < kTilePairs; k += 16) {
      uint32_t a[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m) load_matrices_transposed(a[m], a_at + k * kActivePitch + m * 16);
#pragma unroll
      for (int n = 0; n < 4; n += 2) {
        uint32_t b[4];
        load_matrices_transposed(b, b_at + k * kPitch + n * 8);
        multiply_blocks<Storage>(out.sums, a, b, n);
      }
    }
  }
};

// Threads stand 16 × 16; a thread has kRows rows and kColumns columns, either neighbouring ones or every sixteenth.
template <class Real, int kRowCount, int kColumnCount, bool kRowsTogether, bool kColumnsTogether>
struct PlainShare {
  static constexpr int kRows = kRowCount, kColumns = kColumnCount;
  static constexpr int kRowStep = kRowsTogether ? 1 : 16;
  static constexpr int kRun = kColumnsTogether ? kColumns : 1;

  Real sums[kRows][kColumns] = {};

  static __device__ int row(int r) {
    return threadIdx.x / 16 * (kRowsTogether ? kRows : 1) + kRowStep * r;
  }
  static __device__ int column(int c) {
    return kColumnsTogether ? threadIdx.x % 16 * kColumns + c : threadIdx.x % 16 + 16 * c;
  }
  __device__ Real& at(int r, int c) {
    return sums[r][c];
  }
};

// float32 and float64 without tensor cores.
template <class StorageType>
struct PlainEngine {
  using Storage = StorageType;
  using Real = StorageType;
  static constexpr int kWidth = kVector<Real>;
  static constexpr int kHidden = 16 * kWidth, kDim = 16 * kWidth;
  static constexpr int kPitch = kDim + kWidth;
  static constexpr int kActivePitch = kHidden + kWidth;
  static constexpr bool kScales = false;

  using Hidden = PlainShare<Real, 8, kWidth, false, false>;
  using PhiGradient = PlainShare<Real, 8, kWidth, false, true>;
  using WeightGradient = PlainShare<Real, kWidth, kWidth, true, true>;
  static constexpr int kRowLanes = 16;
  static constexpr int kRowWarps = 1;
  static constexpr int kWords = kHidden / 32;

  static __device__ void hidden(Hidden& out, const Real* phi, const Real* w1, int depth) {
    const Real *a_at = phi + Hidden::row(0) * kPitch, *b_at = w1 + Hidden::column(0) * kPitch;
#pragma unroll 1
    for (int k = 0; k < depth; k += kWidth) {
      Vector<Real> a[8];
#pragma unroll
      for (int r = 0; r < 8; ++r) a[r] = vector_at(a_at + r * 16 * kPitch + k);
#pragma unroll
      for (int c = 0; c < kWidth; ++c) {
        const Vector<Real> b = vector_at(b_at + c * 16 * kPitch + k);
#pragma unroll
        for (int r = 0; r < 8; ++r)
#pragma unroll
          for (int v = 0; v < kWidth; ++v) out.sums[r][c] += a[r].values[v] * b.values[v];
      }
    }
  }

  static __device__ void phi_gradient(PhiGradient& out, const Real* active, const Real* w1) {
    const Real *a_at = active + PhiGradient::row(0) * kActivePitch, *b_at = w1 + PhiGradient::column(0);
#pragma unroll 1
    for (int k = 0; k < kHidden; k += kWidth) {
      Vector<Real> a[8];
#pragma unroll
      for (int r = 0; r < 8; ++r) a[r] = vector_at(a_at + r * 16 * kActivePitch + k);
#pragma unroll
      for (int v = 0; v < kWidth; ++v) {
        const Vector<Real> b = vector_at(b_at + (k + v) * kPitch);
#pragma unroll
        for (int r = 0; r < 8; ++r)
#pragma unroll
          for (int c = 0; c < kWidth; ++c) out.sums[r][c] += a[r].values[v] * b.values[c];
      }
    }
  }

  static __device__ void weight_gradient(WeightGradient& out, const Real* active, const Real* phi) {
    const Real *a_at = active + WeightGradient::row(0), *b_at = phi + WeightGradient::column(0);
#pragma unroll 4
    for (int k = 0; k < kTilePairs; ++k) {
      const Vector<Real> a = vector_at(a_at + k * kActivePitch), b = vector_at(b_at + k * kPitch);
#pragma unroll
      for (int r = 0; r < kWidth; ++r)
#pragma unroll
        for (int c = 0; c < kWidth; ++c) out.sums[r][c] += a.values[r] * b.values[c];
    }
  }
};

template <class Storage>
struct EngineFor {
  using type = TensorCoreEngine<Storage>;
};
template <>
struct EngineFor<float> {
  using type = PlainEngine<float>;
};
template <>
struct EngineFor<double> {
  using type = PlainEngine<double>;
};

}  // namespace ssmkernels::cuda::pairs
