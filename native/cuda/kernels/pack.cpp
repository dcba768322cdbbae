#include "pack.h"

#include "../../runtime/tensor.h"
#include "gemm_launch.h"

namespace mgm::cuda {
namespace {

static_assert(kBf16 == static_cast<int32_t>(DType::bf16) && kF16 == static_cast<int32_t>(DType::f16),
              "kernels know the types by these numbers");

void pack(Queue& queue, const View& out, const View& x, int64_t first) {
  const char* kernel = out.dtype == DType::bf16   ? "pack_bf16"
                       : out.dtype == DType::f16  ? "pack_f16"
                       : out.dtype == DType::int8 ? "pack_int8"
                                                  : "pack_int4";
  const int64_t rows = out.shape[0], k = out.shape[1];
  const bool gated = out.layout == Layout::gated_panels;
  queue.launch({"pack", kernel}, {panels_of(rows, gated), ceil_div(blocks_of(k), kPackThreads / 32)},
               kPackThreads,
               PackParams{x.data, out.u8(), x.shape[0], k, x.strides[0], first, rows, gated ? rows / 2 : 0,
                          static_cast<int32_t>(x.dtype)});
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
    pack(queue, args.out, args.weights[i], first);
    first += args.weights[i].shape[0];
  }
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
