// out = residual + scale * act(x W^T + bias) on the tensor cores: bf16 operands, f32 accumulation.
//
// x [M, K] and W [N, K] are both row-major along K, which is what mma.sync m16n8k16 wants of its row and
// column operands. A block computes a tile; slices of K stream through shared memory, kStages deep, by
// cp.async. Rows of a slice are 64 bytes; their four 16-byte pieces are permuted by the row's number so that
// the eight rows an ldmatrix reads fall into different banks. Every result sums its products in the order of
// K, one mma after the other, whatever the tile: a row's bits do not depend on M.
//
// At least 2 M N K FLOP and 2 (M K + N K) + 4 M N bytes; a large tile reads M K N (1/128 + 1/128) * 2 bytes.
#include "linear.h"
#include "mma.cuh"

namespace mgm::cuda {
namespace {

template <int kRows, int kThreads>
__device__ __forceinline__ void load_slice(uint32_t to, const uint16_t* from, int64_t first, int64_t rows,
                                           int64_t k, int64_t width) {
#pragma unroll
  for (int i = 0; i < kRows * 4 / kThreads; ++i) {
    const int at = static_cast<int>(threadIdx.x) + i * kThreads, row = at >> 2, piece = at & 3;
    const bool valid = first + row < rows && k + piece * 8 < width;
    copy_async(to + swizzled<kTileK / 8>(row, piece),
               valid ? from + (first + row) * width + k + piece * 8 : from, valid ? 16 : 0);
  }
}

__device__ __forceinline__ float sigmoid_times(float x, float u) {
  return x / (1.0f + expf(-u));
}

// The values of mgm::Activation.
__device__ __forceinline__ float activate(float x, int activation) {
  switch (activation) {
    case 1:
      return 0.5f * x * erfcf(-0.70710678118654752f * x);
    case 2:
      return sigmoid_times(x, 1.5957691216057308f * fmaf(0.044715f * x * x, x, x));
    case 3:
      return sigmoid_times(x, 1.702f * x);
    case 4:
      return sigmoid_times(x, x);
    default:
      return x;
  }
}

template <int kM, int kN, int kWarpsM, int kWarpsN>
__device__ void multiply(const LinearParams& p) {
  constexpr int kThreads = kWarpsM * kWarpsN * 32;
  constexpr int kWarpM = kM / kWarpsM, kWarpN = kN / kWarpsN;
  constexpr int kBlocksM = kWarpM / 16, kBlocksN = kWarpN / 8;
  constexpr uint32_t kSliceX = kM * kTileK * 2, kStage = (kM + kN) * kTileK * 2;
  static_assert(kWarpM % 16 == 0 && kWarpN % 16 == 0, "a warp's tile is whole pairs of mma tiles");
  static_assert(kM * kN * 4 <= kStages * kStage, "the result's tile fits the stages");
  static_assert(kM * 4 % kThreads == 0 && kN * 4 % kThreads == 0, "copies divide evenly");
  extern __shared__ __align__(128) unsigned char shared[];
  const uint32_t base = shared_address(shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_m = warp / kWarpsN * kWarpM, warp_n = warp % kWarpsN * kWarpN;
  const int64_t first_m = static_cast<int64_t>(blockIdx.x) * kM,
                first_n = static_cast<int64_t>(blockIdx.y) * kN;

  const int steps = static_cast<int>((p.k + kTileK - 1) / kTileK);
  const auto load = [&](int step) {
    const uint32_t stage = base + static_cast<uint32_t>(step % kStages) * kStage;
    const int64_t k = static_cast<int64_t>(step) * kTileK;
    load_slice<kM, kThreads>(stage, p.x, first_m, p.m, k, p.k);
    load_slice<kN, kThreads>(stage + kSliceX, p.w, first_n, p.n, k, p.k);
  };

  float c[kBlocksM][kBlocksN][4] = {};
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps) load(step);
    commit_copies();
  }
  for (int step = 0; step < steps; ++step) {
    // The slice has arrived, and everyone is done with the one that the next copy overwrites.
    wait_copies<kStages - 2>();
    __syncthreads();
    if (step + kStages - 1 < steps) load(step + kStages - 1);
    commit_copies();

    const uint32_t x_at = base + static_cast<uint32_t>(step % kStages) * kStage, w_at = x_at + kSliceX;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t a[kBlocksM][4], b[kBlocksN / 2][4];
#pragma unroll
      for (int i = 0; i < kBlocksM; ++i)
        load_matrices(a[i], x_at + swizzled<kTileK / 8>(warp_m + i * 16 + lane % 16, half * 2 + lane / 16));
#pragma unroll
      for (int j = 0; j < kBlocksN / 2; ++j)
        load_matrices(b[j], w_at + swizzled<kTileK / 8>(warp_n + j * 16 + lane % 8 + lane / 16 * 8,
                                                        half * 2 + lane / 8 % 2));
#pragma unroll
      for (int i = 0; i < kBlocksM; ++i)
#pragma unroll
        for (int j = 0; j < kBlocksN; ++j)
          multiply_add<__nv_bfloat16>(c[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
    }
  }
  wait_copies<0>();
  __syncthreads();

  // The tile to shared memory, columns permuted by row against bank conflicts. A thread holds two
  // neighbouring columns of two rows of each mma tile.
  float* tile = reinterpret_cast<float*>(shared);
  const auto at = [](int row, int column) { return row * kN + (column ^ (row & 3) * 8); };
#pragma unroll
  for (int i = 0; i < kBlocksM; ++i)
#pragma unroll
    for (int j = 0; j < kBlocksN; ++j)
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        const int row = warp_m + i * 16 + lane / 4 + pair * 8, column = warp_n + j * 8 + lane % 4 * 2;
        *reinterpret_cast<float2*>(tile + at(row, column)) =
            make_float2(c[i][j][pair * 2], c[i][j][pair * 2 + 1]);
      }
  __syncthreads();

