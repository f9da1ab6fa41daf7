// Losses of bilinearly upsampled logits in one pass over the pixels, with a thread per output column, so that
// threads share no class. A block owns a few source rows and columns. It walks over the output rows between
// two source rows, several rows at once, class by class. It keeps a few numbers per output row, and none per
// class. In shared memory, the gradient of the output columns is reduced to the source columns, once per
// class. Both blocks compute the outputs between them, so there are no atomics.
#pragma once

#include "kernels.h"

// Logits [batch, classes, h, w] in float32, contiguous, upsampled to height x width.
struct UpsampleShape {
  int64_t batch, classes, h, w, height, width;
  bool align_corners;
};

// Half the number of doubles in `partial`.
FASTUDA_EXPORT int64_t fastuda_upsample_blocks(UpsampleShape shape);

#if defined(FASTUDA_TORCH)

#include "registration.h"

static UpsampleShape upsample_shape(const Tensor& logits, int64_t height, int64_t width, bool align_corners) {
  return {logits.size(0), logits.size(1), logits.size(2), logits.size(3), height, width, align_corners};
}

#elif !defined(FASTUDA_SMALL)

#include "../upsample_math.h"
#include "launch.h"
#include "sums.h"

namespace fastuda {

constexpr int kColumns = 128;   // number of threads, and of output columns at once
constexpr int kSourceRows = 4;  // number of source rows that a block owns
constexpr int kMostSourceColumns = 32;
constexpr int kClassesAtOnce = 16;  // number of classes whose gradient is in shared memory

FASTUDA_HOST_DEVICE int64_t owned_columns(const UpsampleShape& s) {
  const int64_t fit = kColumns * s.w / s.width - 1;
  return fit < 1 ? 1 : fit > kMostSourceColumns ? kMostSourceColumns : fit;
}
inline int64_t walk_blocks(const UpsampleShape& s) {
  const int64_t owned = owned_columns(s);
  return s.batch * ((s.h + kSourceRows - 1) / kSourceRows) * ((s.w + owned - 1) / owned);
}
inline int64_t walk_bytes() {
  const int64_t floats = 2 * kClassesAtOnce * kColumns + kColumns;
  return floats * 4 + (kMostSourceColumns + 3 + kSourceRows + 2) * 4;
}

// The first of the `to` outputs whose source is `source` or a later one.
FASTUDA_HOST_DEVICE int first_output(int64_t source, int64_t from, int64_t to, bool align_corners) {
  int64_t low = 0, high = to;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (sources_of(middle, from, to, align_corners).first < source) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return int(low);
}

// The columns of two neighbouring source rows, stretched to an output.
struct Stretched {
  float top, step;
  __device__ float at(float share) const { return top + share * step; }
};
__device__ inline Stretched stretched(const float* upper, const float* lower, const Between& column) {
  const float share = float(column.share);
  const float a = mixed(bounded(upper[column.first]), bounded(upper[column.second]), share);
  const float b = mixed(bounded(lower[column.first]), bounded(lower[column.second]), share);
  return {a, b - a};
}

// The position of a thread: its output column and the `R` output rows from y, of which `rows` exist. A thread
// outside the image has the position of a valid pixel, and weight 0.
struct Place {
  int64_t image;
  int x, y, rows;
  bool inside;
};

// The source rows and columns that a block owns, and the first outputs around them.
struct Sources {
  int64_t image;
  int r0, r_low, r_high, c0, c_low, c_high;  // from low on, sources have outputs that reach into the block
  int *row_start, *column_start;  // first outputs of r_low, c_low and those after, in shared memory

