// Row sweeps of the affinities between neighbouring pixels; the arithmetic is in local_affinity_math.h.
#pragma once

#include "../common.h"

namespace fastuda {

// One row of pixels and the row of their neighbours in one direction; all pointers are to `width` values.
template <class S>
struct NeighbourRow {
  int64_t width;
  const S *own, *other;
  const S *log_one, *log_zero;  // of the clamped own p and 1 - p
  const S* other_log;           // of the neighbours' clamped p
};

// log of clamp(p), or of clamp(1 - p), for a row.
template <class S>
void affinity_log_one(const S* p, int64_t width, S* out);
template <class S>
void affinity_log_zero(const S* p, int64_t width, S* out);

// out = KL(Bern(q) || Bern(p)).
template <class S>
void affinity_row(const NeighbourRow<S>& row, S* out);

// Adds the gradient of sum(grad * affinity) to those of own and other.
template <class S>
void affinity_gradient_row(const NeighbourRow<S>& row, const S* grad, S* own_grad, S* other_grad);

// pixels [width, count] = the transpose of planes [count, width], whose rows are `step` elements apart.
template <class S>
void planes_to_pixels(const S* planes, int64_t step, int64_t count, int64_t width, S* pixels);
template <class S>
void pixels_to_planes(const S* pixels, int64_t count, int64_t width, S* planes, int64_t step);

// sum += own * other
template <class S>
void product_row(const S* own, const S* other, int64_t width, S* sum);

// Adds grad * other to own_grad and grad * own to other_grad.
template <class S>
void product_gradient_row(const S* own, const S* other, const S* grad, int64_t width, S* own_grad,
                          S* other_grad);

}  // namespace fastuda
