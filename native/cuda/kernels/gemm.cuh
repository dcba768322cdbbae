// The matrix product behind linear, conv2d and grouped_linear on the tensor cores: x [M, K] of bf16 or f16,
// packed weights [N, K] (gemm.h), f32 accumulation.
//
// A block computes a tile. Slices of kBlockK columns stream through shared memory by cp.async; fragments of x
// come by ldmatrix from swizzled rows, those of W, which are packed as fragments, by one plain load each,
// while the fragments before them are multiplied. The result goes through shared memory once, and out in
// whole rows.
//
// Every result sums its products by mma.sync m16n8k16, x the first operand, one after the other in the order
// of K, padded to whole blocks, whatever the tile and the place in it: its bits depend on its row of x and
// its column of W alone.
#pragma once
#include "gemm.h"
#include "mma.cuh"

namespace mgm::cuda {

// -- weights --

// What a lane holds of a panel's block: b[0], b[1] are its operand of the first sixteen columns, b[2], b[3]
// of the rest.
template <class T, WeightType kWeights>
struct Weights;

template <class T>
struct Weights<T, WeightType::half> {
  uint32_t b[4];
  // `block`: shared address of a block.
  __device__ __forceinline__ void load(uint32_t block, int lane) {
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                 : "r"(block + lane * 16)
                 : "memory");
  }
  __device__ __forceinline__ void unpack(uint32_t (&to)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = b[i];
  }
};

// Integers become f32 by being put into the mantissa of a power of two, which an fma takes away again: the
// products with f16 scales that this needs are exact.
template <class T>
struct Weights<T, WeightType::int8> {
  uint32_t q[2];
  uint32_t scale;
  __device__ __forceinline__ void load(uint32_t block, int lane) {
    uint16_t half;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                 : "=r"(q[0]), "=r"(q[1])
                 : "r"(block + lane * 8)
                 : "memory");
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(half) : "r"(block + 256 + lane / 4 * 2) : "memory");
    scale = half;
  }
  __device__ __forceinline__ void unpack(uint32_t (&to)[4]) const {
    const float s = unpack_two<__half>(scale).x, offset = -(32768.0f + 128.0f) * s;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t biased = q[i / 2] ^ 0x80808080u;
      const int byte = i % 2 * 2;
      const float low = __uint_as_float(__byte_perm(biased, 0x47000000u, 0x7604u | byte << 4));
      const float high = __uint_as_float(__byte_perm(biased, 0x47000000u, 0x7604u | (byte + 1) << 4));
      to[i] = pack_two<T>(fmaf(low, s, offset), fmaf(high, s, offset));
    }
  }
};

// word & kMask | bits in one instruction.
template <uint32_t kMask>
__device__ __forceinline__ uint32_t masked_or(uint32_t word, uint32_t bits) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(word), "n"(kMask), "r"(bits));
  return result;
}

template <class T>
struct Weights<T, WeightType::int4> {
  uint32_t q, scale_min;
  __device__ __forceinline__ void load(uint32_t block, int lane) {
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(q) : "r"(block + lane * 4) : "memory");
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(scale_min) : "r"(block + 128 + lane / 4 * 4) : "memory");
  }
  __device__ __forceinline__ void unpack(uint32_t (&to)[4]) const {
    const float2 both = unpack_two<__half>(scale_min);
    const float s = both.x, at_12 = fmaf(-2048.0f, s, both.y), at_16 = fmaf(-128.0f, s, both.y);
    // A nibble in bits 12 to 15 of 2048.0f, or in bits 16 to 19 of 128.0f, counts ones.
    const auto from_12 = [&](uint32_t word) {
      return fmaf(__uint_as_float(masked_or<0x0000f000u>(word, 0x45000000u)), s, at_12);
    };
    const auto from_16 = [&](uint32_t word) {
      return fmaf(__uint_as_float(masked_or<0x000f0000u>(word, 0x43000000u)), s, at_16);
    };
    to[0] = pack_two<T>(from_16(q << 16), from_12(q << 8));
    to[1] = pack_two<T>(from_16(q << 8), from_12(q));
    to[2] = pack_two<T>(from_16(q), from_12(q >> 8));
    to[3] = pack_two<T>(from_16(q >> 8), from_12(q >> 16));
  }
};

