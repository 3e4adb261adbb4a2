// SPDX-License-Identifier: BSD-3-Clause
// How a long op is interrupted. Known to the bindings and to the Python module, which do not know each other's headers.
#pragma once

#include <atomic>

namespace ssmkernels::binding {

// Called now and then, in the thread that called the op; it throws to end the op. Python's module has it look for
// signals (module.cpp); null without Python.
using InterruptCheck = void (*)();
inline std::atomic<InterruptCheck> interrupt_check = nullptr;

}  // namespace ssmkernels::binding
