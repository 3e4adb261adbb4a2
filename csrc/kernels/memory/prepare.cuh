// SPDX-License-Identifier: BSD-3-Clause
// What a sweep needs and nothing else of the call gives, in one launch of independent blocks: the order of a small
// bank, a class table, rows packed for copies of 16 bytes. A call is then three launches: this, the sweep, the merge.
#pragma once

#include "../common/class_order.cuh"
#include "../common/vector_rows.cuh"
#include "bank.h"

namespace ssmkernels::cuda::memory {

inline constexpr int kPrepareThreads = 256;
static_assert(kPrepareThreads == kPackThreads);

// In place of a class table.
struct NoTable {
  __device__ void make(int64_t) const {}
};

// Table has make(block), for blocks of kPrepareThreads.
template <class Storage, class Table>
struct Preparation {
  Table table;
  int64_t table_blocks = 0;
  Labels labels{};
  ClassOrder order{};
  int64_t order_blocks = 0;
  StridedRows<Storage> rows[3]{};
  Storage* packed[3]{};
  int64_t pack_blocks[3]{};

  void pack(int which, const StridedRows<Storage>& from, Storage* to) {
    if (!to) return;
    rows[which] = from;
    packed[which] = to;
    pack_blocks[which] = blocks_of_packing(from);
  }
};

template <class Storage, class Table>
__global__ void __launch_bounds__(kPrepareThreads) prepare(const __grid_constant__ Preparation<Storage, Table> in) {
  int64_t block = blockIdx.x;
  if (block < in.table_blocks) return in.table.make(block);
  block -= in.table_blocks;
  if (block < in.order_blocks) return rank_slots(in.labels, in.order, block);
  block -= in.order_blocks;
  for (int which = 0; which < 3; ++which) {
    if (block < in.pack_blocks[which]) return pack_block(in.rows[which], in.packed[which], block);
    block -= in.pack_blocks[which];
  }
}

template <class Storage, class Table>
const char* launch_prepare(const Preparation<Storage, Table>& in, cudaStream_t stream) {
  const int64_t blocks = in.table_blocks + in.order_blocks + in.pack_blocks[0] + in.pack_blocks[1] + in.pack_blocks[2];
  return launch(prepare<Storage, Table>, blocks, kPrepareThreads, 0, stream, in);
}

}  // namespace ssmkernels::cuda::memory
