// The emulator's core against oracles that differ in method, and planted bugs that it must report.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <set>

#include "../emulator.h"

using namespace mgm::emulator;

namespace {

int passed = 0, failed = 0;
void check(bool ok, const std::string& what) {
  if (ok) {
    ++passed;
  } else {
    ++failed;
    std::printf("FAILED: %s\n", what.c_str());
  }
}

const char* kHead = ".version 7.8\n.target sm_80\n.address_size 64\n";
template <class T, class F>
T as(F f) {
  static_assert(sizeof(T) == sizeof(F));
  T t;
  std::memcpy(&t, &f, sizeof t);
  return t;
}

struct Device {
  DeviceSpec spec = device_spec(80);
  Memory memory{spec, 0};
  Options options;
  Device() {
    options.threads = 1;
    options.watchdog_seconds = 20;
  }
  template <class T>
  uint64_t put(const std::vector<T>& v) {
    uint64_t a = memory.allocate(v.size() * sizeof(T));
    std::memcpy(memory.resolve(a, v.size() * sizeof(T)), v.data(), v.size() * sizeof(T));
    memory.mark_initialized(a, v.size() * sizeof(T));
    return a;
  }
  template <class T>
  std::vector<T> get(uint64_t a, size_t n) {
    std::vector<T> v(n);
    std::memcpy(v.data(), memory.resolve(a, n * sizeof(T)), n * sizeof(T));
    return v;
  }
  LaunchResult run(const std::string& ptx, const std::vector<uint64_t>& params, uint32_t grid, uint32_t block,
                   size_t shared = 0) {
    std::string log;
    int error;
    auto m = Module::load(ptx, spec, memory, &log, &error);
    if (!m) {
      std::printf("load failed: %s", log.c_str());
      LaunchResult r;
      r.error = error;
      return r;
    }
    LaunchConfig c;
    c.grid[0] = grid;
    c.block[0] = block;
    c.dynamic_shared = shared;
    return launch(*m, 0, c, reinterpret_cast<const std::byte*>(params.data()), spec, memory, options);
  }
};

std::string load_error(const std::string& ptx, int* code, DeviceSpec spec = device_spec(80)) {
  Memory memory(spec, 0);
  std::string log;
  auto m = Module::load(ptx, spec, memory, &log, code);
  return log;
}

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

// Every 16-bit pattern through conversions; values by arithmetic on the fields.
double half_value(uint32_t h, int exponent_bits, int mantissa_bits) {
  int e = h >> mantissa_bits & ((1 << exponent_bits) - 1), m = h & ((1 << mantissa_bits) - 1),
      bias = (1 << (exponent_bits - 1)) - 1;
  double s = h >> (exponent_bits + mantissa_bits) & 1 ? -1 : 1;
  if (e == (1 << exponent_bits) - 1) return m ? NAN : s * INFINITY;
  return s * (e ? std::pow(2.0, e - bias) * (1 + m / std::pow(2.0, mantissa_bits))
                : std::pow(2.0, 1 - bias) * m / std::pow(2.0, mantissa_bits));
}
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

// mma: each lane holds its fragment by the ISA's per-element formulas; the oracle is a plain loop.
void matrices() {
  struct Case {
    const char *shape, *type, *acc;
    int k, bits;
  } cases[] = {{"m16n8k16", "f16", "f32", 16, 16}, {"m16n8k16", "bf16", "f32", 16, 16},
               {"m16n8k8", "f16", "f32", 8, 16},   {"m16n8k8", "bf16", "f32", 8, 16},
               {"m16n8k8", "tf32", "f32", 8, 32},  {"m16n8k4", "tf32", "f32", 4, 32},
               {"m16n8k32", "s8", "s32", 32, 8},   {"m16n8k16", "u8", "s32", 16, 8},
               {"m16n8k64", "s4", "s32", 64, 4},   {"m16n8k32", "u4", "s32", 32, 4},
               {"m16n8k16", "f16", "f16", 16, 16}};
  std::mt19937 random(5);
  for (const Case& c : cases) {
    std::string type = c.type, acc = c.acc;
    bool f16acc = acc == "f16";
    int A[16][64], B[64][8], C[16][8];
    int lo = type[0] == 'u' ? 0 : -7;
    for (auto& row : A)
      for (int& v : row) v = lo + static_cast<int>(random() % 8);
    for (auto& row : B)
      for (int& v : row) v = lo + static_cast<int>(random() % 8);
    for (auto& row : C)
      for (int& v : row) v = static_cast<int>(random() % 100) - 50;
    auto encode = [&](int v) -> uint32_t {
      if (type == "f16") {  // small integers: by search over all patterns
        for (uint32_t h = 0; h < 65536; ++h)
          if (half_value(h, 5, 10) == v) return h;
      }
      if (type == "bf16") return as<uint32_t>(static_cast<float>(v)) >> 16;
      if (type == "tf32") return as<uint32_t>(static_cast<float>(v));
      return static_cast<uint32_t>(v) & ((1u << c.bits) - 1);
    };
    int e = 32 / c.bits, na = 16 * c.k * c.bits / 32 / 32, nb = 8 * c.k * c.bits / 32 / 32,
        nd = f16acc ? 2 : 4;
    std::vector<uint32_t> a(32 * 8), b(32 * 8), cc(32 * 8);
    for (int lane = 0; lane < 32; ++lane) {
      int group = lane / 4, t = lane % 4;
      for (int i = 0; i < na * e; ++i) {
        // PTX ISA: row is group for even chunks of e elements, group + 8 for odd ones; columns advance after
        // two.
        int row = (i / e) % 2 == 0 ? group : group + 8, col = t * e + i % e + (i / (2 * e)) * 4 * e;
        a[static_cast<size_t>(lane * 8 + i / e)] |= encode(A[row][col]) << (c.bits * (i % e)) % 32;
      }
      for (int i = 0; i < nb * e; ++i)
        b[static_cast<size_t>(lane * 8 + i / e)] |= encode(B[t * e + i % e + i / e * 4 * e][group])
                                                    << (c.bits * (i % e)) % 32;
      for (int i = 0; i < 4; ++i) {
        int v = C[i < 2 ? group : group + 8][t * 2 + i % 2];
        if (f16acc) {
          type = "f16";
          cc[static_cast<size_t>(lane * 8 + i / 2)] |= encode(v) << (16 * (i % 2));
        } else {
          cc[static_cast<size_t>(lane * 8 + i)] =
              acc == "s32" ? static_cast<uint32_t>(v) : as<uint32_t>(static_cast<float>(v));
        }
      }
    }
    std::string s = kHead;
    s += ".visible .entry k(.param .u64 pa, .param .u64 pb, .param .u64 pc, .param .u64 pd)\n{ .reg .b32 "
         "%r<40>; .reg .f32 %f<8>; .reg .b64 %rd<8>;\n mov.u32 %r1, %tid.x; ld.param.u64 %rd1, [pa]; "
         "ld.param.u64 %rd2, [pb]; ld.param.u64 %rd3, [pc]; ld.param.u64 %rd4, [pd];\n";
    for (int i = 1; i <= 4; ++i)
      s += "mad.wide.u32 %rd" + std::to_string(i) + ", %r1, 32, %rd" + std::to_string(i) + ";\n";
    auto list = [&](int n, int from) {
      std::string l = "{";
      for (int i = 0; i < n; ++i) l += (i ? ", %r" : "%r") + std::to_string(from + i);
      return l + "}";
    };
    for (int i = 0; i < na; ++i)
      s += "ld.global.u32 %r" + std::to_string(10 + i) + ", [%rd1+" + std::to_string(4 * i) + "];\n";
    for (int i = 0; i < nb; ++i)
      s += "ld.global.u32 %r" + std::to_string(15 + i) + ", [%rd2+" + std::to_string(4 * i) + "];\n";
    for (int i = 0; i < nd; ++i)
      s += "ld.global.u32 %r" + std::to_string(20 + i) + ", [%rd3+" + std::to_string(4 * i) + "];\n";
    std::string mt = std::string(c.type);
    s += "mma.sync.aligned." + std::string(c.shape) + ".row.col." + acc + "." + mt + "." + mt + "." + acc +
         " " + list(nd, 30) + ", " + list(na, 10) + ", " + list(nb, 15) + ", " + list(nd, 20) + ";\n";
    for (int i = 0; i < nd; ++i)
      s += "st.global.u32 [%rd4+" + std::to_string(4 * i) + "], %r" + std::to_string(30 + i) + ";\n";
    s += "ret; }\n";
    Device d;
    uint64_t out = d.put(std::vector<uint32_t>(256));
    auto r = d.run(s, {d.put(a), d.put(b), d.put(cc), out}, 1, 32);
    auto got = d.get<uint32_t>(out, 256);
    bool ok = r.error == 0 && r.reports.empty();
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) {
        int row = lane / 4 + (i < 2 ? 0 : 8), col = lane % 4 * 2 + i % 2, want = C[row][col];
        for (int k = 0; k < c.k; ++k) want += A[row][k] * B[k][col];
        double g =
            f16acc ? half_value(got[static_cast<size_t>(lane * 8 + i / 2)] >> (16 * (i % 2)) & 0xffff, 5, 10)
            : acc == "s32" ? static_cast<double>(static_cast<int32_t>(got[static_cast<size_t>(lane * 8 + i)]))
                           : static_cast<double>(as<float>(got[static_cast<size_t>(lane * 8 + i)]));
        ok &= g == want;
      }
    check(ok, std::string("mma ") + c.shape + " " + c.type + " " + c.acc);
  }
}