// -- copies to shared memory --

// A loader of x copies one slice, rows [kM][kBlockK] swizzled<4>, a call; what is past K becomes zeros. Where
// slices do not simply follow one another, next() looks up where they are: it returns how many calls of copy
// it has made ready, the same number in all threads. This one: rows `stride` elements apart, all on 16 bytes,
// K a multiple of 8. Rows past the last repeat it: nobody stores their results.
template <TileName kTile>
class StridedRows {
 public:
  __device__ __forceinline__ StridedRows(const void* x, int64_t stride, int first, int rows, int k) {
    const int row = threadIdx.x / 4, piece = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < kCopies; ++i)
      from_[i] =
          static_cast<const uint16_t*>(x) + min(first + row + i * kStep, rows - 1) * stride + piece * 8;
    left_ = k - piece * 8;
    to_ = swizzled<4>(row, piece);
  }
  static constexpr bool kOneRun = true;  // without next()
  __device__ __forceinline__ void copy(uint32_t slice) {
    const int valid = left_ > 0 ? 16 : 0;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      copy_async(slice + to_ + i * kStep * kBlockK * 2, from_[i], valid);
      from_[i] += kBlockK;
    }
    left_ -= kBlockK;
  }

 private:
  static constexpr int kStep = threads_of(kTile) / 4, kCopies = kTiles[kTile].m / kStep;
  static_assert(kStep % 8 == 0 && kTiles[kTile].m % kStep == 0, "copies divide evenly, and swizzle alike");
  const uint16_t* from_[kCopies];
  uint32_t to_;
  int left_;
};

// One block of each of the tile's panels a call. Panels past the last repeat it.
template <TileName kTile, WeightType kWeights>
class PanelBlocks {
 public:
  __device__ __forceinline__ PanelBlocks(const uint8_t* w, int first, int panels, int blocks)
      : left_(blocks) {
    const int64_t stride = static_cast<int64_t>(blocks) * block_bytes(kWeights);
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int at = threadIdx.x + i * threads_of(kTile);
      from_[i] = w + min(first + at / kPieces, panels - 1) * stride + at % kPieces * 16;
    }
  }
  __device__ __forceinline__ void copy(uint32_t slice) {
    const int valid = left_ > 0 ? 16 : 0;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int at = threadIdx.x + i * threads_of(kTile);
      if (kAll % threads_of(kTile) == 0 || at < kAll) copy_async(slice + at * 16, from_[i], valid);
      from_[i] += block_bytes(kWeights);
    }
    --left_;
  }

 private:
  static constexpr int kPieces = block_bytes(kWeights) / 16, kAll = kTiles[kTile].n / kPanelRows * kPieces;
  static constexpr int kCopies = (kAll + threads_of(kTile) - 1) / threads_of(kTile);
  const uint8_t* from_[kCopies];
  int left_;
};

// -- the product --

// A warp's part of the tile, in the order of mma.sync's accumulators.
template <TileName kTile>
struct Accumulators {
  static constexpr int kRows = kTiles[kTile].m / kTiles[kTile].warps_m / 16;
  static constexpr int kColumns = kTiles[kTile].n / kTiles[kTile].warps_n / 8;
  float c[kRows][kColumns][4] = {};

  static __device__ __forceinline__ int first_row() {
    return static_cast<int>(threadIdx.x) / 32 / kTiles[kTile].warps_n * kRows * 16;
  }
  static __device__ __forceinline__ int first_column() {
    return static_cast<int>(threadIdx.x) / 32 % kTiles[kTile].warps_n * kColumns * 8;
  }
};

