// ldmatrix and mma.sync.
//
// Fragments (PTX ISA, "Matrix fragments for mma.m16n8k*"): with e elements per 32-bit register, group = lane
// / 4 and t = lane % 4, register r of A holds row group + 8 (r & 1), columns t e + j + 4 e (r >> 1); register
// r of B holds rows t e + j + 4 e r of column group; C and D hold row group + 8 (i >> 1), columns 2 t + (i &
// 1).
#include <algorithm>
#include <iterator>

#include "numeric.h"

namespace mgm::emulator {
namespace {

// mode: 0 plain, 1 .trans; vec: number of matrices. o: d..., base
void ldmatrix(Warp& w, const Inst& in, uint32_t m) {
  bool ready;
  w.converge(in, m, "ldmatrix", &ready);
  if (!ready) return;
  if (w.active != kAll)
    w.fail(in, __builtin_ctz(w.active), ReportKind::bad_mask, 719,
           "ldmatrix needs all 32 lanes; mask " + hex(w.active));
  uint64_t address[32];
  int rows = 8 * in.vec;
  for (int i = 0; i < rows; ++i) {
    uint64_t a = w.value(in, in.vec, i) + static_cast<uint64_t>(in.imm);
    if (in.w[in.vec] == 4) a &= 0xffffffff;
    if ((a & kWindowMask) == kSharedWindow) a -= kSharedWindow;
    address[i] = a;
  }
  if (w.block->launch->options.counters)
    for (int q = 0; q < in.vec; ++q) w.count_access(in, Space::shared, 0xffu << (8 * q), address, 16);
  uint8_t data[32][16];
  for (int i = 0; i < rows; ++i) {
    if (address[i] & 15)
      w.fail(in, i, ReportKind::misaligned, 716, "ldmatrix of a row at shared address " + hex(address[i]),
             address[i]);
    std::memcpy(data[i], w.at_shared(in, i, address[i], 16, 1), 16);
  }
  for (int q = 0; q < in.vec; ++q) {
    uint32_t* d = w.dst<uint32_t>(in.o[q]);
    for (int lane = 0; lane < 32; ++lane) {
      if (in.mode == 0) {
        std::memcpy(&d[lane], &data[8 * q + lane / 4][lane % 4 * 4], 4);
      } else {
        uint16_t lo, hi;
        std::memcpy(&lo, &data[8 * q + lane % 4 * 2][lane / 4 * 2], 2);
        std::memcpy(&hi, &data[8 * q + lane % 4 * 2 + 1][lane / 4 * 2], 2);
        d[lane] = lo | static_cast<uint32_t>(hi) << 16;
      }
    }
  }
}

enum Element : uint8_t { e_f16, e_bf16, e_tf32, e_s8, e_u8, e_s4, e_u4, e_e4m3, e_e5m2, e_b1, e_f64 };
int element_bits(int e) {
  switch (e) {
    case e_f16:
    case e_bf16:
      return 16;
    case e_tf32:
      return 32;
    case e_s4:
    case e_u4:
      return 4;
    case e_b1:
      return 1;
    case e_f64:
      return 64;
    default:
      return 8;
  }
}
bool is_integer(int e) {
  return (e >= e_s8 && e <= e_u4) || e == e_b1;
}

double real_element(int type, uint32_t reg, int j) {
  switch (type) {
    case e_f16:
      return from_half(static_cast<uint16_t>(reg >> (16 * j)));
    case e_bf16:
      return from_bf16(static_cast<uint16_t>(reg >> (16 * j)));
    case e_tf32:
      return f32(reg & ~0x1fffu);  // the unit reads the upper 19 bits
    case e_e4m3:
      return from_e4m3(static_cast<uint8_t>(reg >> (8 * j)));
    default:
      return from_e5m2(static_cast<uint8_t>(reg >> (8 * j)));
  }
}
int32_t integer_element(int type, uint32_t reg, int j) {
  switch (type) {
    case e_s8:
      return static_cast<int8_t>(reg >> (8 * j));
    case e_u8:
      return static_cast<uint8_t>(reg >> (8 * j));
    case e_s4:
      return static_cast<int8_t>(static_cast<uint8_t>(reg >> (4 * j)) << 4) >> 4;
    case e_u4:
      return reg >> (4 * j) & 15;
    default:
      return reg >> j & 1;
  }
}

// The 16-byte rows of eight 16-bit elements that four neighbouring lanes hold together.
void widen(int type, const uint32_t* p, double* to) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  const __m256 v = type == e_f16 ? _mm256_cvtph_ps(bits)
                                 : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  _mm256_storeu_pd(to, _mm256_cvtps_pd(_mm256_castps256_ps128(v)));
  _mm256_storeu_pd(to + 4, _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1)));
}

