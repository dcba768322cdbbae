// 3x3 convolution with stride 1 by Winograd's minimal filtering F(4x4, 3x3): a tile of 4x4 outputs and its
// 6x6 inputs d become, with filter g,
//   Y = A^T ((G g G^T) . (B^T d B)) A          . multiplies elements; the sum over channels is taken before A
// so that a tile needs 36 products a pair of channels where the direct sum takes 144. The products are one
// matrix [tiles, C] x [C, O] for each of the 36 points, multiplied by the Gemm engine. Filters are
// transformed in every call, a block of output channels at a time: at rest they stay as packed, 4 to 8 times
// smaller.
//
// In each dimension, filter and tile are taken as polynomials at the points 0, +-a, +-b and infinity.
// Rounding errors grow with the spread of the powers of a and b; 1/sqrt(2) and sqrt(2) keep it lowest (Alam
// et al. 2022, "Winograd Convolution for Deep Neural Networks: Efficient Point Selection"): about 5 times the
// error of the direct sum. Numbers pass through with a gain of at most 2^12, so results beyond 2^115 may
// overflow, and a NaN or infinity spoils all tiles that see it, not only the outputs.
#include "../simd/math.h"
#include "conv2d.h"

namespace mgm::cpu::MGM_ISA {
namespace {

constexpr int kTile = 4, kInput = 6, kTaps = 3;

// Order of points: 0, infinity, b, -b, a, -a.
struct Plain {
  static constexpr int kPoints = 6;
  static constexpr float a = 0.70710678f, b = 1.41421356f;
};

// An image of twice the size holds pairs of equal pixels, and a tile that starts with the second of a pair is
// zero at the point -1, whatever the image: 25 products remain.
struct Doubled {
  static constexpr int kPoints = 5;
  static constexpr float a = 1.0f, b = 2.0f;
};

// v = B^T d. Elements lie `step` apart in both.
template <class P>
MGM_INLINE void input_points(const vf* d, vf* v, int step) {
  constexpr float a = P::a, b = P::b;
  const vf d1 = d[step], d2 = d[2 * step], d3 = d[3 * step], d4 = d[4 * step];
  const vf sum = set1(a * a + b * b), product = set1(a * a * b * b);
  v[0] = fma(product, d[0], fnma(sum, d2, d4));
  v[step] = fma(product, d1, fnma(sum, d3, d[5 * step]));
  const vf even_b = fnma(set1(a * a), d2, d4), odd_b = fnma(set1(a * a), d1, d3);
  v[2 * step] = fma(set1(b), odd_b, even_b);
  v[3 * step] = fnma(set1(b), odd_b, even_b);
  const vf even_a = fnma(set1(b * b), d2, d4), odd_a = fnma(set1(b * b), d1, d3);
  v[4 * step] = fma(set1(a), odd_a, even_a);
  if constexpr (P::kPoints == 6) v[5 * step] = fnma(set1(a), odd_a, even_a);
}

// u = G g
template <class P>
MGM_INLINE void filter_points(const vf* g, vf* u, int step) {
  constexpr float a = P::a, b = P::b;
  constexpr float of_a = 1.0f / (2.0f * a * a * (a * a - b * b)),
                  of_b = 1.0f / (2.0f * b * b * (b * b - a * a));
  const vf g1 = g[step], g2 = g[2 * step];
  u[0] = g[0] * set1(1.0f / (a * a * b * b));
  u[step] = g2;
  const vf even_b = fma(set1(b * b), g2, g[0]) * set1(of_b), odd_b = g1 * set1(b * of_b);
  u[2 * step] = even_b + odd_b;
  u[3 * step] = even_b - odd_b;
  const vf even_a = fma(set1(a * a), g2, g[0]) * set1(of_a), odd_a = g1 * set1(a * of_a);
  u[4 * step] = even_a + odd_a;
  if constexpr (P::kPoints == 6) u[5 * step] = even_a - odd_a;
}

// y = A^T m
template <class P>
MGM_INLINE void output_pixels(const vf* m, vf* y, int step) {
  constexpr float a = P::a, b = P::b;
  const vf even_b = m[2 * step] + m[3 * step], odd_b = m[2 * step] - m[3 * step];
  vf even_a = m[4 * step], odd_a = even_a;
  if constexpr (P::kPoints == 6) {
    even_a = even_a + m[5 * step];
    odd_a = odd_a - m[5 * step];
  }
  y[0] = m[0] + even_a + even_b;
  y[step] = fma(set1(a), odd_a, set1(b) * odd_b);
  y[2 * step] = fma(set1(a * a), even_a, set1(b * b) * even_b);
  y[3 * step] = fma(set1(a * a * a), odd_a, fma(set1(b * b * b), odd_b, m[step]));
}

// How a convolution is cut: tiles of all images in chunks, output channels in blocks, so that what lies
// between the three steps stays in the last cache. Matrices of the points lie a line further apart than their
// data, which keeps them out of one cache set.
struct Work {
  const Images& images;
  const Gemm& conv;
  int64_t pad = 0, out_height = 0, out_width = 0;
  int64_t down = 0, across = 0;  // tiles of an image
  int64_t channels = 0;