template <class T, WeightType kWeights, TileName kTile, class Rows>
__device__ __forceinline__ void multiply(Accumulators<kTile>& sums, Rows& x, PanelBlocks<kTile, kWeights>& w,
                                         int blocks, uint32_t shared) {
  constexpr int kStages = kTiles[kTile].stages;
  constexpr uint32_t kSliceX = kTiles[kTile].m * kBlockK * 2, kSlice = slice_bytes(kTile, kWeights);
  constexpr int kRows = Accumulators<kTile>::kRows, kColumns = Accumulators<kTile>::kColumns;
  const int lane = threadIdx.x % 32;
  const uint32_t end = shared + kStages * kSlice;
  uint32_t read = shared, write = shared + (kStages - 1) * kSlice;

  // From the start of a slice: x of the first and the second sixteen columns, and W.
  const uint32_t x_row = Accumulators<kTile>::first_row() + lane % 16;
  const uint32_t x_at[2] = {swizzled<4>(x_row, lane / 16), swizzled<4>(x_row, 2 + lane / 16)};
  const uint32_t w_at = kSliceX + Accumulators<kTile>::first_column() / kPanelRows * block_bytes(kWeights);
  uint32_t a[2][kRows][4], b[kColumns][4];
  const auto load_x = [&](int half) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) load_matrices(a[half][i], read + x_at[half] + i * 16 * kBlockK * 2);
  };

  int ready = 0;
  for (uint32_t slice = shared; slice != write; slice += kSlice) {
    if constexpr (!Rows::kOneRun) {
      if (ready == 0) ready = x.next();
      --ready;
    }
    x.copy(slice);
    w.copy(slice + kSliceX);
    commit_copies();
  }
  wait_copies<kStages - 2>();
  __syncthreads();
  load_x(0);
#pragma unroll
  for (int j = 0; j < kColumns; ++j) {
    Weights<T, kWeights> packed;
    packed.load(read + w_at + j * block_bytes(kWeights), lane);
    packed.unpack(b[j]);
  }

  const auto turn = [&] {
    load_x(1);
    x.copy(write);
    w.copy(write + kSliceX);
    commit_copies();
#pragma unroll
    for (int j = 0; j < kColumns; ++j)
#pragma unroll
      for (int i = 0; i < kRows; ++i) multiply_add<T>(sums.c[i][j], a[0][i], b[j][0], b[j][1]);

    // The next slice has arrived (after the last one it is zeros), and this one may be overwritten.
    wait_copies<kStages - 2>();
    __syncthreads();
    write = read;
    read += kSlice;
    if (read == end) read = shared;
    load_x(0);
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      Weights<T, kWeights> packed;
      packed.load(read + w_at + j * block_bytes(kWeights), lane);
#pragma unroll
      for (int i = 0; i < kRows; ++i) multiply_add<T>(sums.c[i][j], a[1][i], b[j][2], b[j][3]);
      packed.unpack(b[j]);
    }
  };
  if constexpr (Rows::kOneRun) {
    for (int block = 0; block < blocks; ++block) turn();
  } else {
    for (int left = blocks; left > 0;) {
      if (ready == 0) ready = x.next();
      const int turns = min(left, ready);
      left -= turns;
      ready -= turns;
      for (int i = 0; i < turns; ++i) turn();
    }
  }
  wait_copies<0>();
  __syncthreads();
}

// -- epilogue --

__device__ __forceinline__ float sigmoid_times(float x, float u) {
  return x / (1.0f + expf(-u));
}

