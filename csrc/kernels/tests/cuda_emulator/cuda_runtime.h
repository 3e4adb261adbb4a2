// SPDX-License-Identifier: BSD-3-Clause
// Runs CUDA kernels on the host, for tests: as much of CUDA as the kernels here use. A block's threads are fibers that switch at barriers
// and at the instructions of a warp; blocks run one after the other, or, in a cooperative launch, by turns: one runs until it waits for
// others. What a GPU leaves undefined is made to show: shared memory starts as
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
#define __noinline__
#define __builtin_assume(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

using std::ceil;
using std::exp2;
using std::fabs;
using std::fmaxf;
using std::frexp;
using std::ldexp;
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

enum class State { ready, at_warp, at_block, at_grid, done };

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

struct Block {
  Thread threads[kMaxThreads];
  Exchange exchanges[kMaxThreads / 32][2];
  unsigned char* shared_page = nullptr;
  unsigned char* shared = nullptr;
  unsigned index = 0;
  unsigned phase = 0;  // odd: warps take their turns the other way round
};

struct Machine {
  std::vector<Block*> blocks;  // more than one in a cooperative launch only
  Block* block = nullptr;      // the one that runs
  jmp_buf scheduler;
  int current = 0;  // thread
  std::function<void()> body;
};

inline Machine& machine() {
  static Machine* it = new Machine;
  return *it;
}

inline Thread& this_thread() {
  return machine().block->threads[machine().current];
}

inline void pause(State state, const char* at) {
  Thread& me = this_thread();
  me.state = state;
  me.at = at;
  if (!_setjmp(me.here)) _longjmp(machine().scheduler, 1);
}

inline void fiber_main() {
  for (;;) {
    machine().body();
    pause(State::done, "its end");
  }
}

inline void resume(int thread) {
  Machine& m = machine();
  Thread& t = m.block->threads[thread];
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

// Runs a warp until each of its threads waits for more than the warp, or is done.
inline void run_warp(int warp, int lanes) {
  Thread* threads = machine().block->threads + warp * 32;
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

inline void start_block(Block& block, unsigned index, int threads, size_t shared_bytes) {
  static const size_t page = sysconf(_SC_PAGESIZE);
  static const size_t room = (kMaxShared + page - 1) / page * page;
  if (!block.shared_page) {
    void* memory = mmap(nullptr, room + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) fail("no shared memory");
    block.shared_page = static_cast<unsigned char*>(memory);
    mprotect(block.shared_page + room, page, PROT_NONE);
  }
  block.shared = block.shared_page + room - (shared_bytes + 15) / 16 * 16;
  std::memset(block.shared, 0xff, (shared_bytes + 15) / 16 * 16);  // NaN in every storage type
  block.index = index;
  block.phase = first_phase + index;
  for (int t = 0; t < threads; ++t) {
    block.threads[t].state = State::ready;
    block.threads[t].turn = 0;
  }
}

enum class Progress { none, some, done };

// Runs a block until its threads are done, or one of them waits for other blocks.
inline Progress run_block(Block& block, int threads) {
  machine().block = &block;
  blockIdx = dim3(block.index);
  blockIdx.y = blockIdx.z = 0;
  const int warps = (threads + 31) / 32;
  for (int t = 0; t < threads; ++t)
    if (block.threads[t].state == State::at_grid) block.threads[t].state = State::ready;
  for (Progress progress = Progress::none;; progress = Progress::some) {
    for (int i = 0; i < warps; ++i) {
      const int warp = block.phase % 2 ? warps - 1 - i : i;
      run_warp(warp, threads - warp * 32 < 32 ? threads - warp * 32 : 32);
    }
    int at_block = 0, at_grid = 0, done = 0;
    for (int t = 0; t < threads; ++t) {
      at_block += block.threads[t].state == State::at_block;
      at_grid += block.threads[t].state == State::at_grid;
      done += block.threads[t].state == State::done;
    }
    if (done == threads) break;
    if (at_block + at_grid + done != threads) fail("deadlock");
    if (at_grid > 0) return progress;
    for (int t = 0; t < threads; ++t)
      if (block.threads[t].state == State::at_block) block.threads[t].state = State::ready;
    ++block.phase;
  }
  for (int t = 0; t < threads; ++t)
    if (!block.threads[t].copies.empty() || !block.threads[t].open_copies.empty()) fail("a thread ended with copies under way");
  return Progress::done;
}

inline Block& block_at(size_t i) {
  Machine& m = machine();
  while (m.blocks.size() <= i) m.blocks.push_back(new Block);
  return *m.blocks[i];
}

inline void run_grid(unsigned blocks, int threads, size_t shared_bytes) {
  for (unsigned i = 0; i < blocks; ++i) {
    start_block(block_at(0), i, threads, shared_bytes);
    if (run_block(block_at(0), threads) != Progress::done) fail("a block waits for others in a launch that is not cooperative");
  }
}

// The turns go up and down the blocks.
inline void run_cooperative_grid(unsigned blocks, int threads, size_t shared_bytes) {
  std::vector<bool> done(blocks);
  for (unsigned i = 0; i < blocks; ++i) start_block(block_at(i), i, threads, shared_bytes);
  for (unsigned left = blocks, round = first_phase, stuck = 0; left > 0; ++round) {
    bool any = false;
    for (unsigned i = 0; i < blocks; ++i) {
      const unsigned block = round % 2 ? blocks - 1 - i : i;
      if (done[block]) continue;
      const Progress progress = run_block(block_at(block), threads);
      any |= progress != Progress::none;
      done[block] = progress == Progress::done;
      left -= done[block];
    }
    stuck = any ? 0 : stuck + 1;
    if (stuck == 3) fail("the blocks wait for each other");
  }
}

// Each lane shows `mine` and gets what all show.
template <class T>
const T* exchange(const T& mine, const char* instruction, T (&all)[32]) {
  static_assert(sizeof(T) <= sizeof(Exchange::bytes[0]));
  const int warp = machine().current / 32, lane = machine().current % 32;
  Exchange& buffer = machine().block->exchanges[warp][this_thread().turn];
  this_thread().turn ^= 1;
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
inline int __popc(unsigned x) {
  return __builtin_popcount(x);
}
template <class T>
T atomicAdd(T* at, T x) {
  const T old = *at;
  *at += x;
  return old;
}
inline void __threadfence() {}
inline void __nanosleep(unsigned) {  // time passes: the other blocks' turn
  emulator::pause(emulator::State::at_grid, "__nanosleep");
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
enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int cooperative;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
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
  if (config->numAttrs == 0) {
    emulator::run_grid(gridDim.x, threads, config->dynamicSmemBytes);
  } else {
    if (gridDim.x * threads > 1024u * emulator::multiprocessor_count) return cudaErrorInvalidValue;  // not all can run at once
    emulator::run_cooperative_grid(gridDim.x, threads, config->dynamicSmemBytes);
  }
  return cudaSuccess;
}
