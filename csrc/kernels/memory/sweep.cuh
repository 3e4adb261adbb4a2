// SPDX-License-Identifier: BSD-3-Clause
// How the CUDA kernels of this family sweep a bank, in the manner of FlashAttention-2.
//
// A block of four warps owns 64 query rows, 16 to a warp, and a split of the bank. Tiles of slots pass through a ring
// in shared memory (cp.async). From a tile a warp takes the scores of its rows, hands them to the operation, which
// turns scores into weights, and adds the weighted slots to the means in its registers: weak and strong rows share
// every fragment of the tile. A dimension wider than a chunk makes a block per chunk; each takes its scores over all
// chunks, its own last, and the means of its own.
//
// In both products a thread has the elements of the tensor cores' accumulator: of 16 rows × 8 columns, with g = lane/4,
// t = lane%4, element i of block n is row g + 8·(i/2) and column 8n + 2t + i%2. The engines differ only in how they
// multiply.
#pragma once

#include <limits>

#include "../common/class_order.cuh"
#include "../common/cuda.cuh"
#include "../common/mma.cuh"
#include "../common/vector_rows.cuh"
#include "bank.h"

namespace ssmkernels::cuda {

// Where maxima and references of sums start: finite, so that 2^(−inf − kLowest) is 0 and not NaN.
template <class Real>
inline constexpr Real kLowest = std::numeric_limits<Real>::lowest();

inline constexpr int kSweepWarps = 4;
inline constexpr int kSweepThreads = 32 * kSweepWarps;
inline constexpr int kWarpRows = 16;
inline constexpr int kRows = kSweepWarps * kWarpRows;  // of a block
inline constexpr int kDepth = 16;                      // chunks are filled up with zeros to a multiple of this
inline constexpr int kSplitTiles = 4;                  // at least, per split

// The tile in shared memory. Rows are padded by 16 bytes, so that eight of them start in different banks.
template <class Storage>
struct TileShape {
  static constexpr int kSlots = sizeof(Storage) == 8 ? 16 : 32;
  static constexpr int kBlocks = kSlots / 8;
  static constexpr int kDim = sizeof(Storage) == 8 ? 64 : 128;  // of a chunk
  static constexpr int kVector = 16 / sizeof(Storage);
  static constexpr int kVectors = kDim / kVector;
  static constexpr int kPitch = kDim + kVector;
  static constexpr int kBuffers =
      sizeof(Storage) == 2 ? 4 : 2;           // tiles in shared memory; two blocks fit a multiprocessor of sm_90
  static constexpr int kRing = 2 * kBuffers;  // tiles whose slots are noted: at least kBuffers + 1

  struct alignas(16) Vector {
    Storage values[kVector];
  };
};

// Half types on the tensor cores, 16 deep.
template <class StorageType>
struct HalfEngine {
  using Storage = StorageType;
  using Real = float;
  using Shape = TileShape<Storage>;
  static constexpr bool kRounds = false;

  // sum[q][n] += query_q · slot; `query` is the warp's first row of query 0.
  template <bool kFull, int kQueries>
  static __device__ void scores(Real (&sum)[kQueries][Shape::kBlocks][4], const Storage* query, const Storage* tile,
                                int depth) {
    const int lane = threadIdx.x % 32;
    const Storage* a_row = query + lane % 16 * Shape::kPitch + lane / 16 * 8;
    const Storage* b_row = tile + (lane / 16 * 8 + lane % 8) * Shape::kPitch + lane / 8 % 2 * 8;
#pragma unroll
    for (int k = 0; k < Shape::kDim; k += 16) {
      if (!kFull && k >= depth) break;
      uint32_t a[kQueries][4];
#pragma unroll
      for (int q = 0; q < kQueries; ++q) load_matrices(a[q], a_row + q * kRows * Shape::kPitch + k);
#pragma unroll
      for (int n = 0; n < Shape::kBlocks; n += 2) {
        uint32_t b[4];
        load_matrices(b, b_row + n * 8 * Shape::kPitch + k);
#pragma unroll
        for (int q = 0; q < kQueries; ++q) {
          multiply_add<Storage>(sum[q][n], a[q], b[0], b[1]);
          multiply_add<Storage>(sum[q][n + 1], a[q], b[2], b[3]);
        }
      }
    }
  }

