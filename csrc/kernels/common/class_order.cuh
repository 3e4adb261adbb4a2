// SPDX-License-Identifier: BSD-3-Clause
// Labelled slots in the order of their classes, their own order within a class. A sweep in this order closes each class
// once per split, so class sums need neither atomics nor a second visit.
//
// Few slots are ranked by comparing each with all others, without a barrier, in blocks of any launch. Many take a
// stable counting sort, by digits where there are many classes, in one cooperative launch. Memory that is kept between
// calls holds the order of the last call; where the labels are still those, as the launch itself finds out, the order
// stays. It never depends on what the host believes about the labels: they may have been written by anyone, a replayed
// graph included.
#pragma once

#include "cuda.cuh"

namespace ssmkernels::cuda {

// A slot as a sweep meets it.
struct Slot {
  int64_t index;
  int64_t label;  // in [0, L]; L stands for no class
};

__device__ inline int64_t class_row(int64_t label, int64_t classes) {
  return label >= 0 && label < classes ? label : classes;
}

struct Labels {
  const int64_t* values;  // [K]
  int64_t slots;          // K
  int64_t classes;        // L
};

struct OrderState {
  unsigned long long arrivals;  // at barriers
  unsigned long long sorts;     // 0: there is no order yet
  unsigned long long changed;   // a label is another than in the order
};

struct ClassOrder {
  Slot* slots;             // [K]
  int64_t* starts;         // [L + 2]  class c lies at [starts[c], starts[c + 1])
  unsigned char* present;  // [L + 1]  1 where a slot has the class
  // of many slots
  OrderState* state;
  bool kept;         // what the memory holds is the order of an earlier call, or 0
  Slot* other;       // [K], with more than one digit
  uint32_t* counts;  // [chunks][bins]
  uint32_t* totals;  // [bins]
};

inline constexpr int64_t kFewSlots = 4096, kFewClasses = 1 << 16;

inline bool has_few_slots(const Labels& labels) {
  return labels.slots <= kFewSlots && labels.classes <= kFewClasses;
}

// Few slots.

inline constexpr int kRankItems = 32;  // of a block

inline int64_t rank_blocks(const Labels& labels) {
  return ceil_div<int64_t>(labels.slots + labels.classes + 2, kRankItems);
}

// The places of slots, and where classes start: how many slots come before.
__device__ inline void rank_slots(const Labels& labels, const ClassOrder& order, int64_t block) {
  SSM_SHARED(keys, int[kFewSlots]);
  const int slots = static_cast<int>(labels.slots), classes = static_cast<int>(labels.classes);
  for (int i = threadIdx.x; i < slots; i += blockDim.x)
    keys[i] = static_cast<int>(class_row(labels.values[i], labels.classes));
  __syncthreads();
  const int lane = threadIdx.x % 32, first = static_cast<int>(block) * kRankItems;
  for (int item = first + threadIdx.x / 32; item < first + kRankItems; item += blockDim.x / 32) {
    if (item >= slots + classes + 2) break;
    const bool is_slot = item < slots;
    const int key = is_slot ? keys[item] : item - slots, earlier = is_slot ? item : 0;
    int before = 0, equal = 0;
    for (int i = lane; i < slots; i += 32) {
      before += keys[i] < key || (keys[i] == key && i < earlier);
      equal += keys[i] == key;
    }
    before = warp_sum(before);
    equal = warp_sum(equal);
    if (lane > 0) continue;
    if (is_slot) {
      order.slots[before] = {item, key};
    } else {
      order.starts[key] = before;
      if (key <= classes) order.present[key] = equal > 0;
    }
  }
}

// Many slots.

inline constexpr int kDigitBits = 11;
inline constexpr int kBins = 1 << kDigitBits;
inline constexpr int kChunk = 512;  // slots, one thread each
inline constexpr int kScanBins = 16, kScanParts = kChunk / kScanBins;

struct OrderPass {
  const int64_t* labels;  // first digit; null later
  const Slot* from;
  Slot* to;
  uint32_t* counts;
  uint32_t* totals;
  int64_t slots;
  int64_t classes;
  int64_t chunks;
  int shift;
  int bins;

