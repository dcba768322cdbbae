#pragma once
#include <cstdint>

namespace mgm::cuda {

// A block has a slice of the channels, in vectors of 16 bytes that do not mix x and `more`, and a chunk of
// the pixels: `rows` threads for each of the `columns` vectors, every one with each rows-th pixel.
constexpr int kGroupNormThreads = 384;
constexpr int kGroupNormColumns = 48;  // at most, but in group_norm_small
constexpr int kGroupNormBatch = 4;     // loads of a thread under way at once

// Floats of shared memory for each channel of a slice's vectors: to normalize, and to gather moments.
constexpr int kGroupNormAffine = 3;
constexpr int group_norm_sums(int rows) {
  return 2 * rows;
}

struct GroupNormParams {
  const void* x;        // [B, pixels, channels_x]
  const void* more;     // [B, pixels, channels_more] or null
  const float* weight;  // [channels]
  const float* bias;    // [channels]
  void* out;            // [B, pixels, channels]
  float* partials;      // [B, groups, chunks * slices, 3]: count, mean, squares; not in group_norm_small
  float* stats;         // [B, groups, 2]: mean, 1 / deviation; not in group_norm_small
  int64_t pixels;       // of an image
  int32_t chunk;        // pixels of a block
  int32_t channels_x, channels_more;
  int32_t group_width, groups;
  int32_t vector_width;        // 16 bytes
  int32_t vectors_x, vectors;  // of a pixel: x's, all
  int32_t columns, rows;
  int32_t slices, chunks;  // of an image
  int32_t aligned;         // every vector of x, more and out is a whole one and starts on 16 bytes
  int32_t silu;
  float eps;
};

}  // namespace mgm::cuda
