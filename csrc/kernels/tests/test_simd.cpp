// SPDX-License-Identifier: BSD-3-Clause
// The functions of vectors, in units of the last place of the exact value; compiled once per instruction set.
#include <cmath>
#include <cstdio>
#include <limits>

#include "kernels/common/simd.h"

namespace ssmkernels::SSM_ISA {
namespace {

int failures = 0;

template <class Real, class F, class Exact>
void check(const char* what, double low, double high, double ulps, const F& f, const Exact& exact) {
  double worst = 0, at = 0;
  constexpr int kSteps = 20000;
  for (int step = 0; step <= kSteps; ++step) {
    const Real x = static_cast<Real>(low + (high - low) * step / kSteps);
    const long double expected = exact(static_cast<long double>(x));
    const Real rounded = std::abs(static_cast<Real>(expected));
    const long double unit = std::nextafter(rounded, std::numeric_limits<Real>::infinity()) - rounded;
    const Vec<Real> values = f(broadcast(x));
    for (int lane = 0; lane < kLanes<Real>; ++lane) {
      const double error = static_cast<double>(std::abs(values[lane] - expected) / unit);
      if (!(error <= worst)) {
        worst = error;
        at = x;
      }
    }
  }
  if (worst <= ulps) return;
  std::fprintf(stderr, "failed: %s, %d bits: %.2f units in the last place at %g\n", what,
               static_cast<int>(8 * sizeof(Real)), worst, at);
  ++failures;
}

void check(const char* what, bool held) {
  if (held) return;
  std::fprintf(stderr, "failed: %s\n", what);
  ++failures;
}

template <class Real>
void run() {
  constexpr Real inf = std::numeric_limits<Real>::infinity(), smallest = std::numeric_limits<Real>::min();
  const auto exponential = [](long double x) { return std::exp(x); };
  const double lowest = sizeof(Real) == 4 ? -87.2 : -707.9, highest = sizeof(Real) == 4 ? 87 : 708;
  check<Real>("exp", lowest, 0, 1.25, [](Vec<Real> x) { return exp(x); }, exponential);
  check<Real>("exp", -1, 1, 1.25, [](Vec<Real> x) { return exp(x); }, exponential);
  check<Real>("exp", 0, highest, 1.25, [](Vec<Real> x) { return exp(x); }, exponential);
  check<Real>("exp_reduced", -kExpReduced, kExpReduced, 1.25, [](Vec<Real> x) { return exp_reduced(x); }, exponential);
  check("e^x below the smallest normal number is 0", exp(broadcast(static_cast<Real>(lowest - 1)))[0] == 0);
  check("e^-inf is 0", exp(broadcast(-inf))[0] == 0);
  check("e^NaN is NaN", std::isnan(exp(broadcast(std::numeric_limits<Real>::quiet_NaN()))[0]));
  const auto logarithm = [](long double x) { return std::log(x); };
  check<Real>("log", 1e-3, 0.7, 3.0, [](Vec<Real> x) { return log(x); }, logarithm);
  check<Real>("log", 1.5, 1e4, 3.0, [](Vec<Real> x) { return log(x); }, logarithm);
  check<Real>("log", smallest / 1024, smallest, 3.0, [](Vec<Real> x) { return log(x); }, logarithm);
  check<Real>(
      "log1p_unit", 1e-6, 1, 3.0, [](Vec<Real> x) { return log1p_unit(x); },
      [](long double x) { return std::log1p(x); });
  Vec<Real> ramp;
  for (int lane = 0; lane < kLanes<Real>; ++lane) ramp[lane] = static_cast<Real>(lane + 1);
  for (int count = 0; count <= kLanes<Real>; ++count) {
    const Vec<Real> kept = first_lanes<Real>(ramp, count, -2);
    for (int lane = 0; lane < kLanes<Real>; ++lane)
      check("first_lanes", kept[lane] == (lane < count ? ramp[lane] : Real(-2)));
  }
}

}  // namespace

int failed_checks() {
  run<float>();
  run<double>();
  return failures;
}

}  // namespace ssmkernels::SSM_ISA
