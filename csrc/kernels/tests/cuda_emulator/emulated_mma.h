// SPDX-License-Identifier: BSD-3-Clause
// The functions of common/mma.cuh, written from the PTX ISA: fragment layouts of ldmatrix, mma.m16n8k16 and
// mma.m16n8k8, groups of cp.async.
#pragma once

#include <cuda_runtime.h>

#include "../half_types.h"

namespace ssmkernels::cuda {

inline unsigned char* dynamic_shared() {
  return emulator::machine().block->shared;
}

inline unsigned thread_here() {
  return threadIdx.x;
}

inline void copy_async(void* shared, const void* global, bool inside) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 || reinterpret_cast<uintptr_t>(global) % 16)
    emulator::fail("cp.async is not aligned");
  if (!emulator::is_shared(shared, 16)) emulator::fail("cp.async does not write shared memory");
  emulator::copies_here().open.push_back({shared, global, inside ? 16 : 0});
}
inline void copy_async_commit() {
  emulator::Copies& copies = emulator::copies_here();
  copies.groups.push_back(std::move(copies.open));
  copies.open.clear();
}
template <int kPending>
void copy_async_wait() {
  auto& groups = emulator::copies_here().groups;
  while (static_cast<int>(groups.size()) > kPending) {
    for (const emulator::Copy& copy : groups.front()) {
      std::memset(copy.to, 0, 16);
      std::memcpy(copy.to, copy.from, copy.bytes);
    }
    groups.erase(groups.begin());
  }
}

inline void check_matrix_row(const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16) emulator::fail("ldmatrix is not aligned");
  if (!emulator::is_shared(row, 16)) emulator::fail("ldmatrix does not read shared memory");
}

inline void load_matrices(uint32_t (&to)[4], const void* row) {
  check_matrix_row(row);
  const auto rows = emulator::exchange(static_cast<const unsigned char*>(row), "ldmatrix");
  const int lane = threadIdx.x % 32;
  for (int i = 0; i < 4; ++i) std::memcpy(&to[i], rows[8 * i + lane / 4] + lane % 4 * 4, 4);
}
inline void load_matrices_transposed(uint32_t (&to)[4], const void* row) {
  check_matrix_row(row);
  const auto rows = emulator::exchange(static_cast<const unsigned char*>(row), "ldmatrix.trans");
  const int lane = threadIdx.x % 32;
  for (int i = 0; i < 4; ++i) {
    uint16_t pair[2];
    for (int half = 0; half < 2; ++half) std::memcpy(&pair[half], rows[8 * i + lane % 4 * 2 + half] + lane / 4 * 2, 2);
    std::memcpy(&to[i], pair, 4);
  }
}

template <class Storage>
float half_value(uint16_t bits) {
  return std::is_same_v<Storage, bfloat16> ? host::bfloat_to_float(bits) : host::half_to_float(bits);
}

// What a warp multiplies, a [16, K] and b [K, 8], and the sums that the products are added to.
template <int K>
struct Product {
  using Four [[gnu::vector_size(16)]] = float;  // -O1 makes none
  float a[16][K];
  Four b[K][2], sum[16][2];  // eight columns
  bool added;

  void add() {
    for (int row = 0; row < 16; ++row) {
      Four left = sum[row][0], right = sum[row][1];
      for (int k = 0; k < K; ++k) {
        left += a[row][k] * b[k][0];
        right += a[row][k] * b[k][1];
      }
      sum[row][0] = left, sum[row][1] = right;
    }
    added = true;
  }
};

