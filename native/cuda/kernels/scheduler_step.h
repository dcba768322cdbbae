#pragma once
#include <cstdint>

namespace mgm::cuda {

constexpr int kSchedulerThreads = 256;

struct SchedulerParams {
  const float* x;             // [B, numbers]
  const void* model;          // A [B or 2B, numbers] or null
  const float* coefficients;  // [B, 8]
  const float *previous, *noise;
  float *out, *predicted;  // predicted only with model
  void* input;             // A [B or 2B, numbers]
  int64_t numbers;         // of an image
  int64_t half;            // from an image's first half to its second, in numbers; 0: there is one
  int32_t blocks;          // of an image
};

}  // namespace mgm::cuda
