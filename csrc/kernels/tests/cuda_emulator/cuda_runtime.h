// SPDX-License-Identifier: BSD-3-Clause
// Runs CUDA kernels on the host, for tests: as much of CUDA as the kernels here use. A block's threads are fibers that switch at barriers
// and at the instructions of a warp; blocks run one after the other. What a GPU leaves undefined is made to show: shared memory starts as
// NaN, an asynchronous copy lands only when it is waited for, lanes of a warp that meet at different instructions abort, dynamic shared
// memory ends at an unmapped page, and warps take their turns in an order that changes from barrier to barrier.
#pragma once

#define SSM_CUDA_EMULATOR

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <cmath>
#include <csetjmp>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

using std::ceil;
using std::exp2;
using std::fabs;
using std::fmaxf;
using std::log2;
using std::sqrt;

namespace emulator {

inline int multiprocessor_count = 3;
inline int shared_limit = 227 * 1024;  // bytes a block may have
inline unsigned first_phase = 0;       // odd: warps take their turns the other way round
inline constexpr int kMaxThreads = 1024;
inline constexpr size_t kStackBytes = 256 * 1024;
inline constexpr size_t kMaxShared = 227 * 1024;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "cuda emulator: %s (block %u, thread %u)\n", what, blockIdx.x, threadIdx.x);
  std::abort();
}

enum class State { ready, at_warp, at_block, done };

struct Copy {
  void* to;
  const void* from;
  int bytes;  // 16, or 0 for zeros
};

struct Thread {
  jmp_buf here;
  ucontext_t start;
  bool started = false;
  State state = State::done;
  const char* at = nullptr;  // the instruction it waits at
  int turn = 0;              // which of the warp's two exchange buffers is next
  std::vector<std::vector<Copy>> copies;
  std::vector<Copy> open_copies;
};

// What the lanes of a warp show each other at an instruction.
struct Exchange {
  alignas(16) unsigned char bytes[32][64];
};

struct Machine {
  Thread threads[kMaxThreads];
  Exchange exchanges[kMaxThreads / 32][2];
  jmp_buf scheduler;
  int current = 0;
  std::function<void()> body;
  unsigned char* shared_page = nullptr;
  unsigned char* shared = nullptr;
};

inline Machine& machine() {
  static Machine* it = new Machine;
  return *it;
}

inline void pause(State state, const char* at) {
  Machine& m = machine();
  Thread& me = m.threads[m.current];
  me.state = state;
  me.at = at;
  if (!_setjmp(me.here)) _longjmp(m.scheduler, 1);
}

inline void fiber_main() {
  for (;;) {
    machine().body();
    pause(State::done, "its end");
  }
}

inline void resume(int thread) {
  Machine& m = machine();
  Thread& t = m.threads[thread];
  m.current = thread;
  threadIdx = dim3(thread);
  threadIdx.y = threadIdx.z = 0;
  if (_setjmp(m.scheduler)) return;
  if (t.started) _longjmp(t.here, 1);
  t.started = true;
  getcontext(&t.start);
  void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (stack == MAP_FAILED) fail("no stack");
  t.start.uc_stack.ss_sp = stack;
  t.start.uc_stack.ss_size = kStackBytes;
  t.start.uc_link = nullptr;
  makecontext(&t.start, fiber_main, 0);
  setcontext(&t.start);
}

// Runs a warp until each of its threads is at a block barrier or done.
inline void run_warp(int warp, int lanes) {
  Machine& m = machine();
  Thread* threads = m.threads + warp * 32;
  for (;;) {
    int waiting = 0;
    for (int lane = 0; lane < lanes; ++lane) {
      if (threads[lane].state == State::ready) resume(warp * 32 + lane);
      waiting += threads[lane].state == State::at_warp;
    }
    if (waiting == 0) return;
    if (waiting != lanes) fail("a warp's lanes do not meet");
    for (int lane = 0; lane < lanes; ++lane) {
      if (std::strcmp(threads[lane].at, threads[0].at) != 0) fail("a warp's lanes meet at different instructions");
      threads[lane].state = State::ready;
    }
  }
}

