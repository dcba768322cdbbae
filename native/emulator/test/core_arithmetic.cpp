// Instructions that compute, lane by lane, against oracles that differ in method.
#include "harness.h"

namespace mgm::emulator::test {
namespace {

// A kernel of one warp: each of `n` threads loads its inputs, runs `body`, stores its outputs. Inputs and
// outputs are 32-bit registers %a, %b, %c -> %d; wide ones %la.. -> %ld.
std::string lanes_kernel(const std::string& body, bool wide = false) {
  std::string s = kHead;
  s += ".visible .entry k(.param .u64 pa, .param .u64 pb, .param .u64 pc, .param .u64 pd)\n{\n"
       ".reg .b32 %r<20>; .reg .b64 %rd<20>; .reg .pred %p<8>; .reg .b32 %a, %b, %c, %d; .reg .b64 %la, %lb, "
       "%lc, %ld; .reg .b16 %h<8>; .reg .f32 %f<8>; .reg .f64 %fd<8>;\n"
       "ld.param.u64 %rd1, [pa]; ld.param.u64 %rd2, [pb]; ld.param.u64 %rd3, [pc]; ld.param.u64 %rd4, [pd];\n"
       "mov.u32 %r1, %tid.x; mov.u32 %r2, %ctaid.x; mov.u32 %r3, %ntid.x; mad.lo.u32 %r1, %r2, %r3, %r1;\n";
  std::string size = wide ? "8" : "4", type = wide ? "b64" : "b32", l = wide ? "l" : "";
  for (int i = 1; i <= 4; ++i)
    s += "mad.wide.u32 %rd" + std::to_string(i) + ", %r1, " + size + ", %rd" + std::to_string(i) + ";\n";
  s += "ld.global." + type + " %" + l + "a, [%rd1]; ld.global." + type + " %" + l + "b, [%rd2]; ld.global." +
       type + " %" + l + "c, [%rd3];\n";
  s += body + "\nst.global." + type + " [%rd4], %" + l + "d;\nret;\n}\n";
  return s;
}

std::vector<uint32_t> interesting(size_t n, uint32_t seed) {
  std::mt19937 r(seed);
  static const uint32_t special[] = {0,          1,          2,          31,         32,         33,
                                     0xff,       0x7fff,     0x8000,     0xffff,     0x7fffffff, 0x80000000,
                                     0x80000001, 0xffffffff, 0x3f800000, 0xbf800000, 0x7f800000, 0xff800000,
                                     0x7fc00000, 0x00000001, 0x00800000, 0x7f7fffff, 0x3c003c00, 0x7c00fc00};
  std::vector<uint32_t> v(n);
  for (auto& x : v) x = r() % 3 ? r() : special[r() % (sizeof special / 4)];
  return v;
}

void integer(const char* name, const std::string& body, uint32_t (*oracle)(uint32_t, uint32_t, uint32_t)) {
  Device d;
  size_t n = 512;
  auto a = interesting(n, 1), b = interesting(n, 2), c = interesting(n, 3);
  uint64_t out = d.put(std::vector<uint32_t>(n));
  auto r = d.run(lanes_kernel(body), {d.put(a), d.put(b), d.put(c), out}, 4, 128);
  auto got = d.get<uint32_t>(out, n);
  bool ok = r.error == 0 && r.reports.empty();
  for (size_t i = 0; i < n && ok; ++i) {
    uint32_t want = oracle(a[i], b[i], c[i]);
    if (got[i] != want) {
      std::printf("%s(%08x, %08x, %08x) = %08x, expected %08x\n", name, a[i], b[i], c[i], got[i], want);
      ok = false;
    }
  }
  check(ok, name);
}

// Oracles by long arithmetic or bit by bit, not by the host's own operation.
uint32_t bit_loop(uint32_t a, uint32_t b, uint32_t c, uint32_t table) {
  uint32_t r = 0;
  for (int i = 0; i < 32; ++i) r |= (table >> ((a >> i & 1) * 4 + (b >> i & 1) * 2 + (c >> i & 1)) & 1) << i;
  return r;
}

void integers() {
  using u = uint32_t;
  integer("add", "add.u32 %d, %a, %b;",
          [](u a, u b, u) -> u { return static_cast<u>((uint64_t{a} + b) % (uint64_t{1} << 32)); });
  integer("sub", "sub.s32 %d, %a, %b;", [](u a, u b, u) -> u {
    return static_cast<u>((uint64_t{a} + (uint64_t{1} << 32) - b) % (uint64_t{1} << 32));
  });
  integer("add.sat", "add.sat.s32 %d, %a, %b;", [](u a, u b, u) -> u {
    int64_t s = int64_t{int32_t(a)} + int32_t(b);
    return u(int32_t(s < INT32_MIN ? INT32_MIN : s > INT32_MAX ? INT32_MAX : s));
  });
  integer("mul.hi.s32", "mul.hi.s32 %d, %a, %b;",
          [](u a, u b, u) -> u { return u(uint64_t(int64_t{int32_t(a)} * int32_t(b)) >> 32); });
  integer("mul.hi.u32", "mul.hi.u32 %d, %a, %b;",
          [](u a, u b, u) -> u { return u((uint64_t{a} * b) >> 32); });
  integer("mad.lo", "mad.lo.s32 %d, %a, %b, %c;", [](u a, u b, u c) -> u {
    u r = c;
    for (int i = 0; i < 32; ++i)
      if (b >> i & 1) r += a << i;
    return r;
  });
  integer("div.s32", "div.s32 %d, %a, %b;",
          [](u a, u b, u) -> u { return b == 0 ? ~0u : u(int64_t{int32_t(a)} / int32_t(b)); });
  integer("rem.u32", "rem.u32 %d, %a, %b;", [](u a, u b, u) -> u {
    if (!b) return a;
    uint64_t r = 0;
    for (int i = 31; i >= 0; --i) {
      r = r * 2 + (a >> i & 1);
      if (r >= b) r -= b;
    }
    return u(r);
  });
  integer("min.s32", "min.s32 %d, %a, %b;",
          [](u a, u b, u) -> u { return (a ^ 0x80000000u) < (b ^ 0x80000000u) ? a : b; });
  integer("max.u32", "max.u32 %d, %a, %b;", [](u a, u b, u) -> u { return a < b ? b : a; });
  integer("sad", "sad.s32 %d, %a, %b, %c;", [](u a, u b, u c) -> u {
    int64_t x = int64_t{int32_t(a)} - int32_t(b);
    return u(uint64_t(x < 0 ? -x : x)) + c;
  });
  integer("lop3", "lop3.b32 %d, %a, %b, %c, 0xca;",
          [](u a, u b, u c) -> u { return bit_loop(a, b, c, 0xca); });
  integer("lop3 2", "lop3.b32 %d, %a, %b, %c, 0x96;",
          [](u a, u b, u c) -> u { return bit_loop(a, b, c, 0x96); });
  integer("shl", "shl.b32 %d, %a, %b;", [](u a, u b, u) -> u {
    u r = a;
    if (b >= 32) return 0;
    while (b--) r += r;
    return r;
  });
  integer("shr.s32", "shr.s32 %d, %a, %b;", [](u a, u b, u) -> u {
    int64_t r = int32_t(a);
    return u(r >> (b > 32 ? 32 : b));
  });
  integer("shf.l.wrap", "shf.l.wrap.b32 %d, %a, %b, %c;", [](u a, u b, u c) -> u {
    uint64_t v = uint64_t{b} << 32 | a;
    return u((v << (c & 31)) >> 32);
  });
  integer("shf.r.clamp", "shf.r.clamp.b32 %d, %a, %b, %c;", [](u a, u b, u c) -> u {
    uint64_t v = uint64_t{b} << 32 | a;
    return u(v >> (c > 32 ? 32 : c));
  });
  integer("prmt", "prmt.b32 %d, %a, %b, %c;", [](u a, u b, u c) -> u {
    uint8_t bytes[8];
    std::memcpy(bytes, &a, 4);
    std::memcpy(bytes + 4, &b, 4);
    u r = 0;
    for (int i = 3; i >= 0; --i) {
      int s = c >> (4 * i) & 15;
      uint8_t x = bytes[s & 7];
      if (s & 8) x = x >= 128 ? 255 : 0;
      r = r * 256 + x;
    }
    return r;
  });
  integer("bfe.s32", "bfe.s32 %d, %a, %b, %c;", [](u a, u b, u c) -> u {
    int pos = b & 255, len = c & 255, msb = 31;
    u r = 0, sign = len == 0 ? 0 : a >> (pos + len - 1 < msb ? pos + len - 1 : msb) & 1;
    for (int i = 0; i <= msb; ++i) r |= (i < len && pos + i <= msb ? a >> (pos + i) & 1 : sign) << i;
    return r;
  });
  integer("bfi", "bfi.b32 %d, %a, %b, %c, 7;", [](u a, u b, u c) -> u {
    u r = b;
    int pos = c & 255;
    for (int i = 0; i < 7 && pos + i <= 31; ++i) r = (r & ~(1u << (pos + i))) | (a >> i & 1) << (pos + i);
    return r;
  });
  integer("popc", "popc.b32 %d, %a;", [](u a, u, u) -> u {
    u n = 0;
    for (; a; a /= 2) n += a % 2;
    return n;
  });
  integer("clz", "clz.b32 %d, %a;", [](u a, u, u) -> u {
    u n = 0;
    while (n < 32 && !(a >> (31 - n) & 1)) ++n;
    return n;
  });
  integer("brev", "brev.b32 %d, %a;", [](u a, u, u) -> u {
    u r = 0;
    for (int i = 0; i < 32; ++i) {
      r = r * 2 + a % 2;
      a /= 2;
    }
    return r;
  });
  integer("bfind.s32", "bfind.s32 %d, %a;", [](u a, u, u) -> u {
    if (a >> 31) a = ~a;
    for (int i = 31; i >= 0; --i)
      if (a >> i & 1) return u(i);
    return ~0u;
  });
  integer("dp4a", "dp4a.s32.u32 %d, %a, %b, %c;", [](u a, u b, u c) -> u {
    int64_t s = int32_t(c);
    for (int i = 0; i < 4; ++i) {
      int x = a >> 8 * i & 255;
      s += int64_t(x > 127 ? x - 256 : x) * (b >> 8 * i & 255);
    }
    return u(uint64_t(s));
  });
  integer("carry chain", "{ .reg .u32 x, y; add.cc.u32 x, %a, %b; addc.u32 y, %c, 0; xor.b32 %d, x, y; }",
          [](u a, u b, u c) -> u {
            uint64_t s = uint64_t{a} + b;
            return u(s) ^ u(c + (s >> 32));
          });
  integer(
      "setp selp",
      "setp.lt.s32 %p1|%p2, %a, %b; selp.u32 %r5, 1, 2, %p1; selp.u32 %r6, 4, 8, %p2; or.b32 %d, %r5, %r6;",
      [](u a, u b, u) -> u { return int64_t{int32_t(a)} - int32_t(b) < 0 ? 1u | 8u : 2u | 4u; });
  integer("predication",
          "mov.u32 %d, 7; setp.gt.u32 %p1, %a, %b; @%p1 add.u32 %d, %d, %c; @!%p1 mov.u32 %d, %a;",
          [](u a, u b, u c) -> u { return a > b ? 7 + c : a; });
  integer("pack", "mov.b32 {%h1, %h2}, %a; mov.b32 %d, {%h2, %h1};",
          [](u a, u, u) -> u { return a << 16 | a >> 16; });
  integer("cvt.s8", "cvt.s32.s8 %d, %a;", [](u a, u, u) -> u {
    int x = a & 255;
    return u(x > 127 ? x - 256 : x);
  });
  integer("cvt.sat.u8", "cvt.sat.u8.s32 %d, %a;", [](u a, u, u) -> u {
    int32_t x = int32_t(a);
    return x < 0 ? 0 : x > 255 ? 255 : u(x);
  });
}

// One-lane float instruction on raw bits.
uint32_t canonical(float f) {
  return f != f ? 0x7fffffff : as<uint32_t>(f);
}
void floats() {
  using u = uint32_t;
  auto f = [](u v) { return as<float>(v); };
  (void)f;
  integer("add.f32", "add.rn.f32 %d, %a, %b;", [](u a, u b, u) -> u {
    return canonical(static_cast<float>(static_cast<long double>(as<float>(a)) + as<float>(b)));
  });
  integer("mul.f32", "mul.rn.f32 %d, %a, %b;", [](u a, u b, u) -> u {
    return canonical(static_cast<float>(static_cast<double>(as<float>(a)) * as<float>(b)));
  });
  integer("mul.rz", "mul.rz.f32 %d, %a, %b;", [](u a, u b, u) -> u {
    double x = static_cast<double>(as<float>(a)) * as<float>(b);
    float r = static_cast<float>(x);
    if (std::isinf(r) && std::isfinite(x)) r = std::copysign(0x1.fffffep127f, r);
    if (std::isfinite(x) && std::fabs(static_cast<double>(r)) > std::fabs(x)) r = std::nextafter(r, 0.0f);
    return canonical(r);
  });
  integer("min.f32", "min.f32 %d, %a, %b;", [](u a, u b, u) -> u {
    float x = as<float>(a), y = as<float>(b);
    if (x != x && y != y) return 0x7fffffff;
    if (x != x) return b;
    if (y != y) return a;
    auto key = [](u v) { return v >> 31 ? ~v : v | 0x80000000u; };
    return key(a) < key(b) ? a : b;
  });
  integer("fma.ftz", "fma.rn.ftz.f32 %d, %a, %b, 0f00000000;", [](u a, u b, u) -> u {
    auto z = [](float v) { return std::fabs(v) < 0x1p-126f ? std::copysign(0.0f, v) : v; };
    double p = static_cast<double>(z(as<float>(a))) * z(as<float>(b));
    float r = static_cast<float>(p);
    if (std::fabs(r) < 0x1p-126f) r = std::copysign(0.0f, r);
    if (p == 0) r = 0.0f * (std::signbit(p) ? 1.0f : 1.0f);
    return canonical(r);
  });
  integer("add.sat", "add.sat.f32 %d, %a, %b;", [](u a, u b, u) -> u {
    long double x = static_cast<long double>(as<float>(a)) + as<float>(b);
    return x != x ? 0 : x <= 0 ? 0 : x >= 1 ? 0x3f800000 : as<u>(static_cast<float>(x));
  });
  integer("cvt.rzi", "cvt.rzi.s32.f32 %d, %a;", [](u a, u, u) -> u {
    float x = as<float>(a);
    return x != x               ? 0
           : x >= 2147483648.0f ? 0x7fffffff
           : x < -2147483648.0f ? 0x80000000u
                                : u(int32_t(int64_t(x)));
  });
  integer("cvt.rn.f32.u32", "cvt.rn.f32.u32 %d, %a;", [](u a, u, u) -> u {
    if (!a) return 0;
    int top = 31;
    while (!(a >> top & 1)) --top;
    if (top <= 23) return u(127 + top) << 23 | ((a << (23 - top)) & 0x7fffff);
    int s = top - 23;
    u m = a >> s, rest = a & ((1u << s) - 1), half = 1u << (s - 1);
    if (rest > half || (rest == half && m & 1)) ++m;
    return (u(127 + top) << 23) + m - 0x800000;
  });
  integer("copysign", "copysign.f32 %d, %a, %b;",
          [](u a, u b, u) -> u { return (a & 0x80000000u) | (b & 0x7fffffffu); });
}

// Every 16-bit pattern through conversions.
void conversions() {
  Device d;
  size_t n = 65536;
  std::vector<uint32_t> in(n);
  for (size_t i = 0; i < n; ++i) in[i] = static_cast<uint32_t>(i);
  uint64_t a = d.put(in), out = d.put(std::vector<uint32_t>(n));
  for (int kind = 0; kind < 2; ++kind) {
    std::string t = kind ? "bf16" : "f16";
    auto r =
        d.run(lanes_kernel("mov.b32 {%h1, %h2}, %a; cvt.f32." + t + " %d, %h1;"), {a, a, a, out}, 256, 256);
    auto got = d.get<uint32_t>(out, n);
    bool ok = r.error == 0 && r.reports.empty();
    for (size_t i = 0; i < n; ++i) {
      double want = half_value(static_cast<uint32_t>(i), kind ? 8 : 5, kind ? 7 : 10);
      float g = as<float>(got[i]);
      ok &= want != want ? got[i] == 0x7fffffff
                         : static_cast<double>(g) == want && std::signbit(g) == std::signbit(want);
    }
    check(ok, "every " + t + " to f32");
    // Back again, from points at, just below and just above the midpoints between neighbours.
    std::vector<uint32_t> mid(n);
    std::vector<double> low(n), high(n);
    for (size_t i = 0; i < n; ++i) {
      uint32_t inf = kind ? 0x7f80 : 0x7c00, m = static_cast<uint32_t>(i) & 0x7fff;
      if (m >= inf - 1) m = 0;
      double x = half_value(m, kind ? 8 : 5, kind ? 7 : 10),
             y = half_value(m + 1, kind ? 8 : 5, kind ? 7 : 10);
      float q = static_cast<float>((x + y) / 2);
      mid[i] = as<uint32_t>(q) + static_cast<uint32_t>(i % 3) - 1;
    }
    uint64_t b = d.put(mid);
    r = d.run(lanes_kernel("mov.b32 %f1, %a; cvt.rn." + t + ".f32 %h1, %f1; cvt.u32.u16 %d, %h1;"),
              {b, b, b, out}, 256, 256);
    got = d.get<uint32_t>(out, n);
    ok = r.error == 0;
    for (size_t i = 0; i < n; ++i) {
      double v = as<float>(mid[i]), g = half_value(got[i], kind ? 8 : 5, kind ? 7 : 10);
      double below = half_value(got[i] ? got[i] - 1 : 0, kind ? 8 : 5, kind ? 7 : 10),
             above = half_value(got[i] + 1, kind ? 8 : 5, kind ? 7 : 10);
      double e = std::fabs(g - v);
      bool best = e <= std::fabs(below - v) && (std::isinf(above) || e <= std::fabs(above - v));
      bool tie = (e == std::fabs(below - v) && got[i]) || e == std::fabs(above - v);
      ok &= best && (!tie || !(got[i] & 1));
    }
    check(ok, "f32 to nearest " + t);
  }
  // fp8: all 256 values up, and back.
  d.spec = device_spec(89);
  for (int kind = 0; kind < 2; ++kind) {
    std::string t = kind ? "e5m2x2" : "e4m3x2";
    std::string k = lanes_kernel(
        "mov.b32 {%h1, %h2}, %a; cvt.rn.f16x2." + t +
        " %r5, %h1; mov.b32 {%h3, %h4}, %r5; cvt.f32.f16 %f1, %h3; cvt.f32.f16 %f2, %h4; cvt.rn.satfinite." +
        t + ".f32 %h5, %f2, %f1; mov.b32 %d, {%h5, %h3};");
    k.replace(k.find(".version 7.8"), 12, ".version 8.1");
    k.replace(k.find("sm_80"), 5, "sm_89");
    auto r = d.run(k, {a, a, a, out}, 1, 256);
    auto got = d.get<uint32_t>(out, 256);
    bool ok = r.error == 0;
    for (uint32_t i = 0; i < 256; ++i) {
      double want = kind                  ? half_value(i, 5, 2)
                    : (i & 0x7f) == 0x7f  ? NAN
                    : (i >> 3 & 15) == 15 ? (i & 0x80 ? -1 : 1) * 256.0 * (1 + (i & 7) / 8.0)
                                          : half_value(i, 4, 3);
      double v = half_value(got[i] >> 16, 5, 10);
      ok &= want != want ? v != v : v == want;
      uint32_t back = got[i] & 255, expect = want != want ? 0x7f : std::isinf(want) ? (i & 0x80) | 0x7b : i;
      ok &= back == expect;
    }
    check(ok, "every " + t);
  }
}

}  // namespace

void test_arithmetic() {
  integers();
  floats();
  conversions();
}

}  // namespace mgm::emulator::test