  __device__ Slot slot(int64_t at) const {
    return labels ? Slot{at, class_row(labels[at], classes)} : from[at];
  }
  __device__ int digit(int64_t label) const {
    return static_cast<int>(label >> shift) & (kBins - 1);
  }
};

// counts[chunk][bin]
__device__ inline void count_digits(const OrderPass& pass, int64_t chunk) {
  SSM_SHARED(count, uint32_t[kBins]);
  for (int bin = threadIdx.x; bin < pass.bins; bin += kChunk) count[bin] = 0;
  __syncthreads();
  const int64_t at = chunk * kChunk + threadIdx.x;
  if (at < pass.slots)
    atomicAdd(&count[pass.digit(pass.slot(at).label)], 1u);  // integers: any order gives the same count
  __syncthreads();
  for (int bin = threadIdx.x; bin < pass.bins; bin += kChunk) pass.counts[chunk * pass.bins + bin] = count[bin];
  __syncthreads();
}

// counts[chunk][bin] becomes the sum over the chunks before it, totals[bin] the sum over all.
__device__ inline void scan_chunks(const OrderPass& pass, int group) {
  SSM_SHARED(sums, uint32_t[kScanParts][kScanBins]);
  const int part = threadIdx.x / kScanBins, lane = threadIdx.x % kScanBins;
  const int bin = group * kScanBins + lane;
  const int64_t size = ceil_div<int64_t>(pass.chunks, kScanParts);
  const int64_t begin = min(part * size, pass.chunks), end = min(begin + size, pass.chunks);
  uint32_t sum = 0;
  if (bin < pass.bins)
    for (int64_t chunk = begin; chunk < end; ++chunk) sum += pass.counts[chunk * pass.bins + bin];
  sums[part][lane] = sum;
  __syncthreads();
  uint32_t before = 0;
  for (int other = 0; other < part; ++other) before += sums[other][lane];
  __syncthreads();
  if (bin >= pass.bins) return;
  if (part == kScanParts - 1) pass.totals[bin] = before + sum;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    uint32_t* at = pass.counts + chunk * pass.bins + bin;
    const uint32_t count = *at;
    *at = before;
    before += count;
  }
}

// Each slot goes behind those of smaller digits, those of its digit in earlier chunks, and those of its digit before it
// in this chunk.
__device__ inline void place_slots(const OrderPass& pass, int64_t chunk) {
  constexpr int kBinsEach = kBins / kChunk;
  SSM_SHARED(bases, uint32_t[kBins]);
  SSM_SHARED(warp_sums, uint32_t[kChunk / 32]);
  SSM_SHARED(digits, int[kChunk]);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t at = chunk * kChunk + threadIdx.x;
  const Slot slot = at < pass.slots ? pass.slot(at) : Slot{};
  const int digit = pass.digit(slot.label);
  digits[threadIdx.x] = digit;

  uint32_t mine[kBinsEach], sum = 0;
#pragma unroll
  for (int i = 0; i < kBinsEach; ++i) {
    const int bin = threadIdx.x * kBinsEach + i;
    mine[i] = bin < pass.bins ? pass.totals[bin] : 0;
    sum += mine[i];
  }
  uint32_t upto = sum;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const uint32_t left = __shfl_up_sync(kAllLanes, upto, step);
    if (lane >= step) upto += left;
  }
  if (lane == 31) warp_sums[warp] = upto;
  __syncthreads();
  uint32_t base = upto - sum;
  for (int other = 0; other < warp; ++other) base += warp_sums[other];
#pragma unroll
  for (int i = 0; i < kBinsEach; ++i) {
    bases[threadIdx.x * kBinsEach + i] = base;
    base += mine[i];
  }
  int rank = 0;
  for (int other = 0; other < static_cast<int>(threadIdx.x); ++other) rank += digits[other] == digit;
  __syncthreads();
  if (at < pass.slots) pass.to[int64_t{bases[digit]} + pass.counts[chunk * pass.bins + digit] + rank] = slot;
  __syncthreads();
}

// A thread a class: a binary search. The work is the same wherever the labels end.
__device__ inline void find_start(const ClassOrder& order, const Labels& labels, int64_t c) {
  int64_t start = 0, end = labels.slots;  // labels before `start` are smaller, from `end` on they are not
  while (start < end) {
    const int64_t middle = start + (end - start) / 2;
    if (order.slots[middle].label < c)
      start = middle + 1;
    else
      end = middle;
  }
  order.starts[c] = start;
  if (c <= labels.classes) order.present[c] = start < labels.slots && order.slots[start].label == c;
}

inline int order_digits(int64_t classes) {
  int digits = 1;
  while (classes >> (digits * kDigitBits)) ++digits;
  return digits;
}

