// Convolution as a Gemm whose rows of A are patches, copied straight from the image into the engine's A
// block. In NHWC the kw pixels of one kernel row are one contiguous run of kw*C floats, so a block of a patch
// is a few memcpys, and zeros where the kernel hangs over the border.
#include "conv2d.h"

namespace mgm::cpu::MGM_ISA {
namespace {

struct Patches {
  Images images;
  int64_t out_height, out_width;
  int64_t kernel_w, stride, pad;
};

MGM_INLINE void zero(float* p, int64_t n) {
  std::memset(p, 0, static_cast<size_t>(n) * sizeof(float));
}
MGM_INLINE void copy(float* to, const float* from, int64_t n) {
  std::memcpy(to, from, static_cast<size_t>(n) * sizeof(float));
}

// Entries [begin, end) of one kernel row: pixels ix, ix + 1, ... of `line`, a row of the image.
void fill_run(const Images& images, const float* line, int64_t ix, int64_t begin, int64_t end, float* dst) {
  const int64_t channels = images.channels;
  if (images.resized()) {
    for (int64_t at = begin; at < end;) {
      const float* pixel = images.pixel(line, ix + at / channels);
      const int64_t channel = at % channels,
                    n = channels - channel < end - at ? channels - channel : end - at;
      if (pixel)
        copy(dst, pixel + channel, n);
      else
        zero(dst, n);
      dst += n;
      at += n;
    }
    return;
  }
  // The entries inside the image.
  int64_t low = -ix * channels, high = (images.width - ix) * channels;
  low = low < begin ? begin : low > end ? end : low;
  high = high > end ? end : high < low ? low : high;
  if (low > begin) zero(dst, low - begin);
  if (high > low) copy(dst + (low - begin), line + ix * channels + low, high - low);
  if (end > high) zero(dst + (high - begin), end - high);
}

void fill_patch(const void* context, int64_t row, int64_t k0, int kc, float* dst) {
  const Patches& p = *static_cast<const Patches*>(context);
  const int64_t ox = row % p.out_width, oy = row / p.out_width % p.out_height,
                b = row / p.out_width / p.out_height;
  const int64_t ix = ox * p.stride - p.pad, run = p.kernel_w * p.images.channels;
  int64_t iy = oy * p.stride - p.pad + k0 / run, begin = k0 % run, left = kc;
  while (left > 0) {
    const int64_t end = begin + left < run ? begin + left : run;
    if (const float* line = p.images.row(b, iy))
      fill_run(p.images, line, ix, begin, end, dst);
    else
      zero(dst, end - begin);
    dst += end - begin;
    left -= end - begin;
    begin = 0;
    ++iy;
  }
}

}  // namespace

void conv2d(const Conv2dArgs& args, ThreadPool& pool) {
  const View &x = args.x, &out = args.out;
  Gemm g;
  set_weights(g, args.w);
  set_epilogue(g, args.bias, args.scale, args.residual, args.activation);
  if (args.bias && args.bias.shape[0] > 1) {
    g.bias_stride = args.bias.strides[0];
    g.bias_rows = out.shape[1] * out.shape[2];
  }
  g.rows = out.shape[0] * out.shape[1] * out.shape[2];
  g.out = out.f32();
  g.out_stride = out.shape[3];

  const Images images = {x.f32(), x.shape[1], x.shape[2], x.shape[3], args.height, args.width};
  if (suits_winograd(args)) return winograd(args, images, g, pool);
  if (args.kernel_h == 1 && args.kernel_w == 1 && args.stride == 1 && args.pad_before == 0 &&
      args.pad_after == 0 && !images.resized()) {
    g.x = images.x;
    g.x_stride = images.channels;
    return gemm(&g, 1, pool);
  }
  const Patches patches = {images, out.shape[1], out.shape[2], args.kernel_w, args.stride, args.pad_before};
  g.fill = fill_patch;
  g.context = &patches;
  gemm(&g, 1, pool);
}

}  // namespace mgm::cpu::MGM_ISA
