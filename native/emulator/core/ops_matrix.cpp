// ldmatrix and mma.sync.
//
// Fragments (PTX ISA, "Matrix fragments for mma.m16n8k*"): with e elements per 32-bit register, group = lane
// / 4 and t = lane % 4, register r of A holds row group + 8 (r & 1), columns t e + j + 4 e (r >> 1); register
// r of B holds rows t e + j + 4 e r of column group; C and D hold row group + 8 (i >> 1), columns 2 t + (i &
// 1).
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

enum Element : uint8_t { e_f16, e_bf16, e_tf32, e_s8, e_u8, e_s4, e_u4, e_e4m3, e_e5m2 };
int element_bits(int e) {
  return e <= e_bf16 ? 16 : e == e_tf32 ? 32 : e == e_s4 || e == e_u4 ? 4 : 8;
}

double element(int type, uint32_t reg, int j) {
  switch (type) {
    case e_f16:
      return from_half(static_cast<uint16_t>(reg >> (16 * j)));
    case e_bf16:
      return from_bf16(static_cast<uint16_t>(reg >> (16 * j)));
    case e_tf32:
      return f32(reg & ~0x1fffu);  // the unit reads the upper 19 bits
    case e_s8:
      return static_cast<int8_t>(reg >> (8 * j));
    case e_u8:
      return static_cast<uint8_t>(reg >> (8 * j));
    case e_s4:
      return static_cast<int8_t>(static_cast<uint8_t>(reg >> (4 * j)) << 4) >> 4;
    case e_u4:
      return reg >> (4 * j) & 15;
    case e_e4m3:
      return from_e4m3(static_cast<uint8_t>(reg >> (8 * j)));
    default:
      return from_e5m2(static_cast<uint8_t>(reg >> (8 * j)));
  }
}

