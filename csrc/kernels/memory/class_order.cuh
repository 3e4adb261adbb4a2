// SPDX-License-Identifier: BSD-3-Clause
// The slots of a bank in the order of their classes, bank order within a class: a stable counting sort, by digits where
// there are many classes. A sweep in this order closes each class once per split, so class sums need neither atomics
// nor a second visit.
#pragma once

#include "../common/cuda.cuh"
#include "slot.cuh"

namespace ssmkernels::cuda {

struct ClassOrder {
  Slot* slots;             // [K]
  int64_t* starts;         // [L + 2]  class c lies at [starts[c], starts[c + 1])
  unsigned char* present;  // [L + 1]  1 where a slot has the class
  // scratch
  Slot* other;       // [K], with more than one digit
  uint32_t* counts;  // [chunks][bins]
  uint32_t* totals;  // [bins]
};

inline constexpr int kDigitBits = 11;
inline constexpr int kBins = 1 << kDigitBits;
inline constexpr int kChunk = 512;  // slots, one thread each
inline constexpr int kScanBins = 32, kScanParts = 32;

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
static __global__ void __launch_bounds__(kChunk) count_digits(OrderPass pass) {
  SSM_SHARED(count, uint32_t[kBins]);
  for (int bin = threadIdx.x; bin < pass.bins; bin += kChunk) count[bin] = 0;
  __syncthreads();
  const int64_t at = int64_t{blockIdx.x} * kChunk + threadIdx.x;
  if (at < pass.slots)
    atomicAdd(&count[pass.digit(pass.slot(at).label)], 1u);  // integers: any order gives the same count
  __syncthreads();
  for (int bin = threadIdx.x; bin < pass.bins; bin += kChunk)
    pass.counts[int64_t{blockIdx.x} * pass.bins + bin] = count[bin];
}

// counts[chunk][bin] becomes the sum over the chunks before it, totals[bin] the sum over all.
static __global__ void __launch_bounds__(kScanBins* kScanParts) scan_chunks(OrderPass pass) {
  SSM_SHARED(sums, uint32_t[kScanParts][kScanBins]);
  const int part = threadIdx.x / kScanBins, lane = threadIdx.x % kScanBins;
  const int bin = blockIdx.x * kScanBins + lane;
  const int64_t size = ceil_div<int64_t>(pass.chunks, kScanParts);
  const int64_t begin = min(part * size, pass.chunks), end = min(begin + size, pass.chunks);
  uint32_t sum = 0;
  if (bin < pass.bins)
    for (int64_t chunk = begin; chunk < end; ++chunk) sum += pass.counts[chunk * pass.bins + bin];
  sums[part][lane] = sum;
  __syncthreads();
  if (bin >= pass.bins) return;
  uint32_t before = 0;
  for (int other = 0; other < part; ++other) before += sums[other][lane];
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
static __global__ void __launch_bounds__(kChunk) place_slots(OrderPass pass) {
  constexpr int kBinsEach = kBins / kChunk;
  SSM_SHARED(bases, uint32_t[kBins]);
  SSM_SHARED(warp_sums, uint32_t[kChunk / 32]);
  SSM_SHARED(digits, int[kChunk]);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t at = int64_t{blockIdx.x} * kChunk + threadIdx.x;
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
  if (at < pass.slots)
    pass.to[int64_t{bases[digit]} + pass.counts[int64_t{blockIdx.x} * pass.bins + digit] + rank] = slot;
}

// A thread a class: a binary search. The work is the same wherever the labels of the bank end.
static __global__ void __launch_bounds__(256) find_starts(ClassOrder order, int64_t slots, int64_t classes) {
  const int64_t c = int64_t{blockIdx.x} * 256 + threadIdx.x;
  if (c > classes + 1) return;
  int64_t start = 0, end = slots;  // labels before `start` are smaller, from `end` on they are not
  while (start < end) {
    const int64_t middle = start + (end - start) / 2;
    if (order.slots[middle].label < c)
      start = middle + 1;
    else
      end = middle;
  }
  order.starts[c] = start;
  if (c <= classes) order.present[c] = start < slots && order.slots[start].label == c;
}

inline int order_digits(int64_t classes) {
  int digits = 1;
  while (classes >> (digits * kDigitBits)) ++digits;
  return digits;
}

template <class Storage>
ClassOrder take_class_order(const Bank<Storage>& bank, Workspace& workspace) {
  const int64_t bins = bank.classes < kBins ? bank.classes + 1 : kBins;
  ClassOrder order;
  order.slots = workspace.take<Slot>(bank.slots);
  order.starts = workspace.take<int64_t>(bank.classes + 2);
  order.present = workspace.take<unsigned char>(bank.classes + 1);
  order.other = order_digits(bank.classes) > 1 ? workspace.take<Slot>(bank.slots) : nullptr;
  order.counts = workspace.take<uint32_t>(ceil_div<int64_t>(bank.slots, kChunk) * bins);
  order.totals = workspace.take<uint32_t>(bins);
  return order;
}

template <class Storage>
const char* sort_by_class(const Bank<Storage>& bank, const ClassOrder& order, cudaStream_t stream) {
  if (bank.slots > 0xffffffff) return "the bank must have fewer than 2^32 slots";
  const int digits = order_digits(bank.classes);
  OrderPass pass{};
  pass.labels = bank.labels;
  pass.counts = order.counts;
  pass.totals = order.totals;
  pass.slots = bank.slots;
  pass.classes = bank.classes;
  pass.chunks = ceil_div<int64_t>(bank.slots, kChunk);
  for (int digit = 0; digit < digits; ++digit) {
    pass.to = (digits - digit) % 2 == 1 ? order.slots : order.other;
    pass.shift = digit * kDigitBits;
    const int64_t highest = bank.classes >> pass.shift;
    pass.bins = highest < kBins ? static_cast<int>(highest) + 1 : kBins;
    if (const char* error = launch(count_digits, pass.chunks, kChunk, 0, stream, pass)) return error;
    if (const char* error =
            launch(scan_chunks, ceil_div(pass.bins, kScanBins), kScanBins * kScanParts, 0, stream, pass))
      return error;
    if (const char* error = launch(place_slots, pass.chunks, kChunk, 0, stream, pass)) return error;
    pass.labels = nullptr;
    pass.from = pass.to;
  }
  return launch(find_starts, ceil_div<int64_t>(bank.classes + 2, 256), 256, 0, stream, order, bank.slots, bank.classes);
}

}  // namespace ssmkernels::cuda
