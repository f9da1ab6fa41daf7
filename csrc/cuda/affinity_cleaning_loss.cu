// affinity_cleaning_loss on the GPU: the sum of all products of neighbours and its gradient in one pass, with
// no map of products; the partial sums of the blocks are added in a fixed order.
#include "affinity_window.h"

namespace fastuda {

namespace {

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
  return launch(add_partials, 1, kThreads, sums, stream, static_cast<const double*>(partial), blocks, total);
}
