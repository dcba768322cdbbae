#include "copy.h"

#include <algorithm>

#include "../launch.h"

namespace mgm::cuda {
namespace {

constexpr int64_t kMaxBlocks = 65535;

void push(CopyParams& p, int64_t size, int64_t stride) {
  if (size == 1) return;
  if (p.rank > 0 && p.strides[p.rank - 1] == stride * size) {
    p.shape[p.rank - 1] *= size;
    p.strides[p.rank - 1] = stride;
    return;
  }
  p.shape[p.rank] = size;
  p.strides[p.rank++] = stride;
}

void run(Queue& queue, const char* kernel, CopyParams& p) {
  if (p.rank == 0) push(p, 2, 0), p.shape[0] = 1;
  queue.launch({"copy", kernel}, {std::min(ceil_div(p.count, kCopyThreads), kMaxBlocks)}, kCopyThreads, p);
}

const char* copy_kernel(DType dtype) {
  switch (dtype) {
    case DType::f32:
    case DType::i32:
      return "copy_4";
    case DType::bf16:
    case DType::f16:
      return "copy_2";
    default:
      return "copy_1";
  }
}

const char* cast_kernel(DType from, DType to) {
  if (from == to) return copy_kernel(from);
  if (from == DType::f32) return to == DType::bf16 ? "cast_f32_bf16" : "cast_f32_f16";
  if (from == DType::bf16) return to == DType::f32 ? "cast_bf16_f32" : "cast_bf16_f16";
  return to == DType::f32 ? "cast_f16_f32" : "cast_f16_bf16";
}

}  // namespace

void cast(Queue& queue, const CastArgs& args) {
  CopyParams p{args.x.data, args.out.data, args.x.numel(), 0, 0, {}, {}};
  for (int i = 0; i < args.x.rank; ++i) push(p, args.x.shape[i], args.x.strides[i]);
  run(queue, cast_kernel(args.x.dtype, args.out.dtype), p);
}

void permute(Queue& queue, const PermuteArgs& args) {
  CopyParams p{args.x.data, args.out.data, args.x.numel(), 0, 0, {}, {}};
  for (int i = 0; i < args.x.rank; ++i) push(p, args.x.shape[args.dims[i]], args.x.strides[args.dims[i]]);
  run(queue, copy_kernel(args.x.dtype), p);
}

void scale_columns(Queue& queue, const ScaleColumnsArgs& args) {
  const int64_t rows = args.w.shape[0], columns = args.w.shape[1];
  if (rows * columns == 0) return;
  queue.launch(
      {"copy", "scale_columns"}, {std::min(ceil_div(rows * columns, kCopyThreads), kMaxBlocks)}, kCopyThreads,
      ScaleColumnsParams{args.w.f32(), args.scale.f32(), args.out.f32(), rows, columns, args.w.strides[0]});
}

}  // namespace mgm::cuda
