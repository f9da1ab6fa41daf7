// class_statistics on the GPU: a block walks down a strip of features, with the moments of every class in
// shared memory. A thread owns a channel, so threads share nothing and there are no atomics.
#include "../class_statistics_math.h"
#include "kernels.h"

// Features [rows, width] in float32, contiguous, and int64 labels [rows].
struct StatisticsShape {
  int64_t rows, width, classes, ignore;
};

// count [classes], mean and variance [classes, width]; partial holds fastuda_statistics_partials(shape)
// floats.
FASTUDA_EXPORT int64_t fastuda_statistics_partials(StatisticsShape shape);
FASTUDA_EXPORT int fastuda_class_statistics(const float* features, const int64_t* labels, float* count,
                                            float* mean, float* variance, float* partial,
                                            StatisticsShape shape, void* stream);

#if defined(FASTUDA_TORCH)

#include "registration.h"

static std::tuple<Tensor, Tensor, Tensor> class_statistics_fwd(Tensor features, Tensor labels,
                                                               int64_t classes, int64_t ignore_index) {
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

STABLE_TORCH_LIBRARY_IMPL(fastuda, CUDA, m) {
  m.impl("class_statistics_fwd.cuda", TORCH_BOX(&class_statistics_fwd));
}

#elif defined(FASTUDA_SMALL)

const Small statistics([] {
  const StatisticsShape shape{300, 40, 5, 255};
  const auto features = random_values(300 * 40);
  const auto labels = random_labels(300, 5);
  std::vector<float> count(5), mean(5 * 40), variance(5 * 40);
  std::vector<float> partial(size_t(fastuda_statistics_partials(shape)));
  fastuda_class_statistics(features.data(), labels.data(), count.data(), mean.data(), variance.data(),
                           partial.data(), shape, nullptr);
});

#else

#include "launch.h"

namespace fastuda {

namespace {

constexpr int kRows = 128, kAhead = 8, kSharedBytes = 48 << 10, kMergeThreads = 128;

int64_t strips(const StatisticsShape& s) { return (s.rows + kRows - 1) / kRows; }

// partial: counts [strips, classes], then means and deviations [strips, classes, width]
__global__ void __launch_bounds__(128, 8) strip_moments(const float* features, const int64_t* labels,
                                                        float* partial, StatisticsShape s, int window) {
  FASTUDA_SHARED(float, memory);
  const int channels = int(blockDim.x), me = int(threadIdx.x);
  const int64_t across = (s.width + channels - 1) / channels, windows = (s.classes + window - 1) / window;
  const int64_t strip = blockIdx.x / (across * windows), first = blockIdx.x / across % windows * window;
  const int64_t channel = blockIdx.x % across * channels + me;
  const int count = int(s.classes - first < window ? s.classes - first : window);
  float *n = memory + me, *mean = n + count * channels, *deviation = mean + count * channels;
  for (int i = 0; i < 3 * count; ++i) n[i * channels] = 0.0f;
  const int64_t end = (strip + 1) * kRows < s.rows ? (strip + 1) * kRows : s.rows;
  if (channel >= s.width) return;
  for (int64_t i = strip * kRows; i < end; i += kAhead) {
    // all rows are read before any is used, because each separate row would pay for the memory's latency
    int64_t label[kAhead];
    float value[kAhead];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const int64_t row = i + a < end ? i + a : end - 1;
      label[a] = labels[row];
      value[a] = features[row * s.width + channel];
    }
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const int64_t k = label[a] - first;
      if (i + a >= end || label[a] == s.ignore || k < 0 || k >= count) continue;
      const int at = int(k) * channels;
      const float seen = n[at] + 1.0f;
      const Moments<float> m = with_value(Moments<float>{mean[at], deviation[at]}, value[a], 1.0f / seen);
      n[at] = seen;
      mean[at] = m.mean;
      deviation[at] = m.deviation;
    }
  }
  const int64_t strips = (s.rows + kRows - 1) / kRows, plane = s.classes * s.width;
  float *means = partial + strips * s.classes + strip * plane, *deviations = means + strips * plane;
  for (int k = 0; k < count; ++k) {
    const int64_t to = (first + k) * s.width + channel;
    means[to] = mean[k * channels];
    deviations[to] = deviation[k * channels];
    if (channel == 0) partial[strip * s.classes + first + k] = n[k * channels];
  }
}

__global__ void __launch_bounds__(kMergeThreads, 8)
    merge_strips(const float* partial, float* count, float* mean, float* variance, StatisticsShape s) {
  const int64_t place = int64_t(blockIdx.x) * kMergeThreads + threadIdx.x, plane = s.classes * s.width;
  if (place >= plane) return;
  const int64_t k = place / s.width, strips = (s.rows + kRows - 1) / kRows;
  const float *means = partial + strips * s.classes, *deviations = means + strips * plane;
  Moments<float> all{0.0f, 0.0f};
  float n = 0.0f;
#pragma unroll 8
  for (int64_t strip = 0; strip < strips; ++strip) {
    const float here = partial[strip * s.classes + k];
    const int64_t at = strip * plane + place;
    all = merged(all, n, Moments<float>{means[at], deviations[at]}, here);
    n += here;
  }
  mean[place] = all.mean;
  variance[place] = all.deviation / (n > 1.0f ? n : 1.0f);
  if (place % s.width == 0) count[k] = n;
}

}  // namespace

}  // namespace fastuda

using namespace fastuda;

int64_t fastuda_statistics_partials(StatisticsShape s) { return strips(s) * s.classes * (1 + 2 * s.width); }

int fastuda_class_statistics(const float* features, const int64_t* labels, float* count, float* mean,
                             float* variance, float* partial, StatisticsShape s, void* stream) {
  const int channels = s.classes <= 32 ? 128 : 32;
  const int64_t most = kSharedBytes / (3 * 4 * channels), window = s.classes < most ? s.classes : most;
  const int64_t across = (s.width + channels - 1) / channels, windows = (s.classes + window - 1) / window;
  const int failed = launch(strip_moments, strips(s) * across * windows, channels, window * channels * 3 * 4,
                            stream, features, labels, partial, s, int(window));
  if (failed) return failed;
  return launch(merge_strips, (s.classes * s.width + kMergeThreads - 1) / kMergeThreads, kMergeThreads, 0,
                stream, static_cast<const float*>(partial), count, mean, variance, s);
}

#endif
