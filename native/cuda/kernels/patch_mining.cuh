// Words shared by the two mining kernels.
#pragma once
#include "mma.cuh"
#include "patch_mining.h"

namespace mgm::cuda {

constexpr double kLargest = 3.4028234663852886e38;

template <class V>
__device__ __forceinline__ V warp_sum(V value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance >>= 1) value += __shfl_xor_sync(kAllLanes, value, distance);
  return value;
}

// The exponent of the power of two that |g| <= top is divided by: products with g must not leave f32's range
// before their signs are known (nan_to_num turns an overflowing score into the largest float of its sign).
__device__ __forceinline__ int exponent_of(float top) {
  if (!(top > 0.0f && top <= 3.4028234e38f)) return 0;
  return min(max(static_cast<int>(__float_as_uint(top) >> 23) - 127, -118), 126);
}
__device__ __forceinline__ float power_of_two(int exponent) {
  return __uint_as_float(static_cast<uint32_t>(127 + exponent) << 23);
}

__device__ __forceinline__ double nan_to_num(double x) {
  if (x != x) return 0.0;
  return x > kLargest ? kLargest : x < -kLargest ? -kLargest : x;
}

}  // namespace mgm::cuda