inline void run_block(int threads, size_t shared_bytes) {
  Machine& m = machine();
  static const size_t page = sysconf(_SC_PAGESIZE);
  static const size_t room = (kMaxShared + page - 1) / page * page;
  if (!m.shared_page) {
    void* memory = mmap(nullptr, room + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) fail("no shared memory");
    m.shared_page = static_cast<unsigned char*>(memory);
    mprotect(m.shared_page + room, page, PROT_NONE);
  }
  m.shared = m.shared_page + room - (shared_bytes + 15) / 16 * 16;
  std::memset(m.shared, 0xff, (shared_bytes + 15) / 16 * 16);  // NaN in every storage type
  const int warps = (threads + 31) / 32;
  for (int t = 0; t < threads; ++t) {
    m.threads[t].state = State::ready;
    m.threads[t].turn = 0;
  }
  for (unsigned phase = first_phase + blockIdx.x;; ++phase) {
    for (int i = 0; i < warps; ++i) {
      const int warp = phase % 2 ? warps - 1 - i : i;
      run_warp(warp, threads - warp * 32 < 32 ? threads - warp * 32 : 32);
    }
    int waiting = 0, done = 0;
    for (int t = 0; t < threads; ++t) {
      waiting += m.threads[t].state == State::at_block;
      done += m.threads[t].state == State::done;
    }
    if (done == threads) break;
    if (waiting + done != threads) fail("deadlock");
    for (int t = 0; t < threads; ++t)
      if (m.threads[t].state == State::at_block) m.threads[t].state = State::ready;
  }
  for (int t = 0; t < threads; ++t)
    if (!m.threads[t].copies.empty() || !m.threads[t].open_copies.empty()) fail("a thread ended with copies under way");
}

// Each lane shows `mine` and gets what all show.
template <class T>
const T* exchange(const T& mine, const char* instruction, T (&all)[32]) {
  static_assert(sizeof(T) <= sizeof(Exchange::bytes[0]));
  Machine& m = machine();
  const int warp = m.current / 32, lane = m.current % 32;
  Exchange& buffer = m.exchanges[warp][m.threads[m.current].turn];
  m.threads[m.current].turn ^= 1;
  std::memcpy(buffer.bytes[lane], &mine, sizeof(T));
  pause(State::at_warp, instruction);
  for (int i = 0; i < 32; ++i) std::memcpy(&all[i], buffer.bytes[i], sizeof(T));
  return all;
}

}  // namespace emulator

inline void __syncthreads() {
  emulator::pause(emulator::State::at_block, "__syncthreads");
}
inline void __syncwarp(unsigned = 0xffffffffu) {
  emulator::pause(emulator::State::at_warp, "__syncwarp");
}
template <class T>
T __shfl_sync(unsigned, T x, int lane) {
  T all[32];
  return emulator::exchange(x, "__shfl_sync", all)[lane & 31];
}
template <class T>
T __shfl_xor_sync(unsigned, T x, int mask) {
  T all[32];
  return emulator::exchange(x, "__shfl_xor_sync", all)[(threadIdx.x % 32) ^ mask];
}
template <class T>
T __shfl_up_sync(unsigned, T x, int delta) {
  T all[32];
  const int lane = threadIdx.x % 32;
  return emulator::exchange(x, "__shfl_up_sync", all)[lane >= delta ? lane - delta : lane];
}
inline unsigned __ballot_sync(unsigned, int predicate) {
  int all[32];
  emulator::exchange(predicate, "__ballot_sync", all);
  unsigned bits = 0;
  for (int i = 0; i < 32; ++i) bits |= unsigned{all[i] != 0} << i;
  return bits;
}
inline int __any_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, predicate) != 0;
}
inline int __ffs(unsigned x) {
  return __builtin_ffs(static_cast<int>(x));
}
inline unsigned atomicAdd(unsigned* at, unsigned x) {
  const unsigned old = *at;
  *at += x;
  return old;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// The host side. Device memory is host memory.
typedef int cudaError_t;
typedef struct CUstream_st* cudaStream_t;
inline constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidValue = 1;
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline const char* cudaGetErrorString(cudaError_t) {
  return "invalid argument";
}
inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? emulator::multiprocessor_count : emulator::shared_limit;
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t) {
  std::memset(at, value, bytes);
  return cudaSuccess;
}

namespace emulator {
inline std::map<const void*, size_t>& shared_limits() {
  static std::map<const void*, size_t> limits;
  return limits;
}
}  // namespace emulator

inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  if (bytes > emulator::shared_limit) return cudaErrorInvalidValue;
  emulator::shared_limits()[kernel] = bytes;
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  const auto limit = emulator::shared_limits().find(reinterpret_cast<const void*>(kernel));
  if (config->dynamicSmemBytes > (limit == emulator::shared_limits().end() ? 48 * 1024 : limit->second)) return cudaErrorInvalidValue;
  const int threads = config->blockDim.x;
  if (threads < 1 || threads > emulator::kMaxThreads || config->gridDim.x < 1) return cudaErrorInvalidValue;
  blockDim = config->blockDim;
  gridDim = config->gridDim;
  emulator::machine().body = [&] { kernel(arguments...); };
  for (unsigned block = 0; block < gridDim.x; ++block) {
    blockIdx = dim3(block);
    blockIdx.y = blockIdx.z = 0;
    emulator::run_block(threads, config->dynamicSmemBytes);
  }
  return cudaSuccess;
}
