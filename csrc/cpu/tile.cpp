// Sweeps over tiles of similarities: scaling, running statistics, soft-max and its gradients.
#include "tile.h"

#include "gemm.h"
#include "widen.h"

namespace fastuda {

namespace {

template <class S>
FASTUDA_INLINE void scale_row_body(S* s, int64_t n, const RowScale<S>& scale, RowStatistics<S>& statistics) {
  const S a = scale.scale, bias = scale.bias, shift = statistics.shift;
  const S* key = scale.key_scale;
  S best = statistics.best, sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum, squares) reduction(max : best)
  for (int64_t j = 0; j < n; ++j) {
    const S x = s[j] * a * key[j] + bias;
    s[j] = x;
    best = x > best ? x : best;
    const S d = x - shift;
    sum += d;
    squares += d * d;
  }
  statistics.best = best;
  statistics.sum += sum;
  statistics.squares += squares;
}

template <class S>
FASTUDA_INLINE S mean_row_body(const S* s, int64_t n, const RowScale<S>& scale) {
  const S* key = scale.key_scale;
  S sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) sum += s[j] * key[j];
  return sum / n * scale.scale + scale.bias;
}

template <class S>
FASTUDA_INLINE S scale_best_body(S* s, int64_t n, S scale, const S* key_scale) {
  S best = -std::numeric_limits<S>::infinity();
#pragma omp simd reduction(max : best)
  for (int64_t j = 0; j < n; ++j) {
    const S x = s[j] * scale * key_scale[j];
    s[j] = x;
    best = x > best ? x : best;
  }
  return best;
}

template <class S>
FASTUDA_INLINE void column_best_body(const S* s, int64_t n, int32_t row, const ColumnBest<S>& columns) {
  S* best = columns.best;
  int32_t* index = columns.index;
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const bool more = s[j] > best[j];
    best[j] = more ? s[j] : best[j];
    index[j] = more ? row : index[j];
  }
}

template <class S>
FASTUDA_INLINE S sum_exp_both_body(const S* s, int64_t n, S best, S inverse_t, const ColumnBest<S>& columns) {
  const S *column_best = columns.best, *column_inverse_t = columns.inverse_t;
  S *column_sum = columns.sum, sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) {
    sum += fast_exp((s[j] - best) * inverse_t);
    column_sum[j] += fast_exp((s[j] - column_best[j]) * column_inverse_t[j]);
  }
  return sum;
}

template <class S>
FASTUDA_INLINE S largest_body(const S* s, int64_t n) {
  S best = -std::numeric_limits<S>::infinity();
#pragma omp simd reduction(max : best)
  for (int64_t j = 0; j < n; ++j) best = s[j] > best ? s[j] : best;
  return best;
}

template <class S>
FASTUDA_INLINE S sum_exp_body(const S* s, int64_t n, S best, S inverse_t) {
  S sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) sum += fast_exp((s[j] - best) * inverse_t);
  return sum;
}

template <class S>
FASTUDA_INLINE int64_t first_index_body(const S* s, int64_t n, S value) {
  constexpr int64_t step = 64;
  for (int64_t j = 0; j < n; j += step) {
    const int64_t end = j + step < n ? j + step : n;
    int found = 0;
#pragma omp simd reduction(| : found)
    for (int64_t k = j; k < end; ++k) found |= s[k] == value;
    for (int64_t k = j; found && k < end; ++k) {
      if (s[k] == value) return k;
    }
  }
  return 0;  // a row of NaN has no maximum
}

// At most kDepth values, because a loop that both sums and rounds to another type is not vectorised well.
template <class T, class S>
FASTUDA_INLINE S store_softmax_body(const S* s, int64_t n, S best, S inverse_t, T* out) {
  S room[kDepth], *w = room;
  if constexpr (std::is_same_v<T, S>) w = out;
  S sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) {
    w[j] = fast_exp((s[j] - best) * inverse_t);
    sum += w[j];
  }
  if constexpr (!std::is_same_v<T, S>) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) narrow(w[j], out + j);
  }
  return sum;
}

template <class S>
FASTUDA_INLINE void softmax_row_body(S* s, int64_t n, const RowScale<S>& scale, const RowTerm<S>* row,
                                     const ColumnTerm<S>* column) {
  const S a = scale.scale, bias = scale.bias;
  const S* key = scale.key_scale;
  if (row && column) {
    const RowTerm<S> r = *row;
    const ColumnTerm<S> c = *column;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      const S x = s[j] * a * key[j] + bias;
      s[j] = r.weight_over_t * fast_exp(x * r.inverse_t - r.lse) +
             c.weight_over_t[j] * fast_exp(x * c.inverse_t[j] - c.lse[j]);
    }
  } else if (row) {
    const RowTerm<S> r = *row;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      const S x = s[j] * a * key[j] + bias;
      s[j] = r.weight_over_t * fast_exp(x * r.inverse_t - r.lse);
    }
  } else {
    const ColumnTerm<S> c = *column;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      const S x = s[j] * a * key[j] + bias;
      s[j] = c.weight_over_t[j] * fast_exp(x * c.inverse_t[j] - c.lse[j]);
    }
  }
}

