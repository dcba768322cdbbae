// Packed weights (layout: gemm.h): from rows to panels, and rows back out of them. Packing runs once, at
// load: a warp reads a block's rows in runs of 32 columns, turns them around in shared memory, and writes the
// block as one range, so every sector of either side moves once. Rows are read for embeddings, an element a
// thread: of 16-bit tables the 2 C bytes of a row and no others, in whole sectors.
#include "common.cuh"
#include "pack.h"

namespace mgm::cuda {
namespace {

constexpr uint16_t kHalfNan = 0x7e00;

// The smallest f16 that is no smaller, so that the largest magnitude still fits the integers.
__device__ __forceinline__ uint16_t half_at_least(float x) {
  if (x >= 65504.0f) return 0x7bff;
  const __half h = __float2half_rn(x);
  return __half_as_ushort(h) + (__half2float(h) < x);
}

// Lane 4g + t of a warp has eight elements of row g of a block, in the panel's order.
struct Packed {
  uint8_t* block;
  float w[8];
  int columns;  // of the block, that are K's
  bool mine;    // whether row g is this launch's to write
  __device__ static int lane() { return threadIdx.x % 32; }
  __device__ static int row() { return lane() / 4; }
  __device__ static bool first_of_row() { return lane() % 4 == 0; }
  __device__ static int column(int i) { return i / 2 * 8 + lane() % 4 * 2 + i % 2; }

