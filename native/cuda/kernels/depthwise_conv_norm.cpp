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

// Whether the tiled kernels cover it. MGM_CUDA_TILE=plain: they do not, for tests; the results are the same.
bool tiled(const DepthwiseConvNormArgs& args) {
  const char* asked = std::getenv("MGM_CUDA_TILE");
  const int64_t channels = args.x.shape[3];
  return args.w.shape[0] == kDepthwiseTaps && args.w.shape[1] == kDepthwiseTaps && channels % 8 == 0 &&
         depthwise_chunks(channels) <= 2 && aligned(args.x, 16) && aligned(args.w, 8) &&
         aligned(args.bias, 8) && aligned(args.norm_weight, 8) && aligned(args.norm_bias, 8) &&
         !(asked && std::string_view(asked) == "plain");
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

  // As many strips as threads allow, of the same number in every tile of a row.
  const bool two_rows = depthwise_chunks(channels) == 1;
  const int64_t strips_wide = ceil_div(width, kStrip), most = kDepthwiseThreads / (chunk / 2);
  const int64_t tiles_x = ceil_div(strips_wide, most), strips = ceil_div(strips_wide, tiles_x);
  const int64_t tiles_y = ceil_div(height, two_rows ? 2 : 1);
  p.strips = static_cast<int32_t>(strips);
  p.tiles_x = static_cast<int32_t>(tiles_x);
  p.tiles_y = static_cast<int32_t>(tiles_y);
  const int64_t copy = 4 * strips * channels, row = width * channels;
  p.copy_step = 2 * copy;
  p.row_step = 2 * (row - 4 * copy);
  p.chunk_step = 2 * (chunk - kDepthwiseTaps * row);
  const char* kernel = two_rows ? (bf16 ? "depthwise_two_rows_bf16" : "depthwise_two_rows_f16")
                                : (bf16 ? "depthwise_two_chunks_bf16" : "depthwise_two_chunks_f16");
  queue.launch({"depthwise_conv_norm", kernel}, {tiles_x * tiles_y * batch},
               static_cast<int>(strips * chunk / 2), p, static_cast<size_t>(depthwise_shared(strips, chunk)));
}

}  // namespace mgm::cuda
