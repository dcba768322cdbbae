// Layout of packed weights [N, K]: what pack_linear writes, gemm.cpp and embedding.cpp read.
//
// A panel holds kPanel neighbouring output columns, interleaved along K, so that one step of k loads two
// vectors of weights. Panel p (columns p*kPanel ...; missing ones are zero) starts at p * panel_bytes; in
// gated_panels panel 2j holds gate columns and panel 2j+1 the up columns of the same outputs. Inside a panel:
//   f32, f16  [K][kPanel]
//   bf16      [K][kWidth] words, column i in the low half and column i + kWidth in the high half: one load,
//   one
//             shift and one mask make both vectors
//   int8      blocks of 32 along K: f16 scale[kPanel], int8 q[32][kPanel]; w = q * scale (exact in f32)
//   int4      blocks of 32 along K: f16 scale[kPanel], f16 min[kPanel], 32-bit words q[4][kPanel], the word
//             of a column holding eight steps, the first in the lowest four bits; w = q * scale + min (one
//             rounding with FMA)
// K is padded to even (quantized: to 32) so that kernels may read pairs; the padding is never multiplied.
#pragma once
#include "../runtime/view.h"
#include "simd/simd.h"

namespace mgm::cpu::MGM_ISA {

inline constexpr int kPanel = 2 * kWidth;
inline constexpr int kQuantBlock = 32;

static inline bool is_quantized(DType dtype) {
  return dtype == DType::int8 || dtype == DType::int4;
}

// Bytes of one quantized block of a panel.
static inline size_t quant_block_bytes(DType dtype) {
  return static_cast<size_t>(dtype == DType::int8 ? kPanel * (2 + kQuantBlock)
                                                  : kPanel * (4 + kQuantBlock / 2));
}

static inline size_t panel_bytes(DType dtype, int64_t k) {
  const size_t steps = static_cast<size_t>(k);
  size_t bytes;
  if (is_quantized(dtype))
    bytes = (steps + kQuantBlock - 1) / kQuantBlock * quant_block_bytes(dtype);
  else
    bytes = ((steps + 1) & ~size_t{1}) * kPanel * (dtype == DType::f32 ? 4 : 2);
  return (bytes + 63) & ~size_t{63};
}

// n counts all rows of the packed matrix (gated: 2 * outputs).
static inline int64_t panel_count(Layout layout, int64_t n) {
  if (layout == Layout::gated_panels) return (n / 2 + kPanel - 1) / kPanel * 2;
  return (n + kPanel - 1) / kPanel;
}

// The four bits of each word that start at bit `shift`.
static inline vf load_nibbles(const uint32_t* p, int shift) {
#if defined(__AVX512F__)
  // The permutation looks at four bits only: mask and conversion in one instruction.
  const __m512 numbers = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i words = _mm512_loadu_si512(p);
  return {_mm512_permutexvar_ps((__m512i)((__v16su)words >> static_cast<unsigned>(shift)), numbers)};
#elif defined(__AVX2__)
  const __m256i words = _mm256_loadu_si256((const __m256i*)p);
  const __m256i shifted = (__m256i)((__v8su)words >> static_cast<unsigned>(shift));
  return {_mm256_cvtepi32_ps(_mm256_and_si256(shifted, _mm256_set1_epi32(15)))};
#else
  vi_raw words;
  std::memcpy(&words, p, sizeof words);
  return to_float({(words >> shift) & 15});
#endif
}

// The two columns of each bf16 word, see above.
static inline void load_bf16_words(const uint16_t* p, vf& low, vf& high) {
#if defined(__AVX512F__)
  const __m512i words = _mm512_loadu_si512(p);
  low = {_mm512_castsi512_ps(_mm512_slli_epi32(words, 16))};
  high = {_mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(-65536)))};
#elif defined(__AVX2__)
  const __m256i words = _mm256_loadu_si256((const __m256i*)p);
  low = {_mm256_castsi256_ps(_mm256_slli_epi32(words, 16))};
  high = {_mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(-65536)))};
#else
  vi_raw words;
  std::memcpy(&words, p, sizeof words);
  low = {(vf_raw)(words << 16)};
  high = {(vf_raw)(words & -65536)};
