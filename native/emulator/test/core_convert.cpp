// cvt in all its pairs: every value of the small formats, the others at the borders where rounding changes.
#include <algorithm>
#include <functional>

#include "exact.h"
#include "harness.h"

namespace mgm::emulator::test {
namespace {

using Oracle = std::function<uint64_t(uint64_t)>;

// The instruction on each input; `body` reads %la and writes %ld.
void each(const std::string& what, const std::string& body, std::vector<uint64_t> in, const Oracle& want,
          int version = 70, int target = 80) {
  Device d;
  d.spec = device_spec(target);
  in.resize((in.size() + 255) / 256 * 256);
  const uint64_t from = d.put(in), to = d.put(std::vector<uint64_t>(in.size()));
  const std::string head = ".version " + std::to_string(version / 10) + "." + std::to_string(version % 10) +
                           "\n.target sm_" + std::to_string(target) + "\n.address_size 64\n";
  const LaunchResult r = d.run(lanes_kernel(body, true, head), {from, from, from, to},
                               static_cast<uint32_t>(in.size() / 256), 256);
  const std::vector<uint64_t> got = d.get<uint64_t>(to, in.size());
  size_t wrong = r.error || !r.reports.empty();
  for (size_t i = 0; i < in.size(); ++i) {
    const uint64_t expected = want(in[i]);
    if (got[i] != expected && ++wrong == 1)
      std::printf("%s(%llx) = %llx, expected %llx\n", what.c_str(), static_cast<unsigned long long>(in[i]),
                  static_cast<unsigned long long>(got[i]), static_cast<unsigned long long>(expected));
  }
  check(!wrong, what);
}

struct Type {
  const char* name;
  int bits;
  bool is_float, is_signed;
  Format format;
};
const Type kHalf{"f16", 16, true, true, kF16}, kBfloat{"bf16", 16, true, true, kBf16},
    kSingle{"f32", 32, true, true, kF32}, kDouble{"f64", 64, true, true, kF64},
    kTensor{"tf32", 32, true, true, kTf32};
const Type kIntegers[] = {{"u8", 8, false, false, {}},   {"s8", 8, false, true, {}},
                          {"u16", 16, false, false, {}}, {"s16", 16, false, true, {}},
                          {"u32", 32, false, false, {}}, {"s32", 32, false, true, {}},
                          {"u64", 64, false, false, {}}, {"s64", 64, false, true, {}}};

std::string convert(const std::string& modifiers, const Type& to, const Type& from) {
  const bool tensor = std::string(to.name) == "tf32";
  std::string load, source, result, store;
  if (from.is_float && from.bits > 16) {
    load = from.bits == 32 ? "cvt.u32.u64 %a, %la; mov.b32 %f1, %a; " : "mov.b64 %fd1, %la; ";
    source = from.bits == 32 ? "%f1" : "%fd1";
  } else {
    load = from.bits <= 16 ? "cvt.u16.u64 %h1, %la; " : from.bits == 32 ? "cvt.u32.u64 %a, %la; " : "";
    source = from.bits <= 16 ? "%h1" : from.bits == 32 ? "%a" : "%la";
  }
  if (to.is_float && to.bits > 16 && !tensor) {
    result = to.bits == 32 ? "%f2" : "%fd2";
    store = to.bits == 32 ? " mov.b32 %d, %f2; cvt.u64.u32 %ld, %d;" : " mov.b64 %ld, %fd2;";
  } else {
    result = to.bits == 64 ? "%ld" : to.bits == 16 ? "%h2" : "%d";
    store = to.bits == 64 ? "" : to.bits == 16 ? " cvt.u64.u16 %ld, %h2;" : " cvt.u64.u32 %ld, %d;";
  }
  return load + "cvt" + modifiers + "." + to.name + "." + from.name + " " + result + ", " + source + ";" +
         store;
}

uint64_t rounded(const Value& v, const Format& to, char mode) {
  const uint64_t sign = v.negative ? uint64_t{1} << (to.bits - 1) : 0;
  if (v.kind == Value::nan) return to.nan;
  if (v.kind == Value::infinite) return to.infinity | sign;
  if (v.zero()) return sign;
  Sum s;
  s.add(v);
  return s.round(to, mode);
}
uint64_t mask(int bits) {
  return bits == 64 ? ~uint64_t{0} : (uint64_t{1} << bits) - 1;
}

uint64_t to_integer(const Value& v, const Type& to, char mode, bool wide_source) {
  const int bits = to.bits;
  const uint64_t shown = mask(bits == 8 ? 32 : bits);  // eight bits are extended to the register's
  if (v.kind == Value::nan) {
    if (!wide_source && bits != 64) return 0;
    const uint64_t r = uint64_t{1} << (bits - 1);
    return (to.is_signed ? static_cast<uint64_t>(-static_cast<__int128>(r)) : r) & shown;
  }
  const __int128 high = (static_cast<__int128>(1) << (to.is_signed ? bits - 1 : bits)) - 1,
                 low = to.is_signed ? -high - 1 : 0;
  __int128 n;
  if (v.kind == Value::infinite || (v.m && v.e > 60)) {
    n = v.negative ? low : high;
  } else {
    unsigned __int128 m = v.m, rest = 0, one = 1;
    if (v.e >= 0) {
      m <<= v.e;
    } else if (-v.e > 100) {
      rest = m != 0;
      one = 4;
      m = 0;
    } else {
      one <<= -v.e;
      rest = m & (one - 1);
      m >>= -v.e;
    }
    const bool half = rest * 2 == one, above = rest * 2 > one;
    if (mode == 'n'   ? above || (half && m % 2)
        : mode == 'm' ? v.negative && rest
        : mode == 'p' ? !v.negative && rest
                      : false)
      ++m;
    n = v.negative ? -static_cast<__int128>(m) : static_cast<__int128>(m);
    n = std::clamp(n, low, high);
  }
  return static_cast<uint64_t>(n) & shown;
}

std::vector<uint64_t> all16() {
  std::vector<uint64_t> v(65536);
  for (size_t i = 0; i < v.size(); ++i) v[i] = i;
  return v;
}

// f32 patterns of every value of a format, of the midpoints between neighbours, and those beside all of them.
std::vector<uint64_t> borders(const Format& f, size_t step) {
  std::vector<uint64_t> v;
  for (uint64_t i = 0; i <= f.largest; i += step) {
    Value a = decode(i, f), b = i < f.largest ? decode(i + 1, f) : Value{Value::number, false, a.m + 1, a.e};
    Sum point, middle;
    point.add(a);
    a.e -= 1;
    b.e -= 1;
    middle.add(a);
    middle.add(b);
    for (uint64_t base : {point.round(kF32, 'z'), middle.round(kF32, 'z')})
      for (uint64_t near : {base, base + 1, base - 1})
        for (uint64_t sign : {0u, 0x80000000u}) v.push_back((near & 0x7fffffff) | sign);
  }
  for (uint64_t x :
       {0x7f800000u, 0xff800000u, 0x7fc00000u, 0xffffffffu, 0x7f7fffffu, 0xff7fffffu, 1u, 0x80000001u})
    v.push_back(x);
  return v;
}

std::vector<uint64_t> random_bits(const Format& f) {
  std::mt19937_64 random(11);
  std::vector<uint64_t> v{0, 1, f.largest, f.infinity, f.nan};
  const uint64_t one = uint64_t{1} << (f.precision - 1), middle = f.infinity / 2 / one;
  for (int i = 0; i < 8000; ++i) {
    uint64_t x = i % 4 == 0 ? random() & mask(f.bits)
                            : ((middle - 4 + random() % 72) % (f.infinity / one)) * one +
                                  (i % 4 == 1 ? random() % one & ~(one / 16 - 1) : random() % one);
    v.push_back((x ^ (random() % 2 << (f.bits - 1))) & mask(f.bits));
  }
  return v;
}

void between_floats() {
  for (const Type* t : {&kHalf, &kBfloat}) {
    const Format& f = t->format;
    const std::string name = t->name;
    auto value = [&f](uint64_t x) { return decode(x & 0xffff, f); };
    each(
        "every " + name + " to f32", convert("", kSingle, *t), all16(),
        [&](uint64_t x) { return rounded(value(x), kF32, 'n'); }, 71);
    each(
        "every " + name + " to f64", convert("", kDouble, *t), all16(),
        [&](uint64_t x) { return rounded(value(x), kF64, 'n'); }, 78, 90);
    const Type& other = t == &kHalf ? kBfloat : kHalf;
    each(
        "every " + name + " to " + other.name, convert(".rn", other, *t), all16(),
        [&](uint64_t x) { return rounded(value(x), other.format, 'n'); }, 78, 90);
    for (char mode : {'n', 'z', 'm', 'p'})
      for (const Type& to : kIntegers)
        each(
            "every " + name + " to " + to.name + ".r" + mode + "i",
            convert(std::string(".r") + mode + "i", to, *t), all16(),
            [&](uint64_t x) { return to_integer(value(x), to, mode, false); }, 78, 90);
    for (char mode : {'n', 'z', 'm', 'p'}) {
      if (t == &kBfloat && mode != 'n' && mode != 'z') continue;
      const std::string r = std::string(".r") + mode;
      each("f32 to " + name + r, convert(r, *t, kSingle), borders(f, 3),
           [&](uint64_t x) { return rounded(decode(x, kF32), f, mode); });
      auto relu = [&](uint64_t x) {
        const uint64_t y = rounded(decode(x, kF32), f, mode);
        return y & 0x8000 && y != f.nan ? 0 : y;
      };
      if (mode == 'n' || mode == 'z') {
        each("f32 to " + name + r + ".relu", convert(r + ".relu", *t, kSingle), borders(f, 17), relu);
        each("f32 to " + name + "x2" + r,
             "cvt.u32.u64 %a, %la; mov.b32 %f1, %a; mov.f32 %f2, 0f3f800000; cvt" + r + "." + name +
                 "x2.f32 %d, %f1, %f2; cvt.u64.u32 %ld, %d;",
             borders(f, 17), [&](uint64_t x) {
               return rounded(decode(x, kF32), f, mode) << 16 | rounded(decode(0x3f800000, kF32), f, 'n');
             });
      }
    }
  }
  each("f32 to f16.sat", convert(".rn.sat", kHalf, kSingle), borders(kF16, 17), [&](uint64_t x) -> uint64_t {
    const uint64_t y = rounded(decode(x, kF32), kF16, 'n');
    return y & 0x8000 || y > 0x7c00 ? 0 : std::min<uint64_t>(y, 0x3c00);
  });
  for (const char* r : {".rna", ".rn", ".rz"})
    each(
        std::string("f32 to tf32") + r, convert(r, kTensor, kSingle), borders(kTf32, 101),
        [&](uint64_t x) {
          const Value v = decode(x, kF32);
          const char mode = r[3] == 'a' ? 'a' : r[2];
          return v.kind == Value::nan ? uint64_t{0x7fffffff} : rounded(v, kTf32, mode) << 13;
        },
        78, 90);
  for (char mode : {'n', 'z', 'm', 'p'}) {
    const std::string r = std::string(".r") + mode;
    for (const Type* t : {&kSingle, &kHalf})
      each("f64 to " + std::string(t->name) + r, convert(r, *t, kDouble), random_bits(kF64),
           [&](uint64_t x) { return rounded(decode(x, kF64), t->format, mode); });
    for (const Type* t : {&kSingle, &kDouble})
      for (const Type& to : kIntegers)
        each(std::string(t->name) + " to " + to.name + r + "i", convert(r + "i", to, *t),
             random_bits(t->format),
             [&](uint64_t x) { return to_integer(decode(x, t->format), to, mode, t == &kDouble); });
  }
}

void from_integers() {
  std::mt19937_64 random(13);
  std::vector<uint64_t> in{0,
                           1,
                           127,
                           128,
                           255,
                           32767,
                           32768,
                           65535,
                           0x7fffffff,
                           0x80000000,
                           0xffffffff,
                           uint64_t{1} << 63,
                           ~uint64_t{0} >> 1,
                           ~uint64_t{0}};
  for (int i = 0; i < 8000; ++i) {  // also: ties and what lies beside them
    const int top = static_cast<int>(random() % 64), p = i % 2 ? 11 : i % 3 ? 24 : 53;
    uint64_t x = random() >> top;
    if (i % 4 == 1 && 63 - top > p) x = (x >> (63 - top - p) | 1) << (63 - top - p);
    in.push_back(x + random() % 3 - 1);
  }
  for (const Type& from : kIntegers)
    for (const Type* to : {&kHalf, &kSingle, &kDouble})
      for (char mode : {'n', 'z', 'm', 'p'})
        each(std::string(from.name) + " to " + to->name + ".r" + mode,
             convert(std::string(".r") + mode, *to, from), in, [&](uint64_t x) {
               x &= mask(from.bits);
               Value v;
               v.negative = from.is_signed && x >> (from.bits - 1);
               v.m = v.negative ? (~x + 1) & mask(from.bits) : x;
               return rounded(v, to->format, mode);
             });
}

void eight_bits() {
  for (const auto& [name, f] : {std::pair{std::string("e4m3x2"), kE4m3}, {std::string("e5m2x2"), kE5m2}}) {
    const Format format = f;
    const std::string type = name;
    auto up = [format](uint64_t x) { return rounded(decode(x & 255, format), kF16, 'n'); };
    auto no_minus = [](uint64_t y, uint64_t sign, uint64_t nan) { return y & sign && y != nan ? 0 : y; };
    for (bool relu : {false, true}) {
      const std::string r = relu ? ".relu" : "";
      each(
          "every " + type + r,
          "cvt.u16.u64 %h1, %la; cvt.rn" + r + ".f16x2." + type + " %d, %h1; cvt.u64.u32 %ld, %d;", all16(),
          [&](uint64_t x) {
            uint64_t low = up(x), high = up(x >> 8);
            if (relu) {
              low = no_minus(low, 0x8000, 0x7fff);
              high = no_minus(high, 0x8000, 0x7fff);
            }
            return low | high << 16;
          },
          81, 89);
      auto down = [&](const Value& v) -> uint64_t {
        uint64_t y = rounded(v, format, 'n');
        if (v.kind != Value::nan && (y & 127) > format.largest) y = (y & 128) | format.largest;  // .satfinite
        return relu ? no_minus(y, 128, format.nan) : y;
      };
      each(
          "every f16 to " + type + r,
          "cvt.u32.u64 %a, %la; shl.b32 %b, %a, 16; xor.b32 %b, %b, 0x80000000; or.b32 %a, %a, %b; "
          "cvt.rn.satfinite" +
              r + "." + type + ".f16x2 %h1, %a; cvt.u64.u16 %ld, %h1;",
          all16(),
          [&](uint64_t x) {
            return down(decode(x & 0xffff, kF16)) | down(decode((x ^ 0x8000) & 0xffff, kF16)) << 8;
          },
          81, 89);
      each(
          "f32 to " + type + r,
          "cvt.u32.u64 %a, %la; mov.b32 %f1, %a; mov.f32 %f2, 0f40400000; cvt.rn.satfinite" + r + "." + type +
              ".f32 %h1, %f2, %f1; cvt.u64.u16 %ld, %h1;",
          borders(format, 1),
          [&](uint64_t x) {
            return down(decode(x & 0xffffffff, kF32)) | down(decode(0x40400000, kF32)) << 8;
          },
          81, 89);
    }
  }
}

}  // namespace

void test_conversions() {
  between_floats();
  from_integers();
  eight_bits();
}

}  // namespace mgm::emulator::test
