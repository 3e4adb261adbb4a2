// SPDX-License-Identifier: BSD-3-Clause
// Memory of the kernels' buffers that was not written yet is NaN, so that a result that depends on it is. For one
// source of a program.
#pragma once

#include <cstdlib>
#include <cstring>
#include <new>

void* operator new(std::size_t size, std::align_val_t alignment) {
  const std::size_t unit = static_cast<std::size_t>(alignment), whole = (size + unit - 1) / unit * unit;
  void* memory = std::aligned_alloc(unit, whole > 0 ? whole : unit);
  if (!memory) throw std::bad_alloc();
  return std::memset(memory, 0xff, whole);
}

void operator delete(void* memory, std::align_val_t) noexcept {
  std::free(memory);
}