// Cooperative.
static __global__ void __launch_bounds__(kChunk) sort_slots(Labels labels, ClassOrder order, int digits) {
  OrderState* state = order.state;
  const int64_t first = int64_t{blockIdx.x} * kChunk + threadIdx.x, step = int64_t{gridDim.x} * kChunk;
  if (order.kept && *static_cast<volatile unsigned long long*>(&state->sorts) > 0) {
    bool changed = false;
    for (int64_t at = first; at < labels.slots; at += step) {
      const Slot slot = order.slots[at];
      changed |= class_row(labels.values[slot.index], labels.classes) != slot.label;
    }
    if (changed) *static_cast<volatile unsigned long long*>(&state->changed) = 1;
    barrier(&state->arrivals, gridDim.x);
    if (*static_cast<volatile unsigned long long*>(&state->changed) == 0) return;
  }
  OrderPass pass{};
  pass.labels = labels.values;
  pass.counts = order.counts;
  pass.totals = order.totals;
  pass.slots = labels.slots;
  pass.classes = labels.classes;
  pass.chunks = ceil_div<int64_t>(labels.slots, kChunk);
  for (int digit = 0; digit < digits; ++digit) {
    pass.to = (digits - digit) % 2 == 1 ? order.slots : order.other;
    pass.shift = digit * kDigitBits;
    const int64_t highest = labels.classes >> pass.shift;
    pass.bins = highest < kBins ? static_cast<int>(highest) + 1 : kBins;
    for (int64_t chunk = blockIdx.x; chunk < pass.chunks; chunk += gridDim.x) count_digits(pass, chunk);
    barrier(&state->arrivals, gridDim.x);
    for (int group = blockIdx.x; group < ceil_div(pass.bins, kScanBins); group += gridDim.x) scan_chunks(pass, group);
    barrier(&state->arrivals, gridDim.x);
    for (int64_t chunk = blockIdx.x; chunk < pass.chunks; chunk += gridDim.x) place_slots(pass, chunk);
    barrier(&state->arrivals, gridDim.x);
    pass.labels = nullptr;
    pass.from = pass.to;
  }
  for (int64_t c = first; c < labels.classes + 2; c += step) find_start(order, labels, c);
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    state->changed = 0;
    ++state->sorts;
  }
}

// In memory that is kept between calls of the same K and L, 0 at first; or null, and of the workspace.
inline ClassOrder take_class_order(const Labels& labels, void* kept, Workspace& workspace) {
  Workspace own(kept);
  Workspace& from = kept ? own : workspace;
  const bool few = has_few_slots(labels);
  const int64_t bins = labels.classes < kBins ? labels.classes + 1 : kBins;
  ClassOrder order;
  order.kept = kept != nullptr;
  order.state = from.take<OrderState>(few ? 0 : 1);
  order.slots = from.take<Slot>(labels.slots);
  order.starts = from.take<int64_t>(labels.classes + 2);
  order.present = from.take<unsigned char>(labels.classes + 1);
  order.other = !few && order_digits(labels.classes) > 1 ? from.take<Slot>(labels.slots) : nullptr;
  order.counts = from.take<uint32_t>(few ? 0 : ceil_div<int64_t>(labels.slots, kChunk) * bins);
  order.totals = from.take<uint32_t>(few ? 0 : bins);
  return order;
}

// Bytes of memory to keep; 0 for few slots, which are ranked in less time than it takes to look.
inline int64_t kept_order_bytes(const Labels& labels) {
  if (has_few_slots(labels)) return 0;
  Workspace workspace(nullptr);
  take_class_order(labels, nullptr, workspace);
  return workspace.bytes();
}

static __global__ void __launch_bounds__(256) rank_all(Labels labels, ClassOrder order) {
  rank_slots(labels, order, blockIdx.x);
}

inline const char* sort_by_class(const Labels& labels, const ClassOrder& order, cudaStream_t stream) {
  if (has_few_slots(labels)) return launch(rank_all, rank_blocks(labels), 256, 0, stream, labels, order);
  if (labels.slots > 0xffffffff) return "fewer than 2^32 slots or pairs can be sorted";
  if (!order.kept)
    if (const char* error = message(cudaMemsetAsync(order.state, 0, sizeof *order.state, stream))) return error;
  const int64_t chunks = ceil_div<int64_t>(labels.slots, kChunk);
  const int64_t blocks = min(max<int64_t>(resident_blocks(sort_slots, kChunk, 0), 1), chunks);
  return launch<true>(sort_slots, blocks, kChunk, 0, stream, labels, order, order_digits(labels.classes));
}

}  // namespace ssmkernels::cuda
