// out = residual + scale * act(x W^T + bias) (gemm.cuh).
//
// At least 2 M N K FLOP and, in bytes, 2 M K + w N K + 2 M N, w being 2, 1.06 or 0.63. A tile of m x n reads
// M K N (2 / n + w / m) bytes.
//
// Up to 16 rows (decode): bound by the bytes of W, each of which is read once. A warp owns one panel and
// walks along it; nothing but the panel's own copies limits it, and some 7 KiB of them a warp are under way
// at any time. The price of results that do not depend on M is that K cannot be split: one warp adds up a
// panel's products in order, which takes K / 16 dependent mma (some 33 cycles each on an A100: 6 us for K =
// 4096, while 22 us of weights pass if N = 4096).
#include "gemm.cuh"
#include "linear.h"

namespace mgm::cuda {
namespace {

extern __shared__ __align__(128) unsigned char shared[];

template <class T, WeightType kWeights, TileName kTile>
__device__ __forceinline__ void multiply_tile(const LinearParams& p) {
  constexpr int kPanels = kTiles[kTile].n / kPanelRows;
  const int first_row = blockIdx.x * kTiles[kTile].m, first_panel = blockIdx.y * kPanels;
  StridedRows<kTile> x(p.x, p.x_stride, first_row, p.m, p.k);
  PanelBlocks<kTile, kWeights> w(p.w, first_panel, p.panels, p.blocks);
  Accumulators<kTile> sums;
  multiply<T, kWeights, kTile>(sums, x, w, p.blocks, shared_address(shared));
  finish<T, kTile>(p.epilogue, sums, reinterpret_cast<float*>(shared),
                   first_output<kTile>(p.epilogue, blockIdx.y),
                   [&](int row) { return first_row + row < p.m ? first_row + row : -1; });
}

template <class T, WeightType kWeights>
__device__ __forceinline__ void multiply_few(const LinearParams& p) {
  constexpr int kStages = kTiles[kFew].stages, kPanels = kTiles[kFew].n / kPanelRows;
  constexpr int kColumns = few_columns(kWeights), kBlocks = kColumns / kBlockK;
  constexpr int kBytes = kBlocks * block_bytes(kWeights);  // of W in a stage
  constexpr int kPieces = kColumns / 8;                    // of a row of x in a stage
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t stage_bytes = few_stage_bytes(kWeights, p.m);
  const uint32_t begin = shared_address(shared) + warp * kStages * stage_bytes,
                 end = begin + kStages * stage_bytes;

  // Copies: the warp's panel from end to end, and the same columns of every row of x.
  const int panel = min(static_cast<int>(blockIdx.x) * kPanels + warp, p.panels - 1);
  const int64_t panel_size = static_cast<int64_t>(p.blocks) * block_bytes(kWeights);
  const uint8_t* w_from = p.w + panel * panel_size + lane * 16;
  int64_t w_left = panel_size - lane * 16;
  const int row = lane / kPieces, piece = lane % kPieces;
  const uint16_t* x_from = static_cast<const uint16_t*>(p.x) + row * p.x_stride + piece * 8;
  int x_left = p.k - piece * 8;
  const auto copy = [&](uint32_t stage) {
#pragma unroll
    for (int i = 0; i < kBytes; i += 512)
      if (i + 512 <= kBytes || lane * 16 < kBytes - i)
        copy_async(stage + lane * 16 + i, w_from + i, w_left > i ? 16 : 0);
    for (int r = row; r < p.m; r += 32 / kPieces)
      copy_async_cached(stage + kBytes + swizzled<kPieces>(r, piece), x_from + (r - row) * p.x_stride,
                        x_left > 0 ? 16 : 0);
    commit_copies();
    w_from += kBytes, w_left -= kBytes;
    x_from += kColumns, x_left -= kColumns;
  };

  float c[4] = {};
  const int x_row = min(lane % 16, p.m - 1);  // rows past the last repeat it
  for (int i = 0; i < kStages - 1; ++i) copy(begin + i * stage_bytes);
  uint32_t read = begin, write = end - stage_bytes;
  for (int block = 0; block < p.blocks; block += kBlocks) {
    wait_copies<kStages - 2>();
    __syncwarp();
    copy(write);
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      if (block + i >= p.blocks) break;
      Weights<T, kWeights> packed;
      packed.load(read + i * block_bytes(kWeights), lane);
      uint32_t b[4], a[2][4];
#pragma unroll
      for (int half = 0; half < 2; ++half)
        load_matrices(a[half], read + kBytes + swizzled<kPieces>(x_row, i * 4 + half * 2 + lane / 16));
      packed.unpack(b);
      multiply_add<T>(c, a[0], b[0], b[1]);
      multiply_add<T>(c, a[1], b[2], b[3]);
    }
    write = read;
    read += stage_bytes;
    if (read == end) read = begin;
  }
  wait_copies<0>();
  __syncthreads();

  float* tile = reinterpret_cast<float*>(shared);
  constexpr int kN = kTiles[kFew].n;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    tile[result_at<kN>(lane / 4 + i / 2 * 8, warp * kPanelRows + lane % 4 * 2 + i % 2)] = c[i];
  __syncthreads();
  finish_elements<T, kTiles[kFew].m, kN, threads_of(kFew)>(
      p.epilogue, tile, first_output<kFew>(p.epilogue, blockIdx.x), [&](int r) { return r < p.m ? r : -1; });
}

}  // namespace

#define MULTIPLY_TILE(name, T, weights, tile, blocks)                    \
  extern "C" __global__ void __launch_bounds__(threads_of(tile), blocks) \
      name(const __grid_constant__ LinearParams p) {                     \
    multiply_tile<T, weights, tile>(p);                                  \
  }
#define MULTIPLY(name, T, weights)                               \
  MULTIPLY_TILE(name##_large, T, weights, kLarge, 2)             \
  MULTIPLY_TILE(name##_small, T, weights, kSmall, 4)             \
  MULTIPLY_TILE(name##_thin, T, weights, kThin, 4)               \
  extern "C" __global__ void __launch_bounds__(threads_of(kFew)) \
      name##_few(const __grid_constant__ LinearParams p) {       \
    multiply_few<T, weights>(p);                                 \
  }
MULTIPLY(linear_bf16, __nv_bfloat16, WeightType::half)
MULTIPLY(linear_bf16_int8, __nv_bfloat16, WeightType::int8)
MULTIPLY(linear_bf16_int4, __nv_bfloat16, WeightType::int4)
MULTIPLY(linear_f16, __half, WeightType::half)
MULTIPLY(linear_f16_int8, __half, WeightType::int8)
MULTIPLY(linear_f16_int4, __half, WeightType::int4)

extern "C" __global__ void __launch_bounds__(kAlignThreads)
    align_rows(const __grid_constant__ AlignParams p) {
  const int64_t row = blockIdx.x;
  for (int i = threadIdx.x; i < p.width; i += kAlignThreads)
    p.out[row * p.width + i] = i < p.k ? p.x[row * p.x_stride + i] : 0;
}

}  // namespace mgm::cuda
