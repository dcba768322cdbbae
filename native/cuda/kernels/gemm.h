// What launchers and kernels share about matrix products with packed weights: the layout of the weights, the
// tiles, the epilogue's arguments. linear, conv2d and grouped_linear multiply; embedding reads rows.
//
// Packed weights [N, K] lie in the order in which mma.sync wants them in registers. A panel is kPanelRows
// rows of W, a block is kBlockK columns of a panel; a panel's blocks follow one another, and so do panels: a
// warp that walks a panel along K reads one contiguous range. K is padded to whole blocks and N to whole
// panels with zeros. In gated panels panel 2j holds rows of the gate and panel 2j + 1 the same rows of up. In
// a block, elements 2t, 2t + 1, 2t + 8, 2t + 9, 2t + 16, ... of row g are neighbours (lane_of, index_of):
//   bf16, f16  [8 g][4 t][8] elements
//   int8       [8 g][4 t][8] int8, then f16 scale[8 g];  w = q * scale
//   int4       [8 g][4 t] words of eight nibbles, the first in the lowest bits, then f16 {scale, min}[8 g];
//              w = q * scale + min
// Quantized as on the CPU (native/cpu/kernels/pack_linear.cpp), value by value; w is rounded to the
// activations' type.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define MGM_ANYWHERE __host__ __device__ constexpr
#else
#define MGM_ANYWHERE constexpr
#endif

namespace mgm::cuda {

enum class WeightType : int32_t { half, int8, int4 };  // half: bf16 or f16

constexpr int kPanelRows = 8, kBlockK = 32;

MGM_ANYWHERE int block_bytes(WeightType type) {
  return type == WeightType::half ? 512 : type == WeightType::int8 ? 256 + 16 : 128 + 32;
}
MGM_ANYWHERE int64_t blocks_of(int64_t k) {
  return (k + kBlockK - 1) / kBlockK;
}
MGM_ANYWHERE int64_t panel_bytes(WeightType type, int64_t k) {
  return blocks_of(k) * block_bytes(type);
}
// n counts all rows (gated: of gate and up).
MGM_ANYWHERE int64_t panels_of(int64_t n, bool gated) {
  return gated ? (n / 2 + kPanelRows - 1) / kPanelRows * 2 : (n + kPanelRows - 1) / kPanelRows;
}
// Which lane of a row's four holds column k of a block, and as which of its eight elements.
MGM_ANYWHERE int lane_of(int k) {
  return k % 8 / 2;
}
MGM_ANYWHERE int index_of(int k) {
  return k / 8 * 2 + k % 2;
}

// A block computes an m x n tile of x W^T with warps_m x warps_n warps; slices of kBlockK columns stream
// through `stages` buffers. Launchers choose among kLarge, kSmall and kThin; quantized weights take the same
// tiles cut into warps as tall as the tile, so that each weight is unpacked once a tile. kFew: a warp by
// itself multiplies up to 16 rows of x with two panels.
struct Tile {
  int m, n, warps_m, warps_n, stages;
};
enum TileName { kLarge, kSmall, kThin, kFew, kTallLarge, kTallSmall, kTallThin, kTileNames };
constexpr Tile kTiles[kTileNames] = {{128, 128, 2, 2, 3}, {64, 64, 2, 2, 6},   {64, 32, 2, 2, 8},
                                     {16, 16, 1, 1, 8},   {128, 128, 1, 4, 3}, {64, 64, 1, 4, 6},
                                     {64, 32, 1, 4, 8}};
MGM_ANYWHERE TileName shaped_for(WeightType type, TileName name) {
  return type == WeightType::half ? name
         : name == kLarge         ? kTallLarge
         : name == kSmall         ? kTallSmall
                                  : kTallThin;
}

MGM_ANYWHERE int threads_of(TileName name) {
  return kTiles[name].warps_m * kTiles[name].warps_n * 32;
}
MGM_ANYWHERE int slice_bytes(TileName name, WeightType type) {
  return kTiles[name].m * kBlockK * 2 + kTiles[name].n / kPanelRows * block_bytes(type);
}
// The result's tile goes through the same memory, in two parts if it is large.
MGM_ANYWHERE int parts_of(TileName name) {
  return kTiles[name].m == 128 ? 2 : 1;
}
MGM_ANYWHERE int tile_shared_bytes(TileName name, WeightType type) {
  const int slices = kTiles[name].stages * slice_bytes(name, type);
  const int result = kTiles[name].m * kTiles[name].n * 4 / parts_of(name);
  return slices > result ? slices : result;
}

// kFew. A stage holds kFewColumns columns of W. x comes in slabs of as many columns, rows of 128 bytes; if
// they do not all fit, in two buffers by turns.
constexpr int kFewColumns = 64, kFewBufferBytes = 16 << 10, kFewMostWarps = 4;

MGM_ANYWHERE int few_stages(WeightType type) {
  return type == WeightType::half ? 6 : 8;
}
MGM_ANYWHERE int few_panel_bytes(WeightType type) {
  return kFewColumns / kBlockK * block_bytes(type);
}
MGM_ANYWHERE int few_ring_bytes(WeightType type) {
  return few_stages(type) * kTiles[kFew].n / kPanelRows * few_panel_bytes(type);
}
MGM_ANYWHERE int few_slabs(int k) {
  return (k + kFewColumns - 1) / kFewColumns;
}
MGM_ANYWHERE int few_slabs_in_buffer(int rows, int k) {
  const int most = kFewBufferBytes / (rows * kFewColumns * 2);
  return few_slabs(k) < most ? few_slabs(k) : most;
}
// Both buffers; x of up to one buffer needs no second.
MGM_ANYWHERE int few_x_bytes(int rows, int k) {
  const int held = few_slabs_in_buffer(rows, k);
  return (held < few_slabs(k) ? 2 : 1) * held * rows * kFewColumns * 2;
}
MGM_ANYWHERE int few_shared_bytes(WeightType type, int rows, int k, int warps) {
  return few_x_bytes(rows, k) + warps * few_ring_bytes(type);
}

// out[m] = residual[m % residual_rows] + scale * act(sum + bias[m / bias_rows]), or act(gate + bias) * (up +
// bias) if gated.
struct Epilogue {
  const float* bias;     // [ceil(M / bias_rows), outputs] or null (gated: [.., 2 outputs], gates first)
  const float* scale;    // [outputs] or null
  const void* residual;  // of the activations' type, [residual_rows, outputs] or null; may be `out`
  void* out;             // [M, outputs], of the activations' type or f32
  int64_t bias_stride, residual_stride;
  int32_t bias_rows, residual_rows, outputs;
  int32_t activation;  // mgm::Activation
  bool gated, out_f32;
  bool aligned;  // eight outputs can be read and written at once
};

}  // namespace mgm::cuda