  // sum[m][n] += Σ_slot weight_m · slot. The accumulators of two blocks of scores are the operand of one step.
  template <bool kFull, int kMeans, int kQueries>
  static __device__ void means(Real (&sum)[kMeans][Shape::kDim / 8][4],
                               const Real (&weights)[kQueries][Shape::kBlocks][4], const Storage* tile, int depth) {
    uint32_t a[kMeans][Shape::kBlocks / 2][4];
#pragma unroll
    for (int m = 0; m < kMeans; ++m)
#pragma unroll
      for (int k = 0; k < Shape::kBlocks / 2; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          a[m][k][i] = pack<Storage>(weights[m][2 * k + i / 2][i % 2 * 2], weights[m][2 * k + i / 2][i % 2 * 2 + 1]);
    const int lane = threadIdx.x % 32;
    const Storage* b_row = tile + lane % 16 * Shape::kPitch + lane / 16 * 8;
#pragma unroll
    for (int n = 0; n < Shape::kDim / 8; n += 2) {
      if (!kFull && n * 8 >= depth) break;
#pragma unroll
      for (int k = 0; k < Shape::kBlocks / 2; ++k) {
        uint32_t b[4];
        load_matrices_transposed(b, b_row + k * 16 * Shape::kPitch + n * 8);
#pragma unroll
        for (int m = 0; m < kMeans; ++m) {
          multiply_add<Storage>(sum[m][n], a[m][k], b[0], b[1]);
          multiply_add<Storage>(sum[m][n + 1], a[m][k], b[2], b[3]);
        }
      }
    }
  }
};

// float32 rounded to tf32 on the tensor cores, 8 deep. What lies in shared memory has been rounded.
struct Tf32Engine {
  using Storage = float;
  using Real = float;
  using Shape = TileShape<float>;
  static constexpr bool kRounds = true;

  static __device__ float rounded(float x) {
    return __uint_as_float(to_tf32(x));
  }

  // A row of an 8×8 matrix of 2-byte elements is four floats here.
  template <bool kFull, int kQueries>
  static __device__ void scores(Real (&sum)[kQueries][Shape::kBlocks][4], const float* query, const float* tile,
                                int depth) {
    const int lane = threadIdx.x % 32;
    const float* a_row = query + lane % 16 * Shape::kPitch + lane / 16 * 4;
    const float* b_row = tile + (lane / 16 * 8 + lane % 8) * Shape::kPitch + lane / 8 % 2 * 4;
#pragma unroll
    for (int k = 0; k < Shape::kDim; k += 8) {
      if (k >= depth) break;  // also where the chunk is full: more loads ahead would not fit the registers
      uint32_t a[kQueries][4];
#pragma unroll
      for (int q = 0; q < kQueries; ++q) load_matrices(a[q], a_row + q * kRows * Shape::kPitch + k);
#pragma unroll
      for (int n = 0; n < Shape::kBlocks; n += 2) {
        uint32_t b[4];
        load_matrices(b, b_row + n * 8 * Shape::kPitch + k);
#pragma unroll
        for (int q = 0; q < kQueries; ++q) {
          multiply_add<float>(sum[q][n], a[q], b[0], b[1]);
          multiply_add<float>(sum[q][n + 1], a[q], b[2], b[3]);
        }
      }
    }
  }

  // The order of the slots within a step is free as long as both operands keep it: step element t is slot 2t and t + 4
  // is slot 2t + 1, so the accumulators of a block of scores are the operand as they lie.
  template <bool kFull, int kMeans, int kQueries>
  static __device__ void means(Real (&sum)[kMeans][Shape::kDim / 8][4],
                               const Real (&weights)[kQueries][Shape::kBlocks][4], const float* tile, int depth) {
    uint32_t a[kMeans][Shape::kBlocks][4];
#pragma unroll
    for (int m = 0; m < kMeans; ++m)
#pragma unroll
      for (int k = 0; k < Shape::kBlocks; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i) a[m][k][i] = to_tf32(weights[m][k][i % 2 * 2 + i / 2]);
    const int lane = threadIdx.x % 32;
    const uint32_t* b_at = reinterpret_cast<const uint32_t*>(tile) + lane % 4 * 2 * Shape::kPitch + lane / 4;
#pragma unroll
    for (int n = 0; n < Shape::kDim / 8; ++n) {
      if (n * 8 >= depth) break;
#pragma unroll
      for (int k = 0; k < Shape::kBlocks; ++k) {
        const uint32_t b0 = b_at[k * 8 * Shape::kPitch + n * 8], b1 = b_at[(k * 8 + 1) * Shape::kPitch + n * 8];
#pragma unroll
        for (int m = 0; m < kMeans; ++m) multiply_add<float>(sum[m][n], a[m][k], b0, b1);
      }
    }
  }
};

// float32 and float64 without tensor cores.
template <class StorageType>
struct PlainEngine {
  using Storage = StorageType;
  using Real = StorageType;
  using Shape = TileShape<Storage>;

