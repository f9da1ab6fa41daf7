// affinity_cleaning_loss on the GPU: the sum of all products of neighbours and its gradient in one pass, with
// no map of products; the partial sums of the blocks are added in a fixed order.
#include "affinity_window.h"
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
