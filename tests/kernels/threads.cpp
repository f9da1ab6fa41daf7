// Every CUDA kernel on small inputs, for a sanitizer: compiled with csrc/cuda/*.cu, threads_cuda.h and
// a file that includes the former with FASTUDA_SMALL. With an argument, without barriers.
#include <cstdio>
#include <random>
#include <vector>

namespace {

std::mt19937 generator(0);

std::vector<float> random_values(size_t count) {
  std::uniform_real_distribution<float> uniform(0.01f, 0.99f);
  std::vector<float> values(count);
  for (float& x : values) x = uniform(generator);
  return values;
}

std::vector<int64_t> random_labels(size_t count, int64_t classes) {
  std::uniform_int_distribution<int64_t> uniform(-1, classes);
  std::vector<int64_t> labels(count);
  for (int64_t& y : labels) y = uniform(generator);
  return labels;
}

// Runs of an op's kernels, of which every op defines one.
struct Small {
  static std::vector<void (*)()>& all() {
    static std::vector<void (*)()> runs;
    return runs;
  }
  explicit Small(void (*run)()) { all().push_back(run); }
};

}  // namespace

#include "every_op.inc"

int main(int count, char**) {
  emulated::barriers = count == 1;
  for (const auto run : Small::all()) run();
  std::puts("every kernel ran");
}