// Exact, but for 2e-7: the CPU's formula (native/cpu/simd/math.h), which needs no more than an exponential.
__device__ __forceinline__ float gelu(float x) {
  const float size = fminf(30.0f, fabsf(x)), z = size * 0.70710678118654752f;
  const float t = __fdividef(1.0f, fmaf(0.45f, z, 1.0f));
  float p = 9.20726135373115540e-02f;
  p = fmaf(p, t, -4.91859614849090576e-01f);
  p = fmaf(p, t, 8.52988958358764648e-01f);
  p = fmaf(p, t, -3.71701210737228394e-01f);
  p = fmaf(p, t, 4.57933813333511353e-01f);
  p = fmaf(p, t, 2.01651424169540405e-01f);
  p = fmaf(p, t, 2.58913993835449219e-01f);
  return fmaf(-0.5f * size, expf(-z * z) * t * p, x < 0.0f ? 0.0f : x);
}

// activation: of mgm::Activation.
template <int kCount>
__device__ __forceinline__ void activate(float (&x)[kCount], int activation) {
  const auto each = [&](auto f) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = f(x[i]);
  };
  switch (activation) {
    case 1:
      return each([](float v) { return gelu(v); });
    case 2:
      return each(
          [](float v) { return sigmoid_times(v, 1.5957691216057308f * fmaf(0.044715f * v * v, v, v)); });
    case 3:
      return each([](float v) { return sigmoid_times(v, 1.702f * v); });
    case 4:
      return each([](float v) { return sigmoid_times(v, v); });
    default:
      return;
  }
}

// An f32 tile [kRows][kColumns] in shared memory. Sixteen-byte pieces are permuted so that fragments are
// written, and eight outputs a lane read, without bank conflicts.
template <int kColumns>
__device__ __forceinline__ int result_at(int row, int column) {
  const int piece = column / 4;
  int other;
  if (kColumns == 16)
    other = row & 2;
  else if (kColumns == 32)
    other = (row & 3) << 1 ^ ((row ^ row >> 1) & 1);
  else
    other = (row & 3) << 1 ^ (piece >> 3 & 3);
  return row * kColumns + (piece ^ other) * 4 + column % 4;
}

// Two neighbours of a fragment to a tile at shared address `tile`.
template <int kColumns>
__device__ __forceinline__ void store_two(uint32_t tile, int row, int column, float first, float second) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(tile + result_at<kColumns>(row, column) * 4),
               "f"(first), "f"(second)
               : "memory");
}

// Column of the tile that holds (the gate of) output `output`; its up is kPanelRows further.
__device__ __forceinline__ int column_of(int output, bool gated) {
  return gated ? output / kPanelRows * 2 * kPanelRows + output % kPanelRows : output;
}

// First output of the tile in column `tile` of the grid.
template <TileName kTile>
__device__ __forceinline__ int first_output(const Epilogue& e, int tile) {
  return tile * kTiles[kTile].n / (e.gated ? 2 : 1);
}

// The row of bias that row `row` of the result gets.
__device__ __forceinline__ int bias_row(const Epilogue& e, int row) {
  return row < e.bias_rows ? 0 : row / e.bias_rows;
}
__device__ __forceinline__ int64_t residual_at(const Epilogue& e, int row) {
  return (row < e.residual_rows ? row : row % e.residual_rows) * e.residual_stride;
}

MGM_ANYWHERE int log2_of(int x) {
  return x > 1 ? 1 + log2_of(x / 2) : 0;
}

// What columns bring to their results.
template <int kCount>
struct ColumnTerms {
  float bias[kCount] = {}, up_bias[kCount] = {}, scale[kCount];
};

// From sums to results. Whoever finishes a result does it by these very operations: its bits are the same.
template <int kCount>
__device__ __forceinline__ void finish_sums(float (&x)[kCount], const float (&up)[kCount],
                                            const float (&added)[kCount], const ColumnTerms<kCount>& terms,
                                            const Epilogue& e) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) x[i] += terms.bias[i];
  activate(x, e.activation);
  if (e.gated) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] *= up[i] + terms.up_bias[i];
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) x[i] = fmaf(x[i], terms.scale[i], added[i]);
}