// A kernel on shared memory with one pointer parameter.
std::string shared_kernel(const std::string& body, const char* shared = ".shared .align 16 .b8 s[1024];") {
  return std::string(kHead) +
         ".visible .entry k(.param .u64 p)\n{\n.reg .b32 %r<30>; .reg .b64 %rd<20>; .reg .pred %p<10>; .reg "
         ".b16 %h<8>; .reg .f32 %f<10>;\n" +
         shared +
         "\nld.param.u64 %rd1, [p]; mov.u32 %r1, %tid.x; mov.u32 %r2, s; shl.b32 %r3, %r1, 2; add.u32 %r4, "
         "%r2, %r3; mad.wide.u32 %rd2, %r1, 4, %rd1;\n" +
         body + "\nret;\n}\n";
}

void expect_report(const char* what, const std::string& ptx, ReportKind kind, uint32_t block,
                   size_t words = 256, size_t shared = 0, const char* mention = "PTX line") {
  for (uint64_t seed = 0; seed < 4; ++seed) {
    Device d;
    d.options.seed = seed;
    uint64_t p = d.put(std::vector<uint32_t>(words, 1));
    auto r = d.run(ptx, {p}, 1, block, shared);
    bool found = false;
    for (const Report& x : r.reports)
      found |= x.kind == kind && x.message.find(mention) != std::string::npos && x.kernel == "k";
    if (!found) {
      std::printf("%s seed %d: error %d\n", what, static_cast<int>(seed), r.error);
      for (const Report& x : r.reports) std::printf("  %s\n", x.message.c_str());
    }
    check(found, std::string(what) + ", seed " + std::to_string(seed));
  }
}
void expect_clean(const char* what, const std::string& ptx, uint32_t block, const std::vector<uint32_t>& want,
                  uint32_t grid = 1, size_t shared = 0) {
  for (uint64_t seed = 0; seed < 4; ++seed) {
    Device d;
    d.options.seed = seed;
    d.options.threads = 1 + static_cast<int>(seed % 2);
    uint64_t p = d.put(std::vector<uint32_t>(256, 1));
    auto r = d.run(ptx, {p}, grid, block, shared);
    auto got = d.get<uint32_t>(p, want.size());
    bool ok = r.error == 0 && r.reports.empty() && got == want;
    if (!ok) {
      std::printf("%s seed %d: error %d\n", what, static_cast<int>(seed), r.error);
      for (const Report& x : r.reports) std::printf("  %s\n", x.message.c_str());
      for (size_t i = 0; i < want.size(); ++i)
        if (got[i] != want[i]) {
          std::printf("  [%zu] = %u, expected %u\n", i, got[i], want[i]);
          break;
        }
    }
    check(ok, std::string(what) + ", seed " + std::to_string(seed));
  }
}
std::vector<uint32_t> filled(size_t n, uint32_t (*f)(uint32_t)) {
  std::vector<uint32_t> v(n);
  for (uint32_t i = 0; i < n; ++i) v[i] = f(i);
  return v;
}

