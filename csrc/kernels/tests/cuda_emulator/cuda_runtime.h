// SPDX-License-Identifier: BSD-3-Clause
// Runs CUDA kernels on the host, for tests: as much of CUDA as the kernels here use. A block's threads are fibers that
// switch at barriers and at the instructions of a warp; blocks run one after the other, or, in a cooperative launch, by
// turns: one runs until it waits for others. What a GPU leaves undefined is made to show: shared memory starts as NaN
// of one of two kinds, an asynchronous copy lands only when it is waited for, lanes of a warp that meet at different
// instructions abort, dynamic shared memory ends at an unmapped page, and warps and lanes take their turns in an order
// that `seed` and every barrier change. What a GPU refuses is refused: the limits of sm_90, shared memory beyond 48
// KiB, static and dynamic together, that a kernel was not allowed, cooperative grids that do not fit, addresses that
// are not aligned. test_cuda_emulator.cpp plants such faults and checks that each is reported.
#pragma once

#define SSM_CUDA_EMULATOR

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <cmath>
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
#define __grid_constant__
#define __launch_bounds__(...)
#define __noinline__
#define __builtin_assume(...)
#define SSM_SHARED(name, ...) \
  auto& name = emulator::static_shared<__VA_ARGS__>([] {})  // a lambda's type is of its place alone

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
inline int cache_bytes = 50 << 20;        // of L2
inline int shared_limit = 227 * 1024;     // bytes a block may have
inline int most_resident_threads = 2048;  // of a multiprocessor: fewer where registers run out
inline unsigned seed = 0;                 // of the order of warps and lanes, and of what shared memory starts as
inline constexpr int kMaxThreads = 1024;
inline constexpr size_t kStackBytes = 256 * 1024;
inline constexpr size_t kStackShift = 9 * 64;  // or the tops of all stacks would share a few lines of the cache
inline constexpr size_t kMaxShared = 227 * 1024;
inline constexpr size_t kUnasked = 48 * 1024;       // shared memory that a kernel has without asking
inline constexpr size_t kSharedOfAll = 228 * 1024;  // of a multiprocessor
inline constexpr size_t kSharedOfSystem = 1024;     // of each block
inline constexpr int kMaxResidentBlocks = 32;
inline constexpr size_t kGap = 64;  // behind a variable in static shared memory: nobody writes there
inline constexpr unsigned char kUnwritten = 0xa5;

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

// Where a fiber, or their scheduler, goes on: of __builtin_setjmp, which stores three words where setjmp takes a
// hundred instructions; switches are most of what the emulator does.
using Place = void* [5];

struct alignas(64) Thread {  // what every switch reads and writes, in one line of the cache
  Place here;
  const char* at = nullptr;  // the instruction it waits at
  State state = State::done;
  bool started = false;
  int turn = 0;  // which of the warp's two exchange buffers is next
};

struct Copies {  // asynchronous ones of a thread
  std::vector<std::vector<Copy>> groups;
  std::vector<Copy> open;
};

// What the lanes of a warp show each other at an instruction.
struct Exchange {
  alignas(16) unsigned char bytes[33][64];  // one more than lanes: the operands of mma, their sums and a mark
};

struct Block {
  Thread threads[kMaxThreads];
  Copies copies[kMaxThreads];
  Exchange exchanges[kMaxThreads / 32][2];
  unsigned char* shared_page = nullptr;
  unsigned char* shared = nullptr;  // dynamic
  size_t shared_bytes = 0;
  alignas(64) unsigned char static_shared[kUnasked + 128 * kGap];
  std::vector<unsigned char*> variables;  // in static shared memory, by number; null where the block has not met it yet
  std::vector<unsigned char*> gaps;       // behind them
  size_t static_bytes = 0, static_end = 0;
  unsigned index = 0;
  unsigned phase = 0;  // barriers so far
};

// A number that looks random.
inline unsigned mix(unsigned a, unsigned b) {
  unsigned x = a * 0x9e3779b1u ^ (b + 0x7f4a7c15u) * 0x85ebca6bu;
  x = (x ^ x >> 16) * 0x45d9f3bu;
  x = (x ^ x >> 16) * 0x45d9f3bu;
  return x ^ x >> 16;
}

// NaN in every storage type, but not the same bits for every seed.
inline void poison(void* memory, size_t bytes) {
  const unsigned char low = 0xff, high = mix(seed, 1) % 2 ? 0x7f : 0xff;
  unsigned char* to = static_cast<unsigned char*>(memory);
  for (size_t i = 0; i < bytes; ++i) to[i] = i % 2 ? high : low;
}

