// local_affinity on the GPU. A block holds a tile of one plane of probabilities and its border in shared
// memory. It reads the plane once and writes the planes of all directions from there. The backward gathers:
// every pixel adds the gradients from its neighbours, without atomics, so two runs agree bit for bit.
#include "affinity_window.h"

// out [batch, neighbours classes, height, width]; for products [batch, neighbours, height, width].
FASTUDA_EXPORT int fastuda_local_affinity_fwd(const float* p, float* out, AffinityShape shape, bool product,
                                              void* stream);
// grad has the shape of out above, p_grad that of p.
FASTUDA_EXPORT int fastuda_local_affinity_bwd(const float* grad, const float* p, float* p_grad,
                                              AffinityShape shape, bool product, void* stream);

#if defined(FASTUDA_TORCH)

#include "registration.h"

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

STABLE_TORCH_LIBRARY_IMPL(fastuda, CUDA, m) {
  m.impl("local_affinity_fwd.cuda", TORCH_BOX(&local_affinity_fwd));
  m.impl("local_affinity_bwd.cuda", TORCH_BOX(&local_affinity_bwd));
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
}

const Small near([] { affinities(8, 1); }), far([] { affinities(4, 3); });

#else

namespace fastuda {

namespace {

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
__global__ void __launch_bounds__(kThreads, kBlocks - 1)  // all directions at once take 80 registers
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
    // slope_by_own, with its two quotients computed once for all directions
    const float over_one = inside(own) / clamp_probability(own);
    const float over_zero = inside(1.0f - own) / clamp_probability(1.0f - own);
    float sum = 0;
#pragma unroll
    for (int d = 0; d < D; ++d) {
      const int oy = row_offset<D>(d, distance), ox = column_offset<D>(d, distance);
      const int ny = y + oy, nx = x + ox;
      const float other = window.at(ny, nx);
      const OwnLogs<float> theirs = window.logs(ny, nx);
      const Joint<float> joint = joint_of(own, other, logs, theirs.one);
      sum += by[d * apart + here] *
             (other * slope_by_joint(joint) + joint.zero * over_zero - joint.one * over_one);
      if (ny >= 0 && nx >= 0 && ny < height && nx < width) {  // the same pair, seen from the neighbour
        const float weight = by[(D - 1 - d) * apart + here + int64_t(oy) * width + ox];
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

}  // namespace

}  // namespace fastuda

using namespace fastuda;

const char* fastuda_cuda_error(int code) { return cudaGetErrorString(cudaError_t(code)); }

// Selects one of the four instances of a kernel template, by the number of neighbours and their distance.
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

#endif
