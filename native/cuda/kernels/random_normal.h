#pragma once
#include <cstdint>

namespace mgm::cuda {

constexpr int kNormalThreads = 256;

struct NormalParams {
  const int32_t* seeds;  // [B, 3]: key low, key high, stream
  float* out;            // [B, numbers]
  int64_t numbers;
  int32_t blocks;   // of a row
  int32_t aligned;  // every row of out starts on 16 bytes
};

}  // namespace mgm::cuda
