// upsample_confusion: argmax of the upsampled scores and the confusion matrix, a row at a time.
#include <torch/library.h>

#include <atomic>
#include <mutex>

#include "upsample.h"

namespace fastuda {

namespace {

std::tuple<Tensor, Tensor> upsample_confusion_fwd(const Tensor& scores, const Tensor& labels,
                                                  bool align_corners, int64_t ignore_index) {
  const auto type = statistics_type(scores);
  const Tensor z = readable_scores(scores, type), truth = labels.to(at::kLong).contiguous();
  const int64_t batch = z.size(0), classes = z.size(1), h = z.size(2), w = z.size(3);
  const int64_t height = labels.size(1), width = labels.size(2);
  const Stretch rows(h, height, align_corners), columns(w, width, align_corners);
  Tensor matrix = at::zeros({classes, classes}, truth.options());
  Tensor predicted = at::empty({batch, height, width}, truth.options().dtype(at::kByte));
  const int64_t tasks = batch * h;
  std::atomic<bool> alien{false};
  std::mutex merge;
  const auto run = [&](auto element) {
    using S = decltype(element);
    at::parallel_for(0, tasks, 4, [&](int64_t begin, int64_t end) {
      std::vector<S> stretched(2 * classes * width);
      std::vector<int64_t> counts(classes * classes, 0);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t b = task / h, r = task % h;
        const S* image = z.const_data_ptr<S>() + b * classes * h * w;
        int64_t out = std::lower_bound(rows.first.begin(), rows.first.end(), int32_t(r)) - rows.first.begin();
        if (out == height || rows.first[out] != r) continue;
        S *top = stretched.data(), *bottom = top + classes * width;
        stretch_row(image + r * w, h * w, classes, columns, top);
        stretch_row(image + std::min(r + 1, h - 1) * w, h * w, classes, columns, bottom);
        for (; out < height && rows.first[out] == r; ++out) {
          const int64_t place = (b * height + out) * width;
          uint8_t* guess = predicted.mutable_data_ptr<uint8_t>() + place;
          argmax_row(PixelRow<S>{classes, width, top, bottom, S(rows.share[out])}, guess);
          const int64_t* label = truth.const_data_ptr<int64_t>() + place;
          for (int64_t x = 0; x < width; ++x) {
            if (label[x] == ignore_index) continue;
            if (label[x] < 0 || label[x] >= classes) {
              alien = true;
              continue;
            }
            ++counts[label[x] * classes + guess[x]];
          }
        }
      }
      const std::lock_guard<std::mutex> guard(merge);
      int64_t* to = matrix.mutable_data_ptr<int64_t>();
      for (int64_t i = 0; i < classes * classes; ++i) to[i] += counts[i];
    });
  };
  if (type == at::kDouble) {
    run(double());
  } else {
    run(float());
  }
  TORCH_CHECK_VALUE(!alien, "labels hold classes outside 0..", classes - 1, " other than ignore_index");
  return {matrix, predicted};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastuda, CPU, m) { m.impl("upsample_confusion_fwd.cpu", &upsample_confusion_fwd); }

}  // namespace fastuda