  // All threads of the block call this together.
  __device__ Sources(const UpsampleShape& s, bool gradient, int* memory)
      : row_start(memory), column_start(memory + kSourceRows + 2) {
    const int owned = int(owned_columns(s)), h = int(s.h), w = int(s.w);
    const int across = (w + owned - 1) / owned, down = (h + kSourceRows - 1) / kSourceRows;
    image = blockIdx.x / (across * down);
    r0 = int(blockIdx.x / across % down) * kSourceRows;
    c0 = int(blockIdx.x % across) * owned;
    r_low = gradient && r0 > 0 ? r0 - 1 : r0;
    c_low = gradient && c0 > 0 ? c0 - 1 : c0;
    r_high = r0 + kSourceRows < h ? r0 + kSourceRows : h;
    c_high = c0 + owned < w ? c0 + owned : w;
    for (int i = int(threadIdx.x); i <= c_high - c_low; i += kColumns) {
      column_start[i] = first_output(c_low + i, s.w, s.width, s.align_corners);
    }
    for (int i = int(threadIdx.x); i <= r_high - r_low; i += kColumns) {
      row_start[i] = first_output(r_low + i, s.h, s.height, s.align_corners);
    }
    __syncthreads();
  }
};

// Reduces the gradient of `count` classes from `first`, for the output columns from x0, to the source
// columns: a thread per class and source column adds it to the source rows above and below.
__device__ inline void squeeze(const float* by_upper, const float* by_lower, const float* shares, int x0,
                               int first, int count, int r, const Sources& b, const UpsampleShape& s,
                               float* grad) {
  const int wide = b.c_high - b.c0, next = r + 1 < s.h ? r + 1 : r;
  for (int item = int(threadIdx.x); item < count * wide; item += kColumns) {
    const int k = item / wide, c = b.c0 + item % wide;
    float to_upper = 0.0f, to_lower = 0.0f;
    for (int side = c > 0 ? -1 : 0; side <= 0; ++side) {  // outputs before the source, and after it
      const int low = b.column_start[c + side - b.c_low], high = b.column_start[c + side + 1 - b.c_low];
      const int stop = high < x0 + kColumns ? high : x0 + kColumns;
      for (int x = low > x0 ? low : x0; x < stop; ++x) {
        // the last source has no next one and takes that share itself
        const float after = shares[x - x0], weight = side < 0 ? after : c == s.w - 1 ? 1.0f : 1.0f - after;
        to_upper += weight * by_upper[k * kColumns + x - x0];
        to_lower += weight * by_lower[k * kColumns + x - x0];
      }
    }
    float* const to = grad + ((b.image * s.classes + first + k) * s.h) * s.w + c;
    if (r >= b.r0) to[int64_t(r) * s.w] += to_upper;
    if (next >= b.r0 && next < b.r_high) to[int64_t(next) * s.w] += to_lower;
  }
}

// Two source rows of all classes at one output column.
struct RowPair {
  const float *upper, *lower;
  int64_t plane;
  Between column;

  __device__ Stretched of_class(int k) const {
    return stretched(upper + k * plane, lower + k * plane, column);
  }
};

// For R output rows of a column: the largest logit, the sum of the exponentials relative to it, the sum of
// the targets, and the sum of the targets times the logits.
template <int R>
struct Scores {
  float share[R], best[R], total[R], mass[R], own[R];

