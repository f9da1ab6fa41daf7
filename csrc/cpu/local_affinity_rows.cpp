// Row sweeps of local_affinity, one clone per instruction set.
#include "local_affinity.h"

namespace fastuda {

namespace {

template <class S>
FASTUDA_INLINE S clamp_probability(S x) {
  x = x < S(1e-4) ? S(1e-4) : x;
  return x > S(1) ? S(1) : x;
}

template <class S>
FASTUDA_INLINE S inside(S x) {
  return x >= S(1e-4) && x <= S(1) ? S(1) : S(0);
}

template <class S>
FASTUDA_INLINE void logs_body(const S* p, int64_t width, S* log_one, S* log_zero) {
#pragma omp simd
  for (int64_t x = 0; x < width; ++x) {
    log_one[x] = fast_log(clamp_probability(p[x]));
    log_zero[x] = fast_log(clamp_probability(S(1) - p[x]));
  }
}

template <class S>
FASTUDA_INLINE void affinity_body(const NeighbourRow<S>& row, S* out) {
#pragma omp simd
  for (int64_t x = 0; x < row.width; ++x) {
    const S joint = row.own[x] * row.other[x];
    const S q = clamp_probability(joint), n = clamp_probability(S(1) - joint);
    out[x] = q * (fast_log(q) - row.log_one[x]) + n * (fast_log(n) - row.log_zero[x]);
  }
}

template <class S>
FASTUDA_INLINE void gradient_body(const NeighbourRow<S>& row, const S* grad, S* own_grad, S* other_grad) {
#pragma omp simd
  for (int64_t x = 0; x < row.width; ++x) {
    const S p = row.own[x], r = row.other[x], joint = p * r;
    const S q = clamp_probability(joint), n = clamp_probability(S(1) - joint);
    // a clamped quantity passes no gradient
    const S by_joint = inside(joint) * (fast_log(q) - row.log_one[x] + S(1)) -
                       inside(S(1) - joint) * (fast_log(n) - row.log_zero[x] + S(1));
    const S by_own =
        inside(S(1) - p) * n / clamp_probability(S(1) - p) - inside(p) * q / clamp_probability(p);
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

}  // namespace

// target_clones does not apply to templates: a named function per element type behind each instance.
#define AFFINITY_SWEEPS(S, SUFFIX, CLONES)                                                                 \
  CLONES static void logs_##SUFFIX(const S* p, int64_t n, S* one, S* zero) { logs_body(p, n, one, zero); } \
  CLONES static void affinity_##SUFFIX(const NeighbourRow<S>& row, S* out) { affinity_body(row, out); }    \
  CLONES static void gradient_##SUFFIX(const NeighbourRow<S>& row, const S* g, S* own, S* other) {         \
    gradient_body(row, g, own, other);                                                                     \
  }                                                                                                        \
  CLONES static void product_##SUFFIX(const S* own, const S* other, int64_t n, S* sum) {                   \
    product_body(own, other, n, sum);                                                                      \
  }                                                                                                        \
  CLONES static void product_gradient_##SUFFIX(const S* own, const S* other, const S* g, int64_t n,        \
                                               S* own_grad, S* other_grad) {                               \
    product_gradient_body(own, other, g, n, own_grad, other_grad);                                         \
  }                                                                                                        \
  template <>                                                                                              \
  void affinity_logs(const S* p, int64_t width, S* one, S* zero) {                                         \
    logs_##SUFFIX(p, width, one, zero);                                                                    \
  }                                                                                                        \
  template <>                                                                                              \
  void affinity_row(const NeighbourRow<S>& row, S* out) {                                                  \
    affinity_##SUFFIX(row, out);                                                                           \
  }                                                                                                        \
  template <>                                                                                              \
  void affinity_gradient_row(const NeighbourRow<S>& row, const S* grad, S* own, S* other) {                \
    gradient_##SUFFIX(row, grad, own, other);                                                              \
  }                                                                                                        \
  template <>                                                                                              \
  void product_row(const S* own, const S* other, int64_t width, S* sum) {                                  \
    product_##SUFFIX(own, other, width, sum);                                                              \
  }                                                                                                        \
  template <>                                                                                              \
  void product_gradient_row(const S* own, const S* other, const S* grad, int64_t width, S* own_grad,       \
                            S* other_grad) {                                                               \
    product_gradient_##SUFFIX(own, other, grad, width, own_grad, other_grad);                              \
  }

AFFINITY_SWEEPS(float, f, FASTUDA_CLONES)
AFFINITY_SWEEPS(double, d, )
#undef AFFINITY_SWEEPS

}  // namespace fastuda
