#pragma once
#include <cstdint>

namespace mgm::cuda {

constexpr int kNormThreads = 256;

struct NormParams {
  const float* x;         // [T, C]
  const float* residual;  // [T, C] or null
  const float* weight;    // [C]
  const float* bias;      // [C]; layer_norm only
  float* out;             // [T, C]
  float* sum;             // [T, C] or null: x + residual
  int64_t x_stride, residual_stride, out_stride, sum_stride;
  int32_t width;
  int32_t aligned;  // every row starts on 16 bytes
  float eps, weight_offset;
};

}  // namespace mgm::cuda
