// Weights [N, K] into panels (native/cpu/packed.h). A task packs one panel in blocks of 32 steps of K: rows
// are read along K, transposed in registers into a tile [32][kPanel] of f32 in L1 (bf16 and f16 survive the
// round trip), and encoded row by row, where the quantized types find their extremes column-wise with
// vectors.
#include "../kernels.h"
#include "../packed.h"

namespace mgm::cpu::MGM_ISA {
namespace {

using Tile = float[kQuantBlock][kPanel];

struct Row {
  const uint8_t* data;  // null: a missing column, zeros
  DType dtype;
};

MGM_INLINE vf load_as_f32(const Row& row, int64_t k, int n) {
  if (!row.data) return set1(0.0f);
  if (row.dtype == DType::f32) {
    const float* p = reinterpret_cast<const float*>(row.data) + k;
    return n >= kWidth ? load(p) : load_n(p, n);
  }
  const uint16_t* p = reinterpret_cast<const uint16_t*>(row.data) + k;
  uint16_t padded[kWidth];
  if (n < kWidth) {
    std::memset(padded, 0, sizeof padded);
    std::memcpy(padded, p, static_cast<size_t>(n) * 2);
    p = padded;
  }
  return row.dtype == DType::bf16 ? load_bf16(p) : load_f16(p);
}

// r[i] lane j <-> r[j] lane i.
MGM_INLINE void transpose(vf* r) {
#if defined(__AVX512F__)
  __m512 t[16];
  for (int i = 0; i < 16; i += 4) {
    const __m512 a = _mm512_unpacklo_ps(r[i].v, r[i + 1].v), b = _mm512_unpackhi_ps(r[i].v, r[i + 1].v);
    const __m512 c = _mm512_unpacklo_ps(r[i + 2].v, r[i + 3].v),
                 d = _mm512_unpackhi_ps(r[i + 2].v, r[i + 3].v);
    t[i] = _mm512_shuffle_ps(a, c, 0x44);
    t[i + 1] = _mm512_shuffle_ps(a, c, 0xee);
    t[i + 2] = _mm512_shuffle_ps(b, d, 0x44);
    t[i + 3] = _mm512_shuffle_ps(b, d, 0xee);
  }
  // t[4g + c] holds, in 128-bit lane l, column 4l + c of rows 4g .. 4g+3.
  for (int c = 0; c < 4; ++c) {
    const __m512 a = _mm512_shuffle_f32x4(t[c], t[4 + c], 0x88),
                 b = _mm512_shuffle_f32x4(t[8 + c], t[12 + c], 0x88);
    const __m512 d = _mm512_shuffle_f32x4(t[c], t[4 + c], 0xdd),
                 e = _mm512_shuffle_f32x4(t[8 + c], t[12 + c], 0xdd);
    r[c].v = _mm512_shuffle_f32x4(a, b, 0x88);
    r[8 + c].v = _mm512_shuffle_f32x4(a, b, 0xdd);
    r[4 + c].v = _mm512_shuffle_f32x4(d, e, 0x88);
    r[12 + c].v = _mm512_shuffle_f32x4(d, e, 0xdd);
  }
#elif defined(__AVX2__)
  __m256 t[8];
  for (int i = 0; i < 8; i += 4) {
    const __m256 a = _mm256_unpacklo_ps(r[i].v, r[i + 1].v), b = _mm256_unpackhi_ps(r[i].v, r[i + 1].v);
    const __m256 c = _mm256_unpacklo_ps(r[i + 2].v, r[i + 3].v),
                 d = _mm256_unpackhi_ps(r[i + 2].v, r[i + 3].v);
    t[i] = _mm256_shuffle_ps(a, c, 0x44);
    t[i + 1] = _mm256_shuffle_ps(a, c, 0xee);
    t[i + 2] = _mm256_shuffle_ps(b, d, 0x44);
    t[i + 3] = _mm256_shuffle_ps(b, d, 0xee);
  }
  for (int c = 0; c < 4; ++c) {
    r[c].v = _mm256_permute2f128_ps(t[c], t[4 + c], 0x20);
    r[4 + c].v = _mm256_permute2f128_ps(t[c], t[4 + c], 0x31);
  }
#else
  for (int i = 0; i < kWidth; ++i)
    for (int j = 0; j < i; ++j) {
      const float x = r[i].v[j];
      r[i].v[j] = r[j].v[i];
      r[j].v[i] = x;
    }
#endif
}

MGM_INLINE void load_tile(Tile& tile, const Row* rows, int64_t k, int n) {
  for (int c = 0; c < kPanel; c += kWidth)
    for (int i = 0; i < n; i += kWidth) {
      vf r[kWidth];
      for (int j = 0; j < kWidth; ++j) r[j] = load_as_f32(rows[c + j], k + i, n - i);
      transpose(r);
      for (int j = 0; j < kWidth; ++j) store(&tile[i + j][c], r[j]);
    }
}

void encode_bf16(const Tile& tile, int n, uint16_t* dst) {
  for (int i = 0; i < n; ++i)
    for (int c = 0; c < kWidth; ++c) {
      dst[i * kPanel + 2 * c] = f32_to_bf16(tile[i][c]);
      dst[i * kPanel + 2 * c + 1] = f32_to_bf16(tile[i][c + kWidth]);
    }
}

// Scales as f16, rounded up so that the largest magnitude still fits the integers.
MGM_INLINE uint16_t f16_at_least(float x) {
  if (x >= 65504.0f) return 0x7bff;
  uint16_t h = f32_to_f16(x);
  if (f16_to_f32(h) < x) ++h;
  return h;
}

constexpr uint16_t kF16Nan = 0x7e00;

// A block with a NaN or an infinity cannot be quantized; it becomes NaN so that the damage shows.
MGM_INLINE void extremes(const Tile& tile, int n, float* low, float* high, float* poison) {
  for (int c = 0; c < kPanel; c += kWidth) {
    vf lo = load(&tile[0][c]), hi = lo, bad = lo * set1(0.0f);
    for (int i = 1; i < n; ++i) {
      const vf w = load(&tile[i][c]);
      lo = min(lo, w);
      hi = max(hi, w);
      bad = fma(w, set1(0.0f), bad);
    }
    store(low + c, lo);
    store(high + c, hi);
    store(poison + c, bad);
  }
}

// round((w - min) * inverse) clamped to [least, most]
MGM_INLINE void quantize(const float* w, const float* min_of, const float* inverse, float least, float most,
                         int32_t* q) {
  for (int c = 0; c < kPanel; c += kWidth) {
    const vf x = (load(w + c) - load(min_of + c)) * load(inverse + c);
    const vi r = to_int(min(max(x, set1(least)), set1(most)));
    std::memcpy(q + c, &r, sizeof r);
  }
}

void encode_int8(const Tile& tile, int n, uint8_t* block) {
  float low[kPanel], high[kPanel], poison[kPanel], inverse[kPanel], zero[kPanel] = {};
  extremes(tile, n, low, high, poison);
  uint16_t* scales = reinterpret_cast<uint16_t*>(block);
  for (int c = 0; c < kPanel; ++c) {
    const float largest = -low[c] > high[c] ? -low[c] : high[c];
    scales[c] = poison[c] == 0.0f ? f16_at_least(largest / 127.0f) : kF16Nan;
    const float scale = f16_to_f32(scales[c]);
    inverse[c] = scale > 0.0f ? 1.0f / scale : 0.0f;
  }
  int8_t* q = reinterpret_cast<int8_t*>(scales + kPanel);
  std::memset(q, 0, static_cast<size_t>(kQuantBlock) * kPanel);
  for (int i = 0; i < n; ++i) {
    int32_t row[kPanel];
    quantize(tile[i], zero, inverse, -127.0f, 127.0f, row);
    for (int c = 0; c < kPanel; ++c) q[i * kPanel + c] = static_cast<int8_t>(row[c]);
  }
}

void encode_int4(const Tile& tile, int n, uint8_t* block) {
  float low[kPanel], high[kPanel], poison[kPanel], inverse[kPanel];
  extremes(tile, n, low, high, poison);
  uint16_t *scales = reinterpret_cast<uint16_t*>(block), *mins = scales + kPanel;
  for (int c = 0; c < kPanel; ++c) {
    const float clamped = low[c] < -65504.0f ? -65504.0f : low[c] > 65504.0f ? 65504.0f : low[c];
    const bool finite = poison[c] == 0.0f;
    mins[c] = finite ? f32_to_f16(clamped) : kF16Nan;
    low[c] = f16_to_f32(mins[c]);
    const float range = high[c] - low[c];
    scales[c] = finite ? f16_at_least(range > 0.0f ? range / 15.0f : 0.0f) : kF16Nan;
    const float scale = f16_to_f32(scales[c]);
    inverse[c] = scale > 0.0f ? 1.0f / scale : 0.0f;
  }
  uint32_t* q = reinterpret_cast<uint32_t*>(mins + kPanel);
  std::memset(q, 0, static_cast<size_t>(kQuantBlock / 2) * kPanel);
  for (int i = 0; i < n; ++i) {
    int32_t row[kPanel];
    quantize(tile[i], low, inverse, 0.0f, 15.0f, row);
    for (int c = 0; c < kPanel; ++c) q[i / 8 * kPanel + c] |= static_cast<uint32_t>(row[c]) << (i % 8 * 4);
  }
}

void pack_panel(const Row* rows, int64_t k_total, DType dtype, uint8_t* panel) {
  for (int64_t k = 0; k < k_total; k += kQuantBlock) {
    const int n = k_total - k < kQuantBlock ? static_cast<int>(k_total - k) : kQuantBlock;
    alignas(64) Tile tile;
    load_tile(tile, rows, k, n);
    switch (dtype) {
      case DType::bf16:
        encode_bf16(tile, n, reinterpret_cast<uint16_t*>(panel) + k * kPanel);
        break;
      case DType::f16: {
        uint16_t* dst = reinterpret_cast<uint16_t*>(panel) + k * kPanel;
        for (int i = 0; i < n; ++i)
          for (int c = 0; c < kPanel; c += kWidth) store_f16(dst + i * kPanel + c, load(&tile[i][c]));
        break;
      }
      case DType::int8:
        encode_int8(tile, n, panel + static_cast<size_t>(k / kQuantBlock) * quant_block_bytes(dtype));
        break;
      case DType::int4:
        encode_int4(tile, n, panel + static_cast<size_t>(k / kQuantBlock) * quant_block_bytes(dtype));
        break;
      default:
        std::memcpy(reinterpret_cast<float*>(panel) + k * kPanel, tile,
                    static_cast<size_t>(n) * kPanel * sizeof(float));
    }
  }
  // Padding is read (never multiplied): keep it defined.
  if (!is_quantized(dtype)) {
    const size_t used = static_cast<size_t>(k_total) * kPanel * (dtype == DType::f32 ? 4 : 2);
    std::memset(panel + used, 0, panel_bytes(dtype, k_total) - used);
  }
}

}  // namespace

size_t packed_bytes(DType dtype, Layout layout, int64_t n, int64_t k) {
  return static_cast<size_t>(panel_count(layout, n)) * panel_bytes(dtype, k);
}

void pack_linear(const PackLinearArgs& args, ThreadPool& pool) {
  const int64_t n = args.out.shape[0], k = args.out.shape[1];
  const bool gated = args.out.layout == Layout::gated_panels;
  const size_t stride = panel_bytes(args.out.dtype, k);
  pool.parallel_for(panel_count(args.out.layout, n), 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t first = (gated ? panel / 2 : panel) * kPanel, offset = gated && panel & 1 ? n / 2 : 0;
      const int64_t limit = gated ? n / 2 : n;
      Row rows[kPanel];
      for (int c = 0; c < kPanel; ++c) {
        rows[c] = {nullptr, DType::f32};
        if (first + c >= limit) continue;
        int64_t r = first + c + offset;
        const View* w = args.weights;
        while (r >= w->shape[0]) r -= (w++)->shape[0];
        rows[c] = {w->u8() + r * w->strides[0] * (w->dtype == DType::f32 ? 4 : 2), w->dtype};
      }
      pack_panel(rows, k, args.out.dtype, args.out.u8() + static_cast<size_t>(panel) * stride);
    }
  });
}

}  // namespace mgm::cpu::MGM_ISA
