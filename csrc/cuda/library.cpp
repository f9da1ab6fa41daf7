// Registers the CUDA kernels with torch through its stable ABI: one build serves every torch from 2.11.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "kernels.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

void check(int code) { STD_TORCH_CHECK(code == 0, "CUDA: ", fastuda_cuda_error(code)); }

void* stream_of(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return stream;
}

Tensor floats(const Tensor& x) { return torch::stable::contiguous(torch::stable::to(x, ScalarType::Float)); }

AffinityShape affinity_shape(const Tensor& p, int64_t neighbours, int64_t distance) {
  return {p.size(0), int(p.size(1)), int(p.size(2)), int(p.size(3)), int(neighbours), int(distance)};
}

Tensor local_affinity_fwd(Tensor probabilities, int64_t neighbours, int64_t distance, bool product) {
  const DeviceGuard guard(probabilities.get_device_index());
  const Tensor p = floats(probabilities);
  const int64_t planes = product ? neighbours : neighbours * p.size(1);
  Tensor out = torch::stable::new_empty(p, {p.size(0), planes, p.size(2), p.size(3)});
  check(fastuda_local_affinity_fwd(p.const_data_ptr<float>(), out.mutable_data_ptr<float>(),
                                   affinity_shape(p, neighbours, distance), product, stream_of(p)));
  return out;
}

Tensor local_affinity_bwd(Tensor grad, Tensor probabilities, int64_t neighbours, int64_t distance,
                          bool product) {
  const DeviceGuard guard(probabilities.get_device_index());
  const Tensor p = floats(probabilities), g = floats(grad);
  Tensor out = torch::stable::empty_like(p);
  check(fastuda_local_affinity_bwd(g.const_data_ptr<float>(), p.const_data_ptr<float>(),
                                   out.mutable_data_ptr<float>(), affinity_shape(p, neighbours, distance),
                                   product, stream_of(p)));
  return torch::stable::to(out, probabilities.scalar_type());
}

std::tuple<Tensor, Tensor> affinity_cleaning_loss_fwd(Tensor probabilities, int64_t neighbours,
                                                      bool gradient) {
  const DeviceGuard guard(probabilities.get_device_index());
  const Tensor p = floats(probabilities);
  const AffinityShape shape = affinity_shape(p, neighbours, 1);
  Tensor partial = torch::stable::new_empty(p, {fastuda_affinity_blocks(shape)}, ScalarType::Double);
  Tensor total = torch::stable::new_empty(p, {});
  Tensor grad = gradient ? torch::stable::empty_like(p) : torch::stable::new_empty(p, {0});
  check(fastuda_affinity_cleaning(p.const_data_ptr<float>(), total.mutable_data_ptr<float>(),
                                  gradient ? grad.mutable_data_ptr<float>() : nullptr,
                                  partial.mutable_data_ptr<double>(), shape, stream_of(p)));
  return {total, grad};
}

std::tuple<Tensor, Tensor, Tensor> class_statistics_fwd(Tensor features, Tensor labels, int64_t classes,
                                                        int64_t ignore_index) {
  const DeviceGuard guard(features.get_device_index());
  const Tensor x = floats(features);
  const Tensor y = torch::stable::contiguous(torch::stable::to(labels, ScalarType::Long));
  const StatisticsShape shape{x.size(0), x.size(1), classes, ignore_index};
  Tensor partial = torch::stable::new_empty(x, {fastuda_statistics_partials(shape)});
  Tensor count = torch::stable::new_zeros(x, {classes});
  Tensor mean = torch::stable::new_empty(x, {classes, x.size(1)}), variance = torch::stable::empty_like(mean);
  check(fastuda_class_statistics(x.const_data_ptr<float>(), y.const_data_ptr<int64_t>(),
                                 count.mutable_data_ptr<float>(), mean.mutable_data_ptr<float>(),
                                 variance.mutable_data_ptr<float>(), partial.mutable_data_ptr<float>(), shape,
                                 stream_of(x)));
  return {count, mean, variance};
}

std::tuple<Tensor, Tensor> upsample_confusion_fwd(Tensor scores, Tensor labels, bool align_corners,
                                                  int64_t ignore_index) {
  const DeviceGuard guard(scores.get_device_index());
  const Tensor x = floats(scores);
  const Tensor y = torch::stable::contiguous(torch::stable::to(labels, ScalarType::Long));
  const int64_t classes = x.size(1), cells = classes * classes;
  const ConfusionShape shape{x.size(0), classes,   x.size(2),    x.size(3),
                             y.size(1), y.size(2), ignore_index, align_corners};
  Tensor matrix = torch::stable::new_zeros(y, {cells + 1});
  Tensor predicted = torch::stable::new_empty(y, {y.size(0), y.size(1), y.size(2)}, ScalarType::Byte);
  int64_t aliens = 0;
  check(fastuda_upsample_confusion(x.const_data_ptr<float>(), y.const_data_ptr<int64_t>(),
                                   matrix.mutable_data_ptr<int64_t>(), predicted.mutable_data_ptr<uint8_t>(),
                                   shape, stream_of(x)));
  check(fastuda_read(&aliens, matrix.const_data_ptr<int64_t>() + cells, sizeof(aliens), stream_of(x)));
  STD_TORCH_CHECK(aliens == 0, "labels hold classes outside 0..", classes - 1, " other than ignore_index");
  Tensor counts = torch::stable::narrow(matrix, 0, 0, cells);
  return {torch::stable::reshape(counts, {classes, classes}), predicted};
}

UpsampleShape upsample_shape(const Tensor& logits, int64_t height, int64_t width, bool align_corners) {
  return {logits.size(0), logits.size(1), logits.size(2), logits.size(3), height, width, align_corners};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> upsample_cross_entropy_fwd(
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

std::tuple<Tensor, Tensor> domain_cross_entropy_fwd(Tensor domain_logits, Tensor seg_logits, int64_t offset,
                                                    int64_t height, int64_t width, bool align_corners,
                                                    double temperature, double clip,
                                                    std::optional<double> hard_threshold, bool gradient) {
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

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastuda, CUDA, m) {
  m.impl("local_affinity_fwd.cuda", TORCH_BOX(&local_affinity_fwd));
  m.impl("local_affinity_bwd.cuda", TORCH_BOX(&local_affinity_bwd));
  m.impl("affinity_cleaning_loss_fwd.cuda", TORCH_BOX(&affinity_cleaning_loss_fwd));
  m.impl("class_statistics_fwd.cuda", TORCH_BOX(&class_statistics_fwd));
  m.impl("upsample_confusion_fwd.cuda", TORCH_BOX(&upsample_confusion_fwd));
  m.impl("upsample_cross_entropy_fwd.cuda", TORCH_BOX(&upsample_cross_entropy_fwd));
  m.impl("domain_cross_entropy_fwd.cuda", TORCH_BOX(&domain_cross_entropy_fwd));
}
