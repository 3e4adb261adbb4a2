// SPDX-License-Identifier: BSD-3-Clause
// How a call is cut into blocks, what its sweep reads, and what has to be done before.
#pragma once

#include "../common/class_order.cuh"
#include "../common/vector_rows.cuh"
#include "tile.cuh"

namespace ssmkernels::cuda::memory {

// How B rows × K slots × D are cut into blocks: by the shape and the number of multiprocessors.
struct Partition {
  int64_t tile_rows;  // of a block
  int64_t row_tiles;
  int64_t splits;
  int64_t split_size;  // slots, a multiple of the tile's
  int64_t chunks;      // of the dimension
  int64_t owners;      // blocks that share a row tile and a split: one per chunk where there are means, else one

  int64_t blocks() const {
    return row_tiles * splits * owners;
  }
  int64_t padded_rows() const {
    return row_tiles * tile_rows;
  }
};

template <class Storage>
Partition partition_of(const Bank<Storage>& bank, int64_t rows, bool with_means, int row_groups = 1) {
  using Shape = TileShape<Storage>;
  Partition partition;
  partition.tile_rows = row_groups * kRows;
  partition.row_tiles = ceil_div(rows, partition.tile_rows);
  partition.chunks =
      max<int64_t>(ceil_div<int64_t>(bank.dim, Shape::kDim), 1);  // an empty one, of rows without elements
  partition.owners = with_means ? partition.chunks : 1;
  const int64_t tiles = ceil_div<int64_t>(bank.slots, Shape::kSlots);
  const int64_t resident = 2 * int64_t{device_attribute(cudaDevAttrMultiProcessorCount)};
  const int64_t wanted = max<int64_t>(resident / (partition.row_tiles * partition.owners), 1);
  const int64_t tiles_per_split = max<int64_t>(ceil_div(tiles, wanted), kSplitTiles);
  partition.split_size = tiles_per_split * Shape::kSlots;
  partition.splits = ceil_div(tiles, tiles_per_split);
  return partition;
}

template <class Storage>
struct SweepInput {
  Bank<Storage> bank;
  const Slot* order;  // null: in bank order
  const Storage* query[2];
  int64_t rows;
  Partition partition;
  unsigned buffers;  // tiles in shared memory: kBuffers, or half or a quarter where a block is allowed less
};

// Memory for those of the bank and the queries that have to be packed.
template <class Storage>
struct PackedInput {
  Storage* bank;
  Storage* query[2];
};

template <class Storage>
StridedRows<Storage> bank_rows(const Bank<Storage>& bank) {
  return {bank.features, bank.slots, bank.dim, bank.row_stride, bank.column_stride};
}
template <class Storage>
StridedRows<Storage> query_rows(const Bank<Storage>& bank, const Storage* query, int64_t rows) {
  return {query, rows, bank.dim, bank.dim, 1};
}

template <class Storage>
PackedInput<Storage> take_packed_input(const Bank<Storage>& bank, const Storage* query0, const Storage* query1,
                                       int64_t rows, Workspace& workspace) {
  PackedInput<Storage> packed;
  packed.bank = take_packed(bank_rows(bank), workspace);
  packed.query[0] = take_packed(query_rows(bank, query0, rows), workspace);
  packed.query[1] = query1 == query0 ? packed.query[0] : take_packed(query_rows(bank, query1, rows), workspace);
  return packed;
}

template <class Storage>
Labels labels_of(const Bank<Storage>& bank) {
  return {bank.labels, bank.slots, bank.classes};
}

// What the sweep reads, of rows that are packed by then.
template <class Storage>
SweepInput<Storage> sweep_input(const Bank<Storage>& bank, const Slot* order, const Storage* query0,
                                const Storage* query1, int64_t rows, const Partition& partition,
                                const PackedInput<Storage>& packed) {
  SweepInput<Storage> in{bank, order, {query0, query1}, rows, partition, 0};
  in.bank.dim = vector_pitch<Storage>(bank.dim);
  if (packed.bank) {
    in.bank.features = packed.bank;
    in.bank.row_stride = in.bank.dim;
    in.bank.column_stride = 1;
  }
  for (const int q : {0, 1})
    if (packed.query[q]) in.query[q] = packed.query[q];
  return in;
}

// Adds the packing to what is done before a sweep.
template <class Storage, class Preparation>
void prepare_rows(const Bank<Storage>& bank, const Storage* query0, const Storage* query1, int64_t rows,
                  const PackedInput<Storage>& packed, Preparation& preparation) {
  preparation.pack(0, bank_rows(bank), packed.bank);
  preparation.pack(1, query_rows(bank, query0, rows), packed.query[0]);
  if (query1 != query0) preparation.pack(2, query_rows(bank, query1, rows), packed.query[1]);
}

// Adds the class order to it where the bank is small, and finds it now where it is not.
template <class Storage, class Preparation>
const char* prepare_order(const Bank<Storage>& bank, const ClassOrder& order, Preparation& preparation,
                          cudaStream_t stream) {
  if (!has_few_slots(labels_of(bank))) return sort_by_class(labels_of(bank), order, stream);
  preparation.labels = labels_of(bank);
  preparation.order = order;
  preparation.order_blocks = rank_blocks(preparation.labels);
  return nullptr;
}

}  // namespace ssmkernels::cuda::memory
