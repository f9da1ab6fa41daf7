// local_affinity on the GPU. A block holds a tile of one plane of probabilities and its border in shared
// memory: the plane is read once, the planes of all directions are written from there. The backward gathers:
// every pixel adds what it receives from its neighbours, so that no atomics are needed and two runs agree bit
// for bit.
#include "../local_affinity_math.h"
#include "kernels.h"

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

#if defined(FASTUDA_TORCH)

#include "registration.h"

static AffinityShape affinity_shape(const Tensor& p, int64_t neighbours, int64_t distance) {
  return {p.size(0), int(p.size(1)), int(p.size(2)), int(p.size(3)), int(neighbours), int(distance)};
}

static Tensor local_affinity_fwd(Tensor probabilities, int64_t neighbours, int64_t distance, bool product) {
  const DeviceGuard guard(probabilities.get_device_index());
  const Tensor p = floats(probabilities);
  const int64_t planes = product ? neighbours : neighbours * p.size(1);
  Tensor out = torch::stable::new_empty(p, {p.size(0), planes, p.size(2), p.size(3)});
  check(fastuda_local_affinity_fwd(p.const_data_ptr<float>(), out.mutable_data_ptr<float>(),
                                   affinity_shape(p, neighbours, distance), product, stream_of(p)));
  return out;
}

static Tensor local_affinity_bwd(Tensor grad, Tensor probabilities, int64_t neighbours, int64_t distance,
                                 bool product) {
  const DeviceGuard guard(probabilities.get_device_index());
  const Tensor p = floats(probabilities), g = floats(grad);
  Tensor out = torch::stable::empty_like(p);
  check(fastuda_local_affinity_bwd(g.const_data_ptr<float>(), p.const_data_ptr<float>(),
                                   out.mutable_data_ptr<float>(), affinity_shape(p, neighbours, distance),
                                   product, stream_of(p)));
  return torch::stable::to(out, probabilities.scalar_type());
}

static std::tuple<Tensor, Tensor> affinity_cleaning_loss_fwd(Tensor probabilities, int64_t neighbours,
                                                             bool gradient) {
  const DeviceGuard guard(probabilities.get_device_index());
  const Tensor p = floats(probabilities);
  const AffinityShape shape = affinity_shape(p, neighbours, 1);
  Tensor partial = torch::stable::new_empty(p, {fastuda_affinity_blocks(shape)}, ScalarType::Double);
  Tensor total = torch::stable::new_empty(p, {});
  Tensor grad = gradient ? torch::stable::empty_like(p) : torch::stable::new_empty(p, {0});
  check(fastuda_affinity_cleaning(p.const_data_ptr<float>(), total.mutable_data_ptr<float>(),
                                  gradient ? grad.mutable_data_ptr<float>() : nullptr,
                                  partial.mutable_data_ptr<double>(), shape, stream_of(p)));
  return {total, grad};
}

STABLE_TORCH_LIBRARY_IMPL(fastuda, CUDA, m) {
  m.impl("local_affinity_fwd.cuda", TORCH_BOX(&local_affinity_fwd));
  m.impl("local_affinity_bwd.cuda", TORCH_BOX(&local_affinity_bwd));
  m.impl("affinity_cleaning_loss_fwd.cuda", TORCH_BOX(&affinity_cleaning_loss_fwd));
}

#elif defined(FASTUDA_SMALL)

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

const Small near([] { affinities(8, 1); }), far([] { affinities(4, 3); });

#else

#include "launch.h"

