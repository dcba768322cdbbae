#pragma once
#include <cstdint>

namespace mgm::cuda {

constexpr int kImageThreads = 256;

struct Uint8Params {
  const void* x;
  uint8_t* out;
  int64_t count;
  float scale, offset;
  int32_t aligned;  // x starts on 16 bytes
};

struct AddTileParams {
  float* canvas;                // of the tile's place: [B, height, width, C], lines and images apart as below
  const void* tile;             // A [B, height, width, C]
  const float *rows, *columns;  // [height], [width]
  int64_t image_stride, line_stride;  // of canvas, in numbers
  int32_t height, line, channels;     // line: width * C
  int32_t blocks;                     // of a line
};

}  // namespace mgm::cuda
