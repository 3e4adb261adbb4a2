// SPDX-License-Identifier: BSD-3-Clause
// When conjugate gradients stop in one column; the same on CPU and GPU. laplacian_solve.h says what is asked of the
// residual.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#ifdef SSM_ISA
#define SSM_HOST_DEVICE
namespace ssmkernels::SSM_ISA {
#else
#define SSM_HOST_DEVICE __host__ __device__
namespace ssmkernels::cuda {
#endif

SSM_HOST_DEVICE inline double magnitude(double x) {
  return x < 0 ? -x : x;
}
SSM_HOST_DEVICE inline double largest_or_nan(double a, double b) {
  return b > a || b != b ? b : a;
}

// n with 2^(n − 1) <= x < 2^n; 0 where x is not above 0.
SSM_HOST_DEVICE inline int exponent_of(double x) {
  if (!(x > 0)) return 0;
  const bool is_subnormal = x < 0x1p-1022;
  if (is_subnormal) x *= 0x1p54;
  int64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return static_cast<int>(bits >> 52) - 1022 - (is_subnormal ? 54 : 0);
}

// 2^n in two factors, as the ratio of two numbers may leave the range that their product with a third is in.
class PowerOf2 {
 public:
  PowerOf2() = default;
  SSM_HOST_DEVICE explicit PowerOf2(int n) : first_(power(n / 2)), second_(power(n - n / 2)) {}
  SSM_HOST_DEVICE double operator*(double x) const {
    return x * first_ * second_;
  }
  SSM_HOST_DEVICE PowerOf2 inverse() const {
    PowerOf2 out;
    out.first_ = 1 / first_;
    out.second_ = 1 / second_;
    return out;
  }

 private:
  SSM_HOST_DEVICE static double power(int n) {
    const int64_t bits = (int64_t{n < -1022 ? -1022 : n > 1022 ? 1022 : n} + 1023) << 52;
    double out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
  }

  double first_ = 1, second_ = 1;
};

// A row is balanced where its residual is at most this share of its terms, |u_i x_i| + Σ_j |A_ij (x_i − x_j)| + |b_i| …
inline constexpr double kBalanced = 0.1;
// … or what double precision resolves: this share of A_ii |x_i|, with a margin, …
inline constexpr double kResolved = 1e-12;
// … and this share of A_ii ‖x‖_∞: where the solution is 0 there is nothing to balance but the rounding of the rest.
inline constexpr double kRounding = 2e-15;

SSM_HOST_DEVICE inline double imbalance(double residual, double terms, double diagonal, double x, double largest) {
  const double excess = magnitude(residual) - diagonal * (kResolved * magnitude(x) + kRounding * largest);
  return excess > 0 ? excess / terms : 0;
}

// The iterations run until their own residual, that of the recurrence, says that a column is done. Then the residual of
// its solution is computed. If that is larger (in float32, rounding makes the two drift apart), the column starts again
// from it; if a row is not balanced, it goes on. It is given up where starting again does not halve the residual.
class Convergence {
 public:
  Convergence() = default;
  SSM_HOST_DEVICE Convergence(bool is_finite, bool has_right_side, double rtol, int64_t max_iter)
      : is_finite_(is_finite),
        has_right_side_(has_right_side),
        has_ended_(!is_finite || !has_right_side),
        rtol_(rtol),
        max_iter_(max_iter) {}

  SSM_HOST_DEVICE void end() {
    has_ended_ = true;
  }

  // ‖D⁻¹b‖², and whether b is not 0 in a row of zeros.
  SSM_HOST_DEVICE void set_right_side(double squares, bool is_out_of_range) {
    norm_ = std::sqrt(squares);
    is_out_of_range_ = is_out_of_range;
    // The squares vanish beside a start that is larger by more than the square root of the range: what the residual is
    // relative to b remains unknown.
    is_lost_ = has_right_side_ && !is_out_of_range && squares == 0;
    if (is_lost_) has_ended_ = true;
  }

