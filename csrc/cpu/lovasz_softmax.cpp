// lovasz_softmax sorts the errors of each class once, and only those that matter: past the smallest error of
// the class's own pixels the Jaccard loss is 1 and its gradient 0. With low-resolution logits, the
// probabilities of a class are computed when they are needed, from two stretched rows and the pixel's
// log-sum-exp, and the gradient is gathered at low resolution.
#include <torch/library.h>

#include <array>

#include "tasks.h"
#include "upsample.h"

namespace fastuda {

namespace {

// An error and its pixel.
struct Error {
  uint32_t key;  // bits of the error; for non-negative floats they have the same order as the floats
  uint32_t pixel;
};

// Sorts by key, descending, least significant digit first; stable, so equal errors stay in pixel order.
void sort_down(std::vector<Error>& errors, std::vector<Error>& spare) {
  constexpr int kBits = 11;
  constexpr uint32_t kMask = (1u << kBits) - 1;
  spare.resize(errors.size());
  for (int shift = 0; shift < 32; shift += kBits) {
    std::array<uint32_t, (1u << kBits) + 1> start{};
    for (const Error& e : errors) ++start[kMask - (e.key >> shift & kMask) + 1];
    for (uint32_t i = 0; i <= kMask; ++i) start[i + 1] += start[i];
    for (const Error& e : errors) spare[start[kMask - (e.key >> shift & kMask)]++] = e;
    errors.swap(spare);
  }
}

constexpr int64_t kClasses = 4;  // at a time: each holds up to five numbers per pixel

struct Gradient {
  uint32_t pixel;
  float value;
};

// The loss of one class, and the gradient with respect to its probabilities where it is not zero.
double class_loss(const std::vector<float>& probability, const std::vector<uint8_t>& labels, uint8_t own,
                  uint8_t ignored, int64_t own_count, std::vector<Error>& errors, std::vector<Error>& spare,
                  std::vector<Gradient>* gradient) {
  float least = 2;
  const size_t count = labels.size();
  for (size_t i = 0; i < count; ++i) {
    if (labels[i] == own) least = std::min(least, 1 - probability[i]);
  }
  errors.clear();
  for (size_t i = 0; i < count; ++i) {
    if (labels[i] == ignored) continue;
    const float error =
        std::max(labels[i] == own ? 1 - probability[i] : probability[i], 0.0f) + 0.0f;  // -0 sorts as 0
    if (error < least) continue;
    uint32_t key;
    std::memcpy(&key, &error, 4);
    errors.push_back({key, uint32_t(i)});
  }
  sort_down(errors, spare);
  double loss = 0, before = 0;
  int64_t hit = 0, missed = 0;
  for (const Error& e : errors) {
    const bool is_own = labels[e.pixel] == own;
    (is_own ? hit : missed) += 1;
    const double jaccard = 1 - double(own_count - hit) / double(own_count + missed);
    float error;
    std::memcpy(&error, &e.key, 4);
    loss += error * (jaccard - before);
    if (gradient && jaccard != before) {
      gradient->push_back({e.pixel, float(is_own ? before - jaccard : jaccard - before)});
    }
    before = jaccard;
  }
  return loss;
}

// Upsampled logits of one class, row by row.
template <class Row>
void for_rows(const float* plane, int64_t h, int64_t w, const Stretch& rows, const Stretch& columns,
              Row&& row) {
  const int64_t height = int64_t(rows.first.size()), width = int64_t(columns.first.size());
  std::vector<float> top(width), bottom(width), values(width);
  int64_t at = -1;
  for (int64_t y = 0; y < height; ++y) {
    if (rows.first[y] != at) {
      at = rows.first[y];
      stretch_row(plane + at * w, h * w, 1, columns, top.data());
      stretch_row(plane + std::min(at + 1, h - 1) * w, h * w, 1, columns, bottom.data());
    }
    const float share = float(rows.share[y]);
#pragma omp simd
    for (int64_t x = 0; x < width; ++x) values[x] = mixed(top[x], bottom[x], share);
    row(y, values.data());
  }
}

std::tuple<Tensor, Tensor> lovasz_softmax_fwd(const Tensor& input, const Tensor& labels, bool from_logits,
                                              bool align_corners, int64_t ignore_index, bool gradient) {
  const Tensor z = readable_scores(input, at::kFloat), truth = labels.to(at::kLong).contiguous();
  const int64_t batch = z.size(0), classes = z.size(1), h = z.size(2), w = z.size(3);
  const int64_t height = truth.size(1), width = truth.size(2), plane = height * width, pixels = batch * plane;
  TORCH_CHECK_VALUE(classes < 255, "lovasz_softmax takes at most 254 classes, got ", classes);
  TORCH_CHECK_VALUE(pixels < int64_t(1) << 32, "lovasz_softmax takes fewer than 2^32 pixels, got ", pixels);
  const Stretch rows(h, height, align_corners), columns(w, width, align_corners);
  Tensor grad = at::zeros(gradient ? z.sizes() : at::IntArrayRef({0}), z.options());
  const float* from = z.const_data_ptr<float>();

  constexpr uint8_t kIgnored = 255;
  std::vector<uint8_t> label(pixels);
  std::vector<int64_t> count(classes, 0);
  for (int64_t i = 0; i < pixels; ++i) {
    const int64_t y = truth.const_data_ptr<int64_t>()[i];
    const bool valid = y != ignore_index && y >= 0 && y < classes;
    label[i] = valid ? uint8_t(y) : kIgnored;
    if (valid) ++count[y];
  }
  std::vector<int64_t> present;
  for (int64_t k = 0; k < classes; ++k) {
    if (count[k]) present.push_back(k);
  }
  if (present.empty()) return {scalar_result(0.0, z), grad};

  std::vector<float> log_sum(from_logits ? pixels : 0);
  if (from_logits) {
    at::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        float* total = log_sum.data() + b * plane;
        std::vector<float> best(plane, -std::numeric_limits<float>::infinity());
        const auto each = [&](auto&& use) {
          for (int64_t k = 0; k < classes; ++k) {
            for_rows(from + (b * classes + k) * h * w, h, w, rows, columns,
                     [&](int64_t y, const float* v) { use(y * width, v); });
          }
        };
        each([&](int64_t at, const float* v) {
          for (int64_t x = 0; x < width; ++x) best[at + x] = std::max(best[at + x], v[x]);
        });
        each([&](int64_t at, const float* v) { add_exponentials(v, best.data() + at, width, total + at); });
        add_logarithms(best.data(), plane, total);
      }
    });
  }
  const auto probabilities = [&](int64_t k, std::vector<float>& p) {
    for (int64_t b = 0; b < batch; ++b) {
      const float* image = from + (b * classes + k) * h * w;
      if (!from_logits) {
        std::copy(image, image + plane, p.data() + b * plane);
        continue;
      }
      for_rows(image, h, w, rows, columns, [&](int64_t y, const float* v) {
        const int64_t at = b * plane + y * width;
        exponentials(v, log_sum.data() + at, width, p.data() + at);
      });
    }
  };

  std::vector<double> losses(present.size());
  std::vector<std::vector<Gradient>> gradients(present.size());
  share_tasks(int64_t(present.size()), kClasses, [&](const auto& take) {
    std::vector<float> p(pixels);
    std::vector<Error> errors, spare;
    for (int64_t i; (i = take()) >= 0;) {
      probabilities(present[i], p);
      losses[i] = class_loss(p, label, uint8_t(present[i]), kIgnored, count[present[i]], errors, spare,
                             gradient ? &gradients[i] : nullptr);
    }
  });
  double loss = 0;
  for (const double value : losses) loss += value / double(present.size());
  if (!gradient) return {scalar_result(loss, z), grad};

  const float scale = 1 / float(present.size());
  float* to = grad.mutable_data_ptr<float>();
  if (!from_logits) {
    for (size_t i = 0; i < present.size(); ++i) {
      for (const Gradient& g : gradients[i]) {
        to[(g.pixel / plane * classes + present[i]) * plane + g.pixel % plane] = scale * g.value;
      }
    }
    return {scalar_result(loss, z), grad};
  }
  // the softmax's backward: dz_k = p_k (g_k - sum_c g_c p_c)
  std::vector<float> inner(pixels, 0.0f);
  {
    std::vector<float> p(pixels);
    for (size_t i = 0; i < present.size(); ++i) {
      probabilities(present[i], p);
      for (const Gradient& g : gradients[i]) inner[g.pixel] += g.value * p[g.pixel];
    }
  }
  std::vector<int64_t> place(classes, -1);
  for (size_t i = 0; i < present.size(); ++i) place[present[i]] = int64_t(i);
  share_tasks(classes, kClasses, [&](const auto& take) {
    std::vector<float> p(pixels), g(pixels), lower(width), upper(width);
    for (int64_t k; (k = take()) >= 0;) {
      probabilities(k, p);
      for (int64_t i = 0; i < pixels; ++i) g[i] = -inner[i];
      if (place[k] >= 0) {
        for (const Gradient& own : gradients[place[k]]) g[own.pixel] += own.value;
      }
      for (int64_t b = 0; b < batch; ++b) {
        float* image = to + (b * classes + k) * h * w;
        for (int64_t y = 0; y < height;) {
          const int64_t at = rows.first[y];
          std::fill(upper.begin(), upper.end(), 0.0f);
          std::fill(lower.begin(), lower.end(), 0.0f);
          for (; y < height && rows.first[y] == at; ++y) {
            const float share = float(rows.share[y]);
            const float *q = p.data() + b * plane + y * width, *d = g.data() + b * plane + y * width;
#pragma omp simd
            for (int64_t x = 0; x < width; ++x) {
              const float value = scale * q[x] * d[x];
              upper[x] += (1 - share) * value;
              lower[x] += share * value;
            }
          }
          shrink_row(upper.data(), w, 1, columns, image + at * w);
          shrink_row(lower.data(), w, 1, columns, image + std::min(at + 1, h - 1) * w);
        }
      }
    }
  });
  return {scalar_result(loss, z), grad};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastuda, CPU, m) { m.impl("lovasz_softmax_fwd.cpu", &lovasz_softmax_fwd); }

}  // namespace fastuda