#endif
}

// Readers: constructed at a k that is a multiple of 32, they give the weights of steps i and i + 1 (i even,
// i < 32) as w[0], w[1] and w[2], w[3]. at(i) is where step i lies, kPairBytes how far apart pairs are.
struct ReadF32 {
  static constexpr int kPairBytes = 8 * kPanel;
  const float* p;
  MGM_INLINE ReadF32(const uint8_t* panel, int64_t k)
      : p(reinterpret_cast<const float*>(panel) + k * kPanel) {}
  MGM_INLINE const void* at(int i) const { return p + i * kPanel; }
  MGM_INLINE void pair(int i, vf* w) const {
    for (int j = 0; j < 4; ++j) w[j] = load(p + i * kPanel + j * kWidth);
  }
};

struct ReadBf16 {
  static constexpr int kPairBytes = 4 * kPanel;
  const uint16_t* p;
  MGM_INLINE ReadBf16(const uint8_t* panel, int64_t k)
      : p(reinterpret_cast<const uint16_t*>(panel) + k * kPanel) {}
  MGM_INLINE const void* at(int i) const { return p + i * kPanel; }
  MGM_INLINE void pair(int i, vf* w) const {
    load_bf16_words(p + i * kPanel, w[0], w[1]);
    load_bf16_words(p + (i + 1) * kPanel, w[2], w[3]);
  }
};

struct ReadF16 {
  static constexpr int kPairBytes = 4 * kPanel;
  const uint16_t* p;
  MGM_INLINE ReadF16(const uint8_t* panel, int64_t k)
      : p(reinterpret_cast<const uint16_t*>(panel) + k * kPanel) {}
  MGM_INLINE const void* at(int i) const { return p + i * kPanel; }
  MGM_INLINE void pair(int i, vf* w) const {
    for (int j = 0; j < 4; ++j) w[j] = load_f16(p + i * kPanel + j * kWidth);
  }
};

struct ReadInt8 {
  static constexpr int kPairBytes = 2 * kPanel;
  vf scale[2];
  const int8_t* q;
  MGM_INLINE ReadInt8(const uint8_t* panel, int64_t k) {
    const uint8_t* block = panel + static_cast<size_t>(k / kQuantBlock) * quant_block_bytes(DType::int8);
    const uint16_t* scales = reinterpret_cast<const uint16_t*>(block);
    scale[0] = load_f16(scales);
    scale[1] = load_f16(scales + kWidth);
    q = reinterpret_cast<const int8_t*>(scales + kPanel);
  }
  MGM_INLINE const void* at(int i) const { return q + i * kPanel; }
  MGM_INLINE void pair(int i, vf* w) const {
    for (int j = 0; j < 4; ++j) w[j] = load_i8(q + i * kPanel + j * kWidth) * scale[j & 1];
  }
};

struct ReadInt4 {
  static constexpr int kPairBytes = kPanel;
  vf scale[2], min[2];
  const uint32_t* q;
  MGM_INLINE ReadInt4(const uint8_t* panel, int64_t k) {
    const uint8_t* block = panel + static_cast<size_t>(k / kQuantBlock) * quant_block_bytes(DType::int4);
    const uint16_t* scales = reinterpret_cast<const uint16_t*>(block);
    for (int j = 0; j < 2; ++j) {
      scale[j] = load_f16(scales + j * kWidth);
      min[j] = load_f16(scales + kPanel + j * kWidth);
    }
    q = reinterpret_cast<const uint32_t*>(scales + 2 * kPanel);
  }
  MGM_INLINE const void* at(int i) const { return reinterpret_cast<const uint8_t*>(q) + i / 2 * kPanel; }
  MGM_INLINE void pair(int i, vf* w) const {
    for (int j = 0; j < 4; ++j) {
      const int column = (j & 1) * kWidth, step = i + j / 2;
      w[j] = fma(load_nibbles(q + step / 8 * kPanel + column, step % 8 * 4), scale[j & 1], min[j & 1]);
    }
  }
};

}  // namespace mgm::cpu::MGM_ISA
