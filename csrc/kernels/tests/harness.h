// SPDX-License-Identifier: BSD-3-Clause
// What the C++ tests share: checks that are counted, comparisons, threads, and what main returns.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <string>
#include <thread>
#include <vector>

#include "../common/parallel_for.h"

namespace ssmkernels::test {

using Values = std::vector<double>;

inline int passed = 0, failed = 0;
inline std::string context;  // what is tested now: an instruction set, a dtype, sizes

inline void check(bool good, const char* what, double figure = 0) {
  good ? ++passed : ++failed;
  if (!good) std::printf("FAILED %s: %s (%g)\n", context.c_str(), what, figure);
}

// Within `tolerance` at each element. Infinities are equal or not; NaN is never close.
template <class Real>
void expect_close(const char* what, const std::vector<Real>& ours, const Values& expected, double tolerance) {
  double worst = ours.size() == expected.size() ? 0 : std::numeric_limits<double>::infinity();
  for (size_t i = 0; i < std::min(ours.size(), expected.size()); ++i) {
    if (ours[i] == expected[i]) continue;  // infinities
    const double error = std::abs(ours[i] - expected[i]);
    worst = error <= worst ? worst : error;  // NaN sticks
  }
  check(worst <= tolerance, what, worst);
}

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

inline double norm(const Values& x) {
  double sum = 0;
  for (double v : x) sum += v * v;
  return std::sqrt(sum);
}

// Up to four threads, each with every fourth piece of the work, one index at a time: divided otherwise and in another
// order than by serial_for.
inline const auto threads_for = [](int64_t n, RangeBody body) {
  std::vector<std::thread> threads;
  for (int64_t t = 0; t < std::min<int64_t>(n, 4); ++t)
    threads.emplace_back([=] {
      for (int64_t i = n - 1 - t; i >= 0; i -= 4) body(i, i + 1);
    });
  for (auto& thread : threads) thread.join();
};

// What main returns, once all has been checked.
inline int report() {
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}

}  // namespace ssmkernels::test
