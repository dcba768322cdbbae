// Floating-point arithmetic by long integers: exact results, then one rounding. The oracle of core_float.cpp
// and core_convert.cpp; the emulator computes in the host's floats.
#pragma once
#include <array>
#include <cstdint>

namespace mgm::emulator::test {

struct Format {
  int bits, precision, least;  // least: exponent of the last place of subnormals
  uint64_t largest, infinity, nan;
};
inline constexpr Format kF64{64, 53, -1074, 0x7fefffffffffffff, 0x7ff0000000000000, 0x7fffffffffffffff},
    kF32{32, 24, -149, 0x7f7fffff, 0x7f800000, 0x7fffffff}, kF16{16, 11, -24, 0x7bff, 0x7c00, 0x7fff},
    kBf16{16, 8, -133, 0x7f7f, 0x7f80, 0x7fff}, kTf32{19, 11, -136, 0x3fbff, 0x3fc00, 0x3ffff},
    kE4m3{8, 4, -9, 0x7e, 0x7e, 0x7f}, kE5m2{8, 3, -16, 0x7b, 0x7c, 0x7f};

// (-1)^negative * m * 2^e, or something special.
struct Value {
  enum Kind : uint8_t { number, infinite, nan } kind = number;
  bool negative = false;
  unsigned __int128 m = 0;
  int e = 0;
  bool zero() const { return kind == number && m == 0; }
};
inline Value decode(uint64_t bits, const Format& f) {
  Value v;
  v.negative = bits >> (f.bits - 1) & 1;
  bits &= (uint64_t{1} << (f.bits - 1)) - 1;
  if (bits > f.largest) {
    v.kind = bits == f.infinity ? Value::infinite : Value::nan;
    return v;
  }
  const uint64_t exponent = bits >> (f.precision - 1),
                 fraction = bits & ((uint64_t{1} << (f.precision - 1)) - 1);
  v.m = exponent ? fraction | uint64_t{1} << (f.precision - 1) : fraction;
  v.e = f.least + (exponent ? static_cast<int>(exponent) - 1 : 0);
  return v;
}

// A sum of Values as one long number.
class Sum {
 public:
  void add(const Value& v) {
    std::array<uint64_t, kWords> x{};
    const int at = v.e + kPoint;
    for (int k = 0; k < 3; ++k) {
      const int from = 64 * k - at % 64;  // bits of m that fall into this word
      x[static_cast<size_t>(at / 64 + k)] = static_cast<uint64_t>(from >= 128 ? 0
                                                                  : from >= 0 ? v.m >> from
                                                                              : v.m << -from);
    }
    if (v.negative == negative_) {
      unsigned __int128 carry = 0;
      for (size_t i = 0; i < kWords; ++i) {
        carry += static_cast<unsigned __int128>(w_[i]) + x[i];
        w_[i] = static_cast<uint64_t>(carry);
        carry >>= 64;
      }
    } else {
      bool larger = false;
      for (size_t i = kWords; i-- > 0;)
        if (w_[i] != x[i]) {
          larger = w_[i] < x[i];
          break;
        }
      const auto &big = larger ? x : w_, &small = larger ? w_ : x;
      std::array<uint64_t, kWords> r{};
      bool borrow = false;
      for (size_t i = 0; i < kWords; ++i) {
        const unsigned __int128 take = static_cast<unsigned __int128>(small[i]) + borrow;
        borrow = big[i] < take;
        r[i] = big[i] - static_cast<uint64_t>(take);
      }
      w_ = r;
      negative_ ^= larger;
    }
  }
  bool zero() const {
    for (uint64_t w : w_)
      if (w) return false;
    return true;
  }
  bool negative() const { return negative_; }

  // `mode`: 'n' to nearest even, 'z' to zero, 'm' down, 'p' up, 'a' to nearest, ties away.
  uint64_t round(const Format& f, char mode) const {
    const uint64_t sign = negative_ ? uint64_t{1} << (f.bits - 1) : 0;
    int top = 64 * kWords - 1;
    while (top >= 0 && !bit(top)) --top;
    if (top < 0) return sign;
    int last = std::max(top - (f.precision - 1), f.least + kPoint);  // of the result
    uint64_t n = 0;
    for (int i = std::max(top, last); i >= last; --i) n = n * 2 + bit(i);
    const bool half = bit(last - 1);
    bool rest = false;
    for (int i = last - 2; i >= 0 && !rest; --i) rest = bit(i);
    const bool up = mode == 'n'   ? half && (rest || n % 2)
                    : mode == 'a' ? half
                    : mode == 'm' ? negative_ && (half || rest)
                    : mode == 'p' ? !negative_ && (half || rest)
                                  : false;
    n += up;
    const uint64_t one = uint64_t{1} << (f.precision - 1);
    if (n == 2 * one) {
      n = one;
      ++last;
    }
    const uint64_t r =
        n < one ? n : (static_cast<uint64_t>(last - kPoint - f.least + 1) << (f.precision - 1)) + (n - one);
    if (r > f.largest || last - kPoint > 2000) {
      const bool finite = mode == 'z' || (mode == 'm' && !negative_) || (mode == 'p' && negative_);
      return sign | (finite ? f.largest : f.infinity);
    }
    return sign | r;
  }

 private:
  static constexpr int kWords = 72, kPoint = 2240;
  bool bit(int i) const { return i >= 0 && w_[static_cast<size_t>(i / 64)] >> (i % 64) & 1; }
  std::array<uint64_t, kWords> w_{};
  bool negative_ = false;
};

inline Value product(const Value& a, const Value& b) {
  return {Value::number, a.negative != b.negative, a.m * b.m, a.e + b.e};
}
// With one bit more than the quotient or the root, set where it is not exact.
inline Value quotient(Value a, const Value& b) {
  while (a.m && a.m >> 122 == 0) {
    a.m *= 2;
    --a.e;
  }
  return {Value::number, a.negative != b.negative, a.m / b.m * 2 + (a.m % b.m != 0), a.e - b.e - 1};
}
inline Value root(Value a) {
  while (a.m && (a.m >> 122 == 0 || a.e % 2 != 0)) {
    a.m *= 2;
    --a.e;
  }
  unsigned __int128 r = 0;
  for (int i = 62; i >= 0; --i) {
    const unsigned __int128 t = r | static_cast<unsigned __int128>(1) << i;
    if (t * t <= a.m) r = t;
  }
  return {Value::number, a.negative, r * 2 + (r * r != a.m), a.e / 2 - 1};
}

}  // namespace mgm::emulator::test
