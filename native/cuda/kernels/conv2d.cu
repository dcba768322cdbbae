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

// Position in a patch; offset: in the image, from the patch's first element.
struct Tap {
  int channel, x, y;
  int64_t offset;
  // kOnce: past the end of one pixel at most.
  template <bool kOnce>
  __device__ __forceinline__ void advance(int elements, const Conv2dParams& p) {
    channel += elements;
    offset += elements;
    do {
      const bool next = channel >= p.channels;
      channel -= next ? p.channels : 0;
      x += next;
      const bool line = x == p.kernel_w;
      x = line ? 0 : x;
      y += line;
      offset += line ? p.line_jump : 0;
    } while (!kOnce && channel >= p.channels);
  }
};

// A loader of x for multiply(): see StridedRows. kUnit: elements that always lie together, 8, 2 or 1.
template <TileName kTile, int kUnit>
class Patches {
 public:
  __device__ __forceinline__ Patches(const Conv2dParams& p, int first) : p_(p) {
    const int row = threadIdx.x / kUnits, unit = threadIdx.x % kUnits;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int m = min(first + row + i * kStep, p.m - 1), line = m / p.out_width;
      x_[i] = (m - line * p.out_width) * p.stride - p.pad;
      y_[i] = line % p.out_height * p.stride - p.pad;
      from_[i] = static_cast<const uint16_t*>(p.x) + line / p.out_height * p.image_pitch +
                 y_[i] * p.row_pitch + x_[i] * p.pixel_pitch;
    }
    tap_.advance<kLong>(unit * kWidth, p);
    to_ = swizzled<4>(row, unit * kWidth / 8) + unit * kWidth % 8 * 2;
  }
  __device__ __forceinline__ void copy(uint32_t slice) {
    if constexpr (kUnit == 1) {
      Tap next = tap_;
      next.advance<true>(1, p_);
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        const uint32_t low = inside(i, tap_) ? from_[i][tap_.offset] : 0,
                       high = inside(i, next) ? from_[i][next.offset] : 0;
        asm volatile("st.shared.u32 [%0], %1;" ::"r"(slice + to_ + i * kStep * kBlockK * 2),
                     "r"(low | high << 16)
                     : "memory");
      }
    } else {
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        const uint32_t to = slice + to_ + i * kStep * kBlockK * 2;
        const int valid = inside(i, tap_) ? kUnit * 2 : 0;
        if constexpr (kUnit == 8)
          copy_async(to, from_[i] + tap_.offset, valid);
        else
          copy_async_small<4>(to, from_[i] + tap_.offset, valid);
      }
    }
    tap_.advance<kLong>(kBlockK, p_);
  }

 private:
  static constexpr bool kLong = kUnit == 8;  // pixels of at least kBlockK channels
  static constexpr int kWidth = kUnit == 8 ? 8 : 2,
                       kUnits = kBlockK / kWidth;  // of a thread; in a row of a slice
  static constexpr int kStep = threads_of(kTile) / kUnits, kCopies = kTiles[kTile].m / kStep;
  static_assert(kStep % 8 == 0 && kTiles[kTile].m % kStep == 0, "copies divide evenly, and swizzle alike");

  __device__ __forceinline__ bool inside(int i, const Tap& tap) const {
    return tap.y < p_.kernel_h && static_cast<unsigned>(y_[i] + tap.y) < static_cast<unsigned>(p_.height) &&
           static_cast<unsigned>(x_[i] + tap.x) < static_cast<unsigned>(p_.width);
  }

  const Conv2dParams& p_;
  const uint16_t* from_[kCopies];
  int x_[kCopies], y_[kCopies];  // of the patch's first pixel
  Tap tap_{};
  uint32_t to_;
};

template <class T, TileName kTile, int kUnit>
__device__ __forceinline__ void convolve(const Conv2dParams& p) {
  const int first_row = blockIdx.x * kTiles[kTile].m,
            first_panel = blockIdx.y * (kTiles[kTile].n / kPanelRows);
  Patches<kTile, kUnit> x(p, first_row);
  PanelBlocks<kTile, WeightType::half> w(p.w, first_panel, p.panels, p.blocks);
  Accumulators<kTile> sums;
  multiply<T, WeightType::half, kTile>(sums, x, w, p.blocks, shared_address(shared));
  finish<T, kTile>(p.epilogue, sums, reinterpret_cast<float*>(shared),
                   first_output<kTile>(p.epilogue, blockIdx.y),
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
