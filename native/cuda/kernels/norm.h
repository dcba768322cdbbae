#pragma once
#include <cstdint>

namespace mgm::cuda {

// A block normalizes several rows at once. A row up to kNormNarrow wide is a warp's, wider ones are those of
// kNormGroup threads, which hold 16 (kNormMiddle) or 32 values each in registers; rows above kNormWide are
// not held.
constexpr int kNormThreads = 512, kNormGroup = 256;
constexpr int kNormNarrow = 32 * 32, kNormMiddle = kNormGroup * 16, kNormWide = kNormGroup * 32;

struct NormParams {
  const void* x;         // [T, C]
  const void* residual;  // [T, C] or null
  const float* weight;   // [C]
  const float* bias;     // [C]; layer_norm only
  void* out;             // [T, C]
  void* sum;             // [T, C] or null: x + residual
  int64_t rows, x_stride, residual_stride, out_stride, sum_stride;
  int32_t width;
  int32_t aligned;  // every row of activations starts on 16 bytes
  float eps, weight_offset;
};

}  // namespace mgm::cuda
