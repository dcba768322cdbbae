// Convolution as a matrix product (gemm.cuh) whose rows of x are patches, copied from the NHWC image straight
// to where the product wants its slices; zeros where the kernel hangs over the border. K = kh * kw * C in the
// order of memory: where nothing is padded, the kw pixels of a kernel row are one run. An image that is
// resized first is never made: the pixel under a tap is looked up in x.
//
// Patches whose runs are whole 16-byte pieces (the downsamplings, all of a UNet and a VAE but the first
// layer) come by cp.async as the rows of linear do; with C a multiple of 32 a pixel serves C / 32 slices, and
// copying them costs what it costs linear. Runs of whole 4-byte pairs (stems: 4 x 3 = 12 and 14 x 3 = 42
// elements; latents: 4) come by cp.async of 4 bytes if nothing is resized, everything else by plain loads;
// both only in small tiles, since such a layer has 36 to 588 columns and its time is that of its bytes: four
// times the copies are cheaper than writing and reading patches.
//
// Each pixel of an image doubled in both directions is seen by two of three taps in either direction: a 3 x 3
// kernel over it is four 2 x 2 kernels over x itself, one for each parity of an output's row and column
// (phases), whose weights are sums of up to four weights, rounded once. That is 4 / 9 of the products, for a
// pass over the weights in every call.
//
// At least 2 B OH OW O K FLOP and, in bytes, 2 (B H W C + O K + B OH OW O). A tile of m x n reads M K O (2 /
// n + 2 / m).
#include "conv2d.h"
#include "gemm.cuh"

namespace mgm::cuda {
namespace {

extern __shared__ __align__(128) unsigned char shared[];

// Position in a patch.
struct Tap {
  int channel, x, y;
  __device__ __forceinline__ void advance(int elements, const Conv2dParams& p) {
    channel += elements;
    while (channel >= p.channels) {
      channel -= p.channels;
      if (++x == p.kernel_w) x = 0, ++y;
    }
  }
};

__device__ __forceinline__ int nearest(int i, const NearestIndex& of) {
  return static_cast<uint32_t>(static_cast<uint32_t>(i) * of.multiplier >> 32) >> of.shift;
}

// Patches of the rows that a thread copies: kCopies of them, kStep apart.
template <int kCopies, int kStep>
class Patches {
 public:
  __device__ __forceinline__ Patches(const Conv2dParams& p, int phase, int first) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int m = min(first + i * kStep, p.m - 1), line = m / p.out_width, image = line / p.out_height;
      x_[i] = (m - line * p.out_width) * p.stride - p.pad + phase % 2;
      y_[i] = (line - image * p.out_height) * p.stride - p.pad + phase / 2;
      image_[i] = image * p.source_height;
    }
  }
  // Whether there is a pixel under the tap of patch i, and which of x's it is.
  template <bool kResized>
  __device__ __forceinline__ bool locate(uint32_t& pixel, int i, const Tap& tap,
                                         const Conv2dParams& p) const {
    const int x = x_[i] + tap.x, y = y_[i] + tap.y;
    const int column = kResized ? nearest(x, p.columns) : x, row = kResized ? nearest(y, p.rows) : y;
    pixel = (image_[i] + row) * p.source_width + column;
    return tap.y < p.kernel_h && static_cast<unsigned>(x) < static_cast<unsigned>(p.width) &&
           static_cast<unsigned>(y) < static_cast<unsigned>(p.height);
  }

 private:
  int x_[kCopies], y_[kCopies];  // of the first pixel
  int image_[kCopies];           // rows of x before the image
};

