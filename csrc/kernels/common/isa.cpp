// SPDX-License-Identifier: BSD-3-Clause
#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace ssmkernels {

namespace {

constexpr Isa kAll[] = {Isa::baseline, Isa::avx2, Isa::avx512};

bool find(const char* name, Isa* out) {
  for (Isa isa : kAll) {
    if (std::strcmp(name, isa_name(isa)) == 0 && isa <= best_isa()) {
      *out = isa;
      return true;
    }
  }
  return false;
}

std::atomic<Isa>& chosen() {
  static std::atomic<Isa> isa = [] {
    Isa wanted = best_isa();
    if (const char* name = std::getenv("SSMKERNELS_ISA")) find(name, &wanted);
    return wanted;
  }();
  return isa;
}

}  // namespace

Isa best_isa() {
#if defined(__x86_64__) && !defined(SSM_BASELINE_ONLY)
  static const Isa best = [] {
    __builtin_cpu_init();
#if defined(SSM_AVX512_LANES)
    if (__builtin_cpu_supports("avx") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
      return Isa::avx512;
#endif
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
      return Isa::avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
      return Isa::avx2;
    return Isa::baseline;
  }();
  return best;
#else
  return Isa::baseline;
#endif
}

Isa current_isa() {
  return chosen().load(std::memory_order_relaxed);
}

bool set_isa(const char* name) {
  Isa isa;
  if (!find(name, &isa)) return false;
  chosen().store(isa, std::memory_order_relaxed);
  return true;
}

const char* isa_name(Isa isa) {
  return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "baseline";
}

}  // namespace ssmkernels
