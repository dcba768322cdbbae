#pragma once
#include <cstdint>

#include "fault.h"

namespace mgm::cuda {

constexpr int kRowThreads = 256;

struct EmbeddingParams {
  const void* table;   // [V, C], rows `table_stride` elements apart
  const int32_t* ids;  // [T]
  void* out;           // [T, C]
  Fault* fault;
  int64_t rows, width, table_stride;
  float scale;
  int32_t aligned;  // rows of both start on 16 bytes
};

// Rows as words of 2, 4 or 16 bytes.
struct SpliceParams {
  const void *text, *image;  // [T, C], [M, C]
  const int32_t* index;      // [P]
  void* out;                 // [P, C]
  Fault* fault;
  int64_t texts, images, width, text_stride, image_stride;
};

}  // namespace mgm::cuda
