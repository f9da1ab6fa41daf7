// Row sweeps of batch_norm_act, one clone per instruction set. A few rows in one go, so that what belongs to
// a column is seldom read and written.
#include "batch_norm_act.h"
#include "widen.h"

namespace fastuda {

namespace {

constexpr int kNear = 4;  // rows in one go

template <int near, class T, class S>
FASTUDA_INLINE void add_rows(const T* x, int64_t width, S* sums) {
#pragma omp simd
  for (int64_t j = 0; j < width; ++j) {
    S sum = 0;
#pragma GCC unroll 4
    for (int p = 0; p < near; ++p) sum += widen(x[p * width + j]);
    sums[j] += sum;
  }
}

template <int near, class T, class S>
FASTUDA_INLINE void add_squares(const T* x, int64_t width, const S* mean, S* squares) {
#pragma omp simd
  for (int64_t j = 0; j < width; ++j) {
    S sum = 0;
#pragma GCC unroll 4
    for (int p = 0; p < near; ++p) {
      const S d = widen(x[p * width + j]) - mean[j];
      sum += d * d;
    }
    squares[j] += sum;
  }
}

// NaN is not clamped.
template <class S>
FASTUDA_INLINE S clamped(S z, S low, S high) {
  z = z < low ? low : z;
  return z > high ? high : z;
}

template <int near, class T, class S>
FASTUDA_INLINE void clamp_near(const T* x, const ClampedRows<S>& y, T* out) {
  const S low = y.low, high = y.high;
  const int64_t width = y.width;
#pragma omp simd
  for (int64_t j = 0; j < width; ++j) {
    const S scale = y.scale[j], shift = y.shift[j];
#pragma GCC unroll 4
    for (int p = 0; p < near; ++p) {
      narrow(clamped(widen(x[p * width + j]) * scale + shift, low, high), out + p * width + j);
    }
  }
}

// The gradient of z, which a clamped one does not have.
template <class T, class S>
FASTUDA_INLINE S passed(T grad, S z, S low, S high) {
  return z <= low || z >= high ? S(0) : widen(grad);
}

template <int near, class T, class S>
FASTUDA_INLINE void add_gradients(const T* grad, const T* x, const ClampedRows<S>& y, const S* mean, S* sums,
                                  S* alongs) {
  const S low = y.low, high = y.high;
  const int64_t width = y.width;
#pragma omp simd
  for (int64_t j = 0; j < width; ++j) {
    const S scale = y.scale[j], shift = y.shift[j], less = mean[j];
    S sum = 0, along = 0;
#pragma GCC unroll 4
    for (int p = 0; p < near; ++p) {
      const S value = widen(x[p * width + j]);
      const S g = passed(grad[p * width + j], value * scale + shift, low, high);
      sum += g;
      along += g * (value - less);
    }
    sums[j] += sum;
    alongs[j] += along;
  }
}

template <int near, class T, class S>
FASTUDA_INLINE void gradient_near(const T* grad, const T* x, const ClampedRows<S>& y, const S* mean,
                                  const S* slope, const S* constant, T* out) {
  const S low = y.low, high = y.high;
  const int64_t width = y.width;
#pragma omp simd
  for (int64_t j = 0; j < width; ++j) {
    const S scale = y.scale[j], shift = y.shift[j], by_x = slope[j], less = mean[j], more = constant[j];
#pragma GCC unroll 4
    for (int p = 0; p < near; ++p) {
      const S value = widen(x[p * width + j]);
      const S g = passed(grad[p * width + j], value * scale + shift, low, high);
      narrow(scale * g + by_x * (value - less) + more, out + p * width + j);
    }
  }
}

// Calls work(how many rows, the first of them), kNear at a time.
template <class Work>
FASTUDA_INLINE void near_rows(int64_t rows, const Work& work) {
  int64_t i = 0;
  for (; i + kNear <= rows; i += kNear) work(std::integral_constant<int, kNear>(), i);
  for (; i < rows; ++i) work(std::integral_constant<int, 1>(), i);
}

template <class T, class S>
FASTUDA_INLINE void moments_body(const T* x, int64_t rows, int64_t width, S* mean, S* squares) {
  std::fill_n(mean, width, S(0));
  std::fill_n(squares, width, S(0));
  near_rows(rows, [&](auto near, int64_t i)
                      __attribute__((always_inline)) { add_rows<near>(x + i * width, width, mean); });
  for (int64_t j = 0; j < width; ++j) mean[j] /= S(rows);
  near_rows(rows, [&](auto near, int64_t i) __attribute__((always_inline)) {
    add_squares<near>(x + i * width, width, mean, squares);
  });
}

template <class T, class S>
FASTUDA_INLINE void clamp_body(const T* x, const ClampedRows<S>& y, T* out) {
  near_rows(y.rows, [&](auto near, int64_t i) __attribute__((always_inline)) {
    clamp_near<near>(x + i * y.width, y, out + i * y.width);
  });
}

template <class T, class S>
FASTUDA_INLINE void gradients_body(const T* grad, const T* x, const ClampedRows<S>& y, const S* mean, S* sum,
                                   S* along) {
  near_rows(y.rows, [&](auto near, int64_t i) __attribute__((always_inline)) {
    add_gradients<near>(grad + i * y.width, x + i * y.width, y, mean, sum, along);
  });
}

template <class T, class S>
FASTUDA_INLINE void gradient_body(const T* grad, const T* x, const ClampedRows<S>& y, const S* mean,
                                  const S* slope, const S* constant, T* out) {
  near_rows(y.rows, [&](auto near, int64_t i) __attribute__((always_inline)) {
    gradient_near<near>(grad + i * y.width, x + i * y.width, y, mean, slope, constant, out + i * y.width);
  });
}

}  // namespace

// target_clones does not apply to templates: one named function per element type.
#define NORM_SWEEPS(T, S, SUFFIX, CLONES)                                                                   \
  CLONES static void moments_##SUFFIX(const T* x, int64_t rows, int64_t width, S* mean, S* squares) {       \
    moments_body(x, rows, width, mean, squares);                                                            \
  }                                                                                                         \
  CLONES static void clamp_##SUFFIX(const T* x, const ClampedRows<S>& y, T* out) { clamp_body(x, y, out); } \
  CLONES static void gradients_##SUFFIX(const T* grad, const T* x, const ClampedRows<S>& y, const S* mean,  \
                                        S* sum, S* along) {                                                 \
    gradients_body(grad, x, y, mean, sum, along);                                                           \
  }                                                                                                         \
  CLONES static void gradient_##SUFFIX(const T* grad, const T* x, const ClampedRows<S>& y, const S* mean,   \
                                       const S* slope, const S* constant, T* out) {                         \
    gradient_body(grad, x, y, mean, slope, constant, out);                                                  \
  }                                                                                                         \
  template <>                                                                                               \
  void column_moments(const T* x, int64_t rows, int64_t width, S* mean, S* squares) {                       \
    moments_##SUFFIX(x, rows, width, mean, squares);                                                        \
  }                                                                                                         \
  template <>                                                                                               \
  void clamp_rows(const T* x, const ClampedRows<S>& y, T* out) {                                            \
    clamp_##SUFFIX(x, y, out);                                                                              \
  }                                                                                                         \
  template <>                                                                                               \
  void column_gradients(const T* grad, const T* x, const ClampedRows<S>& y, const S* mean, S* sum,          \
                        S* along) {                                                                         \
    gradients_##SUFFIX(grad, x, y, mean, sum, along);                                                       \
  }                                                                                                         \
  template <>                                                                                               \
  void gradient_rows(const T* grad, const T* x, const ClampedRows<S>& y, const S* mean, const S* slope,     \
                     const S* constant, T* out) {                                                           \
    gradient_##SUFFIX(grad, x, y, mean, slope, constant, out);                                              \
  }
NORM_SWEEPS(float, float, f, FASTUDA_CLONES)
NORM_SWEEPS(BFloat16, float, h, FASTUDA_CLONES)
NORM_SWEEPS(double, double, d, )
#undef NORM_SWEEPS

}  // namespace fastuda
