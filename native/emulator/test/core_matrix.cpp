// mma.sync against a plain loop.
#include "harness.h"

namespace mgm::emulator::test {
namespace {

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

}  // namespace

void test_matrices() {
  matrices();
}

}  // namespace mgm::emulator::test
