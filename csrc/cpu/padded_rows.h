// Rows of planes with repeated borders, and the blocks of rows that local_affinity computes at a time.
#pragma once

#include <algorithm>
#include <vector>

#include "local_affinity.h"

namespace fastuda {

constexpr int64_t kTaskRows = 16;

struct Offset {
  int64_t y, x;
};

// Rows [first, last) of a plane.
struct Rows {
  int64_t first, last;
};

// Rows of a plane with their left and right border repeated `pad` times; row() clamps rows above and below.
template <class S>
class Padded {
 public:
  Padded(int64_t height, int64_t width, int64_t pad, int64_t most_rows)
      : height_(height), width_(width), stride_(width + 2 * pad), pad_(pad), values_(most_rows * stride_) {}
  void hold(Rows rows) { rows_ = rows; }
  void load(const S* plane, Rows rows) {
    hold(rows);
    for (int64_t y = rows.first; y < rows.last; ++y) {
      S* to = values_.data() + (y - rows.first) * stride_;
      const S* from = plane + y * width_;
      std::fill(to, to + pad_, from[0]);
      std::copy(from, from + width_, to + pad_);
      std::fill(to + pad_ + width_, to + stride_, from[width_ - 1]);
    }
  }
  S* row(int64_t y, int64_t x = 0) {
    return values_.data() + (std::clamp<int64_t>(y, 0, height_ - 1) - rows_.first) * stride_ + pad_ + x;
  }

 protected:
  int64_t height_, width_, stride_, pad_;
  Rows rows_{0, 0};
  std::vector<S> values_;
};

// Padded rows with their logarithms, which are computed when they are needed, while the rows are in the
// cache.
template <class S>
class PaddedLogs {
 public:
  PaddedLogs(int64_t height, int64_t width, int64_t pad, int64_t most_rows)
      : height_(height),
        width_(width),
        stride_(width + 2 * pad),
        pad_(pad),
        plane_(height, width, pad, most_rows),
        log_one_(height, width, pad, most_rows),
        log_zero_(width) {}
  void load(const S* plane, Rows rows) {
    plane_.load(plane, rows);
    log_one_.hold(rows);
    known_ = rows.first;
  }
  // Row y and the row at offset o; y must not decrease between two loads.
  NeighbourRow<S> pair(int64_t y, Offset o) {
    return {width_,          plane_.row(y),    plane_.row(y + o.y, o.x),
            log_one_.row(y), log_zero_.data(), log_one_.row(y + o.y, o.x)};
  }
  void reach(int64_t y) {
    for (const int64_t last = std::min(y + pad_, height_ - 1); known_ <= last; ++known_) {
      affinity_log_one(plane_.row(known_, -pad_), stride_, log_one_.row(known_, -pad_));
    }
    affinity_log_zero(plane_.row(y), width_, log_zero_.data());
  }

 private:
  int64_t height_, width_, stride_, pad_, known_ = 0;
  Padded<S> plane_, log_one_;
  std::vector<S> log_zero_;
};

// Gradients of padded rows; folded() adds the gradients of the repeated borders to the border itself.
template <class S>
class PaddedSum : public Padded<S> {
 public:
  using Padded<S>::Padded;
  void clear(Rows rows) {
    this->hold(rows);
    std::fill(this->values_.begin(), this->values_.end(), S(0));
  }
  const S* folded(int64_t y) {
    S* row = this->row(y);
    for (int64_t x = 1; x <= this->pad_; ++x) {
      row[0] += row[-x];
      row[this->width_ - 1] += row[this->width_ - 1 + x];
    }
    return row;
  }
};

// The rows of every image in blocks, one for a task. Rows around a block belong at most to the next blocks.
struct Blocks {
  int64_t height, distance, rows, count;

  Blocks(int64_t image_height, int64_t reach)
      : height(image_height),
        distance(reach),
        rows(std::max(kTaskRows, reach)),
        count((image_height + rows - 1) / rows) {}
  Rows own(int64_t block) const { return {block * rows, std::min(height, (block + 1) * rows)}; }
  Rows around(int64_t block) const {
    return {std::max<int64_t>(0, own(block).first - distance), std::min(height, own(block).last + distance)};
  }
  int64_t most_rows() const { return std::min(height, rows + 2 * distance); }
};

}  // namespace fastuda