// One output a thread and turn; `thread` of kThreads. row_of(r): the row of the result that row r of the tile
// holds, negative: none.
template <class T, int kRows, int kColumns, int kThreads, class RowOf>
__device__ __forceinline__ void finish_elements(const Epilogue& e, const float* tile, int first_output,
                                                RowOf row_of, int thread) {
  // The last layer of a UNet or VAE has three or four outputs.
  const int log_width = min(log2_of(kColumns) - e.gated, 32 - __clz(e.outputs - first_output - 1));
#pragma unroll 1
  for (int i = thread; i < kRows << log_width; i += kThreads) {
    const int tile_row = i >> log_width, tile_output = i & (1 << log_width) - 1;
    const int row = row_of(tile_row), output = first_output + tile_output;
    if (row < 0 || output >= e.outputs) continue;
    const int column = column_of(tile_output, e.gated);
    ColumnTerms<1> terms;
    if (e.bias) {
      const float* bias = e.bias + bias_row(e, row) * e.bias_stride + output;
      terms.bias[0] = bias[0];
      if (e.gated) terms.up_bias[0] = bias[e.outputs];
    }
    terms.scale[0] = e.scale ? e.scale[output] : 1.0f;
    float value[1] = {tile[result_at<kColumns>(tile_row, column)]}, up[1] = {}, added[1] = {};
    if (e.gated) up[0] = tile[result_at<kColumns>(tile_row, column + kPanelRows)];
    if (e.residual) added[0] = to_float(static_cast<const T*>(e.residual)[residual_at(e, row) + output]);
    finish_sums(value, up, added, terms, e);
    const int64_t to = static_cast<int64_t>(row) * e.outputs + output;
    if (e.out_f32)
      static_cast<float*>(e.out)[to] = value[0];
    else
      static_cast<T*>(e.out)[to] = from_float<T>(value[0]);
  }
}

__device__ __forceinline__ void load_four(float* to, const float* from) {
  const float4 four = *reinterpret_cast<const float4*>(from);
  to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
}

// Eight outputs a thread and turn, the same columns in every turn: two fours, neighbours if they fill 16
// bytes together, else half a row of the tile apart. Needs e.aligned and, if bias has several rows, a row_of
// that never goes back.
template <class T, int kRows, int kColumns, int kThreads, class RowOf>
__device__ __forceinline__ void finish_vectors(const Epilogue& e, const float* tile, int first_output,
                                               RowOf row_of) {
  const int log_lanes = log2_of(kColumns / 8) - e.gated, lanes = 1 << log_lanes;
  const int lane = threadIdx.x & lanes - 1;
  int output[2];
  bool valid[2];
  ColumnTerms<8> terms;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    output[half] = e.out_f32 ? (half * lanes + lane) * 4 : lane * 8 + half * 4;
    const int at = first_output + output[half];
    valid[half] = at < e.outputs;
#pragma unroll
    for (int i = 0; i < 4; ++i) terms.scale[half * 4 + i] = 1.0f;
    if (e.scale && valid[half]) load_four(terms.scale + half * 4, e.scale + at);
  }
  if (!valid[0]) return;

  int next_bias = 0;  // first row of another row of bias
