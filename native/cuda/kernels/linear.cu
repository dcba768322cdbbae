// out = residual + scale * act(x W^T + bias) (gemm.cuh).
//
// At least 2 M N K FLOP and, in bytes, 2 M K + w N K + 2 M N, w being 2, 1.06 or 0.63. A tile of m x n reads
// M K N (2 / n + w / m) bytes.
//
// Up to 16 rows (decode): bound by the bytes of W, each of which is read once. A warp owns two panels and
// walks along them; some 10 KiB of copies a warp are under way at any time, and nothing but a change of x's
// buffer makes it wait for other warps. The price of results that do not depend on M is that K cannot be
// split: one warp adds up a panel's products in order, which takes K / 16 dependent mma (some 33 cycles each
// on an A100: 6 us for K = 4096, while 22 us of weights pass if N = 4096).
#include "gemm.cuh"
#include "linear.h"

namespace mgm::cuda {
namespace {

extern __shared__ __align__(128) unsigned char shared[];

template <class T, WeightType kWeights, TileName kTile>
__device__ __forceinline__ void multiply_tile(const LinearParams& p) {
  constexpr int kPanels = kTiles[kTile].n / kPanelRows;
  const int row_tile = p.rows_first ? blockIdx.x : blockIdx.y,
            column_tile = p.rows_first ? blockIdx.y : blockIdx.x;
  const int first_row = row_tile * kTiles[kTile].m, first_panel = column_tile * kPanels;
  StridedRows<kTile> x(p.x, p.x_stride, first_row, p.m, p.k);
  PanelBlocks<kTile, kWeights> w(p.w, first_panel, p.panels, p.blocks);
  Accumulators<kTile> sums;
  multiply<T, kWeights, kTile>(sums, x, w, p.blocks, shared_address(shared));
  finish<T, kTile>(p.epilogue, sums, reinterpret_cast<float*>(shared),
                   first_output<kTile>(p.epilogue, column_tile),
                   [&](int row) { return first_row + row < p.m ? first_row + row : -1; });
}

// What a warp multiplies next: a block of two panels with its columns of x.
template <class T, WeightType kWeights>
struct Operands {
  uint32_t x[2][4];
  Weights<T, kWeights> w[2];

  __device__ __forceinline__ void multiply(float (&c)[2][4]) const {
#pragma unroll
    for (int panel = 0; panel < 2; ++panel) {
      uint32_t b[4];
      w[panel].unpack(b);
      multiply_add<T>(c[panel], x[0], b[0], b[1]);
      multiply_add<T>(c[panel], x[1], b[2], b[3]);
    }
  }
};

template <class T, WeightType kWeights>
__device__ __forceinline__ void multiply_few(const LinearParams& p) {
  constexpr int kStages = few_stages(kWeights), kPanelBytes = few_panel_bytes(kWeights);
  constexpr int kStage = 2 * kPanelBytes, kPieces = kPanelBytes / 16, kCopies = (2 * kPieces + 31) / 32;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int group = blockIdx.x * (blockDim.x / 32) + warp;
  const uint32_t x_begin = shared_address(shared), slab_bytes = p.m * kFewColumns * 2;
  const uint32_t ring = x_begin + few_x_bytes(p.m, p.k) + warp * few_ring_bytes(kWeights);

  // W: a stage is kPanelBytes of either panel. Panels past the last repeat it.
  const int panel_size = p.blocks * block_bytes(kWeights);
  const uint8_t* w_from[kCopies];
#pragma unroll
  for (int i = 0; i < kCopies; ++i) {
    const int at = lane + i * 32;
    w_from[i] = p.w + min(group * 2 + at / kPieces, p.panels - 1) * static_cast<int64_t>(panel_size) +
                at % kPieces * 16;
  }
  int w_left = panel_size;
  const auto copy_w = [&](uint32_t stage) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int at = lane + i * 32;
      if (2 * kPieces % 32 == 0 || at < 2 * kPieces)
        copy_async(stage + at * 16, w_from[i], at % kPieces * 16 < w_left ? 16 : 0);
      w_from[i] += kPanelBytes;
    }
    w_left -= kPanelBytes;
  };

