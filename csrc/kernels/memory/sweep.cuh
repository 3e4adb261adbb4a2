// SPDX-License-Identifier: BSD-3-Clause
// How the CUDA kernels of this family sweep a bank, in the manner of FlashAttention-2.
//
// A block of four warps owns 64 query rows, 16 to a warp, and a split of the bank. Tiles of slots pass through a ring
// in shared memory (cp.async). From a tile a warp takes the scores of its rows, hands them to the operation, which
// turns scores into weights, and adds the weighted slots to the means in its registers: weak and strong rows share
// every fragment of the tile. A dimension wider than a chunk makes a block per chunk; each takes its scores over all
// chunks, its own last, and the means of its own.
#pragma once

#include "engines.cuh"
#include "sweep_input.cuh"

namespace ssmkernels::cuda::memory {

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
//   kRowGroups                   1: a query is kRows rows of a matrix of its own; else queries are groups of rows of
//   one fetch(labels)                starts what it must load for the tile weigh(scores, means, tile)   scores →
//   weights of the means, in place finish(means, place)
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

  const unsigned chunks = in.partition.chunks, owners = in.partition.owners, row_tiles = in.partition.row_tiles;
  const unsigned chunk = blockIdx.x % owners, split = blockIdx.x / owners / row_tiles;
  const unsigned first_row = blockIdx.x / owners % row_tiles * (Operation::kRowGroups * kRows), last_row = in.rows - 1;
  const unsigned tiles_each = in.partition.split_size / kSlots, first_tile = split * tiles_each,
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
        const unsigned row = first_row + (Operation::kRowGroups > 1 ? q * kRows : 0) + r;
        return in.query[q] + int64_t{min(row, last_row)} * in.bank.dim + int64_t{c} * Shape::kDim;
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
  const auto bytes = [&] { return sweep_shared_bytes<Engine, Operation::kQueries>(in.partition.chunks, in.buffers); };
  if (in.bank.classes >= 0x7fffffff) return "the number of classes must be below 2^31 - 1";
  if (in.bank.slots > 0xffffffff) return "the bank must have fewer than 2^32 slots";
  if (in.rows > 0x7fffffff) return "there must be fewer than 2^31 query rows";
  const int64_t limit = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  in.buffers = Engine::Shape::kBuffers;
  while (in.buffers > 1 && bytes() > limit) in.buffers /= 2;
  return launch(sweep<Engine, Operation>, in.partition.blocks(), kSweepThreads, bytes(), stream, in, arguments);
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

}  // namespace ssmkernels::cuda::memory
