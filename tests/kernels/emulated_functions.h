// What the hardware's functions may be off by at most (CUDA C++ Programming Guide), now up, now down: a
// result that passes with these passes with the hardware's.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace emulated {

inline float off(double exact, double most, float of) {
  uint32_t bits;
  std::memcpy(&bits, &of, 4);
  const double direction = (bits * 2654435761u) >> 31 ? 1.0 : -1.0;
  return float(exact + direction * most);
}
inline double ulp(double x) { return std::ldexp(1.0, (x == 0 ? -149 : std::ilogb(x)) - 23); }

}  // namespace emulated

inline float __logf(float x) {
  const double exact = std::log(double(x));
  if (!std::isfinite(exact)) return float(exact);
  const bool near_one = x >= 0.5f && x <= 2.0f;
  return emulated::off(exact, near_one ? std::exp2(-21.41) : 3 * emulated::ulp(exact), x);
}
inline float rough_exp2f(float x) {
  const double exact = std::exp2(double(x));
  if (!std::isfinite(exact) || exact < 1.2e-38) return exact < 1.2e-38 ? 0.0f : float(exact);
  return emulated::off(exact, 2 * emulated::ulp(exact), x);
}
#define exp2f rough_exp2f
inline float __fdividef(float a, float b) {
  const double exact = double(a) / double(b);
  if (!std::isfinite(exact)) return float(exact);
  return emulated::off(exact, 2 * emulated::ulp(exact), a + b);
}
