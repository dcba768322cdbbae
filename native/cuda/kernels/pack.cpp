#include "pack.h"

#include "../../runtime/tensor.h"
#include "gemm_launch.h"

namespace mgm::cuda {
namespace {

static_assert(kBf16 == static_cast<int32_t>(DType::bf16) && kF16 == static_cast<int32_t>(DType::f16),
              "kernels know the types by these numbers");

void pack(Queue& queue, const View& out, const View& rows, int64_t first, int64_t count) {
  const char* kernel = out.dtype == DType::bf16   ? "pack_bf16"
                       : out.dtype == DType::f16  ? "pack_f16"
                       : out.dtype == DType::int8 ? "pack_int8"
                                                  : "pack_int4";
  const int64_t k = out.shape[1], gates = out.layout == Layout::gated_panels ? out.shape[0] / 2 : 0;
  queue.launch(
      {"pack", kernel}, {count, ceil_div(blocks_of(k), kPackThreads / 32)}, kPackThreads,
      PackParams{rows.data, out.u8(), k, rows.strides[0], first, gates, static_cast<int32_t>(rows.dtype)});
}

}  // namespace

size_t packed_bytes(DType dtype, Layout layout, int64_t n, int64_t k) {
  View w;
  w.dtype = dtype;
  return static_cast<size_t>(panels_of(n, layout == Layout::gated_panels) *
                             panel_bytes(weight_type_of(w), k));
}

void pack_linear(Queue& queue, const PackLinearArgs& args) {
  int64_t first = 0;
  for (int i = 0; i < args.count; ++i) {
    const View& w = args.weights[i];
    pack(queue, args.out, w, first, w.shape[0]);
    first += w.shape[0];
  }
  // What fills up the last panels; of gated ones the last two.
  const bool gated = args.out.layout == Layout::gated_panels;
  const int64_t padding = panels_of(first, gated) * kPanelRows - first;
  if (padding > 0) pack(queue, args.out, {}, first, padding);
}

void packed_rows(Queue& queue, const EmbeddingArgs& args) {
  const View& w = args.table;
  const char* kernel = w.dtype == DType::bf16   ? "rows_bf16"
                       : w.dtype == DType::f16  ? "rows_f16"
                       : w.dtype == DType::int8 ? "rows_int8"
                                                : "rows_int4";
  queue.launch({"pack", kernel}, {args.ids.shape[0]}, kPackThreads,
               PackedRowsParams{w.u8(), args.ids.i32(), args.out.data, queue.fault(), w.shape[0], w.shape[1],
                                args.scale, static_cast<int32_t>(args.out.dtype)});
}

}  // namespace mgm::cuda
