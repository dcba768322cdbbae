// Depthwise convolution (stride 1, odd kernel, zero padding) with bias, then LayerNorm over the channels:
// the head of a ConvNeXt block. x, out [B, H, W, C]; w [kh, kw, C].
//
// A task makes a tile of columns of a band of rows. Its input rows lie in a ring of kh rows, repacked as
// [channel vector][column][lane] with the zero padding in place: for one channel vector the ring is then a
// few KB that stay in L1, whatever C is, while w's kh*kw vectors are used for all columns of the tile. Eight
// output columns share registers: an input vector is loaded once for the kw outputs that it takes part in.
// The finished row waits, channels together, for its mean and variance (two passes) and leaves normalized.
// 49 fused multiply-adds an element at 7x7: bound by arithmetic, 1 load for 3 of them.
#include "../kernels.h"
#include "../simd/simd.h"

namespace mgm::cpu::MGM_ISA {
namespace {

constexpr int kColumns = 8;
#if defined(__AVX512F__)
constexpr int kLong = 16;
#else
constexpr int kLong = kColumns;
#endif
// The ring should leave half of a 1 MB second level cache to the output row and the weights.
constexpr int64_t kRingFloats = 128 * 1024;

inline int64_t min64(int64_t a, int64_t b) {
  return a < b ? a : b;
}
inline int64_t max64(int64_t a, int64_t b) {
  return a > b ? a : b;
}
inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

struct Shape {
  int64_t height, width, channels;
  int kernel_h, kernel_w;
  int64_t vectors;   // channel vectors, the last one padded with zeros
  int64_t tile;      // output columns of a task, a multiple of kColumns
  int64_t padded;    // ring columns: tile + kernel_w - 1
  int64_t ring_row;  // floats of one ring row
};

// Input row y, columns x0 - kw/2 ..., into one ring row.
inline void pack_row(const Shape& s, const float* x, int64_t row_stride, int64_t column_stride, int64_t y,
                     int64_t x0, float* to) {
  const vf zero = set1(0.0f);
  const int tail = static_cast<int>(s.channels % kWidth);
  for (int64_t j = 0; j < s.padded; ++j) {
    const int64_t column = x0 - s.kernel_w / 2 + j;
    float* out = to + j * kWidth;
    if (y < 0 || y >= s.height || column < 0 || column >= s.width) {
      for (int64_t v = 0; v < s.vectors; ++v) store(out + v * s.padded * kWidth, zero);
      continue;
    }
    const float* in = x + y * row_stride + column * column_stride;
    const int64_t whole = tail ? s.vectors - 1 : s.vectors;
    for (int64_t v = 0; v < whole; ++v) store(out + v * s.padded * kWidth, load(in + v * kWidth));
    if (tail) store(out + whole * s.padded * kWidth, load_n(in + whole * kWidth, tail));
  }
}

// N outputs of one channel vector. rows[ky]: ring row, first input column of the block.
template <int KW, int N>
MGM_INLINE void convolve(const float* const* rows, const float* w, int kernel_h, int kernel_w, vf bias,
                         vf* acc) {
  for (int i = 0; i < N; ++i) acc[i] = bias;
  for (int ky = 0; ky < kernel_h; ++ky) {
    const float* in = rows[ky];
    if constexpr (KW > 0) {
      vf weight[KW];
      for (int k = 0; k < KW; ++k) weight[k] = load(w + (ky * KW + k) * kWidth);
#pragma GCC unroll 32
      for (int j = 0; j < N + KW - 1; ++j) {
        const vf x = load(in + j * kWidth);
#pragma GCC unroll 16
        for (int k = 0; k < KW; ++k) {
          const int i = j - k;
          if (i >= 0 && i < N) acc[i] = fma(x, weight[k], acc[i]);
        }
      }
    } else {
      for (int k = 0; k < kernel_w; ++k) {
        const vf weight = load(w + (ky * kernel_w + k) * kWidth);
        for (int i = 0; i < N; ++i) acc[i] = fma(load(in + (i + k) * kWidth), weight, acc[i]);
      }
    }
  }
}

// Memory that is needed once the current row is convolved, fetched piece by piece meanwhile.
struct Ahead {
  const char *input, *input_end;
  const char *output, *output_end;
};

MGM_INLINE void fetch(Ahead& ahead, int lines) {
  for (int i = 0; i < lines && ahead.input < ahead.input_end; ++i, ahead.input += 64)
    __builtin_prefetch(ahead.input, 0, 2);
  for (int i = 0; i < lines && ahead.output < ahead.output_end; ++i, ahead.output += 64)
    __builtin_prefetch(ahead.output, 1, 2);
}

// The convolution of `count` columns of one output row into staging [count rounded up][vectors * kWidth].
template <int KW>
inline void convolve_row(const Shape& s, const float* const* ring, const float* w, const float* bias,
                         int64_t count, const float** rows, float* staging, Ahead ahead) {
  const int64_t pitch = s.vectors * kWidth, taps = static_cast<int64_t>(s.kernel_h) * s.kernel_w;
  for (int64_t v = 0; v < s.vectors; ++v) {
    const vf b = load(bias + v * kWidth);
    const auto block = [&]<int N>(int64_t x) {
      for (int ky = 0; ky < s.kernel_h; ++ky) rows[ky] = ring[ky] + (v * s.padded + x) * kWidth;
      fetch(ahead, 2 * N * kWidth * static_cast<int>(sizeof(float)) / 64);
      vf acc[N];
      convolve<KW, N>(rows, w + v * taps * kWidth, s.kernel_h, s.kernel_w, b, acc);
      float* to = staging + x * pitch + v * kWidth;
      for (int i = 0; i < N; ++i) store(to + i * pitch, acc[i]);
    };
    int64_t x = 0;
    if constexpr (kLong > kColumns)
      for (; x + kLong <= s.tile && x + kColumns < count; x += kLong) block.template operator()<kLong>(x);
    for (; x < count; x += kColumns) block.template operator()<kColumns>(x);
  }
}

// LayerNorm of one position. x is padded to whole vectors with zeros.
inline void normalize(const float* x, int64_t channels, const float* weight, const float* bias, float eps,
                      float* out) {
  vf s0 = set1(0.0f), s1 = s0, s2 = s0, s3 = s0;
  int64_t c = 0;
  for (; c + 4 * kWidth <= channels; c += 4 * kWidth) {
    s0 = s0 + load(x + c);
    s1 = s1 + load(x + c + kWidth);
    s2 = s2 + load(x + c + 2 * kWidth);
    s3 = s3 + load(x + c + 3 * kWidth);
  }
  for (; c < channels; c += kWidth) s0 = s0 + load(x + c);
  const float mean = sum((s0 + s1) + (s2 + s3)) / static_cast<float>(channels);
  const vf m = set1(mean);
  s0 = s1 = set1(0.0f);
  for (c = 0; c + 2 * kWidth <= channels; c += 2 * kWidth) {
    const vf a = load(x + c) - m, b = load(x + c + kWidth) - m;
    s0 = fma(a, a, s0);
    s1 = fma(b, b, s1);
  }
  for (; c + kWidth <= channels; c += kWidth) {
    const vf a = load(x + c) - m;
    s0 = fma(a, a, s0);
  }
  const int tail = static_cast<int>(channels - c);
  if (tail) {
    float means[kWidth];
    store(means, m);
    const vf a = load(x + c) - load_n(means, tail);
    s1 = fma(a, a, s1);
  }
  const float variance = sum(s0 + s1) / static_cast<float>(channels);
  const vf r = set1(1.0f / __builtin_sqrtf(variance + eps));
  for (c = 0; c + kWidth <= channels; c += kWidth)
    store(out + c, fma((load(x + c) - m) * r, load(weight + c), load(bias + c)));
  if (tail)
    store_n(out + c, fma((load(x + c) - m) * r, load_n(weight + c, tail), load_n(bias + c, tail)), tail);
}

}  // namespace

void depthwise_conv_norm(const DepthwiseConvNormArgs& args, ThreadPool& pool) {
  Shape s;
  const int64_t batch = args.x.shape[0];
  s.height = args.x.shape[1];
  s.width = args.x.shape[2];
  s.channels = args.x.shape[3];
  s.kernel_h = static_cast<int>(args.w.shape[0]);
  s.kernel_w = static_cast<int>(args.w.shape[1]);
  s.vectors = ceil_div(s.channels, kWidth);
  if (batch == 0 || s.height == 0 || s.width == 0 || s.channels == 0) return;

  const int64_t pitch = s.vectors * kWidth;
  const int64_t afford = kRingFloats / (s.kernel_h * pitch) - (s.kernel_w - 1);
  s.tile = max64(afford / kColumns, 1) * kColumns;
  // Tiles of equal width: 24 columns are better cut 16 + 8 than 20 + 4 into blocks of 8.
  s.tile = ceil_div(ceil_div(s.width, ceil_div(s.width, s.tile)), kColumns) * kColumns;
  s.padded = s.tile + s.kernel_w - 1;
  s.ring_row = s.vectors * s.padded * kWidth;

  // Weights as [channel vector][kh * kw][lane], bias padded.
  const int64_t taps = static_cast<int64_t>(s.kernel_h) * s.kernel_w;
  float* w = static_cast<float*>(pool.scratch(0, static_cast<size_t>((taps + 1) * pitch) * sizeof(float)));
  float* bias = w + taps * pitch;
  for (int64_t v = 0; v < s.vectors; ++v) {
    const int n = static_cast<int>(min64(kWidth, s.channels - v * kWidth));
    for (int64_t t = 0; t < taps; ++t) {
      const float* from = args.w.f32() + t * s.channels + v * kWidth;
      store(w + (v * taps + t) * kWidth, n == kWidth ? load(from) : load_n(from, n));
    }
    const float* from = args.bias.f32() + v * kWidth;
    store(bias + v * kWidth, n == kWidth ? load(from) : load_n(from, n));
  }

  // Bands cost kh - 1 rows of packing each; enough of them to share the work, tall enough not to notice.
  const int64_t tiles = ceil_div(s.width, s.tile);
  const int64_t wanted = ceil_div(4 * pool.size(), batch * tiles);
  const int64_t band = max64(ceil_div(s.height, max64(wanted, 1)), min64(s.height, 4));
  const int64_t bands = ceil_div(s.height, band);
  const size_t ring_bytes = static_cast<size_t>(s.kernel_h * s.ring_row) * sizeof(float);
  const size_t staging_bytes = static_cast<size_t>(s.tile * pitch) * sizeof(float);
  const size_t pointer_bytes = static_cast<size_t>(s.kernel_h) * sizeof(float*);

  pool.parallel_for(batch * bands * tiles, 1, [&](int64_t begin, int64_t end) {
    char* scratch = static_cast<char*>(pool.scratch(1, ring_bytes + staging_bytes + 2 * pointer_bytes));
    float* ring = reinterpret_cast<float*>(scratch);
    float* staging = reinterpret_cast<float*>(scratch + ring_bytes);
    const float** window = reinterpret_cast<const float**>(scratch + ring_bytes + staging_bytes);
    const float** rows = window + s.kernel_h;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t tile = task % tiles, b = task / tiles / bands;
      const int64_t y0 = task / tiles % bands * band, y1 = min64(y0 + band, s.height);
      const int64_t x0 = tile * s.tile, count = min64(s.tile, s.width - x0);
      const float* x = args.x.f32() + b * args.x.strides[0];
      for (int64_t y = y0 - s.kernel_h / 2; y < y1 + s.kernel_h / 2; ++y) {
        const int64_t slot = (y - y0 + s.kernel_h / 2) % s.kernel_h;
        pack_row(s, x, args.x.strides[1], args.x.strides[2], y, x0, ring + slot * s.ring_row);
        const int64_t row = y - s.kernel_h / 2;  // the output row whose last input row this is
        if (row < y0) continue;
        for (int ky = 0; ky < s.kernel_h; ++ky) window[ky] = ring + (row - y0 + ky) % s.kernel_h * s.ring_row;
        float* out =
            args.out.f32() + b * args.out.strides[0] + row * args.out.strides[1] + x0 * args.out.strides[2];
        const int64_t first = max64(x0 - s.kernel_w / 2, 0),
                      end_x = min64(x0 + s.tile + s.kernel_w / 2, s.width);
        const bool more = y + 1 < min64(y1 + s.kernel_h / 2, s.height) && y + 1 >= 0;
        const float* next = x + (more ? (y + 1) * args.x.strides[1] : 0) + first * args.x.strides[2];
        const Ahead ahead = {
            reinterpret_cast<const char*>(next),
            reinterpret_cast<const char*>(next + (more ? (end_x - first) * args.x.strides[2] : 0)),
            reinterpret_cast<const char*>(out),
            reinterpret_cast<const char*>(out + count * args.out.strides[2])};
        if (s.kernel_w == 7)
          convolve_row<7>(s, window, w, bias, count, rows, staging, ahead);
        else if (s.kernel_w == 3)
          convolve_row<3>(s, window, w, bias, count, rows, staging, ahead);
        else
          convolve_row<0>(s, window, w, bias, count, rows, staging, ahead);
        for (int64_t i = 0; i < count; ++i)
          normalize(staging + i * pitch, s.channels, args.norm_weight.f32(), args.norm_bias.f32(), args.eps,
                    out + i * args.out.strides[2]);
      }
    }
  });
}

}  // namespace mgm::cpu::MGM_ISA
