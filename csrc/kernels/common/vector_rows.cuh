// SPDX-License-Identifier: BSD-3-Clause
// Rows that are read 16 bytes at a time. What lies otherwise is packed first, once per call: rows one behind the other,
// filled up with zeros to whole vectors.
#pragma once

#include "cuda.cuh"

namespace ssmkernels::cuda {

// Elements from one packed row to the next.
template <class Storage>
constexpr __host__ __device__ int64_t vector_pitch(int64_t dim) {
  constexpr int64_t kVector = 16 / sizeof(Storage);
  return ceil_div(dim, kVector) * kVector;
}

// A matrix [count, dim], element (r, d) at values[r * row_stride + d * column_stride].
template <class Storage>
struct StridedRows {
  const Storage* values;
  int64_t count, dim, row_stride, column_stride;

  bool in_vectors() const {
    const auto whole = [](int64_t elements) { return vector_pitch<Storage>(elements) == elements; };
    return column_stride == 1 && whole(dim) && whole(row_stride) && reinterpret_cast<uintptr_t>(values) % 16 == 0;
  }
};

// Memory to pack into; null for rows that can be read as they lie.
template <class Storage>
Storage* take_packed(const StridedRows<Storage>& rows, Workspace& workspace) {
  return rows.in_vectors() ? nullptr : workspace.take<Storage>(rows.count * vector_pitch<Storage>(rows.dim));
}

inline constexpr int kPackThreads = 256;

template <class Storage>
int64_t blocks_of_packing(const StridedRows<Storage>& from) {
  return ceil_div<int64_t>(from.count * vector_pitch<Storage>(from.dim), kPackThreads);
}

// Neighbouring threads read neighbouring elements: along the row, or across rows in a transposed matrix.
template <class Storage>
__device__ void pack_block(const StridedRows<Storage>& from, Storage* to, int64_t block) {
  const int64_t at = block * kPackThreads + threadIdx.x, pitch = vector_pitch<Storage>(from.dim);
  if (at >= from.count * pitch) return;
  const bool along = from.column_stride == 1;
  const int64_t r = along ? at / pitch : at % from.count, d = along ? at % pitch : at / from.count;
  to[r * pitch + d] = d < from.dim ? from.values[r * from.row_stride + d * from.column_stride] : Storage{};
}

template <class Storage>
__global__ void __launch_bounds__(kPackThreads) pack_vectors(StridedRows<Storage> from, Storage* to) {
  pack_block(from, to, blockIdx.x);
}

// `values` then are the rows with vector_pitch(dim) from one to the next, packed where there is memory to pack into.
template <class Storage>
const char* pack_where_needed(const StridedRows<Storage>& from, Storage* packed, const Storage*& values,
                              cudaStream_t stream) {
  values = packed ? packed : from.values;
  if (!packed) return nullptr;
  return launch(pack_vectors<Storage>, blocks_of_packing(from), kPackThreads, 0, stream, from, packed);
}

}  // namespace ssmkernels::cuda