// A loader of x for multiply() (see StridedRows): 16-byte pieces. Pixels are looked up once a run, which ends
// where some thread comes to another one.
template <TileName kTile>
class Pieces {
 public:
  static constexpr bool kOneRun = false;
  __device__ __forceinline__ Pieces(const Conv2dParams& p, int phase, int first)
      : p_(p), patches_(p, phase, first + threadIdx.x / 4) {
    const int row = threadIdx.x / 4, piece = threadIdx.x % 4;
    tap_.channel = piece * 8 - p.run * kBlockK;
    to_ = swizzled<4>(row, piece);
  }
  __device__ __forceinline__ int next() {
    tap_.advance(p_.run * kBlockK, p_);
    from_ = static_cast<const char*>(p_.x) + tap_.channel * 2;
    if (p_.resized)
      look<true>();
    else
      look<false>();
    return p_.run;
  }
  __device__ __forceinline__ void copy(uint32_t slice) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i)
      copy_async(slice + to_ + i * kStep * kBlockK * 2,
                 from_ + static_cast<uint64_t>(pixel_[i]) * p_.pixel_bytes, inside_ & 1 << i ? 16 : 0);
    from_ += kBlockK * 2;
  }

 private:
  static constexpr int kStep = threads_of(kTile) / 4, kCopies = kTiles[kTile].m / kStep;
  static_assert(kStep % 8 == 0 && kTiles[kTile].m % kStep == 0, "copies divide evenly, and swizzle alike");

  template <bool kResized>
  __device__ __forceinline__ void look() {
    inside_ = 0;
#pragma unroll
    for (int i = 0; i < kCopies; ++i)
      inside_ |= patches_.template locate<kResized>(pixel_[i], i, tap_, p_) << i;
  }

  const Conv2dParams& p_;
  Patches<kCopies, kStep> patches_;
  Tap tap_{};
  uint32_t pixel_[kCopies];
  uint32_t inside_;   // a bit a copy
  const char* from_;  // the next channels of pixel 0
  uint32_t to_;
};

// The same for two neighbours at a time, which lie together in an image that is not resized (kTogether), or
// not.
template <TileName kTile, bool kTogether>
class Elements {
 public:
  static constexpr bool kOneRun = true;
  __device__ __forceinline__ Elements(const Conv2dParams& p, int phase, int first)
      : p_(p), patches_(p, phase, first + threadIdx.x / kPairs) {
    const int row = threadIdx.x / kPairs, pair = threadIdx.x % kPairs;
    tap_.advance(pair * 2, p);
    to_ = swizzled<4>(row, pair / 4) + pair % 4 * 4;
    left_ = p.blocks + 1;
  }
  __device__ __forceinline__ void copy(uint32_t slice) {
    // multiply() asks for several slices past the end and reads one of them; a stem has two in all.
    if (--left_ < 0) return;
    Tap second = tap_;
    if constexpr (!kTogether) second.advance(1, p_);
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const uint32_t to = slice + to_ + i * kStep * kBlockK * 2;
      bool inside;
      const uint16_t* from = find(inside, i, tap_);
      if constexpr (kTogether) {
        copy_async_small<4>(to, from, inside ? 4 : 0);
      } else {
        const uint32_t low = inside ? *from : 0;
        from = find(inside, i, second);
        asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(low | (inside ? *from : 0) << 16) : "memory");
      }
    }
    tap_.advance(kBlockK, p_);
  }

 private:
  static constexpr int kPairs = kBlockK / 2;
  static constexpr int kStep = threads_of(kTile) / kPairs, kCopies = kTiles[kTile].m / kStep;
  static_assert(kStep % 8 == 0 && kTiles[kTile].m % kStep == 0, "copies divide evenly, and swizzle alike");

  __device__ __forceinline__ const uint16_t* find(bool& inside, int i, const Tap& tap) const {
    uint32_t pixel;
    inside = patches_.template locate<!kTogether>(pixel, i, tap, p_);
    return static_cast<const uint16_t*>(p_.x) + tap.channel +
           static_cast<uint64_t>(pixel) * (p_.pixel_bytes / 2);
  }

  const Conv2dParams& p_;
  Patches<kCopies, kStep> patches_;
  Tap tap_{};
  uint32_t to_;
  int left_;
};

