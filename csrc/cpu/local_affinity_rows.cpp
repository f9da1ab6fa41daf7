// Row sweeps of local_affinity, one clone per instruction set.
#include "../local_affinity_math.h"
#include "local_affinity.h"
#include "transpose.h"

namespace fastuda {

namespace {

template <class S>
FASTUDA_INLINE void log_one_body(const S* p, int64_t width, S* out) {
#pragma omp simd
  for (int64_t x = 0; x < width; ++x) out[x] = own_logs(p[x]).one;
}

template <class S>
FASTUDA_INLINE void log_zero_body(const S* p, int64_t width, S* out) {
#pragma omp simd
  for (int64_t x = 0; x < width; ++x) out[x] = own_logs(p[x]).zero;
}

template <class S>
FASTUDA_INLINE void affinity_body(const NeighbourRow<S>& row, S* out) {
#pragma omp simd
  for (int64_t x = 0; x < row.width; ++x) {
    const OwnLogs<S> own{row.log_one[x], row.log_zero[x]};
    out[x] = affinity_of(joint_of(row.own[x], row.other[x], own, row.other_log[x]));
  }
}

template <class S>
FASTUDA_INLINE void gradient_body(const NeighbourRow<S>& row, const S* grad, S* own_grad, S* other_grad) {
#pragma omp simd
  for (int64_t x = 0; x < row.width; ++x) {
    const S p = row.own[x], r = row.other[x];
    const OwnLogs<S> own{row.log_one[x], row.log_zero[x]};
    const Joint<S> joint = joint_of(p, r, own, row.other_log[x]);
    const S by_joint = slope_by_joint(joint), by_own = slope_by_own(joint, p);
    own_grad[x] += grad[x] * (r * by_joint + by_own);
    other_grad[x] += grad[x] * p * by_joint;
  }
}

template <class S>
FASTUDA_INLINE void product_body(const S* own, const S* other, int64_t width, S* sum) {
#pragma omp simd
  for (int64_t x = 0; x < width; ++x) sum[x] += own[x] * other[x];
}

template <class S>
FASTUDA_INLINE void product_gradient_body(const S* own, const S* other, const S* grad, int64_t width,
                                          S* own_grad, S* other_grad) {
#pragma omp simd
  for (int64_t x = 0; x < width; ++x) {
    own_grad[x] += grad[x] * other[x];
    other_grad[x] += grad[x] * own[x];
  }
}

template <class S>
FASTUDA_INLINE void transpose_body(const S* in, int64_t in_step, int64_t rows, int64_t columns, S* out,
                                   int64_t out_step) {
  for (int64_t x = 0; x < columns; x += kSquare) {
    const int64_t near = std::min(kSquare, columns - x);
    int64_t y = 0;
    if constexpr (sizeof(S) == 4) {
      for (; near == kSquare && y + kSquare <= rows; y += kSquare) {
        const S* square[kSquare];
        for (int64_t i = 0; i < kSquare; ++i) square[i] = in + (y + i) * in_step + x;
        transpose_square(square, out + x * out_step + y, out_step);
      }
    }
    for (; y < rows; ++y) {
      for (int64_t i = 0; i < near; ++i) out[(x + i) * out_step + y] = in[y * in_step + x + i];
    }
  }
}

}  // namespace

// target_clones does not apply to templates, so each instance calls a named function of its element type.
#define AFFINITY_SWEEPS(S, SUFFIX, CLONES)                                                                   \
  CLONES static void log_one_##SUFFIX(const S* p, int64_t n, S* out) { log_one_body(p, n, out); }            \
  CLONES static void log_zero_##SUFFIX(const S* p, int64_t n, S* out) { log_zero_body(p, n, out); }          \
  CLONES static void affinity_##SUFFIX(const NeighbourRow<S>& row, S* out) { affinity_body(row, out); }      \
  CLONES static void gradient_##SUFFIX(const NeighbourRow<S>& row, const S* g, S* own, S* other) {           \
    gradient_body(row, g, own, other);                                                                       \
  }                                                                                                          \
  CLONES static void product_##SUFFIX(const S* own, const S* other, int64_t n, S* sum) {                     \
    product_body(own, other, n, sum);                                                                        \
  }                                                                                                          \
  CLONES static void product_gradient_##SUFFIX(const S* own, const S* other, const S* g, int64_t n,          \
                                               S* own_grad, S* other_grad) {                                 \
    product_gradient_body(own, other, g, n, own_grad, other_grad);                                           \
  }                                                                                                          \
  CLONES static void transpose_##SUFFIX(const S* in, int64_t in_step, int64_t rows, int64_t columns, S* out, \
                                        int64_t out_step) {                                                  \
    transpose_body(in, in_step, rows, columns, out, out_step);                                               \
  }                                                                                                          \
  template <>                                                                                                \
  void transpose_rows(const S* in, int64_t in_step, int64_t rows, int64_t columns, S* out,                   \
                      int64_t out_step) {                                                                    \
    transpose_##SUFFIX(in, in_step, rows, columns, out, out_step);                                           \
  }                                                                                                          \
  template <>                                                                                                \
  void affinity_log_one(const S* p, int64_t width, S* out) {                                                 \
    log_one_##SUFFIX(p, width, out);                                                                         \
  }                                                                                                          \
  template <>                                                                                                \
  void affinity_log_zero(const S* p, int64_t width, S* out) {                                                \
    log_zero_##SUFFIX(p, width, out);                                                                        \
  }                                                                                                          \
  template <>                                                                                                \
  void affinity_row(const NeighbourRow<S>& row, S* out) {                                                    \
    affinity_##SUFFIX(row, out);                                                                             \
  }                                                                                                          \
  template <>                                                                                                \
  void affinity_gradient_row(const NeighbourRow<S>& row, const S* grad, S* own, S* other) {                  \
    gradient_##SUFFIX(row, grad, own, other);                                                                \
  }                                                                                                          \
  template <>                                                                                                \
  void product_row(const S* own, const S* other, int64_t width, S* sum) {                                    \
    product_##SUFFIX(own, other, width, sum);                                                                \
  }                                                                                                          \
  template <>                                                                                                \
  void product_gradient_row(const S* own, const S* other, const S* grad, int64_t width, S* own_grad,         \
                            S* other_grad) {                                                                 \
    product_gradient_##SUFFIX(own, other, grad, width, own_grad, other_grad);                                \
  }

AFFINITY_SWEEPS(float, f, FASTUDA_CLONES)
AFFINITY_SWEEPS(double, d, )
#undef AFFINITY_SWEEPS

}  // namespace fastuda
