// SPDX-License-Identifier: BSD-3-Clause
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "kernels/common/isa.h"
#include "kernels/common/parallel_for.h"
#include "kernels/tests/harness.h"

using namespace ssmkernels;
using namespace ssmkernels::test;

namespace {

void environment_chooses_the_set() {
  const char* wanted = std::getenv("SSMKERNELS_ISA");
  const bool runs = wanted && set_isa(wanted);  // a processor without it falls back on its best
  check(!runs || std::strcmp(isa_name(current_isa()), wanted) == 0, "SSMKERNELS_ISA is the set in use");
  check(current_isa() <= best_isa(), "the set in use runs here");
}

void set_isa_takes_known_names_only() {
  check(set_isa("baseline") && current_isa() == Isa::baseline, "baseline runs everywhere");
  check(!set_isa("sse9") && current_isa() == Isa::baseline, "an unknown name changes nothing");
  check(set_isa(isa_name(best_isa())) && current_isa() == best_isa(), "the best set has a name");
}

void parallel_for_hands_the_body_through() {
  std::vector<int> visits(17, 0);
  auto halves = [](int64_t n, RangeBody body) {
    body(n / 2, n);
    body(0, n / 2);
  };
  auto run = [&](ParallelFor parallel_for) {
    parallel_for(17, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) ++visits[i];
    });
  };
  run(halves);
  run(serial_for);
  bool twice = true;
  for (int count : visits) twice = twice && count == 2;
  check(twice, "each index is visited once by each parallel_for");
  serial_for(0, [&](int64_t, int64_t) { check(false, "an empty range has no body"); });
}

}  // namespace

int main() {
  context = isa_name(current_isa());
  environment_chooses_the_set();
  set_isa_takes_known_names_only();
  parallel_for_hands_the_body_through();
  return report();
}