  // Epilogue, in whole rows.
  const int64_t outputs = p.gated ? p.n / 2 : p.n;
  const int per_output = p.gated ? 2 : 1, width = kN / per_output;
  for (int i = threadIdx.x; i < kM * width; i += kThreads) {
    const int tile_row = i / width, tile_column = i - tile_row * width;
    const int64_t row = first_m + tile_row, column = first_n / per_output + tile_column;
    if (row >= p.m || column >= outputs) continue;
    float value;
    if (p.gated) {
      const float2 both = *reinterpret_cast<const float2*>(tile + at(tile_row, tile_column * 2));
      const float gate = both.x + (p.bias ? p.bias[column] : 0.0f);
      const float up = both.y + (p.bias ? p.bias[outputs + column] : 0.0f);
      value = activate(gate, p.activation) * up;
    } else {
      const float sum = tile[at(tile_row, tile_column)];
      value = activate(sum + (p.bias ? p.bias[column] : 0.0f), p.activation);
    }
    if (p.scale) value *= p.scale[column];
    if (p.residual) value += p.residual[row % p.residual_rows * p.residual_stride + column];
    p.out[row * outputs + column] = value;
  }
}

// Rows of x as bf16 at their place in the packed matrix, padded with zeros. A block is a row.
template <class T>
__device__ void pack(const PackParams& p) {
  const int64_t row = blockIdx.x, at = p.first + row;
  const int64_t to = p.gates == 0 ? at : at < p.gates ? 2 * at : 2 * (at - p.gates) + 1;
  const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
  __nv_bfloat16* out = reinterpret_cast<__nv_bfloat16*>(p.out) + to * p.stride;
  for (int64_t i = threadIdx.x; i < p.stride; i += kPackThreads)
    out[i] = from_float<__nv_bfloat16>(i < p.k ? to_float(x[i]) : 0.0f);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(threads_of(kLargeTile))
    linear_large(const __grid_constant__ LinearParams p) {
  multiply<kLargeTile.m, kLargeTile.n, kLargeTile.warps_m, kLargeTile.warps_n>(p);
}

extern "C" __global__ void __launch_bounds__(threads_of(kSmallTile))
    linear_small(const __grid_constant__ LinearParams p) {
  multiply<kSmallTile.m, kSmallTile.n, kSmallTile.warps_m, kSmallTile.warps_n>(p);
}

extern "C" __global__ void __launch_bounds__(kPackThreads) pack_f32(const __grid_constant__ PackParams p) {
  pack<float>(p);
}
extern "C" __global__ void __launch_bounds__(kPackThreads) pack_bf16(const __grid_constant__ PackParams p) {
  pack<__nv_bfloat16>(p);
}
extern "C" __global__ void __launch_bounds__(kPackThreads) pack_f16(const __grid_constant__ PackParams p) {
  pack<__half>(p);
}

}  // namespace mgm::cuda
