#pragma once
#include <cstdint>

#include "gemm.h"

namespace mgm::cuda {

struct Conv2dParams {
  const void* x;  // [B, H, W, C]
  const uint8_t* w;
  // Elements; line_jump: from behind a row of the kernel to the next one.
  int64_t image_pitch, row_pitch, pixel_pitch, line_jump;
  int32_t m;  // B * OH * OW
  int32_t panels, blocks;
  int32_t height, width, out_height, out_width;
  // Without padding a row of the kernel is one run in memory: then kernel_w is 1 and channels kw * C.
  int32_t channels, kernel_h, kernel_w;
  int32_t stride, pad;
  Epilogue epilogue;
};

}  // namespace mgm::cuda
