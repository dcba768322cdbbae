// Copies that change type or order: cast, permute, scale_columns. One thread an element of the contiguous
// result: writes are coalesced, reads as far as the source's strides allow. Bytes are what bounds them; each
// element is read and written once. Walking strides costs two divisions a dimension, so 32-bit where it fits.
#include "common.cuh"
#include "copy.h"

namespace mgm::cuda {

template <class Index>
__device__ __forceinline__ int64_t source_of(const CopyParams& p, int64_t i) {
  Index rest = static_cast<Index>(i);
  int64_t at = 0;
  for (int d = p.rank - 1; d > 0; --d) {
    const Index size = static_cast<Index>(p.shape[d]);
    const Index next = rest / size;
    at += static_cast<int64_t>(rest - next * size) * p.strides[d];
    rest = next;
  }
  return at + static_cast<int64_t>(rest) * p.strides[0];
}

template <class From, class To, class Convert>
__device__ void copy(const CopyParams& p, Convert convert) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kCopyThreads;
  const From* x = static_cast<const From*>(p.x);
  To* out = static_cast<To*>(p.out);
  const bool small = p.count <= 0xffffffff;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kCopyThreads + threadIdx.x; i < p.count; i += step)
    out[i] = convert(x[small ? source_of<uint32_t>(p, i) : source_of<uint64_t>(p, i)]);
}

#define COPY(name, T)                                                                                     \
  extern "C" __global__ void __launch_bounds__(kCopyThreads) name(const __grid_constant__ CopyParams p) { \
    copy<T, T>(p, [](T value) { return value; });                                                         \
  }
#define CAST(name, From, To)                                                                              \
  extern "C" __global__ void __launch_bounds__(kCopyThreads) name(const __grid_constant__ CopyParams p) { \
    copy<From, To>(p, [](From value) { return from_float<To>(to_float(value)); });                        \
  }

COPY(copy_1, uint8_t)
COPY(copy_2, uint16_t)
COPY(copy_4, uint32_t)
CAST(cast_f32_bf16, float, __nv_bfloat16)
CAST(cast_f32_f16, float, __half)
CAST(cast_bf16_f32, __nv_bfloat16, float)
CAST(cast_bf16_f16, __nv_bfloat16, __half)
CAST(cast_f16_f32, __half, float)
CAST(cast_f16_bf16, __half, __nv_bfloat16)

extern "C" __global__ void __launch_bounds__(kCopyThreads)
    scale_columns(const __grid_constant__ ScaleColumnsParams p) {
  const int64_t count = p.rows * p.columns, step = static_cast<int64_t>(gridDim.x) * kCopyThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kCopyThreads + threadIdx.x; i < count; i += step) {
    const int64_t row = i / p.columns, column = i - row * p.columns;
    p.out[i] = p.w[row * p.w_stride + column] * p.scale[column];
  }
}

}  // namespace mgm::cuda
