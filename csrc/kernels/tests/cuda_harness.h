// SPDX-License-Identifier: BSD-3-Clause
// What the tests of the CUDA kernels share: memory, checks, and the choice of where the kernels run. The same sources
// are compiled against cuda_emulator/, where arrays end at unmapped pages and the order of warps can be changed, and
// against the CUDA runtime, for a device and compute-sanitizer: there arrays are managed memory, and workspace is
// device memory that nobody has written.
#pragma once

#include <cuda_runtime.h>

#ifdef SSM_CUDA_EMULATOR
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <random>

#include "half_types.h"
#include "harness.h"

namespace ssmkernels::test {

#ifdef SSM_CUDA_EMULATOR

inline void set_seed(unsigned seed) {
  emulator::seed = seed;
}
inline void set_multiprocessors(int count) {
  emulator::multiprocessor_count = count;
}
inline void set_cache_bytes(int bytes) {
  emulator::cache_bytes = bytes;
}
inline void set_shared_limit(int bytes) {
  emulator::shared_limit = bytes;
}
inline void set_resident_threads(int most) {
  emulator::most_resident_threads = most;
}
inline unsigned launches() {
  return emulator::machine().launches;
}
inline bool has_device() {
  return true;
}
inline const char* wait() {
  return nullptr;
}

class Memory {
 public:
  Memory(size_t bytes, bool) {
    const size_t page = sysconf(_SC_PAGESIZE), whole = (bytes + 15) / 16 * 16;
    mapped_ = (whole + page - 1) / page * page + page;
    start_ =
        static_cast<unsigned char*>(mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (start_ == MAP_FAILED) std::abort();
    mprotect(start_ + mapped_ - page, page, PROT_NONE);
    data_ = start_ + mapped_ - page - whole;
    std::memset(data_, 0xff, whole);
  }
  ~Memory() {
    munmap(start_, mapped_);
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  void* data() const {
    return data_;
  }

 private:
  size_t mapped_;
  unsigned char *start_, *data_;
};

#else

inline void set_seed(unsigned) {}
inline void set_multiprocessors(int) {}
inline void set_shared_limit(int) {}
inline void set_cache_bytes(int) {}
inline void set_resident_threads(int) {}

inline const char* said(cudaError_t status) {
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}
inline bool has_device() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
}
// Until the device has done what it was given; what went wrong there.
inline const char* wait() {
  return said(cudaDeviceSynchronize());
}

class Memory {
 public:
  Memory(size_t bytes, bool for_host) {
    const size_t size = bytes > 0 ? bytes : 1;
    const char* error = said(for_host ? cudaMallocManaged(&data_, size) : cudaMalloc(&data_, size));
    if (error) {
      std::fprintf(stderr, "no memory: %s\n", error);
      std::abort();
    }
    if (for_host) std::memset(data_, 0xff, size);
  }
  ~Memory() {
    cudaFree(data_);
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  void* data() const {
    return data_;
  }

 private:
  void* data_ = nullptr;
};

#endif

// An array that the host and the kernels see, of NaN to begin with.
template <class T>
class Guarded {
 public:
  explicit Guarded(size_t count) : count_(count), memory_(count * sizeof(T), true) {}
  template <class U>
  explicit Guarded(const std::vector<U>& values) : Guarded(values.size()) {
    for (size_t i = 0; i < count_; ++i) data()[i] = static_cast<T>(values[i]);
  }
  T* data() const {
    return static_cast<T*>(memory_.data());
  }
  size_t size() const {
    return count_;
  }
  T& operator[](size_t i) const {
    return data()[i];
  }
  bool same_bits(const Guarded& other) const {
    return count_ == other.count_ && std::memcmp(data(), other.data(), count_ * sizeof(T)) == 0;
  }

 private:
  size_t count_;
  Memory memory_;
};

// What is expected, and how far each element may be from it.
struct Bounded {
  Values value, error;

  explicit Bounded(size_t count) : value(count), error(count) {}
  void set(size_t at, double exact, double bound) {
    value[at] = exact;
    error[at] = bound;
  }
  void add(size_t at, double exact, double bound) {
    value[at] += exact;
    error[at] += bound;
  }
  // All of them times a factor, in which `rounding` of each is lost.
  Bounded times(double factor, double rounding) const {
    Bounded out(value.size());
    for (size_t i = 0; i < value.size(); ++i)
      out.set(i, value[i] * factor, (error[i] + rounding * std::fabs(value[i])) * std::fabs(factor));
    return out;
  }
};

// Below the smallest normal number all may be lost.
template <class Real>
void compare_within(const Guarded<Real>& out, const Bounded& expected, const char* what) {
  double worst = out.size() == expected.value.size() ? 0 : std::numeric_limits<double>::infinity();
  for (size_t i = 0; i < std::min(out.size(), expected.value.size()); ++i) {
    if (out[i] == expected.value[i]) continue;
    const double error = std::fabs(out[i] - expected.value[i]),
                 share = error / (expected.error[i] + 4 * std::numeric_limits<Real>::min());
    worst = share <= worst ? worst : share;  // NaN sticks
  }
  check(worst <= 1, what, worst);
}

// What only the kernels see.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) : memory_(static_cast<size_t>(bytes), false) {}
  void* data() const {
    return memory_.data();
  }

 private:
  Memory memory_;
};

// A call succeeded, and so did what it launched.
inline void succeeds(const char* error, const char* what) {
  if (!error) error = wait();
  if (error) std::printf("FAILED %s: %s\n", context.c_str(), error);
  check(!error, what);
}

inline constexpr int kSkipped = 77;  // CTest's SKIP_RETURN_CODE

// What main returns. Without a device nothing has passed.
template <class F>
int run_tests(F all) {
  if (!has_device()) {
    std::printf("no CUDA device: nothing was run\n");
    return kSkipped;
  }
  all();
  return report();
}

}  // namespace ssmkernels::test
