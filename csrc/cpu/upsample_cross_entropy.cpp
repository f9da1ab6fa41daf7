// upsample_cross_entropy: loss and gradient in one pass over the pixels; the gradient is gathered at low
// resolution as it arises. Blocks of source rows are independent but for the row that two blocks share, which
// is added up afterwards in order, so that the result does not depend on the number of threads.
#include <ATen/ops/full.h>
#include <torch/library.h>

#include <optional>

#include "upsample.h"

namespace fastuda {

namespace {

constexpr int64_t kBlock = 8;

std::tuple<Tensor, Tensor, Tensor, Tensor> upsample_cross_entropy_fwd(
    const Tensor& logits, const Tensor& labels, const std::optional<Tensor>& class_weight,
    const std::optional<Tensor>& pixel_weight, bool align_corners, double temperature, int64_t ignore_index,
    double label_smoothing, bool gradient, bool per_pixel) {
  const auto type = statistics_type(logits);
  const Tensor z = logits.to(type).contiguous();
  const int64_t batch = z.size(0), classes = z.size(1), h = z.size(2), w = z.size(3);
  const bool soft = labels.is_floating_point();
  const int64_t height = labels.size(-2), width = labels.size(-1);
  const Tensor y = (soft ? labels.to(type) : labels.to(at::kLong)).contiguous();
  const Tensor weights =
      class_weight ? class_weight->to(type).contiguous() : at::ones({classes}, z.options());
  const Tensor pixels = pixel_weight ? pixel_weight->to(type).contiguous() : Tensor();
  const Stretch rows(h, height, align_corners), columns(w, width, align_corners);
  const int64_t blocks = blocks_of(h, kBlock), tasks = batch * blocks;
  Tensor grad = at::zeros(gradient ? z.sizes() : at::IntArrayRef({0}), z.options());
  Tensor map =
      at::empty(per_pixel ? at::IntArrayRef({batch, height, width}) : at::IntArrayRef({0}), z.options());
  Tensor partial;
  if (gradient) partial = at::zeros({tasks, kBlock + 1, classes, w}, z.options());
  std::vector<double> losses(tasks, 0), norms(tasks, 0);

  const auto run = [&](auto element) {
    using S = decltype(element);
    at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      std::vector<S> stretched(2 * classes * width), scratch(2 * classes * kChunk);
      std::vector<S> grads(gradient ? 2 * classes * width : 0);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t b = task / blocks, first = task % blocks * kBlock, last = std::min(h, first + kBlock);
        const S* image = z.const_data_ptr<S>() + b * classes * h * w;
        S *top = stretched.data(), *bottom = top + classes * width;
        S* top_grad = gradient ? grads.data() : nullptr;
        S* bottom_grad = gradient ? top_grad + classes * width : nullptr;
        S* gathered = gradient ? partial.mutable_data_ptr<S>() + task * (kBlock + 1) * classes * w : nullptr;
        std::fill(grads.begin(), grads.end(), S(0));
        // outputs are sorted by their upper source row
        int64_t out =
            std::lower_bound(rows.first.begin(), rows.first.end(), int32_t(first)) - rows.first.begin();
        stretch_row(image + first * w, h * w, classes, columns, top);
        for (int64_t r = first; r < last; ++r) {
          stretch_row(image + std::min(r + 1, h - 1) * w, h * w, classes, columns, bottom);
          for (; out < height && rows.first[out] == r; ++out) {
            const PixelRow<S> row{classes, width, top, bottom, S(rows.share[out])};
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
                              per_pixel ? map.mutable_data_ptr<S>() + place : nullptr, losses[task],
                              norms[task]);
          }
          if (gradient) {
            shrink_row(top_grad, w, classes, columns, gathered + (r - first) * classes * w);
            std::swap(top_grad, bottom_grad);
            std::fill(bottom_grad, bottom_grad + classes * width, S(0));
          }
          std::swap(top, bottom);
        }
        if (gradient) shrink_row(top_grad, w, classes, columns, gathered + (last - first) * classes * w);
      }
    });
    if (!gradient) return;
    S* to = grad.mutable_data_ptr<S>();
    const S* from = partial.const_data_ptr<S>();
    at::parallel_for(0, batch * classes, 1, [&](int64_t begin, int64_t end) {
      for (int64_t plane = begin; plane < end; ++plane) {
        const int64_t b = plane / classes, k = plane % classes;
        for (int64_t block = 0; block < blocks; ++block) {
          const int64_t first = block * kBlock, count = std::min(h, first + kBlock) - first;
          for (int64_t r = 0; r <= count; ++r) {
            // below the last row there is none: its share belongs to the last row itself
            const int64_t at = std::min(first + r, h - 1);
            const S* add = from + (((b * blocks + block) * (kBlock + 1) + r) * classes + k) * w;
            for (int64_t x = 0; x < w; ++x) to[(plane * h + at) * w + x] += add[x];
          }
        }
      }
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
  return {at::full({}, loss, z.options()), at::full({}, norm, z.options()), grad, map};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastuda, CPU, m) { m.impl("upsample_cross_entropy_fwd.cpu", &upsample_cross_entropy_fwd); }

}  // namespace fastuda
