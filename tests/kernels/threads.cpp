// Every CUDA kernel on small inputs, for a sanitizer: compiled with csrc/cuda/*.cu and threads_cuda.h. With
// an argument, without barriers.
#include <cstdio>
#include <random>
#include <vector>

#include "kernels.h"

namespace {

std::mt19937 generator(0);

std::vector<float> random_values(size_t count) {
  std::uniform_real_distribution<float> uniform(0.01f, 0.99f);
  std::vector<float> values(count);
  for (float& x : values) x = uniform(generator);
  return values;
}

std::vector<int64_t> random_labels(size_t count, int64_t classes) {
  std::uniform_int_distribution<int64_t> uniform(-1, classes);
  std::vector<int64_t> labels(count);
  for (int64_t& y : labels) y = uniform(generator);
  return labels;
}

void affinities(int neighbours, int distance) {
  const AffinityShape shape{1, 2, 9, 35, neighbours, distance};
  const size_t pixels = 9 * 35;
  const auto p = random_values(2 * pixels);
  std::vector<float> gradient(2 * pixels);
  for (const bool product : {false, true}) {
    const size_t planes = size_t(neighbours) * (product ? 1 : 2);
    std::vector<float> out(planes * pixels);
    const auto weight = random_values(planes * pixels);
    fastuda_local_affinity_fwd(p.data(), out.data(), shape, product, nullptr);
    fastuda_local_affinity_bwd(weight.data(), p.data(), gradient.data(), shape, product, nullptr);
  }
  if (distance > 1) return;
  float total;
  std::vector<double> partial(size_t(fastuda_affinity_blocks(shape)));
  fastuda_affinity_cleaning(p.data(), &total, gradient.data(), partial.data(), shape, nullptr);
}

void statistics() {
  const StatisticsShape shape{300, 40, 5, 255};
  const auto features = random_values(300 * 40);
  const auto labels = random_labels(300, 5);
  std::vector<float> count(5), mean(5 * 40), variance(5 * 40);
  std::vector<float> partial(size_t(fastuda_statistics_partials(shape)));
  fastuda_class_statistics(features.data(), labels.data(), count.data(), mean.data(), variance.data(),
                           partial.data(), shape, nullptr);
}

void confusion(int64_t classes) {
  const ConfusionShape shape{1, classes, 3, 4, 7, 150, 255, true};
  const auto scores = random_values(size_t(classes) * 12);
  const auto labels = random_labels(7 * 150, classes);
  std::vector<int64_t> matrix(size_t(classes * classes) + 1);
  std::vector<uint8_t> predicted(7 * 150);
  fastuda_upsample_confusion(scores.data(), labels.data(), matrix.data(), predicted.data(), shape, nullptr);
}

void upsampled(int64_t height, int64_t width) {
  const UpsampleShape shape{1, 4, 5, 11, height, width, false};
  const size_t pixels = size_t(height * width);
  const auto logits = random_values(4 * 55), seg = random_values(2 * 12), soft = random_values(4 * pixels);
  const auto labels = random_labels(pixels, 4);
  std::vector<float> gradient(4 * 55), losses(pixels);
  std::vector<double> partial(size_t(2 * fastuda_upsample_blocks(shape)));
  float total, norm;
  for (const bool hard : {true, false}) {
    fastuda_upsample_cross_entropy(logits.data(), hard ? labels.data() : nullptr,
                                   hard ? nullptr : soft.data(), nullptr, nullptr, gradient.data(),
                                   losses.data(), &total, &norm, partial.data(), shape,
                                   EntropyOptions{1.0f, 0.1f, 255}, nullptr);
    fastuda_domain_cross_entropy(logits.data(), seg.data(), gradient.data(), &total, partial.data(), shape,
                                 DomainOptions{2, 2, 3, 4, 0.5f, 0.6f, hard}, nullptr);
  }
}

}  // namespace

int main(int count, char**) {
  emulated::barriers = count == 1;
  affinities(8, 1);
  affinities(4, 3);
  statistics();
  confusion(5);    // counts in shared memory
  confusion(120);  // and straight in the matrix
  upsampled(30, 70);
  upsampled(7, 200);
  std::puts("every kernel ran");
}
