// PyTorch's bilinear interpolate (align_corners=false, antialias=false). x [B, H, W, C], out [B, OH, OW, C].
//
// Source coordinates and weights are f32, as PyTorch computes them. Wide pixels (feature maps) are blended
// channel vector by channel vector from their four neighbours. Narrow ones (pictures, C = 3) would leave
// most lanes empty, so there two source rows are blended whole, and the columns of that row then picked.
// Bound by memory: each input row is read at most twice from cache, each output written once.
#include "../kernels.h"
#include "../simd/simd.h"

namespace mgm::cpu::MGM_ISA {
namespace {

struct Tap {
  int64_t low, high;
  float lambda;  // weight of `high`
};

inline Tap tap_of(int64_t i, int64_t in, int64_t out) {
  const float scale = static_cast<float>(in) / static_cast<float>(out);
  // The product goes through f64, where it is exact, so that no compiler fuses it with the subtraction.
  const float product = static_cast<float>(static_cast<double>(scale) * (static_cast<double>(i) + 0.5));
  float at = product - 0.5f;
  if (at < 0.0f) at = 0.0f;
  Tap tap;
  tap.low = static_cast<int64_t>(at);
  if (tap.low > in - 1) tap.low = in - 1;
  tap.high = tap.low < in - 1 ? tap.low + 1 : tap.low;
  tap.lambda = tap.high == tap.low ? 0.0f : at - static_cast<float>(tap.low);
  return tap;
}

inline vf blend(vf low, vf high, vf low_weight, vf high_weight) {
  return fma(high, high_weight, low * low_weight);
}

}  // namespace

void resize_bilinear(const ResizeBilinearArgs& args, ThreadPool& pool) {
  const View& x = args.x;
  const View& out = args.out;
  const int64_t batch = x.shape[0], in_h = x.shape[1], in_w = x.shape[2], channels = x.shape[3];
  const int64_t out_h = out.shape[1], out_w = out.shape[2];
  if (out.numel() == 0) return;

  Tap* columns = static_cast<Tap*>(pool.scratch(0, static_cast<size_t>(out_w) * sizeof(Tap)));
  for (int64_t i = 0; i < out_w; ++i) columns[i] = tap_of(i, in_w, out_w);

  const bool wide = channels >= kWidth || x.strides[2] != channels;
  const int64_t row_floats = in_w * channels;
  pool.parallel_for(batch * out_h, 4, [&](int64_t begin, int64_t end) {
    float* mixed =
        wide ? nullptr
             : static_cast<float*>(pool.scratch(1, static_cast<size_t>(row_floats) * sizeof(float)));
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / out_h, y = row % out_h;
      const Tap vertical = tap_of(y, in_h, out_h);
      const float* low = x.f32() + b * x.strides[0] + vertical.low * x.strides[1];
      const float* high = x.f32() + b * x.strides[0] + vertical.high * x.strides[1];
      float* to = out.f32() + b * out.strides[0] + y * out.strides[1];
      const vf wy0 = set1(1.0f - vertical.lambda), wy1 = set1(vertical.lambda);
      if (!wide) {
        int64_t i = 0;
        for (; i + kWidth <= row_floats; i += kWidth)
          store(mixed + i, blend(load(low + i), load(high + i), wy0, wy1));
        if (i < row_floats) {
          const int tail = static_cast<int>(row_floats - i);
          store_n(mixed + i, blend(load_n(low + i, tail), load_n(high + i, tail), wy0, wy1), tail);
        }
        for (int64_t column = 0; column < out_w; ++column) {
          const Tap& tap = columns[column];
          const float w1 = tap.lambda, w0 = 1.0f - w1;
          const float *a = mixed + tap.low * channels, *d = mixed + tap.high * channels;
          float* pixel = to + column * out.strides[2];
          for (int64_t c = 0; c < channels; ++c) pixel[c] = a[c] * w0 + d[c] * w1;
        }
        continue;
      }
      for (int64_t column = 0; column < out_w; ++column) {
        const Tap& tap = columns[column];
        const vf wx0 = set1(1.0f - tap.lambda), wx1 = set1(tap.lambda);
        const float *a = low + tap.low * x.strides[2], *d = low + tap.high * x.strides[2];
        const float *e = high + tap.low * x.strides[2], *f = high + tap.high * x.strides[2];
        float* pixel = to + column * out.strides[2];
        int64_t c = 0;
        for (; c + kWidth <= channels; c += kWidth)
          store(pixel + c, blend(blend(load(a + c), load(d + c), wx0, wx1),
                                 blend(load(e + c), load(f + c), wx0, wx1), wy0, wy1));
        if (c < channels) {
          const int n = static_cast<int>(channels - c);
          store_n(pixel + c,
                  blend(blend(load_n(a + c, n), load_n(d + c, n), wx0, wx1),
                        blend(load_n(e + c, n), load_n(f + c, n), wx0, wx1), wy0, wy1),
                  n);
        }
      }
    }
  });
}

}  // namespace mgm::cpu::MGM_ISA