  // A block's row with a NaN or an infinity cannot be quantized; it becomes NaN so that the damage shows.
  __device__ bool finite() const {
    bool all = true;
#pragma unroll
    for (float value : w) all = all && isfinite(value);
    const unsigned of_row = 0xfu << row() * 4;
    return (__ballot_sync(kAllLanes, all) & of_row) == of_row;
  }
};

__device__ __forceinline__ float row_min(float value) {
  value = fminf(value, __shfl_xor_sync(kAllLanes, value, 1));
  return fminf(value, __shfl_xor_sync(kAllLanes, value, 2));
}
__device__ __forceinline__ float row_max(float value) {
  return -row_min(-value);
}

template <class T>
__device__ void store_half(const Packed& at) {
  if (at.mine) store_vector(reinterpret_cast<T*>(at.block) + at.lane() * 8, rounded<T>(at.w));
}

__device__ void store_int8(const Packed& at) {
  float largest = 0.0f;
#pragma unroll
  for (float value : at.w) largest = fmaxf(largest, fabsf(value));
  largest = row_max(largest);
  const uint16_t scale = at.finite() ? half_at_least(largest / 127.0f) : kHalfNan;
  const float step = __half2float(__ushort_as_half(scale)), inverse = step > 0.0f ? 1.0f / step : 0.0f;
  Vector<int8_t, 8> q;
#pragma unroll
  for (int i = 0; i < 8; ++i)
    q.at[i] = static_cast<int8_t>(__float2int_rn(fminf(fmaxf(at.w[i] * inverse, -127.0f), 127.0f)));
  if (!at.mine) return;
  store_vector(reinterpret_cast<int8_t*>(at.block) + at.lane() * 8, q);
  if (at.first_of_row()) reinterpret_cast<uint16_t*>(at.block + 256)[at.row()] = scale;
}

__device__ void store_int4(const Packed& at) {
  const float infinity = __int_as_float(0x7f800000);
  float least = infinity, most = -infinity;
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (at.column(i) < at.columns) {
      least = fminf(least, at.w[i]);
      most = fmaxf(most, at.w[i]);
    }
  least = row_min(least);
  most = row_max(most);
  const bool finite = at.finite();
  const uint16_t min =
      finite ? __half_as_ushort(__float2half_rn(fminf(fmaxf(least, -65504.0f), 65504.0f))) : kHalfNan;
  const float low = __half2float(__ushort_as_half(min)), range = most - low;
  const uint16_t scale = finite ? half_at_least(range > 0.0f ? range / 15.0f : 0.0f) : kHalfNan;
  const float step = __half2float(__ushort_as_half(scale)), inverse = step > 0.0f ? 1.0f / step : 0.0f;
  uint32_t word = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float q = fminf(fmaxf((at.w[i] - low) * inverse, 0.0f), 15.0f);
    word |= static_cast<uint32_t>(__float2int_rn(q)) << i * 4;
  }
  if (!at.mine) return;
  reinterpret_cast<uint32_t*>(at.block)[at.lane()] = word;
  if (at.first_of_row())
    reinterpret_cast<uint32_t*>(at.block + 128)[at.row()] = scale | static_cast<uint32_t>(min) << 16;
}

constexpr int kPackWarps = kPackThreads / 32;
// The lanes of half a warp read pairs of four rows, from all banks.
constexpr int kTurnedRow = kBlockK + 8;

// Column k of rows `first`, `first` + 1, ... of x, zeros where there is none.
template <class T>
__device__ __forceinline__ void turn(const PackParams& p, int64_t first, int64_t k,
                                     float (&turned)[kPanelRows][kTurnedRow]) {
  float values[kPanelRows];
#pragma unroll
  for (int g = 0; g < kPanelRows; ++g) {
    const int64_t row = first + g;
    const bool in = k < p.k && row >= 0 && row < p.count;
    values[g] = in ? to_float(static_cast<const T*>(p.x)[row * p.x_stride + k]) : 0.0f;
  }
#pragma unroll
  for (int g = 0; g < kPanelRows; ++g) turned[g][Packed::lane()] = values[g];
}

template <WeightType kWeights, class Store>
__device__ __forceinline__ void pack(const PackParams& p, Store store) {
  __shared__ alignas(8) float all_turned[kPackWarps][kPanelRows][kTurnedRow];
  auto& turned = all_turned[threadIdx.x / 32];
  const int64_t panel = blockIdx.x, block = static_cast<int64_t>(blockIdx.y) * kPackWarps + threadIdx.x / 32;
  if (block >= blocks_of(p.k)) return;

  // Rows of the stacked matrix that this panel holds, and of x.
  const bool gated = p.gates > 0;
  const int64_t start = (gated ? panel / 2 : panel) * kPanelRows, end = gated ? p.gates : p.rows;
  const int64_t first = start + (gated ? panel % 2 * p.gates : 0) - p.first;
  const int64_t row = first + Packed::row();
  const bool padding = start + Packed::row() >= end;
  const bool mine = padding ? p.first + p.count == p.rows : row >= 0 && row < p.count;
  if (!__any_sync(kAllLanes, mine)) return;

  const int64_t k = block * kBlockK + Packed::lane();
  if (p.dtype == kBf16)
    turn<__nv_bfloat16>(p, first, k, turned);
  else if (p.dtype == kF16)
    turn<__half>(p, first, k, turned);
  else
    turn<float>(p, first, k, turned);
  __syncwarp();

  Packed at{p.out + panel * panel_bytes(kWeights, p.k) + block * block_bytes(kWeights),
            {},
            static_cast<int>(p.k - block * kBlockK),
            mine};
#pragma unroll
  for (int i = 0; i < 8; i += 2) {
    const float2 pair = *reinterpret_cast<const float2*>(&turned[at.row()][at.column(i)]);
    at.w[i] = padding ? 0.0f : pair.x;
    at.w[i + 1] = padding ? 0.0f : pair.y;
  }
  store(at);
}

__device__ __forceinline__ float nibble(uint32_t word, int i) {
  return static_cast<float>(word >> i * 4 & 15);
}

// Column k of a block's row.
template <WeightType kWeights, class T>
__device__ __forceinline__ float value_of(const uint8_t* block, int row, int k) {
  const int lane = row * 4 + lane_of(k), i = index_of(k);
  if constexpr (kWeights == WeightType::half)
    return to_float(reinterpret_cast<const T*>(block)[lane * 8 + i]);
  if constexpr (kWeights == WeightType::int8)
    return static_cast<float>(static_cast<int8_t>(block[lane * 8 + i])) *
           __half2float(reinterpret_cast<const __half*>(block + 256)[row]);
  const __half* scale_min = reinterpret_cast<const __half*>(block + 128) + row * 2;
  return fmaf(nibble(reinterpret_cast<const uint32_t*>(block)[lane], i), __half2float(scale_min[0]),
              __half2float(scale_min[1]));
}

template <WeightType kWeights, class T>
__device__ __forceinline__ void read_row(const PackedRowsParams& p) {
  const int64_t t = blockIdx.x, id = p.ids[t];
  if (id >= p.rows && threadIdx.x == 0) report(p.fault, FaultKind::embedding_id, id, 0, p.rows, t);
  const bool valid = id >= 0 && id < p.rows;
  const uint8_t* panel = p.w + (valid ? id / kPanelRows : 0) * panel_bytes(kWeights, p.k);
  for (int64_t k = threadIdx.x; k < p.k; k += kPackThreads) {
    const uint8_t* block = panel + k / kBlockK * block_bytes(kWeights);
    const float value = valid ? p.scale * value_of<kWeights, T>(block, id % kPanelRows, k % kBlockK) : 0.0f;
    const int64_t to = t * p.k + k;
    switch (p.dtype) {
      case kBf16:
        static_cast<__nv_bfloat16*>(p.out)[to] = from_float<__nv_bfloat16>(value);
        break;
      case kF16:
        static_cast<__half*>(p.out)[to] = from_float<__half>(value);
        break;
      default:
        static_cast<float*>(p.out)[to] = value;
    }
  }
}

}  // namespace

#define PACK(name, weights, store)                                                                        \
  extern "C" __global__ void __launch_bounds__(kPackThreads) name(const __grid_constant__ PackParams p) { \
    pack<weights>(p, [](const Packed& at) { store(at); });                                                \
  }
PACK(pack_bf16, WeightType::half, store_half<__nv_bfloat16>)
PACK(pack_f16, WeightType::half, store_half<__half>)
PACK(pack_int8, WeightType::int8, store_int8)
PACK(pack_int4, WeightType::int4, store_int4)

#define READ(name, weights, T)                               \
  extern "C" __global__ void __launch_bounds__(kPackThreads) \
      name(const __grid_constant__ PackedRowsParams p) {     \
    read_row<weights, T>(p);                                 \
  }
READ(rows_bf16, WeightType::half, __nv_bfloat16)
READ(rows_f16, WeightType::half, __half)
READ(rows_int8, WeightType::int8, void)
READ(rows_int4, WeightType::int4, void)

}  // namespace mgm::cuda
