// Row sweeps of batch_norm_act, one clone per instruction set. They take a few rows at a time, so that arrays
// over columns are rarely read and written.
#include "batch_norm_act.h"
#include "widen.h"

namespace fastuda {

namespace {

constexpr int kNear = 4;  // rows at a time

template <class Word>
constexpr bool kTwo = values_of<Word> == 2;

// The first and the second value of a word.
template <class T>
FASTUDA_INLINE acc_t<T> first(T word) {
  return widen(word);
}
FASTUDA_INLINE float first(uint32_t word) { return float_of(word << 16); }
template <class T>
FASTUDA_INLINE acc_t<T> second(T) {
  return 0;
}
FASTUDA_INLINE float second(uint32_t word) { return float_of(word & 0xffff0000u); }

template <class S, class T>
FASTUDA_INLINE void pack(S x, S, T* out) {
  narrow(x, out);
}
// Rounds to nearest even. A NaN that bfloat16 can hold stays NaN.
FASTUDA_INLINE uint32_t rounded(float x) {
  const uint32_t bits = bits_of(x);
  return bits + 0x7fff + ((bits >> 16) & 1);
}
FASTUDA_INLINE void pack(float x, float y, uint32_t* out) {
  *out = rounded(x) >> 16 | (rounded(y) & 0xffff0000u);
}

template <int near, class Word, class S>
FASTUDA_INLINE void add_rows(const Word* x, int64_t words, S* sums) {
#pragma omp simd
  for (int64_t j = 0; j < words; ++j) {
    S sum = 0, sum2 = 0;
#pragma GCC unroll 4
    for (int p = 0; p < near; ++p) {
      sum += first(x[p * words + j]);
      sum2 += second(x[p * words + j]);
    }
    sums[j] += sum;
    if constexpr (kTwo<Word>) sums[words + j] += sum2;
  }
}

template <int near, class Word, class S>
FASTUDA_INLINE void add_squares(const Word* x, int64_t words, const S* mean, S* squares) {
  const S* mean2 = mean + (kTwo<Word> ? words : 0);
#pragma omp simd
  for (int64_t j = 0; j < words; ++j) {
    S sum = 0, sum2 = 0;
#pragma GCC unroll 4
    for (int p = 0; p < near; ++p) {
      const S d = first(x[p * words + j]) - mean[j], d2 = second(x[p * words + j]) - mean2[j];
      sum += d * d;
      sum2 += d2 * d2;
    }
    squares[j] += sum;
    if constexpr (kTwo<Word>) squares[words + j] += sum2;
  }
}

// NaN is not clamped.
template <class S>
FASTUDA_INLINE S clamped(S z, S low, S high) {
  z = z < low ? low : z;
  return z > high ? high : z;
}

template <int near, class Word, class S>
FASTUDA_INLINE void clamp_near(const Word* x, const ClampedRows<S>& y, Word* out) {
  const S low = y.low, high = y.high;
  const int64_t words = y.words, next = kTwo<Word> ? words : 0;
  const S *scale = y.scale, *shift = y.shift, *scale2 = scale + next, *shift2 = shift + next;
#pragma omp simd
  for (int64_t j = 0; j < words; ++j) {
#pragma GCC unroll 4
    for (int p = 0; p < near; ++p) {
      const Word word = x[p * words + j];
      pack(clamped(first(word) * scale[j] + shift[j], low, high),
           clamped(second(word) * scale2[j] + shift2[j], low, high), out + p * words + j);
    }
  }
}

// The gradient of z; 0 where z is clamped.
template <class S>
FASTUDA_INLINE S passed(S grad, S z, S low, S high) {
  return z <= low || z >= high ? S(0) : grad;
}

template <int near, class Word, class S>
FASTUDA_INLINE void add_gradients(const Word* grad, const Word* x, const ClampedRows<S>& y, const S* mean,
                                  S* sums, S* alongs) {
  const S low = y.low, high = y.high;
  const int64_t words = y.words, next = kTwo<Word> ? words : 0;
  const S *scale = y.scale, *shift = y.shift, *scale2 = scale + next, *shift2 = shift + next,
          *mean2 = mean + next;
#pragma omp simd
  for (int64_t j = 0; j < words; ++j) {
    S sum = 0, along = 0, sum2 = 0, along2 = 0;
#pragma GCC unroll 4
    for (int p = 0; p < near; ++p) {
      const Word word = x[p * words + j], d = grad[p * words + j];
      const S v = first(word), g = passed(first(d), v * scale[j] + shift[j], low, high);
      sum += g;
      along += g * (v - mean[j]);
      const S v2 = second(word), g2 = passed(second(d), v2 * scale2[j] + shift2[j], low, high);
      sum2 += g2;
      along2 += g2 * (v2 - mean2[j]);
    }
    sums[j] += sum;
    alongs[j] += along;
    if constexpr (kTwo<Word>) {
      sums[words + j] += sum2;
      alongs[words + j] += along2;
    }
  }
}

// slope x + constant; without a slope x is not looked at, finite or not.
template <class S>
FASTUDA_INLINE S line(S slope, S x, S constant) {
  return slope * (slope == 0 ? S(0) : x) + constant;
}

template <int near, class Word, class S>
FASTUDA_INLINE void gradient_near(const Word* grad, const Word* x, const ClampedRows<S>& y, const S* mean,
                                  const S* slope, const S* constant, Word* out) {
  const S low = y.low, high = y.high;
  const int64_t words = y.words, next = kTwo<Word> ? words : 0;
  const S *scale = y.scale, *shift = y.shift, *scale2 = scale + next, *shift2 = shift + next,
          *mean2 = mean + next, *slope2 = slope + next, *constant2 = constant + next;
#pragma omp simd
  for (int64_t j = 0; j < words; ++j) {
#pragma GCC unroll 4
    for (int p = 0; p < near; ++p) {
      const Word word = x[p * words + j], d = grad[p * words + j];
      const S v = first(word), g = passed(first(d), v * scale[j] + shift[j], low, high);
      const S v2 = second(word), g2 = passed(second(d), v2 * scale2[j] + shift2[j], low, high);
      pack(scale[j] * g + line(slope[j], v - mean[j], constant[j]),
           scale2[j] * g2 + line(slope2[j], v2 - mean2[j], constant2[j]), out + p * words + j);
    }
  }
}

// Calls work(number of rows, first row), with kNear rows at a time.
template <class Work>
FASTUDA_INLINE void near_rows(int64_t rows, const Work& work) {
  int64_t i = 0;
  for (; i + kNear <= rows; i += kNear) work(std::integral_constant<int, kNear>(), i);
  for (; i < rows; ++i) work(std::integral_constant<int, 1>(), i);
}

template <class Word, class S>
FASTUDA_INLINE void moments_body(const Word* x, int64_t rows, int64_t words, S* mean, S* squares) {
  const int64_t width = words * values_of<Word>;
  std::fill_n(mean, width, S(0));
  std::fill_n(squares, width, S(0));
  near_rows(rows, [&](auto near, int64_t i)
                      __attribute__((always_inline)) { add_rows<near>(x + i * words, words, mean); });
  for (int64_t j = 0; j < width; ++j) mean[j] /= S(rows);
  near_rows(rows, [&](auto near, int64_t i) __attribute__((always_inline)) {
    add_squares<near>(x + i * words, words, mean, squares);
  });
}

template <class Word, class S>
FASTUDA_INLINE void clamp_body(const Word* x, const ClampedRows<S>& y, Word* out) {
  near_rows(y.rows, [&](auto near, int64_t i) __attribute__((always_inline)) {
    clamp_near<near>(x + i * y.words, y, out + i * y.words);
  });
}

template <class Word, class S>
FASTUDA_INLINE void gradients_body(const Word* grad, const Word* x, const ClampedRows<S>& y, const S* mean,
                                   S* sum, S* along) {
  near_rows(y.rows, [&](auto near, int64_t i) __attribute__((always_inline)) {
    add_gradients<near>(grad + i * y.words, x + i * y.words, y, mean, sum, along);
  });
}

template <class Word, class S>
FASTUDA_INLINE void gradient_body(const Word* grad, const Word* x, const ClampedRows<S>& y, const S* mean,
                                  const S* slope, const S* constant, Word* out) {
  near_rows(y.rows, [&](auto near, int64_t i) __attribute__((always_inline)) {
    gradient_near<near>(grad + i * y.words, x + i * y.words, y, mean, slope, constant, out + i * y.words);
  });
}

}  // namespace

// target_clones does not apply to templates, hence one named function per type of words.
#define NORM_SWEEPS(W, S, SUFFIX, CLONES)                                                                   \
  CLONES static void moments_##SUFFIX(const W* x, int64_t rows, int64_t words, S* mean, S* squares) {       \
    moments_body(x, rows, words, mean, squares);                                                            \
  }                                                                                                         \
  CLONES static void clamp_##SUFFIX(const W* x, const ClampedRows<S>& y, W* out) { clamp_body(x, y, out); } \
  CLONES static void gradients_##SUFFIX(const W* grad, const W* x, const ClampedRows<S>& y, const S* mean,  \
                                        S* sum, S* along) {                                                 \
    gradients_body(grad, x, y, mean, sum, along);                                                           \
  }                                                                                                         \
  CLONES static void gradient_##SUFFIX(const W* grad, const W* x, const ClampedRows<S>& y, const S* mean,   \
                                       const S* slope, const S* constant, W* out) {                         \
    gradient_body(grad, x, y, mean, slope, constant, out);                                                  \
  }                                                                                                         \
  template <>                                                                                               \
  void column_moments(const W* x, int64_t rows, int64_t words, S* mean, S* squares) {                       \
    moments_##SUFFIX(x, rows, words, mean, squares);                                                        \
  }                                                                                                         \
  template <>                                                                                               \
  void clamp_rows(const W* x, const ClampedRows<S>& y, W* out) {                                            \
    clamp_##SUFFIX(x, y, out);                                                                              \
  }                                                                                                         \
  template <>                                                                                               \
  void column_gradients(const W* grad, const W* x, const ClampedRows<S>& y, const S* mean, S* sum,          \
                        S* along) {                                                                         \
    gradients_##SUFFIX(grad, x, y, mean, sum, along);                                                       \
  }                                                                                                         \
  template <>                                                                                               \
  void gradient_rows(const W* grad, const W* x, const ClampedRows<S>& y, const S* mean, const S* slope,     \
                     const S* constant, W* out) {                                                           \
    gradient_##SUFFIX(grad, x, y, mean, slope, constant, out);                                              \
  }
NORM_SWEEPS(float, float, f, FASTUDA_CLONES)
NORM_SWEEPS(uint32_t, float, hh, FASTUDA_CLONES)
NORM_SWEEPS(BFloat16, float, h, FASTUDA_CLONES)
NORM_SWEEPS(double, double, d, )
#undef NORM_SWEEPS

}  // namespace fastuda
