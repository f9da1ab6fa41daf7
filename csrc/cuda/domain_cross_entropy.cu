// domain_cross_entropy on the GPU: the walk of upsampled_walk.h, with labels that are computed from the
// upsampled segmentation logits where they are used.
#include "upsampled_walk.h"

// Segmentation logits [batch, classes, seg_h, seg_w]; their classes begin at channel `offset` of the domain
// logits. `level` clips soft labels, or is the smallest probability of hard labels.
struct DomainOptions {
  int classes, offset;
  int64_t seg_h, seg_w;
  float sharpness, level;
  bool hard;
};

// Writes the sum of the losses, and adds to grad (of the shape of domain) unless it is null. partial holds
// 2 fastuda_upsample_blocks(shape) doubles.
FASTUDA_EXPORT int fastuda_domain_cross_entropy(const float* domain, const float* seg, float* grad,
                                                float* total, double* partial, UpsampleShape shape,
                                                DomainOptions options, void* stream);

#if defined(FASTUDA_TORCH)

#include <optional>

#include "registration.h"

static std::tuple<Tensor, Tensor> domain_cross_entropy_fwd(Tensor domain_logits, Tensor seg_logits,
                                                           int64_t offset, int64_t height, int64_t width,
                                                           bool align_corners, double temperature,
                                                           double clip, std::optional<double> hard_threshold,
                                                           bool gradient) {
  const DeviceGuard guard(domain_logits.get_device_index());
  const Tensor x = floats(domain_logits), z = floats(seg_logits);
  const UpsampleShape shape = upsample_shape(x, height, width, align_corners);
  const DomainOptions options{int(z.size(1)),
                              int(offset),
                              z.size(2),
                              z.size(3),
                              float(1 / temperature),
                              float(hard_threshold.value_or(clip)),
                              hard_threshold.has_value()};
  Tensor partial = torch::stable::new_empty(x, {2 * fastuda_upsample_blocks(shape)}, ScalarType::Double);
  Tensor total = torch::stable::new_empty(x, {});
  Tensor grad = gradient ? torch::stable::new_zeros(x, {x.size(0), x.size(1), x.size(2), x.size(3)})
                         : torch::stable::new_empty(x, {0});
  check(fastuda_domain_cross_entropy(x.const_data_ptr<float>(), z.const_data_ptr<float>(),
                                     gradient ? grad.mutable_data_ptr<float>() : nullptr,
                                     total.mutable_data_ptr<float>(), partial.mutable_data_ptr<double>(),
                                     shape, options, stream_of(x)));
  return {total, grad};
}

STABLE_TORCH_LIBRARY_IMPL(fastuda, CUDA, m) {
  m.impl("domain_cross_entropy_fwd.cuda", TORCH_BOX(&domain_cross_entropy_fwd));
}

#elif defined(FASTUDA_SMALL)

void domains(int64_t height, int64_t width) {
  const UpsampleShape shape{1, 4, 5, 11, height, width, false};
  const auto logits = random_values(4 * 55), seg = random_values(2 * 12);
  std::vector<float> gradient(4 * 55);
  std::vector<double> partial(size_t(2 * fastuda_upsample_blocks(shape)));
  float total;
  for (const bool hard : {true, false}) {
    fastuda_domain_cross_entropy(logits.data(), seg.data(), gradient.data(), &total, partial.data(), shape,
                                 DomainOptions{2, 2, 3, 4, 0.5f, 0.6f, hard}, nullptr);
  }
}

const Small tall_domains([] { domains(30, 70); }), flat_domains([] { domains(7, 200); });

#else

namespace fastuda {

namespace {

// The segmentation logits of R output rows of a column.
template <int R>
class Segmentation {
 public:
  __device__ Segmentation(const float* seg, const DomainOptions& options, const Place& place,
                          const UpsampleShape& s)
      : height_(int(options.seg_h)),
        width_(int(options.seg_w)),
        planes_(seg + place.image * options.classes * options.seg_h * options.seg_w),
        column_(sources_of(place.x, options.seg_w, s.width, s.align_corners)) {
#pragma unroll
    for (int j = 0; j < R; ++j) {
      const int64_t y = j < place.rows ? place.y + j : place.y;
      const Between row = sources_of(y, options.seg_h, s.height, s.align_corners);
      row_[j] = row.first;
      share_[j] = float(row.share);
    }
  }

