// upsample_cross_entropy on the GPU: the walk of upsampled_walk.h with hard and with soft labels.
#include "upsampled_walk.h"

// One over the temperature, the label smoothing, the hard label to leave out.
struct EntropyOptions {
  float sharpness, smoothing;
  int64_t ignore;
};

// Labels are hard [batch, height, width] or soft [batch, classes, height, width]; the other pointer is null,
// and so are unused weights [classes] and [batch, height, width]. Writes the sums of the losses and of the
// weights. Unless they are null, adds to grad (of the shape of logits) and writes losses [batch, height,
// width]. partial holds 2 fastuda_upsample_blocks(shape) doubles.
FASTUDA_EXPORT int fastuda_upsample_cross_entropy(const float* logits, const int64_t* hard, const float* soft,
                                                  const float* class_weight, const float* pixel_weight,
                                                  float* grad, float* losses, float* total, float* norm,
                                                  double* partial, UpsampleShape shape,
                                                  EntropyOptions options, void* stream);

#if defined(FASTUDA_TORCH)

#include <optional>

#include "registration.h"

static std::tuple<Tensor, Tensor, Tensor, Tensor> upsample_cross_entropy_fwd(
    Tensor logits, Tensor labels, std::optional<Tensor> class_weight, std::optional<Tensor> pixel_weight,
    bool align_corners, double temperature, int64_t ignore_index, double label_smoothing, bool gradient,
    bool per_pixel) {
  const DeviceGuard guard(logits.get_device_index());
  const Tensor x = floats(logits);
  const bool soft = labels.dim() == 4;
  const Tensor y = soft ? floats(labels) : torch::stable::contiguous(labels);
  const Tensor by_class = class_weight ? floats(*class_weight) : x;
  const Tensor by_pixel = pixel_weight ? floats(*pixel_weight) : x;
  const int64_t height = labels.size(labels.dim() - 2), width = labels.size(labels.dim() - 1);
  const UpsampleShape shape = upsample_shape(x, height, width, align_corners);
  Tensor partial = torch::stable::new_empty(x, {2 * fastuda_upsample_blocks(shape)}, ScalarType::Double);
  Tensor total = torch::stable::new_empty(x, {}), norm = torch::stable::new_empty(x, {});
  Tensor grad = gradient ? torch::stable::new_zeros(x, {x.size(0), x.size(1), x.size(2), x.size(3)})
                         : torch::stable::new_empty(x, {0});
  Tensor losses =
      per_pixel ? torch::stable::new_empty(x, {x.size(0), height, width}) : torch::stable::new_empty(x, {0});
  check(fastuda_upsample_cross_entropy(
      x.const_data_ptr<float>(), soft ? nullptr : y.const_data_ptr<int64_t>(),
      soft ? y.const_data_ptr<float>() : nullptr, class_weight ? by_class.const_data_ptr<float>() : nullptr,
      pixel_weight ? by_pixel.const_data_ptr<float>() : nullptr,
      gradient ? grad.mutable_data_ptr<float>() : nullptr,
      per_pixel ? losses.mutable_data_ptr<float>() : nullptr, total.mutable_data_ptr<float>(),
      norm.mutable_data_ptr<float>(), partial.mutable_data_ptr<double>(), shape,
      EntropyOptions{float(1 / temperature), float(label_smoothing), ignore_index}, stream_of(x)));
  return {total, norm, grad, losses};
}

STABLE_TORCH_LIBRARY_IMPL(fastuda, CUDA, m) {
  m.impl("upsample_cross_entropy_fwd.cuda", TORCH_BOX(&upsample_cross_entropy_fwd));
}

#elif defined(FASTUDA_SMALL)

void upsampled(int64_t height, int64_t width) {
  const UpsampleShape shape{1, 4, 5, 11, height, width, false};
  const size_t pixels = size_t(height * width);
  const auto logits = random_values(4 * 55), soft = random_values(4 * pixels);
  const auto labels = random_labels(pixels, 4);
  std::vector<float> gradient(4 * 55), losses(pixels);
  std::vector<double> partial(size_t(2 * fastuda_upsample_blocks(shape)));
  float total, norm;
  for (const bool hard : {true, false}) {
    fastuda_upsample_cross_entropy(logits.data(), hard ? labels.data() : nullptr,
                                   hard ? nullptr : soft.data(), nullptr, nullptr, gradient.data(),
                                   losses.data(), &total, &norm, partial.data(), shape,
                                   EntropyOptions{1.0f, 0.1f, 255}, nullptr);
  }
}

const Small tall([] { upsampled(30, 70); }), flat([] { upsampled(7, 200); });

#else

namespace fastuda {

namespace {

// Common to hard and soft labels: weights of classes and of pixels (null if there are none), and smoothing.
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

#endif