namespace fastuda {

namespace {

constexpr int kTileX = 32, kTileY = 16, kRowsAtOnce = 8, kThreads = kTileX * kRowsAtOnce;
constexpr int kBlocks = 4;          // a multiprocessor holds: leaves a thread 64 registers
constexpr int kLargestShared = 15;  // distance up to which three tiles with their borders fit 48 KB

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

// The pixels i of 0..n - 1 for which i + offset, clamped to 0..n - 1, is j: one in the inside, several at the
// border.
struct Range {
  int low, high;
};
FASTUDA_HOST_DEVICE Range senders(int j, int offset, int n) {
  const int low = j == 0 ? 0 : j - offset, high = j == n - 1 ? n - 1 : j - offset;
  return {low < 0 ? 0 : low, high > n - 1 ? n - 1 : high};
}

// Where a block works: a tile of one plane.
struct Tile {
  int64_t plane;
  int x, y;
};
__device__ Tile tile_of_block(int height, int width) {
  const int across = (width + kTileX - 1) / kTileX, down = (height + kTileY - 1) / kTileY;
  const int64_t block = blockIdx.x;
  return {block / (across * down), int(block % across) * kTileX, int(block / across % down) * kTileY};
}

// A plane of probabilities, read anywhere near the tile; past the border the border is repeated. The tile
// lies in shared memory, with the logarithms where they are wanted; for far neighbours reads go to global
// memory.
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

template <int D, bool Shared>
__global__ void __launch_bounds__(kThreads, kBlocks)
    affinity_forward(const float* p, float* out, int classes, int height, int width, int distance) {
  FASTUDA_SHARED(float, memory);
  const Tile tile = tile_of_block(height, width);
  const int64_t plane = int64_t(height) * width;
  Window<Shared, true> window(memory, height, width, distance);
  window.load(p + tile.plane * plane, tile);
  float* to = out + (tile.plane / classes * D * classes + tile.plane % classes) * plane;
  for_pixels(tile, height, width, [&](int y, int x) {
    const float own = window.at(y, x);
    const OwnLogs<float> logs = window.logs(y, x);
#pragma unroll
    for (int d = 0; d < D; ++d) {
      const int ny = y + row_offset<D>(d, distance), nx = x + column_offset<D>(d, distance);
      const Joint<float> joint = joint_of(own, window.at(ny, nx), logs, window.logs(ny, nx).one);
      to[int64_t(d) * classes * plane + int64_t(y) * width + x] = affinity_of(joint);
    }
  });
}

template <int D, bool Shared>
__global__ void __launch_bounds__(kThreads, kBlocks)
    affinity_backward(const float* grad, const float* p, float* p_grad, int classes, int height, int width,
                      int distance) {
  FASTUDA_SHARED(float, memory);
  const Tile tile = tile_of_block(height, width);
  const int64_t plane = int64_t(height) * width, apart = classes * plane;
  Window<Shared, true> window(memory, height, width, distance);
  window.load(p + tile.plane * plane, tile);
  const float* by = grad + (tile.plane / classes * D * classes + tile.plane % classes) * plane;
  for_pixels(tile, height, width, [&](int y, int x) {
    const float own = window.at(y, x);
    const OwnLogs<float> logs = window.logs(y, x);
    const int64_t here = int64_t(y) * width + x;
    float sum = 0;
#pragma unroll 2  // more at once spill registers
    for (int d = 0; d < D; ++d) {
      const int ny = y + row_offset<D>(d, distance), nx = x + column_offset<D>(d, distance);
      const float other = window.at(ny, nx);
      const OwnLogs<float> theirs = window.logs(ny, nx);
      const Joint<float> joint = joint_of(own, other, logs, theirs.one);
      sum += by[d * apart + here] * (other * slope_by_joint(joint) + slope_by_own(joint, own));
      if (ny >= 0 && nx >= 0 && ny < height && nx < width) {  // the same pair, seen from the neighbour
        const float weight = by[(D - 1 - d) * apart + int64_t(ny) * width + nx];
        sum += weight * other * slope_by_joint(joint_of(other, own, theirs, logs.one));
      }
    }
    for_border_senders<D>(y, x, height, width, distance, [&](int d, int iy, int ix) {
      const float sender = window.at(iy, ix);
      const float slope = slope_by_joint(joint_of(sender, own, window.logs(iy, ix), logs.one));
      sum += by[d * apart + int64_t(iy) * width + ix] * sender * slope;
    });
    p_grad[tile.plane * plane + here] = sum;
  });
}

template <int D, bool Shared>
__global__ void __launch_bounds__(kThreads, kBlocks)
    product_forward(const float* p, float* out, int classes, int height, int width, int distance) {
  FASTUDA_SHARED(float, memory);
  const Tile tile = tile_of_block(height, width);  // its plane is an image
  const int64_t plane = int64_t(height) * width;
  constexpr int kRows = kTileY / kRowsAtOnce;
  float sums[kRows][D] = {};
  Window<Shared, false> window(memory, height, width, distance);
  for (int k = 0; k < classes; ++k) {
    window.load(p + (tile.plane * classes + k) * plane, tile);
    const int x = tile.x + int(threadIdx.x) % kTileX;
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const int y = tile.y + int(threadIdx.x) / kTileX + row * kRowsAtOnce;
      const float own = window.at(y, x);
#pragma unroll
      for (int d = 0; d < D; ++d) {
        sums[row][d] += own * window.at(y + row_offset<D>(d, distance), x + column_offset<D>(d, distance));
      }
    }
  }
  const int x = tile.x + int(threadIdx.x) % kTileX;
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    const int y = tile.y + int(threadIdx.x) / kTileX + row * kRowsAtOnce;
    if (y >= height || x >= width) continue;
#pragma unroll
    for (int d = 0; d < D; ++d) {
      out[(tile.plane * D + d) * plane + int64_t(y) * width + x] = sums[row][d];
    }
  }
}

template <int D, bool Shared>
__global__ void __launch_bounds__(kThreads, kBlocks)
    product_backward(const float* grad, const float* p, float* p_grad, int classes, int height, int width,
                     int distance) {
  FASTUDA_SHARED(float, memory);
  const Tile tile = tile_of_block(height, width);
  const int64_t plane = int64_t(height) * width;
  Window<Shared, false> window(memory, height, width, distance);
  window.load(p + tile.plane * plane, tile);
  const float* by = grad + tile.plane / classes * D * plane;
  for_pixels(tile, height, width, [&](int y, int x) {
    const int64_t here = int64_t(y) * width + x;
    float sum = 0;
#pragma unroll
    for (int d = 0; d < D; ++d) {
      const int ny = y + row_offset<D>(d, distance), nx = x + column_offset<D>(d, distance);
      float weight = by[d * plane + here];
      if (ny >= 0 && nx >= 0 && ny < height && nx < width) {
        weight += by[(D - 1 - d) * plane + int64_t(ny) * width + nx];
      }
      sum += weight * window.at(ny, nx);
    }
    for_border_senders<D>(y, x, height, width, distance, [&](int d, int iy, int ix) {
      sum += by[d * plane + int64_t(iy) * width + ix] * window.at(iy, ix);
    });
    p_grad[tile.plane * plane + here] = sum;
  });
}

