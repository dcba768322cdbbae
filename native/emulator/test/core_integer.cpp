// Integer instructions, lane by lane, against long arithmetic or bit by bit.
#include "harness.h"

namespace mgm::emulator::test {
namespace {

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

}  // namespace

void test_integers() {
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

}  // namespace mgm::emulator::test