  using Vector = typename Shape::Vector;
  static constexpr bool kRounds = false;

  template <bool kFull, int kQueries>
  static __device__ void scores(Real (&sum)[kQueries][Shape::kBlocks][4], const Storage* query, const Storage* tile,
                                int depth) {
    const int lane = threadIdx.x % 32;
    const Storage* a_row = query + lane / 4 * Shape::kPitch;
    const Storage* b_row = tile + lane % 4 * 2 * Shape::kPitch;
#pragma unroll 1
    for (int k = 0; k < (kFull ? Shape::kDim : depth); k += Shape::kVector) {
      Vector a[kQueries][2];
#pragma unroll
      for (int q = 0; q < kQueries; ++q)
#pragma unroll
        for (int r = 0; r < 2; ++r) a[q][r] = vector_at(a_row + (q * kRows + r * 8) * Shape::kPitch + k);
#pragma unroll
      for (int n = 0; n < Shape::kBlocks; ++n)
#pragma unroll
        for (int column = 0; column < 2; ++column) {
          const Vector b = vector_at(b_row + (n * 8 + column) * Shape::kPitch + k);
#pragma unroll
          for (int q = 0; q < kQueries; ++q)
#pragma unroll
            for (int r = 0; r < 2; ++r)
#pragma unroll
              for (int v = 0; v < Shape::kVector; ++v) sum[q][n][r * 2 + column] += a[q][r].values[v] * b.values[v];
        }
    }
  }

  // The weight of slot 8n + 2t + c lies with lane t of the row's four.
  template <bool kFull, int kMeans, int kQueries>
  static __device__ void means(Real (&sum)[kMeans][Shape::kDim / 8][4],
                               const Real (&weights)[kQueries][Shape::kBlocks][4], const Storage* tile, int depth) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int block = 0; block < Shape::kBlocks; ++block)
#pragma unroll
      for (int column = 0; column < 2; ++column)
#pragma unroll 1
        for (int owner = 0; owner < 4; ++owner) {
          Real weight[kMeans][2];
#pragma unroll
          for (int m = 0; m < kMeans; ++m)
#pragma unroll
            for (int r = 0; r < 2; ++r)
              weight[m][r] = __shfl_sync(kAllLanes, weights[m][block][r * 2 + column], lane / 4 * 4 + owner);
          const Storage* b_row = tile + (block * 8 + owner * 2 + column) * Shape::kPitch + lane % 4 * 2;
#pragma unroll
          for (int n = 0; n < Shape::kDim / 8; ++n) {
            if (!kFull && n * 8 >= depth) break;
#pragma unroll
            for (int c = 0; c < 2; ++c) {
              const Storage b = b_row[n * 8 + c];
#pragma unroll
              for (int m = 0; m < kMeans; ++m)
#pragma unroll
                for (int r = 0; r < 2; ++r) sum[m][n][r * 2 + c] += weight[m][r] * b;
            }
          }
        }
  }

 private:
  static __device__ Vector vector_at(const Storage* from) {
    return *reinterpret_cast<const Vector*>(from);
  }
};

// How B rows × K slots × D are cut into blocks: by the shape and the number of multiprocessors.
struct Cut {
  int64_t row_tiles;
  int64_t splits;
  int64_t split_size;  // slots, a multiple of the tile's
  int64_t chunks;      // of the dimension
  int64_t owners;      // blocks that share a row tile and a split: one per chunk where there are means, else one

  int64_t blocks() const {
    return row_tiles * splits * owners;
  }
  int64_t padded_rows() const {
    return row_tiles * kRows;
  }
};

template <class Storage>
Cut cut_of(const Bank<Storage>& bank, int64_t rows, bool with_means) {
  using Shape = TileShape<Storage>;
  Cut cut;
  cut.row_tiles = ceil_div<int64_t>(rows, kRows);
  cut.chunks = max<int64_t>(ceil_div<int64_t>(bank.dim, Shape::kDim), 1);  // an empty one, of rows without elements
  cut.owners = with_means ? cut.chunks : 1;
  const int64_t tiles = ceil_div<int64_t>(bank.slots, Shape::kSlots);
  const int64_t resident = 2 * int64_t{device_attribute(cudaDevAttrMultiProcessorCount)};
  const int64_t wanted = max<int64_t>(resident / (cut.row_tiles * cut.owners), 1);
  const int64_t tiles_per_split = max<int64_t>(ceil_div(tiles, wanted), kSplitTiles);
  cut.split_size = tiles_per_split * Shape::kSlots;
  cut.splits = ceil_div(tiles, tiles_per_split);
  return cut;
}

