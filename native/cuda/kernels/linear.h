#pragma once
#include <cstdint>

#include "gemm.h"

namespace mgm::cuda {

struct LinearParams {
  const void* x;  // [m, k], rows x_stride elements apart and on 16 bytes
  const uint8_t* w;
  int64_t x_stride;
  int32_t m, k;  // k: a multiple of 8
  int32_t panels, blocks;
  bool rows_first;  // tiles that follow one another share their panels, not their rows
  Epilogue epilogue;
};

constexpr int kAlignThreads = 256;  // a block copies a row
struct AlignParams {
  const uint16_t* x;  // [rows, k], rows x_stride elements apart
  uint16_t* out;      // [rows, width], zeros past k
  int64_t x_stride;
  int32_t k, width;
};

}  // namespace mgm::cuda
