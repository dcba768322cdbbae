// PyTorch's bilinear interpolate (align_corners=false, antialias=false). x [B, H, W, C], out [B, OH, OW, C].
// A thread makes 16 bytes of neighbouring channels of an output pixel where C allows, else one channel, so
// that the four reads and the write are coalesced: out is written once, x read through the caches, whose
// sectors neighbouring pixels share. Source coordinates and weights are f32, as PyTorch computes them.
#include "common.cuh"
#include "resize_bilinear.h"

namespace mgm::cuda {
namespace {

struct Tap {
  int low, high;
  float lambda;  // weight of `high`
};

__device__ __forceinline__ Tap tap_of(int i, int in, int out) {
  const float scale = static_cast<float>(in) / static_cast<float>(out);
  // i + 0.5 is exact in f32 below 2^23; the intrinsic keeps the product from being fused with the
  // subtraction.
  float at = __fmul_rn(scale, static_cast<float>(i) + 0.5f) - 0.5f;
  at = at < 0.0f ? 0.0f : at;
  Tap tap;
  tap.low = static_cast<int>(at);
  tap.low = tap.low > in - 1 ? in - 1 : tap.low;
  tap.high = tap.low < in - 1 ? tap.low + 1 : tap.low;
  tap.lambda = tap.high == tap.low ? 0.0f : at - static_cast<float>(tap.low);
  return tap;
}

template <class T, int N>
__device__ __forceinline__ void resize(const ResizeParams& p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kResizeThreads + threadIdx.x;
  if (i >= p.count) return;
  const int64_t pixel = i / p.channels, c = i - pixel * p.channels;
  const int64_t line = pixel / p.out_w, b = line / p.out_h;
  const Tap x = tap_of(static_cast<int>(pixel - line * p.out_w), p.in_w, p.out_w);
  const Tap y = tap_of(static_cast<int>(line - b * p.out_h), p.in_h, p.out_h);
  const auto at = [&](int row, int column) {
    return load_vector<N>(static_cast<const T*>(p.x) +
                          (((b * p.in_h + row) * p.in_w + column) * p.channels + c) * N);
  };
  const Vector<T, N> low_low = at(y.low, x.low), low_high = at(y.low, x.high), high_low = at(y.high, x.low),
                     high_high = at(y.high, x.high);
  const float wx = 1.0f - x.lambda, wy = 1.0f - y.lambda;
  float out[N];
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const float top = fmaf(to_float(low_high.at[j]), x.lambda, to_float(low_low.at[j]) * wx);
    const float bottom = fmaf(to_float(high_high.at[j]), x.lambda, to_float(high_low.at[j]) * wx);
    out[j] = fmaf(bottom, y.lambda, top * wy);
  }
  store_vector(static_cast<T*>(p.out) + i * N, rounded<T>(out));
}

}  // namespace

// <name>: vectors; <name>_1: elements.
#define RESIZE(name, T, N)                                     \
  extern "C" __global__ void __launch_bounds__(kResizeThreads) \
      name(const __grid_constant__ ResizeParams p) {           \
    resize<T, N>(p);                                           \
  }                                                            \
  extern "C" __global__ void __launch_bounds__(kResizeThreads) \
      name##_1(const __grid_constant__ ResizeParams p) {       \
    resize<T, 1>(p);                                           \
  }
RESIZE(resize_bilinear_f32, float, 4)
RESIZE(resize_bilinear_bf16, __nv_bfloat16, 8)
RESIZE(resize_bilinear_f16, __half, 8)

}  // namespace mgm::cuda
