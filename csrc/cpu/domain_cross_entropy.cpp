// domain_cross_entropy: computes the soft labels of a row of pixels from two stretched rows of segmentation
// logits, then its loss and gradient from two rows of domain logits. Neither the labels nor their zero half
// are stored.
#include <torch/library.h>

#include <optional>

#include "upsample.h"

namespace fastuda {

namespace {

// How labels are computed from probabilities.
template <class S>
struct Encoding {
  int64_t offset;  // of the half of the domain channels that holds the labels
  S inverse_temperature, clip;
  bool hard;  // one-hot if the probability reaches the threshold
  S threshold;
};

// Labels [K, kChunk] of a chunk of n pixels from x0 on in `code`, and their sum.
template <class S>
FASTUDA_INLINE void encode(const PixelRow<S>& row, const Encoding<S>& how, int64_t x0, int64_t n, S* code,
                           S* all) {
  S best[kChunk], sum[kChunk];
  int32_t index[kChunk];
  for (int64_t k = 0; k < row.classes; ++k) {
    const S *top = row.top + k * row.width + x0, *bottom = row.bottom + k * row.width + x0;
    S* v = code + k * kChunk;
#pragma omp simd
    for (int64_t x = 0; x < n; ++x) {
      v[x] = mixed(top[x], bottom[x], row.share) * how.inverse_temperature;
      const bool better = k == 0 || v[x] > best[x];
      best[x] = better ? v[x] : best[x];
      index[x] = better ? int32_t(k) : index[x];
    }
  }
  for (int64_t x = 0; x < n; ++x) sum[x] = all[x] = 0;
  for (int64_t k = 0; k < row.classes; ++k) {
    S* v = code + k * kChunk;
#pragma omp simd
    for (int64_t x = 0; x < n; ++x) {
      v[x] = fast_exp(v[x] - best[x]);
      sum[x] += v[x];
    }
  }
#pragma omp simd
  for (int64_t x = 0; x < n; ++x) sum[x] = 1 / sum[x];
  for (int64_t k = 0; k < row.classes; ++k) {
    S* v = code + k * kChunk;
    if (how.hard) {
#pragma omp simd
      for (int64_t x = 0; x < n; ++x) v[x] = index[x] == k && sum[x] >= how.threshold ? S(1) : S(0);
    } else {
#pragma omp simd
      for (int64_t x = 0; x < n; ++x) v[x] = v[x] * sum[x] > how.clip ? how.clip : v[x] * sum[x];
    }
#pragma omp simd
    for (int64_t x = 0; x < n; ++x) all[x] += v[x];
  }
}

// Loss of a row; with gradients, also adds those of its two stretched rows. scratch holds 2.5 chunks per
// channel.
template <class S>
FASTUDA_INLINE void domain_body(const PixelRow<S>& row, const PixelRow<S>& labels, const Encoding<S>& how,
                                S* scratch, S* top_grad, S* bottom_grad, double& loss) {
  const int64_t channels = row.classes;
  S *value = scratch, *exponential = value + channels * kChunk, *code = exponential + channels * kChunk;
  S best[kChunk], sum[kChunk], all[kChunk], inner[kChunk], factor[kChunk];
  for (int64_t x0 = 0; x0 < row.width; x0 += kChunk) {
    const int64_t n = std::min(kChunk, row.width - x0);
    encode(labels, how, x0, n, code, all);
    for (int64_t x = 0; x < n; ++x) best[x] = -std::numeric_limits<S>::infinity();
    for (int64_t x = 0; x < n; ++x) inner[x] = sum[x] = 0;
    for (int64_t c = 0; c < channels; ++c) {
      const S *top = row.top + c * row.width + x0, *bottom = row.bottom + c * row.width + x0;
      S* v = value + c * kChunk;
#pragma omp simd
      for (int64_t x = 0; x < n; ++x) {
        v[x] = mixed(top[x], bottom[x], row.share);
        best[x] = v[x] > best[x] ? v[x] : best[x];
      }
    }
    for (int64_t c = 0; c < channels; ++c) {
      const S* v = value + c * kChunk;
      S* e = exponential + c * kChunk;
#pragma omp simd
      for (int64_t x = 0; x < n; ++x) {
        e[x] = fast_exp(v[x] - best[x]);
        sum[x] += e[x];
      }
    }
    for (int64_t k = 0; k < labels.classes; ++k) {
      const S *v = value + (how.offset + k) * kChunk, *a = code + k * kChunk;
#pragma omp simd
      for (int64_t x = 0; x < n; ++x) inner[x] += a[x] * v[x];
    }
    S part = 0;
#pragma omp simd reduction(+ : part)
    for (int64_t x = 0; x < n; ++x) {
      part += all[x] * (best[x] + fast_log(sum[x])) - inner[x];
      factor[x] = all[x] / sum[x];
    }
    loss += part;
    if (!top_grad) continue;
    for (int64_t c = 0; c < channels; ++c) {
      const bool own = c >= how.offset && c < how.offset + labels.classes;
      const S *e = exponential + c * kChunk, *a = code + (own ? c - how.offset : 0) * kChunk;
      const S weight = own ? S(1) : S(0);
      S *top = top_grad + c * row.width + x0, *bottom = bottom_grad + c * row.width + x0;
#pragma omp simd
      for (int64_t x = 0; x < n; ++x) {
        const S slope = factor[x] * e[x] - weight * a[x], lower = row.share * slope;
        top[x] += slope - lower;
        bottom[x] += lower;
      }
    }
  }
}

FASTUDA_CLONES void domain_row(const PixelRow<float>& row, const PixelRow<float>& labels,
                               const Encoding<float>& how, float* scratch, float* top, float* bottom,
                               double& loss) {
  domain_body(row, labels, how, scratch, top, bottom, loss);
}
void domain_row(const PixelRow<double>& row, const PixelRow<double>& labels, const Encoding<double>& how,
                double* scratch, double* top, double* bottom, double& loss) {
  domain_body(row, labels, how, scratch, top, bottom, loss);
}

// The stretched source rows of an output row of z [B, K, h, w]; those of the previous row are reused.
template <class S>
class Stretched {
 public:
  Stretched(const Tensor& z, const Stretch& rows, const Stretch& columns)
      : data_(z.const_data_ptr<S>()),
        classes_(z.size(1)),
        h_(z.size(2)),
        w_(z.size(3)),
        rows_(&rows),
        columns_(&columns),
        top_(classes_ * int64_t(columns.first.size())),
        bottom_(top_.size()) {}
  PixelRow<S> row(int64_t b, int64_t y) {
    const int64_t first = rows_->first[y], second = rows_->second[y];
    if (b != b_ || first != first_) {
      if (b == b_ && first == second_) {
        top_.swap(bottom_);
      } else {
        fill(b, first, top_);
      }
      if (second != first) fill(b, second, bottom_);
      b_ = b, first_ = first, second_ = second;
    }
    const S* bottom = second == first ? top_.data() : bottom_.data();
    return {classes_, int64_t(columns_->first.size()), top_.data(), bottom, S(rows_->share[y])};
  }

