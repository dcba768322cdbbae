// Images on their way out: numbers to bytes, tiles into a canvas. Bytes are what bounds both: an operand is
// read once, a result written once. to_uint8 reads 16 bytes a thread; a tile's lines lie anywhere in a
// canvas, so that add_tile goes by single numbers, neighbours by neighbouring threads, with weights from the
// first-level cache.
#include "common.cuh"
#include "image.h"

namespace mgm::cuda {
namespace {

// fmaxf gives the bound for a NaN.
__device__ __forceinline__ uint8_t byte_of(float x, const Uint8Params& p) {
  const float y = fminf(fmaxf(fmaf(x, p.scale, p.offset), 0.0f), 255.0f);
  return static_cast<uint8_t>(__float2uint_rn(y));
}

template <class T>
__device__ __forceinline__ void to_bytes(const Uint8Params& p) {
  constexpr int kWidth = 16 / sizeof(T);
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kImageThreads + threadIdx.x) * kWidth;
  const T* x = static_cast<const T*>(p.x) + first;
  if (p.aligned && first + kWidth <= p.count) {
    const auto numbers = load_vector<kWidth>(x);
    Vector<uint8_t, kWidth> bytes;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) bytes.at[i] = byte_of(to_float(numbers.at[i]), p);
    store_vector(p.out + first, bytes);
  } else {
    for (int i = 0; i < kWidth && first + i < p.count; ++i) p.out[first + i] = byte_of(to_float(x[i]), p);
  }
}

template <class T>
__device__ __forceinline__ void add(const AddTileParams& p) {
  const int i = static_cast<int>(blockIdx.x % p.blocks) * kImageThreads + threadIdx.x;
  if (i >= p.line) return;
  const int64_t line = blockIdx.x / p.blocks, image = line / p.height;
  const int row = static_cast<int>(line - image * p.height);
  const float weight = p.rows[row] * p.columns[i / p.channels];
  float* at = p.canvas + image * p.image_stride + row * p.line_stride + i;
  *at = fmaf(weight, to_float(static_cast<const T*>(p.tile)[line * p.line + i]), *at);
}

}  // namespace

#define KERNEL(name, body, Params, T)                                                                  \
  extern "C" __global__ void __launch_bounds__(kImageThreads) name(const __grid_constant__ Params p) { \
    body<T>(p);                                                                                        \
  }
#define IMAGE(type, T)                              \
  KERNEL(to_uint8_##type, to_bytes, Uint8Params, T) \
  KERNEL(add_tile_##type, add, AddTileParams, T)
IMAGE(f32, float)
IMAGE(bf16, __nv_bfloat16)
IMAGE(f16, __half)

}  // namespace mgm::cuda