template <class Storage>
struct SweepInput {
  Bank<Storage> bank;
  const Slot* order;  // null: in bank order
  const Storage* query[2];
  int64_t rows;
  Cut cut;
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
                                const Storage* query1, int64_t rows, const Cut& cut,
                                const PackedInput<Storage>& packed) {
  SweepInput<Storage> in{bank, order, {query0, query1}, rows, cut, 0};
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

// Where a thread stands.
struct Place {
  unsigned row;       // its first row; the other is eight further
  unsigned last_row;  // B − 1
  unsigned split;
  unsigned chunk;  // of the dimension
  int lane;

  // Whether this thread writes what its row r has one of: four lanes have the row, a block per chunk too.
  __device__ bool writes(int r) const {
    return lane % 4 == 0 && chunk == 0 && row + 8 * r <= last_row;
  }
};

// What an operation sees of the tile whose scores it is given.
struct TileView {
  const int* labels;  // [kSlots] in shared memory; the last one repeats past the end
  unsigned first;     // position of slot 0 in the order of the sweep
  int count;          // slots inside
};

// The vectors of staged rows that a thread copies: column d of rows r, r + kStep, …
template <class Shape>
struct Vectors {
  static constexpr int kStep = kSweepThreads / Shape::kVectors;
  int r = threadIdx.x / Shape::kVectors, d = threadIdx.x % Shape::kVectors * Shape::kVector;
};

// to[r][d] = from(r)[d], d in [0, width), whole vectors, and 0 up to `depth`.
template <class Engine, int kCount, class From>
__device__ void stage_rows(typename Engine::Storage* to, int width, int depth, From from) {
  using Shape = typename Engine::Shape;
  const Vectors<Shape> mine;
  if (mine.d >= depth) return;
  [[maybe_unused]] constexpr int kUnroll = kCount <= 32 ? kCount / Vectors<Shape>::kStep : 1;
#pragma unroll kUnroll
  for (int r = 0; r < kCount; r += Vectors<Shape>::kStep)
    copy_async(to + (mine.r + r) * Shape::kPitch + mine.d, from(mine.r + r) + mine.d, mine.d < width);
}

// Rounds what this thread itself copied, once that has landed.
template <class Engine, int kCount>
__device__ void round_rows(typename Engine::Storage* rows, int depth) {
  using Shape = typename Engine::Shape;
  const Vectors<Shape> mine;
  if (mine.d >= depth) return;
  [[maybe_unused]] constexpr int kUnroll = kCount <= 32 ? 4 : 1;
#pragma unroll kUnroll
  for (int r = 0; r < kCount; r += Vectors<Shape>::kStep) {
    auto* vector = reinterpret_cast<typename Shape::Vector*>(rows + (mine.r + r) * Shape::kPitch + mine.d);
    typename Shape::Vector x = *vector;
#pragma unroll
    for (int v = 0; v < Shape::kVector; ++v) x.values[v] = Engine::rounded(x.values[v]);
    *vector = x;
  }
}

// With more than one chunk the queries pass through the ring too.
template <class Engine, int kQueries>
constexpr int64_t sweep_shared_bytes(int64_t chunks, int64_t buffers) {
  using Shape = typename Engine::Shape;
  const int64_t tile_rows = buffers * Shape::kSlots + (chunks > 1 ? buffers : 1) * kQueries * kRows;
  return tile_rows * Shape::kPitch * sizeof(typename Engine::Storage) +
         Shape::kRing * Shape::kSlots * (sizeof(int64_t) + sizeof(int));
}

// An operation has kQueries, kMeans, Arguments, a constructor from (Arguments, Place), and
//   fetch(labels)                starts what it must load for the tile
//   weigh(scores, means, tile)   scores → weights of the means, in place
//   finish(means, place)
template <class Engine, class Operation>
__global__ void __launch_bounds__(kSweepThreads, 2)
    sweep(const __grid_constant__ SweepInput<typename Engine::Storage> in,
          const __grid_constant__ typename Operation::Arguments arguments) {
  using Storage = typename Engine::Storage;
  using Real = typename Engine::Real;
  using Shape = typename Engine::Shape;
  constexpr int kQueries = Operation::kQueries, kMeans = Operation::kMeans;
  constexpr int kBuffers = Shape::kBuffers, kSlots = Shape::kSlots, kRing = Shape::kRing;
  constexpr int kQuerySize = kQueries * kRows * Shape::kPitch, kTileSize = kSlots * Shape::kPitch;

  const unsigned chunks = in.cut.chunks, owners = in.cut.owners, row_tiles = in.cut.row_tiles;
  const unsigned chunk = blockIdx.x % owners, split = blockIdx.x / owners / row_tiles;
  const unsigned first_row = blockIdx.x / owners % row_tiles * kRows, last_row = in.rows - 1;
  const unsigned tiles_each = in.cut.split_size / kSlots, first_tile = split * tiles_each,
                 last_slot = in.bank.slots - 1;
  const unsigned buffers = in.buffers, ahead = buffers - 1;

  int64_t* offsets = reinterpret_cast<int64_t*>(dynamic_shared());  // [kRing][kSlots]
  int* labels = reinterpret_cast<int*>(offsets + kRing * kSlots);   // [kRing][kSlots]
  Storage* tiles = reinterpret_cast<Storage*>(labels + kRing * kSlots);
  Storage* queries = tiles + buffers * kTileSize;
  const int query_step = chunks > 1 ? kQuerySize : 0;  // one chunk: the queries stay

  // Stage s is a tile and a chunk; a block's own chunk comes last. Positions are of 32 bits: registers are what the
  // loop is short of.
  const unsigned stages = (min(first_tile + tiles_each, last_slot / kSlots + 1) - first_tile) * chunks;
  const auto slot_of = [&](unsigned s) { return (first_tile + (chunks == 1 ? s : s / chunks)) * kSlots; };
  const auto turn_of = [&](unsigned s) { return chunks == 1 ? 0 : s % chunks; };
  const auto chunk_of = [&](unsigned s) {
    const unsigned c = chunk + 1 + turn_of(s);
    return c < chunks ? c : c - chunks;
  };
  const auto width_of = [&](unsigned c) {
    return static_cast<int>(min<int64_t>(in.bank.dim - int64_t{c} * Shape::kDim, Shape::kDim));
  };
  const auto depth_of = [&](unsigned c) { return ceil_div(width_of(c), kDepth) * kDepth; };

  // The first kSlots threads look up a tile's slots one stage before they note them for all. Past the end the last slot
  // repeats, as the last row does past the last query: finite numbers that weigh nothing.
  unsigned found_index = 0;
  int found_label = 0;
  const auto look_up = [&](unsigned s) {
    if (threadIdx.x >= kSlots || s >= stages) return;
    const unsigned at = min(slot_of(s) + threadIdx.x, last_slot);
    const Slot found = in.order ? in.order[at] : Slot{int64_t{at}, class_row(in.bank.labels[at], in.bank.classes)};
    found_index = static_cast<unsigned>(found.index);
    found_label = static_cast<int>(found.label);
  };
  const auto note = [&](unsigned s) {
    if (threadIdx.x >= kSlots) return;
    offsets[s % kRing * kSlots + threadIdx.x] = int64_t{found_index} * in.bank.row_stride;
    labels[s % kRing * kSlots + threadIdx.x] = found_label;
  };
  const auto issue_queries = [&](unsigned c, Storage* to) {
#pragma unroll
    for (int q = 0; q < kQueries; ++q)
      stage_rows<Engine, kRows>(to + q * kRows * Shape::kPitch, width_of(c), depth_of(c), [&](int r) {
        return in.query[q] + int64_t{min(first_row + r, last_row)} * in.bank.dim + int64_t{c} * Shape::kDim;
      });
  };
  const auto issue = [&](unsigned s) {
    if (s < stages) {
      const unsigned c = chunk_of(s);
      const Storage* column = in.bank.features + int64_t{c} * Shape::kDim;
      const int64_t* rows = offsets + s % kRing * kSlots;
      stage_rows<Engine, kSlots>(tiles + (s & ahead) * kTileSize, width_of(c), depth_of(c),
                                 [&](int r) { return column + rows[r]; });
      if (chunks > 1) issue_queries(c, queries + (s & ahead) * kQuerySize);
    }
    copy_async_commit();
  };

#pragma unroll 1
  for (unsigned s = 0; s < ahead; ++s) {
    look_up(s);
    note(s);
  }
  look_up(ahead);
  __syncthreads();
  if (chunks == 1) issue_queries(0, queries);
#pragma unroll 1
  for (unsigned s = 0; s < ahead; ++s) issue(s);

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const bool working = first_row + warp * kWarpRows <= last_row;
  const Place place{first_row + warp * kWarpRows + lane / 4, last_row, split, chunk, lane};
  Operation operation(arguments, place);
  Real means[kMeans > 0 ? kMeans : 1][Shape::kDim / 8][4] = {};

#pragma unroll 1
  for (unsigned s = 0; s < stages;) {
    // Nothing of a tile is kept to the next, so that its registers are free where the means are taken.
    Real scores[kQueries][Shape::kBlocks][4] = {};
    bool last;  // of the tile's stages
#pragma unroll 1
    do {
      note(s + ahead);
      look_up(s + buffers);
      if (ahead == 0) {
        __syncthreads();
        issue(s);
      }
      if (buffers == kBuffers)
        copy_async_wait<kBuffers - 2>();
      else
        copy_async_wait<0>();
      const int depth = depth_of(chunk_of(s));
      Storage* tile = tiles + (s & ahead) * kTileSize;
      Storage* query = queries + (s & ahead) * query_step;
      if constexpr (Engine::kRounds) {
        round_rows<Engine, kSlots>(tile, depth);
        if (chunks > 1 || s == 0) round_rows<Engine, kQueries * kRows>(query, depth);
      }
      __syncthreads();  // the stage has landed and no warp is at the one before any more
      if (ahead > 0) issue(s + ahead);
      last = turn_of(s) == chunks - 1;
      if (working) {
        if (last) operation.fetch(labels + s % kRing * kSlots);
        // A whole chunk has no branches between its products, so that loads run ahead of them.
        const Storage* rows = query + warp * kWarpRows * Shape::kPitch;
        if (depth == Shape::kDim)
          Engine::template scores<true>(scores, rows, tile, depth);
        else
          Engine::template scores<false>(scores, rows, tile, depth);
      }
      ++s;
    } while (!last);
    if (!working) continue;

    const unsigned first = slot_of(s - 1);
    operation.weigh(
        scores, means,
        {labels + (s - 1) % kRing * kSlots, first, static_cast<int>(min(last_slot - first + 1, unsigned{kSlots}))});
    if constexpr (kMeans > 0) {
      const int depth = depth_of(chunk);
      const Storage* tile = tiles + ((s - 1) & ahead) * kTileSize;
      if (depth == Shape::kDim)
        Engine::template means<true>(means, scores, tile, depth);
      else
        Engine::template means<false>(means, scores, tile, depth);
    }
  }
  copy_async_wait<0>();
  if (working) operation.finish(means, place);
}

template <class Engine, class Operation>
const char* launch_sweep(SweepInput<typename Engine::Storage> in, const typename Operation::Arguments& arguments,
                         cudaStream_t stream) {
  const auto bytes = [&] { return sweep_shared_bytes<Engine, Operation::kQueries>(in.cut.chunks, in.buffers); };
  if (in.bank.classes >= 0x7fffffff) return "the number of classes must be below 2^31 - 1";
  if (in.bank.slots > 0xffffffff) return "the bank must have fewer than 2^32 slots";
  if (in.rows > 0x7fffffff) return "there must be fewer than 2^31 query rows";
  const int64_t limit = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  in.buffers = Engine::Shape::kBuffers;
  while (in.buffers > 1 && bytes() > limit) in.buffers /= 2;
  return launch(sweep<Engine, Operation>, in.cut.blocks(), kSweepThreads, bytes(), stream, in, arguments);
}

// Calls f with the engine for a storage type; tf32 is a choice for float32 only.
template <class Storage, class F>
const char* with_engine(bool allow_tf32, F f) {
  if constexpr (sizeof(Storage) == 2)
    return f(HalfEngine<Storage>{});
  else if constexpr (sizeof(Storage) == 4)
    return allow_tf32 ? f(Tf32Engine{}) : f(PlainEngine<float>{});
  else
    return f(PlainEngine<Storage>{});
}

// Running sums of 2^x for the two rows of a thread, relative to 2^reference. A reference is an integer, so that moving
// it rounds nothing, and moves only when a value passes it by more than kSlack: seldom after the first tiles.
template <class Real>
struct Track {
  static constexpr Real kSlack = 8;
  Real reference[2] = {kLowest<Real>, kLowest<Real>};
  Real sum[2] = {0, 0};

  __device__ bool passed(const Real (&top)[2]) const {
    return top[0] > reference[0] + kSlack || top[1] > reference[1] + kSlack;
  }
  // Called by whole warps, with each thread's largest values. factor[r] is what sums of row r shrink by.
  __device__ void raise(const Real (&top)[2], Real (&factor)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      Real row_top = max(top[r], __shfl_xor_sync(kAllLanes, top[r], 1));
      row_top = max(row_top, __shfl_xor_sync(kAllLanes, row_top, 2));
      const Real moved = row_top > reference[r] + kSlack ? ceil(row_top) : reference[r];
      factor[r] = exp2_of(reference[r] - moved);
      reference[r] = moved;
      sum[r] *= factor[r];
    }
  }
};

