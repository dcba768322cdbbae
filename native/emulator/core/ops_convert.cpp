// cvt in all its pairs, cvta, isspacep.
#include <algorithm>
#include <limits>
#include <tuple>

#include "numeric.h"

namespace mgm::emulator {
namespace {

// Lane by lane on zero-extended register contents: F(in, raw) gives the raw result.
template <class F>
void convert(Warp& w, const Inst& in, uint32_t m) {
  each_lane(m, [&](int i) { w.set(in, 0, i, F::call(in, w.value(in, 1, i))); });
}

// mode: rounding; flag bits: 1 saturate, 2 round to an integer, 4 ftz, 8 relu.
template <class S>
auto source(uint64_t v) {
  if constexpr (std::is_same_v<S, float>)
    return f32(static_cast<uint32_t>(v));
  else if constexpr (std::is_same_v<S, double>)
    return bits_as<double>(v);
  else
    return static_cast<S>(v);
}
template <class D, class S>
struct IntInt {
  static uint64_t call(const Inst& in, uint64_t raw) {
    S v = static_cast<S>(raw);
    if (in.flag & 1) {
      __int128 x = v;
      x = std::clamp<__int128>(x, std::numeric_limits<D>::min(), std::numeric_limits<D>::max());
      return static_cast<uint64_t>(static_cast<D>(x));  // sign-extends into a wider register
    }
    return static_cast<uint64_t>(static_cast<D>(v));
  }
};
inline double to_integral(double v, int mode) {
  return mode == rz   ? std::trunc(v)
         : mode == rm ? std::floor(v)
         : mode == rp ? std::ceil(v)
                      : std::nearbyint(v);
}
enum Float : uint8_t { none_, h16, b16, s32, d64, t32 };
inline double load_float(int f, uint64_t raw, bool ftz) {
  switch (f) {
    case h16:
      return from_half(static_cast<uint16_t>(raw));
    case b16:
      return from_bf16(static_cast<uint16_t>(raw));
    case s32: {
      float v = f32(static_cast<uint32_t>(raw));
      return ftz ? flush(v) : v;
    }
    default:
      return bits_as<double>(raw);
  }
}
template <class D>
struct FloatInt {
  static uint64_t call(const Inst& in, uint64_t raw) {
    double v = load_float(in.bytes, raw, in.flag & 4);
    if (v != v) {
      if (in.bytes == d64 || sizeof(D) == 8)
        return static_cast<uint64_t>(static_cast<D>(std::make_unsigned_t<D>(1) << (8 * sizeof(D) - 1)));
      return 0;
    }
    v = to_integral(v, in.mode);
    constexpr double lo = static_cast<double>(std::numeric_limits<D>::min());
    constexpr double hi = static_cast<double>(std::numeric_limits<D>::max());
    if (v <= lo) return static_cast<uint64_t>(std::numeric_limits<D>::min());
    if (v >= hi) return static_cast<uint64_t>(std::numeric_limits<D>::max());
    return static_cast<uint64_t>(static_cast<D>(v));
  }
};
template <class S>
struct IntFloat {
  static uint64_t call(const Inst& in, uint64_t raw) {
    S v = static_cast<S>(raw);
    Round r = static_cast<Round>(in.mode);
    double odd;
    if constexpr (sizeof(S) == 8) {  // to odd: 64 bits do not fit a double
      if (in.bytes == d64) {
        if (r == rn) return bits_as<uint64_t>(static_cast<double>(v));
      }
      bool neg = v < 0;
      uint64_t u = neg ? 0 - static_cast<uint64_t>(v) : static_cast<uint64_t>(v);
      if (in.bytes == d64) {
        double d = static_cast<double>(u);
        bool away = static_cast<unsigned __int128>(d) > u, below = static_cast<unsigned __int128>(d) < u;
        bool down = r == rz || (r == rm && !neg) || (r == rp && neg);
        if (down && away) d = std::nextafter(d, 0.0);
        if (!down && below) d = std::nextafter(d, INFINITY);
        return bits_as<uint64_t>(neg ? -d : d);
      }
      int shift = u ? std::max(0, 64 - __builtin_clzll(u) - 52) : 0;
      uint64_t top = u >> shift;
      if (shift && (u & ((uint64_t{1} << shift) - 1))) top |= 1;
      odd = std::ldexp(static_cast<double>(top), shift);
      if (neg) odd = -odd;
    } else {
      odd = static_cast<double>(v);
    }
    switch (in.bytes) {
      case h16:
        return to_half(odd, r);
      case b16:
        return to_bf16(odd, r);
      case d64:
        return bits_as<uint64_t>(odd);
      default: {
        float f = r == rn ? static_cast<float>(odd) : to_float(odd, r);
        if (in.flag & 1) f = f > 0 ? (f < 1 ? f : 1.0f) : 0.0f;
        return bits(f);
      }
    }
  }
};
// imm: destination format, bytes: source format.
struct FloatFloat {
  static uint64_t call(const Inst& in, uint64_t raw) {
    double v = load_float(in.bytes, raw, in.flag & 4);
    Round r = static_cast<Round>(in.mode);
    if (in.flag & 2) v = std::isfinite(v) ? std::copysign(to_integral(v, r), v) : v;
    if (in.flag & 1) v = v > 0 ? (v < 1 ? v : 1.0) : 0.0;
    if (in.flag & 8) v = v != v ? v : v > 0 ? v : 0.0;
    switch (in.imm) {
      case h16:
        return in.mode == rn && in.bytes != d64 ? half_rn(static_cast<float>(v)) : to_half(v, r);
      case b16:
        return in.mode == rn && in.bytes != d64 ? bf16_rn(static_cast<float>(v)) : to_bf16(v, r);
      case d64:
        return v != v ? 0x7fffffffffffffffull : bits_as<uint64_t>(v);
      case t32:
        return to_tf32(static_cast<float>(v), r);
      default: {
        float f = in.flag & 2 || r == rn ? static_cast<float>(v) : to_float(v, r);
        if (in.flag & 4) f = flush(f);
        return bits(canonical(f));
      }
    }
  }
};

void pack_two(Warp& w, const Inst& in,
              uint32_t m) {  // f16x2 / bf16x2 from two f32: first operand is the upper half
  Round r = static_cast<Round>(in.mode);
  const float *a = w.src<float>(in.o[1]), *b = w.src<float>(in.o[2]);
  uint32_t* d = w.dst<uint32_t>(in.o[0]);
  auto one = [&](float v) -> uint32_t {
    if (in.flag & 8) v = v != v ? v : v > 0 ? v : 0.0f;
    if (in.bytes == h16) return r == rn ? half_rn(v) : to_half(v, r);
    return r == rn ? bf16_rn(v) : to_bf16(v, r);
  };
  each_lane(m, [&](int i) { d[i] = one(a[i]) << 16 | one(b[i]); });
}
void pack_fp8(Warp& w, const Inst& in, uint32_t m) {  // imm: 0 e4m3, 1 e5m2; from two f32 or one f16x2
  each_lane(m, [&](int i) {
    double hi, lo;
    if (in.count == 3) {
      hi = w.src<float>(in.o[1])[i];
      lo = w.src<float>(in.o[2])[i];
    } else {
      uint32_t v = w.src<uint32_t>(in.o[1])[i];
      hi = from_half(static_cast<uint16_t>(v >> 16));
      lo = from_half(static_cast<uint16_t>(v));
    }
    auto one = [&](double v) -> uint32_t {
      if (in.flag & 8 && !(v > 0) && v == v) v = 0;
      return in.imm ? to_e5m2(v) : to_e4m3(v);
    };
    w.dst<uint16_t>(in.o[0])[i] = static_cast<uint16_t>(one(hi) << 8 | one(lo));
  });
}
void unpack_fp8(Warp& w, const Inst& in, uint32_t m) {
  each_lane(m, [&](int i) {
    uint16_t v = w.src<uint16_t>(in.o[1])[i];
    auto one = [&](uint8_t b) -> uint32_t {
      float f = in.imm ? from_e5m2(b) : from_e4m3(b);
      uint16_t h = half_rn(f);
      if (in.flag & 8 && (h & 0x8000) && f == f) h = 0;
      return h;
    };
    w.dst<uint32_t>(in.o[0])[i] = one(static_cast<uint8_t>(v >> 8)) << 16 | one(static_cast<uint8_t>(v));
  });
}
// cvt.pack.sat: a and b, each saturated to `bytes` bits (flag 1: signed), above them c.
void cvt_pack(Warp& w, const Inst& in, uint32_t m) {
  const int bits_ = in.bytes;
  const int64_t low = in.flag ? -(int64_t{1} << (bits_ - 1)) : 0, high = low + (int64_t{1} << bits_) - 1;
  auto one = [&](int32_t v) {
    return static_cast<uint32_t>(std::clamp<int64_t>(v, low, high)) & ((1u << bits_) - 1);
  };
  each_lane(m, [&](int i) {
    const uint32_t pair = one(w.src<int32_t>(in.o[1])[i]) << bits_ | one(w.src<int32_t>(in.o[2])[i]);
    w.dst<uint32_t>(in.o[0])[i] = in.count > 3 ? pair | w.src<uint32_t>(in.o[3])[i] << (2 * bits_) : pair;
  });
}

template <class D>
Handler int_int(Decoder& d, const std::string& s) {
  if (s == "u8") return &convert<IntInt<D, uint8_t>>;
  if (s == "s8") return &convert<IntInt<D, int8_t>>;
  if (s == "u16") return &convert<IntInt<D, uint16_t>>;
  if (s == "s16") return &convert<IntInt<D, int16_t>>;
  if (s == "u32") return &convert<IntInt<D, uint32_t>>;
  if (s == "s32") return &convert<IntInt<D, int32_t>>;
  if (s == "u64") return &convert<IntInt<D, uint64_t>>;
  if (s == "s64") return &convert<IntInt<D, int64_t>>;
  d.fail("unknown source type ." + s);
}
template <class D>
struct ToInt {
  static Handler from(Decoder& d, const std::string& s, bool f) {
    return f ? &convert<FloatInt<D>> : int_int<D>(d, s);
  }
};
Handler to_int(Decoder& d, const std::string& t, const std::string& s, bool f) {
  if (t == "u8") return ToInt<uint8_t>::from(d, s, f);
  if (t == "s8") return ToInt<int8_t>::from(d, s, f);
  if (t == "u16") return ToInt<uint16_t>::from(d, s, f);
  if (t == "s16") return ToInt<int16_t>::from(d, s, f);
  if (t == "u32") return ToInt<uint32_t>::from(d, s, f);
  if (t == "s32") return ToInt<int32_t>::from(d, s, f);
  if (t == "u64") return ToInt<uint64_t>::from(d, s, f);
  if (t == "s64") return ToInt<int64_t>::from(d, s, f);
  d.fail("unknown destination type ." + t);
}
Handler from_int(Decoder& d, const std::string& s) {
  if (s == "u8") return &convert<IntFloat<uint8_t>>;
  if (s == "s8") return &convert<IntFloat<int8_t>>;
  if (s == "u16") return &convert<IntFloat<uint16_t>>;
  if (s == "s16") return &convert<IntFloat<int16_t>>;
  if (s == "u32") return &convert<IntFloat<uint32_t>>;
  if (s == "s32") return &convert<IntFloat<int32_t>>;
  if (s == "u64") return &convert<IntFloat<uint64_t>>;
  if (s == "s64") return &convert<IntFloat<int64_t>>;
  d.fail("unknown source type ." + s);
}
struct Widen {
  static uint64_t call(uint32_t v) { return v; }
};
struct WidenSigned {
  static int64_t call(int32_t v) { return v; }
};
struct Narrow {
  static uint32_t call(uint64_t v) { return static_cast<uint32_t>(v); }
};
struct U32F32 {
  static float call(uint32_t v) { return static_cast<float>(v); }
};
struct S32F32 {
  static float call(int32_t v) { return static_cast<float>(v); }
};
struct HalfF32 {
  static float call(uint16_t v) { return canonical(from_half(v)); }
};
struct BfF32 {
  static float call(uint16_t v) { return canonical(from_bf16(v)); }
};
struct F32Half {
  static uint16_t call(float v) { return half_rn(v); }
};
struct F32Bf {
  static uint16_t call(float v) { return bf16_rn(v); }
};
struct AddWindow {
  template <class T>
  static T call(T a, T b) {
    return a + b;
  }
};

int float_kind(const std::string& t) {
  return t == "f16"    ? h16
         : t == "bf16" ? b16
         : t == "f32"  ? s32
         : t == "f64"  ? d64
         : t == "tf32" ? t32
                       : none_;
}

void isspacep(Warp& w, const Inst& in, uint32_t m) {
  uint32_t r = 0;
  for (int i = 0; i < 32; ++i) {
    uint64_t a = w.value(in, 1, i) & kWindowMask;
    bool b = in.space == Space::shared   ? a == kSharedWindow
             : in.space == Space::local  ? a == kLocalWindow
             : in.space == Space::param  ? a == kParamWindow
             : in.space == Space::global ? a == 0
                                         : false;
    r |= static_cast<uint32_t>(b) << i;
  }
  w.set_predicate(in.o[0], m, r);
}

}  // namespace

bool decode_convert(Decoder& d, const Instruction& s) {
  if (s.opcode == "cvta" || s.opcode == "isspacep") {
    Mods m(s);
    bool cvta = s.opcode == "cvta";
    std::string t = cvta ? m.type() : "";
    bool to = m.take("to");
    std::string name = m.any({"global", "shared", "shared::cta", "local", "const", "param"});
    m.finish();
    d.operands(2);
    if (name.empty()) d.fail("expected a state space");
    if (!cvta) {
      Inst& i = d.emit(&isspacep, "int", {d.pred_out(d.operand(0))}, {d.in(d.operand(1), "")});
      i.space = name == "global"  ? Space::global
                : name == "local" ? Space::local
                : name == "param" ? Space::param
                : name == "const" ? Space::constant
                                  : Space::shared;
      return true;
    }
    if (t != "u64") d.fail("expected cvta of .u64");
    uint64_t window = name.starts_with("shared") ? kSharedWindow
                      : name == "local"          ? kLocalWindow
                      : name == "param"          ? kParamWindow
                                                 : 0;
    if (to) window = 0 - window;
    d.emit(&alu<AddWindow, uint64_t, uint64_t, uint64_t>, "int", {d.out(d.operand(0), 8)},
           {d.in(d.operand(1), t), d.constant(window, 8)});
    return true;
  }
  if (s.opcode != "cvt") return false;
  Mods m(s);
  if (m.take("pack")) {
    bool sat = m.take("sat");
    std::vector<std::string> types;
    while (!m.empty()) types.insert(types.begin(), m.type());
    if (!sat || types.size() < 2 || types[1] != "s32") d.fail("expected cvt.pack.sat.type.s32");
    bool three = types.size() == 3;
    d.operands(three ? 4 : 3);
    std::vector<Shape> in{d.in(d.operand(1), "s32"), d.in(d.operand(2), "s32")};
    if (three) in.push_back(d.in(d.operand(3), "b32"));
    const int bits_ = std::atoi(types[0].c_str() + 1);
    if ((types[0][0] != 's' && types[0][0] != 'u') ||
        (three ? bits_ != 8 && bits_ != 4 && bits_ != 2 : bits_ != 16))
      d.fail("type ." + types[0] + " is not supported here");
    Inst& i = d.emit(&cvt_pack, "cvt", std::vector<Shape>{d.out(d.operand(0), 4)}, in);
    i.bytes = static_cast<uint8_t>(bits_);
    i.flag = types[0][0] == 's';
    return true;
  }
  std::string from = m.type(), to = m.type();
  bool ftz = m.take("ftz"), sat = m.take("sat"), relu = m.take("relu"), satfinite = m.take("satfinite");
  std::string r = m.any({"rn", "rz", "rm", "rp", "rna", "rni", "rzi", "rmi", "rpi"});
  m.finish();
  int mode = r.starts_with("rz")   ? rz
             : r.starts_with("rm") ? rm
             : r.starts_with("rp") ? rp
             : r == "rna"          ? rna
                                   : rn;
  bool integral = r.size() == 3 && r[2] == 'i';
  uint8_t flag = static_cast<uint8_t>((sat ? 1 : 0) | (integral ? 2 : 0) | (ftz ? 4 : 0) | (relu ? 8 : 0));

  bool to8 = to == "e4m3x2" || to == "e5m2x2", from8 = from == "e4m3x2" || from == "e5m2x2";
  if (to8 || from8) {
    d.require(81, 89, "conversion of fp8");
    if (r != "rn") d.fail("expected .rn");
    if (to8) {
      if (!satfinite) d.fail("expected .satfinite");
      if (from != "f32" && from != "f16x2") d.fail("type ." + from + " is not supported here");
      bool two = from == "f32";
      d.operands(two ? 3 : 2);
      std::vector<Shape> in{d.in(d.operand(1), two ? "f32" : "b32")};
      if (two) in.push_back(d.in(d.operand(2), "f32"));
      Inst& i = d.emit(&pack_fp8, "cvt", std::vector<Shape>{d.out(d.operand(0), 2)}, in);
      i.imm = to == "e5m2x2";
      i.flag = flag;
    } else {
      if (to != "f16x2") d.fail("type ." + to + " is not supported here");
      d.operands(2);
      Inst& i = d.emit(&unpack_fp8, "cvt", {d.out(d.operand(0), 4)}, {d.in(d.operand(1), "b16")});
      i.imm = from == "e5m2x2";
      i.flag = flag;
    }
    return true;
  }
  if (satfinite) d.fail(".satfinite is not supported for ." + to);
  if (to == "f16x2" || to == "bf16x2") {
    if (from != "f32") d.fail("type ." + from + " is not supported here");
    if (mode != rn && mode != rz) d.fail("expected .rn or .rz");
    d.operands(3);
    Inst& i = d.emit(&pack_two, "cvt", {d.out(d.operand(0), 4)},
                     {d.in(d.operand(1), "f32"), d.in(d.operand(2), "f32")});
    i.bytes = to[0] == 'f' ? h16 : b16;
    i.mode = static_cast<uint8_t>(mode);
    i.flag = flag;
    return true;
  }
  d.operands(2);
  int ft = float_kind(to), ff = float_kind(from);
  if (ff == t32 || (ft == t32 && from != "f32")) d.fail("tf32 converts from .f32 only");
  if (ft == t32 && r != "rna") d.require(78, 90, "cvt to tf32 other than .rna");
  if (r == "rna" && ft != t32) d.fail("unknown modifier .rna");
  if ((ft == b16 && ff != s32 && ff != b16) || (ff == b16 && ft != s32 && ft != b16))
    d.require(78, 90, "this conversion of bf16");
  if (ff && !ft && !integral) d.fail("expected .rni, .rzi, .rmi or .rpi");
  if (!ff && ft && r.empty()) d.fail("expected a rounding");
  if (ff && ft && ft != ff && r.empty() &&
      type_bytes(to == "tf32" ? "f32" : to, s.line) < type_bytes(from, s.line))
    d.fail("expected a rounding");
  if (ftz && ff != s32 && !(ff && ft == s32)) d.fail("unknown modifier '.ftz'");
  if (relu && r == "rna") d.fail("unknown modifier '.relu'");
  // Registers may be wider than the type.
  int to_bytes = ft == t32 ? 4 : static_cast<int>(type_bytes(to, s.line)),
      from_bytes = static_cast<int>(type_bytes(from, s.line));
  Shape out = d.out(d.operand(0), 0);
  Shape in = d.operand(1).kind == Operand::name ? d.in(d.operand(1), "")
                                                : d.in(d.operand(1), from_bytes == 1 ? "b16" : from);
  if (out.width < to_bytes || in.width < from_bytes) d.fail("the register is narrower than the type");
  Handler h;
  if (ft && ff) {
    bool exact = !flag && out.width == to_bytes && in.width == from_bytes;
    if (exact && ft == s32 && ff == h16)
      h = &alu<HalfF32, float, uint16_t>;
    else if (exact && ft == s32 && ff == b16)
      h = &alu<BfF32, float, uint16_t>;
    else if (exact && ft == h16 && ff == s32 && mode == rn)
      h = &alu<F32Half, uint16_t, float>;
    else if (exact && ft == b16 && ff == s32 && mode == rn)
      h = &alu<F32Bf, uint16_t, float>;
    else
      h = &convert<FloatFloat>;
  } else if (ff) {
    h = to_int(d, to, from, true);
  } else if (ft) {
    h = from_int(d, from);
    if (!flag && mode == rn && ft == s32 && in.width == 4 && from == "u32") h = &alu<U32F32, float, uint32_t>;
    if (!flag && mode == rn && ft == s32 && in.width == 4 && from == "s32") h = &alu<S32F32, float, int32_t>;
  } else {
    // Saturation is for conversions that can overflow.
    const bool keeps_sign = to[0] == 's' || from[0] == 'u';
    if (sat && keeps_sign && (to[0] == from[0] ? to_bytes >= from_bytes : to_bytes > from_bytes))
      d.fail("unknown modifier '.sat'");
    h = to_int(d, to, from, false);
    if (!sat && out.width == 8 && to_bytes == 8 && from == "u32" && in.width == 4)
      h = &alu<Widen, uint64_t, uint32_t>;
    if (!sat && out.width == 8 && to_bytes == 8 && from == "s32" && in.width == 4)
      h = &alu<WidenSigned, int64_t, int32_t>;
    if (!sat && out.width == 4 && to_bytes == 4 && from_bytes == 8 && in.width == 8)
      h = &alu<Narrow, uint32_t, uint64_t>;
  }
  Inst& i = d.emit(h, "cvt", {out}, {in});
  i.mode = static_cast<uint8_t>(mode);
  i.flag = flag;
  i.bytes = static_cast<uint8_t>(ff ? ff : ft);
  i.imm = ft;
  return true;
}

}  // namespace mgm::emulator
