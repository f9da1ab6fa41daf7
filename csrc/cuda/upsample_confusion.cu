// upsample_confusion on the GPU: a thread walks down a column of outputs; a block counts in shared memory if
// the pairs of classes fit there. The sums are of integers, so two runs agree.
#include "../upsample_math.h"
#include "kernels.h"

// Scores [batch, classes, h, w] in float32 and int64 labels [batch, height, width], contiguous.
struct ConfusionShape {
  int64_t batch, classes, h, w, height, width, ignore;
  bool align_corners;
};

// Adds to matrix [classes classes + 1]: rows = truth, columns = prediction, then the count of invalid labels.
FASTUDA_EXPORT int fastuda_upsample_confusion(const float* scores, const int64_t* labels, int64_t* matrix,
                                              uint8_t* predicted, ConfusionShape shape, void* stream);

#if defined(FASTUDA_TORCH)

#include "registration.h"

static std::tuple<Tensor, Tensor> upsample_confusion_fwd(Tensor scores, Tensor labels, bool align_corners,
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

STABLE_TORCH_LIBRARY_IMPL(fastuda, CUDA, m) {
  m.impl("upsample_confusion_fwd.cuda", TORCH_BOX(&upsample_confusion_fwd));
}

#elif defined(FASTUDA_SMALL)

void confusion(int64_t classes) {
  const ConfusionShape shape{1, classes, 3, 4, 7, 150, 255, true};
  const auto scores = random_values(size_t(classes) * 12);
  const auto labels = random_labels(7 * 150, classes);
  std::vector<int64_t> matrix(size_t(classes * classes) + 1);
  std::vector<uint8_t> predicted(7 * 150);
  fastuda_upsample_confusion(scores.data(), labels.data(), matrix.data(), predicted.data(), shape, nullptr);
}

// counts in shared memory, and counts directly in the matrix
const Small few([] { confusion(5); }), many([] { confusion(120); });

#else

#include "launch.h"

namespace fastuda {

namespace {

constexpr int kThreads = 128, kStrip = 16, kSharedBytes = 48 << 10;

__global__ void __launch_bounds__(kThreads, 8)
    count_strips(const float* scores, const int64_t* labels, unsigned long long* matrix, uint8_t* predicted,
                 ConfusionShape s, int shared_cells) {
  FASTUDA_SHARED(int, counts);
  const int64_t across = (s.width + kThreads - 1) / kThreads, down = (s.height + kStrip - 1) / kStrip;
  const int64_t image = blockIdx.x / (across * down), top = blockIdx.x / across % down * kStrip;
  const int64_t x = blockIdx.x % across * kThreads + threadIdx.x, plane = s.h * s.w;
  for (int i = int(threadIdx.x); i < shared_cells; i += kThreads) counts[i] = 0;
  __syncthreads();
  const Between column = sources_of(x < s.width ? x : s.width - 1, s.w, s.width, s.align_corners);
  const float column_share = float(column.share);
  const float* planes = scores + image * s.classes * plane;
  const int64_t end = top + kStrip < s.height ? top + kStrip : s.height;
  for (int64_t y = top; x < s.width && y < end; ++y) {
    const Between row = sources_of(y, s.h, s.height, s.align_corners);
    const float row_share = float(row.share);
    const float *upper = planes + row.first * s.w, *lower = planes + row.second * s.w;
    float best = 0.0f;
    int guess = 0;
#pragma unroll 4
    for (int k = 0; k < int(s.classes); ++k) {
      const float *above = upper + k * plane, *below = lower + k * plane;
      const float a = mixed(bounded(above[column.first]), bounded(above[column.second]), column_share);
      const float b = mixed(bounded(below[column.first]), bounded(below[column.second]), column_share);
      const float value = mixed(a, b, row_share);
      if (k == 0 || value > best) {
        best = value;
        guess = k;
      }
    }
    const int64_t at = (image * s.height + y) * s.width + x, label = labels[at];
    predicted[at] = uint8_t(guess);
    if (label == s.ignore) continue;
    const int64_t cell = label < 0 || label >= s.classes ? s.classes * s.classes : label * s.classes + guess;
    if (shared_cells) {
      atomicAdd(counts + cell, 1);
    } else {
      atomicAdd(matrix + cell, 1ull);
    }
  }
  __syncthreads();
  for (int i = int(threadIdx.x); i < shared_cells; i += kThreads) {
    const int count = counts[i];
    if (count) atomicAdd(matrix + i, static_cast<unsigned long long>(count));
  }
}

}  // namespace

}  // namespace fastuda

using namespace fastuda;

int fastuda_upsample_confusion(const float* scores, const int64_t* labels, int64_t* matrix,
                               uint8_t* predicted, ConfusionShape s, void* stream) {
  const int64_t across = (s.width + kThreads - 1) / kThreads, down = (s.height + kStrip - 1) / kStrip;
  const int64_t cells = s.classes * s.classes + 1, shared = cells * 4 <= kSharedBytes ? cells : 0;
  return launch(count_strips, s.batch * across * down, kThreads, shared * 4, stream, scores, labels,
                reinterpret_cast<unsigned long long*>(matrix), predicted, s, int(shared));
}

int fastuda_read(void* to, const void* from, int64_t bytes, void* stream) {
  return read_back(to, from, bytes, stream);
}

#endif