struct Machine {
  std::vector<Block*> blocks;  // more than one in a cooperative launch only
  Block* block = nullptr;      // the one that runs
  Place scheduler;
  int current = 0;                          // thread
  int next = -1;                            // that goes on; -1: the warp waits for more than itself
  int warp = 0, lanes = 0, lanes_seen = 0;  // of the warp that runs, in this round of its lanes
  bool down = false;                        // the lanes' order in it
  std::function<void()> body;
  const void* kernel = nullptr;
  size_t allowed_shared = kUnasked;              // static and dynamic
  std::map<const void*, size_t> static_bytes;    // of the kernels that have run
  std::map<const void*, size_t> dynamic_limits;  // that kernels asked for
  int variables = 0;
  unsigned launches = 0;  // of kernels and copies
};

inline Machine* const the_machine = new Machine;  // not in the function: every call would ask whether it is there

inline Machine& machine() {
  return *the_machine;
}

inline Thread& this_thread() {
  return machine().block->threads[machine().current];
}
inline Copies& copies_here() {
  return machine().block->copies[machine().current];
}

// A variable in static shared memory.
template <class T, class Declaration>
T& static_shared(Declaration) {
  static const int number = machine().variables++;
  Block& block = *machine().block;
  if (block.variables.size() <= static_cast<size_t>(number)) block.variables.resize(number + 1);
  unsigned char*& at = block.variables[number];
  if (!at) {
    const size_t alignment = alignof(T) > 16 ? alignof(T) : 16;
    block.static_end = (block.static_end + alignment - 1) / alignment * alignment;
    block.static_bytes = (block.static_bytes + alignof(T) - 1) / alignof(T) * alignof(T) + sizeof(T);
    if (block.static_bytes > kUnasked) fail("more than 48 KiB of static shared memory");
    if (block.static_bytes + block.shared_bytes > machine().allowed_shared)
      fail("static and dynamic shared memory together are more than the kernel may have");
    at = block.static_shared + block.static_end;
    poison(at, sizeof(T));
    block.static_end += sizeof(T);
    block.gaps.push_back(block.static_shared + block.static_end);
    std::memset(block.gaps.back(), kUnwritten, kGap);
    block.static_end += kGap;
  }
  return *reinterpret_cast<T*>(at);
}

inline bool is_shared(const void* at, size_t bytes) {
  const Block& block = *machine().block;
  const unsigned char* p = static_cast<const unsigned char*>(at);
  const auto within = [&](const unsigned char* begin, size_t size) { return p >= begin && p + bytes <= begin + size; };
  return within(block.shared, block.shared_bytes) || within(block.static_shared, block.static_end);
}

// The thread of the running warp that goes on next, as the order of its lanes has it. When all lanes have come to an
// instruction of the warp, the next round of them begins, the other way round. -1: each of them waits for more than the
// warp, or is done.
inline int next_thread() {
  Machine& m = machine();
  Thread* threads = m.block->threads + m.warp * 32;
  for (;;) {
    while (m.lanes_seen < m.lanes) {
      const int lane = m.down ? m.lanes - 1 - m.lanes_seen : m.lanes_seen;
      ++m.lanes_seen;
      if (threads[lane].state == State::ready) return m.warp * 32 + lane;
    }
    int waiting = 0;
    for (int lane = 0; lane < m.lanes; ++lane) waiting += threads[lane].state == State::at_warp;
    if (waiting == 0) return -1;
    if (waiting != m.lanes) fail("a warp's lanes do not meet");
    for (int lane = 0; lane < m.lanes; ++lane) {
      if (threads[lane].at != threads[0].at && std::strcmp(threads[lane].at, threads[0].at) != 0)
        fail("a warp's lanes meet at different instructions");
      threads[lane].state = State::ready;
    }
    m.lanes_seen = 0;
    m.down = !m.down;
  }
}

inline void make_current(int thread) {
  machine().current = thread;
  threadIdx = dim3(thread);
  threadIdx.y = threadIdx.z = 0;
}

// Goes to the next thread without the scheduler between: switches are most of what the emulator does. The compiler must
// not see through this function nor `resume`: what they return to is another thread.
[[gnu::noipa]] inline void pause(State state, const char* at) {
  Machine& m = machine();
  Thread& me = this_thread();
  me.state = state;
  me.at = at;
  m.next = next_thread();
  if (m.next == m.current) return;
  if (__builtin_setjmp(me.here)) return;
  if (m.next < 0 || !m.block->threads[m.next].started) __builtin_longjmp(m.scheduler, 1);
  make_current(m.next);
  __builtin_longjmp(m.block->threads[m.next].here, 1);
}

inline void fiber_main() {
  for (;;) {
    machine().body();
    pause(State::done, "its end");
  }
}