// The four lanes of a row.
template <class Real>
__device__ Real row_sum(Real x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}

template <class Real>
__device__ Real row_max(Real x) {
  x = max(x, __shfl_xor_sync(kAllLanes, x, 1));
  return max(x, __shfl_xor_sync(kAllLanes, x, 2));
}

template <class Real, int kBlocks>
__device__ void scale_rows(Real (&values)[kBlocks][4], const Real (&factor)[2]) {
#pragma unroll
  for (int n = 0; n < kBlocks; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) values[n][i] *= factor[i / 2];
}

__device__ inline int column_of(int lane, int block, int i) {
  return block * 8 + lane % 4 * 2 + i % 2;
}

// Slots past the end of a tile, which only the last tile of a split has, weigh nothing.
template <class Real, int kBlocks>
__device__ void mask_scores(Real (&scores)[kBlocks][4], int lane, int count) {
  if (count == kBlocks * 8) return;
#pragma unroll
  for (int n = 0; n < kBlocks; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (column_of(lane, n, i) >= count) scores[n][i] = kLowest<Real>;
}

// The largest of each row.
template <class Real, int kBlocks>
__device__ void largest(const Real (&scores)[kBlocks][4], Real (&top)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) top[r] = max(scores[0][r * 2], scores[0][r * 2 + 1]);
#pragma unroll
  for (int n = 1; n < kBlocks; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) top[i / 2] = max(top[i / 2], scores[n][i]);
}

