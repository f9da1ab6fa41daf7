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

// All planes of few pixels at a time, so that the pixels' cache lines are written at once.
template <class S>
FASTUDA_INLINE void to_pixels_body(const S* planes, int64_t step, int64_t count, int64_t width, S* pixels) {
  for (int64_t x = 0; x < width; x += kSquare) {
    const int64_t near = std::min(kSquare, width - x);
    int64_t c = 0;
    if constexpr (sizeof(S) == 4) {
      for (; near == kSquare && c + kSquare <= count; c += kSquare) {
        const S* in[kSquare];
        for (int64_t i = 0; i < kSquare; ++i) in[i] = planes + (c + i) * step + x;
        transpose_square(in, pixels + x * count + c, count);
      }
    }
    for (; c < count; ++c) {
      for (int64_t i = 0; i < near; ++i) pixels[(x + i) * count + c] = planes[c * step + x + i];
    }
  }
}

template <class S>
FASTUDA_INLINE void to_planes_body(const S* pixels, int64_t count, int64_t width, S* planes, int64_t step) {
  for (int64_t x = 0; x < width; x += kSquare) {
    const int64_t near = std::min(kSquare, width - x);
    int64_t c = 0;
    if constexpr (sizeof(S) == 4) {
      for (; near == kSquare && c + kSquare <= count; c += kSquare) {
        const S* in[kSquare];
        for (int64_t i = 0; i < kSquare; ++i) in[i] = pixels + (x + i) * count + c;
        transpose_square(in, planes + c * step + x, step);
      }
    }
    for (; c < count; ++c) {
      for (int64_t i = 0; i < near; ++i) planes[c * step + x + i] = pixels[(x + i) * count + c];
    }
  }
}

}  // namespace

// target_clones does not apply to templates, so each instance calls a named function of its element type.
#define AFFINITY_SWEEPS(S, SUFFIX, CLONES)                                                              \
  CLONES static void log_one_##SUFFIX(const S* p, int64_t n, S* out) { log_one_body(p, n, out); }       \
  CLONES static void log_zero_##SUFFIX(const S* p, int64_t n, S* out) { log_zero_body(p, n, out); }     \
  CLONES static void affinity_##SUFFIX(const NeighbourRow<S>& row, S* out) { affinity_body(row, out); } \
  CLONES static void gradient_##SUFFIX(const NeighbourRow<S>& row, const S* g, S* own, S* other) {      \
    gradient_body(row, g, own, other);                                                                  \
  }                                                                                                     \
  CLONES static void product_##SUFFIX(const S* own, const S* other, int64_t n, S* sum) {                \
    product_body(own, other, n, sum);                                                                   \
  }                                                                                                     \
  CLONES static void product_gradient_##SUFFIX(const S* own, const S* other, const S* g, int64_t n,     \
                                               S* own_grad, S* other_grad) {                            \
    product_gradient_body(own, other, g, n, own_grad, other_grad);                                      \
  }                                                                                                     \
  CLONES static void to_pixels_##SUFFIX(const S* planes, int64_t step, int64_t count, int64_t width,    \
                                        S* pixels) {                                                    \
    to_pixels_body(planes, step, count, width, pixels);                                                 \
  }                                                                                                     \
  CLONES static void to_planes_##SUFFIX(const S* pixels, int64_t count, int64_t width, S* planes,       \
                                        int64_t step) {                                                 \
    to_planes_body(pixels, count, width, planes, step);                                                 \
  }                                                                                                     \
  template <>                                                                                           \
  void planes_to_pixels(const S* planes, int64_t step, int64_t count, int64_t width, S* pixels) {       \
    to_pixels_##SUFFIX(planes, step, count, width, pixels);                                             \
  }                                                                                                     \
  template <>                                                                                           \
  void pixels_to_planes(const S* pixels, int64_t count, int64_t width, S* planes, int64_t step) {       \
    to_planes_##SUFFIX(pixels, count, width, planes, step);                                             \
  }                                                                                                     \
  template <>                                                                                           \
  void affinity_log_one(const S* p, int64_t width, S* out) {                                            \
    log_one_##SUFFIX(p, width, out);                                                                    \
  }                                                                                                     \
  template <>                                                                                           \
  void affinity_log_zero(const S* p, int64_t width, S* out) {                                           \
    log_zero_##SUFFIX(p, width, out);                                                                   \
  }                                                                                                     \
  template <>                                                                                           \
  void affinity_row(const NeighbourRow<S>& row, S* out) {                                               \
    affinity_##SUFFIX(row, out);                                                                        \
  }                                                                                                     \
  template <>                                                                                           \
  void affinity_gradient_row(const NeighbourRow<S>& row, const S* grad, S* own, S* other) {             \
    gradient_##SUFFIX(row, grad, own, other);                                                           \
  }                                                                                                     \
  template <>                                                                                           \
  void product_row(const S* own, const S* other, int64_t width, S* sum) {                               \
    product_##SUFFIX(own, other, width, sum);                                                           \
  }                                                                                                     \
  template <>                                                                                           \
  void product_gradient_row(const S* own, const S* other, const S* grad, int64_t width, S* own_grad,    \
                            S* other_grad) {                                                            \
    product_gradient_##SUFFIX(own, other, grad, width, own_grad, other_grad);                           \
  }

AFFINITY_SWEEPS(float, f, FASTUDA_CLONES)
AFFINITY_SWEEPS(double, d, )
#undef AFFINITY_SWEEPS

}  // namespace fastuda