// Returns when no started thread of the warp goes on.
[[gnu::noipa]] inline void resume(int thread) {
  Machine& m = machine();
  Thread& t = m.block->threads[thread];
  make_current(thread);
  if (__builtin_setjmp(m.scheduler)) return;
  if (t.started) __builtin_longjmp(t.here, 1);
  t.started = true;
  void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (stack == MAP_FAILED) fail("no stack");
  ucontext_t start;
  getcontext(&start);
  start.uc_stack.ss_sp = stack;
  start.uc_stack.ss_size = kStackBytes - thread % 64 * kStackShift;
  start.uc_link = nullptr;
  makecontext(&start, fiber_main, 0);
  setcontext(&start);
}

// Runs a warp until each of its threads waits for more than the warp, or is done. Its lanes go up or down.
inline void run_warp(int warp, int lanes, bool down) {
  Machine& m = machine();
  m.warp = warp;
  m.lanes = lanes;
  m.lanes_seen = 0;
  m.down = down;
  for (m.next = next_thread(); m.next >= 0;) resume(m.next);
}

inline void start_block(Block& block, unsigned index, int threads, size_t shared_bytes) {
  static const size_t page = sysconf(_SC_PAGESIZE);
  static const size_t capacity = (kMaxShared + page - 1) / page * page;
  if (!block.shared_page) {
    void* memory = mmap(nullptr, capacity + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) fail("no shared memory");
    block.shared_page = static_cast<unsigned char*>(memory);
    mprotect(block.shared_page + capacity, page, PROT_NONE);
  }
  block.shared = block.shared_page + capacity - (shared_bytes + 15) / 16 * 16;
  block.shared_bytes = shared_bytes;
  poison(block.shared, (shared_bytes + 15) / 16 * 16);
  block.variables.assign(block.variables.size(), nullptr);
  block.gaps.clear();
  block.static_bytes = block.static_end = 0;
  block.index = index;
  block.phase = 0;
  for (int t = 0; t < threads; ++t) {
    block.threads[t].state = State::ready;
    block.threads[t].turn = 0;
  }
}

// The end of a block: what it must not leave behind.
inline void check_end(Block& block, int threads) {
  for (int t = 0; t < threads; ++t)
    if (!block.copies[t].groups.empty() || !block.copies[t].open.empty()) fail("a thread ended with copies under way");
  for (const unsigned char* gap : block.gaps)
    for (size_t i = 0; i < kGap; ++i)
      if (gap[i] != kUnwritten) fail("static shared memory is written past its end");
  size_t& most = machine().static_bytes[machine().kernel];
  most = block.static_bytes > most ? block.static_bytes : most;
}

// In which order the warps take their turns between two barriers.
inline void shuffle(int (&order)[kMaxThreads / 32], int warps, unsigned random) {
  for (int i = 0; i < warps; ++i) {
    const int other = static_cast<int>(mix(random, i) % (i + 1));
    order[i] = order[other];
    order[other] = i;
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
    const unsigned random = mix(seed + machine().launches, block.index + 977 * block.phase);
    int order[kMaxThreads / 32];
    shuffle(order, warps, random);
    for (int i = 0; i < warps; ++i) {
      const int warp = order[i];
      run_warp(warp, threads - warp * 32 < 32 ? threads - warp * 32 : 32, random >> 31);
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
  check_end(block, threads);
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
    if (run_block(block_at(0), threads) != Progress::done)
      fail("a block waits for others in a launch that is not cooperative");
  }
}

// The turns go up and down the blocks.
inline void run_cooperative_grid(unsigned blocks, int threads, size_t shared_bytes) {
  std::vector<bool> done(blocks);
  for (unsigned i = 0; i < blocks; ++i) start_block(block_at(i), i, threads, shared_bytes);
  for (unsigned left = blocks, round = mix(seed, machine().launches), stuck = 0; left > 0; ++round) {
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

// What each lane of a warp showed at an instruction, until the lane comes to its second exchange after that.
template <class T>
struct Shown {
  const Exchange& buffer;
  T operator[](int lane) const {
    T value;
    std::memcpy(&value, buffer.bytes[lane], sizeof(T));
    return value;
  }
};

// Each lane writes its part of what the warp shows, into memory as long as an Exchange, and sees the whole.
template <class Write>
Exchange& exchange_parts(Write write, const char* instruction) {
  Exchange& buffer = machine().block->exchanges[machine().current / 32][this_thread().turn];
  this_thread().turn ^= 1;
  write(buffer.bytes[0], machine().current % 32);
  pause(State::at_warp, instruction);
  return buffer;
}

// Each lane shows `mine` and sees what all show.
template <class T>
Shown<T> exchange(const T& mine, const char* instruction) {
  static_assert(sizeof(T) <= sizeof(Exchange::bytes[0]));
  const auto write = [&](unsigned char* shown, int lane) {
    std::memcpy(shown + lane * sizeof(Exchange::bytes[0]), &mine, sizeof(T));
  };
  return {exchange_parts(write, instruction)};
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
  return emulator::exchange(x, "__shfl_sync")[lane & 31];
}
template <class T>
T __shfl_xor_sync(unsigned, T x, int mask) {
  return emulator::exchange(x, "__shfl_xor_sync")[(threadIdx.x % 32) ^ mask];
}
template <class T>
T __shfl_up_sync(unsigned, T x, int delta) {
  const int lane = threadIdx.x % 32;
  return emulator::exchange(x, "__shfl_up_sync")[lane >= delta ? lane - delta : lane];
}
inline unsigned __ballot_sync(unsigned, int predicate) {
  const auto all = emulator::exchange(predicate, "__ballot_sync");
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
struct uint2 {
  unsigned x, y;
};
struct uint4 {
  unsigned x, y, z, w;
};
template <class T>
T __ldcs(const T* at) {
  return *at;
}
template <class T>
void __stcs(T* at, T x) {
  *at = x;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// The host side. Device memory is host memory.
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchOutOfResources = 701,
  cudaErrorCooperativeLaunchTooLarge = 720
};
typedef struct CUstream_st* cudaStream_t;
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaDevAttrL2CacheSize };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaFuncAttributes {
  size_t sharedSizeBytes;
};
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

inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorLaunchOutOfResources:
      return "too many resources requested for launch";
    case cudaErrorCooperativeLaunchTooLarge:
      return "too many blocks in cooperative launch";
    default:
      return "invalid argument";
  }
}
inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount            ? emulator::multiprocessor_count
           : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? emulator::shared_limit
                                                                  : emulator::cache_bytes;
  return cudaSuccess;
}
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
inline cudaError_t cudaMallocAsync(void** memory, size_t bytes, cudaStream_t) {
  *memory = std::malloc(bytes);
  return *memory ? cudaSuccess : cudaErrorInvalidValue;
}
inline cudaError_t cudaFreeAsync(void* memory, cudaStream_t) {
  std::free(memory);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t) {
  ++emulator::machine().launches;
  std::memset(at, value, bytes);
  return cudaSuccess;
}

