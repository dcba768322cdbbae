#include "conv2d.h"

#include <algorithm>
#include <limits>

#include "../../runtime/error.h"
#include "../../runtime/tensor.h"
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
  const bool resized = args.height != x.shape[1] || args.width != x.shape[2];
  const bool runs = args.pad_before == 0 && args.pad_after == 0 && !resized;
  const int64_t channels = x.shape[3], row = x.shape[2] * channels,
                run = runs ? args.kernel_w * channels : channels;
  const int64_t m = out.shape[0] * out.shape[1] * out.shape[2], n = out.shape[3];
  if (std::max(m, x.shape[0] * x.shape[1] * x.shape[2]) > std::numeric_limits<int32_t>::max())
    throw Error("UNSUPPORTED",
                format("[conv2d] expected fewer than 2^31 pixels on CUDA but received %s to %s",
                       shape_string(x).c_str(), shape_string(out).c_str()));
  if (resized && std::max(x.shape[1], x.shape[2]) > kMostResized)
    throw Error("UNSUPPORTED",
                format("[conv2d] expected at most %lld rows and columns to resize on CUDA but received %s",
                       static_cast<long long>(kMostResized), shape_string(x).c_str()));

  // Whether runs, and the distances of their beginnings, are multiples of `elements`.
  const auto together = [&](int64_t elements) {
    return run % elements == 0 && row % elements == 0 && args.stride * channels % elements == 0 &&
           reinterpret_cast<uintptr_t>(x.data) % static_cast<uintptr_t>(2 * elements) == 0;
  };
  const bool pieces = together(8);
  const TileName tile = pieces ? tile_for(m, n, queue.info().multiprocessors, false) : kSmall;
  const int kernel = pieces ? static_cast<int>(tile) : together(2) && !resized ? kPairs : kElements;

  Conv2dParams p{};
  p.x = x.data;
  p.w = args.w.u8();
  p.rows = nearest_index(x.shape[1], args.height);
  p.columns = nearest_index(x.shape[2], args.width);
  p.source_height = static_cast<int32_t>(x.shape[1]);
  p.source_width = static_cast<int32_t>(x.shape[2]);
  p.pixel_bytes = static_cast<uint32_t>(channels * 2);
  p.height = args.height;
  p.width = args.width;
  p.out_height = static_cast<int32_t>(out.shape[1]);
  p.out_width = static_cast<int32_t>(out.shape[2]);
  p.m = static_cast<int32_t>(m);
  p.panels = static_cast<int32_t>(panels_of(n, false));
  p.blocks = static_cast<int32_t>(blocks_of(args.w.shape[1]));
  p.row_tiles = static_cast<int32_t>(ceil_div(m, kTiles[tile].m));
  p.column_tiles = static_cast<int32_t>(ceil_div(n, kTiles[tile].n));
  p.channels = static_cast<int32_t>(run);
  p.kernel_h = args.kernel_h;
  p.kernel_w = runs ? 1 : args.kernel_w;
  p.run = static_cast<int32_t>(run % kBlockK == 0 ? run / kBlockK : 1);
  p.stride = args.stride;
  p.pad = args.pad_before;
  // As in linear: the larger operand is read once, and the smaller stays in L2.
  p.rows_first = x.numel() <= n * args.w.shape[1];
  p.epilogue = epilogue_of(args.w, args.bias, args.scale, args.residual, args.activation, out);
  queue.launch({"conv2d", kKernels[x.dtype == DType::f16][kernel]},
               {static_cast<int64_t>(p.row_tiles) * p.column_tiles}, threads_of(tile), p,
               static_cast<size_t>(tile_shared_bytes(tile, WeightType::half)));
}

}  // namespace mgm::cuda