// bytes: element type of A; target: of B; vec: k; mode: 0 f32, 1 f16, 2 s32 accumulator; flag: 1 satfinite.
// imm: registers of A; o: d..., a..., b..., c...
void mma(Warp& w, const Inst& in, uint32_t m) {
  bool ready;
  w.converge(in, m, "mma.sync", &ready);
  if (!ready) return;
  if (w.active != kAll)
    w.fail(in, __builtin_ctz(w.active), ReportKind::bad_mask, 719,
           "mma.sync needs all 32 lanes; mask " + hex(w.active));
  const int k = in.vec, at = in.bytes, bt = in.target, e = 32 / element_bits(at);
  const int nd = in.outputs, na = static_cast<int>(in.imm), nb = na / 2;
  if (w.block->launch->options.counters)
    w.block->counters.tensor_flops += static_cast<uint64_t>(2 * 16 * 8 * k);
  static thread_local double A[16][64], B[64][8];
  double C[16][8];
  for (int r = 0; r < na; ++r) {
    const uint32_t* p = w.src<uint32_t>(in.o[nd + r]);
    for (int lane = 0; lane < 32; ++lane)
      for (int j = 0; j < e; ++j)
        A[lane / 4 + 8 * (r & 1)][lane % 4 * e + j + 4 * e * (r >> 1)] = element(at, p[lane], j);
  }
  for (int r = 0; r < nb; ++r) {
    const uint32_t* p = w.src<uint32_t>(in.o[nd + na + r]);
    for (int lane = 0; lane < 32; ++lane)
      for (int j = 0; j < e; ++j) B[lane % 4 * e + j + 4 * e * r][lane / 4] = element(bt, p[lane], j);
  }
  for (int r = 0; r < nd; ++r) {
    const uint32_t* p = w.src<uint32_t>(in.o[nd + na + nb + r]);
    for (int lane = 0; lane < 32; ++lane) {
      if (in.mode == 1) {
        for (int h = 0; h < 2; ++h)
          C[lane / 4 + 8 * r][lane % 4 * 2 + h] = from_half(static_cast<uint16_t>(p[lane] >> (16 * h)));
      } else {
        C[lane / 4 + 8 * (r >> 1)][lane % 4 * 2 + (r & 1)] =
            in.mode == 2 ? static_cast<double>(static_cast<int32_t>(p[lane]))
                         : static_cast<double>(f32(p[lane]));
      }
    }
  }
  // Exact products; the sum in double, rounded once.
  for (int i = 0; i < 16; ++i) {
    double s[8] = {};
    for (int q = 0; q < k; ++q)
      for (int j = 0; j < 8; ++j) s[j] += A[i][q] * B[q][j];
    for (int j = 0; j < 8; ++j) C[i][j] += s[j];
  }
  for (int r = 0; r < nd; ++r) {
    uint32_t* d = w.dst<uint32_t>(in.o[r]);
    for (int lane = 0; lane < 32; ++lane) {
      if (in.mode == 1) {
        uint32_t v = 0;
        for (int h = 0; h < 2; ++h)
          v |= static_cast<uint32_t>(to_half(C[lane / 4 + 8 * r][lane % 4 * 2 + h])) << (16 * h);
        d[lane] = v;
      } else {
        double v = C[lane / 4 + 8 * (r >> 1)][lane % 4 * 2 + (r & 1)];
        if (in.mode == 2) {
          int64_t x = static_cast<int64_t>(v);
          if (in.flag & 1) x = std::min<int64_t>(std::max<int64_t>(x, INT32_MIN), INT32_MAX);
          d[lane] = static_cast<uint32_t>(x);
        } else {
          d[lane] = bits(canonical(static_cast<float>(v)));
        }
      }
    }
  }
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
  std::string shape = m.any({"m16n8k4", "m16n8k8", "m16n8k16", "m16n8k32", "m16n8k64"});
  if (shape.empty()) m.fail("unsupported shape");
  if (!m.take("row") || !m.take("col")) m.fail("expected .row.col");
  bool sat = m.take("satfinite");
  m.take("kind::f8f6f4");
  std::string ct = m.type(), bt = m.type(), at = m.type(), dt = m.type();
  m.finish();
  static const char* types[] = {"f16", "bf16", "tf32", "s8", "u8", "s4", "u4", "e4m3", "e5m2"};
  int a = -1, b = -1;
  for (int k = 0; k < 9; ++k) {
    if (at == types[k]) a = k;
    if (bt == types[k]) b = k;
  }
  int k = std::atoi(shape.c_str() + 6);
  if (a < 0 || b < 0) d.fail("unsupported element types");
  int e = 32 / element_bits(a);
  bool integer = a >= e_s8 && a <= e_u4, fp8 = a >= e_e4m3;
  bool mixed =
      (integer || fp8) && element_bits(a) == element_bits(b) && (integer == (b >= e_s8 && b <= e_u4));
  if (a != b && !mixed) d.fail("unsupported element types");
  if (k != 4 * e && k != 8 * e) d.fail("shape ." + shape + " does not exist for ." + at);
  if (fp8 && k != 32) d.fail("shape ." + shape + " does not exist for ." + at);
  if (fp8)
    d.require(84, 89, "mma of fp8");
  else if (!(a == e_f16 && k == 8))
    d.require(70, 80, "this mma");
  if (ct != dt) d.fail("the types of C and D differ");
  if (integer ? ct != "s32" : ct != "f32" && !(ct == "f16" && (a == e_f16 || fp8)))
    d.fail("unsupported accumulator type");
  if (sat && !integer) d.fail("unknown modifier .satfinite");
  int na = k / (2 * e), nb = na / 2;
  na = 2 * (k / (4 * e));
  nb = na / 2;
  int nd = ct == "f16" ? 2 : 4;
  d.operands(4);
  std::vector<Shape> out, in;
  auto items = [&](size_t i, int n) {
    const Operand& o = d.operand(i);
    std::vector<Operand> list = o.kind == Operand::vector ? o.items : std::vector<Operand>{o};
    if (list.size() != static_cast<size_t>(n))
      d.fail("expected " + std::to_string(n) + " registers in operand " + std::to_string(i));
    return list;
  };
  for (const Operand& o : items(0, nd)) out.push_back(d.out(o, 4));
  for (const Operand& o : items(1, na)) in.push_back(d.in(o, "b32"));
  for (const Operand& o : items(2, nb)) in.push_back(d.in(o, "b32"));
  for (const Operand& o : items(3, nd)) in.push_back(d.in(o, ct == "f32" ? "f32" : "b32"));
  Inst& i = d.emit(&mma, "mma", out, in);
  i.bytes = static_cast<uint8_t>(a);
  i.target = b;
  i.vec = static_cast<uint8_t>(k);
  i.mode = ct == "f32" ? 0 : ct == "f16" ? 1 : 2;
  i.flag = sat;
  i.imm = na;
  return true;
}

}  // namespace mgm::emulator