  float* filters = nullptr;                                   // [points][panels][channels][kPanel]
  float* inputs = nullptr;                                    // [points][tiles][channels]
  float* products = nullptr;                                  // [points][tiles][outputs]
  int64_t filter_step = 0, input_step = 0, product_step = 0;  // between points

  int64_t panel = 0, panels = 0, outputs = 0;  // the block of output channels
  int64_t tile = 0, tiles = 0;                 // the chunk of tiles
};

// A panel's channels c .. c + 31 at all points.
template <class P>
void transform_filters(const Work& w, int64_t panel, int64_t c) {
  constexpr int n = P::kPoints;
  alignas(64) float converted[kTaps * kTaps][kQuantBlock * kPanel];
  const float* taps[kTaps * kTaps];
  const uint8_t* packed =
      w.conv.w + static_cast<size_t>(w.panel + panel) * panel_bytes(w.conv.dtype, w.conv.k);
  for (int t = 0; t < kTaps * kTaps; ++t)
    taps[t] = weights_of(w.conv, packed, t * w.channels + c, kQuantBlock, converted[t]);
  float* to = w.filters + (panel * w.channels + c) * kPanel;
  for (int i = 0; i < kQuantBlock * kPanel; i += kWidth) {
    vf g[kTaps * kTaps], half[n * kTaps];
    for (int t = 0; t < kTaps * kTaps; ++t) g[t] = load(taps[t] + i);
    for (int x = 0; x < kTaps; ++x) filter_points<P>(g + x, half + x, kTaps);
    for (int y = 0; y < n; ++y) {
      vf row[n];
      filter_points<P>(half + y * kTaps, row, 1);
      for (int x = 0; x < n; ++x) store(to + (y * n + x) * w.filter_step + i, row[x]);
    }
  }
}

template <class P>
void transform_input(const Work& w, int64_t index, const float* zeros) {
  constexpr int n = P::kPoints;
  const int64_t tile = w.tile + index, b = tile / (w.down * w.across);
  const int64_t y0 = tile / w.across % w.down * kTile - w.pad, x0 = tile % w.across * kTile - w.pad;
  const float* pixels[kInput * kInput];
  for (int y = 0; y < kInput; ++y) {
    const float* row = w.images.row(b, y0 + y);
    for (int x = 0; x < kInput; ++x) {
      const float* pixel = w.images.pixel(row, x0 + x);
      pixels[y * kInput + x] = pixel ? pixel : zeros;
    }
  }
  float* to = w.inputs + index * w.channels;
  for (int64_t c = 0; c < w.channels; c += kWidth) {
    vf half[n * kInput];
    for (int x = 0; x < kInput; ++x) {
      vf d[kInput], v[n];
      for (int y = 0; y < kInput; ++y) d[y] = load(pixels[y * kInput + x] + c);
      input_points<P>(d, v, 1);
      for (int y = 0; y < n; ++y) half[y * kInput + x] = v[y];
    }
    for (int y = 0; y < n; ++y) {
      vf v[n];
      input_points<P>(half + y * kInput, v, 1);
      for (int x = 0; x < n; ++x) store(to + (y * n + x) * w.input_step + c, v[x]);
    }
  }
}

template <class P>
void transform_product(const Work& w, int64_t index) {
  constexpr int n = P::kPoints;
  const int64_t tile = w.tile + index, b = tile / (w.down * w.across);
  const int64_t y0 = tile / w.across % w.down * kTile, x0 = tile % w.across * kTile;
  const int64_t high = w.out_height - y0 < kTile ? w.out_height - y0 : kTile,
                wide = w.out_width - x0 < kTile ? w.out_width - x0 : kTile;
  const float* from = w.products + index * w.outputs;
  for (int64_t o = 0; o < w.outputs; o += kPanel) {
    float sums[kTile * kTile * kPanel];
    for (int64_t j = 0; j < kPanel && o + j < w.outputs; j += kWidth) {
      const int left = w.outputs - o - j < kWidth ? static_cast<int>(w.outputs - o - j) : kWidth;
      vf half[kTile * n];
      for (int x = 0; x < n; ++x) {
        vf m[n], y[kTile];
        for (int i = 0; i < n; ++i) {
          const float* p = from + (i * n + x) * w.product_step + o + j;
          m[i] = left == kWidth ? load(p) : load_n(p, left);
        }
        output_pixels<P>(m, y, 1);
        for (int i = 0; i < kTile; ++i) half[i * n + x] = y[i];
      }
      for (int i = 0; i < kTile; ++i) {
        vf y[kTile];
        output_pixels<P>(half + i * n, y, 1);
        for (int x = 0; x < kTile; ++x) store(sums + (i * kTile + x) * kPanel + j, y[x]);
      }
    }
    for (int64_t y = 0; y < high; ++y)
      epilogue(w.conv, sums + y * kTile * kPanel, nullptr, ((b * w.out_height) + y0 + y) * w.out_width + x0,
               static_cast<int>(wide), w.panel * kPanel + o);
  }
}

constexpr size_t kFilterBytes = size_t{40} << 20, kChunkBytes = size_t{64} << 20;

MGM_INLINE int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

template <class P>
void run(Work& w, int64_t all_tiles, int64_t all_panels, ThreadPool& pool) {
  constexpr int64_t points = P::kPoints * P::kPoints, line = 64 / sizeof(float);
  const int64_t panel_floats = w.channels * kPanel;
  // Equal blocks of about kFilterBytes, equal chunks of about kChunkBytes.
  const int64_t blocks = ceil_div(all_panels * panel_floats * points * 4, kFilterBytes);
  const int64_t block = ceil_div(all_panels, blocks);
  const int64_t chunks = ceil_div(all_tiles * (w.channels + block * kPanel) * points * 4, kChunkBytes);
  const int64_t chunk = ceil_div(all_tiles, chunks);
  w.filter_step = block * panel_floats + line;
  w.input_step = chunk * w.channels + line;
  w.product_step = chunk * block * kPanel + line;
  const auto floats = [&](int slot, int64_t count) {
    return static_cast<float*>(pool.scratch(slot, static_cast<size_t>(count) * sizeof(float)));
  };
  w.filters = floats(1, points * w.filter_step);
  w.inputs = floats(2, points * w.input_step + w.channels);
  w.products = floats(3, points * w.product_step);
  float* zeros = w.inputs + points * w.input_step;
  std::memset(zeros, 0, static_cast<size_t>(w.channels) * sizeof(float));

  for (w.panel = 0; w.panel < all_panels; w.panel += block) {
    w.panels = all_panels - w.panel < block ? all_panels - w.panel : block;
    const int64_t left = w.conv.n - w.panel * kPanel;
    w.outputs = left < w.panels * kPanel ? left : w.panels * kPanel;
    const int64_t parts = w.channels / kQuantBlock;
    pool.parallel_for(w.panels * parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) transform_filters<P>(w, i / parts, i % parts * kQuantBlock);
    });
    for (w.tile = 0; w.tile < all_tiles; w.tile += chunk) {
      w.tiles = all_tiles - w.tile < chunk ? all_tiles - w.tile : chunk;
      if (w.panel == 0 || chunk < all_tiles)
        pool.parallel_for(w.tiles, 4, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) transform_input<P>(w, i, zeros);
        });
      Gemm products[points];
      for (int64_t p = 0; p < points; ++p) {
        Gemm& g = products[p];
        g.rows = w.tiles;
        g.k = w.channels;
        g.n = w.outputs;
        g.x = w.inputs + p * w.input_step;
        g.x_stride = w.channels;
        g.w = reinterpret_cast<const uint8_t*>(w.filters + p * w.filter_step);
        g.out = w.products + p * w.product_step;
        g.out_stride = w.outputs;
      }
      gemm(products, points, pool);
      pool.parallel_for(w.tiles, 4, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) transform_product<P>(w, i);
      });
    }
  }
}

}  // namespace

bool suits_winograd(const Conv2dArgs& args) {
  const int64_t tiles = ceil_div(args.out.shape[1], kTile) * ceil_div(args.out.shape[2], kTile);
  return args.kernel_h == kTaps && args.kernel_w == kTaps && args.stride == 1 &&
         args.x.shape[3] % kQuantBlock == 0 && args.out.shape[3] >= 32 && tiles >= 32;
}

void winograd(const Conv2dArgs& args, const Images& images, const Gemm& conv, ThreadPool& pool) {
  const View& out = args.out;
  Work w = {images, conv};
  w.pad = args.pad_before;
  w.out_height = out.shape[1];
  w.out_width = out.shape[2];
  w.down = ceil_div(w.out_height, kTile);
  w.across = ceil_div(w.out_width, kTile);
  w.channels = images.channels;
  const int64_t tiles = out.shape[0] * w.down * w.across, panels = ceil_div(conv.n, kPanel);
  const bool doubled = images.height == 2 * images.source_height && images.width == 2 * images.source_width &&
                       args.pad_before % 2 == 1;
  if (doubled)
    run<Doubled>(w, tiles, panels, pool);
  else
    run<Plain>(w, tiles, panels, pool);
}

}  // namespace mgm::cpu::MGM_ISA
