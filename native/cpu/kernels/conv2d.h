// What the two ways of convolving share: conv2d.cpp multiplies patches, winograd.cpp transformed tiles.
#pragma once
#include "gemm.h"

namespace mgm::cpu::MGM_ISA {

// The images that are convolved: x, each resized to height x width by nearest neighbour.
struct Images {
  const float* x;  // [B, source_height, source_width, channels]
  int64_t source_height, source_width, channels;
  int64_t height, width;

  MGM_INLINE bool resized() const { return height != source_height || width != source_width; }
  // Row y of image b; null outside of it.
  MGM_INLINE const float* row(int64_t b, int64_t y) const {
    if (y < 0 || y >= height) return nullptr;
    return x + (b * source_height + y * source_height / height) * source_width * channels;
  }
  // Pixel (., column) of such a row; null outside.
  MGM_INLINE const float* pixel(const float* row, int64_t column) const {
    if (!row || column < 0 || column >= width) return nullptr;
    return row + column * source_width / width * channels;
  }
};

// Whether winograd() is faster: decided by the sizes of one image, so that a batch changes no bits.
bool suits_winograd(const Conv2dArgs& args);

// The convolution of `images` with `conv`'s weights and epilogue, 3x3 with stride 1.
void winograd(const Conv2dArgs& args, const Images& images, const Gemm& conv, ThreadPool& pool);

}  // namespace mgm::cpu::MGM_ISA