void bugs() {
  const std::string reverse =
      "st.shared.u32 [%r4], %r1; BARRIER sub.u32 %r5, 127, %r1; shl.b32 %r5, %r5, 2; add.u32 %r5, %r5, %r2; "
      "ld.shared.u32 %r6, [%r5]; st.global.u32 [%rd2], %r6;";
  auto with = [](std::string s, const std::string& from, const std::string& to) {
    return s.replace(s.find(from), from.size(), to);
  };
  expect_clean("barrier", shared_kernel(with(reverse, "BARRIER", "bar.sync 0;")), 128,
               filled(128, [](uint32_t i) { return 127 - i; }));
  for (uint64_t seed = 0; seed < 4; ++seed) {  // reported as a race or as a read of what is not written yet
    Device d;
    d.options.seed = seed;
    auto r = d.run(shared_kernel(with(reverse, "BARRIER", "")), {d.put(std::vector<uint32_t>(256))}, 1, 128);
    bool found = false;
    for (auto& x : r.reports) found |= x.kind == ReportKind::shared_race;
    check(found, "missing barrier");
  }
  const std::string async =
      "mad.wide.u32 %rd3, %r1, 4, %rd1; cp.async.ca.shared.global [%r4], [%rd3], 4; cp.async.commit_group; "
      "WAIT bar.sync 0; xor.b32 %r5, %r4, 4; ld.shared.u32 %r6, [%r5]; add.u32 %r6, %r6, 4; bar.sync 0; "
      "st.global.u32 [%rd2], %r6;";
  expect_clean("cp.async", shared_kernel(with(async, "WAIT", "cp.async.wait_group 0;")), 128,
               filled(128, [](uint32_t) { return 5u; }));
  expect_report("missing wait", shared_kernel(with(async, "WAIT", "")), ReportKind::shared_race, 128);
  expect_report("wait for too few groups", shared_kernel(with(async, "WAIT", "cp.async.wait_group 1;")),
                ReportKind::shared_race, 128);
  expect_clean(
      "cp.async zero fill",
      shared_kernel(
          "mad.wide.u32 %rd3, %r1, 16, %rd1; shl.b32 %r5, %r1, 4; add.u32 %r5, %r5, %r2; "
          "cp.async.cg.shared.global [%r5], [%rd3], 16, 4; cp.async.wait_all; ld.shared.v4.u32 {%r6, %r7, "
          "%r8, %r9}, [%r5]; add.u32 %r6, %r6, %r7; add.u32 %r6, %r6, %r9; st.global.u32 [%rd2], %r6;"),
      32, filled(32, [](uint32_t) { return 1u; }));
  expect_report("global overrun by one", shared_kernel("st.global.u32 [%rd2+4], %r1;"),
                ReportKind::out_of_bounds, 64, 64);
  expect_report("shared overrun by one",
                shared_kernel("st.shared.u32 [%r4+4], %r1;", ".shared .align 4 .b8 s[256];"),
                ReportKind::out_of_bounds, 64);
  expect_report("misaligned vector", shared_kernel("ld.global.v2.u32 {%r5, %r6}, [%rd2];"),
                ReportKind::misaligned, 64);
  expect_report("uninitialised shared", shared_kernel("ld.shared.u32 %r5, [%r4]; st.global.u32 [%rd2], %r5;"),
                ReportKind::uninitialized_read, 64);
  expect_report("mask without the caller",
                shared_kernel("shfl.sync.idx.b32 %r5, %r1, 0, 31, 0x0000ffff; st.global.u32 [%rd2], %r5;"),
                ReportKind::bad_mask, 32);
  expect_report("mask names absent lanes",
                shared_kernel("setp.lt.u32 %p1, %r1, 16; @!%p1 bra $E; shfl.sync.bfly.b32 %r5, %r1, 1, 31, "
                              "0xffffffff; st.global.u32 [%rd2], %r5; $E: st.global.u32 [%rd2+128], %r1;"),
                ReportKind::bad_mask, 32);
  expect_report("shfl reads a lane outside",
                shared_kernel("setp.lt.u32 %p1, %r1, 16; @!%p1 bra $E; shfl.sync.bfly.b32 %r5, %r1, 16, 31, "
                              "0xffff; st.global.u32 [%rd2], %r5; $E:"),
                ReportKind::bad_mask, 32);
  const char* divergent = "setp.lt.u32 %p1, %r1, N; @!%p1 bra $E; bar.sync 0; $E: st.global.u32 [%rd2], %r1;";
  expect_report("barrier in half a warp", shared_kernel(with(divergent, "N", "16")),
                ReportKind::divergent_barrier, 64);
  expect_report("barrier in one warp of two", shared_kernel(with(divergent, "N", "32")),
                ReportKind::divergent_barrier, 64);
  expect_clean("early return before a barrier",
               shared_kernel("setp.ge.u32 %p1, %r1, 40; @%p1 ret; st.shared.u32 [%r4], %r1; bar.sync 0; "
                             "ld.shared.u32 %r5, [s+156]; st.global.u32 [%rd2], %r5;"),
               64, filled(40, [](uint32_t) { return 39u; }));
  expect_report("trap", shared_kernel("trap;"), ReportKind::trap, 32);
  {
    Device d;
    uint64_t p = d.put(std::vector<uint32_t>(64));
    std::vector<Report> reports;
    check(d.memory.free(p, &reports) && reports.empty(), "free");
    auto r = d.run(shared_kernel("st.global.u32 [%rd2], %r1;"), {p}, 1, 32);
    check(r.error == 700 && !r.reports.empty() && r.reports[0].kind == ReportKind::use_after_free,
          "use after free");
    check(!d.memory.free(p, &reports) && reports.size() == 1 && reports[0].kind == ReportKind::invalid_free,
          "double free");
    uint64_t q = d.memory.allocate(256);
    check(d.memory.first_uninitialized(q, 256) == 0, "fresh memory is not initialised");
    r = d.run(shared_kernel("ld.global.u32 %r5, [%rd2];"), {q}, 1, 32);
    check(r.error == 0 && r.reports.size() == 1 && r.reports[0].kind == ReportKind::uninitialized_read,
          "uninitialised global");
    uint32_t host[32] = {};
    r = d.run(shared_kernel("st.global.u32 [%rd2], %r1;"), {reinterpret_cast<uint64_t>(host)}, 1, 32);
    check(r.error == 700 && host[5] == 0, "host pointer on the device");
    uint64_t mapped = d.memory.map_host(host, sizeof host);
    r = d.run(shared_kernel("st.global.u32 [%rd2], %r1;"), {mapped}, 1, 32);
    check(r.error == 0 && host[5] == 5, "mapped host memory");
    check(d.run(shared_kernel("ret;"), {q}, 1, 64, 60000).error == 1,
          "too much shared memory without opt-in");
    check(d.run(shared_kernel("ret;"), {q}, 1, 1025).error == 1, "too many threads");
    d.options.watchdog_seconds = 0.2;
    r = d.run(shared_kernel("$L: ld.volatile.global.u32 %r5, [%rd1]; setp.ne.u32 %p1, %r5, 77; @%p1 bra $L;"),
              {d.put(std::vector<uint32_t>(64))}, 1, 32);
    check(r.error == 719 && !r.reports.empty() && r.reports[0].kind == ReportKind::deadlock, "watchdog");
  }
}

