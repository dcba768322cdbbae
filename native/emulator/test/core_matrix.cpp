// ldmatrix and mma.sync: fragments by the ISA's formulas for each element, against plain loops.
#include <algorithm>
#include <cstdlib>

#include "exact.h"
#include "harness.h"

namespace mgm::emulator::test {
namespace {

struct Element {
  const char* name;
  int bits;
  bool is_float, is_signed;
  Format format;
};
const Element kElements[] = {
    {"f16", 16, true, true, kF16},  {"bf16", 16, true, true, kBf16}, {"tf32", 32, true, true, kTf32},
    {"e4m3", 8, true, true, kE4m3}, {"e5m2", 8, true, true, kE5m2},  {"f64", 64, true, true, kF64},
    {"s8", 8, false, true, {}},     {"u8", 8, false, false, {}},     {"s4", 4, false, true, {}},
    {"u4", 4, false, false, {}},    {"b1", 1, false, false, {}},
};
const Element& element(const std::string& name) {
  for (const Element& e : kElements)
    if (name == e.name) return e;
  std::abort();
}

double value_of(uint64_t bits, const Format& f) {
  const Value v = decode(bits, f);
  if (v.kind == Value::nan) return NAN;
  const double m =
      v.kind == Value::infinite ? INFINITY : std::ldexp(static_cast<double>(static_cast<uint64_t>(v.m)), v.e);
  return v.negative ? -m : m;
}
uint64_t bits_of(double v, const Format& f) {
  if (v != v) return f.nan;
  if (std::isinf(v)) return f.infinity | (v < 0 ? uint64_t{1} << (f.bits - 1) : 0);
  Sum s;
  int e;
  const double m = std::frexp(std::fabs(v), &e);
  s.add({Value::number, std::signbit(v), static_cast<uint64_t>(std::ldexp(m, 53)), e - 53});
  return s.round(f, 'n');
}
uint64_t encode(double v, const Element& e) {
  if (!e.is_float) return static_cast<uint64_t>(static_cast<int64_t>(v)) & ((uint64_t{1} << e.bits) - 1);
  return std::string(e.name) == "tf32" ? bits_of(v, e.format) << 13 : bits_of(v, e.format);
}

struct Product {
  int rows, k;
  std::string a, b, accumulator, modifiers;  // modifiers: ".satfinite", or ".xor.popc" after the types
  int version = 70, target = 80;
  std::string text() const {
    return "m" + std::to_string(rows) + "n8k" + std::to_string(k) + "." + accumulator + "." + a + "." + b +
           modifiers;
  }
};
struct Matrices {
  double a[16][256] = {}, b[256][8] = {}, c[16][8] = {};
};

// Runs one mma.sync on the matrices; what D holds.
bool multiply(const Product& p, const Matrices& m, Device& d, double (*out)[8]) {
  const Element &ea = element(p.a), &eb = element(p.b);
  const bool popc = p.a == "b1", wide = p.a == "f64";
  const int width = wide ? 64 : 32, e = width / ea.bits, na = p.rows * p.k / e / 32, nb = 8 * p.k / e / 32;
  const bool f16 = p.accumulator == "f16";
  const int nd = f16 ? p.rows / 8 : p.rows / 4;
  std::vector<uint64_t> a(32 * 4), b(32 * 2), c(32 * 4);
  for (size_t lane = 0; lane < 32; ++lane) {
    const int group = static_cast<int>(lane / 4), t = static_cast<int>(lane % 4);
    for (int i = 0; i < na * e; ++i) {
      // Registers alternate between the upper and the lower eight rows; after two of them the columns
      // advance.
      const int row = p.rows == 16 && (i / e) % 2 ? group + 8 : group,
                col = t * e + i % e + i / (2 * e) * 4 * e;
      a[lane * 4 + static_cast<size_t>(i / e)] |= encode(m.a[row][col], ea) << (ea.bits * (i % e)) % 64;
    }
    for (int i = 0; i < nb * e; ++i)
      b[lane * 2 + static_cast<size_t>(i / e)] |= encode(m.b[t * e + i % e + i / e * 4 * e][group], eb)
                                                  << (eb.bits * (i % e)) % 64;
    for (int i = 0; i < p.rows / 4; ++i) {
      const double v = m.c[i < 2 ? group : group + 8][t * 2 + i % 2];
      if (f16)
        c[lane * 4 + static_cast<size_t>(i / 2)] |= bits_of(v, kF16) << (16 * (i % 2));
      else
        c[lane * 4 + static_cast<size_t>(i)] = p.accumulator == "s32"
                                                   ? static_cast<uint32_t>(static_cast<int32_t>(v))
                                               : p.accumulator == "f64" ? as<uint64_t>(v)
                                                                        : as<uint32_t>(static_cast<float>(v));
    }
  }
  std::string s = ".version " + std::to_string(p.version / 10) + "." + std::to_string(p.version % 10) +
                  "\n.target sm_" + std::to_string(p.target) +
                  "\n.address_size 64\n.visible .entry k(.param .u64 pa, .param .u64 pb, .param .u64 pc, "
                  ".param .u64 pd)\n"
                  "{ .reg .b32 %r<40>; .reg .b64 %q<40>, %p<4>; mov.u32 %r1, %tid.x;\n";
  const std::string reg = wide ? "%q" : "%r", type = wide ? "b64" : "b32";
  const std::pair<char, int> inputs[] = {{'a', na}, {'b', nb}, {'c', nd}};
  int next = 4;
  std::string lists[4];
  for (int i = 0; i < 4; ++i) {
    const std::string pointer = "%p" + std::to_string(i), letter(1, static_cast<char>('a' + i));
    s += "ld.param.u64 " + pointer + ", [p" + letter + "]; mad.wide.u32 " + pointer + ", %r1, " +
         std::to_string(i == 1 ? 16 : 32) + ", " + pointer + ";\n";
    const int n = i < 3 ? inputs[i].second : nd;
    lists[i] = "{";
    for (int k = 0; k < n; ++k, ++next) {
      const std::string name = reg + std::to_string(next);
      lists[i] += (k ? ", " : "") + name;
      if (i < 3)
        s += "ld.global." + type + " " + name + ", [" + pointer + "+" + std::to_string(8 * k) + "];\n";
    }
    lists[i] += "}";
  }
  s += "mma.sync.aligned.m" + std::to_string(p.rows) + "n8k" + std::to_string(p.k) + ".row.col" +
       (popc ? "" : p.modifiers) + "." + p.accumulator + "." + p.a + "." + p.b + "." + p.accumulator +
       (popc ? p.modifiers : "") + " " + lists[3] + ", " + lists[0] + ", " + lists[1] + ", " + lists[2] +
       ";\n";
  next -= nd;
  for (int k = 0; k < nd; ++k)
    s += "st.global." + type + " [%p3+" + std::to_string(8 * k) + "], " + reg + std::to_string(next + k) +
         ";\n";
  s += "ret; }\n";
  const uint64_t to = d.put(std::vector<uint64_t>(32 * 4));
  const LaunchResult r = d.run(s, {d.put(a), d.put(b), d.put(c), to}, 1, 32);
  const std::vector<uint64_t> got = d.get<uint64_t>(to, 32 * 4);
  for (size_t lane = 0; lane < 32; ++lane)
    for (int i = 0; i < p.rows / 4; ++i) {
      const size_t at = lane * 4 + static_cast<size_t>(f16 ? i / 2 : i);
      out[lane / 4 + (i < 2 ? 0 : 8)][lane % 4 * 2 + static_cast<size_t>(i % 2)] =
          f16                      ? value_of(got[at] >> (16 * (i % 2)) & 0xffff, kF16)
          : p.accumulator == "s32" ? static_cast<double>(static_cast<int32_t>(got[at]))
          : p.accumulator == "f64" ? as<double>(got[at])
                                   : static_cast<double>(as<float>(static_cast<uint32_t>(got[at])));
    }
  return r.error == 0 && r.reports.empty();
}

std::vector<Product> products() {
  std::vector<Product> all;
  for (const char* acc : {"f32", "f16"})
    for (int k : {8, 16}) all.push_back({16, k, "f16", "f16", acc, ""});
  for (int k : {8, 16}) all.push_back({16, k, "bf16", "bf16", "f32", ""});
  for (int k : {4, 8}) all.push_back({16, k, "tf32", "tf32", "f32", ""});
  for (const char* a : {"e4m3", "e5m2"})
    for (const char* b : {"e4m3", "e5m2"})
      for (const char* acc : {"f32", "f16"})
        for (int k : {16, 32}) all.push_back({16, k, a, b, acc, "", 87, 89});
  for (const char* sat : {"", ".satfinite"}) {
    for (const char* a : {"s8", "u8"})
      for (const char* b : {"s8", "u8"})
        for (auto [rows, k] : {std::pair{8, 16}, {16, 16}, {16, 32}})
          all.push_back({rows, k, a, b, "s32", sat});
    for (const char* a : {"s4", "u4"})
      for (const char* b : {"s4", "u4"})
        for (auto [rows, k] : {std::pair{8, 32}, {16, 32}, {16, 64}})
          all.push_back({rows, k, a, b, "s32", sat});
  }
  for (const char* op : {".xor.popc", ".and.popc"})
    for (auto [rows, k] : {std::pair{8, 128}, {16, 128}, {16, 256}})
      all.push_back({rows, k, "b1", "b1", "s32", op, 71});
  all.push_back({8, 4, "f64", "f64", "f64", ""});
  return all;
}

void shapes() {
  std::mt19937 random(5);
  for (const Product& p : products())
    for (int round = 0; round < 4; ++round) {
      Matrices m;
      auto draw = [&](const Element& e) {
        const int range = e.is_float ? 8 : 1 << std::min(e.bits, 8), low = e.is_signed ? -range / 2 : 0;
        return static_cast<double>(low + static_cast<int>(random() % static_cast<uint32_t>(range)));
      };
      for (auto& row : m.a)
        for (double& v : row) v = draw(element(p.a));
      for (auto& row : m.b)
        for (double& v : row) v = draw(element(p.b));
      const bool integer = p.accumulator == "s32";
      for (auto& row : m.c)  // near the ends of s32 in half of the rounds
        for (double& v : row)
          v = static_cast<int>(random() % 100) - 50 +
              (integer && round % 2 ? (random() % 2 ? INT32_MAX - 49.0 : INT32_MIN + 50.0) : 0);
      Device d;
      d.spec = device_spec(p.target);
      double got[16][8];
      bool ok = multiply(p, m, d, got);
      for (int i = 0; i < p.rows; ++i)
        for (int j = 0; j < 8; ++j) {
          double want = m.c[i][j];
          for (int k = 0; k < p.k; ++k)
            want += p.modifiers == ".xor.popc" ? m.a[i][k] != m.b[k][j] : m.a[i][k] * m.b[k][j];
          if (p.modifiers == ".satfinite")
            want = std::min(std::max(want, static_cast<double>(INT32_MIN)), static_cast<double>(INT32_MAX));
          else if (integer)
            want = static_cast<int32_t>(static_cast<int64_t>(want));
          if (got[i][j] != want && ok) std::printf("[%d][%d] = %g, expected %g\n", i, j, got[i][j], want);
          ok &= got[i][j] == want;
        }
      check(ok, "mma " + p.text());
    }
}

// Special values and the smallest ones go through as IEEE has them.
void extremes() {
  for (const char* type : {"f16", "bf16", "tf32", "e5m2"}) {
    const bool fp8 = type[0] == 'e';
    const Product p{
        16,           std::string(type) == "tf32" ? 8 : fp8 ? 32 : 16, type, type, "f32", "", fp8 ? 84 : 70,
        fp8 ? 89 : 80};
    const Element& e = element(type);
    for (MmaSum how : {MmaSum::exact, MmaSum::hardware, MmaSum::permuted}) {
      Matrices m;
      const double least = value_of(1, e.format);
      m.a[0][0] = INFINITY;  // inf * 1
      m.a[1][0] = INFINITY;  // inf - inf
      m.a[1][1] = -INFINITY;
      m.a[2][0] = NAN;
      m.a[3][2] = least;  // times 1
      m.a[4][0] = -1;     // -1 + 1
      m.c[4][0] = 1;
      m.b[0][0] = m.b[1][0] = m.b[2][0] = 1;
      Device d;
      d.spec = device_spec(p.target);
      d.options.mma = how;
      double got[16][8];
      const bool ok = multiply(p, m, d, got);
      check(ok && std::isinf(got[0][0]) && std::isnan(got[1][0]) && std::isnan(got[2][0]) &&
                got[3][0] == least && got[4][0] == 0 && got[5][5] == 0,
            std::string("special values of ") + type);
    }
  }
}

// 1 and fifteen terms of a quarter of its last place: what is left tells how the sum was taken.
void sums() {
  const Product p{16, 16, "f16", "f16", "f32", ""};
  Matrices m;
  m.a[0][0] = 1;
  m.b[0][0] = 1;
  for (int k = 1; k < 16; ++k) {
    m.a[0][k] = 0x1p-13;
    m.b[k][0] = 0x1p-12;
  }
  auto result = [&](MmaSum how, int capability, uint64_t seed = 0) {
    Device d;
    d.spec = device_spec(capability);
    d.options.mma = how;
    d.options.seed = seed;
    double got[16][8];
    return multiply(p, m, d, got) ? got[0][0] : NAN;
  };
  check(result(MmaSum::exact, 80) == 1 + 0x1p-21, "an exact sum is rounded once");
  check(result(MmaSum::hardware, 80) == 1, "sm_80 cuts products off below 24 bits");
  check(result(MmaSum::hardware, 90) == 1 + 3 * 0x1p-23,
        "sm_90 cuts products off below 25 bits, and the sum");
  m.c[0][0] = -1;  // what was cut off stays lost
  check(result(MmaSum::exact, 80) == 15 * 0x1p-25, "an exact sum keeps what does not cancel");
  check(result(MmaSum::hardware, 80) == 8 * 0x1p-25,
        "sm_80 adds the second half of k to what is left of the first");
  m.c[0][0] = 0;
  m.a[0][0] = 4096;
  m.b[0][0] = 4096;
  for (int k = 1; k < 16; ++k) m.a[0][k] = m.b[k][0] = 1;
  bool within = true, differs = false;
  const double first = result(MmaSum::permuted, 80, 1);
  for (uint64_t seed = 1; seed < 20; ++seed) {
    const double v = result(MmaSum::permuted, 80, seed);
    within &= v >= 0x1p24 && v <= 0x1p24 + 16;
    differs |= v != first;
  }
  check(within && differs, "permuted sums depend on the seed");
}

void matrices_loaded() {
  for (int count : {1, 2, 4})
    for (bool trans : {false, true}) {
      std::string list = "{";
      for (int i = 0; i < count; ++i) list += (i ? ", %r" : "%r") + std::to_string(10 + i);
      list += "}";
      // Rows of 16 bytes in an order of their own: matrix q, row i at slot (q * 8 + i) * 5 % 32.
      std::string s =
          std::string(kHead) +
          ".visible .entry k(.param .u64 p, .param .u64 to)\n{ .reg .b32 %r<20>; .reg .b64 %q<4>; .shared "
          ".align "
          "16 .b8 s[512];\nld.param.u64 %q1, [p]; ld.param.u64 %q2, [to]; mov.u32 %r1, %tid.x; mad.wide.u32 "
          "%q1, %r1, 16, %q1; mad.wide.u32 %q2, %r1, 16, %q2; mov.u32 %r2, s; shl.b32 %r3, %r1, 4; add.u32 "
          "%r3, "
          "%r3, %r2; ld.global.v4.u32 {%r4, %r5, %r6, %r7}, [%q1]; st.shared.v4.u32 [%r3], {%r4, %r5, %r6, "
          "%r7}; bar.warp.sync -1; mul.lo.u32 %r8, %r1, 5; and.b32 %r8, %r8, 31; shl.b32 %r8, %r8, 4; "
          "add.u32 "
          "%r8, %r8, %r2;\nldmatrix.sync.aligned.m8n8.x" +
          std::to_string(count) + (trans ? ".trans" : "") + ".shared.b16 " + list + ", [%r8];\n";
      for (int i = 0; i < count; ++i)
        s += "st.global.u32 [%q2+" + std::to_string(4 * i) + "], %r" + std::to_string(10 + i) + ";\n";
      s += "ret; }\n";
      std::vector<uint16_t> in(256);
      for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<uint16_t>(i * 257 + 3);
      Device d;
      const uint64_t to = d.put(std::vector<uint32_t>(128));
      const LaunchResult r = d.run(s, {d.put(in), to}, 1, 32);
      const std::vector<uint32_t> got = d.get<uint32_t>(to, 128);
      bool ok = r.error == 0 && r.reports.empty();
      for (size_t lane = 0; lane < 32; ++lane)
        for (size_t q = 0; q < static_cast<size_t>(count); ++q)
          for (size_t h = 0; h < 2; ++h) {
            const size_t a = lane / 4, b = lane % 4 * 2 + h, row = trans ? b : a, col = trans ? a : b;
            ok &= (got[lane * 4 + q] >> (16 * h) & 0xffff) == in[(q * 8 + row) * 5 % 32 * 8 + col];
          }
      check(ok, "ldmatrix.x" + std::to_string(count) + (trans ? ".trans" : ""));
    }
}

}  // namespace

void test_matrices() {
  shapes();
  extremes();
  sums();
  matrices_loaded();
}

}  // namespace mgm::emulator::test