// The block's sum of `value` over its threads, in thread 0.
__device__ double block_sum(double value, double* memory) {
  __syncthreads();
  memory[threadIdx.x] = value;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (int(threadIdx.x) < half) memory[threadIdx.x] += memory[threadIdx.x + half];
    __syncthreads();
  }
  return memory[0];
}

template <int D>
__global__ void __launch_bounds__(kThreads, kBlocks)
    cleaning_tiles(const float* p, double* partial, float* p_grad, int height, int width) {
  FASTUDA_SHARED(double, memory);
  const Tile tile = tile_of_block(height, width);
  const int64_t plane = int64_t(height) * width;
  Window<true, false> window(reinterpret_cast<float*>(memory + kThreads), height, width, 1);
  window.load(p + tile.plane * plane, tile);
  double total = 0;
  for_pixels(tile, height, width, [&](int y, int x) {
    float around = 0, received = 0;
#pragma unroll
    for (int d = 0; d < D; ++d) {
      const int ny = y + row_offset<D>(d, 1), nx = x + column_offset<D>(d, 1);
      const float other = window.at(ny, nx);
      around += other;
      received += ny >= 0 && nx >= 0 && ny < height && nx < width ? other : 0.0f;
    }
    total += double(window.at(y, x) * around);
    if (!p_grad) return;
    for_border_senders<D>(y, x, height, width, 1,
                          [&](int, int iy, int ix) { received += window.at(iy, ix); });
    p_grad[tile.plane * plane + int64_t(y) * width + x] = around + received;
  });
  total = block_sum(total, memory);
  if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

__global__ void __launch_bounds__(kThreads, kBlocks)
    add_partials(const double* partial, int64_t count, float* total) {
  FASTUDA_SHARED(double, memory);
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += partial[i];
  sum = block_sum(sum, memory);
  if (threadIdx.x == 0) *total = float(sum);
}

int64_t tiles(const AffinityShape& s) {
  return int64_t((s.width + kTileX - 1) / kTileX) * ((s.height + kTileY - 1) / kTileY);
}

int64_t window_bytes(const AffinityShape& s, bool logs) {
  if (s.distance > kLargestShared) return 0;
  return int64_t(kTileX + 2 * s.distance) * (kTileY + 2 * s.distance) * 4 * (logs ? 3 : 1);
}

}  // namespace

}  // namespace fastuda

using namespace fastuda;

const char* fastuda_cuda_error(int code) { return cudaGetErrorString(cudaError_t(code)); }

// One of the four instances of a kernel template, by the number of neighbours and their distance.
#define PICK(kernel)                                                                       \
  (s.distance > kLargestShared ? (s.neighbours == 8 ? kernel<8, false> : kernel<4, false>) \
                               : (s.neighbours == 8 ? kernel<8, true> : kernel<4, true>))

int fastuda_local_affinity_fwd(const float* p, float* out, AffinityShape s, bool product, void* stream) {
  const int64_t planes = product ? s.batch : s.batch * s.classes;
  return launch(product ? PICK(product_forward) : PICK(affinity_forward), tiles(s) * planes, kThreads,
                window_bytes(s, !product), stream, p, out, s.classes, s.height, s.width, s.distance);
}

int fastuda_local_affinity_bwd(const float* grad, const float* p, float* p_grad, AffinityShape s,
                               bool product, void* stream) {
  return launch(product ? PICK(product_backward) : PICK(affinity_backward), tiles(s) * s.batch * s.classes,
                kThreads, window_bytes(s, !product), stream, grad, p, p_grad, s.classes, s.height, s.width,
                s.distance);
}
#undef PICK

int64_t fastuda_affinity_blocks(AffinityShape s) { return tiles(s) * s.batch * s.classes; }

int fastuda_affinity_cleaning(const float* p, float* total, float* p_grad, double* partial, AffinityShape s,
                              void* stream) {
  const int64_t blocks = fastuda_affinity_blocks(s), sums = kThreads * int64_t(sizeof(double));
  s.distance = 1;
  const int failed = launch(s.neighbours == 8 ? cleaning_tiles<8> : cleaning_tiles<4>, blocks, kThreads,
                            sums + window_bytes(s, false), stream, p, partial, p_grad, s.height, s.width);
  if (failed) return failed;
  return launch(add_partials, 1, kThreads, sums, stream, static_cast<const double*>(partial), blocks, total);
}

#endif
