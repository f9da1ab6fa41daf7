// Bilinear upsampling row by row: a source row is stretched to the output's width once, and every output row
// is a mixture of two stretched rows. Nothing of the output's size is stored.
#pragma once

#include "../tensors.h"
#include "../upsample_math.h"

namespace fastuda {

// For every output position the two source positions and the weight of the second, as torch's interpolate.
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

// One output row of K classes: what the sweeps below read and write.
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

// Cross-entropy of a row. Adds the loss and the hard labels' class weights; with gradients also adds those of
// the two stretched rows to top_grad and bottom_grad [K, W]. scratch holds 2 K chunks of kChunk values.
constexpr int64_t kChunk = 128;
template <class S>
void cross_entropy_row(const PixelRow<S>& row, const RowLabels<S>& labels, S* scratch, S* top_grad,
                       S* bottom_grad, S* loss_map, double& loss, double& norm);

// Class of the largest value of every pixel, the lowest of equals.
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
      const S a = from[columns.first[x]], b = from[columns.second[x]];
      to[x] = a + S(columns.share[x]) * (b - a);
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

}  // namespace fastuda