// What the rows of a thread have in the class table (class_table.cuh), for the slots of a tile.
template <class Real, bool kClassOrder>
class TableRows {
 public:
  __device__ TableRows(const Real* table, const int64_t& classes, const Place& place)
      : first_(table + place.row / 8 * (classes + 1) * 8 + place.lane / 4), classes_(classes) {}
  // Before the products: all values, or in class order the first of each row, which most tiles have for all their
  // slots.
  template <int kBlocks>
  __device__ void fetch(Real (&to)[kBlocks][4], const int* labels, int lane) const {
#pragma unroll
    for (int n = 0; n < kBlocks; ++n)
#pragma unroll
      for (int c = 0; c < 2; ++c)
        if (!kClassOrder || (kFetchesFirst && n + c == 0)) load(to, labels, lane, n, c);
  }
  // After them: the others.
  template <int kBlocks>
  __device__ void complete(Real (&to)[kBlocks][4], const int* labels, int lane) const {
    static_assert(kClassOrder);
    const bool one_class = labels[0] == labels[kBlocks * 8 - 1];
    if (!kFetchesFirst) load(to, labels, lane, 0, 0);
#pragma unroll
    for (int n = 0; n < kBlocks; ++n)
#pragma unroll
      for (int c = n == 0; c < 2; ++c)
        if (one_class) {
          to[n][c] = to[0][0];
          to[n][2 + c] = to[0][2];
        } else {
          load(to, labels, lane, n, c);
        }
  }

