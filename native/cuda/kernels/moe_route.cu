// Mixtral's router: the k <= 64 largest logits of each row of E, the lowest index first on ties, and their
// softmax, which is the softmax over all E renormalized. NaN ranks below every number, so that ids are
// distinct and in range, and makes the row's weights NaN. At least 4 E + 8 k bytes a row, of which up to 64
// experts are read once.
//
// A warp is a row. Round j finds the largest of what ranks below the choice of round j - 1; lane j keeps it.
#include "common.cuh"
#include "moe_route.h"

namespace mgm::cuda {
namespace {

// A key that orders as (logit, lower index) does: floats as integers that compare alike, above the inverted
// index.
__device__ __forceinline__ uint64_t key_of(float logit, int expert) {
  // Equal numbers have one key: -0 becomes 0, and every NaN the least.
  uint32_t bits = __float_as_uint(logit == 0.0f ? 0.0f : logit);
  bits = isnan(logit) ? 0 : bits >> 31 ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(bits) << 32 | (0xffffffffu - static_cast<uint32_t>(expert));
}

__device__ __forceinline__ int expert_of(uint64_t key) {
  return static_cast<int>(0xffffffffu - static_cast<uint32_t>(key));
}
__device__ __forceinline__ bool is_nan(uint64_t key) {
  return key >> 32 == 0;
}
__device__ __forceinline__ float logit_of(uint64_t key) {
  const uint32_t bits = static_cast<uint32_t>(key >> 32);
  return is_nan(key) ? __int_as_float(0x7fffffff) : __uint_as_float(bits >> 31 ? bits ^ 0x80000000u : ~bits);
}

__device__ __forceinline__ float sum_over_warp(float value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance >>= 1) value += __shfl_xor_sync(kAllLanes, value, distance);
  return value;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kRouteThreads) moe_route(const __grid_constant__ RouteParams p) {
  const int lane = threadIdx.x % 32;
  const int64_t t = static_cast<int64_t>(blockIdx.x) * (kRouteThreads / 32) + threadIdx.x / 32;
  if (t >= p.tokens) return;
  const float* logits = p.logits + t * p.stride;

  // body(key) for this lane's experts, the first kKept of them from registers.
  constexpr int kKept = 2;
  uint64_t kept[kKept];
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    const int e = lane + i * 32;
    kept[i] = e < p.experts ? key_of(logits[e], e) : 0;
  }
  const auto for_keys = [&](auto body) {
#pragma unroll
    for (int i = 0; i < kKept; ++i)
      if (lane + i * 32 < p.experts) body(kept[i]);
    for (int e = lane + kKept * 32; e < p.experts; e += 32) body(key_of(logits[e], e));
  };

  // The k largest: choices j and j + 32 in lane j.
  uint64_t last = ~uint64_t{0}, mine[2] = {};
  for (int j = 0; j < p.k; ++j) {
    uint64_t best = 0;
    for_keys([&](uint64_t key) {
      if (key < last) best = Max::of(best, key);
    });
#pragma unroll
    for (int distance = 16; distance > 0; distance >>= 1)
      best = Max::of(best, static_cast<uint64_t>(__shfl_xor_sync(kAllLanes, best, distance)));
    last = best;
    if (j == lane) mine[0] = best;
    if (j == lane + 32) mine[1] = best;
  }

  // Softmax over the chosen.
  bool has_nan = false;
  for_keys([&](uint64_t key) { has_nan |= is_nan(key); });
  has_nan = __any_sync(kAllLanes, has_nan);
  const float top = __shfl_sync(kAllLanes, logit_of(mine[0]), 0);
  const float largest = has_nan ? __int_as_float(0x7fffffff) : top;
  float weight[2] = {};
#pragma unroll
  for (int i = 0; i < 2; ++i)
    if (lane + i * 32 < p.k) weight[i] = expf(logit_of(mine[i]) - largest);
  const float total = sum_over_warp(weight[0] + weight[1]);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int j = lane + i * 32;
    if (j >= p.k) continue;
    p.weights[t * p.k + j] = weight[i] / total;
    p.ids[t * p.k + j] = expert_of(mine[i]);
  }
}

}  // namespace mgm::cuda
