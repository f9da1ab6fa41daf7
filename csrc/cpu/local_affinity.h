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

// out [columns, rows] = the transpose of in [rows, columns]; steps are elements from one row to the next.
template <class S>
void transpose_rows(const S* in, int64_t in_step, int64_t rows, int64_t columns, S* out, int64_t out_step);

// sum += own * other
template <class S>
void product_row(const S* own, const S* other, int64_t width, S* sum);

// Adds grad * other to own_grad and grad * own to other_grad.
template <class S>
void product_gradient_row(const S* own, const S* other, const S* grad, int64_t width, S* own_grad,
                          S* other_grad);

}  // namespace fastuda