constexpr int kMostK = 256;
template <class T>
struct Tile {
  T a[16][kMostK], b[kMostK][8];
};

// What an mma's Inst says: bytes: type of A; target: of B; imm: k; vec: rows; mode: accumulator; flag bits: 1
// satfinite, 2 and.popc. o: d..., a..., b..., c...
enum Accumulator : uint8_t { acc_f32, acc_f16, acc_s32, acc_f64 };

template <class T, class F>
void read_tile(Warp& w, const Inst& in, Tile<T>& t, F value) {
  const int e = std::max(1, 32 / element_bits(in.bytes)), nd = in.outputs, k = static_cast<int>(in.imm);
  const int na = in.vec * k / e / 32, nb = 8 * k / e / 32;
  for (int r = 0; r < na; ++r)
    for (int lane = 0; lane < 32; ++lane)
      for (int j = 0; j < e; ++j)
        t.a[lane / 4 + 8 * (r & 1)][lane % 4 * e + j + 4 * e * (r >> 1)] =
            value(in.bytes, w.value(in, nd + r, lane), j);
  for (int r = 0; r < nb; ++r)
    for (int lane = 0; lane < 32; ++lane)
      for (int j = 0; j < e; ++j)
        t.b[lane % 4 * e + j + 4 * e * r][lane / 4] = value(in.target, w.value(in, nd + na + r, lane), j);
}

void read_reals(Warp& w, const Inst& in, Tile<double>& t) {
  if (element_bits(in.bytes) != 16)
    return read_tile(w, in, t, [](int type, uint64_t reg, int j) {
      return type == e_f64 ? bits_as<double>(reg) : real_element(type, static_cast<uint32_t>(reg), j);
    });
  const int nd = in.outputs, na = static_cast<int>(in.imm) / 4, nb = na / 2;
  for (int r = 0; r < na; ++r)
    for (int group = 0; group < 8; ++group)
      widen(in.bytes, w.src<uint32_t>(in.o[nd + r]) + 4 * group, &t.a[group + 8 * (r & 1)][8 * (r >> 1)]);
  for (int r = 0; r < nb; ++r)
    for (int group = 0; group < 8; ++group) {
      double column[8];
      widen(in.bytes, w.src<uint32_t>(in.o[nd + na + r]) + 4 * group, column);
      for (int i = 0; i < 8; ++i) t.b[8 * r + i][group] = column[i];
    }
}

// Element (row, column) of C and D by lane and register: f(row, column, register, half, lane).
template <class F>
void each_accumulator(const Inst& in, F f) {
  const bool halves = in.mode == acc_f16;
  for (int r = 0; r < in.outputs; ++r)
    for (int lane = 0; lane < 32; ++lane) {
      if (!halves)
        f(lane / 4 + 8 * (r >> 1), lane % 4 * 2 + (r & 1), r, 0, lane);
      else
        for (int h = 0; h < 2; ++h) f(lane / 4 + 8 * r, lane % 4 * 2 + h, r, h, lane);
    }
}

void multiply_integers(Warp& w, const Inst& in) {
  static thread_local Tile<int32_t> t;
  read_tile(w, in, t, [](int type, uint64_t reg, int j) {
    return integer_element(type, static_cast<uint32_t>(reg), j);
  });
  const int k = static_cast<int>(in.imm), c = in.count - in.outputs;
  int32_t sums[16][8] = {};
  const bool exclusive = in.bytes == e_b1 && !(in.flag & 2);
  for (int i = 0; i < in.vec; ++i)
    for (int q = 0; q < k; ++q)
      for (int j = 0; j < 8; ++j) sums[i][j] += exclusive ? t.a[i][q] ^ t.b[q][j] : t.a[i][q] * t.b[q][j];
  each_accumulator(in, [&](int row, int column, int r, int, int lane) {
    int64_t v = static_cast<int64_t>(w.src<int32_t>(in.o[c + r])[lane]) + sums[row][column];
    if (in.flag & 1) v = std::clamp<int64_t>(v, INT32_MIN, INT32_MAX);
    sums[row][column] = static_cast<int32_t>(v);
  });
  each_accumulator(in, [&](int row, int column, int r, int, int lane) {
    w.dst<int32_t>(in.o[r])[lane] = sums[row][column];
  });
}