 private:
  static constexpr bool kFetchesFirst = sizeof(Real) == 4;  // float64 has no registers that the products leave

  template <int kBlocks>
  __device__ void load(Real (&to)[kBlocks][4], const int* labels, int lane, int n, int c) const {
    const Real* at = first_ + int64_t{labels[column_of(lane, n, c)]} * 8;
    to[n][c] = at[0];
    to[n][2 + c] = at[(classes_ + 1) * 8];
  }

  const Real* first_;
  const int64_t& classes_;  // a kernel parameter: a reference costs no register
};

// Sums of the classes in a sweep by class order. A class that a split closes is written once, relative to the reference
// of that moment. The pairs (class, split) that occur have different class + split, which is their place.
template <class Real>
struct ClassSum {
  Real value;  // Σ 2^(x − reference)
  Real reference;
};

inline int64_t class_sums_pitch(int64_t classes, const Cut& cut) {
  return classes + 1 + cut.splits;
}

// kKeepsPlace: where a thread writes is worked out once; else where a class closes, which takes four registers less and
// keeps a kernel that has two means from spilling.
template <class Real, bool kKeepsPlace>
class ClassRuns {
 public:
  __device__ ClassRuns(ClassSum<Real>* const& sums, const int64_t& pitch, const Place& place)
      : sums_(sums),
        pitch_(pitch),
        place_(place),
        first_(sums + place.row * pitch + place.split),
        writes_{place.writes(0), place.writes(1)} {}

