#pragma once
#include <cstdint>

#include "fault.h"
#include "gemm.h"

namespace mgm::cuda {

constexpr int32_t kBf16 = 1, kF16 = 2;  // of mgm::DType

constexpr int kPackThreads = 256;
struct PackParams {
  const void* x;  // [count, k], rows x_stride elements apart
  uint8_t* out;   // panels [rows, k]
  int64_t count, k, x_stride;
  int64_t first;  // row of the stacked matrix that x begins at
  int64_t rows;   // of the stacked matrix; whoever packs its last fills up the panels
  int64_t gates;  // of gated panels: number of gate rows; else 0
  int32_t dtype;  // of x, as mgm::DType
};

struct PackedRowsParams {
  const uint8_t* w;    // panels [rows, k]
  const int32_t* ids;  // [T]
  void* out;           // [T, k]
  Fault* fault;
  int64_t rows, k;
  float scale;
  int32_t dtype;  // of out, as mgm::DType
};

}  // namespace mgm::cuda
