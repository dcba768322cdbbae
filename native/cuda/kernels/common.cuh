// Words shared by the kernels: reductions in a fixed order, conversions, the fault record.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

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

// N neighbours in global memory, moved by one instruction: 1, 2, 4, 8 or 16 bytes, on a multiple of as many.
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
  // Left to itself, the compiler splits some of the wide stores.
  if constexpr (sizeof v == 16) {
    uint4 word;
    memcpy(&word, &v, sizeof v);
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "r"(word.x),
                 "r"(word.y), "r"(word.z), "r"(word.w)
                 : "memory");
  } else if constexpr (sizeof v == 8) {
    uint2 word;
    memcpy(&word, &v, sizeof v);
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(p)), "r"(word.x),
                 "r"(word.y)
                 : "memory");
  } else {
    *reinterpret_cast<Vector<T, N>*>(p) = v;
  }
}

// x, rounded: two at a time where there is an instruction for it.
template <class T, int N>
__device__ __forceinline__ Vector<T, N> rounded(const float (&x)[N]) {
  Vector<T, N> v;
  if constexpr (sizeof(T) == 2 && N % 2 == 0) {
#pragma unroll
    for (int j = 0; j < N; j += 2) {
      if constexpr (std::is_same_v<T, __half>) {
        const __half2 pair = __floats2half2_rn(x[j], x[j + 1]);
        memcpy(&v.at[j], &pair, sizeof pair);
      } else {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(x[j], x[j + 1]);
        memcpy(&v.at[j], &pair, sizeof pair);
      }
    }
  } else {
#pragma unroll
    for (int j = 0; j < N; ++j) v.at[j] = from_float<T>(x[j]);
  }
  return v;
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