// ---- accumulation of products (EMULATOR.md, pitfall 15) ----

// Exact products, the sum in double; rounded once when stored. Row by row, the columns side by side.
void sum_exact(const Inst& in, const Tile<double>& t, double (*c)[8]) {
  for (int i = 0; i < in.vec; ++i) {
    double s[8] = {};
    // The products are exact in double, so that a fused addition changes nothing.
    for (int q = 0; q < in.imm; ++q)
      for (int j = 0; j < 8; ++j) s[j] = std::fma(t.a[i][q], t.b[q][j], s[j]);
    for (int j = 0; j < 8; ++j) c[i][j] += s[j];
  }
}

// One f32 addition after the other, in an order drawn for each instruction: what no kernel may rely on.
void sum_permuted(Warp& w, const Inst& in, const Tile<double>& t, double (*c)[8]) {
  const int k = static_cast<int>(in.imm);
  int order[kMostK + 1];
  for (int q = 0; q <= k; ++q) order[q] = q;
  std::shuffle(order, order + k + 1, w.block->random);
  for (int i = 0; i < in.vec; ++i)
    for (int j = 0; j < 8; ++j) {
      float s = 0;
      for (int n = 0; n <= k; ++n) {
        const int q = order[n];
        s = static_cast<float>(s + (q == k ? c[i][j] : t.a[i][q] * t.b[q][j]));
      }
      c[i][j] = s;
    }
}

// As the hardware was found to do it (arXiv 2512.07004, 2511.10909): exact products and the addend are
// aligned to the largest exponent among them, cut off below a fixed number of fraction bits, added, and the
// sum is cut to the output (or rounded to nearest where that is f16). sm_80 to sm_89 add the two halves of k
// one after the other; fp8 on sm_89 keeps 13 bits.
void sum_hardware(Warp& w, const Inst& in, const Tile<double>& t, double (*c)[8]) {
  const int k = static_cast<int>(in.imm), type = in.bytes;
  const bool old = w.block->launch->spec.major < 9, fp8 = type == e_e4m3 || type == e_e5m2;
  const int fraction = old ? (fp8 ? 13 : 24) : 25, kept = old && fp8 ? 13 : 23;
  const int native = type == e_tf32 ? 4 : fp8 ? 16 : 8, step = old ? std::min(k, native) : k;
  constexpr int kZero = -1000;
  auto exponent_of = [](double v, int least) { return v == 0 ? kZero : std::max(std::ilogb(v), least); };
  const int least_a = type == e_f16 || type == e_e5m2 ? -14 : type == e_e4m3 ? -6 : -126;
  const int least_b = in.target == e_f16 || in.target == e_e5m2 ? -14 : in.target == e_e4m3 ? -6 : -126;
  for (int i = 0; i < in.vec; ++i)
    for (int j = 0; j < 8; ++j)
      for (int from = 0; from < k; from += step) {
        double plain = c[i][j];
        for (int q = from; q < from + step; ++q) plain += t.a[i][q] * t.b[q][j];
        int top = kZero;
        if (std::isfinite(plain)) {
          top = exponent_of(c[i][j], -126);
          for (int q = from; q < from + step; ++q)
            top = std::max(top, exponent_of(t.a[i][q], least_a) + exponent_of(t.b[q][j], least_b));
        }
        if (top <= kZero / 2) {  // special values, or nothing but zeros
          c[i][j] = plain;
          continue;
        }
        auto cut = [&](double v) { return std::trunc(std::ldexp(v, fraction - top)); };
        double s = cut(c[i][j]);
        for (int q = from; q < from + step; ++q) s += cut(t.a[i][q] * t.b[q][j]);
        s = std::ldexp(s, top - fraction);
        c[i][j] = in.mode == acc_f16 ? from_half(to_half(s)) : round_to(s, kept, -126, rz);
      }
}

