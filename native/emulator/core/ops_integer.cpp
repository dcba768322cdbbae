// Integer arithmetic, logic, comparison and selection.
#include <algorithm>
#include <tuple>

#include "numeric.h"

namespace mgm::emulator {
namespace {

template <class T>
using Wide =
    std::conditional_t<sizeof(T) == 8, std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>,
                       std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>>;
template <class T>
using U = std::make_unsigned_t<T>;

struct Add {
  template <class T>
  static T call(T a, T b) {
    return static_cast<T>(U<T>(a) + U<T>(b));
  }
};
struct AddSat {
  template <class T>
  static T call(T a, T b) {
    T r;
    return __builtin_add_overflow(a, b, &r)
               ? (b < 0 ? std::numeric_limits<T>::min() : std::numeric_limits<T>::max())
               : r;
  }
};
struct SubSat {
  template <class T>
  static T call(T a, T b) {
    T r;
    return __builtin_sub_overflow(a, b, &r)
               ? (b > 0 ? std::numeric_limits<T>::min() : std::numeric_limits<T>::max())
               : r;
  }
};
struct Sub {
  template <class T>
  static T call(T a, T b) {
    return static_cast<T>(U<T>(a) - U<T>(b));
  }
};
struct MulLo {
  template <class T>
  static T call(T a, T b) {
    return static_cast<T>(static_cast<Wide<U<T>>>(U<T>(a)) * U<T>(b));
  }
};
struct MulHi {
  template <class T>
  static T call(T a, T b) {
    return static_cast<T>((static_cast<Wide<T>>(a) * b) >> (8 * sizeof(T)));
  }
};
template <class R>
struct MulWide {
  template <class T>
  static R call(T a, T b) {
    return static_cast<R>(a) * static_cast<R>(b);
  }
};
struct MadLo {
  template <class T>
  static T call(T a, T b, T c) {
    return Add::call(MulLo::call(a, b), c);
  }
};
struct MadHi {
  template <class T>
  static T call(T a, T b, T c) {
    return Add::call(MulHi::call(a, b), c);
  }
};
struct MadHiSat {
  template <class T>
  static T call(T a, T b, T c) {
    return AddSat::call(MulHi::call(a, b), c);
  }
};
template <class R>
struct MadWide {
  template <class T>
  static R call(T a, T b, R c) {
    return Add::call(MulWide<R>::call(a, b), c);
  }
};
template <class T>
int64_t low24(T a) {
  return std::is_signed_v<T> ? static_cast<int32_t>(static_cast<uint32_t>(a) << 8) >> 8
                             : static_cast<int64_t>(static_cast<uint32_t>(a) & 0xffffff);
}
struct Mul24Lo {
  template <class T>
  static T call(T a, T b) {
    return static_cast<T>(low24(a) * low24(b));
  }
};
struct Mul24Hi {
  template <class T>
  static T call(T a, T b) {
    return static_cast<T>((low24(a) * low24(b)) >> 16);
  }
};
struct Mad24Lo {
  template <class T>
  static T call(T a, T b, T c) {
    return Add::call(Mul24Lo::call(a, b), c);
  }
};
struct Mad24Hi {
  template <class T>
  static T call(T a, T b, T c) {
    return Add::call(Mul24Hi::call(a, b), c);
  }
};
struct Mad24HiSat {
  static int32_t call(int32_t a, int32_t b, int32_t c) { return AddSat::call(Mul24Hi::call(a, b), c); }
};
// Division by zero gives all ones on the hardware, the remainder gives the dividend.
struct Div {
  template <class T>
  static T call(T a, T b) {
    if (b == 0) return static_cast<T>(-1);
    if constexpr (std::is_signed_v<T>)
      if (b == -1) return static_cast<T>(U<T>(0) - U<T>(a));
    return static_cast<T>(a / b);
  }
};
struct Rem {
  template <class T>
  static T call(T a, T b) {
    if (b == 0) return a;
    if constexpr (std::is_signed_v<T>)
      if (b == -1) return 0;
    return static_cast<T>(a % b);
  }
};
struct Min {
  template <class T>
  static T call(T a, T b) {
    return a < b ? a : b;
  }
};
struct Max {
  template <class T>
  static T call(T a, T b) {
    return a > b ? a : b;
  }
};
struct Abs {
  template <class T>
  static T call(T a) {
    return a < 0 ? static_cast<T>(U<T>(0) - U<T>(a)) : a;
  }
};
struct Neg {
  template <class T>
  static T call(T a) {
    return static_cast<T>(U<T>(0) - U<T>(a));
  }
};
struct Sad {
  template <class T>
  static T call(T a, T b, T c) {
    return static_cast<T>(U<T>(c) + (a < b ? U<T>(b) - U<T>(a) : U<T>(a) - U<T>(b)));
  }
};
struct And {
  template <class T>
  static T call(T a, T b) {
    return a & b;
  }
};
struct Or {
  template <class T>
  static T call(T a, T b) {
    return a | b;
  }
};
struct Xor {
  template <class T>
  static T call(T a, T b) {
    return a ^ b;
  }
};
struct Not {
  template <class T>
  static T call(T a) {
    return static_cast<T>(~a);
  }
};
struct CNot {
  template <class T>
  static T call(T a) {
    return a == 0;
  }
};
struct Copy {
  template <class T>
  static T call(T a) {
    return a;
  }
};
struct Shl {
  template <class T>
  static T call(T a, uint32_t n) {
    return n >= 8 * sizeof(T) ? T(0) : static_cast<T>(U<T>(a) << n);
  }
};
struct Shr {
  template <class T>
  static T call(T a, uint32_t n) {
    return n >= 8 * sizeof(T) ? static_cast<T>(a < 0 ? -1 : 0) : static_cast<T>(a >> n);
  }
};
struct ShfLClamp {
  static uint32_t call(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t n = std::min(c, 32u);
    return n == 32 ? a : n == 0 ? b : b << n | a >> (32 - n);
  }
};
struct ShfLWrap {
  static uint32_t call(uint32_t a, uint32_t b, uint32_t c) { return ShfLClamp::call(a, b, c & 31); }
};
struct ShfRClamp {
  static uint32_t call(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t n = std::min(c, 32u);
    return n == 32 ? b : n == 0 ? a : b << (32 - n) | a >> n;
  }
};
struct ShfRWrap {
  static uint32_t call(uint32_t a, uint32_t b, uint32_t c) { return ShfRClamp::call(a, b, c & 31); }
};
struct Popc {
  template <class T>
  static uint32_t call(T a) {
    return static_cast<uint32_t>(__builtin_popcountll(a));
  }
};
struct Clz {
  template <class T>
  static uint32_t call(T a) {
    return a == 0           ? 8 * sizeof(T)
           : sizeof(T) == 8 ? __builtin_clzll(a)
                            : __builtin_clz(static_cast<uint32_t>(a));
  }
};
struct Brev {
  template <class T>
  static T call(T a) {
    T r = 0;
    for (size_t i = 0; i < 8 * sizeof(T); ++i) r |= (a >> i & 1) << (8 * sizeof(T) - 1 - i);
    return r;
  }
};
template <bool Shift>
struct Bfind {
  template <class T>
  static uint32_t call(T a) {
    U<T> v = U<T>(a);
    if (a < 0) v = ~v;
    if (v == 0) return ~0u;
    uint32_t top = 8 * sizeof(T) - 1 - Clz::call(v);
    return Shift ? 8 * sizeof(T) - 1 - top : top;
  }
};
struct Bfe {
  template <class T>
  static T call(T a, uint32_t b, uint32_t c) {
    constexpr uint32_t top = 8 * sizeof(T) - 1;
    uint32_t pos = b & 0xff, len = c & 0xff;
    bool sign = std::is_signed_v<T> && len && (U<T>(a) >> std::min(pos + len - 1, top) & 1);
    U<T> v = pos > top ? 0 : U<T>(a) >> pos;
    uint32_t have = pos > top ? 0 : std::min(len, top + 1 - pos);
    U<T> keep = have > top ? ~U<T>(0) : (U<T>(1) << have) - 1;
    return static_cast<T>((v & keep) | (sign ? static_cast<U<T>>(~keep) : 0));
  }
};
struct Bfi {
  template <class T>
  static T call(T a, T b, uint32_t c, uint32_t d) {
    constexpr uint32_t size = 8 * sizeof(T);
    uint32_t pos = c & 0xff, len = std::min(d & 0xff, size);
    if (pos >= size || len == 0) return b;
    T keep = len >= size ? ~T(0) : (T(1) << len) - 1;
    return (b & ~(keep << pos)) | (a & keep) << pos;
  }
};
// b bits of ones from bit a on.
template <bool Clamp>
struct Bmsk {
  static uint32_t call(uint32_t a, uint32_t b) {
    if (!Clamp) {
      a &= 31;
      b &= 31;
    }
    const uint64_t end = std::min<uint64_t>(uint64_t{a} + b, 32);
    return a >= 32 ? 0 : static_cast<uint32_t>(((uint64_t{1} << end) - 1) & ~((uint64_t{1} << a) - 1));
  }
};
// The lower b bits, extended.
template <bool Clamp>
struct Szext {
  template <class T>
  static T call(T a, uint32_t b) {
    if (Clamp && b >= 32) return a;
    b &= 31;
    if (b == 0) return 0;
    return static_cast<T>(U<T>(a) << (32 - b)) >> (32 - b);
  }
};
// The n-th set bit of a mask, from bit `base` on; upwards for n > 0, downwards for n < 0.
struct Fns {
  static uint32_t call(uint32_t mask, uint32_t base, int32_t n) {
    if (n == 0) return base < 32 && mask >> base & 1 ? base : ~0u;
    const int step = n > 0 ? 1 : -1;
    for (int64_t at = base, left = n > 0 ? n : -int64_t{n}; at >= 0 && at < 32; at += step)
      if (mask >> at & 1 && --left == 0) return static_cast<uint32_t>(at);
    return ~0u;
  }
};
void lop3(Warp& w, const Inst& in, uint32_t m) {
  const uint32_t *a = w.src<uint32_t>(in.o[1]), *b = w.src<uint32_t>(in.o[2]), *c = w.src<uint32_t>(in.o[3]);
  uint32_t t[32];
  uint32_t f[8];
  for (int k = 0; k < 8; ++k) f[k] = in.imm >> k & 1 ? ~0u : 0;
  for (int i = 0; i < 32; ++i) {
    uint32_t x = a[i], y = b[i], z = c[i];
    t[i] = (f[0] & ~x & ~y & ~z) | (f[1] & ~x & ~y & z) | (f[2] & ~x & y & ~z) | (f[3] & ~x & y & z) |
           (f[4] & x & ~y & ~z) | (f[5] & x & ~y & z) | (f[6] & x & y & ~z) | (f[7] & x & y & z);
  }
  uint32_t* d = w.dst<uint32_t>(in.o[0]);
  for (int i = 0; i < 32; ++i) d[i] = m >> i & 1 ? t[i] : d[i];
}
uint32_t select_byte(uint64_t ab, uint32_t s) {
  uint32_t b = static_cast<uint32_t>(ab >> (8 * (s & 7))) & 0xff;
  return s & 8 ? (b & 0x80 ? 0xff : 0) : b;
}
template <int Mode>
struct Prmt {
  static uint32_t call(uint32_t a, uint32_t b, uint32_t c) {
    uint64_t ab = a | static_cast<uint64_t>(b) << 32;
    uint32_t r = 0, k = c & 3;
    for (uint32_t i = 0; i < 4; ++i) {
      uint32_t s;
      switch (Mode) {
        case 0:
          s = c >> (4 * i) & 15;
          break;
        case 1:
          s = k + i;
          break;  // f4e
        case 2:
          s = (k - i) & 7;
          break;  // b4e
        case 3:
          s = k;
          break;  // rc8
        case 4:
          s = std::max(i, k);
          break;  // ecl
        case 5:
          s = std::min(i, k);
          break;  // ecr
        default:
          s = (k & 1) * 2 + (i & 1);  // rc16
      }
      r |= select_byte(ab, s) << (8 * i);
    }
    return r;
  }
};
template <class A, class B>
struct Dp4a {
  static uint32_t call(uint32_t a, uint32_t b, uint32_t c) {
    for (int i = 0; i < 4; ++i)
      c += static_cast<uint32_t>(static_cast<int32_t>(static_cast<A>(a >> (8 * i))) *
                                 static_cast<int32_t>(static_cast<B>(b >> (8 * i))));
    return c;
  }
};
template <class A, class B, int Hi>
struct Dp2a {
  static uint32_t call(uint32_t a, uint32_t b, uint32_t c) {
    for (int i = 0; i < 2; ++i)
      c += static_cast<uint32_t>(static_cast<int32_t>(static_cast<A>(a >> (16 * i))) *
                                 static_cast<int32_t>(static_cast<B>(b >> (8 * i + 16 * Hi))));
    return c;
  }
};

// Carry flag: a predicate register of the decoder's, shared by all carry forms of the function.
template <class T, bool Subtract>
void carry(Warp& w, const Inst& in, uint32_t m) {  // o: d, carry-out; a, b, carry-in (mode 1: uses it)
  const T *a = w.src<T>(in.o[2]), *b = w.src<T>(in.o[3]);
  uint32_t cc = in.mode & 1 ? w.predicate(in.o[4]) : 0, out = 0;
  T* d = w.dst<T>(in.o[0]);
  each_lane(m, [&](int i) {
    T x = a[i], y = b[i], cin = cc >> i & 1, r;
    bool o;
    if constexpr (Subtract) {
      T t;
      bool o1 = __builtin_sub_overflow(x, y, &t), o2 = __builtin_sub_overflow(t, cin, &r);
      o = o1 | o2;
    } else {
      T t;
      bool o1 = __builtin_add_overflow(x, y, &t), o2 = __builtin_add_overflow(t, cin, &r);
      o = o1 | o2;
    }
    d[i] = r;
    out |= static_cast<uint32_t>(o) << i;
  });
  if (in.mode & 2) w.set_predicate(in.o[1], m, out);
}

template <class F, int N, class T>
Handler same() {
  if constexpr (N == 1)
    return &alu<F, T, T>;
  else if constexpr (N == 2)
    return &alu<F, T, T, T>;
  else
    return &alu<F, T, T, T, T>;
}
template <class F, int N>
Handler by_type(Decoder& d, const std::string& t) {
  if (t == "u16" || t == "b16") return same<F, N, uint16_t>();
  if (t == "s16") return same<F, N, int16_t>();
  if (t == "u32" || t == "b32") return same<F, N, uint32_t>();
  if (t == "s32") return same<F, N, int32_t>();
  if (t == "u64" || t == "b64") return same<F, N, uint64_t>();
  if (t == "s64") return same<F, N, int64_t>();
  d.fail("type ." + t + " is not supported here");
}
template <class F>
Handler shift(Decoder& d, const std::string& t) {
  if (t == "u16" || t == "b16") return &alu<F, uint16_t, uint16_t, uint32_t>;
  if (t == "s16") return &alu<F, int16_t, int16_t, uint32_t>;
  if (t == "u32" || t == "b32") return &alu<F, uint32_t, uint32_t, uint32_t>;
  if (t == "s32") return &alu<F, int32_t, int32_t, uint32_t>;
  if (t == "u64" || t == "b64") return &alu<F, uint64_t, uint64_t, uint32_t>;
  if (t == "s64") return &alu<F, int64_t, int64_t, uint32_t>;
  d.fail("type ." + t + " is not supported here");
}
bool is_integer(const std::string& t) {
  return t.size() >= 2 && (t[0] == 'u' || t[0] == 's') && std::isdigit(static_cast<unsigned char>(t[1]));
}

// setp / set: comparisons. f16 and bf16 compare as floats.
struct H {
  uint16_t v;
};
struct B {
  uint16_t v;
};
template <class T>
auto val(T v) {
  if constexpr (std::is_same_v<T, H>)
    return from_half(v.v);
  else if constexpr (std::is_same_v<T, B>)
    return from_bf16(v.v);
  else
    return v;
}
enum Cmp : uint8_t { eq, ne, lt, le, gt, ge, equ, neu, ltu, leu, gtu, geu, num, nan_ };
template <class T, int C, bool Ftz>
inline bool compare(T x, T y) {
  auto a = val(x), b = val(y);
  if constexpr (Ftz && std::is_same_v<decltype(a), float>) {
    a = flush(a);
    b = flush(b);
  }
  bool un = a != a || b != b;
  switch (C) {
    case eq:
      return a == b;
    case ne:
      return !un && a != b;
    case lt:
      return a < b;
    case le:
      return a <= b;
    case gt:
      return a > b;
    case ge:
      return a >= b;
    case equ:
      return un || a == b;
    case neu:
      return un || a != b;
    case ltu:
      return un || a < b;
    case leu:
      return un || a <= b;
    case gtu:
      return un || a > b;
    case geu:
      return un || a >= b;
    case num:
      return !un;
    default:
      return un;
  }
}
template <class T, int C, bool Ftz>
uint32_t compare_lanes(Warp& w, const Inst& in) {
  const T *a = w.src<T>(in.o[2]), *b = w.src<T>(in.o[3]);
  uint8_t t[32];
  for (int i = 0; i < 32; ++i) t[i] = compare<T, C, Ftz>(a[i], b[i]);
  return pack_bits(t);
}
uint32_t combine(Warp& w, const Inst& in, uint32_t r) {
  if (in.mode == 0) return r;
  uint32_t c = w.predicate(in.o[4]);
  if (in.flag & 1) c = ~c;
  return in.mode == 1 ? r & c : in.mode == 2 ? r | c : r ^ c;
}
template <class T, int C, bool Ftz>
void setp(Warp& w, const Inst& in, uint32_t m) {  // o: p, q; a, b, c
  uint32_t r = compare_lanes<T, C, Ftz>(w, in), inverse = ~r;
  if (in.mode) {
    uint32_t p = combine(w, in, r), q = combine(w, in, inverse);
    r = p;
    inverse = q;
  }
  w.set_predicate(in.o[0], m, r);
  w.set_predicate(in.o[1], m, inverse);
}
template <class T, int C, bool Ftz>
void set_value(Warp& w, const Inst& in, uint32_t m) {  // o: d, unused; a, b, c; imm: value for true
  uint32_t r = combine(w, in, compare_lanes<T, C, Ftz>(w, in));
  each_lane(m, [&](int i) { w.set(in, 0, i, r >> i & 1 ? static_cast<uint64_t>(in.imm) : 0); });
}
template <class T, bool Ftz, bool Value, size_t... C>
Handler by_compare(int c, std::index_sequence<C...>) {
  static constexpr Handler table[] = {(Value ? &set_value<T, C, Ftz> : &setp<T, C, Ftz>)...};
  return table[c];
}
template <bool Value>
Handler comparison(Decoder& d, const std::string& t, std::string c, bool ftz) {
  bool is_float = t == "f32" || t == "f64" || t == "f16" || t == "bf16";
  if (t[0] == 'b' && !is_float && c != "eq" && c != "ne") d.fail("." + t + " compares by .eq and .ne alone");
  if (t[0] == 'u') {  // aliases
    if (c == "lo") c = "lt";
    if (c == "ls") c = "le";
    if (c == "hi") c = "gt";
    if (c == "hs") c = "ge";
  }
  static const char* names[] = {"eq",  "ne",  "lt",  "le",  "gt",  "ge",  "equ",
                                "neu", "ltu", "leu", "gtu", "geu", "num", "nan"};
  int k = -1;
  for (int i = 0; i < (is_float ? 14 : 6); ++i)
    if (c == names[i]) k = i;
  if (k < 0) d.fail("unknown comparison '" + c + "' for ." + t);
  auto ints = std::make_index_sequence<6>{};
  auto floats = std::make_index_sequence<14>{};
  if (t == "u16" || t == "b16") return by_compare<uint16_t, false, Value>(k, ints);
  if (t == "s16") return by_compare<int16_t, false, Value>(k, ints);
  if (t == "u32" || t == "b32") return by_compare<uint32_t, false, Value>(k, ints);
  if (t == "s32") return by_compare<int32_t, false, Value>(k, ints);
  if (t == "u64" || t == "b64") return by_compare<uint64_t, false, Value>(k, ints);
  if (t == "s64") return by_compare<int64_t, false, Value>(k, ints);
  if (t == "f32")
    return ftz ? by_compare<float, true, Value>(k, floats) : by_compare<float, false, Value>(k, floats);
  if (t == "f64") return by_compare<double, false, Value>(k, floats);
  if (t == "f16") return by_compare<H, false, Value>(k, floats);
  if (t == "bf16") return by_compare<B, false, Value>(k, floats);
  d.fail("type ." + t + " is not supported here");
}
// f16x2: two predicates, or two halves.
void setp_x2(Warp& w, const Inst& in, uint32_t m) {
  const uint32_t *a = w.src<uint32_t>(in.o[2]), *b = w.src<uint32_t>(in.o[3]);
  uint32_t r[2] = {0, 0};
  for (int i = 0; i < 32; ++i)
    for (int h = 0; h < 2; ++h) {
      uint16_t x = static_cast<uint16_t>(a[i] >> (16 * h)), y = static_cast<uint16_t>(b[i] >> (16 * h));
      float fx = in.bytes ? from_bf16(x) : from_half(x), fy = in.bytes ? from_bf16(y) : from_half(y);
      bool un = fx != fx || fy != fy, v;
      switch (in.vec) {
        case eq:
          v = fx == fy;
          break;
        case ne:
          v = !un && fx != fy;
          break;
        case lt:
          v = fx < fy;
          break;
        case le:
          v = fx <= fy;
          break;
        case gt:
          v = fx > fy;
          break;
        case ge:
          v = fx >= fy;
          break;
        case equ:
          v = un || fx == fy;
          break;
        case neu:
          v = un || fx != fy;
          break;
        case ltu:
          v = un || fx < fy;
          break;
        case leu:
          v = un || fx <= fy;
          break;
        case gtu:
          v = un || fx > fy;
          break;
        case geu:
          v = un || fx >= fy;
          break;
        case num:
          v = !un;
          break;
        default:
          v = un;
      }
      r[h] |= static_cast<uint32_t>(v) << i;
    }
  if (in.target) {  // set: halves of 1.0
    uint32_t one = in.bytes ? 0x3f80 : 0x3c00;
    if (in.target == 2) one = 0xffff;
    uint32_t lo = combine(w, in, r[0]), hi = combine(w, in, r[1]);
    each_lane(m, [&](int i) {
      w.dst<uint32_t>(in.o[0])[i] = (lo >> i & 1 ? one : 0) | (hi >> i & 1 ? one << 16 : 0);
    });
    return;
  }
  uint32_t p = combine(w, in, r[0]), q = combine(w, in, r[1]);
  w.set_predicate(in.o[0], m, p);
  w.set_predicate(in.o[1], m, q);
}

template <class T>
void selp(Warp& w, const Inst& in, uint32_t m) {
  const T *a = w.src<T>(in.o[1]), *b = w.src<T>(in.o[2]);
  uint32_t p = w.predicate(in.o[3]);
  if (in.flag) p = ~p;
  T* d = w.dst<T>(in.o[0]);
  T t[32];
  for (int i = 0; i < 32; ++i) t[i] = p >> i & 1 ? a[i] : b[i];
  for (int i = 0; i < 32; ++i) d[i] = m >> i & 1 ? t[i] : d[i];
}
template <class T, bool Float>
void slct(Warp& w, const Inst& in, uint32_t m) {
  const T *a = w.src<T>(in.o[1]), *b = w.src<T>(in.o[2]);
  each_lane(m, [&](int i) {
    bool first = Float ? w.src<float>(in.o[3])[i] >= 0 : w.src<int32_t>(in.o[3])[i] >= 0;
    w.dst<T>(in.o[0])[i] = first ? a[i] : b[i];
  });
}
template <int Op>
void logic_pred(Warp& w, const Inst& in, uint32_t m) {
  uint32_t a = w.predicate(in.o[1]), b = in.count > 2 ? w.predicate(in.o[2]) : 0;
  if (in.flag & 1) a = ~a;
  if (in.flag & 2) b = ~b;
  w.set_predicate(in.o[0], m, Op == 0 ? a & b : Op == 1 ? a | b : Op == 2 ? a ^ b : Op == 3 ? ~a : a);
}
// mov of vectors: pack o[outputs].. into one register, or unpack one into many.
void pack(Warp& w, const Inst& in, uint32_t m) {
  each_lane(m, [&](int i) {
    uint64_t v = 0;
    int shift = 0;
    for (int k = 1; k < in.count; ++k) {
      v |= (w.value(in, k, i) & (in.bytes == 8 ? ~0ull : (1ull << (8 * in.bytes)) - 1)) << shift;
      shift += 8 * in.bytes;
    }
    w.set(in, 0, i, v);
  });
}
void unpack(Warp& w, const Inst& in, uint32_t m) {
  uint64_t v[32];
  for (int i = 0; i < 32; ++i) v[i] = w.value(in, in.outputs, i);
  each_lane(m, [&](int i) {
    for (int k = 0; k < in.outputs; ++k)
      w.set(in, k, i, v[i] >> (8 * in.bytes * k) & ((1ull << (8 * in.bytes)) - 1));
  });
}
void clock_now(Warp& w, const Inst& in, uint32_t m) {
  uint64_t v = in.mode & 1
                   ? static_cast<uint64_t>(std::chrono::system_clock::now().time_since_epoch().count())
                   : w.instructions * 4 + 1;
  if (in.mode & 2) v >>= 32;
  each_lane(m, [&](int i) { w.set(in, 0, i, v); });
}
template <class T>
Handler mov_of() {
  return &alu<Copy, T, T>;
}
Handler mov_width(Decoder& d, int bytes) {
  switch (bytes) {
    case 2:
      return mov_of<uint16_t>();
    case 4:
      return mov_of<uint32_t>();
    case 8:
      return mov_of<uint64_t>();
  }
  d.fail("mov of " + std::to_string(bytes) + " bytes is not supported");
}

void mov(Decoder& d, const Instruction& s) {
  Mods m(s);
  std::string t = m.type();
  m.finish();
  d.operands(2);
  const Operand &to = d.operand(0), &from = d.operand(1);
  if (t == "pred") {
    Inst& in = d.emit(&logic_pred<4>, "logic", {d.pred_out(to)}, {d.pred_in(from)});
    in.flag = from.negate;
    return;
  }
  int bytes = static_cast<int>(type_bytes(t, s.line));
  if (from.kind == Operand::vector && to.kind != Operand::vector) {
    int each = bytes / static_cast<int>(from.items.size());
    if (each * static_cast<int>(from.items.size()) != bytes || from.items.size() > 8)
      d.fail("cannot pack that many elements into ." + t);
    std::vector<Shape> in;
    for (const Operand& o : from.items)
      in.push_back(each == 1 ? d.in(o, "") : d.in(o, each == 2 ? "b16" : each == 4 ? "b32" : "b64"));
    Inst& i = d.emit(&pack, "mov", std::vector<Shape>{d.out(to, bytes)}, in);
    i.bytes = static_cast<uint8_t>(each);
  } else if (to.kind == Operand::vector && from.kind != Operand::vector) {
    int each = bytes / static_cast<int>(to.items.size());
    if (each * static_cast<int>(to.items.size()) != bytes || to.items.size() > 8)
      d.fail("cannot unpack ." + t + " into that many elements");
    std::vector<Shape> out;
    for (const Operand& o : to.items)
      out.push_back(o.text == "_" ? d.scratch(std::max(each, 2)) : d.out(o, each == 1 ? 0 : each));
    Inst& i = d.emit(&unpack, "mov", out, std::vector<Shape>{d.in(from, t)});
    i.bytes = static_cast<uint8_t>(each);
  } else {
    if (from.kind == Operand::name) {
      static const std::pair<const char*, int> clocks[] = {{"%clock", 0},          {"%clock64", 0},
                                                           {"%clock_hi", 2},       {"%globaltimer", 1},
                                                           {"%globaltimer_lo", 1}, {"%globaltimer_hi", 3}};
      for (auto [name, mode] : clocks)
        if (from.text == name) {
          Inst& i = d.emit(&clock_now, "mov", {d.out(to, bytes)}, {});
          i.mode = static_cast<uint8_t>(mode);
          return;
        }
    }
    if (Shape wide; from.kind == Operand::name && d.special(from.text, &wide) && bytes < wide.width) {
      // The lower part of a special register.
      Inst& i = d.emit(&unpack, "mov", {d.out(to, bytes)}, {wide});
      i.bytes = static_cast<uint8_t>(bytes);
      return;
    }
    Shape in = d.in(from, t);
    d.emit(mov_width(d, bytes), "mov", {d.out(to, bytes)}, {in});
  }
}

}  // namespace

bool decode_integer(Decoder& d, const Instruction& s) {
  const std::string& op = s.opcode;
  if (op == "mov") return mov(d, s), true;
  Mods m(s);
  // Opcodes shared with floats: integer types only.
  static const char* shared[] = {"add", "sub", "mul", "div", "min", "max", "abs", "neg", "mad", "rem"};
  for (const char* name : shared) {
    if (op != name) continue;
    std::string t = m.type();
    if (!is_integer(t)) return false;
    bool cc = m.take("cc"), sat = m.take("sat");
    if (sat && op != "add" && op != "sub" && op != "mad") d.fail("unknown modifier '.sat'");
    auto two = [&](Handler h, const char* klass = "int") {
      m.finish();
      d.operands(3);
      d.emit(h, klass, {d.out(d.operand(0), static_cast<int>(type_bytes(t, s.line)))},
             {d.in(d.operand(1), t), d.in(d.operand(2), t)});
      return true;
    };
    int bytes = static_cast<int>(type_bytes(t, s.line));
    if ((op == "add" || op == "sub") && cc) {
      m.finish();
      d.operands(3);
      bool sub = op == "sub";
      Handler h = bytes == 4   ? (sub ? &carry<uint32_t, true> : &carry<uint32_t, false>)
                  : bytes == 8 ? (sub ? &carry<uint64_t, true> : &carry<uint64_t, false>)
                               : nullptr;
      if (!h) d.fail("type ." + t + " has no carry form");
      Shape flag = d.pred_name("%carry flag");
      Inst& i = d.emit(h, "int", {d.out(d.operand(0), bytes), flag},
                       {d.in(d.operand(1), t), d.in(d.operand(2), t), flag});
      i.mode = 2;
      return true;
    }
    if (op == "add")
      return sat ? (t == "s32" ? two(&alu<AddSat, int32_t, int32_t, int32_t>)
                               : (d.fail("add.sat is for .s32"), true))
                 : two(by_type<Add, 2>(d, t));
    if (op == "sub")
      return sat ? (t == "s32" ? two(&alu<SubSat, int32_t, int32_t, int32_t>)
                               : (d.fail("sub.sat is for .s32"), true))
                 : two(by_type<Sub, 2>(d, t));
    if (op == "div") return two(by_type<Div, 2>(d, t));
    if (op == "rem") return two(by_type<Rem, 2>(d, t));
    if (op == "min" || op == "max") {
      if (m.take("relu")) d.fail(op + ".relu." + t + " is not supported");
      return two(op == "min" ? by_type<Min, 2>(d, t) : by_type<Max, 2>(d, t));
    }
    if (op == "abs" || op == "neg") {
      m.finish();
      d.operands(2);
      if (t[0] != 's') d.fail(op + " is for signed types");
      d.emit(op == "abs" ? by_type<Abs, 1>(d, t) : by_type<Neg, 1>(d, t), "int", {d.out(d.operand(0), bytes)},
             {d.in(d.operand(1), t)});
      return true;
    }
    std::string part = m.any({"lo", "hi", "wide"});
    if (part.empty()) d.fail("expected .lo, .hi or .wide");
    if (op == "mul") {
      if (part == "lo") return two(by_type<MulLo, 2>(d, t));
      if (part == "hi") return two(by_type<MulHi, 2>(d, t));
      m.finish();
      d.operands(3);
      Handler h = t == "u16"   ? &alu<MulWide<uint32_t>, uint32_t, uint16_t, uint16_t>
                  : t == "s16" ? &alu<MulWide<int32_t>, int32_t, int16_t, int16_t>
                  : t == "u32" ? &alu<MulWide<uint64_t>, uint64_t, uint32_t, uint32_t>
                  : t == "s32" ? &alu<MulWide<int64_t>, int64_t, int32_t, int32_t>
                               : nullptr;
      if (!h) d.fail("mul.wide." + t + " does not exist");
      d.emit(h, "int", {d.out(d.operand(0), 2 * bytes)}, {d.in(d.operand(1), t), d.in(d.operand(2), t)});
      return true;
    }
    // mad
    m.finish();
    d.operands(4);
    if (part == "wide") {
      Handler h = t == "u16"   ? &alu<MadWide<uint32_t>, uint32_t, uint16_t, uint16_t, uint32_t>
                  : t == "s16" ? &alu<MadWide<int32_t>, int32_t, int16_t, int16_t, int32_t>
                  : t == "u32" ? &alu<MadWide<uint64_t>, uint64_t, uint32_t, uint32_t, uint64_t>
                  : t == "s32" ? &alu<MadWide<int64_t>, int64_t, int32_t, int32_t, int64_t>
                               : nullptr;
      if (!h || cc || sat) d.fail("mad.wide with these modifiers does not exist");
      d.emit(h, "int", {d.out(d.operand(0), 2 * bytes)},
             {d.in(d.operand(1), t), d.in(d.operand(2), t), d.in(d.operand(3), bytes == 2 ? "b32" : "b64")});
      return true;
    }
    if (cc) {
      Shape p = d.scratch(bytes), flag = d.pred_name("%carry flag");
      d.emit(part == "lo" ? by_type<MulLo, 2>(d, t) : by_type<MulHi, 2>(d, t), "int", {p},
             {d.in(d.operand(1), t), d.in(d.operand(2), t)});
      Inst& i = d.emit(bytes == 8 ? &carry<uint64_t, false> : &carry<uint32_t, false>, "int",
                       {d.out(d.operand(0), bytes), flag}, {p, d.in(d.operand(3), t), flag});
      if (bytes < 4) d.fail("mad.cc is for 32 and 64 bits");
      i.mode = 2;
      return true;
    }
    Handler h = part == "lo" ? by_type<MadLo, 3>(d, t) : by_type<MadHi, 3>(d, t);
    if (sat) {
      if (t != "s32" || part != "hi") d.fail("mad.sat is for .hi.s32");
      h = &alu<MadHiSat, int32_t, int32_t, int32_t, int32_t>;
    }
    d.emit(h, "int", {d.out(d.operand(0), bytes)},
           {d.in(d.operand(1), t), d.in(d.operand(2), t), d.in(d.operand(3), t)});
    return true;
  }
  if (op == "addc" || op == "subc" || op == "madc") {
    bool cc = m.take("cc");
    std::string t = m.type();
    int bytes = static_cast<int>(type_bytes(t, s.line));
    if (!is_integer(t) || bytes < 4) d.fail("expected a 32 or 64 bit integer type");
    std::string part = op == "madc" ? m.any({"lo", "hi"}) : "";
    m.finish();
    Shape flag = d.pred_name("%carry flag");
    Shape a, b;
    if (op == "madc") {
      d.operands(4);
      if (part.empty()) d.fail("expected .lo or .hi");
      a = d.scratch(bytes);
      d.emit(part == "lo" ? by_type<MulLo, 2>(d, t) : by_type<MulHi, 2>(d, t), "int", {a},
             {d.in(d.operand(1), t), d.in(d.operand(2), t)});
      b = d.in(d.operand(3), t);
    } else {
      d.operands(3);
      a = d.in(d.operand(1), t);
      b = d.in(d.operand(2), t);
    }
    bool sub = op == "subc";
    Handler h = bytes == 4 ? (sub ? &carry<uint32_t, true> : &carry<uint32_t, false>)
                           : (sub ? &carry<uint64_t, true> : &carry<uint64_t, false>);
    Inst& i = d.emit(h, "int", {d.out(d.operand(0), bytes), flag}, {a, b, flag});
    i.mode = cc ? 3 : 1;
    return true;
  }
  if (op == "mul24" || op == "mad24") {
    std::string t = m.type(), part = m.any({"lo", "hi"});
    const bool sg = t == "s32", sat = op == "mad24" && part == "hi" && sg && m.take("sat");
    m.finish();
    if ((t != "u32" && !sg) || part.empty()) d.fail("this form does not exist");
    if (op == "mul24") {
      Handler h =
          part == "lo"
              ? (sg ? &alu<Mul24Lo, int32_t, int32_t, int32_t> : &alu<Mul24Lo, uint32_t, uint32_t, uint32_t>)
              : (sg ? &alu<Mul24Hi, int32_t, int32_t, int32_t> : &alu<Mul24Hi, uint32_t, uint32_t, uint32_t>);
      d.operands(3);
      d.emit(h, "int", {d.out(d.operand(0), 4)}, {d.in(d.operand(1), t), d.in(d.operand(2), t)});
    } else {
      Handler h = sat            ? &alu<Mad24HiSat, int32_t, int32_t, int32_t, int32_t>
                  : part == "lo" ? (sg ? &alu<Mad24Lo, int32_t, int32_t, int32_t, int32_t>
                                       : &alu<Mad24Lo, uint32_t, uint32_t, uint32_t, uint32_t>)
                                 : (sg ? &alu<Mad24Hi, int32_t, int32_t, int32_t, int32_t>
                                       : &alu<Mad24Hi, uint32_t, uint32_t, uint32_t, uint32_t>);
      d.operands(4);
      d.emit(h, "int", {d.out(d.operand(0), 4)},
             {d.in(d.operand(1), t), d.in(d.operand(2), t), d.in(d.operand(3), t)});
    }
    return true;
  }
  if (op == "sad") {
    std::string t = m.type();
    m.finish();
    d.operands(4);
    d.emit(by_type<Sad, 3>(d, t), "int", {d.out(d.operand(0), static_cast<int>(type_bytes(t, s.line)))},
           {d.in(d.operand(1), t), d.in(d.operand(2), t), d.in(d.operand(3), t)});
    return true;
  }
  if (op == "and" || op == "or" || op == "xor" || op == "not") {
    std::string t = m.type();
    m.finish();
    bool one = op == "not";
    d.operands(one ? 2 : 3);
    if (t == "pred") {
      Handler h = op == "and"   ? &logic_pred<0>
                  : op == "or"  ? &logic_pred<1>
                  : op == "xor" ? &logic_pred<2>
                                : &logic_pred<3>;
      std::vector<Shape> in{d.pred_in(d.operand(1))};
      if (!one) in.push_back(d.pred_in(d.operand(2)));
      Inst& i = d.emit(h, "logic", std::vector<Shape>{d.pred_out(d.operand(0))}, in);
      i.flag = static_cast<uint8_t>(d.operand(1).negate | (one ? 0 : d.operand(2).negate << 1));
      return true;
    }
    if (t[0] != 'b') d.fail("expected a .b type");
    std::vector<Shape> in{d.in(d.operand(1), t)};
    if (!one) in.push_back(d.in(d.operand(2), t));
    Handler h = op == "and"   ? by_type<And, 2>(d, t)
                : op == "or"  ? by_type<Or, 2>(d, t)
                : op == "xor" ? by_type<Xor, 2>(d, t)
                              : by_type<Not, 1>(d, t);
    d.emit(h, "logic", std::vector<Shape>{d.out(d.operand(0), static_cast<int>(type_bytes(t, s.line)))}, in);
    return true;
  }
  if (op == "cnot") {
    std::string t = m.type();
    m.finish();
    d.operands(2);
    d.emit(by_type<CNot, 1>(d, t), "logic", {d.out(d.operand(0), static_cast<int>(type_bytes(t, s.line)))},
           {d.in(d.operand(1), t)});
    return true;
  }
  if (op == "shl" || op == "shr") {
    std::string t = m.type();
    m.finish();
    if (op == "shl" && t[0] != 'b') d.fail("expected a .b type");
    d.operands(3);
    d.emit(op == "shl" ? shift<Shl>(d, t) : shift<Shr>(d, t), "int",
           {d.out(d.operand(0), static_cast<int>(type_bytes(t, s.line)))},
           {d.in(d.operand(1), t), d.in(d.operand(2), "u32")});
    return true;
  }
  if (op == "shf") {
    std::string side = m.any({"l", "r"}), mode = m.any({"clamp", "wrap"}), t = m.type();
    m.finish();
    d.operands(4);
    if (side.empty() || mode.empty() || t != "b32") d.fail("expected shf.{l,r}.{clamp,wrap}.b32");
    Handler h = side == "l" ? (mode == "wrap" ? &alu<ShfLWrap, uint32_t, uint32_t, uint32_t, uint32_t>
                                              : &alu<ShfLClamp, uint32_t, uint32_t, uint32_t, uint32_t>)
                            : (mode == "wrap" ? &alu<ShfRWrap, uint32_t, uint32_t, uint32_t, uint32_t>
                                              : &alu<ShfRClamp, uint32_t, uint32_t, uint32_t, uint32_t>);
    d.emit(h, "int", {d.out(d.operand(0), 4)},
           {d.in(d.operand(1), t), d.in(d.operand(2), t), d.in(d.operand(3), t)});
    return true;
  }
  if (op == "popc" || op == "clz" || op == "brev" || op == "bfind") {
    bool amount = op == "bfind" && m.take("shiftamt");
    std::string t = m.type();
    m.finish();
    d.operands(2);
    int bytes = static_cast<int>(type_bytes(t, s.line));
    if (bytes < 4) d.fail("type ." + t + " is not supported here");
    bool wide = bytes == 8;
    Handler h;
    if (op == "popc")
      h = wide ? &alu<Popc, uint32_t, uint64_t> : &alu<Popc, uint32_t, uint32_t>;
    else if (op == "clz")
      h = wide ? &alu<Clz, uint32_t, uint64_t> : &alu<Clz, uint32_t, uint32_t>;
    else if (op == "brev")
      h = wide ? &alu<Brev, uint64_t, uint64_t> : &alu<Brev, uint32_t, uint32_t>;
    else if (t[0] == 's')
      h = amount ? (wide ? &alu<Bfind<true>, uint32_t, int64_t> : &alu<Bfind<true>, uint32_t, int32_t>)
                 : (wide ? &alu<Bfind<false>, uint32_t, int64_t> : &alu<Bfind<false>, uint32_t, int32_t>);
    else
      h = amount ? (wide ? &alu<Bfind<true>, uint32_t, uint64_t> : &alu<Bfind<true>, uint32_t, uint32_t>)
                 : (wide ? &alu<Bfind<false>, uint32_t, uint64_t> : &alu<Bfind<false>, uint32_t, uint32_t>);
    d.emit(h, "int", {d.out(d.operand(0), op == "brev" ? bytes : 4)}, {d.in(d.operand(1), t)});
    return true;
  }
  if (op == "bfe" || op == "bfi") {
    std::string t = m.type();
    m.finish();
    int bytes = static_cast<int>(type_bytes(t, s.line));
    if (bytes < 4 || (t[0] == 'b') == (op == "bfe")) d.fail("type ." + t + " is not supported here");
    if (op == "bfe") {
      d.operands(4);
      Handler h = t == "u32"   ? &alu<Bfe, uint32_t, uint32_t, uint32_t, uint32_t>
                  : t == "s32" ? &alu<Bfe, int32_t, int32_t, uint32_t, uint32_t>
                  : t == "u64" ? &alu<Bfe, uint64_t, uint64_t, uint32_t, uint32_t>
                               : &alu<Bfe, int64_t, int64_t, uint32_t, uint32_t>;
      d.emit(h, "int", {d.out(d.operand(0), bytes)},
             {d.in(d.operand(1), t), d.in(d.operand(2), "u32"), d.in(d.operand(3), "u32")});
    } else {
      d.operands(5);
      d.emit(bytes == 4 ? &alu<Bfi, uint32_t, uint32_t, uint32_t, uint32_t, uint32_t>
                        : &alu<Bfi, uint64_t, uint64_t, uint64_t, uint32_t, uint32_t>,
             "int", {d.out(d.operand(0), bytes)},
             {d.in(d.operand(1), t), d.in(d.operand(2), t), d.in(d.operand(3), "u32"),
              d.in(d.operand(4), "u32")});
    }
    return true;
  }
  if (op == "bmsk" || op == "szext") {
    d.require(76, 70, op.c_str());
    const std::string mode = m.any({"clamp", "wrap"}), t = m.type();
    m.finish();
    d.operands(3);
    const bool clamp = mode == "clamp", sg = t == "s32", mask = op == "bmsk";
    if (mode.empty() || (mask ? t != "b32" : t != "u32" && !sg)) d.fail("this form does not exist");
    using u32 = uint32_t;
    Handler h =
        mask ? (clamp ? &alu<Bmsk<true>, u32, u32, u32> : &alu<Bmsk<false>, u32, u32, u32>)
        : sg ? (clamp ? &alu<Szext<true>, int32_t, int32_t, u32> : &alu<Szext<false>, int32_t, int32_t, u32>)
             : (clamp ? &alu<Szext<true>, u32, u32, u32> : &alu<Szext<false>, u32, u32, u32>);
    d.emit(h, "int", {d.out(d.operand(0), 4)}, {d.in(d.operand(1), t), d.in(d.operand(2), "u32")});
    return true;
  }
  if (op == "fns") {
    if (m.type() != "b32") d.fail("expected fns.b32");
    m.finish();
    d.operands(4);
    d.emit(&alu<Fns, uint32_t, uint32_t, uint32_t, int32_t>, "int", {d.out(d.operand(0), 4)},
           {d.in(d.operand(1), "b32"), d.in(d.operand(2), "b32"), d.in(d.operand(3), "s32")});
    return true;
  }
  if (op == "lop3") {
    std::string t = m.type();
    m.finish();
    if (t != "b32") d.fail("expected lop3.b32");
    d.operands(5);
    if (d.operand(4).kind != Operand::integer) d.fail("expected an immediate table for lop3");
    Inst& i = d.emit(&lop3, "logic", {d.out(d.operand(0), 4)},
                     {d.in(d.operand(1), t), d.in(d.operand(2), t), d.in(d.operand(3), t)});
    i.imm = d.operand(4).value & 0xff;
    return true;
  }
  if (op == "prmt") {
    std::string t = m.any({"b32"}), mode = m.any({"f4e", "b4e", "rc8", "ecl", "ecr", "rc16"});
    m.finish();
    d.operands(4);
    if (t.empty()) d.fail("expected prmt.b32");
    Handler h = mode == ""      ? &alu<Prmt<0>, uint32_t, uint32_t, uint32_t, uint32_t>
                : mode == "f4e" ? &alu<Prmt<1>, uint32_t, uint32_t, uint32_t, uint32_t>
                : mode == "b4e" ? &alu<Prmt<2>, uint32_t, uint32_t, uint32_t, uint32_t>
                : mode == "rc8" ? &alu<Prmt<3>, uint32_t, uint32_t, uint32_t, uint32_t>
                : mode == "ecl" ? &alu<Prmt<4>, uint32_t, uint32_t, uint32_t, uint32_t>
                : mode == "ecr" ? &alu<Prmt<5>, uint32_t, uint32_t, uint32_t, uint32_t>
                                : &alu<Prmt<6>, uint32_t, uint32_t, uint32_t, uint32_t>;
    d.emit(h, "int", {d.out(d.operand(0), 4)},
           {d.in(d.operand(1), t), d.in(d.operand(2), t), d.in(d.operand(3), t)});
    return true;
  }
  if (op == "dp4a" || op == "dp2a") {
    std::string half = op == "dp2a" ? m.any({"lo", "hi"}) : "";
    std::string b = m.type(), a = m.type();
    m.finish();
    d.operands(4);
    if ((a != "u32" && a != "s32") || (b != "u32" && b != "s32") || (op == "dp2a" && half.empty()))
      d.fail("this form does not exist");
    bool sa = a == "s32", sb = b == "s32";
    using u32 = uint32_t;
    Handler h;
    if (op == "dp4a")
      h = sa ? (sb ? &alu<Dp4a<int8_t, int8_t>, u32, u32, u32, u32>
                   : &alu<Dp4a<int8_t, uint8_t>, u32, u32, u32, u32>)
             : (sb ? &alu<Dp4a<uint8_t, int8_t>, u32, u32, u32, u32>
                   : &alu<Dp4a<uint8_t, uint8_t>, u32, u32, u32, u32>);
    else if (half == "lo")
      h = sa ? (sb ? &alu<Dp2a<int16_t, int8_t, 0>, u32, u32, u32, u32>
                   : &alu<Dp2a<int16_t, uint8_t, 0>, u32, u32, u32, u32>)
             : (sb ? &alu<Dp2a<uint16_t, int8_t, 0>, u32, u32, u32, u32>
                   : &alu<Dp2a<uint16_t, uint8_t, 0>, u32, u32, u32, u32>);
    else
      h = sa ? (sb ? &alu<Dp2a<int16_t, int8_t, 1>, u32, u32, u32, u32>
                   : &alu<Dp2a<int16_t, uint8_t, 1>, u32, u32, u32, u32>)
             : (sb ? &alu<Dp2a<uint16_t, int8_t, 1>, u32, u32, u32, u32>
                   : &alu<Dp2a<uint16_t, uint8_t, 1>, u32, u32, u32, u32>);
    d.emit(h, "int", {d.out(d.operand(0), 4)},
           {d.in(d.operand(1), "b32"), d.in(d.operand(2), "b32"), d.in(d.operand(3), "b32")});
    return true;
  }
  if (op == "setp" || op == "set") {
    if (s.parts.empty()) d.fail("expected a comparison");
    std::string c = m.front();
    std::string t = m.type(), result = op == "set" ? m.type() : "";
    bool ftz = m.take("ftz");
    std::string logic = m.any({"and", "or", "xor"});
    m.finish();
    size_t n = logic.empty() ? 3 : 4;
    d.operands(n);
    bool x2 = t == "f16x2" || t == "bf16x2";
    Shape third = logic.empty() ? Shape{kNone, 0} : d.pred_in(d.operand(3));
    std::vector<Shape> ins{d.in(d.operand(1), t), d.in(d.operand(2), t)};
    if (!logic.empty()) ins.push_back(third);
    std::vector<Shape> outs;
    Handler h;
    if (op == "setp") {
      outs.push_back(d.pred_out(d.operand(0)));
      outs.push_back(d.operand(0).second.empty() || d.operand(0).second == "_"
                         ? d.scratch(0)
                         : d.pred_name(d.operand(0).second));
      h = x2 ? &setp_x2 : comparison<false>(d, t, c, ftz);
    } else {
      outs.push_back(d.out(d.operand(0), static_cast<int>(type_bytes(result, s.line))));
      outs.push_back(d.scratch(0));
      h = x2 ? &setp_x2 : comparison<true>(d, t, c, ftz);
    }
    Inst& i = d.emit(h, "setp", outs, ins);
    i.mode = logic.empty() ? 0 : logic == "and" ? 1 : logic == "or" ? 2 : 3;
    i.flag = !logic.empty() && d.operand(3).negate;
    i.imm = result == "f32" ? 0x3f800000 : result == "f16" ? 0x3c00 : result == "bf16" ? 0x3f80 : -1;
    if (x2) {
      static const char* names[] = {"eq",  "ne",  "lt",  "le",  "gt",  "ge",  "equ",
                                    "neu", "ltu", "leu", "gtu", "geu", "num", "nan"};
      int k = -1;
      for (int j = 0; j < 14; ++j)
        if (c == names[j]) k = j;
      if (k < 0) d.fail("unknown comparison '" + c + "' for ." + t);
      i.vec = static_cast<uint8_t>(k);
      i.bytes = t == "bf16x2";
      i.target = op == "setp" ? 0 : result[0] == 'u' || result[0] == 's' ? 2 : 1;
    }
    return true;
  }
  if (op == "selp") {
    std::string t = m.type();
    m.finish();
    d.operands(4);
    int bytes = static_cast<int>(type_bytes(t, s.line));
    Inst& i = d.emit(bytes == 2   ? &selp<uint16_t>
                     : bytes == 4 ? &selp<uint32_t>
                                  : &selp<uint64_t>,
                     "selp", {d.out(d.operand(0), bytes)},
                     {d.in(d.operand(1), t), d.in(d.operand(2), t), d.pred_in(d.operand(3))});
    i.flag = d.operand(3).negate;
    return true;
  }
  if (op == "slct") {
    m.take("ftz");
    std::string c = m.type(), t = m.type();
    m.finish();
    d.operands(4);
    if (c != "s32" && c != "f32") d.fail("expected .s32 or .f32 for slct's condition");
    int bytes = static_cast<int>(type_bytes(t, s.line));
    bool f = c == "f32";
    Handler h = bytes == 2   ? (f ? &slct<uint16_t, true> : &slct<uint16_t, false>)
                : bytes == 4 ? (f ? &slct<uint32_t, true> : &slct<uint32_t, false>)
                             : (f ? &slct<uint64_t, true> : &slct<uint64_t, false>);
    d.emit(h, "selp", {d.out(d.operand(0), bytes)},
           {d.in(d.operand(1), t), d.in(d.operand(2), t), d.in(d.operand(3), c)});
    return true;
  }
  return false;
}

}  // namespace mgm::emulator
