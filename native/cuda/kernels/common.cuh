// Words shared by the kernels: reductions in a fixed order, conversions, the fault record.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "fault.h"

namespace mgm::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ float to_float(float x) {
  return x;
}
__device__ __forceinline__ float to_float(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
__device__ __forceinline__ float to_float(__half x) {
  return __half2float(x);
}

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

// N neighbours in memory, moved by one instruction: at most 16 bytes, on a multiple of their size.
template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
  T at[N];
};
template <int N, class T>
__device__ __forceinline__ Vector<T, N> load_vector(const T* p) {
  return *reinterpret_cast<const Vector<T, N>*>(p);
}
template <class T, int N>
__device__ __forceinline__ void store_vector(T* p, const Vector<T, N>& v) {
  *reinterpret_cast<Vector<T, N>*>(p) = v;
}

struct Sum {
  template <class T>
  static __device__ __forceinline__ T of(T a, T b) {
    return a + b;
  }
};
struct Max {
  template <class T>
  static __device__ __forceinline__ T of(T a, T b) {
    return a > b ? a : b;
  }
};
struct Min {
  template <class T>
  static __device__ __forceinline__ T of(T a, T b) {
    return a < b ? a : b;
  }
};

// The same value in every thread of the block. Warps are combined in their order, so the result depends on
// nothing but the values.
template <class Reduce, int kThreads, class T>
__device__ T block_reduce(T value) {
  constexpr int kWarps = kThreads / 32;
  static_assert(kThreads % 32 == 0, "whole warps only");
  __shared__ T partial[kWarps];
#pragma unroll
  for (int distance = 16; distance > 0; distance >>= 1)
    value = Reduce::of(value, __shfl_xor_sync(kAllLanes, value, distance));
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
  __syncthreads();
  value = partial[0];
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp) value = Reduce::of(value, partial[warp]);
  __syncthreads();
  return value;
}

__device__ __forceinline__ void report(Fault* fault, FaultKind kind, int64_t value, int64_t low,
                                       int64_t limit, int64_t where) {
  if (atomicCAS(&fault->kind, 0, static_cast<int32_t>(kind)) != 0) return;
  fault->value = value;
  fault->low = low;
  fault->limit = limit;
  fault->where = where;
}

}  // namespace mgm::cuda