template <class T, TileName kTile, class Loader>
__device__ __forceinline__ void convolve(const Conv2dParams& p) {
  const int columns = p.phased ? 4 * p.column_tiles : p.column_tiles;
  const int inside = p.rows_first ? p.row_tiles : columns;
  const int outer = blockIdx.x / inside, inner = blockIdx.x - outer * inside;
  const int first_row = (p.rows_first ? inner : outer) * kTiles[kTile].m;
  const int column = p.rows_first ? outer : inner, phase = column / p.column_tiles,
            column_tile = column - phase * p.column_tiles;
  Loader x(p, phase, first_row);
  PanelBlocks<kTile, WeightType::half> w(
      p.w + static_cast<int64_t>(phase) * p.panels * p.blocks * block_bytes(WeightType::half),
      column_tile * (kTiles[kTile].n / kPanelRows), p.panels, p.blocks);
  Accumulators<kTile> sums;
  multiply<T, WeightType::half, kTile>(sums, x, w, p.blocks, shared_address(shared));
  finish<T, kTile>(p.epilogue, sums, reinterpret_cast<float*>(shared),
                   first_output<kTile>(p.epilogue, column_tile), [&](int r) {
                     const int row = first_row + r;
                     if (row >= p.m) return -1;
                     if (!p.phased) return row;
                     const int line = row / p.out_width;
                     return ((line + line + phase / 2) * p.out_width + row - line * p.out_width) * 2 +
                            phase % 2;
                   });
}

// A thread has two neighbours of every tap. In either direction, the even phase has the first weight, then
// the sum of the others; the odd one the sum of the first two, then the last.
template <class T>
__device__ __forceinline__ void fold(const FoldParams& p) {
  const int i = blockIdx.x * kFoldThreads + threadIdx.x, panel = i / p.words, word = i - panel * p.words;
  if (panel >= p.panels) return;
  const uint32_t* from = p.w + static_cast<int64_t>(panel) * 9 * p.words + word;
  float2 lines[4][3];  // phase and tap of the 2 x 2 kernel's rows, columns as they were
#pragma unroll
  for (int x = 0; x < 3; ++x) {
    float2 w[3];
#pragma unroll
    for (int y = 0; y < 3; ++y) w[y] = unpack_two<T>(from[(y * 3 + x) * p.words]);
    lines[0][x] = w[0];
    lines[1][x] = make_float2(w[1].x + w[2].x, w[1].y + w[2].y);
    lines[2][x] = make_float2(w[0].x + w[1].x, w[0].y + w[1].y);
    lines[3][x] = w[2];
  }
  const int64_t phase = static_cast<int64_t>(p.panels) * 4 * p.words;
  uint32_t* to = p.out + static_cast<int64_t>(panel) * 4 * p.words + word;
#pragma unroll
  for (int y = 0; y < 4; ++y) {
    const auto& w = lines[y];
    uint32_t* even = to + y / 2 * 2 * phase + y % 2 * 2 * p.words;
    even[0] = pack_two<T>(w[0].x, w[0].y);
    even[p.words] = pack_two<T>(w[1].x + w[2].x, w[1].y + w[2].y);
    even[phase] = pack_two<T>(w[0].x + w[1].x, w[0].y + w[1].y);
    even[phase + p.words] = pack_two<T>(w[2].x, w[2].y);
  }
}

using Pairs = Elements<kSmall, true>;
using Singles = Elements<kSmall, false>;

}  // namespace

#define CONVOLVE(name, T, tile, loader, blocks)                          \
  extern "C" __global__ void __launch_bounds__(threads_of(tile), blocks) \
      name(const __grid_constant__ Conv2dParams p) {                     \
    convolve<T, tile, loader>(p);                                        \
  }
#define CONVOLVE_IN(type, T)                                    \
  CONVOLVE(conv2d_##type##_large, T, kLarge, Pieces<kLarge>, 2) \
  CONVOLVE(conv2d_##type##_small, T, kSmall, Pieces<kSmall>, 4) \
  CONVOLVE(conv2d_##type##_thin, T, kThin, Pieces<kThin>, 4)    \
  CONVOLVE(conv2d_##type##_pairs, T, kSmall, Pairs, 3)          \
  CONVOLVE(conv2d_##type##_elements, T, kSmall, Singles, 3)
CONVOLVE_IN(bf16, __nv_bfloat16)
CONVOLVE_IN(f16, __half)

#define FOLD(name, T)                                                                                     \
  extern "C" __global__ void __launch_bounds__(kFoldThreads) name(const __grid_constant__ FoldParams p) { \
    fold<T>(p);                                                                                           \
  }
FOLD(conv2d_bf16_fold, __nv_bfloat16)
FOLD(conv2d_f16_fold, __half)

}  // namespace mgm::cuda
