// The SIMD vocabulary of kernel files: `vf` is a vector of kWidth floats, `vi` of as many int32. One
// definition per instruction set, chosen by the compiler flags of the translation unit (CMake compiles each
// kernel file three times).
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace mgm::cpu::MGM_ISA {

#if defined(__AVX512F__)

inline constexpr int kWidth = 16;
struct vf {
  __m512 v;
};
struct vi {
  __m512i v;
};
static inline vf load(const float* p) {
  return {_mm512_loadu_ps(p)};
}
static inline void store(float* p, vf a) {
  _mm512_storeu_ps(p, a.v);
}
static inline __mmask16 tail_mask(int n) {
  return static_cast<__mmask16>((1u << n) - 1u);
}
// The first n (0 <= n < kWidth) lanes; the others are 0 and their memory is not touched.
static inline vf load_n(const float* p, int n) {
  return {_mm512_maskz_loadu_ps(tail_mask(n), p)};
}
static inline void store_n(float* p, vf a, int n) {
  _mm512_mask_storeu_ps(p, tail_mask(n), a.v);
}
static inline vf set1(float x) {
  return {_mm512_set1_ps(x)};
}
static inline vf operator+(vf a, vf b) {
  return {_mm512_add_ps(a.v, b.v)};
}
static inline vf operator-(vf a, vf b) {
  return {_mm512_sub_ps(a.v, b.v)};
}
static inline vf operator*(vf a, vf b) {
  return {_mm512_mul_ps(a.v, b.v)};
}
static inline vf operator/(vf a, vf b) {
  return {_mm512_div_ps(a.v, b.v)};
}
static inline vf fma(vf a, vf b, vf c) {
  return {_mm512_fmadd_ps(a.v, b.v, c.v)};
}  // a*b + c
static inline vf fnma(vf a, vf b, vf c) {
  return {_mm512_fnmadd_ps(a.v, b.v, c.v)};
}  // c - a*b
static inline vf max(vf a, vf b) {
  return {_mm512_max_ps(a.v, b.v)};
}  // NaN in either: b
static inline vf min(vf a, vf b) {
  return {_mm512_min_ps(a.v, b.v)};
}
static inline vf sqrt(vf a) {
  return {_mm512_sqrt_ps(a.v)};
}
static inline vf abs(vf a) {
  return {_mm512_abs_ps(a.v)};
}
static inline vf copysign(vf mag, vf sgn) {
  return {_mm512_castsi512_ps(_mm512_ternarylogic_epi32(
      _mm512_set1_epi32(INT32_MIN), _mm512_castps_si512(sgn.v), _mm512_castps_si512(mag.v), 0xCA))};
}
static inline vf select_lt(vf a, vf b, vf yes, vf no) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), no.v, yes.v)};
}
static inline vi to_int(vf a) {
  return {_mm512_cvtps_epi32(a.v)};
}  // rounds to nearest even
static inline vf to_float(vi a) {
  return {_mm512_cvtepi32_ps(a.v)};
}
static inline vf pow2(vi e) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(e.v, _mm512_set1_epi32(127)), 23))};
}
static inline float sum(vf a) {
  return _mm512_reduce_add_ps(a.v);
}
static inline float max_lane(vf a) {
  return _mm512_reduce_max_ps(a.v);
}
static inline vf load_bf16(const uint16_t* p) {
  return {_mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16))};
}
static inline vf load_f16(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))};
}
static inline vf load_i8(const int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)))};
}
static inline void store_f16(uint16_t* p, vf a) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
static inline void store_u8(uint8_t* p, vi a) {
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(a.v));
}  // the lowest byte of each

#elif defined(__AVX2__)

