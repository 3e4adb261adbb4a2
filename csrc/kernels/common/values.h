// SPDX-License-Identifier: BSD-3-Clause
// Looks at the values of an argument, in the memory of the tensor.
#pragma once

#include <cstdint>
#include <limits>

namespace ssmkernels {

// Whether every value is finite and in [low, high].
template <class T>
bool all_within(const T* values, int64_t count, T low, T high) {
  constexpr T least = std::numeric_limits<T>::lowest(), largest = std::numeric_limits<T>::max();
  low = low < least ? least : low;
  high = high > largest ? largest : high;
  bool within = true;  // without a way out of the loop, which the compiler then turns into vectors
  for (int64_t i = 0; i < count; ++i) within &= values[i] >= low && values[i] <= high;
  return within;
}

// Whether values go from 0 to `last` and never down.
template <class T>
bool ascends_from_zero(const T* values, int64_t count, int64_t last) {
  bool ascends = count > 0 && values[0] == 0 && values[count - 1] == last;
  for (int64_t i = 1; i < count; ++i) ascends &= values[i - 1] <= values[i];
  return ascends;
}

}  // namespace ssmkernels
