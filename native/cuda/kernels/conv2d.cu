// Convolution as a matrix product (gemm.cuh) whose rows of x are patches, copied from the NHWC image straight
// to where the product wants its slices; zeros where the kernel hangs over the border. K = kh * kw * C in the
// order of memory: where nothing is padded, the kw pixels of a kernel row are one run.
//
// Patches whose runs are at least 64 bytes and whole 16-byte pieces (the downsamplings, all of a UNet but its
// first layer) come by cp.async as the rows of linear do. Runs of whole 4-byte pairs (stems: 4 x 3 = 12 and
// 14 x 3 = 42 elements) come by cp.async of 4 bytes, everything else by plain loads; both only in small
// tiles, since a stem has 48 or 588 columns and its time is that of its bytes: four times the copies are
// cheaper than writing and reading patches.
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
  // After `channel` has grown.
  __device__ __forceinline__ void wrap(const Conv2dParams& p) {
    while (channel >= p.channels) {
      channel -= p.channels;
      if (++x == p.kernel_w) x = 0, ++y;
    }
  }
};

__device__ __forceinline__ int nearest(int i, const NearestIndex& of) {
  return static_cast<uint32_t>(static_cast<uint32_t>(i) * of.multiplier >> 32) >> of.shift;
}

// A loader of x for multiply(): see StridedRows. kUnit: elements that always lie together, 8, 2 or 1.
template <TileName kTile, int kUnit>
class Patches {
 public:
  __device__ __forceinline__ Patches(const Conv2dParams& p, int first) : p_(p) {
    const int row = threadIdx.x / kUnits, unit = threadIdx.x % kUnits;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int m = min(first + row + i * kStep, p.m - 1), line = m / p.out_width,
                image = line / p.out_height;
      x_[i] = (m - line * p.out_width) * p.stride - p.pad;
      y_[i] = (line - image * p.out_height) * p.stride - p.pad;
      image_[i] = image * p.source_height;
    }
    tap_.channel = unit * kWidth;
    to_ = swizzled<4>(row, unit * kWidth / 8) + unit * kWidth % 8 * 2;
  }
  static constexpr bool kOneRun = false;
  // A run ends where some thread comes to another pixel.
  __device__ __forceinline__ int next() {
    tap_.wrap(p_);
    if constexpr (kUnit > 1) {
      inside_ = 0;
#pragma unroll
      for (int i = 0; i < kCopies; ++i) inside_ |= locate(pixel_[i], i, tap_) << i;
    }
    return p_.run;
  }
  __device__ __forceinline__ void copy(uint32_t slice) {
    if constexpr (kUnit == 1) {
      Tap second = tap_;
      ++second.channel;
      second.wrap(p_);
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        asm volatile("st.shared.u32 [%0], %1;" ::"r"(slice + to_ + i * kStep * kBlockK * 2),
                     "r"(load(i, tap_) | load(i, second) << 16)
                     : "memory");
      }
    } else {
      const uint16_t* from = static_cast<const uint16_t*>(p_.x) + tap_.channel;
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        const uint32_t to = slice + to_ + i * kStep * kBlockK * 2;
        const uint16_t* at = from + static_cast<uint64_t>(pixel_[i]) * static_cast<uint32_t>(p_.pitch);
        const int valid = inside_ & 1 << i ? kUnit * 2 : 0;
        if constexpr (kUnit == 8)
          copy_async(to, at, valid);
        else
          copy_async_small<4>(to, at, valid);
      }
    }
    tap_.channel += kBlockK;
  }

 private:
  static constexpr int kWidth = kUnit == 8 ? 8 : 2,
                       kUnits = kBlockK / kWidth;  // of a thread; in a row of a slice
  static constexpr int kStep = threads_of(kTile) / kUnits, kCopies = kTiles[kTile].m / kStep;
  static_assert(kStep % 8 == 0 && kTiles[kTile].m % kStep == 0, "copies divide evenly, and swizzle alike");

  // The number of the tap's pixel among those of x, and whether there is one.
  __device__ __forceinline__ bool locate(uint32_t& pixel, int i, const Tap& tap) const {
    const int x = x_[i] + tap.x, y = y_[i] + tap.y;
    pixel = (image_[i] + nearest(y, p_.rows)) * p_.source_width + nearest(x, p_.columns);
    return static_cast<unsigned>(x) < static_cast<unsigned>(p_.width) &&
           static_cast<unsigned>(y) < static_cast<unsigned>(p_.height) && tap.y < p_.kernel_h;
  }
  __device__ __forceinline__ uint32_t load(int i, const Tap& tap) const {
    uint32_t pixel;
    if (!locate(pixel, i, tap)) return 0;
    return static_cast<const uint16_t*>(p_.x)[static_cast<int64_t>(pixel) * p_.pitch + tap.channel];
  }

  const Conv2dParams& p_;
  int x_[kCopies], y_[kCopies];  // of the patch's first pixel
  int image_[kCopies];           // rows of x before the image
  uint32_t pixel_[kCopies];
  uint32_t inside_;  // a bit a copy
  Tap tap_{};
  uint32_t to_;
};

template <class T, TileName kTile, int kUnit>
__device__ __forceinline__ void convolve(const Conv2dParams& p) {
  const int others = p.rows_first ? p.row_tiles : p.column_tiles;
  const int outer = blockIdx.x / others, inner = blockIdx.x - outer * others;
  const int row_tile = p.rows_first ? inner : outer, column_tile = p.rows_first ? outer : inner;
  const int first_row = row_tile * kTiles[kTile].m;
  Patches<kTile, kUnit> x(p, first_row);
  PanelBlocks<kTile, WeightType::half> w(p.w, column_tile * (kTiles[kTile].n / kPanelRows), p.panels,
                                         p.blocks);
  Accumulators<kTile> sums;
  multiply<T, WeightType::half, kTile>(sums, x, w, p.blocks, shared_address(shared));
  finish<T, kTile>(p.epilogue, sums, reinterpret_cast<float*>(shared),
                   first_output<kTile>(p.epilogue, column_tile),
                   [&](int row) { return first_row + row < p.m ? first_row + row : -1; });
}

}  // namespace

#define CONVOLVE(name, T, tile, unit, blocks)                            \
  extern "C" __global__ void __launch_bounds__(threads_of(tile), blocks) \
      name(const __grid_constant__ Conv2dParams p) {                     \
    convolve<T, tile, unit>(p);                                          \
  }
#define CONVOLVE_IN(type, T)                       \
  CONVOLVE(conv2d_##type##_large, T, kLarge, 8, 2) \
  CONVOLVE(conv2d_##type##_small, T, kSmall, 8, 4) \
  CONVOLVE(conv2d_##type##_thin, T, kThin, 8, 4)   \
  CONVOLVE(conv2d_##type##_pairs, T, kSmall, 2, 3) \
  CONVOLVE(conv2d_##type##_elements, T, kSmall, 1, 3)
CONVOLVE_IN(bf16, __nv_bfloat16)
CONVOLVE_IN(f16, __half)

}  // namespace mgm::cuda
