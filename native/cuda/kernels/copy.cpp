#include "copy.h"

#include <algorithm>
#include <string>

#include "../../runtime/tensor.h"
#include "../launch.h"

namespace mgm::cuda {
namespace {

void push(Strided& s, int64_t size, int64_t stride) {
  if (size == 1) return;
  if (s.rank > 0 && s.strides[s.rank - 1] == stride * size) {
    s.shape[s.rank - 1] *= size;
    s.strides[s.rank - 1] = stride;
    return;
  }
  s.shape[s.rank] = size;
  s.strides[s.rank++] = stride;
}

// Counts the positions; at least one dimension, which may be of size 1.
void finish(Strided& s) {
  if (s.rank == 0) s.shape[s.rank++] = 1;
  s.count = 1;
  for (int d = 0; d < s.rank; ++d) s.count *= s.shape[d];
}

bool aligned(const void* p, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(bytes) == 0;
}

// Whether x can be walked in vectors of `width` elements.
bool has_vectors(const CopyParams& p, DType from, int64_t width) {
  const Strided& s = p.at;
  if (s.strides[s.rank - 1] != 1 || s.shape[s.rank - 1] % width != 0) return false;
  for (int d = 0; d < s.rank - 1; ++d)
    if (s.strides[d] % width != 0) return false;
  return aligned(p.x, width * static_cast<int64_t>(dtype_size(from)));
}

void copy(Queue& queue, CopyParams& p, DType from, DType to) {
  const auto size = static_cast<int64_t>(dtype_size(from));
  std::string kernel = from == to ? "copy_" + std::to_string(8 * size)
                                  : std::string("cast_") + dtype_name(from) + "_" + dtype_name(to);
  const int64_t width = 16 / std::max(size, static_cast<int64_t>(dtype_size(to)));
  if (has_vectors(p, from, width)) {
    p.at.shape[p.at.rank - 1] /= width;
    p.at.strides[p.at.rank - 1] = width;
    p.at.count /= width;
  } else {
    kernel += "_1";
  }
  queue.launch({"copy", kernel.c_str()}, {ceil_div(p.at.count, kCopyThreads)}, kCopyThreads, p);
}

// Whether x, walked by `s` in the order of its contiguous result, should pass through tiles: another
// dimension than the last runs along neighbours. Short runs would leave most of a tile empty.
int tiled_dimension(const Strided& s) {
  const int last = s.rank - 1;
  if (s.shape[last] < 8 || s.shape[last] > int64_t{65535} * kTransposeTile) return -1;
  for (int d = 0; d < last; ++d)
    if (s.strides[d] == 1 && s.shape[d] >= 8) return d;
  return -1;
}

void transpose(Queue& queue, const PermuteArgs& args, const Strided& s, int along) {
  const int last = s.rank - 1;
  TransposeParams p{args.x.data, args.out.data, {}, {}, s.shape[last], s.shape[along], s.strides[last], 0};
  int64_t step[kCopyMaxRank];
  step[last] = 1;
  for (int d = last; d > 0; --d) step[d - 1] = step[d] * s.shape[d];
  p.column_stride = step[along];
  for (int d = 0; d < last; ++d) {
    if (d == along) continue;
    p.from.shape[p.from.rank] = p.to.shape[p.to.rank] = s.shape[d];
    p.from.strides[p.from.rank++] = s.strides[d];
    p.to.strides[p.to.rank++] = step[d];
  }
  finish(p.from);
  finish(p.to);
  const std::string kernel = "transpose_" + std::to_string(8 * dtype_size(args.x.dtype));
  queue.launch({"copy", kernel.c_str()},
               {ceil_div(p.columns, kTransposeTile), ceil_div(p.rows, kTransposeTile),
                std::min<int64_t>(p.from.count, 65535)},
               kTransposeTile * kTransposeRows, p);
}

}  // namespace

void cast(Queue& queue, const CastArgs& args) {
  CopyParams p{args.x.data, args.out.data, {}};
  for (int i = 0; i < args.x.rank; ++i) push(p.at, args.x.shape[i], args.x.strides[i]);
  finish(p.at);
  copy(queue, p, args.x.dtype, args.out.dtype);
}

void permute(Queue& queue, const PermuteArgs& args) {
  const View& x = args.x;
  CopyParams p{x.data, args.out.data, {}};
  for (int i = 0; i < x.rank; ++i) push(p.at, x.shape[args.dims[i]], x.strides[args.dims[i]]);
  finish(p.at);
  if (const int along = tiled_dimension(p.at); along >= 0) return transpose(queue, args, p.at, along);
  copy(queue, p, x.dtype, x.dtype);
}

void scale_columns(Queue& queue, const ScaleColumnsArgs& args) {
  const View& w = args.w;
  const int64_t rows = w.shape[0], columns = w.shape[1];
  if (rows * columns == 0) return;
  int64_t width = 16 / static_cast<int64_t>(dtype_size(w.dtype));
  std::string kernel = std::string("scale_columns_") + dtype_name(w.dtype);
  if (columns % width != 0 || w.strides[0] % width != 0 || !aligned(w.data, 16)) {
    kernel += "_1";
    width = 1;
  }
  queue.launch({"copy", kernel.c_str()},
               {ceil_div(columns, width * kCopyThreads), ceil_div(rows, kScaleRows)}, kCopyThreads,
               ScaleColumnsParams{w.data, args.scale.f32(), args.out.data, rows, columns, w.strides[0]});
}

}  // namespace mgm::cuda