  template <class Rows>
  __device__ Scores(const RowPair& pair, const Rows& rows, const Place& place, const UpsampleShape& s,
                    float scale) {
#pragma unroll
    for (int j = 0; j < R; ++j) {
      const int64_t y = j < place.rows ? place.y + j : place.y;
      share[j] = float(sources_of(y, s.h, s.height, s.align_corners).share);
      best[j] = -INFINITY;
      total[j] = mass[j] = own[j] = 0.0f;
    }
    for (int k = 0; k < int(s.classes); ++k) {
      const Stretched z = pair.of_class(k);
#pragma unroll
      for (int j = 0; j < R; ++j) best[j] = fmaxf(best[j], z.at(share[j]));
    }
    for (int k = 0; k < int(s.classes); ++k) {
      const Stretched z = pair.of_class(k);
      float q[R];
      rows.of_class(k, q);
#pragma unroll
      for (int j = 0; j < R; ++j) {
        const float value = z.at(share[j]);
        total[j] += rough_exp2((value - best[j]) * scale);
        mass[j] += q[j];
        own[j] += q[j] == 0.0f ? 0.0f : q[j] * value;  // a value without weight may be infinite
      }
    }
  }
};

// `Target` gives the weighted targets of a class for the rows of a position: Target::Rows<R>, constructed
// from the target, the position and the shape, has
//   of_class(k, q): the targets q of class k, 0 for rows that do not exist or are not valid;
//   weight(j): the weight of row j, for the sum of the weights.
template <class Target, int R, bool Gradient>
__global__ void __launch_bounds__(kColumns, 3)
    walk(const float* logits, Target target, float* grad, float* losses, double* partial, UpsampleShape s,
         float sharpness) {
  FASTUDA_SHARED(float, memory);
  float *by_upper = memory, *by_lower = by_upper + kClassesAtOnce * kColumns;
  float* shares = by_lower + kClassesAtOnce * kColumns;
  const Sources b(s, Gradient, reinterpret_cast<int*>(shares + kColumns));
  const int me = int(threadIdx.x), classes = int(s.classes);
  const int begin = b.column_start[0], end = b.column_start[b.c_high - b.c_low];
  const float scale = sharpness * 1.44269504f;  // for powers of two
  float loss = 0.0f, norm = 0.0f;
  for (int r = b.r_low; r < b.r_high; ++r) {
    const float* const upper = logits + (b.image * classes * s.h + r) * s.w;
    for (int x0 = begin; x0 < end; x0 += kColumns) {
      const bool inside = x0 + me < end;
      const int x = inside ? x0 + me : end - 1, end_y = b.row_start[r + 1 - b.r_low];
      const RowPair pair{upper, r + 1 < s.h ? upper + s.w : upper, s.h * s.w,
                         sources_of(x, s.w, s.width, s.align_corners)};
      shares[me] = float(pair.column.share);
      // pixels between two blocks add to the gradient of both, but to the loss of only one
      const bool mine = inside && pair.column.first >= b.c0 && r >= b.r0;
      for (int y = b.row_start[r - b.r_low]; y < end_y; y += R) {
        const Place place{b.image, x, y, end_y - y < R ? end_y - y : R, inside};
        const typename Target::template Rows<R> rows(target, place, s);
        const Scores<R> z(pair, rows, place, s, scale);
        float factor[R];
#pragma unroll
        for (int j = 0; j < R; ++j) {
          // weighted targets do not add up to 1, so the log-sum-exp is multiplied by their sum
          const float lse = z.best[j] * sharpness + rough_log(z.total[j]);
          const float term = (z.mass[j] == 0.0f ? 0.0f : z.mass[j] * lse) - sharpness * z.own[j];
          factor[j] = z.mass[j] == 0.0f ? 0.0f : sharpness * rough_quotient(z.mass[j], z.total[j]);
          if (!mine || j >= place.rows) continue;
          loss += term;
          norm += rows.weight(j);
          if (losses) losses[(b.image * s.height + y + j) * s.width + x] = term;
        }
        for (int first = 0; Gradient && first < classes; first += kClassesAtOnce) {
          const int count = classes - first < kClassesAtOnce ? classes - first : kClassesAtOnce;
          for (int k = 0; k < count; ++k) {
            const Stretched pixel = pair.of_class(first + k);
            float q[R], above = 0.0f, below = 0.0f;
            rows.of_class(first + k, q);
#pragma unroll
            for (int j = 0; j < R; ++j) {
              const float e = rough_exp2((pixel.at(z.share[j]) - z.best[j]) * scale);
              const float slope = (factor[j] == 0.0f ? 0.0f : factor[j] * e) - sharpness * q[j];
              below += z.share[j] * slope;
              above += slope;
            }
            by_upper[k * kColumns + me] = inside ? above - below : 0.0f;
            by_lower[k * kColumns + me] = inside ? below : 0.0f;
          }
          __syncthreads();
          squeeze(by_upper, by_lower, shares, x0, first, count, r, b, s, grad);
          __syncthreads();
        }
      }
    }
  }
  double* const sums = reinterpret_cast<double*>(memory);
  const double all = block_sum<kColumns>(loss, sums), weights = block_sum<kColumns>(norm, sums);
  if (me > 0) return;
  partial[blockIdx.x] = all;
  partial[gridDim.x + blockIdx.x] = weights;
}

// Adds to grad and writes the losses of pixels, each unless it is null. Also writes the sum of the losses
// and, unless norm is null, the sum of the weights. partial holds 2 walk_blocks doubles.
template <class Target>
int launch_walk(const float* logits, const Target& target, float* grad, float* losses, float* total,
                float* norm, double* partial, const UpsampleShape& s, float sharpness, void* stream) {
  const int64_t blocks = walk_blocks(s);
  // as many output rows at once as typically lie between two source rows
  const bool tall = s.height > 5 * s.h;
  const auto kernel = grad ? (tall ? walk<Target, 8, true> : walk<Target, 4, true>)
                           : (tall ? walk<Target, 8, false> : walk<Target, 4, false>);
  const int failed = launch(kernel, blocks, kColumns, walk_bytes(), stream, logits, target, grad, losses,
                            partial, s, sharpness);
  return failed ? failed : launch_sums(partial, blocks, total, norm, stream);
}

}  // namespace fastuda

#endif
