// Packed weights (layout: gemm.h): from rows to panels, and rows back out of them. Packing runs once, at
// load; a warp packs a block of a row, a lane an element. Rows are read for embeddings, an element a thread:
// of 16-bit tables the 2 C bytes of a row and no others, in whole sectors.
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

template <class Reduce>
__device__ __forceinline__ float warp_reduce(float value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance >>= 1)
    value = Reduce::of(value, __shfl_xor_sync(kAllLanes, value, distance));
  return value;
}

// A warp's lane has column k of a block, `in` if it is one of K's.
struct Packed {
  uint8_t* block;
  int row, k;
  float w;
  bool in;
};

template <class T>
__device__ void store_half(const Packed& at) {
  reinterpret_cast<T*>(at.block)[(at.row * 4 + lane_of(at.k)) * 8 + index_of(at.k)] = from_float<T>(at.w);
}

// A block with a NaN or an infinity cannot be quantized; it becomes NaN so that the damage shows.
__device__ void store_int8(const Packed& at) {
  const float largest = warp_reduce<Max>(fabsf(at.w));
  const bool finite = __all_sync(kAllLanes, isfinite(at.w));
  const uint16_t scale = finite ? half_at_least(largest / 127.0f) : kHalfNan;
  const float step = __half2float(__ushort_as_half(scale)), inverse = step > 0.0f ? 1.0f / step : 0.0f;
  const int q = __float2int_rn(fminf(fmaxf(at.w * inverse, -127.0f), 127.0f));
  at.block[(at.row * 4 + lane_of(at.k)) * 8 + index_of(at.k)] = static_cast<uint8_t>(q);
  if (at.k == 0) reinterpret_cast<uint16_t*>(at.block + 256)[at.row] = scale;
}

__device__ void store_int4(const Packed& at) {
  const float least = warp_reduce<Min>(at.in ? at.w : __int_as_float(0x7f800000));
  const float most = warp_reduce<Max>(at.in ? at.w : __int_as_float(0xff800000));
  const bool finite = __all_sync(kAllLanes, isfinite(at.w));
  const uint16_t min =
      finite ? __half_as_ushort(__float2half_rn(fminf(fmaxf(least, -65504.0f), 65504.0f))) : kHalfNan;
  const float low = __half2float(__ushort_as_half(min)), range = most - low;
  const uint16_t scale = finite ? half_at_least(range > 0.0f ? range / 15.0f : 0.0f) : kHalfNan;
  const float step = __half2float(__ushort_as_half(scale)), inverse = step > 0.0f ? 1.0f / step : 0.0f;
  const int q = __float2int_rn(fminf(fmaxf((at.w - low) * inverse, 0.0f), 15.0f));
  // Lane t < 4 collects the word of fragment lane t.
  uint32_t word = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i)
    word |= static_cast<uint32_t>(__shfl_sync(kAllLanes, q, i / 2 * 8 + at.k % 4 * 2 + i % 2)) << i * 4;
  if (at.k < 4) reinterpret_cast<uint32_t*>(at.block)[at.row * 4 + at.k] = word;
  if (at.k == 0)
    reinterpret_cast<uint32_t*>(at.block + 128)[at.row] = scale | static_cast<uint32_t>(min) << 16;
}

__device__ __forceinline__ float weight_at(const PackParams& p, int64_t i) {
  if (p.dtype == kBf16) return to_float(static_cast<const __nv_bfloat16*>(p.x)[i]);
  if (p.dtype == kF16) return to_float(static_cast<const __half*>(p.x)[i]);
  return static_cast<const float*>(p.x)[i];
}

template <WeightType kWeights, class Store>
__device__ __forceinline__ void pack(const PackParams& p, Store store) {
  const int64_t row = blockIdx.x,
                block = static_cast<int64_t>(blockIdx.y) * (kPackThreads / 32) + threadIdx.x / 32;
  if (block >= blocks_of(p.k)) return;
  int64_t to;
  if (p.x) {
    to = packed_row(p.first + row, p.gates);
  } else if (p.gates) {
    // Half of the padding follows the gate, half of it up.
    const int64_t each = gridDim.x / 2, filled = kPanelRows - each, last = p.gates / kPanelRows * 2;
    to = (last + row / each) * kPanelRows + filled + row % each;
  } else {
    to = p.first + row;
  }
  const int lane = threadIdx.x % 32;
  const int64_t k = block * kBlockK + lane;
  const bool in = p.x && k < p.k;
  store(Packed{p.out + to / kPanelRows * panel_bytes(kWeights, p.k) + block * block_bytes(kWeights),
               static_cast<int>(to % kPanelRows), lane, in ? weight_at(p, row * p.x_stride + k) : 0.0f, in});
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
