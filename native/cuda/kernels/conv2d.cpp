#include "conv2d.h"

#include "../../runtime/error.h"
#include "gemm_launch.h"

namespace mgm::cuda {
namespace {

// [f16 activations][tile, then pairs and single elements]
constexpr const char* kKernels[2][5] = {
    {"conv2d_bf16_large", "conv2d_bf16_small", "conv2d_bf16_thin", "conv2d_bf16_pairs",
     "conv2d_bf16_elements"},
    {"conv2d_f16_large", "conv2d_f16_small", "conv2d_f16_thin", "conv2d_f16_pairs", "conv2d_f16_elements"}};
constexpr int kPairs = 3, kElements = 4;
static_assert(kLarge == 0 && kSmall == 1 && kThin == 2, "the order of kKernels");

}  // namespace

void conv2d(Queue& queue, const Conv2dArgs& args) {
  const View &x = args.x, &out = args.out;
  if (args.pad_before != args.pad_after || args.height != x.shape[1] || args.width != x.shape[2] ||
      (args.bias && args.bias.shape[0] > 1))
    throw Error("UNSUPPORTED", "[conv2d] has no such CUDA kernel yet");
  const bool runs = args.pad_before == 0;
  const int64_t channels = x.shape[3], row = x.shape[2] * channels,
                run = runs ? args.kernel_w * channels : channels;
  const int64_t m = out.shape[0] * out.shape[1] * out.shape[2], n = out.shape[3];
  Conv2dParams p{};
  p.x = x.data;
  p.w = args.w.u8();
  p.image_pitch = x.shape[1] * row;
  p.row_pitch = row;
  p.pixel_pitch = channels;
  p.line_jump = row - args.kernel_w * channels;
  p.m = static_cast<int32_t>(m);
  p.panels = static_cast<int32_t>(panels_of(n, false));
  p.blocks = static_cast<int32_t>(blocks_of(args.w.shape[1]));
  p.height = static_cast<int32_t>(x.shape[1]);
  p.width = static_cast<int32_t>(x.shape[2]);
  p.out_height = static_cast<int32_t>(out.shape[1]);
  p.out_width = static_cast<int32_t>(out.shape[2]);
  p.channels = static_cast<int32_t>(run);
  p.kernel_h = args.kernel_h;
  p.kernel_w = runs ? 1 : args.kernel_w;
  p.stride = args.stride;
  p.pad = args.pad_before;
  p.epilogue = epilogue_of(args.w, args.bias, args.scale, args.residual, args.activation, out);

  // Whether runs, and the distances of their beginnings, are multiples of `elements`.
  const auto together = [&](int64_t elements) {
    return run % elements == 0 && row % elements == 0 && args.stride * channels % elements == 0 &&
           reinterpret_cast<uintptr_t>(x.data) % static_cast<uintptr_t>(2 * elements) == 0;
  };
  const bool pieces = together(8) && run >= kBlockK;
  const TileName tile = pieces ? tile_for(m, n, queue.info().multiprocessors, false) : kSmall;
  const int kernel = pieces ? static_cast<int>(tile) : together(2) ? kPairs : kElements;
  queue.launch({"conv2d", kKernels[x.dtype == DType::f16][kernel]},
               {ceil_div(m, kTiles[tile].m), ceil_div(p.panels, kTiles[tile].n / kPanelRows)},
               threads_of(tile), p, static_cast<size_t>(tile_shared_bytes(tile, WeightType::half)));
}

}  // namespace mgm::cuda
