// Rotary embedding of q and k and the write of k and v into KV pages. A block is a token: its cosines and
// sines (full range reduction, accurate at any position) are computed once into shared memory and used by
// all heads. Bytes are what bounds it: qkv is read once, q and the new cache rows are written once.
#include "common.cuh"
#include "rope_and_cache.h"

namespace mgm::cuda {

template <class Page>
__device__ void rope(const RopeParams& p) {
  __shared__ float cosine[kRopeMaxHalf], sine[kRopeMaxHalf];
  const int64_t t = blockIdx.x;
  const int half = p.half, d = 2 * half;
  const float* row = p.qkv + t * p.qkv_stride;
  const float position = static_cast<float>(p.positions[t]);
  for (int i = threadIdx.x; i < half; i += kRopeThreads) {
    const float angle = __fmul_rn(position, p.inv_freq[i]);
    cosine[i] = cosf(angle);
    sine[i] = sinf(angle);
  }
  __syncthreads();

  // Queries.
  float* out = p.out + t * p.heads * d;
  for (int at = threadIdx.x; at < p.heads * half; at += kRopeThreads) {
    const int head = at / half, i = at - head * half;
    const float a = row[head * d + i], b = row[head * d + half + i];
    out[head * d + i] = fmaf(-b, sine[i], a * cosine[i]);
    out[head * d + half + i] = fmaf(a, sine[i], b * cosine[i]);
  }

  // Keys and values.
  const int64_t slot = p.slots[t];
  if (slot < 0) return;
  if (slot >= p.slot_count) {
    if (threadIdx.x == 0) report(p.fault, FaultKind::cache_slot, slot, 0, p.slot_count, t);
    return;
  }
  const float* k = row + static_cast<int64_t>(p.heads) * d;
  const float* v = k + static_cast<int64_t>(p.kv_heads) * d;
  const int64_t page = slot / p.page_size, offset = slot - page * p.page_size;
  for (int at = threadIdx.x; at < p.kv_heads * half; at += kRopeThreads) {
    const int head = at / half, i = at - head * half;
    const int64_t to = ((page * p.kv_heads + head) * p.page_size + offset) * d + i;
    const float a = k[head * d + i], b = k[head * d + half + i];
    Page* k_pages = static_cast<Page*>(p.k_pages) + to;
    Page* v_pages = static_cast<Page*>(p.v_pages) + to;
    k_pages[0] = from_float<Page>(fmaf(-b, sine[i], a * cosine[i]));
    k_pages[half] = from_float<Page>(fmaf(a, sine[i], b * cosine[i]));
    v_pages[0] = from_float<Page>(v[head * d + i]);
    v_pages[half] = from_float<Page>(v[head * d + half + i]);
  }
}

#define ROPE(name, Page)                                                                                  \
  extern "C" __global__ void __launch_bounds__(kRopeThreads) name(const __grid_constant__ RopeParams p) { \
    rope<Page>(p);                                                                                        \
  }
ROPE(rope_and_cache_f32, float)
ROPE(rope_and_cache_bf16, __nv_bfloat16)
ROPE(rope_and_cache_f16, __half)

}  // namespace mgm::cuda