template <class S>
FASTUDA_INLINE S aggregate_row_body(S* s, S* forward, S* backward, int64_t n, const AggregateTerm<S>& term,
                                    S* column_sum) {
  const AggregateTerm<S> i = term;
  S row_sum = 0;
  if (!backward) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      const S w = fast_exp((s[j] * i.scale * i.key_scale[j] + i.bias) * i.inverse_t - i.log_sum);
      s[j] = w * (i.alpha * forward[j] - i.delta) * i.inverse_t * i.scale * i.key_scale[j];
      forward[j] = i.alpha * w;
    }
    return row_sum;
  }
#pragma omp simd reduction(+ : row_sum)
  for (int64_t j = 0; j < n; ++j) {
    const S scale = i.scale * i.key_scale[j], x = s[j] * scale;
    const S w = fast_exp((x - 1) * i.inverse_t - i.log_sum);
    const S v = fast_exp((x - 1) * i.key_inverse_t[j] - i.key_log_sum[j]);
    const S h = w * (i.alpha * forward[j] - i.delta) * i.inverse_t +
                v * (i.alpha * backward[j] - i.key_delta[j]) * i.key_inverse_t[j];
    s[j] = h * scale;
    forward[j] = i.alpha * w;
    backward[j] = i.alpha * v;
    column_sum[j] += h * x;
    row_sum += h * x;
  }
  return row_sum;
}

}  // namespace

FASTUDA_CLONES void scale_row(float* s, int64_t n, const RowScale<float>& scale,
                              RowStatistics<float>& statistics) {
  scale_row_body(s, n, scale, statistics);
}
void scale_row(double* s, int64_t n, const RowScale<double>& scale, RowStatistics<double>& statistics) {
  scale_row_body(s, n, scale, statistics);
}

FASTUDA_CLONES float mean_row(const float* s, int64_t n, const RowScale<float>& scale) {
  return mean_row_body(s, n, scale);
}
double mean_row(const double* s, int64_t n, const RowScale<double>& scale) {
  return mean_row_body(s, n, scale);
}

FASTUDA_CLONES float scale_best(float* s, int64_t n, float scale, const float* key_scale) {
  return scale_best_body(s, n, scale, key_scale);
}
double scale_best(double* s, int64_t n, double scale, const double* key_scale) {
  return scale_best_body(s, n, scale, key_scale);
}

FASTUDA_CLONES void column_best(const float* s, int64_t n, int32_t row, const ColumnBest<float>& columns) {
  column_best_body(s, n, row, columns);
}
void column_best(const double* s, int64_t n, int32_t row, const ColumnBest<double>& columns) {
  column_best_body(s, n, row, columns);
}

FASTUDA_CLONES float sum_exp_both(const float* s, int64_t n, float best, float inverse_t,
                                  const ColumnBest<float>& columns) {
  return sum_exp_both_body(s, n, best, inverse_t, columns);
}
double sum_exp_both(const double* s, int64_t n, double best, double inverse_t,
                    const ColumnBest<double>& columns) {
  return sum_exp_both_body(s, n, best, inverse_t, columns);
}

FASTUDA_CLONES float largest(const float* s, int64_t n) { return largest_body(s, n); }
double largest(const double* s, int64_t n) { return largest_body(s, n); }

FASTUDA_CLONES float sum_exp(const float* s, int64_t n, float best, float inverse_t) {
  return sum_exp_body(s, n, best, inverse_t);
}
double sum_exp(const double* s, int64_t n, double best, double inverse_t) {
  return sum_exp_body(s, n, best, inverse_t);
}

FASTUDA_CLONES int64_t first_index(const float* s, int64_t n, float value) {
  return first_index_body(s, n, value);
}
int64_t first_index(const double* s, int64_t n, double value) { return first_index_body(s, n, value); }

FASTUDA_CLONES void softmax_row(float* s, int64_t n, const RowScale<float>& scale, const RowTerm<float>* row,
                                const ColumnTerm<float>* column) {
  softmax_row_body(s, n, scale, row, column);
}
void softmax_row(double* s, int64_t n, const RowScale<double>& scale, const RowTerm<double>* row,
                 const ColumnTerm<double>* column) {
  softmax_row_body(s, n, scale, row, column);
}

FASTUDA_CLONES float aggregate_row(float* s, float* forward, float* backward, int64_t n,
                                   const AggregateTerm<float>& term, float* column_sum) {
  return aggregate_row_body(s, forward, backward, n, term, column_sum);
}
double aggregate_row(double* s, double* forward, double* backward, int64_t n,
                     const AggregateTerm<double>& term, double* column_sum) {
  return aggregate_row_body(s, forward, backward, n, term, column_sum);
}

// target_clones does not apply to templates, hence one named function per element type.
FASTUDA_CLONES static float softmax_f(const float* s, int64_t n, float b, float t, float* out) {
  return store_softmax_body(s, n, b, t, out);
}
FASTUDA_CLONES static float softmax_h(const float* s, int64_t n, float b, float t, BFloat16* out) {
  return store_softmax_body(s, n, b, t, out);
}

template <>
float store_softmax(const float* s, int64_t n, float b, float t, float* out) {
  return softmax_f(s, n, b, t, out);
}
template <>
float store_softmax(const float* s, int64_t n, float b, float t, BFloat16* out) {
  return softmax_h(s, n, b, t, out);
}
template <>
double store_softmax(const double* s, int64_t n, double b, double t, double* out) {
  return store_softmax_body(s, n, b, t, out);
}

}  // namespace fastuda
