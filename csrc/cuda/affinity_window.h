// Tiles of a plane of probabilities and their neighbours in shared memory, for the kernels of local_affinity
// and affinity_cleaning_loss.
#pragma once

#include "kernels.h"

// Probabilities [batch, classes, height, width] in float32, contiguous; neighbours 4 or 8; distance at
// least 1.
struct AffinityShape {
  int64_t batch;
  int classes, height, width, neighbours, distance;
};

#if defined(FASTUDA_TORCH)

#include "registration.h"

static AffinityShape affinity_shape(const Tensor& p, int64_t neighbours, int64_t distance) {
  return {p.size(0), int(p.size(1)), int(p.size(2)), int(p.size(3)), int(neighbours), int(distance)};
}

#elif !defined(FASTUDA_SMALL)

#include "../local_affinity_math.h"
#include "launch.h"

namespace fastuda {

constexpr int kTileX = 32, kTileY = 16, kRowsAtOnce = 8, kThreads = kTileX * kRowsAtOnce;
constexpr int kBlocks = 4;          // per multiprocessor, which leaves a thread 64 registers
constexpr int kLargestShared = 15;  // largest distance at which three tiles with their borders fit in 48 KB

// The d-th of D neighbours in raster order, without the centre: rows and columns in -1..1.
template <int D>
FASTUDA_HOST_DEVICE int cell(int d) {
  return D == 8 ? d + (d >= 4) : 2 * d + 1;
}
template <int D>
FASTUDA_HOST_DEVICE int row_offset(int d, int distance) {
  return (cell<D>(d) / 3 - 1) * distance;
}
template <int D>
FASTUDA_HOST_DEVICE int column_offset(int d, int distance) {
  return (cell<D>(d) % 3 - 1) * distance;
}

FASTUDA_HOST_DEVICE int clamped(int i, int n) { return i < 0 ? 0 : i >= n ? n - 1 : i; }

// The pixels i of 0..n - 1 for which i + offset, clamped to 0..n - 1, is j: one inside, several at the
// border.
struct Range {
  int low, high;
};
FASTUDA_HOST_DEVICE Range senders(int j, int offset, int n) {
  const int low = j == 0 ? 0 : j - offset, high = j == n - 1 ? n - 1 : j - offset;
  return {low < 0 ? 0 : low, high > n - 1 ? n - 1 : high};
}

// The tile of a block: a part of one plane.
struct Tile {
  int64_t plane;
  int x, y;
};
__device__ inline Tile tile_of_block(int height, int width) {
  const int across = (width + kTileX - 1) / kTileX, down = (height + kTileY - 1) / kTileY;
  const int64_t block = blockIdx.x;
  return {block / (across * down), int(block % across) * kTileX, int(block / across % down) * kTileY};
}

// A plane of probabilities that can be read near the tile; outside the plane the border is repeated. The tile
// is in shared memory, with the logarithms if requested; for far neighbours reads go to global memory.
template <bool Shared, bool Logs>
class Window {
 public:
  __device__ Window(float* shared, int height, int width, int distance)
      : shared_(shared),
        height_(height),
        width_(width),
        pad_(distance),
        stride_(kTileX + 2 * distance),
        size_(stride_ * (kTileY + 2 * distance)) {}

  // All threads of the block call this together.
  __device__ void load(const float* plane, Tile tile) {
    plane_ = plane;
    tile_ = tile;
    if (!Shared) return;
    __syncthreads();
    for (int i = int(threadIdx.x); i < size_; i += kThreads) {
      const int y = clamped(tile.y - pad_ + i / stride_, height_);
      const int x = clamped(tile.x - pad_ + i % stride_, width_);
      const float p = plane[int64_t(y) * width_ + x];
      shared_[i] = p;
      if (Logs) {
        const OwnLogs<float> logs = own_logs(p);
        shared_[size_ + i] = logs.one;
        shared_[2 * size_ + i] = logs.zero;
      }
    }
    __syncthreads();
  }
  __device__ float at(int y, int x) const {
    if (Shared) return shared_[place(y, x)];
    return plane_[int64_t(clamped(y, height_)) * width_ + clamped(x, width_)];
  }
  __device__ OwnLogs<float> logs(int y, int x) const {
    if (Shared && Logs) return {shared_[size_ + place(y, x)], shared_[2 * size_ + place(y, x)]};
    return own_logs(at(y, x));
  }

 private:
  __device__ int place(int y, int x) const { return (y - tile_.y + pad_) * stride_ + x - tile_.x + pad_; }

  float* shared_;
  int height_, width_, pad_, stride_, size_;
  const float* plane_;
  Tile tile_;
};

// Calls f(y, x) for this thread's pixels of the tile.
template <class F>
__device__ void for_pixels(Tile tile, int height, int width, F&& f) {
  const int x = tile.x + int(threadIdx.x) % kTileX;
  for (int row = int(threadIdx.x) / kTileX; row < kTileY; row += kRowsAtOnce) {
    const int y = tile.y + row;
    if (y < height && x < width) f(y, x);
  }
}

// Calls f(d, i_y, i_x) for every pixel i whose d-th neighbour is (y, x) only because the border is repeated.
template <int D, class F>
__device__ void for_border_senders(int y, int x, int height, int width, int distance, F&& f) {
  if (y > 0 && x > 0 && y < height - 1 && x < width - 1) return;
#pragma unroll 1
  for (int d = 0; d < D; ++d) {
    const int oy = row_offset<D>(d, distance), ox = column_offset<D>(d, distance);
    const Range rows = senders(y, oy, height), columns = senders(x, ox, width);
#pragma unroll 1
    for (int iy = rows.low; iy <= rows.high; ++iy) {
#pragma unroll 1
      for (int ix = columns.low; ix <= columns.high; ++ix) {
        if (iy + oy != y || ix + ox != x) f(d, iy, ix);
      }
    }
  }
}

inline int64_t tiles(const AffinityShape& s) {
  return int64_t((s.width + kTileX - 1) / kTileX) * ((s.height + kTileY - 1) / kTileY);
}

inline int64_t window_bytes(const AffinityShape& s, bool logs) {
  if (s.distance > kLargestShared) return 0;
  return int64_t(kTileX + 2 * s.distance) * (kTileY + 2 * s.distance) * 4 * (logs ? 3 : 1);
}

}  // namespace fastuda

#endif
