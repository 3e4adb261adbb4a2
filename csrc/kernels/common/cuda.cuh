// SPDX-License-Identifier: BSD-3-Clause
// What the CUDA kernels share: how one is launched, how device memory handed in as one piece is cut up, sums over a
// warp and a block.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <set>
#include <type_traits>
#include <utility>

#include "dtype.h"

namespace ssmkernels::cuda {

inline constexpr unsigned kAllLanes = 0xffffffffu;

// Stands for log 0 where −inf would make NaN of a difference, of numbers that are not large. References of sums start
// halfway, so that 2^(kLogZero − reference) is 0.
template <class Real>
inline constexpr Real kLogZero = Real(-1e30);

template <class T>
constexpr __host__ __device__ T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

// Null, or what went wrong.
inline const char* message(cudaError_t status) {
  if (status == cudaSuccess) return nullptr;
  cudaGetLastError();  // an error that is returned is not left behind for someone else's check
  return cudaGetErrorString(status);
}

// Static shared memory of a kernel: SSM_SHARED(sums, Real[kWarps][32]) declares `sums` of that type. The emulator of
// the tests, which counts it, has its own.
#ifndef SSM_SHARED
#define SSM_SHARED(name, ...) __shared__ std::type_identity_t<__VA_ARGS__> name
#endif

// 1 where there is no device: what comes next fails there anyway.
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, attribute, device);
  return value;
}

// Lets a kernel have as much dynamic shared memory as the device has beside its static: beyond 48 KiB, both counted, it
// has to ask. Once per kernel and device and to the most there is, so that calls of different sizes in several threads
// do not take it from each other.
inline const char* allow_shared_memory(const void* kernel) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;
  int device = 0;
  if (const char* error = message(cudaGetDevice(&device))) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.contains({kernel, device})) return nullptr;
  cudaFuncAttributes attributes{};
  if (const char* error = message(cudaFuncGetAttributes(&attributes, kernel))) return error;
  const int most =
      device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - static_cast<int>(attributes.sharedSizeBytes);
  if (const char* error = message(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most)))
    return error;
  allowed.insert({kernel, device});
  return nullptr;
}

// How many blocks of a kernel run at once on this device; 0 where it cannot launch.
template <class... Parameters>
int64_t resident_blocks(void (*kernel)(Parameters...), int threads, int64_t shared_bytes) {
  int blocks = 0;
  const cudaError_t status =
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, static_cast<size_t>(shared_bytes));
  if (message(status)) return 0;
  return int64_t{blocks} * device_attribute(cudaDevAttrMultiProcessorCount);
}

// Launches a one-dimensional grid. Nothing is launched for no blocks. The blocks of a cooperative grid all run at once,
// or it fails.
template <bool kCooperative = false, class... Parameters>
const char* launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared_bytes,
                   cudaStream_t stream, std::type_identity_t<Parameters>... arguments) {
  if (blocks == 0) return nullptr;
  if (blocks > 0x7fffffff) return "the problem needs more than 2^31 - 1 thread blocks";
  if (shared_bytes > 0)
    if (const char* error = allow_shared_memory(reinterpret_cast<const void*>(kernel))) return error;
  cudaLaunchAttribute cooperative{};
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &cooperative;
  config.numAttrs = kCooperative;
  return message(cudaLaunchKernelEx(&config, kernel, arguments...));
}

// Cuts one piece of device memory into arrays. Over a null pointer it only adds up the bytes.
class Workspace {
 public:
  explicit Workspace(void* memory) : memory_(static_cast<char*>(memory)) {}
  template <class T>
  T* take(int64_t count) {
    char* piece = memory_ + used_;
    used_ += ceil_div<int64_t>(count * sizeof(T), 256) * 256;
    return reinterpret_cast<T*>(piece);
  }
  int64_t bytes() const {
    return used_;
  }

 private:
  char* memory_;
  int64_t used_ = 0;
};

template <class T>
constexpr __host__ __device__ T max(T a, T b) {
  return a > b ? a : b;
}
__device__ inline float max(float a, float b) {
  return fmaxf(a, b);  // one instruction
}
template <class T>
constexpr __host__ __device__ T min(T a, T b) {
  return a < b ? a : b;
}

// Lets the compiler know that p, which came through memory, points to global memory.
template <class T>
__device__ T* in_global(T* p) {
  __builtin_assume(__isGlobal(p));
  return p;
}

// Sums in a fixed tree: the same bits in every lane, and in every run.
template <class Real>
__device__ Real warp_sum(Real x) {
  for (int lane = 16; lane > 0; lane /= 2) x += __shfl_xor_sync(kAllLanes, x, lane);
  return x;
}
template <class Real>
__device__ Real warp_max(Real x) {
  for (int lane = 16; lane > 0; lane /= 2) x = max(x, __shfl_xor_sync(kAllLanes, x, lane));
  return x;
}

// ‖x‖ = norm/scale of element(k), k < size, spread over the lanes of a warp. In double, and of doubles whose squares
// leave its range, of the vector times a power of two.
struct ScaledNorm {
  double norm, scale;
};
template <class F>
__device__ ScaledNorm warp_norm(int64_t size, F element) {
  const int lane = threadIdx.x % 32;
  double squares = 0, largest = 0;
  for (int64_t k = lane; k < size; k += 32)
    squares += static_cast<double>(element(k)) * static_cast<double>(element(k));
  squares = warp_sum(squares);
  if (squares > 1e-280 && squares < 1e300) return {sqrt(squares), 1};
  for (int64_t k = lane; k < size; k += 32) {
    const double magnitude = fabs(static_cast<double>(element(k)));
    if (magnitude > largest) largest = magnitude;  // not NaN, of which lanes would find different maxima
  }
  largest = warp_max(largest);
  if (!(largest > 0 && largest < INFINITY)) return {sqrt(squares), 1};
  int exponent;
  frexp(largest, &exponent);
  const double scale = ldexp(1.0, min(1 - exponent, 1000));
  squares = 0;
  for (int64_t k = lane; k < size; k += 32) squares += element(k) * scale * (element(k) * scale);
  return {sqrt(warp_sum(squares)), scale};
}

// The same over a block of kWarps warps, through `scratch` in shared memory.
template <int kWarps, class Real>
__device__ Real block_sum(Real x, Real* scratch) {
  x = warp_sum(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  Real sum = 0;
  for (int warp = 0; warp < kWarps; ++warp) sum += scratch[warp];
  return sum;
}
template <class Real>
__device__ Real block_max(Real x, Real* scratch, int warps) {
  x = warp_max(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  Real top = scratch[0];
  for (int warp = 1; warp < warps; ++warp) top = max(top, scratch[warp]);
  return top;
}
template <int kWarps, class Real>
__device__ Real block_max(Real x, Real* scratch) {
  return block_max(x, scratch, kWarps);
}

// Barrier of `blocks` blocks of a cooperative grid; what they wrote before it they all read after it. `arrivals` starts
// at 0 and only grows.
__device__ inline void barrier(unsigned long long* arrivals, unsigned blocks) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    const unsigned long long before = atomicAdd(arrivals, 1ull), all = (before / blocks + 1) * blocks;
    while (*static_cast<volatile unsigned long long*>(arrivals) < all) __nanosleep(20);
    __threadfence();
  }
  __syncthreads();
}

}  // namespace ssmkernels::cuda
