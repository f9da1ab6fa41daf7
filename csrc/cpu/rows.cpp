// Row sweeps of contrast_softmax, the prototypes and the poolings, one clone per instruction set and element
// type.
#include "tile.h"
#include "widen.h"

namespace fastuda {

namespace {

template <class T>
FASTUDA_INLINE acc_t<T> mean_of_body(const T* x, int64_t n) {
  acc_t<T> sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) sum += widen(x[j]);
  return sum / n;
}

template <class T, class S>
FASTUDA_INLINE void row_statistics_body(const T* x, int64_t n, RowStatistics<S>& statistics) {
  const S shift = statistics.shift;
  S best = statistics.best, sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum, squares) reduction(max : best)
  for (int64_t j = 0; j < n; ++j) {
    const S value = widen(x[j]), d = value - shift;
    best = value > best ? value : best;
    sum += d;
    squares += d * d;
  }
  statistics.best = best;
  statistics.sum = sum;
  statistics.squares = squares;
}

template <class T, class S>
FASTUDA_INLINE S exp_row_body(const T* x, int64_t n, S best, S inverse_t, S* out) {
  S sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) {
    const S e = fast_exp((S(widen(x[j])) - best) * inverse_t);
    out[j] = e;
    sum += e;
  }
  return sum;
}

template <class T, class S>
FASTUDA_INLINE void scale_to_body(const S* e, S scale, int64_t n, T* out) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) narrow(e[j] * scale, out + j);
}

template <class T, class S>
FASTUDA_INLINE void softmax_gradient_body(const T* g, const T* y, S mean, S scale, int64_t n, T* out) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) narrow((widen(g[j]) - mean) * widen(y[j]) * scale, out + j);
}

template <class T, class S>
FASTUDA_INLINE void load_body(const T* from, int64_t n, S* x, S* square) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) x[j] = widen(from[j]);
  if (!square) return;
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) square[j] = x[j] * x[j];
}

template <class T, class S>
FASTUDA_INLINE double log_sum_exp_body(const T* x, int64_t n, S k) {
  constexpr int64_t kBlock = 1024;  // values that are read twice, the second time from the cache
  S best = -std::numeric_limits<S>::infinity();
  double total = 0;
  for (int64_t j0 = 0; j0 < n; j0 += kBlock) {
    const int64_t j1 = std::min(n, j0 + kBlock);
    S higher = best, sum = 0;
#pragma omp simd reduction(max : higher)
    for (int64_t j = j0; j < j1; ++j) {
      const S value = k * S(widen(x[j]));
      higher = value > higher ? value : higher;
    }
    const S shift = std::isinf(higher) ? S(0) : higher;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = j0; j < j1; ++j) sum += fast_exp(k * S(widen(x[j])) - shift);
    total = (higher > best ? total * std::exp(double(best - higher)) : total) + sum;
    best = higher;
  }
  return best + std::log(total);
}

}  // namespace

// target_clones does not apply to templates, so each instance calls a named function of its element type.
#define ROW_SWEEPS(T, S, SUFFIX, CLONES)                                                             \
  CLONES static S mean_##SUFFIX(const T* x, int64_t n) { return mean_of_body(x, n); }                \
  template <>                                                                                        \
  S mean_of(const T* x, int64_t n) {                                                                 \
    return mean_##SUFFIX(x, n);                                                                      \
  }                                                                                                  \
  CLONES static void statistics_##SUFFIX(const T* x, int64_t n, RowStatistics<S>& out) {             \
    row_statistics_body(x, n, out);                                                                  \
  }                                                                                                  \
  CLONES static S exp_##SUFFIX(const T* x, int64_t n, S best, S inverse_t, S* out) {                 \
    return exp_row_body(x, n, best, inverse_t, out);                                                 \
  }                                                                                                  \
  CLONES static void scale_##SUFFIX(const S* e, S scale, int64_t n, T* out) {                        \
    scale_to_body(e, scale, n, out);                                                                 \
  }                                                                                                  \
  CLONES static void gradient_##SUFFIX(const T* g, const T* y, S mean, S scale, int64_t n, T* out) { \
    softmax_gradient_body(g, y, mean, scale, n, out);                                                \
  }                                                                                                  \
  CLONES static void load_##SUFFIX(const T* from, int64_t n, S* x, S* square) {                      \
    load_body(from, n, x, square);                                                                   \
  }                                                                                                  \
  CLONES static double log_sum_exp_##SUFFIX(const T* x, int64_t n, S k) {                            \
    return log_sum_exp_body(x, n, k);                                                                \
  }                                                                                                  \
  template <>                                                                                        \
  void load_row(const T* from, int64_t n, S* x, S* square) {                                         \
    load_##SUFFIX(from, n, x, square);                                                               \
  }                                                                                                  \
  template <>                                                                                        \
  double log_sum_exp(const T* x, int64_t n, S k) {                                                   \
    return log_sum_exp_##SUFFIX(x, n, k);                                                            \
  }                                                                                                  \
  template <>                                                                                        \
  void row_statistics(const T* x, int64_t n, RowStatistics<S>& out) {                                \
    statistics_##SUFFIX(x, n, out);                                                                  \
  }                                                                                                  \
  template <>                                                                                        \
  S exp_row(const T* x, int64_t n, S best, S inverse_t, S* out) {                                    \
    return exp_##SUFFIX(x, n, best, inverse_t, out);                                                 \
  }                                                                                                  \
  template <>                                                                                        \
  void scale_to(const S* e, S scale, int64_t n, T* out) {                                            \
    scale_##SUFFIX(e, scale, n, out);                                                                \
  }                                                                                                  \
  template <>                                                                                        \
  void softmax_gradient(const T* g, const T* y, S mean, S scale, int64_t n, T* out) {                \
    gradient_##SUFFIX(g, y, mean, scale, n, out);                                                    \
  }

ROW_SWEEPS(float, float, f, FASTUDA_CLONES)
ROW_SWEEPS(BFloat16, float, h, FASTUDA_CLONES)
ROW_SWEEPS(double, double, d, )
#undef ROW_SWEEPS

}  // namespace fastuda
