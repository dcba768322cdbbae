#pragma once
#include <cstdint>

namespace mgm::cuda {

constexpr int kRouteThreads = 128;  // a warp is a row

struct RouteParams {
  const float* logits;  // [T, E]
  float* weights;       // [T, k]
  int32_t* ids;         // [T, k]
  int64_t tokens, stride;
  int32_t experts, k;
};

}  // namespace mgm::cuda