#pragma unroll 1
  for (int tile_row = threadIdx.x >> log_lanes; tile_row < kRows; tile_row += kThreads >> log_lanes) {
    const int row = row_of(tile_row);
    if (row < 0) continue;
    if (e.bias && row >= next_bias) {
      const int from = bias_row(e, row);
      next_bias = (from + 1) * e.bias_rows;
      const float* bias = e.bias + from * e.bias_stride + first_output;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (valid[half]) load_four(terms.bias + half * 4, bias + output[half]);
        if (valid[half] && e.gated) load_four(terms.up_bias + half * 4, bias + e.outputs + output[half]);
      }
    }
    float value[8], up[8] = {}, added[8] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int column = column_of(output[half], e.gated);
      load_four(value + half * 4, tile + result_at<kColumns>(tile_row, column));
      if (e.gated) load_four(up + half * 4, tile + result_at<kColumns>(tile_row, column + kPanelRows));
    }
    const int64_t to = static_cast<int64_t>(row) * e.outputs + first_output;
    if (e.residual) {
      const T* residual = static_cast<const T*>(e.residual) + residual_at(e, row) + first_output;
      uint4 eight = {};
      if (e.out_f32) {
        const uint2 low = *reinterpret_cast<const uint2*>(residual + output[0]);
        const uint2 high = valid[1] ? *reinterpret_cast<const uint2*>(residual + output[1]) : uint2{};
        eight = make_uint4(low.x, low.y, high.x, high.y);
      } else {
        eight = *reinterpret_cast<const uint4*>(residual + output[0]);
      }
      const uint32_t pairs[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 two = unpack_two<T>(pairs[i]);
        added[i * 2] = two.x, added[i * 2 + 1] = two.y;
      }
    }
    finish_sums(value, up, added, terms, e);
    if (e.out_f32) {
      float* out = static_cast<float*>(e.out) + to;
      *reinterpret_cast<float4*>(out + output[0]) = make_float4(value[0], value[1], value[2], value[3]);
      if (valid[1])
        *reinterpret_cast<float4*>(out + output[1]) = make_float4(value[4], value[5], value[6], value[7]);
    } else {
      *reinterpret_cast<uint4*>(static_cast<T*>(e.out) + to + output[0]) =
          make_uint4(pack_two<T>(value[0], value[1]), pack_two<T>(value[2], value[3]),
                     pack_two<T>(value[4], value[5]), pack_two<T>(value[6], value[7]));
    }
  }
}

template <TileName kTile, int kPart>
__device__ __forceinline__ void store_part(const Accumulators<kTile>& sums, uint32_t tile) {
  using Sums = Accumulators<kTile>;
  constexpr int kRows = Sums::kRows / parts_of(kTile), kN = kTiles[kTile].n;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kRows; ++i)
#pragma unroll
    for (int j = 0; j < Sums::kColumns; ++j)
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        const int row = Sums::first_row() / parts_of(kTile) + i * 16 + pair * 8 + lane / 4;
        const int column = Sums::first_column() + j * 8 + lane % 4 * 2;
        const float* c = sums.c[kPart * kRows + i][j] + pair * 2;
        store_two<kN>(tile, row, column, c[0], c[1]);
      }
}

// row_of(r): see finish_elements. The shared memory is free for the tile.
template <class T, TileName kTile, class RowOf>
__device__ __forceinline__ void finish(const Epilogue& e, const Accumulators<kTile>& sums, float* tile,
                                       int first_output, RowOf row_of) {
  constexpr int kParts = parts_of(kTile), kM = kTiles[kTile].m / kParts, kN = kTiles[kTile].n;
  constexpr int kWarpRows = kM / kTiles[kTile].warps_m;
  static_assert(kParts <= 2, "store_part is named part by part");
#pragma unroll 1
  for (int part = 0; part < kParts; ++part) {
    if (part == 0) {
      store_part<kTile, 0>(sums, shared_address(tile));
    } else {
      __syncthreads();
      store_part<kTile, kParts - 1>(sums, shared_address(tile));
    }
    __syncthreads();
    // The part holds a share of each warp's rows.
    const auto row_of_part = [&](int r) {
      return row_of((r / kWarpRows * kParts + part) * kWarpRows + r % kWarpRows);
    };
    if (e.aligned)
      finish_vectors<T, kM, kN, threads_of(kTile)>(e, tile, first_output, row_of_part);
    else
      finish_elements<T, kM, kN, threads_of(kTile)>(e, tile, first_output, row_of_part, threadIdx.x);
  }
}

}  // namespace mgm::cuda
