// SPDX-License-Identifier: BSD-3-Clause
// How the kernels are handed torch's threads, and looked after while they take long.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <chrono>
#include <exception>
#include <thread>

#include "../kernels/common/parallel_for.h"
#include "interrupt.h"

namespace ssmkernels::binding {

// torch's threads (torch.set_num_threads is obeyed), as many as the work is worth: below kThreadWork a thread would be
// done before the next one has woken up, and waiting for it takes many times as long where the cores are busy. Work is
// counted in multiply-adds, or what else takes as long.
class Threads {
 public:
  explicit Threads(double work)
      : work_(work), shares_(work < 2 * kThreadWork ? 1 : static_cast<int64_t>(work / kThreadWork)) {}

  void operator()(int64_t n, RangeBody body) const {
    if (++calls_ % kCallsUnwatched == 0) check_in_time();
    if (work_ > kWatchedWork && interrupt_check) return watched_for(n, body);
    if (shares_ == 1) return serial_for(n, body);
    torch::stable::parallel_for(0, n, grain(n), [&](int64_t begin, int64_t end) { body(begin, end); });
  }

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr double kThreadWork = 1 << 20;     // about 25 µs
  static constexpr double kWatchedWork = 1ll << 32;  // about 0.1 s
  static constexpr Clock::duration kInterval = std::chrono::milliseconds(100);
  static constexpr int64_t kCallsUnwatched = 64;  // a look at the clock is worth more than a call of little work

  int64_t grain(int64_t n) const {
    return (n + shares_ - 1) / shares_;
  }

  void check_in_time() const {
    const InterruptCheck check = interrupt_check;
    const Clock::time_point now = Clock::now();
    if (!check || now - checked_ < kInterval) return;
    checked_ = now;
    check();
  }

  // In pieces of kWatchedWork, between which the calling thread looks for an interrupt, and the others whether it has
  // found one.
  void watched_for(int64_t n, RangeBody body) const {
    const int64_t piece = static_cast<int64_t>(static_cast<double>(n) * (kWatchedWork / work_)) + 1;
    const std::thread::id caller = std::this_thread::get_id();
    std::atomic<bool> interrupted = false;
    std::exception_ptr raised;
    torch::stable::parallel_for(0, n, grain(n), [&](int64_t begin, int64_t end) {
      for (; begin < end && !interrupted; begin += piece) {
        body(begin, begin + piece < end ? begin + piece : end);
        if (std::this_thread::get_id() != caller) continue;
        try {
          check_in_time();
        } catch (...) {  // torch's threads are not to be left by an exception
          raised = std::current_exception();
          interrupted = true;
        }
      }
    });
    if (raised) std::rethrow_exception(raised);
  }

  double work_;
  int64_t shares_;
  mutable int64_t calls_ = 0;
  mutable Clock::time_point checked_{};
};

}  // namespace ssmkernels::binding
