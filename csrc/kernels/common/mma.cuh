// SPDX-License-Identifier: BSD-3-Clause
// The instructions that C++ has no name for: asynchronous copies, tensor core products and the loads that feed them,
// conversions. Fragment layouts are those of the PTX ISA, "warp-level matrix instructions". With g = lane/4 and t =
// lane%4, a thread holds of a 16×8 product the elements (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "dtype.h"

#ifdef SSM_CUDA_EMULATOR
#include <emulated_mma.h>
#else

namespace ssmkernels::cuda {

__device__ inline unsigned char* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}

// threadIdx.x, read where it stands: what is made of it is made again there, not kept in registers from before a loop.
__device__ inline unsigned thread_here() {
  unsigned thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

__device__ inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// 16 bytes from global to shared memory, or 16 zero bytes; both addresses are multiples of 16.
__device__ inline void copy_async(void* shared, const void* global, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(inside ? 16 : 0)
               : "memory");
}
__device__ inline void copy_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most kPending of this thread's groups are under way.
template <int kPending>
__device__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8×8 matrices of 2-byte elements; lane 8i + r gives the address of row r of matrix i.
__device__ inline void load_matrices(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ inline void load_matrices_transposed(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// sum += a·b: 16×16 by 16×8 of half types, 16×8 by 8×8 of tf32.
#define SSM_MMA(shape, type)                                                          \
  asm volatile("mma.sync.aligned." shape ".row.col.f32." type "." type                \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])               \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
template <class Storage>
__device__ void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ inline void multiply_add<bfloat16>(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  SSM_MMA("m16n8k16", "bf16");
}
template <>
__device__ inline void multiply_add<float16>(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  SSM_MMA("m16n8k16", "f16");
}
template <>
__device__ inline void multiply_add<float>(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  SSM_MMA("m16n8k8", "tf32");
}
#undef SSM_MMA

__device__ inline uint32_t to_tf32(float x) {
  uint32_t out;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(out) : "f"(x));
  return out;
}

// Two values rounded to half types in one register, `low` in its low half.
template <class Storage>
__device__ uint32_t pack(float low, float high);
template <>
__device__ inline uint32_t pack<bfloat16>(float low, float high) {
  uint32_t out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}
template <>
__device__ inline uint32_t pack<float16>(float low, float high) {
  uint32_t out;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}

__device__ inline float to_real(float16 x) {
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(x.bits));
  return out;
}

// NaN stays NaN, which fmaxf(x, 0) would lose. One instruction too.
__device__ inline float relu(float x) {
  float out;
  asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(out) : "f"(x));
  return out;
}

// The maximum; NaN where a is.
__device__ inline float larger(float a, float b) {
  float out;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(out) : "f"(a), "f"(b));
  return out;
}

// 2^x within 2 ulp; subnormal results are 0.
__device__ inline float exp2_of(float x) {
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}

}  // namespace ssmkernels::cuda

#endif

namespace ssmkernels::cuda {

__device__ inline double relu(double x) {
  return x <= 0 ? 0 : x;
}

__device__ inline double larger(double a, double b) {
  return a <= b ? b : a;
}

__device__ inline double exp2_of(double x) {
  return exp2(x);
}

__device__ inline float to_real(float x) {
  return x;
}
__device__ inline double to_real(double x) {
  return x;
}
__device__ inline float to_real(bfloat16 x) {
  return __uint_as_float(uint32_t{x.bits} << 16);
}

// Round to nearest even.
template <class Storage>
__device__ Storage from_real(Compute<Storage> x) {
  if constexpr (sizeof(Storage) == 2)
    return {static_cast<uint16_t>(pack<Storage>(x, 0.0f))};
  else
    return x;
}

}  // namespace ssmkernels::cuda
