#pragma once
#include <cstdint>

namespace mgm::cuda {

// Packed weights: bf16 [N, packed_stride(K)] row-major, the padding zero, so that every 16-byte piece of a
// row is whole. In gated panels row 2j is gate row j and row 2j + 1 up row j: both lie in one thread's
// fragment.
constexpr int64_t packed_stride(int64_t k) {
  return (k + 7) / 8 * 8;
}

constexpr int kPackThreads = 256;
struct PackParams {
  const void* x;  // [rows, k], rows x_stride elements apart
  uint16_t* out;  // bf16 [*, stride]
  int64_t rows, k, x_stride, stride;
  int64_t first;  // row of the stacked matrix that x begins at
  int64_t gates;  // of gated panels: number of gate rows; else 0
};

// Tiles of the result; a tile is computed by warps_m * warps_n warps. K goes by in steps of kTileK.
constexpr int kTileK = 32, kStages = 4;
struct Tile {
  int m, n, warps_m, warps_n;
};
constexpr Tile kLargeTile{128, 128, 2, 4}, kSmallTile{64, 64, 2, 2};
constexpr int threads_of(Tile tile) {
  return tile.warps_m * tile.warps_n * 32;
}
constexpr int shared_bytes(Tile tile) {
  return kStages * (tile.m + tile.n) * kTileK * 2;
}

struct LinearParams {
  const uint16_t* x;      // bf16 [M, k]
  const uint16_t* w;      // bf16 [N, k] (gated: [2N, k], interleaved)
  const float* bias;      // [N] or null (gated: [2N], gates first)
  const float* scale;     // [N] or null
  const float* residual;  // [R, N] or null; row m gets row m % R
  float* out;             // [M, N]
  int64_t m, n, k;        // n: rows of w; k: a multiple of 8, the row stride of x and w
  int64_t residual_rows, residual_stride;
  int32_t activation;  // mgm::Activation
  int32_t gated;
};

}  // namespace mgm::cuda
