// PyTorch's bilinear interpolate (align_corners=false, antialias=false). x [B, H, W, C], out [B, OH, OW, C].
// One thread an output element, channels fastest, so that the four reads and the write are coalesced. Source
// coordinates and weights are f32, as PyTorch computes them.
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

}  // namespace

extern "C" __global__ void __launch_bounds__(kResizeThreads)
    resize_bilinear(const __grid_constant__ ResizeParams p) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kResizeThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kResizeThreads + threadIdx.x; i < p.count; i += step) {
    const int64_t pixel = i / p.channels, c = i - pixel * p.channels;
    const int64_t line = pixel / p.out_w, b = line / p.out_h;
    const Tap x = tap_of(static_cast<int>(pixel - line * p.out_w), p.in_w, p.out_w);
    const Tap y = tap_of(static_cast<int>(line - b * p.out_h), p.in_h, p.out_h);
    const float* low = p.x + (b * p.in_h + y.low) * p.in_w * p.channels + c;
    const float* high = p.x + (b * p.in_h + y.high) * p.in_w * p.channels + c;
    const float wx = 1.0f - x.lambda, wy = 1.0f - y.lambda;
    const float top = fmaf(low[x.high * p.channels], x.lambda, low[x.low * p.channels] * wx);
    const float bottom = fmaf(high[x.high * p.channels], x.lambda, high[x.low * p.channels] * wx);
    p.out[i] = fmaf(bottom, y.lambda, top * wy);
  }
}

}  // namespace mgm::cuda
