// Tile products for the similarity kernels: packed right-hand sides and at::native::cpublas::brgemm, whose
// code is generated at run time for AVX2, AVX-512, AVX-512 BF16 or AMX.
#pragma once

#include <ATen/native/CPUBlas.h>

#include "../tensors.h"
#include "scratch.h"

namespace fastuda {

constexpr int64_t kRows = 64;    // rows of a tile
constexpr int64_t kCols = 256;   // columns of a tile
constexpr int64_t kDepth = 512;  // depth of one brgemm call
constexpr int64_t kPanel = 256;  // rows that share a block of the right-hand side while it is in the L2 cache
constexpr int64_t kChunk = 1024;  // depth of that block

// brgemm reads bf16 right-hand sides as pairs of rows.
template <class T>
constexpr int64_t kPair = std::is_same_v<T, BFloat16> ? 2 : 1;

// Whether bf16 brgemm computes on this machine; otherwise bf16 inputs are widened to float32.
bool has_bf16_gemm();

// A [depth, columns] right-hand side, stored as blocks of kCols columns.
template <class T>
struct Packed {
  int64_t depth = 0, columns = 0;  // padded to the pair and to 16
  Scratch<T> storage;

  Packed(int64_t depth_, int64_t columns_)
      : depth(round_up(depth_, kPair<T>)), columns(round_up(columns_, 16)), storage(depth * columns) {}
  int64_t blocks() const { return blocks_of(columns, kCols); }
  int64_t width(int64_t block) const { return std::min(kCols, columns - block * kCols); }
  T* block(int64_t index) const { return storage.data() + index * kCols * depth; }
};

// rows [count, channels] of leading dimension ld, rows taken through index where given -> rows^T, packed.
template <class T>
void pack_transposed(const T* rows, int64_t ld, const int64_t* index, int64_t count, int64_t channels,
                     const Packed<T>& out);

// rows [count, channels] -> themselves as a right-hand side of depth count, packed.
template <class T>
void pack_rows(const T* rows, int64_t ld, const int64_t* index, int64_t count, int64_t channels,
               const Packed<T>& out);

// out [m, width of the block] (+)= a [m, depth] . b[skip : skip + depth, block]; depth and skip even for
// bf16.
template <class T>
void tile_product(int64_t m, int64_t depth, const T* a, int64_t lda, const Packed<T>& b, int64_t block,
                  acc_t<T>* out, int64_t ldo, bool add, int64_t skip = 0) {
  const int64_t n = b.width(block);
  const T* right = b.block(block) + skip * n;
  if constexpr (std::is_same_v<T, double>) {
    for (int64_t r = 0; r < m; ++r) {
      double* o = out + r * ldo;
      if (!add) std::fill(o, o + n, 0.0);
      for (int64_t k = 0; k < depth; ++k) {
        const double x = a[r * lda + k];
        const double* y = right + k * n;
        for (int64_t j = 0; j < n; ++j) o[j] += x * y[j];
      }
    }
  } else {
    for (int64_t k = 0; k < depth; k += kDepth) {
      at::native::cpublas::brgemm(m, n, std::min(kDepth, depth - k), lda, n, ldo, add || k > 0, a + k,
                                  right + k * n, out, kPair<T> == 2);
    }
  }
}

// The same for up to any number of rows: a chunk of the right-hand side stays near while kRows rows at a time
// meet it.
template <class T>
void panel_product(int64_t m, int64_t depth, const T* a, int64_t lda, const Packed<T>& b, int64_t block,
                   acc_t<T>* out, int64_t ldo, bool add, int64_t skip = 0) {
  for (int64_t k = 0; k < depth; k += kChunk) {
    const int64_t chunk = std::min(kChunk, depth - k);
    for (int64_t r = 0; r < m; r += kRows) {
      tile_product(std::min(kRows, m - r), chunk, a + r * lda + k, lda, b, block, out + r * ldo, ldo,
                   add || k > 0, skip + k);
    }
  }
}

// brgemm leaves the matrix registers configured; call once when a thread is done with its tiles.
template <class T>
void release_tiles() {
  if constexpr (!std::is_same_v<T, double>) at::native::cpublas::brgemm_release(kPair<T> == 2);
}

}  // namespace fastuda