void multiply_reals(Warp& w, const Inst& in) {
  static thread_local Tile<double> t;
  read_reals(w, in, t);
  const int at = in.count - in.outputs;
  double c[16][8];
  each_accumulator(in, [&](int row, int column, int r, int h, int lane) {
    const uint64_t v = w.value(in, at + r, lane);
    c[row][column] = in.mode == acc_f64   ? bits_as<double>(v)
                     : in.mode == acc_f16 ? from_half(static_cast<uint16_t>(v >> (16 * h)))
                                          : f32(static_cast<uint32_t>(v));
  });
  const MmaSum how = w.block->launch->options.mma;
  if (in.mode == acc_f64) {
    for (int i = 0; i < in.vec; ++i)
      for (int j = 0; j < 8; ++j)
        for (int q = 0; q < in.imm; ++q) c[i][j] = std::fma(t.a[i][q], t.b[q][j], c[i][j]);
  } else if (how == MmaSum::hardware) {
    sum_hardware(w, in, t, c);
  } else if (how == MmaSum::permuted) {
    sum_permuted(w, in, t, c);
  } else {
    sum_exact(in, t, c);
  }
  each_accumulator(in, [&](int row, int column, int r, int h, int lane) {
    const double v = c[row][column];
    if (in.mode == acc_f64) {
      w.dst<uint64_t>(in.o[r])[lane] = v != v ? 0xfff8000000000000ull : bits_as<uint64_t>(v);
    } else if (in.mode == acc_f32) {
      w.dst<uint32_t>(in.o[r])[lane] = bits(canonical(static_cast<float>(v)));
    } else {
      uint16_t* halves = reinterpret_cast<uint16_t*>(w.dst<uint32_t>(in.o[r]) + lane);
      halves[h] = to_half(v);
    }
  });
}

void mma(Warp& w, const Inst& in, uint32_t m) {
  bool ready;
  w.converge(in, m, "mma.sync", &ready);
  if (!ready) return;
  if (w.active != kAll)
    w.fail(in, __builtin_ctz(w.active), ReportKind::bad_mask, 719,
           "mma.sync needs all 32 lanes; mask " + hex(w.active));
  if (w.block->launch->options.counters)
    w.block->counters.tensor_flops += static_cast<uint64_t>(2 * in.vec * 8 * in.imm);
  if (is_integer(in.bytes))
    multiply_integers(w, in);
  else
    multiply_reals(w, in);
}

// Shapes by element type, least .version and target of each (as ptxas has them).
struct Form {
  const char* types;  // of A and B, separated by spaces
  int rows, k;
  const char* accumulators;
  int version, target;
};
constexpr Form kForms[] = {
    {"f16", 16, 8, "f16 f32", 65, 75},    {"f16", 16, 16, "f16 f32", 70, 80},
    {"bf16", 16, 8, "f32", 70, 80},       {"bf16", 16, 16, "f32", 70, 80},
    {"tf32", 16, 4, "f32", 70, 80},       {"tf32", 16, 8, "f32", 70, 80},
    {"s8 u8", 8, 16, "s32", 65, 75},      {"s8 u8", 16, 16, "s32", 70, 80},
    {"s8 u8", 16, 32, "s32", 70, 80},     {"s4 u4", 8, 32, "s32", 65, 75},
    {"s4 u4", 16, 32, "s32", 70, 80},     {"s4 u4", 16, 64, "s32", 70, 80},
    {"b1", 8, 128, "s32", 70, 75},        {"b1", 16, 128, "s32", 70, 80},
    {"b1", 16, 256, "s32", 70, 80},       {"e4m3 e5m2", 16, 32, "f32", 84, 89},
    {"e4m3 e5m2", 16, 16, "f32", 87, 89}, {"e4m3 e5m2", 16, 32, "f16", 87, 89},
    {"e4m3 e5m2", 16, 16, "f16", 87, 89}, {"f64", 8, 4, "f64", 70, 80},
};
bool lists(const char* list, const std::string& word) {
  return (' ' + std::string(list) + ' ').find(' ' + word + ' ') != std::string::npos;
}

}  // namespace

