// SPDX-License-Identifier: BSD-3-Clause
// The instruction sets a CPU kernel is compiled for, and the one in use. Every x.cpp of a kernel is compiled once per
// set with SSM_ISA defined as its name, and puts its code in namespace ssmkernels::SSM_ISA.
#pragma once

namespace ssmkernels {

enum class Isa { baseline, avx2, avx512 };

Isa best_isa();                  // the best this processor runs
Isa current_isa();               // the one in use: best_isa(), unless SSMKERNELS_ISA or set_isa says otherwise
bool set_isa(const char* name);  // "baseline", "avx2", "avx512"; false if unknown here
const char* isa_name(Isa isa);

}  // namespace ssmkernels

// SSM_PER_ISA(signature;) declares a kernel in each of those namespaces; SSM_CALL_ISA(name, args...) calls the one in
// use.
#if defined(__x86_64__) && !defined(SSM_BASELINE_ONLY)
#define SSM_PER_ISA(...)           \
  namespace ssmkernels::baseline { \
  __VA_ARGS__                      \
  }                                \
  namespace ssmkernels::avx2 {     \
  __VA_ARGS__                      \
  }                                \
  namespace ssmkernels::avx512 {   \
  __VA_ARGS__                      \
  }
#define SSM_CALL_ISA(name, ...)                                                                 \
  (ssmkernels::current_isa() == ssmkernels::Isa::avx512 ? ssmkernels::avx512::name(__VA_ARGS__) \
   : ssmkernels::current_isa() == ssmkernels::Isa::avx2 ? ssmkernels::avx2::name(__VA_ARGS__)   \
                                                        : ssmkernels::baseline::name(__VA_ARGS__))
#else
#define SSM_PER_ISA(...)           \
  namespace ssmkernels::baseline { \
  __VA_ARGS__                      \
  }
#define SSM_CALL_ISA(name, ...) ssmkernels::baseline::name(__VA_ARGS__)
#endif
