// SPDX-License-Identifier: BSD-3-Clause
// Uninitialised memory of a CPU kernel, aligned to cache lines.
#pragma once

#include <cstdint>
#include <new>

#ifndef SSM_ISA
#error "CPU kernels are compiled once per instruction set, with SSM_ISA naming it"
#endif

namespace ssmkernels::SSM_ISA {

template <class Real>
class Buffer {
 public:
  explicit Buffer(int64_t size)
      : data_(static_cast<Real*>(::operator new(size * sizeof(Real), std::align_val_t{64}))) {}
  ~Buffer() {
    ::operator delete(data_, std::align_val_t{64});
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  Real* take(int64_t size) {  // consecutive pieces, in order
    Real* piece = data_ + used_;
    used_ += size;
    return piece;
  }
  Real* data() const {
    return data_;
  }

 private:
  Real* data_;
  int64_t used_ = 0;
};

}  // namespace ssmkernels::SSM_ISA