  // The logits of class k. A row mostly lies between the same two source rows as the previous one.
  __device__ void of_class(int k, float* z) const {
    const float* plane = planes_ + int64_t(k) * height_ * width_;
    int row = -1;
    Stretched pair{0.0f, 0.0f};
#pragma unroll
    for (int j = 0; j < R; ++j) {
      if (row_[j] != row) {
        row = row_[j];
        const float* upper = plane + int64_t(row) * width_;
        pair = stretched(upper, row + 1 < height_ ? upper + width_ : upper, column_);
      }
      z[j] = pair.at(share_[j]);
    }
  }

  // For every row the largest logit, its class (the lowest of equal ones), and the sum of the exponentials
  // relative to it, in powers of two.
  __device__ void soft_max(int classes, float scale, float* best, int* guess, float* total) const {
    float z[R];
#pragma unroll
    for (int j = 0; j < R; ++j) {
      best[j] = -INFINITY;
      guess[j] = 0;
      total[j] = 0.0f;
    }
    for (int k = 0; k < classes; ++k) {
      of_class(k, z);
#pragma unroll
      for (int j = 0; j < R; ++j) {
        if (!(z[j] > best[j])) continue;
        best[j] = z[j];
        guess[j] = k;
      }
    }
    for (int k = 0; k < classes; ++k) {
      of_class(k, z);
#pragma unroll
      for (int j = 0; j < R; ++j) total[j] += rough_exp2((z[j] - best[j]) * scale);
    }
  }

 private:
  int height_, width_;
  const float* planes_;
  Between column_;
  int row_[R];
  float share_[R];
};

// Clipped probabilities, in the half of the channels from the offset on.
struct SoftDomain {
  const float* seg;
  DomainOptions options;

  template <int R>
  class Rows {
   public:
    __device__ Rows(const SoftDomain& target, const Place& place, const UpsampleShape& s)
        : options_(target.options),
          seg_(target.seg, options_, place, s),
          scale_(options_.sharpness * 1.44269504f),
          rows_(place.inside ? place.rows : 0) {
      int guess[R];
      float total[R];
      seg_.soft_max(options_.classes, scale_, best_, guess, total);
#pragma unroll
      for (int j = 0; j < R; ++j) over_total_[j] = rough_quotient(1.0f, total[j]);
    }
    __device__ void of_class(int channel, float* q) const {
      const int k = channel - options_.offset;
      const bool labelled = k >= 0 && k < options_.classes;  // the other half belongs to the other domain
      float z[R] = {};
      if (labelled) seg_.of_class(k, z);
#pragma unroll
      for (int j = 0; j < R; ++j) {
        const float p = rough_exp2((z[j] - best_[j]) * scale_) * over_total_[j];
        q[j] = !labelled || j >= rows_ ? 0.0f : p > options_.level ? options_.level : p;
      }
    }
    __device__ float weight(int) const { return 1.0f; }

   private:
    const DomainOptions& options_;  // the kernel's parameter
    Segmentation<R> seg_;
    float scale_;
    int rows_;
    float best_[R], over_total_[R];
  };
};

// The most probable class, if its probability reaches the level.
struct HardDomain {
  const float* seg;
  DomainOptions options;

  template <int R>
  class Rows {
   public:
    __device__ Rows(const HardDomain& target, const Place& place, const UpsampleShape& s)
        : offset_(target.options.offset) {
      const DomainOptions& options = target.options;
      const Segmentation<R> seg(target.seg, options, place, s);
      float best[R], total[R];
      seg.soft_max(options.classes, options.sharpness * 1.44269504f, best, guess_, total);
#pragma unroll
      for (int j = 0; j < R; ++j) {
        const bool there = place.inside && j < place.rows;
        if (!there || !(rough_quotient(1.0f, total[j]) >= options.level)) guess_[j] = -1 - offset_;
      }
    }
    __device__ void of_class(int channel, float* q) const {
#pragma unroll
      for (int j = 0; j < R; ++j) q[j] = channel == guess_[j] + offset_ ? 1.0f : 0.0f;
    }
    __device__ float weight(int) const { return 1.0f; }

   private:
    int offset_, guess_[R];
  };
};

}  // namespace

}  // namespace fastuda

using namespace fastuda;

int fastuda_domain_cross_entropy(const float* domain, const float* seg, float* grad, float* total,
                                 double* partial, UpsampleShape s, DomainOptions options, void* stream) {
  if (options.hard) {
    return launch_walk(domain, HardDomain{seg, options}, grad, nullptr, total, nullptr, partial, s, 1.0f,
                       stream);
  }
  return launch_walk(domain, SoftDomain{seg, options}, grad, nullptr, total, nullptr, partial, s, 1.0f,
                     stream);
}

#endif
