// SPDX-License-Identifier: BSD-3-Clause
// Arithmetic of sizes.
#pragma once

#include <cstdint>

#ifndef SSM_ISA
#error "CPU kernels are compiled once per instruction set, with SSM_ISA naming it"
#endif

namespace ssmkernels::SSM_ISA {

static inline int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

static inline int64_t min(int64_t a, int64_t b) {
  return a < b ? a : b;
}

static inline int64_t clamp(int64_t value, int64_t low, int64_t high) {
  return value < low ? low : value > high ? high : value;
}

}  // namespace ssmkernels::SSM_ISA
