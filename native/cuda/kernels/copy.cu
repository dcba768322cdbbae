// Copies that change type or order: cast, permute, scale_columns. Bytes are what bounds them: each element is
// read once and written once.
//
// cast and copy: a thread makes one vector of the contiguous result, 16 bytes of the wider type, where rows
// of the source are contiguous and aligned; else one element. Walking strides costs a division a dimension,
// in 32 bits where they suffice. transpose: where another dimension becomes the innermost, tiles of 32 x 32
// pass through shared memory, so that reads and writes both run along neighbours.
#include "common.cuh"
#include "copy.h"

namespace mgm::cuda {
namespace {

template <class Index>
__device__ __forceinline__ int64_t position_of(const Strided& s, int64_t i) {
  Index rest = static_cast<Index>(i);
  int64_t at = 0;
  for (int d = s.rank - 1; d > 0; --d) {
    const Index size = static_cast<Index>(s.shape[d]);
    const Index next = rest / size;
    at += static_cast<int64_t>(rest - next * size) * s.strides[d];
    rest = next;
  }
  return at + static_cast<int64_t>(rest) * s.strides[0];
}

__device__ __forceinline__ int64_t position_of(const Strided& s, int64_t i) {
  return s.count <= 0xffffffff ? position_of<uint32_t>(s, i) : position_of<uint64_t>(s, i);
}

template <int N, class From, class To>
__device__ __forceinline__ void copy(const CopyParams& p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kCopyThreads + threadIdx.x;
  if (i >= p.at.count) return;
  const auto x = load_vector<N>(static_cast<const From*>(p.x) + position_of(p.at, i));
  To* to = static_cast<To*>(p.out) + i * N;
  if constexpr (std::is_same_v<From, To>) {
    store_vector(to, x);
  } else {
    float values[N];
#pragma unroll
    for (int j = 0; j < N; ++j) values[j] = to_float(x.at[j]);
    store_vector(to, rounded<To>(values));
  }
}

template <class T>
__device__ void transpose(const TransposeParams& p) {
  // Rows an odd number of words long: no bank conflicts down a column.
  __shared__ T tile[kTransposeTile][kTransposeTile + 4 / sizeof(T)];
  const int64_t row = static_cast<int64_t>(blockIdx.y) * kTransposeTile,
                column = static_cast<int64_t>(blockIdx.x) * kTransposeTile;
  const int x = threadIdx.x % kTransposeTile, y = threadIdx.x / kTransposeTile;
  for (int64_t i = blockIdx.z; i < p.from.count; i += gridDim.z) {
    const T* from = static_cast<const T*>(p.x) + position_of(p.from, i);
    T* to = static_cast<T*>(p.out) + position_of(p.to, i);
    for (int r = y; r < kTransposeTile; r += kTransposeRows)
      if (row + r < p.rows && column + x < p.columns)
        tile[r][x] = from[(row + r) * p.row_stride + column + x];
    __syncthreads();
    for (int c = y; c < kTransposeTile; c += kTransposeRows)
      if (column + c < p.columns && row + x < p.rows)
        to[(column + c) * p.column_stride + row + x] = tile[x][c];
    __syncthreads();
  }
}

template <class T, int N>
__device__ void scale(const ScaleColumnsParams& p) {
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * kCopyThreads + threadIdx.x) * N;
  if (column >= p.columns) return;
  float factor[N];
#pragma unroll
  for (int j = 0; j < N; ++j) factor[j] = p.scale[column + j];
  const int64_t first = static_cast<int64_t>(blockIdx.y) * kScaleRows;
  const int64_t end = first + kScaleRows < p.rows ? first + kScaleRows : p.rows;
  for (int64_t row = first; row < end; ++row) {
    const auto w = load_vector<N>(static_cast<const T*>(p.w) + row * p.w_stride + column);
    float scaled[N];
#pragma unroll
    for (int j = 0; j < N; ++j) scaled[j] = to_float(w.at[j]) * factor[j];
    store_vector(static_cast<T*>(p.out) + row * p.columns + column, rounded<T>(scaled));
  }
}

}  // namespace

// <name>: vectors; <name>_1: elements.
#define KERNEL(name, Params, body) \
  extern "C" __global__ void __launch_bounds__(kCopyThreads) name(const __grid_constant__ Params p) { body; }
#define COPY(name, From, To, N)                    \
  KERNEL(name, CopyParams, (copy<N, From, To>(p))) \
  KERNEL(name##_1, CopyParams, (copy<1, From, To>(p)))
#define SCALE(name, T, N)                            \
  KERNEL(name, ScaleColumnsParams, (scale<T, N>(p))) \
  KERNEL(name##_1, ScaleColumnsParams, (scale<T, 1>(p)))

COPY(copy_8, uint8_t, uint8_t, 16)
COPY(copy_16, uint16_t, uint16_t, 8)
COPY(copy_32, uint32_t, uint32_t, 4)
COPY(cast_f32_bf16, float, __nv_bfloat16, 4)
COPY(cast_f32_f16, float, __half, 4)
COPY(cast_bf16_f32, __nv_bfloat16, float, 4)
COPY(cast_bf16_f16, __nv_bfloat16, __half, 8)
COPY(cast_f16_f32, __half, float, 4)
COPY(cast_f16_bf16, __half, __nv_bfloat16, 8)
KERNEL(transpose_8, TransposeParams, transpose<uint8_t>(p))
KERNEL(transpose_16, TransposeParams, transpose<uint16_t>(p))
KERNEL(transpose_32, TransposeParams, transpose<uint32_t>(p))
SCALE(scale_columns_f32, float, 4)
SCALE(scale_columns_bf16, __nv_bfloat16, 8)
SCALE(scale_columns_f16, __half, 8)

}  // namespace mgm::cuda
