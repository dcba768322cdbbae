#pragma once
#include <cstdint>

namespace mgm::cuda {

constexpr int kCopyThreads = 256, kCopyMaxRank = 5;

// The strided position of the i-th of shape[0] * ... * shape[rank - 1]. Neighbouring dimensions that step
// alike have been merged.
struct Strided {
  int64_t count;
  int32_t rank, padding;
  int64_t shape[kCopyMaxRank], strides[kCopyMaxRank];
};

// out[i] = x at the strided position of i; i counts elements or vectors of them, strides elements of x.
struct CopyParams {
  const void* x;
  void* out;
  Strided at;
};

// For each i of `outer`: out at `to` of i [columns, rows] = x at `from` of i [rows, columns] transposed; the
// rows of x lie row_stride apart, those of out column_stride.
constexpr int kTransposeTile = 32, kTransposeRows = 8;
struct TransposeParams {
  const void* x;
  void* out;
  Strided from, to;
  int64_t rows, columns, row_stride, column_stride;
};

// out[n, k] = w[n, k] * scale[k]. A block does kScaleRows rows of kCopyThreads vectors of columns.
constexpr int kScaleRows = 64;
struct ScaleColumnsParams {
  const void* w;
  const float* scale;
  void* out;
  int64_t rows, columns, w_stride;
};

}  // namespace mgm::cuda
