// upsample_cross_entropy on the GPU: the walk of upsampled_walk.h with hard and with soft labels.
#include "upsampled_walk.h"

namespace fastuda {

namespace {

// What hard and soft labels share: weights of classes and pixels, each null where there are none, and the
// smoothing.
struct Weights {
  const float *class_weight, *pixel_weight;
  float sharp, smooth;

  __device__ float of_class(int k) const { return class_weight ? class_weight[k] : 1.0f; }
  __device__ float of_pixel(int64_t at) const { return pixel_weight ? pixel_weight[at] : 1.0f; }
};

struct HardLabels {
  Weights weights;
  const int64_t* labels;
  int64_t ignore;

  template <int R>
  class Rows {
   public:
    __device__ Rows(const HardLabels& target, const Place& place, const UpsampleShape& s)
        : weights_(target.weights) {
#pragma unroll
      for (int j = 0; j < R; ++j) {
        label_[j] = -1;
        pixel_[j] = 0.0f;
        if (!place.inside || j >= place.rows) continue;
        const int64_t at = (place.image * s.height + place.y + j) * s.width + place.x;
        const int64_t label = target.labels[at];
        if (label == target.ignore || label < 0 || label >= s.classes) continue;
        label_[j] = int(label);
        pixel_[j] = weights_.of_pixel(at);
      }
    }
    __device__ void of_class(int k, float* q) const {
      const float weight = weights_.of_class(k), hit = weight * (weights_.sharp + weights_.smooth);
#pragma unroll
      for (int j = 0; j < R; ++j) q[j] = pixel_[j] * (label_[j] == k ? hit : weight * weights_.smooth);
    }
    __device__ float weight(int j) const { return label_[j] < 0 ? 0.0f : weights_.of_class(label_[j]); }

   private:
    Weights weights_;
    int label_[R];
    float pixel_[R];
  };
};

struct SoftLabels {
  Weights weights;
  const float* labels;

  template <int R>
  class Rows {
   public:
    __device__ Rows(const SoftLabels& target, const Place& place, const UpsampleShape& s)
        : weights_(target.weights), plane_(s.height * s.width), width_(s.width), rows_(place.rows) {
      const int64_t pixel = int64_t(place.y) * s.width + place.x;
      labels_ = target.labels + place.image * s.classes * plane_ + pixel;
#pragma unroll
      for (int j = 0; j < R; ++j) {
        const bool there = place.inside && j < place.rows;
        pixel_[j] = there ? weights_.of_pixel(place.image * plane_ + pixel + j * width_) : 0.0f;
      }
    }
    __device__ void of_class(int k, float* q) const {
      const float weight = weights_.of_class(k);
#pragma unroll
      for (int j = 0; j < R; ++j) {
        const float label = labels_[k * plane_ + (j < rows_ ? j : 0) * width_];
        const float target = weight * (weights_.smooth + weights_.sharp * label);
        q[j] = pixel_[j] == 0.0f ? 0.0f : pixel_[j] * target;
      }
    }
    __device__ float weight(int) const { return 1.0f; }

   private:
    Weights weights_;
    int64_t plane_, width_;
    int rows_;
    const float* labels_;
    float pixel_[R];
  };
};

}  // namespace

}  // namespace fastuda

using namespace fastuda;

int64_t fastuda_upsample_blocks(UpsampleShape s) { return walk_blocks(s); }

int fastuda_upsample_cross_entropy(const float* logits, const int64_t* hard, const float* soft,
                                   const float* class_weight, const float* pixel_weight, float* grad,
                                   float* losses, float* total, float* norm, double* partial, UpsampleShape s,
                                   EntropyOptions options, void* stream) {
  const float smooth = options.smoothing / float(s.classes);
  const Weights weights{class_weight, pixel_weight, 1.0f - options.smoothing, smooth};
  if (hard) {
    return launch_walk(logits, HardLabels{weights, hard, options.ignore}, grad, losses, total, norm, partial,
                       s, options.sharpness, stream);
  }
  return launch_walk(logits, SoftLabels{weights, soft}, grad, losses, total, norm, partial, s,
                     options.sharpness, stream);
}