inline constexpr int kWidth = 8;
struct vf {
  __m256 v;
};
struct vi {
  __m256i v;
};
static inline __m256i tail_mask(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
static inline vf load(const float* p) {
  return {_mm256_loadu_ps(p)};
}
static inline void store(float* p, vf a) {
  _mm256_storeu_ps(p, a.v);
}
static inline vf load_n(const float* p, int n) {
  return {_mm256_maskload_ps(p, tail_mask(n))};
}
static inline void store_n(float* p, vf a, int n) {
  _mm256_maskstore_ps(p, tail_mask(n), a.v);
}
static inline vf set1(float x) {
  return {_mm256_set1_ps(x)};
}
static inline vf operator+(vf a, vf b) {
  return {_mm256_add_ps(a.v, b.v)};
}
static inline vf operator-(vf a, vf b) {
  return {_mm256_sub_ps(a.v, b.v)};
}
static inline vf operator*(vf a, vf b) {
  return {_mm256_mul_ps(a.v, b.v)};
}
static inline vf operator/(vf a, vf b) {
  return {_mm256_div_ps(a.v, b.v)};
}
static inline vf fma(vf a, vf b, vf c) {
  return {_mm256_fmadd_ps(a.v, b.v, c.v)};
}
static inline vf fnma(vf a, vf b, vf c) {
  return {_mm256_fnmadd_ps(a.v, b.v, c.v)};
}
static inline vf max(vf a, vf b) {
  return {_mm256_max_ps(a.v, b.v)};
}
static inline vf min(vf a, vf b) {
  return {_mm256_min_ps(a.v, b.v)};
}
static inline vf sqrt(vf a) {
  return {_mm256_sqrt_ps(a.v)};
}
static inline vf abs(vf a) {
  return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)};
}
static inline vf copysign(vf mag, vf sgn) {
  const __m256 s = _mm256_set1_ps(-0.0f);
  return {_mm256_or_ps(_mm256_and_ps(s, sgn.v), _mm256_andnot_ps(s, mag.v))};
}
static inline vf select_lt(vf a, vf b, vf yes, vf no) {
  return {_mm256_blendv_ps(no.v, yes.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))};
}
static inline vi to_int(vf a) {
  return {_mm256_cvtps_epi32(a.v)};
}
static inline vf to_float(vi a) {
  return {_mm256_cvtepi32_ps(a.v)};
}
static inline vf pow2(vi e) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(e.v, _mm256_set1_epi32(127)), 23))};
}
static inline float sum(vf a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
static inline float max_lane(vf a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
static inline vf load_bf16(const uint16_t* p) {
  return {
      _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16))};
}
static inline vf load_f16(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p))};
}
static inline vf load_i8(const int8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)))};
}
static inline void store_f16(uint16_t* p, vf a) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
static inline void store_u8(uint8_t* p, vi a) {
  typedef uint8_t bytes __attribute__((vector_size(8)));
  const bytes b = __builtin_convertvector((__v8si)a.v, bytes);
  std::memcpy(p, &b, 8);
}

#else

// GCC and Clang lower these vectors to SSE, NEON or plain scalars.
inline constexpr int kWidth = 4;
typedef float vf_raw __attribute__((vector_size(16)));
typedef int32_t vi_raw __attribute__((vector_size(16)));
struct vf {
  vf_raw v;
};
struct vi {
  vi_raw v;
};
static inline vf load(const float* p) {
  vf a;
  std::memcpy(&a.v, p, 16);
  return a;
}
static inline void store(float* p, vf a) {
  std::memcpy(p, &a.v, 16);
}
static inline vf load_n(const float* p, int n) {
  vf a = {vf_raw{0, 0, 0, 0}};
  std::memcpy(&a.v, p, sizeof(float) * static_cast<size_t>(n));
  return a;
}
static inline void store_n(float* p, vf a, int n) {
  std::memcpy(p, &a.v, sizeof(float) * static_cast<size_t>(n));
}
static inline vf set1(float x) {
  return {vf_raw{x, x, x, x}};
}
static inline vf operator+(vf a, vf b) {
  return {a.v + b.v};
}
static inline vf operator-(vf a, vf b) {
  return {a.v - b.v};
}
static inline vf operator*(vf a, vf b) {
  return {a.v * b.v};
}
static inline vf operator/(vf a, vf b) {
  return {a.v / b.v};
}
static inline vf fma(vf a, vf b, vf c) {
  return {a.v * b.v + c.v};
}
static inline vf fnma(vf a, vf b, vf c) {
  return {c.v - a.v * b.v};
}
static inline vf max(vf a, vf b) {
  return {a.v > b.v ? a.v : b.v};
}
static inline vf min(vf a, vf b) {
  return {a.v < b.v ? a.v : b.v};
}
static inline vf sqrt(vf a) {
  for (int i = 0; i < 4; ++i) a.v[i] = __builtin_sqrtf(a.v[i]);
  return a;
}
static inline vf abs(vf a) {
  return {(vf_raw)((vi_raw)a.v & 0x7fffffff)};
}
static inline vf copysign(vf mag, vf sgn) {
  return {(vf_raw)(((vi_raw)mag.v & 0x7fffffff) | ((vi_raw)sgn.v & INT32_MIN))};
}
static inline vf select_lt(vf a, vf b, vf yes, vf no) {
  return {a.v < b.v ? yes.v : no.v};
}
static inline vi to_int(vf a) {
  vi r;
  for (int i = 0; i < 4; ++i) r.v[i] = static_cast<int32_t>(__builtin_rintf(a.v[i]));
  return r;
}
static inline vf to_float(vi a) {
  return {__builtin_convertvector(a.v, vf_raw)};
}
static inline vf pow2(vi e) {
  return {(vf_raw)((e.v + 127) << 23)};
}
static inline float sum(vf a) {
  return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]);
}
static inline float max_lane(vf a) {
  const float x = a.v[0] > a.v[1] ? a.v[0] : a.v[1], y = a.v[2] > a.v[3] ? a.v[2] : a.v[3];
  return x > y ? x : y;
}
static inline vf load_bf16(const uint16_t* p) {
  const vi_raw w = {p[0], p[1], p[2], p[3]};
  return {(vf_raw)(w << 16)};
}
static inline uint16_t f32_to_f16(float x);
static inline vf load_f16(const uint16_t* p) {
  // Exponent and mantissa in place, then times 2^112: exact, subnormals too. 65536 and up was infinity or
  // NaN.
  const vi_raw h = {p[0], p[1], p[2], p[3]};
  const vf_raw x = (vf_raw)((h & 0x7fff) << 13) * vf_raw{0x1p112f, 0x1p112f, 0x1p112f, 0x1p112f};
  const vi_raw special = (x >= 65536.0f) & 0x7f800000;
  return {(vf_raw)((vi_raw)x | special | (h & 0x8000) << 16)};
}
static inline vf load_i8(const int8_t* p) {
  typedef int8_t bytes __attribute__((vector_size(4)));
  bytes b;
  std::memcpy(&b, p, 4);
  return to_float({__builtin_convertvector(b, vi_raw)});
}
static inline void store_f16(uint16_t* p, vf a) {
  for (int i = 0; i < 4; ++i) p[i] = f32_to_f16(a.v[i]);
}
static inline void store_u8(uint8_t* p, vi a) {
  typedef uint8_t bytes __attribute__((vector_size(4)));
  const bytes b = __builtin_convertvector(a.v, bytes);
  std::memcpy(p, &b, 4);
}

