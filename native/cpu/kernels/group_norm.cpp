// GroupNorm over one image, or two that are taken as one of more channels. Memory is read twice: for the
// statistics, then to normalize. Both passes walk blocks of whole pixels, fixed by the number of channels,
// so that one image alone keeps every thread busy.
//
// A block, which stays in cache, is summed twice: for the mean of each group, then for the squares of what
// differs from it. Sums are f32 over a channel of a block and f64 from there on, blocks in order (Chan, Golub
// and LeVeque 1983), so neither a large mean nor a large image costs precision. Groups beyond the range of
// f32 squares are done again in f64.
#include "../kernels.h"
#include "../simd/math.h"
#include "../simd/simd.h"

namespace mgm::cpu::MGM_ISA {
namespace {

constexpr int64_t kBlockFloats = 32768, kMostPixels = 256;

// The channels of one of the two images: [pixels, channels], channel 0 being `first` of all.
struct Part {
  const float* x;
  int64_t channels, first;
};

struct Image {
  Part parts[2];
  int64_t pixels, channels, groups;
  int64_t group_width() const { return channels / groups; }
};

struct Statistics {
  double mean, square;  // of a group: the mean, the sum of squared differences from it
};

// y = (x - shift) * scale + bias, for every channel.
struct Transform {
  float *shift, *scale, *bias;
};

static Image image_at(const GroupNormArgs& args, int64_t b) {
  Image image;
  image.pixels = args.x.shape[1] * args.x.shape[2];
  const int64_t c1 = args.x.shape[3], c2 = args.more ? args.more.shape[3] : 0;
  image.parts[0] = {args.x.f32() + b * image.pixels * c1, c1, 0};
  image.parts[1] = {args.more.f32() + b * image.pixels * c2, c2, c1};
  image.channels = c1 + c2;
  image.groups = args.groups;
  return image;
}

// sums[c] += x over pixels [begin, end).
static void add_values(const Part& part, int64_t begin, int64_t end, float* sums) {
  const int64_t n = part.channels;
  sums += part.first;
  int64_t p = begin;
  for (; p + 4 <= end; p += 4) {
    const float* x = part.x + p * n;
    for (int64_t c = 0; c < n; c += kWidth) {
      const vf a = load_up_to(x + c, n - c) + load_up_to(x + n + c, n - c);
      const vf b = load_up_to(x + 2 * n + c, n - c) + load_up_to(x + 3 * n + c, n - c);
      store_up_to(sums + c, load_up_to(sums + c, n - c) + (a + b), n - c);
    }
  }
  for (; p < end; ++p)
    for (int64_t c = 0; c < n; c += kWidth)
      store_up_to(sums + c, load_up_to(sums + c, n - c) + load_up_to(part.x + p * n + c, n - c), n - c);
}

// sums[c] += d and squares[c] += d^2, d = x - means[c], over pixels [begin, end).
static void add_differences(const Part& part, int64_t begin, int64_t end, const float* means, float* sums,
                            float* squares) {
  const int64_t n = part.channels;
  means += part.first, sums += part.first, squares += part.first;
  int64_t p = begin;
  for (; p + 4 <= end; p += 4) {
    const float* x = part.x + p * n;
    for (int64_t c = 0; c < n; c += kWidth) {
      const vf m = load_up_to(means + c, n - c);
      const vf d0 = load_up_to(x + c, n - c) - m, d1 = load_up_to(x + n + c, n - c) - m,
               d2 = load_up_to(x + 2 * n + c, n - c) - m, d3 = load_up_to(x + 3 * n + c, n - c) - m;
      store_up_to(sums + c, load_up_to(sums + c, n - c) + ((d0 + d1) + (d2 + d3)), n - c);
      const vf square = fma(d0, d0, d1 * d1) + fma(d2, d2, d3 * d3);
      store_up_to(squares + c, load_up_to(squares + c, n - c) + square, n - c);
    }
  }
  for (; p < end; ++p)
    for (int64_t c = 0; c < n; c += kWidth) {
      const vf d = load_up_to(part.x + p * n + c, n - c) - load_up_to(means + c, n - c);
      store_up_to(sums + c, load_up_to(sums + c, n - c) + d, n - c);
      store_up_to(squares + c, fma(d, d, load_up_to(squares + c, n - c)), n - c);
    }
}

static double sum_of(const float* x, int64_t n) {
  double total = 0.0;
  for (int64_t i = 0; i < n; ++i) total += static_cast<double>(x[i]);
  return total;
}

// Statistics of each group over pixels [begin, end). scratch: 3 floats a channel.
static void measure_block(const Image& image, int64_t begin, int64_t end, float* scratch, Statistics* out) {
  const int64_t width = image.group_width();
  const double count = static_cast<double>((end - begin) * width);
  float *sums = scratch, *squares = sums + image.channels, *means = squares + image.channels;
  const size_t bytes = sizeof(float) * static_cast<size_t>(image.channels);
  std::memset(sums, 0, bytes);
  for (const Part& part : image.parts) add_values(part, begin, end, sums);
  for (int64_t g = 0; g < image.groups; ++g) {
    const float mean = static_cast<float>(sum_of(sums + g * width, width) / count);
    for (int64_t c = 0; c < width; ++c) means[g * width + c] = mean;
  }
  std::memset(sums, 0, 2 * bytes);
  for (const Part& part : image.parts) add_differences(part, begin, end, means, sums, squares);
  for (int64_t g = 0; g < image.groups; ++g) {
    const double d = sum_of(sums + g * width, width);
    out[g] = {static_cast<double>(means[g * width]) + d / count,
              sum_of(squares + g * width, width) - d * d / count};
  }
}

// Puts the statistics of a group's blocks together. blocks: every image.groups-th is this group's.
static Statistics combine(const Image& image, int64_t block_pixels, const Statistics* blocks) {
  const auto add_up = [&](const auto& term) {
    double total = 0.0;
    const Statistics* block = blocks;
    for (int64_t p = 0; p < image.pixels; p += block_pixels, block += image.groups) {
      const int64_t left = image.pixels - p;
      total += term(*block, static_cast<double>(left < block_pixels ? left : block_pixels));
    }
    return total;
  };
  // About the first block's mean, so that the mean of a constant image is that constant.
  const double origin = blocks->mean;
  const double mean = origin + add_up([&](const Statistics& block, double pixels) {
                                 return (block.mean - origin) * pixels;
                               }) / static_cast<double>(image.pixels);
  const double width = static_cast<double>(image.group_width());
  return {mean, add_up([&](const Statistics& block, double pixels) {
            return block.square + (block.mean - mean) * (block.mean - mean) * pixels * width;
          })};
}

// Whether f32 held what the statistics are made of, and holds what follows from them.
static bool in_range(double mean, double variance) {
  constexpr double kLeast = 0x1p-100, kMost = 0x1p100;
  return variance > kLeast && variance < kMost && mean > -kMost && mean < kMost;
}

// out[p, :channels] of the part, for pixels [begin, end).
template <bool Silu>
static void normalize(const Part& part, int64_t begin, int64_t end, const Transform& t, float* out,
                      int64_t out_stride) {
  const int64_t n = part.channels;
  const float *shift = t.shift + part.first, *scale = t.scale + part.first, *bias = t.bias + part.first;
  for (int64_t p = begin; p < end; ++p) {
    const float* x = part.x + p * n;
    float* to = out + p * out_stride + part.first;
    for (int64_t c = 0; c < n; c += kWidth) {
      vf y = fma(load_up_to(x + c, n - c) - load_up_to(shift + c, n - c), load_up_to(scale + c, n - c),
                 load_up_to(bias + c, n - c));
      if constexpr (Silu) y = silu(y);
      store_up_to(to + c, y, n - c);
    }
  }
}

// A group from beginning to end in f64.
static void normalize_f64(const GroupNormArgs& args, const Image& image, int64_t group, float* out) {
  const int64_t width = image.group_width(), first = group * width;
  const double count = static_cast<double>(image.pixels * width);
  const auto at = [&](int64_t p, int64_t c) {
    const Part& part = image.parts[c >= image.parts[0].channels];
    return static_cast<double>(part.x[p * part.channels + c - part.first]);
  };
  double mean = 0.0, square = 0.0;
  for (int64_t p = 0; p < image.pixels; ++p)
    for (int64_t c = first; c < first + width; ++c) mean += at(p, c);
  mean /= count;
  for (int64_t p = 0; p < image.pixels; ++p)
    for (int64_t c = first; c < first + width; ++c) square += (at(p, c) - mean) * (at(p, c) - mean);
  const double r = 1.0 / __builtin_sqrt(square / count + static_cast<double>(args.eps));
  for (int64_t p = 0; p < image.pixels; ++p)
    for (int64_t c = first; c < first + width; ++c) {
      const double y = (at(p, c) - mean) * r * static_cast<double>(args.weight.f32()[c]) +
                       static_cast<double>(args.bias.f32()[c]);
      const vf value = set1(static_cast<float>(y));
      store_n(out + p * image.channels + c, args.activation == Activation::silu ? silu(value) : value, 1);
    }
}

}  // namespace

void group_norm(const GroupNormArgs& args, ThreadPool& pool) {
  const int64_t batch = args.x.shape[0], groups = args.groups;
  const Image first = image_at(args, 0);
  const int64_t pixels = first.pixels, channels = first.channels, width = first.group_width();
  int64_t block_pixels = kBlockFloats / channels;
  if (block_pixels < 1) block_pixels = 1;
  if (block_pixels > kMostPixels) block_pixels = kMostPixels;
  const int64_t blocks = (pixels + block_pixels - 1) / block_pixels;
  int64_t grain = kBlockFloats / (block_pixels * channels);
  if (grain < 1) grain = 1;

  // Shared by all workers: statistics [batch, blocks, groups], transforms [batch, 3, channels], and whether
  // f32 is enough [batch, groups].
  const size_t block_bytes = sizeof(Statistics) * static_cast<size_t>(batch * blocks * groups),
               transform_bytes = sizeof(float) * static_cast<size_t>(batch * 3 * channels);
  char* shared = static_cast<char*>(
      pool.scratch(1, block_bytes + transform_bytes + static_cast<size_t>(batch * groups)));
  Statistics* statistics = reinterpret_cast<Statistics*>(shared);
  float* transforms = reinterpret_cast<float*>(shared + block_bytes);
  bool* enough = reinterpret_cast<bool*>(shared + block_bytes + transform_bytes);
  const auto transform_of = [&](int64_t b) {
    float* t = transforms + b * 3 * channels;
    return Transform{t, t + channels, t + 2 * channels};
  };
  const auto end_of = [&](int64_t block) {
    return (block + 1) * block_pixels < pixels ? (block + 1) * block_pixels : pixels;
  };

  pool.parallel_for(batch * blocks, grain, [&](int64_t begin, int64_t end) {
    float* scratch = static_cast<float*>(pool.scratch(0, sizeof(float) * static_cast<size_t>(3 * channels)));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t block = task % blocks;
      measure_block(image_at(args, task / blocks), block * block_pixels, end_of(block), scratch,
                    statistics + task * groups);
    }
  });

