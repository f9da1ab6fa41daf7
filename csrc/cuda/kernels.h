// The CUDA kernels behind a plain C ABI: raw device pointers, sizes and a stream. Neither torch nor CUDA
// headers are needed to call them. Each returns a cudaError_t; fastuda_cuda_error() says what it means.
#pragma once

#include <cstdint>

#define FASTUDA_EXPORT extern "C" __attribute__((visibility("default")))

FASTUDA_EXPORT const char* fastuda_cuda_error(int code);

// Probabilities [batch, classes, height, width] in float32, contiguous; neighbours 4 or 8; distance at
// least 1.
struct AffinityShape {
  int64_t batch;
  int classes, height, width, neighbours, distance;
};

// out [batch, neighbours classes, height, width]; of products [batch, neighbours, height, width].
FASTUDA_EXPORT int fastuda_local_affinity_fwd(const float* p, float* out, AffinityShape shape, bool product,
                                              void* stream);
// grad is shaped as out above, p_grad as p.
FASTUDA_EXPORT int fastuda_local_affinity_bwd(const float* grad, const float* p, float* p_grad,
                                              AffinityShape shape, bool product, void* stream);

// The sum of all products and, unless p_grad is null, its gradient. partial holds affinity_blocks(shape)
// doubles.
FASTUDA_EXPORT int64_t fastuda_affinity_blocks(AffinityShape shape);
FASTUDA_EXPORT int fastuda_affinity_cleaning(const float* p, float* total, float* p_grad, double* partial,
                                             AffinityShape shape, void* stream);

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

// Scores [batch, classes, h, w] in float32 and int64 labels [batch, height, width], contiguous.
struct ConfusionShape {
  int64_t batch, classes, h, w, height, width, ignore;
  bool align_corners;
};

// Adds to matrix [classes classes + 1]: rows = truth, columns = prediction, then the labels that are no
// class.
FASTUDA_EXPORT int fastuda_upsample_confusion(const float* scores, const int64_t* labels, int64_t* matrix,
                                              uint8_t* predicted, ConfusionShape shape, void* stream);

// Logits [batch, classes, h, w] in float32, contiguous, upsampled to height x width.
struct UpsampleShape {
  int64_t batch, classes, h, w, height, width;
  bool align_corners;
};
// One over the temperature, the label smoothing, the hard label to leave out.
struct EntropyOptions {
  float sharpness, smoothing;
  int64_t ignore;
};
// Segmentation logits [batch, classes, seg_h, seg_w]: their classes begin at channel `offset` of the domain
// logits. `level` clips soft labels, or is the least probability of hard ones.
struct DomainOptions {
  int classes, offset;
  int64_t seg_h, seg_w;
  float sharpness, level;
  bool hard;
};

// Labels are hard [batch, height, width] or soft [batch, classes, height, width]; the other is null, as are
// weights [classes] and [batch, height, width] that are not wanted. Writes the sums of the losses and of the
// weights, adds to grad, as logits, and writes losses [batch, height, width] where these are not null.
// partial holds 2 fastuda_upsample_blocks(shape) doubles.
FASTUDA_EXPORT int64_t fastuda_upsample_blocks(UpsampleShape shape);
FASTUDA_EXPORT int fastuda_upsample_cross_entropy(const float* logits, const int64_t* hard, const float* soft,
                                                  const float* class_weight, const float* pixel_weight,
                                                  float* grad, float* losses, float* total, float* norm,
                                                  double* partial, UpsampleShape shape,
                                                  EntropyOptions options, void* stream);
FASTUDA_EXPORT int fastuda_domain_cross_entropy(const float* domain, const float* seg, float* grad,
                                                float* total, double* partial, UpsampleShape shape,
                                                DomainOptions options, void* stream);

// Copies device memory to the host and waits for it.
FASTUDA_EXPORT int fastuda_read(void* to, const void* from, int64_t bytes, void* stream);