void control() {
  // Collatz steps: every lane leaves the loop at its own time.
  expect_clean(
      "divergent loop",
      shared_kernel(
          "add.u32 %r5, %r1, 1; mov.u32 %r6, 0; $L: setp.eq.u32 %p1, %r5, 1; @%p1 bra $D; and.b32 %r7, %r5, "
          "1; setp.eq.u32 %p2, %r7, 0; @%p2 bra $V; mad.lo.u32 %r5, %r5, 3, 1; bra $N; $V: shr.u32 %r5, %r5, "
          "1; $N: add.u32 %r6, %r6, 1; bra $L; $D: bar.warp.sync -1; st.global.u32 [%rd2], %r6;"),
      64, filled(64, [](uint32_t i) {
        uint32_t x = i + 1, n = 0;
        while (x != 1) {
          x = x % 2 ? 3 * x + 1 : x / 2;
          ++n;
        }
        return n;
      }));
  expect_clean(
      "brx.idx",
      shared_kernel(
          "and.b32 %r5, %r1, 3; T: .branchtargets $A, $B, $C, $A; brx.idx %r5, T; $A: mov.u32 %r6, 10; bra "
          "$E; $B: mov.u32 %r6, 20; bra $E; $C: mov.u32 %r6, 30; $E: st.global.u32 [%rd2], %r6;"),
      64, filled(64, [](uint32_t i) {
        static const uint32_t v[] = {10, 20, 30, 10};
        return v[i % 4];
      }));
  // A lock taken by diverged lanes: ends only if each of them makes progress.
  expect_clean(
      "spin lock",
      shared_kernel("setp.ne.u32 %p1, %r1, 0; @%p1 bra $W; mov.u32 %r5, 0; st.shared.u32 [s], %r5; "
                    "st.shared.u32 [s+4], %r5; $W: bar.sync 0; $L: atom.shared.cas.b32 %r5, [s], 0, 1; "
                    "setp.ne.u32 %p2, %r5, 0; @%p2 bra $L; ld.volatile.shared.u32 %r6, [s+4]; add.u32 %r6, "
                    "%r6, 1; st.volatile.shared.u32 [s+4], %r6; membar.cta; atom.shared.exch.b32 %r7, [s], "
                    "0; bar.sync 0; ld.volatile.shared.u32 %r8, [s+4]; st.global.u32 [%rd2], %r8;"),
      64, filled(64, [](uint32_t) { return 64u; }));
  expect_clean("atomics",
               shared_kernel("atom.global.add.u32 %r5, [%rd1], 1; red.global.max.u32 [%rd1+4], %r1; "
                             "red.global.or.b32 [%rd1+8], %r1;"),
               96, {1 + 96 * 4, 95, 127}, 4);
  expect_clean("shfl scan",
               shared_kernel("mov.u32 %r5, %r1; and.b32 %r6, %r1, 31; mov.u32 %r7, 1; $L: shfl.sync.up.b32 "
                             "%r8|%p1, %r5, %r7, 0, -1; @%p1 add.u32 %r5, %r5, %r8; shl.b32 %r7, %r7, 1; "
                             "setp.lt.u32 %p2, %r7, 32; @%p2 bra $L; st.global.u32 [%rd2], %r5;"),
               32, filled(32, [](uint32_t i) { return i * (i + 1) / 2; }));
  expect_clean(
      "vote match redux",
      shared_kernel("setp.lt.u32 %p1, %r1, 5; vote.sync.ballot.b32 %r5, %p1, -1; and.b32 %r6, %r1, 7; "
                    "match.any.sync.b32 %r7, %r6, -1; popc.b32 %r7, %r7; redux.sync.max.u32 %r8, %r1, -1; "
                    "add.u32 %r5, %r5, %r7; add.u32 %r5, %r5, %r8; st.global.u32 [%rd2], %r5;"),
      32, filled(32, [](uint32_t) { return 31u + 4 + 31; }));
  expect_clean("named barriers",
               shared_kernel("setp.lt.u32 %p1, %r1, 64; @%p1 bra $P; bar.sync 1, 128; ld.shared.u32 %r5, "
                             "[%r4+-256]; bra $E; $P: add.u32 %r5, %r1, 7; st.shared.u32 [%r4], %r5; "
                             "bar.arrive 1, 128; $E: st.global.u32 [%rd2], %r5;"),
               128, filled(128, [](uint32_t i) { return i % 64 + 7; }));
  // Half the block produces through an mbarrier, half consumes.
  const std::string mbarrier =
      R"(setp.ne.u32 %p1, %r1, 0; @%p1 bra $S; mbarrier.init.shared.b64 [s], 32; $S: bar.sync 0;
      setp.ge.u32 %p2, %r1, 32; @%p2 bra $C; mad.wide.u32 %rd3, %r1, 4, %rd1; cp.async.ca.shared.global [%r4+64], [%rd3], 4;
      cp.async.mbarrier.arrive.noinc.shared.b64 [s]; bra $E;
      $C: WAIT ld.shared.u32 %r6, [%r4+-64]; add.u32 %r6, %r6, %r1; st.global.u32 [%rd2], %r6; $E:)";
  auto replaced = [](std::string t, const std::string& to) { return t.replace(t.find("WAIT"), 4, to); };
  std::vector<uint32_t> after = filled(64, [](uint32_t i) { return i < 32 ? 1 : i + 1; });
  expect_clean(
      "mbarrier",
      shared_kernel(replaced(mbarrier, "mbarrier.test_wait.parity.shared.b64 %p3, [s], 0; @!%p3 bra $C;")),
      64, after);
  for (uint64_t seed = 0; seed < 4; ++seed) {  // the same without the wait
    Device d;
    d.options.seed = seed;
    auto r = d.run(shared_kernel(replaced(mbarrier, "")), {d.put(std::vector<uint32_t>(256, 1))}, 1, 64);
    check(!r.reports.empty(), "missing mbarrier wait");
  }
  expect_clean(
      "bar.red",
      shared_kernel("setp.lt.u32 %p1, %r1, 37; bar.red.popc.u32 %r5, 0, %p1; st.global.u32 [%rd2], %r5;"), 96,
      filled(96, [](uint32_t) { return 37u; }));
  // Stored row by row, read as the transposed 8x8 matrix.
  expect_clean("ldmatrix.trans",
               shared_kernel(
                   "cvt.u16.u32 %h1, %r1; add.u16 %h2, %h1, 32; shl.b32 %r5, %r1, 1; add.u32 %r5, %r5, %r2; "
                   "st.shared.u16 [%r5], %h1; st.shared.u16 [%r5+64], %h2; bar.sync 0; and.b32 %r6, %r1, 7; "
                   "shl.b32 %r6, %r6, 4; add.u32 %r6, %r6, %r2; "
                   "ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%r7}, [%r6]; st.global.u32 [%rd2], %r7;"),
               32, filled(32, [](uint32_t i) {
                 uint32_t row = i % 4 * 2, col = i / 4;
                 return row * 8 + col | (row * 8 + 8 + col) << 16;
               }));
  expect_clean("call",
               std::string(kHead) +
                   ".func (.param .b32 y) twice(.param .b32 x)\n{ .reg .b32 %r<4>; .reg .pred %p; "
                   "ld.param.b32 %r1, [x]; setp.gt.u32 %p, %r1, 9; @%p bra $X; add.u32 %r1, %r1, %r1; "
                   "st.param.b32 [y], %r1; ret; $X: mov.u32 %r1, 99; st.param.b32 [y], %r1; ret; }\n"
                   ".visible .entry k(.param .u64 p)\n{ .reg .b32 %r<10>; .reg .b64 %rd<5>; ld.param.u64 "
                   "%rd1, [p]; mov.u32 %r1, %tid.x; { .param .b32 a; .param .b32 b; st.param.b32 [a+0], %r1; "
                   "call.uni (b), twice, (a); ld.param.b32 %r4, [b+0]; } mad.wide.u32 %rd1, %r1, 4, %rd1; "
                   "st.global.u32 [%rd1], %r4; ret; }\n",
               32, filled(32, [](uint32_t i) { return i > 9 ? 99u : 2 * i; }));
  expect_clean("dynamic shared",
               std::string(kHead) +
                   ".extern .shared .align 16 .b8 dyn[];\n.shared .align 4 .b8 st[20];\n.visible .entry "
                   "k(.param .u64 p)\n{ .reg .b32 %r<10>; .reg .b64 %rd<5>; ld.param.u64 %rd1, [p]; mov.u32 "
                   "%r1, %tid.x; mov.u32 %r2, dyn; shl.b32 %r3, %r1, 2; add.u32 %r2, %r2, %r3; st.shared.u32 "
                   "[%r2], %r1; st.shared.u32 [st+16], 5; ld.shared.u32 %r4, [%r2]; mad.wide.u32 %rd1, %r1, "
                   "4, %rd1; st.global.u32 [%rd1], %r4; ret; }\n",
               32, filled(32, [](uint32_t i) { return i; }), 1, 128);
}

