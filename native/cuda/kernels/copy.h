#pragma once
#include <cstdint>

namespace mgm::cuda {

constexpr int kCopyThreads = 256, kCopyMaxRank = 5;

// out[i] = x at the strided position of element i. Neighbouring dimensions that step alike have been merged.
struct CopyParams {
  const void* x;
  void* out;
  int64_t count;
  int32_t rank, padding;
  int64_t shape[kCopyMaxRank], strides[kCopyMaxRank];
};

// out[n, k] = w[n, k] * scale[k]
struct ScaleColumnsParams {
  const float* w;
  const float* scale;
  float* out;
  int64_t rows, columns, w_stride;
};

}  // namespace mgm::cuda
