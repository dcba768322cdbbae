#pragma once
#include <cstdint>

namespace mgm::cuda {

// Channels are normalized in chunks of at most kChunkChannels, each a multiple of the 64 that a warp holds.
// How a sum over channels is split follows from their number alone.
constexpr int kWarpChannels = 64, kChunkChannels = 1536;
constexpr int64_t depthwise_chunks(int64_t channels) {
  return (channels + kChunkChannels - 1) / kChunkChannels;
}
constexpr int64_t depthwise_chunk(int64_t channels) {
  const int64_t chunks = depthwise_chunks(channels), even = (channels + chunks - 1) / chunks;
  return (even + kWarpChannels - 1) / kWarpChannels * kWarpChannels;
}

// The tiled kernels: 7x7, channels a multiple of 8 in one chunk (two output rows a block, or one)
// or two (one row).
constexpr int kDepthwiseTaps = 7, kDepthwiseThreads = kChunkChannels / 2;
constexpr int kStrip = 8;  // output columns of a thread
constexpr int64_t depthwise_columns(int64_t strips) {
  return strips * kStrip + kDepthwiseTaps - 1;
}
constexpr int64_t depthwise_shared(int64_t strips, int64_t chunk) {
  return 2 * depthwise_columns(strips) * chunk * 2;
}

constexpr int kDepthwiseAnyThreads = 128;

struct DepthwiseParams {
  const void* x;                         // A [B, H, W, C]
  const float* w;                        // [kh, kw, C]
  const float* bias;                     // [C]
  const float *norm_weight, *norm_bias;  // [C]
  void* out;                             // A [B, H, W, C]
  float* rows;                           // [warps of the grid, C]; depthwise_any only
  int64_t batch;
  int32_t height, width, channels, chunk;
  int32_t kernel_h, kernel_w;
  // Bytes: between the columns that a thread copies, from its last column (and one more) to the next row's
  // first, from the row after the last to the first row of the next chunk.
  int64_t copy_step, row_step, chunk_step;
  int32_t strips;            // side by side in a block
  int32_t tiles_x, tiles_y;  // blocks of an image
  float eps;
};

}  // namespace mgm::cuda