// This lane's four elements of sum += a b, of which `write` puts its parts into a product; the first lane after all
// have written multiplies for the warp.
template <int K, class Write>
void add_products(float (&sum)[4], Write write, const char* instruction) {
  static_assert(sizeof(Product<K>) <= sizeof(emulator::Exchange));
  const int row = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
  const auto write_all = [&](unsigned char* shown, int lane) {
    Product<K>& product = *reinterpret_cast<Product<K>*>(shown);
    product.added = false;
    for (int i = 0; i < 4; ++i) product.sum[row + i / 2 * 8][column / 4][column % 4 + i % 2] = sum[i];
    write(product, lane);
  };
  Product<K>& product = reinterpret_cast<Product<K>&>(emulator::exchange_parts(write_all, instruction));
  if (!product.added) product.add();
  for (int i = 0; i < 4; ++i) sum[i] = product.sum[row + i / 2 * 8][column / 4][column % 4 + i % 2];
}

// m16n8k16: a0 is (row g, k 2t…), a1 (g + 8, 2t…), a2 (g, 2t + 8…), a3 (g + 8, 2t + 8…); b0 is (k 2t…, column g), b1
// (2t + 8…, g).
template <class Storage>
void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const auto write = [&](Product<16>& product, int lane) {
    const int g = lane / 4, k = lane % 4 * 2;
    for (int half = 0; half < 2; ++half) {
      const auto value = [&](uint32_t pair) { return half_value<Storage>(static_cast<uint16_t>(pair >> 16 * half)); };
      for (int i = 0; i < 4; ++i) product.a[g + 8 * (i % 2)][k + 8 * (i / 2) + half] = value(a[i]);
      product.b[k + half][g / 4][g % 4] = value(b0);
      product.b[k + 8 + half][g / 4][g % 4] = value(b1);
    }
  };
  const char* instruction = std::is_same_v<Storage, bfloat16> ? "mma.bf16" : "mma.f16";
  add_products<16>(sum, write, instruction);
}

// m16n8k8 of tf32: a0 is (row g, k t), a1 (g + 8, t), a2 (g, t + 4), a3 (g + 8, t + 4); b0 is (k t, column g), b1 (t +
// 4, g).
template <>
inline void multiply_add<float>(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  for (uint32_t bits : {a[0], a[1], a[2], a[3], b0, b1})
    if (bits & 0x1fff) emulator::fail("an operand is not tf32");
  const auto write = [&](Product<8>& product, int lane) {
    const int g = lane / 4, k = lane % 4;
    for (int i = 0; i < 4; ++i) product.a[g + 8 * (i % 2)][k + 4 * (i / 2)] = __uint_as_float(a[i]);
    product.b[k][g / 4][g % 4] = __uint_as_float(b0);
    product.b[k + 4][g / 4][g % 4] = __uint_as_float(b1);
  };
  add_products<8>(sum, write, "mma.tf32");
}

// Round to nearest, ties away from zero, to 10 bits of fraction.
inline uint32_t to_tf32(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return std::isnan(x) ? 0x7fffe000 : (bits + 0x1000) & ~uint32_t{0x1fff};
}

template <class Storage>
uint32_t pack(float low, float high) {
  const auto round = [](float x) -> uint32_t {
    return std::is_same_v<Storage, bfloat16> ? host::float_to_bfloat(x) : host::float_to_half(x);
  };
  return round(low) | round(high) << 16;
}

inline float to_real(float16 x) {
  return host::half_to_float(x.bits);
}

inline float relu(float x) {
  return x <= 0 ? 0 : x;
}

inline float larger(float a, float b) {
  return a <= b ? b : a;
}

// As wrong as ex2.approx may be: up to 2 ulp, either way, by the argument. 2^0 is exact.
inline float exp2_of(float x) {
  const float power = x < -126 ? 0.0f : std::exp2(x);
  if (x == 0 || !(power > 0 && power < INFINITY)) return power;
  uint32_t argument, bits;
  std::memcpy(&argument, &x, sizeof argument);
  std::memcpy(&bits, &power, sizeof bits);
  const uint32_t wrong = bits + emulator::mix(0, argument) % 5 - 2;
  return __uint_as_float(wrong < 0x00800000 ? 0 : wrong);
}

}  // namespace ssmkernels::cuda
