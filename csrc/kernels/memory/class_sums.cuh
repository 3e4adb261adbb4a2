// SPDX-License-Identifier: BSD-3-Clause
// Class sums of a sweep in class order.
#pragma once

#include "running_sums.cuh"
#include "sweep_input.cuh"

namespace ssmkernels::cuda::memory {

// Sums of the classes in a sweep by class order. A class that a split closes is written once, relative to the reference
// of that moment. The pairs (class, split) that occur have different class + split, which is their place.
template <class Real>
struct ClassSum {
  Real value;  // Σ 2^(x − reference)
  Real reference;
};

inline int64_t class_sums_pitch(int64_t classes, const Partition& partition) {
  return classes + 1 + partition.splits;
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

  // `total` has no sum of its own: it takes the runs as they close.
  template <int kBlocks>
  __device__ void add(const Real (&values)[kBlocks][4], const int* labels, RunningLogSum<Real>& total) {
    constexpr int kSlots = kBlocks * 8;
    if (labels[0] != label_) open(labels[0], total);
    if (labels[kSlots - 1] == label_) {
#pragma unroll
      for (int n = 0; n < kBlocks; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) run_[i / 2] += values[n][i];
      return;
    }
    for (int begin = 0, end = 0; begin < kSlots; begin = end) {
      if (labels[begin] != label_) open(labels[begin], total);
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

  __device__ void close(RunningLogSum<Real>& total) {
    if (label_ < 0) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const Real sum = row_sum(run_[r]);
      total.sum[r] += sum;
      run_[r] = 0;
      if constexpr (kKeepsPlace) {
        if (writes_[r]) first_[8 * r * pitch_ + label_] = {sum, total.reference[r]};
      } else {
        if (place_.writes(r)) sums_[(place_.row + 8 * r) * pitch_ + place_.split + label_] = {sum, total.reference[r]};
      }
    }
  }

 private:
  __device__ void open(int label, RunningLogSum<Real>& total) {
    close(total);
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

}  // namespace ssmkernels::cuda::memory