 private:
  void fill(int64_t b, int64_t r, std::vector<S>& to) {
    stretch_row(data_ + (b * classes_ * h_ + r) * w_, h_ * w_, classes_, *columns_, to.data());
  }

  const S* data_;
  int64_t classes_, h_, w_;
  const Stretch *rows_, *columns_;
  std::vector<S> top_, bottom_;
  int64_t b_ = -1, first_ = -1, second_ = -1;
};

std::tuple<Tensor, Tensor> domain_cross_entropy_fwd(const Tensor& domain_logits, const Tensor& seg_logits,
                                                    int64_t offset, int64_t height, int64_t width,
                                                    bool align_corners, double temperature, double clip,
                                                    std::optional<double> hard_threshold, bool gradient) {
  const auto type = statistics_type(domain_logits);
  const Tensor d = readable_scores(domain_logits, type), z = readable_scores(seg_logits, type);
  const Stretch rows(d.size(2), height, align_corners), columns(d.size(3), width, align_corners);
  const Stretch label_rows(z.size(2), height, align_corners), label_columns(z.size(3), width, align_corners);
  Tensor grad = at::zeros(gradient ? d.sizes() : at::IntArrayRef({0}), d.options());
  std::vector<double> losses(sweep_tasks(d), 0);
  const auto run = [&](auto element) {
    using S = decltype(element);
    const Encoding<S> how{offset, S(1 / temperature), S(clip), hard_threshold.has_value(),
                          S(hard_threshold.value_or(0))};
    sweep_rows<S>(d, rows, columns, grad, [&] {
      return [&, labels = Stretched<S>(z, label_rows, label_columns),
              scratch = std::vector<S>((2 * d.size(1) + z.size(1)) * kChunk)](
                 int64_t task, int64_t b, int64_t y, const PixelRow<S>& row, S* top_grad,
                 S* bottom_grad) mutable {
        domain_row(row, labels.row(b, y), how, scratch.data(), top_grad, bottom_grad, losses[task]);
      };
    });
  };
  if (type == at::kDouble) {
    run(double());
  } else {
    run(float());
  }
  double loss = 0;
  for (const double part : losses) loss += part;
  return {scalar_result(loss, d), grad};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastuda, CPU, m) { m.impl("domain_cross_entropy_fwd.cpu", &domain_cross_entropy_fwd); }

}  // namespace fastuda