bool decode_matrix(Decoder& d, const Instruction& s) {
  Mods m(s);
  if (s.opcode == "ldmatrix") {
    if (!m.take("sync")) m.fail("expected .sync");
    m.take("aligned");
    if (!m.take("m8n8")) m.fail("expected .m8n8");
    std::string x = m.any({"x1", "x2", "x4"});
    bool trans = m.take("trans");
    m.any({"shared", "shared::cta"});
    if (!m.take("b16") || x.empty()) m.fail("expected .x1, .x2 or .x4 and .b16");
    m.finish();
    d.operands(2);
    size_t n = static_cast<size_t>(x[1] - '0');
    const Operand& to = d.operand(0);
    std::vector<Operand> items = to.kind == Operand::vector ? to.items : std::vector<Operand>{to};
    if (items.size() != n) d.fail("expected " + std::to_string(n) + " registers");
    std::vector<Shape> out;
    for (const Operand& o : items) out.push_back(d.out(o, 4));
    Space space = Space::shared;
    int64_t imm;
    Shape base = d.address(d.operand(1), &space, &imm);
    Inst& i = d.emit(&ldmatrix, "ldmatrix", out, std::vector<Shape>{base});
    i.vec = static_cast<uint8_t>(n);
    i.mode = trans;
    i.imm = imm;
    return true;
  }
  if (s.opcode != "mma") return false;
  if (!m.take("sync")) m.fail("expected .sync");
  m.take("aligned");
  std::string shape;
  for (const char* name : {"m8n8k4", "m8n8k16", "m8n8k32", "m8n8k128", "m16n8k4", "m16n8k8", "m16n8k16",
                           "m16n8k32", "m16n8k64", "m16n8k128", "m16n8k256"})
    if (m.take(name)) shape = name;
  if (shape.empty()) m.fail("unsupported shape");
  if (!m.take("row") || !m.take("col")) m.fail("expected .row.col");
  const bool sat = m.take("satfinite"), popc = m.take("popc");
  const std::string bitwise = popc ? m.any({"xor", "and"}) : "";
  m.take("kind::f8f6f4");
  const std::string ct = m.type(), bt = m.type(), at = m.type(), dt = m.type();
  m.finish();
  static const char* types[] = {"f16", "bf16", "tf32", "s8", "u8", "s4", "u4", "e4m3", "e5m2", "b1", "f64"};
  const int a = static_cast<int>(std::find(types, std::end(types), at) - types),
            b = static_cast<int>(std::find(types, std::end(types), bt) - types);
  const int rows = shape[1] == '8' ? 8 : 16, k = std::atoi(shape.c_str() + shape.find('k') + 1);
  const Form* form = std::find_if(std::begin(kForms), std::end(kForms), [&](const Form& f) {
    return f.rows == rows && f.k == k && lists(f.types, at) && lists(f.types, bt) &&
           lists(f.accumulators, ct);
  });
  if (form == std::end(kForms) || ct != dt)
    d.fail("shape ." + shape + " does not exist for ." + at + ", ." + bt + " and accumulators ." + ct);
  d.require(form->version, form->target, "this mma");
  if ((at == "b1") != !bitwise.empty()) d.fail("expected .xor.popc or .and.popc with .b1 alone");
  if (bitwise == "and") d.require(71, 80, "mma with .and.popc");
  if (sat && (ct != "s32" || at == "b1")) d.fail("unknown modifier .satfinite");
  const int bits_of = element_bits(a), na = rows * k * bits_of / 32 / std::max(32, bits_of),
            nb = 8 * k * bits_of / 32 / std::max(32, bits_of), nd = ct == "f16" ? rows / 8 : rows / 4;
  d.operands(4);
  std::vector<Shape> out, in;
  auto items = [&](size_t i, int n) {
    const Operand& o = d.operand(i);
    std::vector<Operand> list = o.kind == Operand::vector ? o.items : std::vector<Operand>{o};
    if (list.size() != static_cast<size_t>(n))
      d.fail("expected " + std::to_string(n) + " registers in operand " + std::to_string(i));
    return list;
  };
  const std::string element = at == "f64" ? "f64" : "b32",
                    accumulator = ct[0] == 'f' && ct != "f16" ? ct : "b32";
  for (const Operand& o : items(0, nd)) out.push_back(d.out(o, ct == "f64" ? 8 : 4));
  for (const Operand& o : items(1, na)) in.push_back(d.in(o, element));
  for (const Operand& o : items(2, nb)) in.push_back(d.in(o, element));
  for (const Operand& o : items(3, nd)) in.push_back(d.in(o, accumulator));
  Inst& i = d.emit(&mma, "mma", out, in);
  i.bytes = static_cast<uint8_t>(a);
  i.target = b;
  i.vec = static_cast<uint8_t>(rows);
  i.imm = k;
  i.mode = ct == "f32" ? acc_f32 : ct == "f16" ? acc_f16 : ct == "s32" ? acc_s32 : acc_f64;
  i.flag = static_cast<uint8_t>((sat ? 1 : 0) | (bitwise == "and" ? 2 : 0));
  return true;
}

}  // namespace mgm::emulator