  pool.parallel_for(batch * groups, 8, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / groups, g = task % groups;
      const Statistics all = combine(first, block_pixels, statistics + b * blocks * groups + g);
      const double variance =
          all.square / static_cast<double>(pixels * width) + static_cast<double>(args.eps);
      enough[task] = in_range(all.mean, variance);
      const double r = 1.0 / __builtin_sqrt(variance);
      const float shift = static_cast<float>(all.mean);
      const Transform t = transform_of(b);
      for (int64_t c = g * width; c < (g + 1) * width; ++c) {
        const double scale = r * static_cast<double>(args.weight.f32()[c]);
        t.shift[c] = shift;
        t.scale[c] = static_cast<float>(scale);
        t.bias[c] = static_cast<float>(static_cast<double>(args.bias.f32()[c]) -
                                       (all.mean - static_cast<double>(shift)) * scale);
      }
    }
  });

  // From the end, where the cache still holds what was measured last.
  pool.parallel_for(batch * blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = batch * blocks - 1 - begin; task > batch * blocks - 1 - end; --task) {
      const int64_t b = task / blocks, block = task % blocks;
      float* out = args.out.f32() + b * pixels * channels;
      const Image image = image_at(args, b);
      for (const Part& part : image.parts)
        (args.activation == Activation::silu
             ? normalize<true>
             : normalize<false>)(part, block * block_pixels, end_of(block), transform_of(b), out, channels);
    }
  });

  pool.parallel_for(batch * groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task)
      if (!enough[task])
        normalize_f64(args, image_at(args, task / groups), task % groups,
                      args.out.f32() + task / groups * pixels * channels);
  });
}

}  // namespace mgm::cpu::MGM_ISA
