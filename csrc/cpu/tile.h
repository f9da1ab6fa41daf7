// Element-wise work on tiles of similarities: scaling, running statistics, soft-max gradients, stores.
#pragma once

#include "../common.h"

namespace fastuda {

// Largest deviation of equal similarities near 1 due to rounding.
template <class S>
constexpr S kRounding = 8 * std::numeric_limits<S>::epsilon();

// Running statistics of one row of similarities. Sums are of differences from the shift, so that a row with a
// small spread around a large mean keeps its variance.
template <class S>
struct RowStatistics {
  S best = -std::numeric_limits<S>::infinity();
  S shift = 0;
  int64_t best_block = 0;  // first block of columns that holds the best
  double sum = 0, squares = 0;

  S deviation(int64_t count) const {  // unbiased; 0 for a single value
    if (count < 2) return S(0);
    return S(std::sqrt(std::max((squares - sum * sum / count) / (count - 1), 0.0)));
  }
  // 1 if the deviation is only rounding, because the rounding of later products would be large relative to it
  S temperature(int64_t count) const {
    const S found = deviation(count);
    return found <= kRounding<S> * std::max(std::abs(best), S(1)) ? S(1) : found + S(1e-10);
  }
};

// Scales and bias of similarities, s_ij = row_scale_i key_scale_j product_ij + row_bias_i.
template <class S>
struct RowScale {
  S scale, bias;
  const S* key_scale;
};

// The weight, temperature and log-sum-exp of one row's cross-entropy.
template <class S>
struct RowTerm {
  S weight_over_t, inverse_t, lse;
};

// The same for the columns, as arrays over the columns of a tile.
template <class S>
struct ColumnTerm {
  const S *weight_over_t, *inverse_t, *lse;
};

// Mean similarity of a row's first products: the shift of its statistics.
float mean_row(const float* s, int64_t n, const RowScale<float>& scale);
double mean_row(const double* s, int64_t n, const RowScale<double>& scale);

// Products to similarities in place, and their statistics.
void scale_row(float* s, int64_t n, const RowScale<float>& scale, RowStatistics<float>& statistics);
void scale_row(double* s, int64_t n, const RowScale<double>& scale, RowStatistics<double>& statistics);

// The results for the columns of a tile from the rows seen so far: the best, its row, and
// sum exp((s - best) inverse_t).
template <class S>
struct ColumnBest {
  S* best;
  int32_t* index;
  const S* inverse_t;
  S* sum;
};

// Products to similarities in place, without statistics or biases; returns the largest of the row.
float scale_best(float* s, int64_t n, float scale, const float* key_scale);
double scale_best(double* s, int64_t n, double scale, const double* key_scale);

// Merges row `row` into the best of the columns.
void column_best(const float* s, int64_t n, int32_t row, const ColumnBest<float>& columns);
void column_best(const double* s, int64_t n, int32_t row, const ColumnBest<double>& columns);

// sum_j exp((s_j - best) inverse_t) of the row; also adds to the corresponding sums of the columns.
float sum_exp_both(const float* s, int64_t n, float best, float inverse_t, const ColumnBest<float>& columns);
double sum_exp_both(const double* s, int64_t n, double best, double inverse_t,
                    const ColumnBest<double>& columns);

// max_j s_j
float largest(const float* s, int64_t n);
double largest(const double* s, int64_t n);

// sum_j exp((s_j - best) inverse_t)
float sum_exp(const float* s, int64_t n, float best, float inverse_t);
double sum_exp(const double* s, int64_t n, double best, double inverse_t);

// w_j = exp((s_j - best) inverse_t), written as a product's operand, and their sum before rounding; n is at
// most kDepth.
template <class T, class S>
S store_softmax(const S* s, int64_t n, S best, S inverse_t, T* out);

// Products to w_i softmax_j(s_i / t_i) + v_j softmax_i(s_j / u_j) in place.
void softmax_row(float* s, int64_t n, const RowScale<float>& scale, const RowTerm<float>* row,
                 const ColumnTerm<float>* column);
void softmax_row(double* s, int64_t n, const RowScale<double>& scale, const RowTerm<double>* row,
                 const ColumnTerm<double>* column);

// One row i of the aggregation's backward against keys j, in place. w_ij = exp((x_ij - 1) / t_i - log_sum_i),
// because differences from the largest similarity are exact but quotients would be rounded:
//   s -> (h_ij + h_ji) scale_i scale_j, h_ij = w_ij (alpha weight_grad_ij - delta_i) / t_i
//   forward_grad (weight_grad_ij) -> alpha w_ij;  backward_grad (weight_grad_ji) -> alpha w_ji
// (h_ij + h_ji) x_ij is added to column_sum, and its sum over j is returned. Without backward_grad, computes
// only h_ij, for a similarity whose largest value is 0, and no sums.
template <class S>
struct AggregateTerm {
  S alpha, scale, bias, inverse_t, log_sum, delta;
  const S *key_scale, *key_inverse_t, *key_log_sum, *key_delta;
};
float aggregate_row(float* s, float* forward_grad, float* backward_grad, int64_t n,
                    const AggregateTerm<float>& term, float* column_sum);
double aggregate_row(double* s, double* forward_grad, double* backward_grad, int64_t n,
                     const AggregateTerm<double>& term, double* column_sum);

// out = a x + b y, for the last step of the aggregation; out may have another type than the sums.
template <class T, class S>
void mix_rows(S a, const T* x, S b, const S* y, int64_t n, T* out);

// y += a x
template <class T, class S>
void add_scaled(S a, const T* x, int64_t n, S* y);

// out_j = s_j scale_j
template <class T, class S>
void store_scaled(const S* s, const S* scale, int64_t n, T* out);

// out[j * ldo + r] = tile[r * lds + j] scale_r
template <class T, class S>
void store_transposed(const S* tile, int64_t lds, const S* scale, int64_t rows, int64_t columns, T* out,
                      int64_t ldo);

// sum of squares, and inner product, of rows
float sum_squares(const float* x, int64_t n);
float sum_squares(const BFloat16* x, int64_t n);
double sum_squares(const double* x, int64_t n);
float inner(const float* x, const float* y, int64_t n);
float inner(const float* x, const BFloat16* y, int64_t n);
float inner(const BFloat16* x, const BFloat16* y, int64_t n);
double inner(const double* x, const double* y, int64_t n);

// Gradient through x / max(|x|, 1e-12): out = inverse (g - c x), c = <g, x> inverse^2 (0 below the clamp).
template <class T, class S>
void unit_gradient(const S* g, const T* x, S norm, int64_t n, T* out);

// A row in its accumulation type, and its squares if requested.
template <class T>
void load_row(const T* from, int64_t n, acc_t<T>* x, acc_t<T>* square);

// log sum exp(k x) in one pass; -inf without a finite value.
template <class T>
double log_sum_exp(const T* x, int64_t n, acc_t<T> k);

// contrast_softmax, row by row: the statistics of given values; out = exp((x - best) inverse_t) and its sum;
// out = scale e; and the gradient (g - mean) y scale.
template <class T>
acc_t<T> mean_of(const T* x, int64_t n);
template <class T, class S>
void row_statistics(const T* x, int64_t n, RowStatistics<S>& statistics);
template <class T, class S>
S exp_row(const T* x, int64_t n, S best, S inverse_t, S* out);
template <class T, class S>
void scale_to(const S* e, S scale, int64_t n, T* out);
template <class T, class S>
void softmax_gradient(const T* g, const T* y, S mean, S scale, int64_t n, T* out);

// First index that holds the value.
int64_t first_index(const float* s, int64_t n, float value);
int64_t first_index(const double* s, int64_t n, double value);

}  // namespace fastuda
