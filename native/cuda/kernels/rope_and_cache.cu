// Rotary embedding of q and k and the write of k and v into KV pages. A block goes through tokens in steps of
// the grid: a token's cosines and sines (full range reduction, accurate at any position) are computed once
// into shared memory and used by all heads. Bytes are what bounds it: qkv is read once, q and the new cache
// rows are written once, in vectors of 16 bytes of the wider type, a vector of either half of a head by one
// thread.
#include "common.cuh"
#include "rope_and_cache.h"

namespace mgm::cuda {
namespace {

// Where the value of angle i lies in shared memory: with 8 angles a thread those that it reads at once, four,
// are neighbours of its neighbours' four.
template <int N>
__device__ __forceinline__ int place_of(int i, int half) {
  return N == 8 ? i / 4 % 2 * (half / 2) + i / 8 * 4 + i % 4 : i;
}

template <int N>
__device__ __forceinline__ void load_angles(const float* values, int i, int half, float* to) {
  constexpr int kStep = N < 4 ? N : 4;
#pragma unroll
  for (int j = 0; j < N; j += kStep) {
    const auto some = load_vector<kStep>(values + place_of<N>(i + j, half));
#pragma unroll
    for (int k = 0; k < kStep; ++k) to[j + k] = some.at[k];
  }
}

// to = the rotation of the N pairs (from[j], from[half + j]) by the angles from `i` on.
template <class To, int N, class From>
__device__ __forceinline__ void rotate(const From* from, int half, const float* cosines, const float* sines,
                                       int i, To* to) {
  const Vector<From, N> low = load_vector<N>(from), high = load_vector<N>(from + half);
  float cosine[N], sine[N];
  load_angles<N>(cosines, i, half, cosine);
  load_angles<N>(sines, i, half, sine);
  float turned_low[N], turned_high[N];
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const float a = to_float(low.at[j]), b = to_float(high.at[j]);
    turned_low[j] = fmaf(-b, sine[j], a * cosine[j]);
    turned_high[j] = fmaf(a, sine[j], b * cosine[j]);
  }
  store_vector(to, rounded<To>(turned_low));
  store_vector(to + half, rounded<To>(turned_high));
}

template <class To, int N, class From>
__device__ __forceinline__ void copy(const From* from, To* to) {
  const Vector<From, N> x = load_vector<N>(from);
  float values[N];
#pragma unroll
  for (int j = 0; j < N; ++j) values[j] = to_float(x.at[j]);
  store_vector(to, rounded<To>(values));
}

template <class T, class Page, int N>
__device__ __forceinline__ void rope(const RopeParams& p) {
  __shared__ __align__(16) float cosine[kRopeMaxHalf], sine[kRopeMaxHalf];
  __shared__ int32_t slot_of_token;
  const int half = p.half, d = 2 * half, vectors = half / N;
  const int mine = threadIdx.x;
  const float frequency = mine < half ? p.inv_freq[mine] : 0.0f;
  for (int64_t t = blockIdx.x; t < p.tokens; t += gridDim.x) {
    if (mine < half) {
      const float angle = __fmul_rn(static_cast<float>(p.positions[t]), frequency);
      cosine[place_of<N>(mine, half)] = cosf(angle);
      sine[place_of<N>(mine, half)] = sinf(angle);
    }
    if (mine == 0) slot_of_token = p.slots[t];  // once for all warps
    __syncthreads();
    const int64_t slot = slot_of_token;
    const bool cached = slot >= 0 && slot < p.slot_count;
    if (slot >= p.slot_count && mine == 0) report(p.fault, FaultKind::cache_slot, slot, 0, p.slot_count, t);
    const int64_t page = cached ? slot / p.page_size : 0, offset = cached ? slot - page * p.page_size : 0;

    const T* row = static_cast<const T*>(p.qkv) + t * p.qkv_stride;
    T* out = static_cast<T*>(p.out) + t * p.heads * d;
    const int heads = p.heads + (cached ? 2 * p.kv_heads : 0);
    for (int at = mine; at < heads * vectors; at += kRopeThreads) {
      const int head = at / vectors, i = (at - head * vectors) * N;
      const T* from = row + head * d + i;
      if (head < p.heads) {
        rotate<T, N>(from, half, cosine, sine, i, out + head * d + i);
        continue;
      }
      const bool is_key = head < p.heads + p.kv_heads;
      const int kv_head = head - p.heads - (is_key ? 0 : p.kv_heads);
      const int64_t to = ((page * p.kv_heads + kv_head) * p.page_size + offset) * d + i;
      if (is_key) {
        rotate<Page, N>(from, half, cosine, sine, i, static_cast<Page*>(p.k_pages) + to);
      } else {
        Page* v = static_cast<Page*>(p.v_pages) + to;
        copy<Page, N>(from, v);
        copy<Page, N>(from + half, v + half);
      }
    }
    __syncthreads();
  }
}

}  // namespace

// <name>: vectors; <name>_1: elements.
#define ROPE(name, T, Page, N)                                                                               \
  extern "C" __global__ void __launch_bounds__(kRopeThreads, 4) name(const __grid_constant__ RopeParams p) { \
    rope<T, Page, N>(p);                                                                                     \
  }                                                                                                          \
  extern "C" __global__ void __launch_bounds__(kRopeThreads, 4)                                              \
      name##_1(const __grid_constant__ RopeParams p) {                                                       \
    rope<T, Page, 1>(p);                                                                                     \
  }
ROPE(rope_and_cache_f32_f32, float, float, 4)
ROPE(rope_and_cache_f32_bf16, float, __nv_bfloat16, 4)
ROPE(rope_and_cache_f32_f16, float, __half, 4)
ROPE(rope_and_cache_bf16_f32, __nv_bfloat16, float, 4)
ROPE(rope_and_cache_bf16_bf16, __nv_bfloat16, __nv_bfloat16, 8)
ROPE(rope_and_cache_bf16_f16, __nv_bfloat16, __half, 8)
ROPE(rope_and_cache_f16_f32, __half, float, 4)
ROPE(rope_and_cache_f16_bf16, __half, __nv_bfloat16, 8)
ROPE(rope_and_cache_f16_f16, __half, __half, 8)

}  // namespace mgm::cuda
