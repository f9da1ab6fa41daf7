// Sums and products of rows, and stores in the type of the result.
#include "tile.h"
#include "transpose.h"
#include "widen.h"

namespace fastuda {

namespace {

template <class T, class S>
FASTUDA_INLINE void mix_rows_body(S a, const T* x, S b, const S* y, int64_t n, T* out) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) narrow(a * widen(x[j]) + b * y[j], out + j);
}

template <class T, class S>
FASTUDA_INLINE void store_scaled_body(const S* s, const S* scale, int64_t n, T* out) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) narrow(s[j] * scale[j], out + j);
}

template <class T, class S>
FASTUDA_INLINE void store_column(const S* tile, int64_t lds, const S* scale, int64_t rows, T* out) {
#pragma omp simd
  for (int64_t r = 0; r < rows; ++r) narrow(tile[r * lds] * scale[r], out + r);
}

// Works on squares in registers: reading a column element by element costs as much as its share of a product.
template <class T>
FASTUDA_INLINE void store_transposed_body(const float* tile, int64_t lds, const float* scale, int64_t rows,
                                          int64_t columns, T* out, int64_t ldo) {
  constexpr int64_t most = 64;
  int64_t r0 = 0;
  for (; r0 + kSquare <= rows; r0 += most) {
    const int64_t taken = (rows - r0 < most ? rows - r0 : most) / kSquare * kSquare;
    for (int64_t j = 0; j < columns; j += kSquare) {
      if (j + kSquare > columns) {
        for (; j < columns; ++j)
          store_column(tile + r0 * lds + j, lds, scale + r0, taken, out + j * ldo + r0);
        break;
      }
      float square[kSquare * most];
      for (int64_t r = 0; r < taken; r += kSquare) {
        const float* from[kSquare];
        for (int64_t k = 0; k < kSquare; ++k) from[k] = tile + (r0 + r + k) * lds + j;
        transpose_square(from, square + r, most);
      }
      for (int64_t k = 0; k < kSquare; ++k) {
        const float* column = square + k * most;
        T* to = out + (j + k) * ldo + r0;
#pragma omp simd
        for (int64_t r = 0; r < taken; ++r) narrow(column[r] * scale[r0 + r], to + r);
      }
    }
    if (taken < most) {
      r0 += taken;
      break;
    }
  }
  for (int64_t j = 0; r0 < rows && j < columns; ++j) {
    store_column(tile + r0 * lds + j, lds, scale + r0, rows - r0, out + j * ldo + r0);
  }
}

template <class A, class B>
FASTUDA_INLINE auto inner_body(const A* x, const B* y, int64_t n) {
  decltype(widen(*x)) sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += widen(x[i]) * widen(y[i]);
  return sum;
}

template <class T, class S>
FASTUDA_INLINE void add_scaled_body(S a, const T* x, int64_t n, S* y) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) y[j] += a * widen(x[j]);
}

template <class T, class S>
FASTUDA_INLINE void unit_gradient_body(const S* g, const T* x, S norm, int64_t n, T* out) {
  const S inverse = norm > S(1e-12) ? 1 / norm : S(0);
  const S c = inner_body(g, x, n) * inverse * inverse;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) narrow((g[i] - c * widen(x[i])) * inverse, out + i);
}

}  // namespace

// target_clones does not apply to templates, hence one named function per element type.
FASTUDA_CLONES static void scaled_f(const float* s, const float* scale, int64_t n, float* out) {
  store_scaled_body(s, scale, n, out);
}
FASTUDA_CLONES static void scaled_h(const float* s, const float* scale, int64_t n, BFloat16* out) {
  store_scaled_body(s, scale, n, out);
}
FASTUDA_CLONES static void transposed_f(const float* s, int64_t lds, const float* scale, int64_t rows,
                                        int64_t columns, float* out, int64_t ldo) {
  store_transposed_body(s, lds, scale, rows, columns, out, ldo);
}
FASTUDA_CLONES static void transposed_h(const float* s, int64_t lds, const float* scale, int64_t rows,
                                        int64_t columns, BFloat16* out, int64_t ldo) {
  store_transposed_body(s, lds, scale, rows, columns, out, ldo);
}

