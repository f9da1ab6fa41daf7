// affinity_cleaning_loss on the GPU: the sum of all products of neighbours and its gradient in one pass,
// without a map of products. The partial sums of the blocks are added in a fixed order.
#include "affinity_window.h"

// The sum of all products and, unless p_grad is null, its gradient. partial holds affinity_blocks(shape)
// doubles.
FASTUDA_EXPORT int64_t fastuda_affinity_blocks(AffinityShape shape);
FASTUDA_EXPORT int fastuda_affinity_cleaning(const float* p, float* total, float* p_grad, double* partial,
                                             AffinityShape shape, void* stream);

#if defined(FASTUDA_TORCH)

#include "registration.h"

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
  m.impl("affinity_cleaning_loss_fwd.cuda", TORCH_BOX(&affinity_cleaning_loss_fwd));
}

#elif defined(FASTUDA_SMALL)

void cleaning(int neighbours) {
  const AffinityShape shape{1, 2, 9, 35, neighbours, 1};
  const auto p = random_values(2 * 9 * 35);
  std::vector<float> gradient(p.size());
  std::vector<double> partial(size_t(fastuda_affinity_blocks(shape)));
  float total;
  fastuda_affinity_cleaning(p.data(), &total, gradient.data(), partial.data(), shape, nullptr);
}

const Small all_around([] { cleaning(8); }), cross([] { cleaning(4); });

#else

#include "sums.h"

namespace fastuda {

namespace {

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
  total = block_sum<kThreads>(total, memory);
  if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

}  // namespace

}  // namespace fastuda

using namespace fastuda;

int64_t fastuda_affinity_blocks(AffinityShape s) { return tiles(s) * s.batch * s.classes; }

int fastuda_affinity_cleaning(const float* p, float* total, float* p_grad, double* partial, AffinityShape s,
                              void* stream) {
  const int64_t blocks = fastuda_affinity_blocks(s), sums = kThreads * int64_t(sizeof(double));
  s.distance = 1;
  const int failed = launch(s.neighbours == 8 ? cleaning_tiles<8> : cleaning_tiles<4>, blocks, kThreads,
                            sums + window_bytes(s, false), stream, p, partial, p_grad, s.height, s.width);
  if (failed) return failed;
  return launch_sums(partial, blocks, total, nullptr, stream);
}

#endif
