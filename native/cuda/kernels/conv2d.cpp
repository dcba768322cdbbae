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

// From here on folding, some 5.6 bytes a weight, takes a fraction of the products it saves, 1.1 FLOP a weight
// and pixel. By the size of one image, so that a batch changes no bits.
constexpr int64_t kFewestFoldedPixels = 64 * 64;

// Whether the weights are folded into those of four phases (conv2d.cu).
bool folds(const Conv2dArgs& args) {
  return args.height == 2 * args.x.shape[1] && args.width == 2 * args.x.shape[2] && args.kernel_h == 3 &&
         args.kernel_w == 3 && args.stride == 1 && args.pad_before == 1 && args.pad_after == 1 &&
         args.x.shape[3] % kBlockK == 0 &&
         static_cast<int64_t>(args.height) * args.width >= kFewestFoldedPixels;
}

// The convolution of each phase; `folded` keeps its weights.
Conv2dArgs fold(Queue& queue, const Conv2dArgs& args, std::shared_ptr<Storage>& folded) {
  const int64_t channels = args.x.shape[3], panels = panels_of(args.w.shape[0], false);
  folded = queue.scratch(static_cast<size_t>(4 * panels * panel_bytes(WeightType::half, 4 * channels)));
  const FoldParams p{static_cast<const uint32_t*>(args.w.data), reinterpret_cast<uint32_t*>(folded->data()),
                     static_cast<int32_t>(panels),
                     static_cast<int32_t>(panel_bytes(WeightType::half, channels) / 4)};
  queue.launch({"conv2d", args.w.dtype == DType::f16 ? "conv2d_f16_fold" : "conv2d_bf16_fold"},
               {ceil_div(panels * p.words, kFoldThreads)}, kFoldThreads, p);
  Conv2dArgs phase = args;
  phase.w.data = folded->data();
  phase.w.shape[1] = 4 * channels;
  phase.kernel_h = phase.kernel_w = 2;
  phase.height /= 2;
  phase.width /= 2;
  return phase;
}

}  // namespace

void conv2d(Queue& queue, const Conv2dArgs& args) {
  const View &x = args.x, &out = args.out;
  const int64_t n = out.shape[3], outputs = out.shape[0] * out.shape[1] * out.shape[2];
  if (std::max(outputs, x.shape[0] * x.shape[1] * x.shape[2]) > std::numeric_limits<int32_t>::max())
    throw Error("UNSUPPORTED",
                format("[conv2d] expected fewer than 2^31 pixels on CUDA but received %s to %s",
                       shape_string(x).c_str(), shape_string(out).c_str()));
  const bool phased = folds(args);
  std::shared_ptr<Storage> folded;
  const Conv2dArgs conv = phased ? fold(queue, args, folded) : args;
  const int sides = phased ? 2 : 1;  // phases in a direction
  const bool resized = conv.height != x.shape[1] || conv.width != x.shape[2];
  if (resized && std::max(x.shape[1], x.shape[2]) > kMostResized)
    throw Error("UNSUPPORTED",
                format("[conv2d] expected at most %lld rows and columns to resize on CUDA but received %s",
                       static_cast<long long>(kMostResized), shape_string(x).c_str()));

  const bool runs = conv.pad_before == 0 && conv.pad_after == 0 && !resized;
  const int64_t channels = x.shape[3], row = x.shape[2] * channels,
                run = runs ? conv.kernel_w * channels : channels;
  // Whether runs, and the distances of their beginnings, are multiples of `elements`.
  const auto together = [&](int64_t elements) {
    return run % elements == 0 && row % elements == 0 && conv.stride * channels % elements == 0 &&
           reinterpret_cast<uintptr_t>(x.data) % static_cast<uintptr_t>(2 * elements) == 0;
  };
  const bool pieces = together(8);
  const TileName tile = pieces ? tile_for(outputs, n, queue.info().multiprocessors, false) : kSmall;
  const int kernel = pieces ? static_cast<int>(tile) : together(2) && !resized ? kPairs : kElements;

  Conv2dParams p{};
  p.x = x.data;
  p.w = conv.w.u8();
  p.rows = nearest_index(x.shape[1], conv.height);
  p.columns = nearest_index(x.shape[2], conv.width);
  p.source_height = static_cast<int32_t>(x.shape[1]);
  p.source_width = static_cast<int32_t>(x.shape[2]);
  p.pixel_bytes = static_cast<uint32_t>(channels * 2);
  p.height = conv.height;
  p.width = conv.width;
  p.out_height = static_cast<int32_t>(out.shape[1]) / sides;
  p.out_width = static_cast<int32_t>(out.shape[2]) / sides;
  p.m = static_cast<int32_t>(outputs) / (sides * sides);
  p.panels = static_cast<int32_t>(panels_of(n, false));
  p.blocks = static_cast<int32_t>(blocks_of(conv.w.shape[1]));
  p.row_tiles = static_cast<int32_t>(ceil_div(p.m, kTiles[tile].m));
  p.column_tiles = static_cast<int32_t>(ceil_div(n, kTiles[tile].n));
  p.channels = static_cast<int32_t>(run);
  p.kernel_h = conv.kernel_h;
  p.kernel_w = runs ? 1 : conv.kernel_w;
  p.run = static_cast<int32_t>(run % kBlockK == 0 ? run / kBlockK : 1);
  p.stride = conv.stride;
  p.pad = conv.pad_before;
  // As in linear: the larger operand is read once, and the smaller stays in L2.
  p.rows_first = x.numel() <= n * conv.w.shape[1];
  p.resized = resized;
  p.phased = phased;
  p.epilogue = epilogue_of(conv.w, conv.bias, conv.scale, conv.residual, conv.activation, out);
  queue.launch({"conv2d", kKernels[x.dtype == DType::f16][kernel]},
               {static_cast<int64_t>(p.row_tiles) * p.column_tiles * sides * sides}, threads_of(tile), p,
               static_cast<size_t>(tile_shared_bytes(tile, WeightType::half)));
}

}  // namespace mgm::cuda
