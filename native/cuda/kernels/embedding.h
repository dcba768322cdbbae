#pragma once
#include <cstdint>

#include "fault.h"

namespace mgm::cuda {

constexpr int kRowThreads = 256;

struct EmbeddingParams {
  const void* table;   // [V, C], rows `table_stride` elements apart
  const int32_t* ids;  // [T]
  float* out;          // [T, C]
  Fault* fault;
  int64_t rows, width, table_stride;
  float scale;
  int32_t padding;
};

struct SpliceParams {
  const float *text, *image;  // [T, C], [M, C]
  const int32_t* index;       // [P]
  float* out;                 // [P, C]
  Fault* fault;
  int64_t texts, images, width, text_stride, image_stride;
};

}  // namespace mgm::cuda
