#include "depthwise_conv_norm.h"

#include <algorithm>
#include <cstdlib>
#include <string_view>

#include "../../runtime/tensor.h"
#include "../launch.h"

namespace mgm::cuda {
namespace {

bool aligned(const View& x, size_t bytes) {
  return reinterpret_cast<uintptr_t>(x.data) % bytes == 0;
}

// MGM_CUDA_TILE, for tests: "plain" refuses tiles, "large" takes the largest. The results are the same.
bool asked_for(std::string_view tile) {
  const char* asked = std::getenv("MGM_CUDA_TILE");
  return asked && asked == tile;
}

// Whether the tiled kernels cover it.
bool tiled(const DepthwiseConvNormArgs& args) {
  const int64_t channels = args.x.shape[3];
  return args.w.shape[0] == kDepthwiseTaps && args.w.shape[1] == kDepthwiseTaps && channels % 8 == 0 &&
         depthwise_chunks(channels) <= 2 && aligned(args.x, 16) && aligned(args.w, 8) &&
         aligned(args.bias, 8) && aligned(args.norm_weight, 8) && aligned(args.norm_bias, 8) &&
         !asked_for("plain");
}

struct Tiling {
  int64_t rows, strips, x, y;  // of a block; blocks of an image
};

// The largest tiles of which there are more than half as many as multiprocessors: with fewer, halving a tile
// halves the time. Strips are of one number in every block of a row.
Tiling tiling_of(const View& x, int multiprocessors) {
  const int64_t batch = x.shape[0], height = x.shape[1], channels = x.shape[3];
  const int64_t wide = ceil_div(x.shape[2], kStrip);
  int64_t rows = depthwise_chunks(channels) == 1 ? 2 : 1,
          most = kDepthwiseThreads / (depthwise_chunk(channels) / 2);
  for (;;) {
    const int64_t tiles = ceil_div(wide, most);
    const Tiling tiling{rows, ceil_div(wide, tiles), tiles, ceil_div(height, rows)};
    if (asked_for("large") || 2 * batch * tiling.x * tiling.y > multiprocessors) return tiling;
    if (tiling.strips > 1)
      most = tiling.strips / 2;
    else if (rows > 1)
      rows = 1;
    else
      return tiling;
  }
}

}  // namespace

void depthwise_conv_norm(Queue& queue, const DepthwiseConvNormArgs& args) {
  const int64_t batch = args.x.shape[0], height = args.x.shape[1], width = args.x.shape[2],
                channels = args.x.shape[3], chunk = depthwise_chunk(channels);
  const bool bf16 = args.x.dtype == DType::bf16;
  DepthwiseParams p{};
  p.x = args.x.data;
  p.w = args.w.f32();
  p.bias = args.bias.f32();
  p.norm_weight = args.norm_weight.f32();
  p.norm_bias = args.norm_bias.f32();
  p.out = args.out.data;
  p.batch = batch;
  p.height = static_cast<int32_t>(height);
  p.width = static_cast<int32_t>(width);
  p.channels = static_cast<int32_t>(channels);
  p.chunk = static_cast<int32_t>(chunk);
  p.kernel_h = static_cast<int32_t>(args.w.shape[0]);
  p.kernel_w = static_cast<int32_t>(args.w.shape[1]);
  p.eps = args.eps;

  if (!tiled(args)) {
    constexpr int64_t kWarps = kDepthwiseAnyThreads / 32;
    const int64_t blocks =
        std::min<int64_t>(ceil_div(batch * height * width, kWarps), 8 * queue.info().multiprocessors);
    const auto rows = queue.scratch(static_cast<size_t>(blocks * kWarps * channels) * sizeof(float));
    p.rows = reinterpret_cast<float*>(rows->data());
    queue.launch({"depthwise_conv_norm", bf16 ? "depthwise_any_bf16" : "depthwise_any_f16"}, {blocks},
                 kDepthwiseAnyThreads, p);
    return;
  }

  const Tiling tiling = tiling_of(args.x, queue.info().multiprocessors);
  p.strips = static_cast<int32_t>(tiling.strips);
  p.tiles_x = static_cast<int32_t>(tiling.x);
  p.tiles_y = static_cast<int32_t>(tiling.y);
  const int64_t copy = 4 * tiling.strips * channels, row = width * channels;
  p.copy_step = 2 * copy;
  p.row_step = 2 * (row - 4 * copy);
  p.chunk_step = 2 * (chunk - kDepthwiseTaps * row);
  const char* kernel = depthwise_chunks(channels) == 2
                           ? (bf16 ? "depthwise_two_chunks_bf16" : "depthwise_two_chunks_f16")
                       : tiling.rows == 2 ? (bf16 ? "depthwise_two_rows_bf16" : "depthwise_two_rows_f16")
                                          : (bf16 ? "depthwise_one_row_bf16" : "depthwise_one_row_f16");
  queue.launch({"depthwise_conv_norm", kernel}, {batch * tiling.x * tiling.y},
               static_cast<int>(tiling.strips * chunk / 2), p,
               static_cast<size_t>(depthwise_shared(tiling.strips, chunk)));
}

}  // namespace mgm::cuda