void loading() {
  int code;
  std::string log =
      load_error(std::string(kHead) + ".visible .entry k()\n{\nfrobnicate.u32 %r1;\n}\n", &code);
  check(code == 218 && log.find("frobnicate") != std::string::npos && log.find("line 6") != std::string::npos,
        "unknown opcode is named");
  log = load_error(
      std::string(kHead) + ".visible .entry k()\n{\n.reg .u32 %a; add.bogus.u32 %a, %a, %a;\n}\n", &code);
  check(code == 218 && log.find("bogus") != std::string::npos, "unknown modifier is named");
  log = load_error(std::string(kHead) + ".visible .entry k()\n{\n.frob 1;\n}\n", &code);
  check(code == 218 && log.find("frob") != std::string::npos, "unknown directive is named");
  DeviceSpec old = device_spec(80);
  old.driver_version = 11040;
  load_error(std::string(kHead) + ".visible .entry k()\n{ ret; }\n", &code, old);
  check(code == 222, "old driver refuses a new .version");
  load_error(".version 7.8\n.target sm_90\n.address_size 64\n", &code);
  check(code == 209, "newer target is refused");
  load_error(std::string(kHead) + ".visible .entry k()\n{ .reg .b32 %a; add.rn.bf16x2 %a, %a, %a; }\n",
             &code);
  check(code == 218, "add.bf16x2 needs sm_90");
  std::mt19937 random(3);
  std::string good = shared_kernel("st.global.u32 [%rd2], %r1;");
  for (int i = 0; i < 300; ++i) {  // damaged text never crashes
    std::string bad = good.substr(0, random() % good.size());
    if (i % 2) {
      bad = good;
      bad[random() % bad.size()] = static_cast<char>(32 + random() % 95);
    }
    load_error(bad, &code);
  }
  check(true, "damaged PTX");
}

}  // namespace

int main() {
  integers();
  floats();
  conversions();
  matrices();
  control();
  bugs();
  loading();
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}