#endif

static inline float bits_to_f32(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
static inline uint32_t f32_to_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}
static inline float bf16_to_f32(uint16_t h) {
  return bits_to_f32(static_cast<uint32_t>(h) << 16);
}
static inline uint16_t f32_to_bf16(float x) {  // round to nearest even; NaN stays NaN
  const uint32_t u = f32_to_bits(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((u >> 16) | 0x40u);
  return static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
static inline float f16_to_f32(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, exp = (h >> 10) & 0x1fu, man = h & 0x3ffu;
  if (exp == 31) return bits_to_f32(sign | 0x7f800000u | (man << 13));
  if (exp != 0) return bits_to_f32(sign | ((exp + 112u) << 23) | (man << 13));
  const float sub = static_cast<float>(man) * 0x1p-24f;
  return sign ? -sub : sub;
}
static inline uint16_t f32_to_f16(float x) {  // round to nearest even, overflow to infinity
  const uint32_t u = f32_to_bits(x), sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (a >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (a < 0x38800000u) {                        // subnormal or zero: let the float adder round
    const float magic = bits_to_f32(a) + 0.5f;  // 0.5 has ulp 2^-24
    return static_cast<uint16_t>(sign | (f32_to_bits(magic) - 0x3f000000u));
  }
  const uint32_t r = a + 0xfffu + ((a >> 13) & 1u) - 0x38000000u;
  return static_cast<uint16_t>(sign | (r >> 13));
}

// load and store, or as much of a vector as is left (at least 1) of a run.
static inline vf load_up_to(const float* p, int64_t left) {
  return left >= kWidth ? load(p) : load_n(p, static_cast<int>(left));
}
static inline void store_up_to(float* p, vf a, int64_t left) {
  if (left >= kWidth)
    store(p, a);
  else
    store_n(p, a, static_cast<int>(left));
}

// e^x to 2 ulp; 0 below -87.34 (no subnormals), +inf above 88.72; NaN stays NaN.
static inline vf exp(vf x) {
  const vf n = to_float(to_int(min(max(x * set1(1.44269504088896341f), set1(-126.0f)), set1(127.0f))));
  vf r = fnma(n, set1(0.693359375f), x);
  r = fnma(n, set1(-2.12194440e-4f), r);
  vf p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  vf e = fma(p, r * r, r + set1(1.0f)) * pow2(to_int(n));
  e = select_lt(x, set1(-87.33654f), set1(0.0f), e);
  e = select_lt(set1(88.72283f), x, set1(__builtin_inff()), e);
  return e;
}

}  // namespace mgm::cpu::MGM_ISA
