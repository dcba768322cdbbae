#pragma once
#include <cstdint>

namespace mgm::cuda {

constexpr int kResizeThreads = 256;

struct ResizeParams {
  const void* x;     // [B, H, W, C]
  void* out;         // [B, OH, OW, C]
  int64_t count;     // vectors of out
  int64_t channels;  // vectors of a pixel
  int32_t in_h, in_w, out_h, out_w;
};

}  // namespace mgm::cuda
