// 3x3 convolution with stride 1 by Winograd's minimal filtering F(4x4, 3x3): a tile of 4x4 outputs and its
// 6x6 inputs d become, with filter g,
//   Y = A^T ((G g G^T) . (B^T d B)) A          . multiplies elements; the sum over channels is taken before A
// so that a tile needs 36 products a pair of channels where the direct sum takes 144. The products are one
// matrix [tiles, C] x [C, O] for each of the 36 points, multiplied by the Gemm engine. Filters are
// transformed in every call, a block of output channels at a time: at rest they stay as packed, 4 to 8 times
// smaller.
//
// In each dimension, filter and tile are taken as polynomials at the points 0, +-a, +-b and infinity. Points
// of the form +-c, +-1/c round best (Alam et al. 2022, "Winograd Convolution for Deep Neural Networks:
// Efficient Point Selection"): the error is about 5 times that of the direct sum, and in proportion to the
// largest numbers of a tile. (Twice the size by nearest neighbour makes tiles vanish at the point -1, which
// would leave 25 products; but points with it err three times as much.) The gain on the way is at most 2^12,
// so what lies beyond 2^115 may overflow; a NaN or infinity spoils all tiles that see it, not only the
// outputs near it.
#include "conv2d.h"

namespace mgm::cpu::MGM_ISA {
namespace {

constexpr int kTile = 4, kTaps = 3;
constexpr int kPoints = kTile + kTaps - 1;  // and inputs of a tile; in the order 0, infinity, b, -b, a, -a
constexpr double kA = 0.70710678118654752, kB = 1.41421356237309505;

MGM_INLINE vf constant(double x) {
  return set1(static_cast<float>(x));
}

// v = B^T d
MGM_INLINE void input_points(const vf* d, vf* v) {
  const vf sum = constant(kA * kA + kB * kB), product = constant(kA * kA * kB * kB);
  v[0] = fma(product, d[0], fnma(sum, d[2], d[4]));
  v[1] = fma(product, d[1], fnma(sum, d[3], d[5]));
  const vf even_b = fnma(constant(kA * kA), d[2], d[4]), odd_b = fnma(constant(kA * kA), d[1], d[3]);
  v[2] = fma(constant(kB), odd_b, even_b);
  v[3] = fnma(constant(kB), odd_b, even_b);
  const vf even_a = fnma(constant(kB * kB), d[2], d[4]), odd_a = fnma(constant(kB * kB), d[1], d[3]);
  v[4] = fma(constant(kA), odd_a, even_a);
  v[5] = fnma(constant(kA), odd_a, even_a);
}

// u = G g
MGM_INLINE void filter_points(const vf* g, vf* u) {
  constexpr double of_a = 1 / (2 * kA * kA * (kA * kA - kB * kB)),
                   of_b = 1 / (2 * kB * kB * (kB * kB - kA * kA));
  u[0] = g[0] * constant(1 / (kA * kA * kB * kB));
  u[1] = g[2];
  const vf even_b = fma(constant(kB * kB), g[2], g[0]) * constant(of_b), odd_b = g[1] * constant(kB * of_b);
  u[2] = even_b + odd_b;
  u[3] = even_b - odd_b;
  const vf even_a = fma(constant(kA * kA), g[2], g[0]) * constant(of_a), odd_a = g[1] * constant(kA * of_a);
  u[4] = even_a + odd_a;
  u[5] = even_a - odd_a;
}

// y = A^T m
MGM_INLINE void output_pixels(const vf* m, vf* y) {
  const vf even_b = m[2] + m[3], odd_b = m[2] - m[3];
  const vf even_a = m[4] + m[5], odd_a = m[4] - m[5];
  y[0] = m[0] + even_a + even_b;
  y[1] = fma(constant(kA), odd_a, constant(kB) * odd_b);
  y[2] = fma(constant(kA * kA), even_a, constant(kB * kB) * even_b);
  y[3] = fma(constant(kA * kA * kA), odd_a, fma(constant(kB * kB * kB), odd_b, m[1]));
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
void transform_filters(const Work& w, int64_t panel, int64_t c) {
  alignas(64) float converted[kTaps * kTaps][kQuantBlock * kPanel];
  const float* taps[kTaps * kTaps];
  const uint8_t* packed =
      w.conv.w + static_cast<size_t>(w.panel + panel) * panel_bytes(w.conv.dtype, w.conv.k);
  for (int t = 0; t < kTaps * kTaps; ++t)
    taps[t] = weights_of(w.conv, packed, t * w.channels + c, kQuantBlock, converted[t]);
  float* to = w.filters + (panel * w.channels + c) * kPanel;
  for (int i = 0; i < kQuantBlock * kPanel; i += kWidth) {
    vf half[kPoints * kTaps];
    for (int x = 0; x < kTaps; ++x) {
      vf g[kTaps], u[kPoints];
      for (int y = 0; y < kTaps; ++y) g[y] = load(taps[y * kTaps + x] + i);
      filter_points(g, u);
      for (int y = 0; y < kPoints; ++y) half[y * kTaps + x] = u[y];
    }
    for (int y = 0; y < kPoints; ++y) {
      vf u[kPoints];
      filter_points(half + y * kTaps, u);
      for (int x = 0; x < kPoints; ++x) store(to + (y * kPoints + x) * w.filter_step + i, u[x]);
    }
  }
}

void transform_input(const Work& w, int64_t index, const float* zeros) {
  const int64_t tile = w.tile + index, image = tile / (w.down * w.across);
  const int64_t y0 = tile / w.across % w.down * kTile - w.pad, x0 = tile % w.across * kTile - w.pad;
  const float* pixels[kPoints * kPoints];
  for (int y = 0; y < kPoints; ++y) {
    const float* row = w.images.row(image, y0 + y);
    for (int x = 0; x < kPoints; ++x) {
      const float* pixel = w.images.pixel(row, x0 + x);
      pixels[y * kPoints + x] = pixel ? pixel : zeros;
    }
  }
  float* to = w.inputs + index * w.channels;
  for (int64_t c = 0; c < w.channels; c += kWidth) {
    vf half[kPoints * kPoints];
    for (int x = 0; x < kPoints; ++x) {
      vf d[kPoints], v[kPoints];
      for (int y = 0; y < kPoints; ++y) d[y] = load(pixels[y * kPoints + x] + c);
      input_points(d, v);
      for (int y = 0; y < kPoints; ++y) half[y * kPoints + x] = v[y];
    }
    for (int y = 0; y < kPoints; ++y) {
      vf v[kPoints];
      input_points(half + y * kPoints, v);
      for (int x = 0; x < kPoints; ++x) store(to + (y * kPoints + x) * w.input_step + c, v[x]);
    }
  }
}

void transform_product(const Work& w, int64_t index) {
  const int64_t tile = w.tile + index, image = tile / (w.down * w.across);
  const int64_t y0 = tile / w.across % w.down * kTile, x0 = tile % w.across * kTile;
  const int64_t high = w.out_height - y0 < kTile ? w.out_height - y0 : kTile,
                wide = w.out_width - x0 < kTile ? w.out_width - x0 : kTile;
  const float* from = w.products + index * w.outputs;
  for (int64_t o = 0; o < w.outputs; o += kPanel) {
    float sums[kTile * kTile * kPanel];
    for (int64_t j = 0; j < kPanel && o + j < w.outputs; j += kWidth) {
      const int left = w.outputs - o - j < kWidth ? static_cast<int>(w.outputs - o - j) : kWidth;
      vf half[kTile * kPoints];
      for (int x = 0; x < kPoints; ++x) {
        vf m[kPoints], y[kTile];
        for (int i = 0; i < kPoints; ++i) {
          const float* p = from + (i * kPoints + x) * w.product_step + o + j;
          m[i] = left == kWidth ? load(p) : load_n(p, left);
        }
        output_pixels(m, y);
        for (int i = 0; i < kTile; ++i) half[i * kPoints + x] = y[i];
      }
      for (int i = 0; i < kTile; ++i) {
        vf y[kTile];
        output_pixels(half + i * kPoints, y);
        for (int x = 0; x < kTile; ++x) store(sums + (i * kTile + x) * kPanel + j, y[x]);
      }
    }
    for (int64_t y = 0; y < high; ++y)
      epilogue(w.conv, sums + y * kTile * kPanel, nullptr, (image * w.out_height + y0 + y) * w.out_width + x0,
               static_cast<int>(wide), w.panel * kPanel + o);
  }
}

// Larger blocks keep the products' rows of filters long; smaller chunks find more in the last cache.
constexpr int64_t kFilterBytes = int64_t{40} << 20, kChunkBytes = int64_t{64} << 20;

MGM_INLINE int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
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
  const int64_t all_tiles = out.shape[0] * w.down * w.across, all_panels = ceil_div(conv.n, kPanel);

  constexpr int64_t points = kPoints * kPoints, line = 64 / sizeof(float);
  const int64_t panel_floats = w.channels * kPanel;
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
      for (int64_t i = begin; i < end; ++i) transform_filters(w, i / parts, i % parts * kQuantBlock);
    });
    for (w.tile = 0; w.tile < all_tiles; w.tile += chunk) {
      w.tiles = all_tiles - w.tile < chunk ? all_tiles - w.tile : chunk;
      if (w.panel == 0 || chunk < all_tiles)
        pool.parallel_for(w.tiles, 4, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) transform_input(w, i, zeros);
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
        for (int64_t i = begin; i < end; ++i) transform_product(w, i);
      });
    }
  }
}

}  // namespace mgm::cpu::MGM_ISA
