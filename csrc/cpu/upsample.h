// Bilinear upsampling row by row: a source row is stretched to the output's width once, and every output row
// is a mixture of two stretched rows. Nothing of the output's size is stored; gradients are summed at low
// resolution.
#pragma once

#include "../tensors.h"
#include "../upsample_math.h"

namespace fastuda {

// For every output position the two source positions and the weight of the second, as in torch's interpolate.
struct Stretch {
  std::vector<int32_t> first, second;
  std::vector<double> share;

  Stretch(int64_t from, int64_t to, bool align_corners) : first(to), second(to), share(to) {
    for (int64_t i = 0; i < to; ++i) {
      const Between sources = sources_of(i, from, to, align_corners);
      first[i] = sources.first;
      second[i] = sources.second;
      share[i] = sources.share;
    }
  }
};

// Scores in the layout that the sweeps read.
inline Tensor readable_scores(const Tensor& x, at::ScalarType type) {
  return x.to(type).clamp_min(least_score()).contiguous();
}

// One output row of K classes: the data that the sweeps below read and write.
template <class S>
struct PixelRow {
  int64_t classes, width;
  const S *top, *bottom;  // stretched source rows [K, W]
  S share;                // of the bottom row
};

// Hard or soft labels of one row, and the weights of its cross-entropy.
template <class S>
struct RowLabels {
  const int64_t* hard;  // [W], or null
  const S* soft;        // [K, W] with rows soft_stride apart, or null
  int64_t soft_stride;
  const S* class_weight;  // [K]
  const S* pixel_weight;  // [W], or null
  int64_t ignore;
  S smoothing, inverse_temperature;
};

// Cross-entropy of a row. Adds the loss and the class weights of the hard labels; with gradients, also adds
// those of the two stretched rows to top_grad and bottom_grad [K, W]. scratch: 2 K chunks of kChunk values.
constexpr int64_t kChunk = 128;
template <class S>
void cross_entropy_row(const PixelRow<S>& row, const RowLabels<S>& labels, S* scratch, S* top_grad,
                       S* bottom_grad, S* loss_map, double& loss, double& norm);

// Class of the largest value of every pixel; the lowest class of equal values.
template <class S>
void argmax_row(const PixelRow<S>& row, uint8_t* out);

// total += exp(v - best); total = best + log(total); out = exp(v - log_sum).
void add_exponentials(const float* v, const float* best, int64_t n, float* total);
void add_logarithms(const float* best, int64_t n, float* total);
void exponentials(const float* v, const float* log_sum, int64_t n, float* out);

// out[k, x] = (1 - share[x]) in[k, first[x]] + share[x] in[k, second[x]] for K rows `stride` apart.
template <class S>
void stretch_row(const S* in, int64_t stride, int64_t classes, const Stretch& columns, S* out) {
  const int64_t width = int64_t(columns.first.size());
  for (int64_t k = 0; k < classes; ++k) {
    const S* from = in + k * stride;
    S* to = out + k * width;
    for (int64_t x = 0; x < width; ++x) {
      to[x] = mixed(from[columns.first[x]], from[columns.second[x]], S(columns.share[x]));
    }
  }
}

// The transpose of stretch_row, added to out.
template <class S>
void shrink_row(const S* in, int64_t stride, int64_t classes, const Stretch& columns, S* out) {
  const int64_t width = int64_t(columns.first.size());
  for (int64_t k = 0; k < classes; ++k) {
    const S* from = in + k * width;
    S* to = out + k * stride;
    for (int64_t x = 0; x < width; ++x) {
      const S second = S(columns.share[x]) * from[x];
      to[columns.first[x]] += from[x] - second;
      to[columns.second[x]] += second;
    }
  }
}

constexpr int64_t kBlock = 8;  // source rows of a task

// Tasks of sweep_rows over z [B, K, h, w].
inline int64_t sweep_tasks(const Tensor& z) { return z.size(0) * blocks_of(z.size(2), kBlock); }

// Calls row(task, b, y, sources, top_grad, bottom_grad) for every output row y of every image b of z. What it
// adds to the gradients of its two stretched source rows goes to grad, which must be zeros of the shape of z,
// or empty: then top_grad and bottom_grad are null. worker() makes the row function of a thread. Tasks are
// independent except for source rows that two tasks share. These are added afterwards in order, so that the
// result does not depend on the number of threads.
template <class S, class Worker>
void sweep_rows(const Tensor& z, const Stretch& rows, const Stretch& columns, const Tensor& grad,
                Worker&& worker) {
  const int64_t batch = z.size(0), classes = z.size(1), h = z.size(2), w = z.size(3);
  const int64_t height = int64_t(rows.first.size()), width = int64_t(columns.first.size());
  const int64_t blocks = blocks_of(h, kBlock);
  const bool gradient = grad.numel() > 0;
  Tensor partial;
  if (gradient) partial = at::zeros({sweep_tasks(z), kBlock + 1, classes, w}, z.options());
  at::parallel_for(0, sweep_tasks(z), 1, [&](int64_t begin, int64_t end) {
    auto row = worker();
    std::vector<S> stretched(2 * classes * width), grads(gradient ? 2 * classes * width : 0);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / blocks, first = task % blocks * kBlock, last = std::min(h, first + kBlock);
      const S* image = z.const_data_ptr<S>() + b * classes * h * w;
      S *top = stretched.data(), *bottom = top + classes * width;
      S* top_grad = gradient ? grads.data() : nullptr;
      S* bottom_grad = gradient ? top_grad + classes * width : nullptr;
      S* gathered = gradient ? partial.mutable_data_ptr<S>() + task * (kBlock + 1) * classes * w : nullptr;
      std::fill(grads.begin(), grads.end(), S(0));
      // outputs are sorted by their upper source row
      int64_t y = std::lower_bound(rows.first.begin(), rows.first.end(), int32_t(first)) - rows.first.begin();
      stretch_row(image + first * w, h * w, classes, columns, top);
      for (int64_t r = first; r < last; ++r) {
        stretch_row(image + std::min(r + 1, h - 1) * w, h * w, classes, columns, bottom);
        for (; y < height && rows.first[y] == r; ++y) {
          row(task, b, y, PixelRow<S>{classes, width, top, bottom, S(rows.share[y])}, top_grad, bottom_grad);
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
          // the last row has no next row and takes that share itself
          const int64_t at = std::min(first + r, h - 1);
          const S* add = from + (((b * blocks + block) * (kBlock + 1) + r) * classes + k) * w;
          for (int64_t x = 0; x < w; ++x) to[(plane * h + at) * w + x] += add[x];
        }
      }
    }
  });
}

}  // namespace fastuda
