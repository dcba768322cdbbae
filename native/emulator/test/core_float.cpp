// Floating-point instructions against exact arithmetic by long integers.
#include <algorithm>
#include <functional>

#include "exact.h"
#include "harness.h"

namespace mgm::emulator::test {
namespace {

enum Op : uint8_t { op_add, op_sub, op_mul, op_fma, op_div, op_rcp, op_sqrt };
struct Case {
  Op op;
  Format format;
  char mode = 'n';
  bool ftz = false, sat = false, relu = false;
};

uint64_t flushed(uint64_t v, const Format& f) {
  const uint64_t exponent = (f.infinity >> (f.precision - 1)) << (f.precision - 1);
  return v & exponent ? v : v & uint64_t{1} << (f.bits - 1);
}

// What IEEE 754 says of operands that are no numbers, or of a division by zero: the host's arithmetic on
// stand-ins.
double special(Op op, const Value& a, const Value& b, const Value& c) {
  auto stand_in = [](const Value& v) {
    const double x = v.kind == Value::nan ? NAN : v.kind == Value::infinite ? INFINITY : v.m ? 1.0 : 0.0;
    return v.negative ? -x : x;
  };
  const double x = stand_in(a), y = stand_in(b), z = stand_in(c);
  switch (op) {
    case op_add:
      return x + y;
    case op_sub:
      return x - y;
    case op_mul:
      return x * y;
    case op_fma:
      return x * y + z;
    case op_div:
      return x / y;
    case op_rcp:
      return 1 / x;
    default:
      return std::sqrt(x);
  }
}

uint64_t oracle(const Case& t, uint64_t x, uint64_t y, uint64_t z) {
  const Format& f = t.format;
  if (t.ftz) {
    x = flushed(x, f);
    y = flushed(y, f);
    z = flushed(z, f);
  }
  const Value a = decode(x, f);
  Value b = decode(y, f), c = decode(z, f);
  const int used = t.op == op_fma ? 3 : t.op <= op_mul || t.op == op_div ? 2 : 1;
  if (used < 2) b = {};
  if (used < 3) c = {};
  uint64_t r;
  const bool odd = a.kind != Value::number || b.kind != Value::number || c.kind != Value::number ||
                   (t.op == op_div && b.zero()) || (t.op == op_rcp && a.zero()) ||
                   (t.op == op_sqrt && (a.negative || a.zero()));
  const uint64_t sign = uint64_t{1} << (f.bits - 1);
  if (odd) {
    const double v = special(t.op, a, b, c);
    r = v != v ? f.nan : (std::isinf(v) ? f.infinity : 0) | (std::signbit(v) ? sign : 0);
  } else {
    Sum s;
    bool minus = false;  // of a zero
    auto zero_sign = [&](const Value& p, const Value& q) {
      return p.zero() && q.zero() && p.negative == q.negative ? p.negative : t.mode == 'm';
    };
    Value d = b;
    const Value one{Value::number, false, 1, 0};
    switch (t.op) {
      case op_sub:
        d.negative ^= true;
        [[fallthrough]];
      case op_add:
        s.add(a);
        s.add(d);
        minus = zero_sign(a, d);
        break;
      case op_mul:
        s.add(product(a, b));
        minus = a.negative != b.negative;
        break;
      case op_fma:
        s.add(product(a, b));
        s.add(c);
        minus = zero_sign(product(a, b), c);
        break;
      case op_div:
        s.add(quotient(a, b));
        minus = a.negative != b.negative;
        break;
      case op_rcp:
        s.add(quotient(one, a));
        break;
      default:
        s.add(root(a));
    }
    r = s.zero() ? (minus ? sign : 0) : s.round(f, t.mode);
  }
  if (t.ftz) r = flushed(r, f);
  const bool nan = (r & (sign - 1)) > f.infinity;
  if (t.sat) {
    const uint64_t one = Sum().round(f, 'n') | (f.infinity / 2) >> (f.precision - 1) << (f.precision - 1);
    if (nan || r & sign) return 0;
    return std::min(r, one);
  }
  if (t.relu && !nan && r & sign) return 0;
  return r;
}

// Values that meet: special ones, any pattern, and numbers of similar size with few bits set, which make
// ties.
std::vector<uint64_t> operands(const Format& f, size_t n, uint32_t seed) {
  std::mt19937_64 random(seed);
  const uint64_t sign = uint64_t{1} << (f.bits - 1), one = uint64_t{1} << (f.precision - 1);
  const uint64_t least = one, middle = f.infinity / 2 / one;
  const uint64_t specials[] = {0,          1,     one - 1,        least,        f.largest,
                               f.infinity, f.nan, f.infinity + 1, middle * one, middle * one + 1};
  std::vector<uint64_t> v(n);
  for (uint64_t& x : v) {
    switch (random() % 8) {
      case 0:
        x = specials[random() % std::size(specials)];
        break;
      case 1:
        x = random();
        break;
      case 2:  // near the smallest
        x = random() % (one * 4);
        break;
      case 3:  // near one another, few bits
        x = (middle + random() % 4) * one + (random() % 8 << (f.precision - 4));
        break;
      case 4:  // half a last place away
        x = (middle - static_cast<uint64_t>(f.precision) + random() % 3) * one +
            (random() % 2 << (f.precision - 2));
        break;
      default:
        x = (middle - 2 + random() % 8) % (f.infinity / one) * one + random() % one;
    }
    if (random() % 2) x |= sign;
    x &= sign | (sign - 1);
  }
  return v;
}

constexpr size_t kCount = 2048;

// One instruction on kCount triples; the body writes %d (%ld) from %a, %b, %c (%la..). `pair`: two results
// each.
void run(const std::string& what, const std::string& body, const Format& f, bool pair,
         const std::function<uint64_t(uint64_t, uint64_t, uint64_t)>& want, int version = 78,
         int target = 80) {
  const bool wide = f.bits == 64;
  Device d;
  d.spec = device_spec(target);
  std::vector<uint64_t> in[3], second[3];
  uint64_t address[4];
  for (uint32_t k = 0; k < 3; ++k) {
    in[k] = operands(f, kCount, k + 1);
    second[k] = operands(f, kCount, k + 11);
    if (wide) {
      address[k] = d.put(in[k]);
    } else {
      std::vector<uint32_t> words(kCount);
      for (size_t i = 0; i < kCount; ++i)
        words[i] = static_cast<uint32_t>(in[k][i] | (f.bits == 16 ? second[k][i] << 16 : 0));
      address[k] = d.put(words);
    }
  }
  address[3] = wide ? d.put(std::vector<uint64_t>(kCount)) : d.put(std::vector<uint32_t>(kCount));
  const std::string head = ".version " + std::to_string(version / 10) + "." + std::to_string(version % 10) +
                           "\n.target sm_" + std::to_string(target) + "\n.address_size 64\n";
  const LaunchResult r = d.run(lanes_kernel(body, wide, head),
                               {address[0], address[1], address[2], address[3]}, kCount / 128, 128);
  bool ok = r.error == 0 && r.reports.empty();
  auto compare = [&](uint64_t got, uint64_t x, uint64_t y, uint64_t z) {
    const uint64_t expected = want(x, y, z), magnitude = (uint64_t{1} << (f.bits - 1)) - 1;
    // NVIDIA documents no pattern for the NaN of f64.
    if (got == expected || (wide && (got & magnitude) > f.infinity && (expected & magnitude) > f.infinity))
      return;
    if (ok)
      std::printf("%s(%llx, %llx, %llx) = %llx, expected %llx\n", what.c_str(),
                  static_cast<unsigned long long>(x), static_cast<unsigned long long>(y),
                  static_cast<unsigned long long>(z), static_cast<unsigned long long>(got),
                  static_cast<unsigned long long>(expected));
    ok = false;
  };
  if (wide) {
    const std::vector<uint64_t> got = d.get<uint64_t>(address[3], kCount);
    for (size_t i = 0; i < kCount; ++i) compare(got[i], in[0][i], in[1][i], in[2][i]);
  } else {
    const std::vector<uint32_t> got = d.get<uint32_t>(address[3], kCount);
    for (size_t i = 0; i < kCount; ++i) {
      compare(f.bits == 16 ? got[i] & 0xffff : got[i], in[0][i], in[1][i], in[2][i]);
      if (pair) compare(got[i] >> 16, second[0][i], second[1][i], second[2][i]);
    }
  }
  check(ok, what);
}

// The text around an instruction `name` with `operands` inputs, by type.
std::string body(const std::string& name, const std::string& type, int inputs) {
  const bool scalar = type == "f16" || type == "bf16", wide = type == "f64";
  std::string text, list;
  for (int i = 0; i < inputs; ++i) {
    const std::string letter(1, static_cast<char>('a' + i));
    if (scalar) text += "mov.b32 {%h" + std::to_string(i + 1) + ", %h7}, %" + letter + "; ";
    list += ", " + (scalar ? "%h" + std::to_string(i + 1) : std::string(wide ? "%l" : "%") + letter);
  }
  text += name + "." + type + " " + (scalar ? "%h5" : wide ? "%ld" : "%d") + list + ";";
  return scalar ? text + " mov.b32 %d, {%h5, %h5};" : text;
}

void arithmetic(const std::string& name, Case t, const std::string& type, int version = 78, int target = 80) {
  const int inputs = t.op == op_fma ? 3 : t.op <= op_mul || t.op == op_div ? 2 : 1;
  run(
      name + "." + type, body(name, type, inputs), t.format, type.ends_with("x2"),
      [&](uint64_t x, uint64_t y, uint64_t z) { return oracle(t, x, y, z); }, version, target);
}

void rounded() {
  const std::pair<const char*, Op> ops[] = {{"add", op_add},  {"sub", op_sub}, {"mul", op_mul},
                                            {"fma", op_fma},  {"div", op_div}, {"rcp", op_rcp},
                                            {"sqrt", op_sqrt}};
  for (auto [name, op] : ops)
    for (char mode : {'n', 'z', 'm', 'p'}) {
      const std::string rounded = std::string(name) + ".r" + mode;
      arithmetic(rounded, {op, kF64, mode}, "f64");
      for (bool ftz : {false, true})
        for (bool sat : {false, true})
          if (!sat || op <= op_fma)
            arithmetic(rounded + (ftz ? ".ftz" : "") + (sat ? ".sat" : ""), {op, kF32, mode, ftz, sat},
                       "f32");
    }
  for (auto [name, op] : ops) {
    if (op > op_fma) continue;
    for (const char* type : {"f16", "f16x2"})
      for (bool ftz : {false, true})
        for (int clamp = 0; clamp < (op == op_fma ? 3 : 2); ++clamp)
          arithmetic(std::string(name) + ".rn" + (ftz ? ".ftz" : "") +
                         (clamp == 1   ? ".sat"
                          : clamp == 2 ? ".relu"
                                       : ""),
                     {op, kF16, 'n', ftz, clamp == 1, clamp == 2}, type);
    for (const char* type : {"bf16", "bf16x2"}) {
      arithmetic(std::string(name) + ".rn", {op, kBf16}, type, 78, op == op_fma ? 80 : 90);
      if (op == op_fma) arithmetic("fma.rn.relu", {op, kBf16, 'n', false, false, true}, type);
    }
  }
}

// min, max, neg and abs on the patterns alone.
void selected() {
  const std::pair<const char*, Format> types[] = {{"f32", kF32},   {"f64", kF64},   {"f16", kF16},
                                                  {"f16x2", kF16}, {"bf16", kBf16}, {"bf16x2", kBf16}};
  for (const auto& [type, f] : types) {
    const std::string t = type;
    const uint64_t sign = uint64_t{1} << (f.bits - 1);
    const bool pair = t.ends_with("x2"), bf = t[0] == 'b';
    for (bool ftz : {false, true}) {
      if (ftz && (bf || t == "f64")) continue;
      for (bool negate : {false, true})
        run(std::string(negate ? "neg" : "abs") + (ftz ? ".ftz." : ".") + t,
            body(std::string(negate ? "neg" : "abs") + (ftz ? ".ftz" : ""), t, 1), f, pair,
            [&](uint64_t x, uint64_t, uint64_t) {
              if (ftz) x = flushed(x, f);
              return negate ? x ^ sign : x & (sign - 1);
            });
      for (bool greater : {false, true})
        for (bool nan : {false, true})
          for (bool xorsign : {false, true}) {
            if (t == "f64" && (nan || xorsign)) continue;
            const std::string name = std::string(greater ? "max" : "min") + (ftz ? ".ftz" : "") +
                                     (nan ? ".NaN" : "") + (xorsign ? ".xorsign.abs" : "");
            run(
                name + "." + t, body(name, t, 2), f, pair,
                [&](uint64_t x, uint64_t y, uint64_t) -> uint64_t {
                  if (ftz) {
                    x = flushed(x, f);
                    y = flushed(y, f);
                  }
                  const bool nx = (x & (sign - 1)) > f.infinity, ny = (y & (sign - 1)) > f.infinity;
                  if ((nx && ny) || (nan && (nx || ny))) return f.nan;
                  const uint64_t product = (x ^ y) & sign;
                  uint64_t r;
                  if (xorsign) {
                    x &= sign - 1;
                    y &= sign - 1;
                  }
                  // Order of the patterns as signed magnitudes, -0 below +0.
                  auto key = [&](uint64_t v) { return v & sign ? ~v & (sign | (sign - 1)) : v | sign; };
                  r = nx ? y : ny ? x : (key(x) < key(y)) != greater ? x : y;
                  return xorsign ? r | product : r;
                },
                78, xorsign ? 86 : 80);
          }
    }
  }
}

// The approximate ones, within the bounds that the PTX ISA documents.
void approximate() {
  struct Function {
    const char* name;
    const char* type;
    double (*exact)(double);
    double relative, absolute;
    double low, high;
    int target = 80;
  };
  auto ex2 = [](double x) { return std::exp2(x); };
  auto tanh = [](double x) { return std::tanh(x); };
  auto sin = [](double x) { return std::sin(x); };
  auto cos = [](double x) { return std::cos(x); };
  auto lg2 = [](double x) { return std::log2(x); };
  auto rsqrt = [](double x) { return 1 / std::sqrt(x); };
  auto rcp = [](double x) { return 1 / x; };
  auto sqrt = [](double x) { return std::sqrt(x); };
  const double f16_ulp = 0x1p-11, bf16_ulp = 0x1p-8;
  const Function functions[] = {
      {"ex2.approx", "f32", ex2, 0x1p-22, 0, -120, 120},
      {"tanh.approx", "f32", tanh, 0x1p-11, 0, -9, 9},
      {"sin.approx", "f32", sin, 0, 0x1p-20, -3.1, 3.1},
      {"cos.approx", "f32", cos, 0, 0x1p-20, -3.1, 3.1},
      {"lg2.approx", "f32", lg2, 0x1p-22, 0x1p-22, 1e-30, 1e30},
      {"rsqrt.approx", "f32", rsqrt, 0x1p-22, 0, 1e-30, 1e30},
      {"rsqrt.approx", "f64", rsqrt, 0x1p-30, 0, 1e-150, 1e150},
      {"rcp.approx.ftz", "f64", rcp, 0x1p-19, 0, 1e-150, 1e150},
      {"rcp.approx", "f32", rcp, 0x1p-22, 0, 1e-30, 1e30},
      {"sqrt.approx", "f32", sqrt, 0x1p-22, 0, 1e-30, 1e30},
      {"ex2.approx", "f16", ex2, 0x1p-9 + f16_ulp, 0x1p-24, -14, 15},
      {"ex2.approx", "f16x2", ex2, 0x1p-9 + f16_ulp, 0x1p-24, -14, 15},
      {"tanh.approx", "f16", tanh, 0, 0x1p-10, -9, 9},
      {"tanh.approx", "f16x2", tanh, 0, 0x1p-10, -9, 9},
      {"ex2.approx.ftz", "bf16", ex2, 0x1p-7 + bf16_ulp, 0, -120, 120, 90},
      {"ex2.approx.ftz", "bf16x2", ex2, 0x1p-7 + bf16_ulp, 0, -120, 120, 90},
      {"tanh.approx", "bf16", tanh, 0x1p-8 + bf16_ulp, 0, -9, 9, 90},
      {"tanh.approx", "bf16x2", tanh, 0x1p-8 + bf16_ulp, 0, -9, 9, 90},
  };
  for (const Function& g : functions) {
    const std::string type = g.type;
    const Format& f = type == "f32" ? kF32 : type == "f64" ? kF64 : type[0] == 'b' ? kBf16 : kF16;
    auto value = [&](uint64_t bits) {
      const Value v = decode(bits, f);
      if (v.kind != Value::number)
        return v.kind == Value::nan ? static_cast<double>(NAN) : v.negative ? -INFINITY : INFINITY;
      const double m = std::ldexp(static_cast<double>(static_cast<uint64_t>(v.m)), v.e);
      return v.negative ? -m : m;
    };
    Device d;
    d.spec = device_spec(g.target);
    std::mt19937_64 random(7);
    const bool wide = type == "f64", logarithmic = g.low > 0;
    std::vector<uint64_t> in(kCount), out;
    for (uint64_t& x : in) {
      const double u = static_cast<double>(random() % 1000001) / 1e6;
      const double v = logarithmic ? g.low * std::pow(g.high / g.low, u) : g.low + u * (g.high - g.low);
      Sum s;
      int e;
      const double m = std::frexp(std::fabs(v), &e);
      s.add({Value::number, v < 0, static_cast<uint64_t>(std::ldexp(m, 53)), e - 53});
      x = s.round(f, 'n');
    }
    uint64_t from, to;
    if (wide) {
      from = d.put(in);
      to = d.put(std::vector<uint64_t>(kCount));
    } else {
      std::vector<uint32_t> words;
      for (uint64_t x : in) words.push_back(static_cast<uint32_t>(f.bits == 16 ? x | x << 16 : x));
      from = d.put(words);
      to = d.put(std::vector<uint32_t>(kCount));
    }
    const std::string head =
        std::string(".version 7.8\n.target sm_") + std::to_string(g.target) + "\n.address_size 64\n";
    const LaunchResult r =
        d.run(lanes_kernel(body(g.name, type, 1), wide, head), {from, from, from, to}, kCount / 128, 128);
    if (wide) {
      out = d.get<uint64_t>(to, kCount);
    } else {
      for (uint32_t x : d.get<uint32_t>(to, kCount)) out.push_back(x);
    }
    bool ok = r.error == 0 && r.reports.empty();
    for (size_t i = 0; i < kCount; ++i)
      for (int half = 0; half < (type.ends_with("x2") ? 2 : 1); ++half) {
        const double got = value(f.bits == 16 ? out[i] >> (16 * half) & 0xffff : out[i]),
                     want = g.exact(value(in[i]));
        const bool near = std::fabs(got - want) <= g.relative * std::fabs(want) + g.absolute;
        if (!near && ok)
          std::printf("%s.%s(%g) = %g, expected %g\n", g.name, g.type, value(in[i]), got, want);
        ok &= near;
      }
    check(ok, std::string(g.name) + "." + type);
  }
}

}  // namespace

void test_floats() {
  rounded();
  selected();
  approximate();
  run("copysign", body("copysign", "f32", 2), kF32, false,
      [](uint64_t x, uint64_t y, uint64_t) { return (x & 0x80000000u) | (y & 0x7fffffffu); });
}

}  // namespace mgm::emulator::test
