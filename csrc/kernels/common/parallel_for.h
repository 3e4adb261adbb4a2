// SPDX-License-Identifier: BSD-3-Clause
// How a kernel is handed its threads. The library owns no thread pool: torch's is handed in by the binding, a C++ user
// hands in theirs.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

namespace ssmkernels {

// A reference to something callable that outlives the call: no allocation, no copy (std::function_ref is C++26).
template <class Signature>
class FunctionRef;

template <class Result, class... Args>
class FunctionRef<Result(Args...)> {
 public:
  template <class F, class = std::enable_if_t<!std::is_same_v<std::remove_cvref_t<F>, FunctionRef>>>
  FunctionRef(F&& f)
      : object_(const_cast<void*>(static_cast<const void*>(&f))), call_([](void* object, Args... args) -> Result {
          return (*static_cast<std::remove_reference_t<F>*>(object))(std::forward<Args>(args)...);
        }) {}

  Result operator()(Args... args) const {
    return call_(object_, std::forward<Args>(args)...);
  }

 private:
  void* object_;
  Result (*call_)(void*, Args...);
};

using RangeBody = FunctionRef<void(int64_t begin, int64_t end)>;

// parallel_for(n, body) calls body on disjoint ranges that cover [0, n), in any order, on any threads. Kernels cut
// their work by shape alone, never by the number of threads, so that the bits of a result do not depend on it.
using ParallelFor = FunctionRef<void(int64_t n, RangeBody body)>;

inline constexpr auto serial_for = [](int64_t n, RangeBody body) {
  if (n > 0) body(0, n);
};

}  // namespace ssmkernels
