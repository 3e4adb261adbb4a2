// SPDX-License-Identifier: BSD-3-Clause
// Runs the checks that are compiled for one instruction set, where the processor has it. Compiled without its flags:
// with them main itself may hold its instructions, ahead of the question.
#include "kernels/common/isa.h"

#define SSM_NAME_OF(isa) #isa
#define SSM_NAME(isa) SSM_NAME_OF(isa)

namespace ssmkernels::SSM_ISA {
int failed_checks();
}

int main() {
  if (!ssmkernels::set_isa(SSM_NAME(SSM_ISA))) return 0;  // not on this processor
  return ssmkernels::SSM_ISA::failed_checks() != 0;
}