  // Of the residual of the solution: r·M⁻¹r with the preconditioner M, ‖D⁻¹r‖², and the largest imbalance of a row.
  SSM_HOST_DEVICE void measure(double along, double squares, double imbalance) {
    measured_along_ = along;
    measured_squares_ = squares;
    relative_ = norm_ > 0 ? std::sqrt(squares) / norm_ : 0;
    imbalance_ = imbalance;
  }

  // Whether the column goes on from what was measured.
  SSM_HOST_DEVICE bool judge() {
    const bool is_solved = relative_ <= rtol_ && imbalance_ <= kBalanced,
               is_stuck = restarts_ && !(relative_ <= last_ / 2);
    if (is_solved || is_stuck || iterations_ >= max_iter_ || relative_ != relative_) has_ended_ = true;
    is_active_ = false;
    if (has_ended_) return false;
    const bool is_first = last_ == std::numeric_limits<double>::infinity();
    const double target = relative_ <= rtol_ ? relative_ / 10 : is_first ? rtol_ : rtol_ / 2;
    limit_ = target * norm_ * target * norm_;
    last_ = relative_;
    restarts_ = !(measured_squares_ <= 4 * squares_);
    if (restarts_) {
      along_ = measured_along_;
      squares_ = measured_squares_;
      beta_ = 0;
    }
    return is_active_ = true;
  }

  // The length of a step along p, from p·A p and p·p (p·D p in the scaled system); 0 where none is taken.
  SSM_HOST_DEVICE double step(double curvature, double length) {
    if (!is_active_) return 0;
    const double relative = length > 0 ? curvature / length : 0;
    if (relative < curvature_) curvature_ = relative;
    if (relative > 0) return along_ / curvature;
    is_active_ = false;
    has_ended_ = true;
    return 0;
  }

  // After a step, of the residual of the recurrence; whether another follows.
  SSM_HOST_DEVICE bool advance(double along, double squares) {
    if (!is_active_) return false;
    ++iterations_;
    beta_ = along / along_;
    along_ = along;
    squares_ = squares;
    return is_active_ = squares > limit_ && along > 0 && iterations_ < max_iter_;
  }

  SSM_HOST_DEVICE bool is_finite() const {
    return is_finite_;
  }
  SSM_HOST_DEVICE bool has_right_side() const {
    return has_right_side_;
  }
  SSM_HOST_DEVICE bool is_active() const {
    return is_active_;
  }
  SSM_HOST_DEVICE bool restarts() const {
    return restarts_;
  }
  SSM_HOST_DEVICE double beta() const {
    return beta_;
  }
  SSM_HOST_DEVICE int64_t iterations() const {
    return iterations_;
  }
  SSM_HOST_DEVICE double curvature() const {
    return curvature_;
  }
  SSM_HOST_DEVICE double residual() const {
    if (!is_finite_) return std::numeric_limits<double>::quiet_NaN();
    if (!has_right_side_) return 0;
    if (is_lost_) return std::numeric_limits<double>::infinity();
    const double unsolved = is_out_of_range_ && imbalance_ < 1 ? 1 : imbalance_;
    return unsolved > kBalanced && unsolved > relative_ ? unsolved : relative_;
  }

 private:
  bool is_finite_ = true, has_right_side_ = false, is_out_of_range_ = false, is_lost_ = false;
  bool has_ended_ = true, is_active_ = false, restarts_ = false;
  double rtol_ = 0, norm_ = 0, limit_ = 0;
  double along_ = 0, squares_ = 0, beta_ = 0;  // of the recurrence
  double measured_along_ = 0, measured_squares_ = 0, relative_ = 0, imbalance_ = 0;
  double last_ = std::numeric_limits<double>::infinity();  // ‖D⁻¹r‖/‖D⁻¹b‖ when it went on
  double curvature_ = std::numeric_limits<double>::infinity();
  int64_t iterations_ = 0, max_iter_ = 0;
};
}
