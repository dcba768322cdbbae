#pragma once
#include <cstdint>

namespace mgm::cuda {

constexpr int kResizeThreads = 256;

struct ResizeParams {
  const float* x;  // [B, H, W, C]
  float* out;      // [B, OH, OW, C]
  int64_t count;   // elements of out
  int32_t in_h, in_w, out_h, out_w;
  int64_t channels;
};

}  // namespace mgm::cuda
