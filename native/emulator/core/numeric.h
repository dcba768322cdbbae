// Number formats of the GPU, bit by bit: f16, bf16, tf32, e4m3, e5m2, and rounding by direction.
#pragma once
#include <immintrin.h>

#include <cmath>
#include <cstdint>

#include "exec.h"

namespace mgm::emulator {

enum Round : uint8_t { rn, rz, rm, rp, rna };

// Magnitude rounded to `mantissa` explicit bits and `exponent_min` (unbiased exponent of the smallest
// normal), exact for every finite double. The result is a double that the format represents, unless it
// overflows.
inline double round_to(double v, int mantissa, int exponent_min, Round mode) {
  if (v == 0 || !std::isfinite(v)) return v;
  int e = std::ilogb(v);
  if (e < exponent_min) e = exponent_min;
  double scaled = std::ldexp(v, mantissa - e);  // exact: subnormal doubles cannot arise for the formats used
  double r;
  switch (mode) {
    case rn:
      r = std::nearbyint(scaled);
      break;
    case rz:
      r = std::trunc(scaled);
      break;
    case rm:
      r = std::floor(scaled);
      break;
    case rp:
      r = std::ceil(scaled);
      break;
    default:
      r = std::round(scaled);
  }
  r = std::ldexp(r, e - mantissa);
  return r == 0 ? std::copysign(0.0, v) : r;
}

inline float f32(uint32_t b) {
  return bits_as<float>(b);
}
inline uint32_t bits(float f) {
  return bits_as<uint32_t>(f);
}

inline float from_half(uint16_t h) {
  return _cvtsh_ss(h);
}
inline float from_bf16(uint16_t h) {
  return f32(static_cast<uint32_t>(h) << 16);
}

// Overflow: infinity, or the largest finite value where the rounding points to zero.
inline bool overflow_is_finite(Round mode, bool negative) {
  return mode == rz || (mode == rm && !negative) || (mode == rp && negative);
}
inline uint16_t to_half(double v, Round mode = rn) {
  if (std::isnan(v)) return 0x7fff;
  uint16_t sign = std::signbit(v) ? 0x8000 : 0;
  double r = std::fabs(round_to(v, 10, -14, mode));
  if (r > 65504) return sign | (std::isfinite(v) && overflow_is_finite(mode, sign) ? 0x7bff : 0x7c00);
  if (r < 0x1p-14) return static_cast<uint16_t>(sign | static_cast<int>(r * 0x1p24));
  int e = std::ilogb(r);
  return static_cast<uint16_t>(sign | ((e + 15) << 10) | (static_cast<int>(std::ldexp(r, 10 - e)) & 0x3ff));
}
inline uint16_t half_rn(float v) {
  return v != v ? uint16_t{0x7fff} : static_cast<uint16_t>(_cvtss_sh(v, _MM_FROUND_TO_NEAREST_INT));
}
inline uint16_t bf16_rn(float v) {
  uint32_t b = bits(v);
  uint32_t r = (b + 0x7fff + (b >> 16 & 1)) >> 16;
  return static_cast<uint16_t>(v != v ? 0x7fff : r);
}
inline uint16_t to_bf16(double v, Round mode = rn) {
  if (std::isnan(v)) return 0x7fff;
  double r = round_to(v, 7, -126, mode);
  uint32_t sign = std::signbit(v) ? 0x8000 : 0;
  if (std::fabs(r) > 0x1.fep127)
    return static_cast<uint16_t>(sign |
                                 (std::isfinite(v) && overflow_is_finite(mode, sign) ? 0x7f7f : 0x7f80));
  return static_cast<uint16_t>(bits(static_cast<float>(r)) >> 16);
}
inline float to_float(double v, Round mode) {
  if (std::isnan(v)) return f32(0x7fffffff);
  if (std::isinf(v)) return static_cast<float>(v);
  double r = round_to(v, 23, -126, mode);
  if (std::fabs(r) > 0x1.fffffep127) {
    bool negative = std::signbit(v);
    float m = overflow_is_finite(mode, negative) ? 0x1.fffffep127f : INFINITY;
    return negative ? -m : m;
  }
  return static_cast<float>(r);
}
// a + b rounded to odd: a later rounding to 50 bits or fewer is then the only one that shows.
inline double add_odd(double a, double b) {
  volatile double s = a + b;
  double sum = s;
  if (!std::isfinite(sum)) return sum;
  volatile double bb = sum - a;
  volatile double ea = a - (sum - bb);
  volatile double eb = b - bb;
  double err = ea + eb;
  if (err != 0) {
    int64_t i = bits_as<int64_t>(sum);
    if (!(i & 1)) {
      bool up = (err > 0) == (sum > 0);
      i += up ? 1 : -1;
      sum = bits_as<double>(i);
    }
  }
  return sum;
}

// tf32: round to nearest, ties away (the only mode before sm_90), or to even.
inline uint32_t to_tf32(float v, Round mode) {
  uint32_t b = bits(v);
  if (v != v) return 0x7fffffff;
  if ((b & 0x7f800000) == 0x7f800000) return b;
  if (mode == rna) return (b + 0x1000) & ~0x1fffu;
  if (mode == rz) return b & ~0x1fffu;
  return (b + 0xfff + (b >> 13 & 1)) & ~0x1fffu;
}

// OCP 8-bit floats. e4m3 has no infinity (0x7f is NaN); conversions saturate to the largest finite value.
inline float from_e4m3(uint8_t b) {
  int e = b >> 3 & 15, m = b & 7;
  float v = (b & 0x7f) == 0x7f ? f32(0x7fffffff)
            : e                ? std::ldexp(1.0f + static_cast<float>(m) / 8, e - 7)
                               : std::ldexp(static_cast<float>(m), -9);
  return b & 0x80 ? -v : v;
}
inline float from_e5m2(uint8_t b) {
  return from_half(static_cast<uint16_t>(b << 8));
}
inline uint8_t to_e4m3(double v) {
  if (std::isnan(v)) return 0x7f;
  uint8_t sign = std::signbit(v) ? 0x80 : 0;
  double r = std::fabs(round_to(v, 3, -6, rn));
  if (r > 448) return sign | 0x7e;
  if (r < 0x1p-6) return static_cast<uint8_t>(sign | static_cast<int>(r * 512));
  int e = std::ilogb(r);
  return static_cast<uint8_t>(sign | ((e + 7) << 3) | (static_cast<int>(std::ldexp(r, 3 - e)) & 7));
}
inline uint8_t to_e5m2(double v) {
  if (std::isnan(v)) return 0x7f;
  uint8_t sign = std::signbit(v) ? 0x80 : 0;
  double r = std::fabs(round_to(v, 2, -14, rn));
  if (r > 57344) return sign | 0x7b;
  if (r < 0x1p-14) return static_cast<uint8_t>(sign | static_cast<int>(r * 65536));
  int e = std::ilogb(r);
  return static_cast<uint8_t>(sign | ((e + 15) << 2) | (static_cast<int>(std::ldexp(r, 2 - e)) & 3));
}

inline float flush(float v) {
  return f32((bits(v) & 0x7f800000) ? bits(v) : bits(v) & 0x80000000);
}
inline float canonical(float v) {
  return v != v ? f32(0x7fffffff) : v;
}

}  // namespace mgm::emulator