// Static shared memory of a kernel is known once it has run.
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel) {
  attributes->sharedSizeBytes = emulator::machine().static_bytes[kernel];
  return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  if (bytes < 0 || bytes + emulator::machine().static_bytes[kernel] > static_cast<size_t>(emulator::shared_limit))
    return cudaErrorInvalidValue;
  emulator::machine().dynamic_limits[kernel] = bytes;
  return cudaSuccess;
}

// As many as sm_90 has threads and shared memory for.
template <class... Parameters>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*kernel)(Parameters...), int threads,
                                                          size_t dynamic_bytes) {
  using namespace emulator;
  if (threads < 1) return cudaErrorInvalidValue;
  const void* key = reinterpret_cast<const void*>(kernel);
  const size_t shared = machine().static_bytes[key] + dynamic_bytes;
  const int by_threads = most_resident_threads / ((threads + 31) / 32 * 32),
            by_shared = kSharedOfAll / (shared + kSharedOfSystem);
  *blocks = by_threads < by_shared ? by_threads : by_shared;
  if (*blocks > kMaxResidentBlocks) *blocks = kMaxResidentBlocks;
  if (threads > kMaxThreads || shared > static_cast<size_t>(shared_limit)) *blocks = 0;
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  using namespace emulator;
  Machine& m = machine();
  const void* key = reinterpret_cast<const void*>(kernel);
  const unsigned blocks = config->gridDim.x;
  const int threads = config->blockDim.x;
  if (threads < 1 || threads > kMaxThreads || blocks < 1 || blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  const auto limit = m.dynamic_limits.find(key);
  const bool asked = limit != m.dynamic_limits.end();
  if (config->dynamicSmemBytes > (asked ? limit->second : kUnasked)) return cudaErrorInvalidValue;
  if (m.static_bytes[key] + config->dynamicSmemBytes > static_cast<size_t>(shared_limit)) return cudaErrorInvalidValue;
  int resident = 0;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, threads, config->dynamicSmemBytes);
  if (resident == 0) return cudaErrorLaunchOutOfResources;
  const bool cooperative = config->numAttrs > 0;
  if (cooperative && blocks > static_cast<unsigned>(resident * multiprocessor_count))
    return cudaErrorCooperativeLaunchTooLarge;
  m.kernel = key;
  m.allowed_shared = asked ? shared_limit : kUnasked;
  ++m.launches;
  blockDim = config->blockDim;
  gridDim = config->gridDim;
  m.body = [&] { kernel(arguments...); };
  if (cooperative)
    run_cooperative_grid(blocks, threads, config->dynamicSmemBytes);
  else
    run_grid(blocks, threads, config->dynamicSmemBytes);
  return cudaSuccess;
}
