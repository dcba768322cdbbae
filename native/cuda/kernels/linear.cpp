#include "linear.h"

#include "../../runtime/tensor.h"
#include "gemm_launch.h"

namespace mgm::cuda {
namespace {

// [f16 activations][weights][tile]
constexpr const char* kKernels[2][3][kFew + 1] = {
    {{"linear_bf16_large", "linear_bf16_small", "linear_bf16_thin", "linear_bf16_few"},
     {"linear_bf16_int8_large", "linear_bf16_int8_small", "linear_bf16_int8_thin", "linear_bf16_int8_few"},
     {"linear_bf16_int4_large", "linear_bf16_int4_small", "linear_bf16_int4_thin", "linear_bf16_int4_few"}},
    {{"linear_f16_large", "linear_f16_small", "linear_f16_thin", "linear_f16_few"},
     {"linear_f16_int8_large", "linear_f16_int8_small", "linear_f16_int8_thin", "linear_f16_int8_few"},
     {"linear_f16_int4_large", "linear_f16_int4_small", "linear_f16_int4_thin", "linear_f16_int4_few"}}};

}  // namespace

View aligned_rows(Queue& queue, const View& x, std::shared_ptr<Storage>& copy) {
  if (rows_aligned(x)) return x;
  const int64_t m = x.shape[0], width = ceil_div(x.shape[1], 8) * 8;
  copy = queue.scratch(static_cast<size_t>(m * width) * 2);
  const View aligned = contiguous_view(copy->data(), x.dtype, {m, width});
  queue.launch({"linear", "align_rows"}, {m}, kAlignThreads,
               AlignParams{x.u16(), aligned.u16(), x.strides[0], static_cast<int32_t>(x.shape[1]),
                           static_cast<int32_t>(width)});
  return aligned;
}

void linear(Queue& queue, const LinearArgs& args) {
  std::shared_ptr<Storage> copy;
  const View x = aligned_rows(queue, args.x, copy);
  const int64_t m = x.shape[0], n = args.w.shape[0];
  const WeightType type = weight_type_of(args.w);
  // Tiles run by columns or rows of tiles so that the larger operand is read once, and the smaller stays in
  // L2.
  const bool rows_first =
      x.numel() * 2 <= static_cast<int64_t>(packed_bytes(args.w.dtype, args.w.layout, n, x.shape[1]));
  const LinearParams params{
      x.data,
      args.w.u8(),
      x.strides[0],
      static_cast<int32_t>(m),
      static_cast<int32_t>(x.shape[1]),
      static_cast<int32_t>(panels_of(n, args.w.layout == Layout::gated_panels)),
      static_cast<int32_t>(blocks_of(x.shape[1])),
      rows_first,
      epilogue_of(args.w, args.bias, args.scale, args.residual, args.activation, args.out)};
  const TileName tile = tile_for(m, n, queue.info().multiprocessors, true);
  const cuda::Kernel kernel{"linear", kKernels[x.dtype == DType::f16][static_cast<int>(type)][tile]};
  if (tile == kFew) {
    // Few panels spread over all multiprocessors; many share x in a block.
    const int64_t groups = ceil_div(params.panels, kTiles[kFew].n / kPanelRows);
    const int64_t each = groups / queue.info().multiprocessors;
    const int warps = each >= kFewMostWarps ? kFewMostWarps : each >= 2 ? 2 : 1;
    queue.launch(kernel, {ceil_div(groups, warps)}, warps * 32, params,
                 static_cast<size_t>(few_shared_bytes(type, params.m, params.k, warps)));
  } else {
    const int64_t rows = ceil_div(m, kTiles[tile].m),
                  columns = ceil_div(params.panels, kTiles[tile].n / kPanelRows);
    queue.launch(kernel, rows_first ? Grid{rows, columns} : Grid{columns, rows}, threads_of(tile), params,
                 static_cast<size_t>(tile_shared_bytes(tile, type)));
  }
}

}  // namespace mgm::cuda
