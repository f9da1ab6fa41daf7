// Tile products for the similarity kernels: packed right-hand sides and at::native::cpublas::brgemm, whose
// code is generated at run time for AVX2, AVX-512, AVX-512 BF16 or AMX.
#pragma once

#include <ATen/native/CPUBlas.h>

#include "../tensors.h"
#include "scratch.h"

namespace fastuda {

constexpr int64_t kRows = 64;    // rows of a tile for element-wise work
constexpr int64_t kTile = 128;   // rows of such a tile if products are most of the work
constexpr int64_t kCols = 256;   // columns of a tile
constexpr int64_t kDepth = 512;  // depth of one brgemm call
constexpr int64_t kPanel = 256;  // largest number of rows of one brgemm call

// brgemm generates code for every new shape and keeps it forever. Counts that differ from step to step, such
// as the number of matched pixels, are padded to a multiple of this as depths, and split into it as rows.
constexpr int64_t kUnit = 64;

// brgemm reads bf16 right-hand sides as pairs of rows.
template <class T>
constexpr int64_t kPair = std::is_same_v<T, BFloat16> ? 2 : 1;

// Largest number of columns of one brgemm call: narrow float32 strips stay in the first-level cache while the
// rows pass. Strips of small depth fit there whole.
template <class T>
int64_t strip_columns(int64_t depth);

// Whether this machine can compute bf16 brgemm; otherwise bf16 inputs are widened to float32.
bool has_bf16_gemm();

// A [depth, columns] right-hand side, stored as strips of columns and used in blocks of kCols.
template <class T>
struct Packed {
  int64_t depth = 0, columns = 0;  // padded to the unit (at least the pair) and to 16
  int64_t across = 0;              // columns of a strip, a divisor of kCols
  Scratch<T> storage;

  Packed(int64_t depth_, int64_t columns_, int64_t unit = kPair<T>)
      : depth(round_up(depth_, unit)),
        columns(round_up(columns_, 16)),
        across(strip_columns<T>(depth)),
        storage(depth * columns) {}
  int64_t blocks() const { return blocks_of(columns, kCols); }
  int64_t width(int64_t block) const { return std::min(kCols, columns - block * kCols); }
  int64_t strips() const { return blocks_of(columns, across); }
  int64_t strip_width(int64_t strip) const { return std::min(across, columns - strip * across); }
  T* strip(int64_t index) const { return storage.data() + index * across * depth; }
};

// rows [count, channels] of leading dimension ld (selected by index if given) -> rows^T, packed.
template <class T>
void pack_transposed(const T* rows, int64_t ld, const int64_t* index, int64_t count, int64_t channels,
                     const Packed<T>& out);

// rows [count, channels] -> themselves as a right-hand side of depth count, packed.
template <class T>
void pack_rows(const T* rows, int64_t ld, const int64_t* index, int64_t count, int64_t channels,
               const Packed<T>& out);

// A [rows, depth] left-hand side (a view), stored as chunks of kDepth columns. Within a chunk the rows are
// one cache line apart, because rows that are a power of two apart would fall into the same few cache sets.
template <class T>
struct Left {
  static constexpr int64_t kGap = 64 / sizeof(T);
  T* data;
  int64_t rows, depth;  // depth even for bf16

  // elements that a view needs
  static int64_t room(int64_t rows, int64_t depth) {
    return rows * (depth + blocks_of(depth, kDepth) * kGap);
  }
  // elements between the rows of the chunk that holds the column
  int64_t stride(int64_t column) const { return width(column) + kGap; }
  T* at(int64_t row, int64_t column) const {
    const int64_t chunk = column / kDepth;
    return data + chunk * (kDepth + kGap) * rows + row * stride(column) + column - chunk * kDepth;
  }
  void set_row(int64_t row, const T* values) const {
    for (int64_t k = 0; k < depth; k += kDepth) std::memcpy(at(row, k), values + k, sizeof(T) * width(k));
  }

 private:
  int64_t width(int64_t column) const { return std::min(kDepth, depth - column / kDepth * kDepth); }
};

// A leading dimension for sums with that many columns, which also avoids powers of two.
inline int64_t padded(int64_t columns) { return round_up(columns, 16) + 16; }

// out [m, n] (+)= a [m, depth] . b [depth, n] with an unpacked right-hand side; not for bf16.
template <class T>
void plain_product(int64_t m, int64_t n, int64_t depth, const T* a, int64_t lda, const T* b, int64_t ldb,
                   T* out, int64_t ldo, bool add) {
  static_assert(kPair<T> == 1);
  if constexpr (std::is_same_v<T, double>) {
    for (int64_t r = 0; r < m; ++r) {
      double* o = out + r * ldo;
      if (!add) std::fill(o, o + n, 0.0);
      for (int64_t k = 0; k < depth; ++k) {
        for (int64_t j = 0; j < n; ++j) o[j] += a[r * lda + k] * b[k * ldb + j];
      }
    }
  } else {
    at::native::cpublas::brgemm(m, n, depth, lda, ldb, ldo, add, a, b, out, false);
  }
}

// out [m, width of the block] (+)= a [m, depth] . b[skip : skip + depth, block]; m at most kPanel, depth and
// skip even for bf16.
template <class T>
void tile_product(int64_t m, int64_t depth, const T* a, int64_t lda, const Packed<T>& b, int64_t block,
                  acc_t<T>* out, int64_t ldo, bool add, int64_t skip = 0) {
  const int64_t first = block * (kCols / b.across), last = std::min(first + kCols / b.across, b.strips());
  if constexpr (std::is_same_v<T, double>) {
    const int64_t n = b.width(block);
    plain_product(m, n, depth, a, lda, b.strip(first) + skip * n, n, out, ldo, add);
  } else {
    for (int64_t k = 0; k < depth; k += kDepth) {
      for (int64_t strip = first; strip < last; ++strip) {
        const int64_t n = b.strip_width(strip);
        at::native::cpublas::brgemm(m, n, std::min(kDepth, depth - k), lda, n, ldo, add || k > 0, a + k,
                                    b.strip(strip) + (skip + k) * n, out + (strip - first) * b.across,
                                    kPair<T> == 2);
      }
    }
  }
}

// The same for a[row : row + m, begin : end] and b[skip + begin : skip + end, block].
template <class T>
void tile_product(const Left<T>& a, int64_t row, int64_t m, int64_t begin, int64_t end, const Packed<T>& b,
                  int64_t block, acc_t<T>* out, int64_t ldo, bool add, int64_t skip = 0) {
  for (const int64_t last = row + m; row < last; row += m, out += m * ldo) {
    m = last - row;
    for (const int64_t unit : {kUnit, int64_t(16)}) {
      if (m > unit) m = m / unit * unit;
    }
    for (int64_t k = begin; k < end;) {
      const int64_t stop = std::min(end, (k / kDepth + 1) * kDepth);
      tile_product(m, stop - k, a.at(row, k), a.stride(k), b, block, out, ldo, add || k > begin, skip + k);
      k = stop;
    }
  }
}

// brgemm leaves the matrix registers configured; call this once when a thread has finished its tiles.
template <class T>
void release_tiles() {
  if constexpr (!std::is_same_v<T, double>) at::native::cpublas::brgemm_release(kPair<T> == 2);
}

}  // namespace fastuda
