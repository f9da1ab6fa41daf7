// Row sweeps of the upsampling losses, one clone per instruction set.
#include "upsample.h"

namespace fastuda {

namespace {

template <class S>
FASTUDA_INLINE void cross_entropy_body(const PixelRow<S>& row, const RowLabels<S>& labels, S* scratch,
                                       S* top_grad, S* bottom_grad, S* loss_map, double& loss, double& norm) {
  const int64_t classes = row.classes;
  S *value = scratch, *exponential = scratch + classes * kChunk;
  S best[kChunk], sum[kChunk], weighted[kChunk], all[kChunk], factor[kChunk], pixel[kChunk];
  S weights = 0;
  for (int64_t k = 0; k < classes; ++k) weights += labels.class_weight[k];
  const S smooth = labels.smoothing / S(classes), sharp = 1 - labels.smoothing;
  for (int64_t x0 = 0; x0 < row.width; x0 += kChunk) {
    const int64_t n = std::min(kChunk, row.width - x0);
    for (int64_t x = 0; x < n; ++x) best[x] = -std::numeric_limits<S>::infinity();
    for (int64_t x = 0; x < n; ++x) weighted[x] = sum[x] = 0;
    for (int64_t k = 0; k < classes; ++k) {
      const S *top = row.top + k * row.width + x0, *bottom = row.bottom + k * row.width + x0;
      S* v = value + k * kChunk;
      const S w = labels.class_weight[k];
#pragma omp simd
      for (int64_t x = 0; x < n; ++x) {
        v[x] = mixed(top[x], bottom[x], row.share) * labels.inverse_temperature;
        best[x] = v[x] > best[x] ? v[x] : best[x];
      }
      if (smooth == 0) continue;  // a value without weight may be infinite
#pragma omp simd
      for (int64_t x = 0; x < n; ++x) weighted[x] += smooth * w * v[x];
    }
    for (int64_t k = 0; k < classes; ++k) {
      const S* v = value + k * kChunk;
      S* e = exponential + k * kChunk;
#pragma omp simd
      for (int64_t x = 0; x < n; ++x) {
        e[x] = fast_exp(v[x] - best[x]);
        sum[x] += e[x];
      }
    }
    for (int64_t x = 0; x < n; ++x) pixel[x] = labels.pixel_weight ? labels.pixel_weight[x0 + x] : S(1);
    // all: the sum of the target's weights; weighted: their inner product with the values
    if (labels.hard) {
      for (int64_t x = 0; x < n; ++x) {
        const int64_t y = labels.hard[x0 + x];
        const bool valid = y != labels.ignore && y >= 0 && y < classes;
        const S w = valid ? labels.class_weight[y] : S(0);
        pixel[x] = valid ? pixel[x] : S(0);
        norm += w;
        all[x] = sharp * w + smooth * weights;
        weighted[x] += sharp * w * value[(valid ? y : 0) * kChunk + x];
      }
    } else {
      for (int64_t x = 0; x < n; ++x) all[x] = smooth * weights;
      for (int64_t k = 0; k < classes; ++k) {
        const S *q = labels.soft + k * labels.soft_stride + x0, *v = value + k * kChunk;
        const S w = sharp * labels.class_weight[k];
#pragma omp simd
        for (int64_t x = 0; x < n; ++x) {
          all[x] += w * q[x];
          weighted[x] += w * q[x] * v[x];
        }
      }
    }
    S part = 0;
#pragma omp simd reduction(+ : part)
    for (int64_t x = 0; x < n; ++x) {
      weighted[x] = pixel[x] * (all[x] * (best[x] + fast_log(sum[x])) - weighted[x]);
      part += weighted[x];
      factor[x] = pixel[x] * all[x] / sum[x];
    }
    loss += part;
    if (loss_map) std::copy(weighted, weighted + n, loss_map + x0);
    if (!top_grad) continue;
    for (int64_t k = 0; k < classes; ++k) {
      S* g = exponential + k * kChunk;
      const S w = labels.class_weight[k];
      if (labels.hard) {
#pragma omp simd
        for (int64_t x = 0; x < n; ++x) g[x] = factor[x] * g[x] - pixel[x] * smooth * w;
      } else {
        const S* q = labels.soft + k * labels.soft_stride + x0;
#pragma omp simd
        for (int64_t x = 0; x < n; ++x) g[x] = factor[x] * g[x] - pixel[x] * w * (smooth + sharp * q[x]);
      }
    }
    if (labels.hard) {
      for (int64_t x = 0; x < n; ++x) {
        const int64_t y = labels.hard[x0 + x];
        if (pixel[x] != 0) exponential[y * kChunk + x] -= pixel[x] * sharp * labels.class_weight[y];
      }
    }
    for (int64_t k = 0; k < classes; ++k) {
      const S* g = exponential + k * kChunk;
      S *top = top_grad + k * row.width + x0, *bottom = bottom_grad + k * row.width + x0;
#pragma omp simd
      for (int64_t x = 0; x < n; ++x) {
        const S scaled = g[x] * labels.inverse_temperature, lower = row.share * scaled;
        top[x] += scaled - lower;
        bottom[x] += lower;
      }
    }
  }
}

template <class S>
FASTUDA_INLINE void argmax_body(const PixelRow<S>& row, uint8_t* out) {
  S best[kChunk];
  int32_t index[kChunk];
  for (int64_t x0 = 0; x0 < row.width; x0 += kChunk) {
    const int64_t n = std::min(kChunk, row.width - x0);
    for (int64_t k = 0; k < row.classes; ++k) {
      const S *top = row.top + k * row.width + x0, *bottom = row.bottom + k * row.width + x0;
#pragma omp simd
      for (int64_t x = 0; x < n; ++x) {
        const S v = mixed(top[x], bottom[x], row.share);
        const bool better = k == 0 || v > best[x];
        best[x] = better ? v : best[x];
        index[x] = better ? int32_t(k) : index[x];
      }
    }
    for (int64_t x = 0; x < n; ++x) out[x0 + x] = uint8_t(index[x]);
  }
}

}  // namespace

// target_clones does not apply to templates, so each instance calls a named function of its element type.
#define PIXEL_SWEEPS(S, SUFFIX, CLONES)                                                                     \
  CLONES static void cross_entropy_##SUFFIX(const PixelRow<S>& row, const RowLabels<S>& labels, S* scratch, \
                                            S* top, S* bottom, S* map, double& loss, double& norm) {        \
    cross_entropy_body(row, labels, scratch, top, bottom, map, loss, norm);                                 \
  }                                                                                                         \
  CLONES static void argmax_##SUFFIX(const PixelRow<S>& row, uint8_t* out) { argmax_body(row, out); }       \
  template <>                                                                                               \
  void cross_entropy_row(const PixelRow<S>& row, const RowLabels<S>& labels, S* scratch, S* top, S* bottom, \
                         S* map, double& loss, double& norm) {                                              \
    cross_entropy_##SUFFIX(row, labels, scratch, top, bottom, map, loss, norm);                             \
  }                                                                                                         \
  template <>                                                                                               \
  void argmax_row(const PixelRow<S>& row, uint8_t* out) {                                                   \
    argmax_##SUFFIX(row, out);                                                                              \
  }

PIXEL_SWEEPS(float, f, FASTUDA_CLONES)
PIXEL_SWEEPS(double, d, )
#undef PIXEL_SWEEPS

FASTUDA_CLONES void add_exponentials(const float* v, const float* best, int64_t n, float* total) {
#pragma omp simd
  for (int64_t x = 0; x < n; ++x) total[x] += fast_exp(v[x] - best[x]);
}
FASTUDA_CLONES void add_logarithms(const float* best, int64_t n, float* total) {
#pragma omp simd
  for (int64_t x = 0; x < n; ++x) total[x] = best[x] + fast_log(total[x]);
}
FASTUDA_CLONES void exponentials(const float* v, const float* log_sum, int64_t n, float* out) {
#pragma omp simd
  for (int64_t x = 0; x < n; ++x) out[x] = fast_exp(v[x] - log_sum[x]);
}

}  // namespace fastuda
