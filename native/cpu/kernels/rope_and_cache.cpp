// Rotary embedding of q and k and the write of k and v into KV pages. One token is a task: its cosines and
// sines (libm's, accurate at any position) are computed once and used by all heads. Bytes are what bounds it:
// qkv is read once, q and the new cache rows are written once.
#include <cmath>

#include "../kernels.h"
#include "../simd/simd.h"

namespace mgm::cpu::MGM_ISA {
namespace {

constexpr int64_t kMaxHalf = 256;

static void write_cache(DType dtype, void* pages, int64_t at, const float* x, int64_t n) {
  if (dtype == DType::f32) {
    std::memcpy(static_cast<float*>(pages) + at, x, sizeof(float) * static_cast<size_t>(n));
    return;
  }
  uint16_t* to = static_cast<uint16_t*>(pages) + at;
  int64_t i = 0;
  if (dtype == DType::bf16) {
    for (; i < n; ++i) to[i] = f32_to_bf16(x[i]);
  } else {
    for (; i + kWidth <= n; i += kWidth) store_f16(to + i, load(x + i));
    for (; i < n; ++i) to[i] = f32_to_f16(x[i]);
  }
}

// out = [x1 cos - x2 sin, x2 cos + x1 sin] for the halves x1, x2 of x [2 * half].
static void rotate(const float* x, const float* cosine, const float* sine, int64_t half, float* out) {
  int64_t i = 0;
  for (; i < half; i += kWidth) {
    const int n = half - i < kWidth ? static_cast<int>(half - i) : kWidth;
    const vf c = load(cosine + i), s = load(sine + i);
    if (n == kWidth) {
      const vf a = load(x + i), b = load(x + half + i);
      store(out + i, fnma(b, s, a * c));
      store(out + half + i, fma(a, s, b * c));
    } else {
      const vf a = load_n(x + i, n), b = load_n(x + half + i, n);
      store_n(out + i, fnma(b, s, a * c), n);
      store_n(out + half + i, fma(a, s, b * c), n);
    }
  }
}

}  // namespace

void rope_and_cache(const RopeAndCacheArgs& args, ThreadPool& pool) {
  const View &k_pages = args.k_pages, &v_pages = args.v_pages;
  const int64_t tokens = args.out.shape[0], heads = args.out.shape[1], d = args.out.shape[2], half = d / 2;
  const int64_t kv_heads = k_pages.shape[1], page_size = k_pages.shape[2];
  const int64_t slots = k_pages.shape[0] * page_size;
  const int32_t *position = args.positions.i32(), *slot = args.slots.i32();
  const int64_t position_step = args.positions.strides[0], slot_step = args.slots.strides[0];
  if (half > kMaxHalf)
    fail("expected at most %lld for the head dimension but received %lld",
         static_cast<long long>(2 * kMaxHalf), static_cast<long long>(d));
  for (int64_t t = 0; t < tokens; ++t)
    if (slot[t * slot_step] >= slots)
      fail("expected a slot below %lld (or a negative one) for token %lld but received %d",
           static_cast<long long>(slots), static_cast<long long>(t), slot[t * slot_step]);

  pool.parallel_for(tokens, 4, [&](int64_t begin, int64_t end) {
    float cosine[kMaxHalf + kWidth] = {}, sine[kMaxHalf + kWidth] = {}, turned[2 * kMaxHalf];
    for (int64_t t = begin; t < end; ++t) {
      const float* row = args.qkv.f32() + t * args.qkv.strides[0];
      const float at = static_cast<float>(position[t * position_step]);
      for (int64_t i = 0; i < half; ++i) {
        const float angle = at * args.inv_freq.f32()[i * args.inv_freq.strides[0]];
        cosine[i] = cosf(angle);
        sine[i] = sinf(angle);
      }
      float* out = args.out.f32() + t * args.out.strides[0];
      for (int64_t h = 0; h < heads; ++h) rotate(row + h * d, cosine, sine, half, out + h * d);
      const int64_t to = slot[t * slot_step];
      if (to < 0) continue;
      const float *k = row + heads * d, *v = k + kv_heads * d;
      for (int64_t h = 0; h < kv_heads; ++h) {
        rotate(k + h * d, cosine, sine, half, turned);
        write_cache(k_pages.dtype, k_pages.data,
                    to / page_size * k_pages.strides[0] + h * k_pages.strides[1] +
                        to % page_size * k_pages.strides[2],
                    turned, d);
        write_cache(v_pages.dtype, v_pages.data,
                    to / page_size * v_pages.strides[0] + h * v_pages.strides[1] +
                        to % page_size * v_pages.strides[2],
                    v + h * d, d);
      }
    }
  });
}

}  // namespace mgm::cpu::MGM_ISA