  // x: the slabs that fill a buffer, by all warps together.
  const int slabs = few_slabs(p.k), held = few_slabs_in_buffer(p.m, p.k);
  const auto copy_x = [&](int first, uint32_t buffer) {
    const int step = blockDim.x / 8, slab_step = step / p.m, row_step = step % p.m;
    const int piece = threadIdx.x % 8, start = threadIdx.x / 8, last = min(held, slabs - first);
    for (int slab = start / p.m, row = start % p.m; slab < last; slab += slab_step, row += row_step) {
      if (row >= p.m) {
        row -= p.m;
        if (++slab >= last) break;
      }
      const int column = (first + slab) * kFewColumns + piece * 8;
      copy_async_cached(buffer + slab * slab_bytes + swizzled<8>(row, piece),
                        static_cast<const uint16_t*>(p.x) + row * p.x_stride + column, column < p.k ? 16 : 0);
    }
  };

  copy_x(0, x_begin);
  for (int i = 0; i < kStages; ++i) {
    copy_w(ring + i * kStage);
    if (i == 1) copy_x(held, x_begin + held * slab_bytes);
    commit_copies();
  }
  wait_copies<kStages - 1>();
  __syncthreads();

  const int x_row = min(lane % 16, p.m - 1);  // rows past the last repeat it
  uint32_t stage = ring, slab_at = x_begin;
  const auto load = [&](Operands<T, kWeights>& to, int block) {
#pragma unroll
    for (int panel = 0; panel < 2; ++panel)
      to.w[panel].load(stage + panel * kPanelBytes + block * block_bytes(kWeights), lane);
#pragma unroll
    for (int half = 0; half < 2; ++half)
      load_matrices(to.x[half], slab_at + swizzled<8>(x_row, block * 4 + half * 2 + lane / 16));
  };
  Operands<T, kWeights> first, second;
  float c[2][4] = {};
  load(first, 0);
  uint32_t buffer = x_begin, other = x_begin + held * slab_bytes;
  for (int done = 0; done < slabs; done += held) {
    const int end = min(done + held, slabs);
    for (int slab = done; slab < end; ++slab) {
      load(second, 1);
      first.multiply(c);
      wait_copies<kStages - 2>();
      __syncwarp();
      copy_w(stage);
      commit_copies();
      stage += kStage;
      if (stage == ring + kStages * kStage) stage = ring;
      if (slab + 1 < end) slab_at += slab_bytes;
      load(first, 0);
      if (slab * 2 + 1 < p.blocks) second.multiply(c);
    }
    if (end == slabs) break;
    // Everyone's copies to the other buffer are there, and this one has been read.
    __syncthreads();
    copy_x(end + held, buffer);
    slab_at = other;
    other = buffer;
    buffer = slab_at;
    load(first, 0);
  }
  wait_copies<0>();
  __syncwarp();

  constexpr int kN = kTiles[kFew].n;
  const float* tile = reinterpret_cast<const float*>(shared + (ring - x_begin));
#pragma unroll
  for (int panel = 0; panel < 2; ++panel)
#pragma unroll
    for (int pair = 0; pair < 2; ++pair)
      store_two<kN>(ring, lane / 4 + pair * 8, panel * kPanelRows + lane % 4 * 2, c[panel][pair * 2],
                    c[panel][pair * 2 + 1]);
  __syncwarp();
  finish_elements<T, kTiles[kFew].m, kN, 32>(
      p.epilogue, tile, first_output<kFew>(p.epilogue, group), [&](int r) { return r < p.m ? r : -1; }, lane);
}

}  // namespace

#define MULTIPLY_TILE(name, T, weights, tile, blocks)                    \
  extern "C" __global__ void __launch_bounds__(threads_of(tile), blocks) \
      name(const __grid_constant__ LinearParams p) {                     \
    multiply_tile<T, weights, tile>(p);                                  \
  }
#define MULTIPLY(name, T, weights)                                          \
  MULTIPLY_TILE(name##_large, T, weights, (shaped_for(weights, kLarge)), 2) \
  MULTIPLY_TILE(name##_small, T, weights, (shaped_for(weights, kSmall)), 4) \
  MULTIPLY_TILE(name##_thin, T, weights, (shaped_for(weights, kThin)), 4)   \
  extern "C" __global__ void __launch_bounds__(kFewMostWarps * 32)          \
      name##_few(const __grid_constant__ LinearParams p) {                  \
    multiply_few<T, weights>(p);                                            \
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