template <>
void store_scaled(const float* s, const float* scale, int64_t n, float* out) {
  scaled_f(s, scale, n, out);
}
template <>
void store_scaled(const float* s, const float* scale, int64_t n, BFloat16* out) {
  scaled_h(s, scale, n, out);
}
template <>
void store_scaled(const double* s, const double* scale, int64_t n, double* out) {
  store_scaled_body(s, scale, n, out);
}
template <>
void store_transposed(const float* tile, int64_t lds, const float* scale, int64_t rows, int64_t columns,
                      float* out, int64_t ldo) {
  transposed_f(tile, lds, scale, rows, columns, out, ldo);
}
template <>
void store_transposed(const float* tile, int64_t lds, const float* scale, int64_t rows, int64_t columns,
                      BFloat16* out, int64_t ldo) {
  transposed_h(tile, lds, scale, rows, columns, out, ldo);
}
template <>
void store_transposed(const double* tile, int64_t lds, const double* scale, int64_t rows, int64_t columns,
                      double* out, int64_t ldo) {
  for (int64_t j = 0; j < columns; ++j) store_column(tile + j, lds, scale, rows, out + j * ldo);
}

FASTUDA_CLONES static void mix_f(float a, const float* x, float b, const float* y, int64_t n, float* out) {
  mix_rows_body(a, x, b, y, n, out);
}
FASTUDA_CLONES static void mix_h(float a, const BFloat16* x, float b, const float* y, int64_t n,
                                 BFloat16* out) {
  mix_rows_body(a, x, b, y, n, out);
}
template <>
void mix_rows(float a, const float* x, float b, const float* y, int64_t n, float* out) {
  mix_f(a, x, b, y, n, out);
}
template <>
void mix_rows(float a, const BFloat16* x, float b, const float* y, int64_t n, BFloat16* out) {
  mix_h(a, x, b, y, n, out);
}
template <>
void mix_rows(double a, const double* x, double b, const double* y, int64_t n, double* out) {
  mix_rows_body(a, x, b, y, n, out);
}

FASTUDA_CLONES static void add_f(float a, const float* x, int64_t n, float* y) {
  add_scaled_body(a, x, n, y);
}
FASTUDA_CLONES static void add_h(float a, const BFloat16* x, int64_t n, float* y) {
  add_scaled_body(a, x, n, y);
}
template <>
void add_scaled(float a, const float* x, int64_t n, float* y) {
  add_f(a, x, n, y);
}
template <>
void add_scaled(float a, const BFloat16* x, int64_t n, float* y) {
  add_h(a, x, n, y);
}
template <>
void add_scaled(double a, const double* x, int64_t n, double* y) {
  add_scaled_body(a, x, n, y);
}

FASTUDA_CLONES float sum_squares(const float* x, int64_t n) { return inner_body(x, x, n); }
FASTUDA_CLONES float sum_squares(const BFloat16* x, int64_t n) { return inner_body(x, x, n); }
double sum_squares(const double* x, int64_t n) { return inner_body(x, x, n); }
FASTUDA_CLONES float inner(const float* x, const float* y, int64_t n) { return inner_body(x, y, n); }
FASTUDA_CLONES float inner(const float* x, const BFloat16* y, int64_t n) { return inner_body(x, y, n); }
FASTUDA_CLONES float inner(const BFloat16* x, const BFloat16* y, int64_t n) { return inner_body(x, y, n); }
double inner(const double* x, const double* y, int64_t n) { return inner_body(x, y, n); }

FASTUDA_CLONES static void unit_f(const float* g, const float* x, float norm, int64_t n, float* out) {
  unit_gradient_body(g, x, norm, n, out);
}
FASTUDA_CLONES static void unit_h(const float* g, const BFloat16* x, float norm, int64_t n, BFloat16* out) {
  unit_gradient_body(g, x, norm, n, out);
}
template <>
void unit_gradient(const float* g, const float* x, float norm, int64_t n, float* out) {
  unit_f(g, x, norm, n, out);
}
template <>
void unit_gradient(const float* g, const BFloat16* x, float norm, int64_t n, BFloat16* out) {
  unit_h(g, x, norm, n, out);
}
template <>
void unit_gradient(const double* g, const double* x, double norm, int64_t n, double* out) {
  unit_gradient_body(g, x, norm, n, out);
}

}  // namespace fastuda
