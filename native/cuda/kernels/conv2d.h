#pragma once
#include <cstdint>

#include "gemm.h"

namespace mgm::cuda {

// i -> floor(i * size / resized) for 0 <= i < resized without a division: bits 32 + shift and up of
// i * multiplier. Of different sizes, neither above kMostResized.
struct NearestIndex {
  uint64_t multiplier;
  int32_t shift;
};
constexpr int64_t kMostResized = 1 << 20;

// The multiplier is at most 1 above size * 2^40 / resized, so the product is at most i <= 2^20 above
// i * size / resized * 2^40: less than the 2^40 / resized between that and the next multiple of 2^40.
inline NearestIndex nearest_index(int64_t size, int64_t resized) {
  if (size == resized) return {uint64_t{1} << 32, 0};
  const auto divisor = static_cast<uint64_t>(resized);
  return {((static_cast<uint64_t>(size) << 40) + divisor - 1) / divisor, 8};
}

struct Conv2dParams {
  const void* x;  // [B, source_height, source_width, C]
  const uint8_t* w;
  NearestIndex rows, columns;           // of x, for those of the image convolved
  int32_t source_height, source_width;  // of x
  uint32_t pixel_bytes;                 // from pixel to pixel
  int32_t height, width;                // of the image convolved
  int32_t out_height, out_width;        // of each phase
  int32_t m;                            // rows of the product: B * out_height * out_width
  int32_t panels, blocks;
  int32_t row_tiles, column_tiles;
  // Without padding a row of the kernel is one run in memory: then kernel_w is 1 and channels kw * C.
  int32_t channels, kernel_h, kernel_w;
  int32_t run;  // slices in which no thread comes to another pixel
  int32_t stride, pad;
  bool resized;
  bool rows_first;  // row tiles are neighbours in the grid
  // Four phases, weights one after the other: output (y, x) is (y / 2, x / 2) of phase (y % 2, x % 2), whose
  // padding is pad - y % 2, pad - x % 2.
  bool phased;
  Epilogue epilogue;
};

constexpr int kFoldThreads = 256;

// 3 x 3 weights to those of the four phases, 2 x 2 each.
struct FoldParams {
  const uint32_t* w;  // [panels][3][3][words]
  uint32_t* out;      // [2][2][panels][2][2][words]
  int32_t panels;
  int32_t words;  // two elements each: C / kBlockK * 128
};

}  // namespace mgm::cuda