  // `track` has no sum of its own: it takes the runs as they close.
  template <int kBlocks>
  __device__ void add(const Real (&values)[kBlocks][4], const int* labels, Track<Real>& track) {
    constexpr int kSlots = kBlocks * 8;
    if (labels[0] != label_) open(labels[0], track);
    if (labels[kSlots - 1] == label_) {
#pragma unroll
      for (int n = 0; n < kBlocks; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) run_[i / 2] += values[n][i];
      return;
    }
    for (int begin = 0, end = 0; begin < kSlots; begin = end) {
      if (labels[begin] != label_) open(labels[begin], track);
      while (end < kSlots && labels[end] == label_) ++end;
#pragma unroll
      for (int n = 0; n < kBlocks; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int column = column_of(threadIdx.x % 32, n, i);
          if (column >= begin && column < end) run_[i / 2] += values[n][i];
        }
    }
  }

  __device__ void scale(const Real (&factor)[2]) {
    run_[0] *= factor[0];
    run_[1] *= factor[1];
  }

  __device__ void close(Track<Real>& track) {
    if (label_ < 0) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const Real sum = row_sum(run_[r]);
      track.sum[r] += sum;
      run_[r] = 0;
      if constexpr (kKeepsPlace) {
        if (writes_[r]) first_[8 * r * pitch_ + label_] = {sum, track.reference[r]};
      } else {
        if (place_.writes(r)) sums_[(place_.row + 8 * r) * pitch_ + place_.split + label_] = {sum, track.reference[r]};
      }
    }
  }

 private:
  __device__ void open(int label, Track<Real>& track) {
    close(track);
    label_ = label;
  }

  ClassSum<Real>* const& sums_;  // a kernel parameter, as is the pitch: a reference costs no register
  const int64_t& pitch_;
  const Place& place_;
  ClassSum<Real>* const first_;  // of class 0, this split and the first row
  const bool writes_[2];
  int label_ = -1;
  Real run_[2] = {0, 0};
};

// What a split leaves: per row its tracks, and means that are sums relative to a track's reference, rows padded to
// whole tiles, columns to kDepth.
template <class Real>
struct Means {
  Real* values;  // [splits][means][padded rows][pitch]
  int64_t pitch;
  int64_t padded_rows;
  int count;

  __device__ Real* row(int64_t split, int mean, int64_t row) const {
    return values + ((split * count + mean) * padded_rows + row) * pitch;
  }

  // Writes a block's chunk.
  template <int kCount, int kBlocks>
  __device__ void put(const Real (&sums)[kCount][kBlocks][4], const Place& place) const {
    struct alignas(2 * sizeof(Real)) Pair {
      Real a, b;
    };
    const int64_t first = int64_t{place.chunk} * kBlocks * 8;
#pragma unroll
    for (int m = 0; m < kCount; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        Real* to = row(place.split, m, place.row + 8 * r) + first;
#pragma unroll
        for (int n = 0; n < kBlocks; ++n)
          if (first + n * 8 < pitch)
            *reinterpret_cast<Pair*>(to + column_of(place.lane, n, 0)) = {sums[m][n][r * 2], sums[m][n][r * 2 + 1]};
      }
  }
};

template <class Real>
Means<Real> take_means(const Cut& cut, int count, int64_t dim, Workspace& workspace) {
  Means<Real> means{nullptr, ceil_div<int64_t>(dim, kDepth) * kDepth, cut.padded_rows(), count};
  means.values = workspace.take<Real>(cut.splits * count * means.padded_rows * means.pitch);
  return means;
}

}  // namespace ssmkernels::cuda
