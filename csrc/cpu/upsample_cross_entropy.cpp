// upsample_cross_entropy: loss and gradient in one pass over the pixels.
#include <torch/library.h>

#include <optional>

#include "upsample.h"

namespace fastuda {

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> upsample_cross_entropy_fwd(
    const Tensor& logits, const Tensor& labels, const std::optional<Tensor>& class_weight,
    const std::optional<Tensor>& pixel_weight, bool align_corners, double temperature, int64_t ignore_index,
    double label_smoothing, bool gradient, bool per_pixel) {
  const auto type = statistics_type(logits);
  const Tensor z = readable_scores(logits, type);
  const int64_t batch = z.size(0), classes = z.size(1), h = z.size(2), w = z.size(3);
  const bool soft = labels.is_floating_point();
  const int64_t height = labels.size(-2), width = labels.size(-1);
  const Tensor y = (soft ? labels.to(type) : labels.to(at::kLong)).contiguous();
  const Tensor weights =
      class_weight ? class_weight->to(type).contiguous() : at::ones({classes}, z.options());
  const Tensor pixels = pixel_weight ? pixel_weight->to(type).contiguous() : Tensor();
  const Stretch rows(h, height, align_corners), columns(w, width, align_corners);
  const int64_t tasks = sweep_tasks(z);
  Tensor grad = at::zeros(gradient ? z.sizes() : at::IntArrayRef({0}), z.options());
  Tensor map =
      at::empty(per_pixel ? at::IntArrayRef({batch, height, width}) : at::IntArrayRef({0}), z.options());
  std::vector<double> losses(tasks, 0), norms(tasks, 0);

  const auto run = [&](auto element) {
    using S = decltype(element);
    sweep_rows<S>(z, rows, columns, grad, [&] {
      return [&, scratch = std::vector<S>(2 * classes * kChunk)](int64_t task, int64_t b, int64_t out,
                                                                 const PixelRow<S>& row, S* top_grad,
                                                                 S* bottom_grad) mutable {
        const int64_t place = (b * height + out) * width;
        const RowLabels<S> target{
            soft ? nullptr : y.const_data_ptr<int64_t>() + place,
            soft ? y.const_data_ptr<S>() + (b * classes * height + out) * width : nullptr,
            height * width,
            weights.const_data_ptr<S>(),
            pixels.defined() ? pixels.const_data_ptr<S>() + place : nullptr,
            ignore_index,
            S(label_smoothing),
            S(1 / temperature)};
        cross_entropy_row(row, target, scratch.data(), top_grad, bottom_grad,
                          per_pixel ? map.mutable_data_ptr<S>() + place : nullptr, losses[task], norms[task]);
      };
    });
  };
  if (type == at::kDouble) {
    run(double());
  } else {
    run(float());
  }
  double loss = 0, norm = 0;
  for (int64_t task = 0; task < tasks; ++task) loss += losses[task], norm += norms[task];
  if (soft) norm = double(batch) * double(height) * double(width);
  return {scalar_result(loss, z), scalar_result(norm, z), grad, map};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastuda, CPU, m) { m.impl("upsample_cross_entropy_fwd.cpu", &upsample_cross_entropy_fwd); }

}  // namespace fastuda
