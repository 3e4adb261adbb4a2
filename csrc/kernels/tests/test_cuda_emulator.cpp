// SPDX-License-Identifier: BSD-3-Clause
// The emulator finds what a GPU would not forgive: small kernels, each with one fault planted in it, run in a process
// of their own. Each is reported: the process ends with the words expected of it, a launch returns that error, or the
// result is not what it should be under one of a few seeds. Each has a twin without the fault, of which nothing is
// reported.
#include <cuda_runtime.h>
#include <sys/wait.h>

#include <cstdio>
#include <functional>
#include <string>
#include <vector>

#include "../common/cuda.cuh"
#include "../common/mma.cuh"

namespace {

using namespace ssmkernels;
using namespace ssmkernels::cuda;

constexpr int kThreads = 128;
constexpr int64_t kKiB = 1024;

struct alignas(16) Vector {
  float values[4];
};

alignas(16) float results[2048];

bool counts_up() {
  for (int t = 0; t < kThreads; ++t)
    if (!(results[t] == static_cast<float>(t))) return false;
  return true;
}
const char* verdict(bool right) {
  return right ? nullptr : "wrong result";
}

// Launches as CUDA does, with nothing asked for beforehand.
template <class... Parameters>
const char* plain_launch(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, size_t shared_bytes,
                         bool cooperative, std::type_identity_t<Parameters>... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.attrs = &attribute;
  config.numAttrs = cooperative;
  return message(cudaLaunchKernelEx(&config, kernel, arguments...));
}

// Neighbours' values through static shared memory, with and without the barriers between.
template <bool kBefore, bool kBetween>
__global__ void turn_around(float* out) {
  SSM_SHARED(values, float[kThreads]);
  float sum = 0;
  for (int round = 0; round < 2; ++round) {
    if (kBefore) __syncthreads();
    values[threadIdx.x] = static_cast<float>(round == 0 ? threadIdx.x : kThreads - 1 - threadIdx.x);
    if (kBetween) __syncthreads();
    sum += values[kThreads - 1 - threadIdx.x];
  }
  out[threadIdx.x] = sum - static_cast<float>(kThreads - 1 - threadIdx.x);
}

template <bool kBarrier>
__global__ void turn_around_in_warp(float* out) {
  SSM_SHARED(values, float[kThreads]);
  values[threadIdx.x] = static_cast<float>(threadIdx.x ^ 31);
  if (kBarrier) __syncwarp();
  out[threadIdx.x] = values[threadIdx.x ^ 31];
}

// A tree whose last barrier is missing: what one warp has written the others read.
template <bool kBarrier>
__global__ void broadcast(float* out) {
  SSM_SHARED(base, float);
  if (threadIdx.x == 40) base = 7;
  if (kBarrier) __syncthreads();
  out[threadIdx.x] = static_cast<float>(threadIdx.x) + base - 7;
}

// A counter in shared memory that nobody sets to zero.
template <bool kStatic, bool kSets>
__global__ void count_in_shared(float* out) {
  SSM_SHARED(fixed, unsigned);
  unsigned* counter = kStatic ? &fixed : reinterpret_cast<unsigned*>(dynamic_shared());
  if (kSets && threadIdx.x == 0) *counter = 0;
  __syncthreads();
  atomicAdd(counter, 1u);
  __syncthreads();
  out[threadIdx.x] = static_cast<float>(*counter - kThreads + threadIdx.x);
}

// A sum that starts from what shared memory held.
template <bool kSets>
__global__ void add_to_shared(float* out) {
  float* sums = reinterpret_cast<float*>(dynamic_shared());
  if (kSets) sums[threadIdx.x] = 0;
  sums[threadIdx.x] += static_cast<float>(threadIdx.x);
  out[threadIdx.x] = sums[threadIdx.x];
}

// What a block leaves in shared memory the next one does not find there.
__global__ void pass_on(float* out, bool starts) {
  SSM_SHARED(value, float[kThreads]);
  if (blockIdx.x == 0 || starts) value[threadIdx.x] = static_cast<float>(threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = value[threadIdx.x];
}

__global__ void write_shared(float* out, int count) {
  float* values = reinterpret_cast<float*>(dynamic_shared());
  for (int i = threadIdx.x; i < count; i += kThreads) values[i] = 1;
  out[threadIdx.x] = static_cast<float>(threadIdx.x);
}

__global__ void write_static(float* out, int count) {
  SSM_SHARED(values, float[kThreads]);
  float* to = values;
  for (int i = threadIdx.x; i < count; i += kThreads) to[i] = 1;
  out[threadIdx.x] = static_cast<float>(threadIdx.x);
}

// As float64 absdiff has it: neither kind of shared memory is more than 48 KiB, both together are.
__global__ void both_kinds(float* out) {
  SSM_SHARED(values, float[kThreads * 22]);
  float* others = reinterpret_cast<float*>(dynamic_shared());
  values[threadIdx.x] = others[threadIdx.x] = static_cast<float>(threadIdx.x);
  out[threadIdx.x] = values[threadIdx.x];
}

template <bool kWaits>
__global__ void copy_and_read(const float* in, float* out) {
  float* values = reinterpret_cast<float*>(dynamic_shared());
  if (threadIdx.x < kThreads / 4) copy_async(values + 4 * threadIdx.x, in + 4 * threadIdx.x, true);
  copy_async_commit();
  if (kWaits) copy_async_wait<0>();
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x];
  copy_async_wait<0>();
}

__global__ void copy_one(const float* in, float* out, int to, int from) {
  if (threadIdx.x == 0) copy_async(reinterpret_cast<float*>(dynamic_shared()) + to, in + from, true);
  copy_async_commit();
  copy_async_wait<0>();
  out[threadIdx.x] = static_cast<float>(threadIdx.x);
}

__global__ void copy_to_global(const float* in, float* out) {
  if (threadIdx.x == 0) copy_async(out + kThreads, in, true);
  copy_async_commit();
  copy_async_wait<0>();
  out[threadIdx.x] = static_cast<float>(threadIdx.x);
}

template <bool kWaits>
__global__ void leave_with_copies(const float* in, float* out) {
  copy_async(reinterpret_cast<float*>(dynamic_shared()) + 4 * threadIdx.x, in, true);
  copy_async_commit();
  if (kWaits) copy_async_wait<0>();
  out[threadIdx.x] = static_cast<float>(threadIdx.x);
}

__global__ void load_rows(float* out, int pitch) {
  uint16_t* rows = reinterpret_cast<uint16_t*>(dynamic_shared());
  for (int i = threadIdx.x; i < 32 * 16; i += kThreads) rows[i] = 0;
  __syncthreads();
  uint32_t matrices[4];
  load_matrices(matrices, rows + threadIdx.x % 32 * pitch);
  out[threadIdx.x] = static_cast<float>(threadIdx.x + matrices[0]);
}

__global__ void shuffle_in_branch(float* out, int lanes) {
  float x = 0;
  if (threadIdx.x % 32 < static_cast<unsigned>(lanes)) x = __shfl_xor_sync(kAllLanes, x, 1);
  out[threadIdx.x] = static_cast<float>(threadIdx.x) + x;
}

__global__ void wait_in_branch(float* out, bool all) {
  if (all || threadIdx.x < 32) __syncthreads();
  if (!all && threadIdx.x >= 32) __syncwarp();
  if (!all && threadIdx.x < 32 && threadIdx.x % 2) __syncthreads();
  if (!all && threadIdx.x < 32 && threadIdx.x % 2 == 0) __syncwarp();
  out[threadIdx.x] = static_cast<float>(threadIdx.x);
}

__global__ void meet(float* out, unsigned long long* arrivals, unsigned blocks) {
  cuda::barrier(arrivals, blocks);
  out[threadIdx.x] = static_cast<float>(threadIdx.x);
}

// An exponential that is taken for exact.
__global__ void trust_exponential(float* out, bool exact) {
  const float x = static_cast<float>(threadIdx.x % 16) / 8 + 0.3f;
  const bool same = exact || exp2_of(x) == static_cast<float>(exp2_of(static_cast<double>(x)));
  out[threadIdx.x] = same ? static_cast<float>(threadIdx.x) : -1;
}

__global__ void operand_as_it_is(float* out, bool rounds) {
  float sum[4] = {};
  const float third = 1.0f / 3;
  uint32_t bits;
  std::memcpy(&bits, &third, sizeof bits);
  const uint32_t operand = rounds ? to_tf32(third) : bits, a[4] = {operand, operand, operand, operand};
  multiply_add<float>(sum, a, operand, operand);
  out[threadIdx.x] = static_cast<float>(threadIdx.x);
}

// Runs what has the fault or has not: null, or what a launch said.
using Run = std::function<const char*(bool fault)>;
struct Planted {
  const char* name;
  const char* report;  // what is said of it
  Run run;
};

const char* launched(const char* error) {
  return error ? error : verdict(counts_up());
}

const std::vector<Planted>& all_planted() {
  alignas(16) static float in[2 * kThreads];
  for (int i = 0; i < 2 * kThreads; ++i) in[i] = static_cast<float>(i);
  static unsigned long long arrivals[1];
  static const auto run = [](auto kernel, int64_t shared_bytes, auto... arguments) {
    return launched(launch(kernel, 1, kThreads, shared_bytes, nullptr, arguments...));
  };
  static const std::vector<Planted> planted{
      {"no barrier before shared memory is read", "wrong result",
       [](bool fault) { return run(fault ? turn_around<true, false> : turn_around<true, true>, 0, results); }},
      {"no barrier before shared memory is written again", "wrong result",
       [](bool fault) { return run(fault ? turn_around<false, true> : turn_around<true, true>, 0, results); }},
      {"no barrier of the warp", "wrong result",
       [](bool fault) { return run(fault ? turn_around_in_warp<false> : turn_around_in_warp<true>, 0, results); }},
      {"no barrier after one thread has written", "wrong result",
       [](bool fault) { return run(fault ? broadcast<false> : broadcast<true>, 0, results); }},
      {"a counter in static shared memory is not set", "wrong result",
       [](bool fault) { return run(fault ? count_in_shared<true, false> : count_in_shared<true, true>, 0, results); }},
      {"a counter in dynamic shared memory is not set", "wrong result",
       [](bool fault) {
         return run(fault ? count_in_shared<false, false> : count_in_shared<false, true>, 16, results);
       }},
      {"a sum in shared memory does not start from 0", "wrong result",
       [](bool fault) {
         return run(fault ? add_to_shared<false> : add_to_shared<true>, kThreads * sizeof(float), results);
       }},
      {"a block relies on the shared memory of the one before", "wrong result",
       [](bool fault) { return launched(launch(pass_on, 2, kThreads, 0, nullptr, results, !fault)); }},
      {"dynamic shared memory is written past its end", "signal",
       [](bool fault) { return run(write_shared, kThreads * sizeof(float), results, kThreads + (fault ? 4 : 0)); }},
      {"static shared memory is written past its end", "written past its end",
       [](bool fault) { return run(write_static, 0, results, kThreads + (fault ? 1 : 0)); }},
      {"more than 48 KiB of dynamic shared memory without asking", "invalid argument",
       [](bool fault) {
         return launched(plain_launch(write_shared, 1, kThreads, (fault ? 49 : 48) * kKiB, false, results, kThreads));
       }},
      {"static and dynamic shared memory make more than 48 KiB without asking", "together are more",
       [](bool fault) {
         return launched(plain_launch(both_kinds, 1, kThreads, (fault ? 42 : 37) * kKiB, false, results));
       }},
      {"the attribute leaves no space for static shared memory", "invalid argument",
       [](bool fault) {
         if (const char* error = plain_launch(both_kinds, 1, kThreads, kKiB, false, results)) return error;
         const int bytes = 227 * kKiB - (fault ? 0 : kThreads * 22 * sizeof(float));
         return message(cudaFuncSetAttribute(reinterpret_cast<const void*>(both_kinds),
                                             cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
       }},
      {"more shared memory than a block may have", "invalid argument",
       [](bool fault) { return run(write_shared, (fault ? 228 : 227) * kKiB, results, kThreads); }},
      {"a launch of no blocks", "invalid configuration",
       [](bool fault) {
         return launched(plain_launch(write_static, fault ? 0 : 1, kThreads, 0, false, results, kThreads));
       }},
      {"more than 2^31 - 1 blocks", "invalid configuration",
       [](bool fault) {
         return launched(plain_launch(write_static, fault ? 0x80000000u : 1, kThreads, 0, false, results, kThreads));
       }},
      {"more than 1,024 threads", "invalid configuration",
       [](bool fault) {
         return launched(plain_launch(meet, 1, fault ? 1056 : 1024, 0, false, results, arrivals, 1u));
       }},
      {"a cooperative grid that does not fit", "cooperative launch",
       [](bool fault) {
         const unsigned blocks = 16 * emulator::multiprocessor_count + fault;  // 2,048 threads a multiprocessor
         return launched(plain_launch(meet, blocks, kThreads, 0, true, results, arrivals, blocks));
       }},
      {"a cooperative grid whose shared memory does not fit", "cooperative launch",
       [](bool fault) {
         const unsigned blocks = 4 * emulator::multiprocessor_count + fault;  // four times 48 + 1 KiB of 228
         return launched(plain_launch(meet, blocks, kThreads, 48 * kKiB, true, results, arrivals, blocks));
       }},
      {"blocks that wait for each other without a cooperative launch", "not cooperative",
       [](bool fault) { return launched(plain_launch(meet, 2, kThreads, 0, !fault, results, arrivals, 2u)); }},
      {"an asynchronous copy is read before it is waited for", "wrong result",
       [](bool fault) {
         return run(fault ? copy_and_read<false> : copy_and_read<true>, kThreads * sizeof(float), in, results);
       }},
      {"cp.async to an address that is no multiple of 16", "cp.async is not aligned",
       [](bool fault) { return run(copy_one, 64, in, results, fault ? 2 : 4, 4); }},
      {"cp.async from an address that is no multiple of 16", "cp.async is not aligned",
       [](bool fault) { return run(copy_one, 64, in, results, 4, fault ? 2 : 4); }},
      {"cp.async to global memory", "does not write shared memory",
       [](bool fault) { return fault ? run(copy_to_global, 64, in, results) : run(copy_one, 64, in, results, 0, 0); }},
      {"a thread ends with copies under way", "copies under way",
       [](bool fault) {
         return run(fault ? leave_with_copies<false> : leave_with_copies<true>, 16 * kThreads, in, results);
       }},
      {"ldmatrix from rows of 24 bytes", "ldmatrix is not aligned",
       [](bool fault) { return run(load_rows, 2048, results, fault ? 12 : 8); }},
      {"ldmatrix past the end of shared memory", "ldmatrix does not read shared memory",
       [](bool fault) { return run(load_rows, 1024, results, fault ? 24 : 16); }},
      {"a shuffle that half of a warp takes", "do not meet",
       [](bool fault) { return run(shuffle_in_branch, 0, results, fault ? 16 : 32); }},
      {"a barrier that some of a warp's lanes take", "do not meet",
       [](bool fault) { return run(wait_in_branch, 0, results, !fault); }},
      {"ex2.approx is taken for exact", "wrong result",
       [](bool fault) { return run(trust_exponential, 0, results, !fault); }},
      {"an operand of the tensor cores that was not rounded to tf32", "is not tf32",
       [](bool fault) { return run(operand_as_it_is, 0, results, !fault); }},
  };
  return planted;
}

// What is reported of a run, in a process of its own; empty for nothing.
std::string report_of(const Planted& planted, bool fault, unsigned seed) {
  int ends[2];
  if (pipe(ends) != 0) std::abort();
  const pid_t child = fork();
  if (child == 0) {
    dup2(ends[1], STDERR_FILENO);
    close(ends[0]);
    emulator::seed = seed;
    const char* error = planted.run(fault);
    if (error) std::fprintf(stderr, "%s", error);
    std::fflush(stderr);
    _exit(0);
  }
  close(ends[1]);
  std::string said;
  char buffer[512];
  for (ssize_t got; (got = read(ends[0], buffer, sizeof buffer)) > 0;) said.append(buffer, static_cast<size_t>(got));
  close(ends[0]);
  int status = 0;
  waitpid(child, &status, 0);
  if (said.empty() && WIFSIGNALED(status)) said = "ended by a signal";
  return said;
}

}  // namespace

int main() {
  constexpr unsigned kSeeds = 4;
  int failed = 0;
  for (const Planted& planted : all_planted()) {
    bool found = false;
    std::string said;
    for (unsigned seed = 0; seed < kSeeds; ++seed) {
      const std::string report = report_of(planted, true, seed), twin = report_of(planted, false, seed);
      if (!report.empty()) said = report;
      found |= report.find(planted.report) != std::string::npos;
      if (twin.empty()) continue;
      ++failed;
      std::printf("FAILED %s: reported where it is not: %s\n", planted.name, twin.c_str());
    }
    failed += !found;
    std::printf("%s %s%s%s\n", found ? "found" : "MISSED", planted.name, found ? "" : ": ", found ? "" : said.c_str());
  }
  std::printf("%zu faults, %d failed\n", all_planted().size(), failed);
  return failed > 0;
}
