// Floating point arithmetic: f32, f64, f16, bf16 and the packed pairs.
#include <cfenv>
#include <tuple>

#include "numeric.h"

namespace mgm::emulator {
namespace {

// Plain operations on float or double; each is a single correctly rounded one.
struct FAdd {
  template <class T>
  static T call(T a, T b) {
    return a + b;
  }
};
struct FSub {
  template <class T>
  static T call(T a, T b) {
    return a - b;
  }
};
struct FMul {
  template <class T>
  static T call(T a, T b) {
    return a * b;
  }
};
struct FFma {
  template <class T>
  static T call(T a, T b, T c) {
    return std::fma(a, b, c);
  }
};
struct FDiv {
  template <class T>
  static T call(T a, T b) {
    return a / b;
  }
};
struct FRcp {
  template <class T>
  static T call(T a) {
    return 1 / a;
  }
};
struct FSqrt {
  template <class T>
  static T call(T a) {
    return std::sqrt(a);
  }
};
// rcp.approx.ftz.f64: of the upper words alone.
struct FRcpUpper {
  static double call(double a) {
    const uint64_t upper = ~uint64_t{0xffffffff};
    const double x = bits_as<double>(bits_as<uint64_t>(a) & upper);
    if (x == x && std::fabs(x) < 0x1p-1022) return std::copysign(static_cast<double>(INFINITY), x);
    const double r = bits_as<double>(bits_as<uint64_t>(1 / x) & upper);
    return r == r && std::fabs(r) < 0x1p-1022 ? std::copysign(0.0, r) : r;
  }
};
struct FRsqrt {
  template <class T>
  static T call(T a) {
    return static_cast<T>(1 / std::sqrt(static_cast<double>(a)));
  }
};
struct FEx2 {
  static float call(float a) { return std::exp2(a); }
};
struct FLg2 {
  static float call(float a) { return std::log2(a); }
};
struct FSin {
  static float call(float a) { return std::isinf(a) ? f32(0x7fffffff) : std::sin(a); }
};
struct FCos {
  static float call(float a) { return std::isinf(a) ? f32(0x7fffffff) : std::cos(a); }
};
struct FTanh {
  static float call(float a) { return std::tanh(a); }
};
struct FNeg {
  template <class T>
  static T call(T a) {
    return -a;
  }
};
struct FAbs {
  template <class T>
  static T call(T a) {
    return std::fabs(a);
  }
};
struct FMin {
  template <class T>
  static T call(T a, T b) {
    return a != a ? b : b != b ? a : a == b ? (std::signbit(a) ? a : b) : a < b ? a : b;
  }
};
struct FMax {
  template <class T>
  static T call(T a, T b) {
    return a != a ? b : b != b ? a : a == b ? (std::signbit(a) ? b : a) : a > b ? a : b;
  }
};
// .xorsign.abs: of the magnitudes, with the product's sign.
template <class F>
struct XorSign {
  template <class T>
  static T call(T a, T b) {
    const T r = F::call(std::fabs(a), std::fabs(b));
    return r != r ? r : std::copysign(r, std::signbit(a) != std::signbit(b) ? T(-1) : T(1));
  }
};
struct FMinNan {
  template <class T>
  static T call(T a, T b) {
    return a != a || b != b ? static_cast<T>(NAN) : FMin::call(a, b);
  }
};
struct FMaxNan {
  template <class T>
  static T call(T a, T b) {
    return a != a || b != b ? static_cast<T>(NAN) : FMax::call(a, b);
  }
};

// Directed rounding of f32: the sum is taken to odd in double, then rounded once. An exact zero of terms that
// cancel is negative where rounding is downwards.
template <int M>
float directed_sum(double x, double y) {
  double s = add_odd(x, y);
  if (s == 0) s = x == 0 && y == 0 && std::signbit(x) == std::signbit(y) ? x : M == rm ? -0.0 : 0.0;
  return to_float(s, static_cast<Round>(M));
}
template <int M>
struct DAdd {
  static float call(float a, float b) { return directed_sum<M>(a, b); }
};
template <int M>
struct DSub {
  static float call(float a, float b) { return directed_sum<M>(a, -b); }
};
template <int M>
struct DMul {
  static float call(float a, float b) { return to_float(static_cast<double>(a) * b, static_cast<Round>(M)); }
};
template <int M>
struct DFma {
  static float call(float a, float b, float c) { return directed_sum<M>(static_cast<double>(a) * b, c); }
};
constexpr int kFe[] = {FE_TONEAREST, FE_TOWARDZERO, FE_DOWNWARD, FE_UPWARD};
// Rare: through the host's rounding mode. The barriers keep the operation between the two mode changes.
template <int M, class F>
struct Fenv {
  template <class T, class... A>
  static T call(T a, A... b) {
    volatile T x = a;
    std::fesetround(kFe[M]);
    volatile T r = F::call(static_cast<T>(x), b...);
    std::fesetround(FE_TONEAREST);
    return r;
  }
};

template <int M>
struct DDiv : Fenv<M, FDiv> {};
template <int M>
struct DRcp : Fenv<M, FRcp> {};
template <int M>
struct DSqrt : Fenv<M, FSqrt> {};

template <class F, bool Ftz, bool Sat>
struct F32 {
  template <class... A>
  static float call(A... a) {
    float r = F::call((Ftz ? flush(a) : a)...);
    if (Ftz) r = flush(r);
    if (Sat) r = r > 0 ? (r < 1 ? r : 1.0f) : 0.0f;
    return canonical(r);
  }
};
template <class F, bool Ftz>
struct Raw32 {  // neg, abs, copysign: NaN payloads pass
  template <class... A>
  static float call(A... a) {
    return F::call((Ftz ? flush(a) : a)...);
  }
};
template <class F>
struct F64 {
  template <class... A>
  static double call(A... a) {
    return F::call(a...);
  }
};

struct Half {
  static float from(uint16_t v) { return from_half(v); }
  static uint16_t to(float v) { return half_rn(v); }
  static uint16_t to_wide(double v) { return to_half(v); }
  static constexpr uint16_t exponent = 0x7c00;
};
struct Bf {
  static float from(uint16_t v) { return from_bf16(v); }
  static uint16_t to(float v) { return bf16_rn(v); }
  static uint16_t to_wide(double v) { return to_bf16(v); }
  static constexpr uint16_t exponent = 0x7f80;
};
template <class Format, bool Ftz>
uint16_t flush16(uint16_t v) {
  return Ftz && !(v & Format::exponent) ? v & 0x8000 : v;
}
template <class Format, int Clamp>  // 0 none, 1 sat, 2 relu
uint16_t finish16(uint16_t r) {
  bool nan = (r & 0x7fff) > Format::exponent;
  if (nan) return Clamp == 1 ? 0 : 0x7fff;
  if (Clamp && (r & 0x8000)) return 0;
  if (Clamp == 1 && Format::from(r) > 1) return Format::to(1.0f);
  return r;
}
template <class F, class Format, bool Ftz, int Clamp>
struct F16 {
  template <class... A>
  static uint16_t call(A... a) {
    uint16_t r;
    if constexpr (std::is_same_v<F, FFma>) {
      r = fma16(flush16<Format, Ftz>(a)...);
    } else {
      r = Format::to(F::call(Format::from(flush16<Format, Ftz>(a))...));
    }
    return finish16<Format, Clamp>(flush16<Format, Ftz>(r));
  }
  static uint16_t fma16(uint16_t a, uint16_t b, uint16_t c) {
    return Format::to_wide(add_odd(static_cast<double>(Format::from(a)) * Format::from(b), Format::from(c)));
  }
};
template <class F>
struct Pair {
  template <class... A>
  static uint32_t call(A... a) {
    return F::call(static_cast<uint16_t>(a)...) |
           static_cast<uint32_t>(F::call(static_cast<uint16_t>(a >> 16)...)) << 16;
  }
};
template <bool Ftz>
struct Neg16 {
  static uint16_t call(uint16_t a) { return flush16<Half, Ftz>(a) ^ 0x8000; }
};
template <bool Ftz>
struct Abs16 {
  static uint16_t call(uint16_t a) { return flush16<Half, Ftz>(a) & 0x7fff; }
};
template <template <bool> class F>
Handler sign16(bool pair, bool ftz) {
  if (pair) return ftz ? &alu<Pair<F<true>>, uint32_t, uint32_t> : &alu<Pair<F<false>>, uint32_t, uint32_t>;
  return ftz ? &alu<F<true>, uint16_t, uint16_t> : &alu<F<false>, uint16_t, uint16_t>;
}

template <class F, class T, int N>
Handler n_ary() {
  if constexpr (N == 1)
    return &alu<F, T, T>;
  else if constexpr (N == 2)
    return &alu<F, T, T, T>;
  else
    return &alu<F, T, T, T, T>;
}
template <class F, int N>
Handler f32_handler(bool ftz, bool sat) {
  return ftz ? (sat ? n_ary<F32<F, true, true>, float, N>() : n_ary<F32<F, true, false>, float, N>())
             : (sat ? n_ary<F32<F, false, true>, float, N>() : n_ary<F32<F, false, false>, float, N>());
}
template <class F, class Format, bool Ftz, int N>
Handler half_clamp(bool pair, int clamp) {
  if (pair)
    return clamp == 0   ? n_ary<Pair<F16<F, Format, Ftz, 0>>, uint32_t, N>()
           : clamp == 1 ? n_ary<Pair<F16<F, Format, Ftz, 1>>, uint32_t, N>()
                        : n_ary<Pair<F16<F, Format, Ftz, 2>>, uint32_t, N>();
  return clamp == 0   ? n_ary<F16<F, Format, Ftz, 0>, uint16_t, N>()
         : clamp == 1 ? n_ary<F16<F, Format, Ftz, 1>, uint16_t, N>()
                      : n_ary<F16<F, Format, Ftz, 2>, uint16_t, N>();
}
template <class F, int N>
Handler half_handler(const std::string& t, bool ftz, int clamp) {
  bool pair = t.ends_with("x2");
  if (t[0] == 'b') return half_clamp<F, Bf, false, N>(pair, clamp);
  return ftz ? half_clamp<F, Half, true, N>(pair, clamp) : half_clamp<F, Half, false, N>(pair, clamp);
}

void testp(Warp& w, const Inst& in, uint32_t m) {
  uint32_t r = 0;
  for (int i = 0; i < 32; ++i) {
    double v;
    bool normal;
    if (in.w[1] == 4) {
      v = w.src<float>(in.o[1])[i];
      normal = std::isnormal(w.src<float>(in.o[1])[i]);
    } else {
      v = w.src<double>(in.o[1])[i];
      normal = std::isnormal(v);
    }
    bool b = in.mode == 0   ? std::isfinite(v)
             : in.mode == 1 ? std::isinf(v)
             : in.mode == 2 ? !std::isnan(v)
             : in.mode == 3 ? std::isnan(v)
             : in.mode == 4 ? normal
                            : !normal && v != 0 && std::isfinite(v);
    r |= static_cast<uint32_t>(b) << i;
  }
  w.set_predicate(in.o[0], m, r);
}
struct CopySign {
  template <class T>
  static T call(T a, T b) {
    return std::copysign(b, a);
  }
};

Round rounding(const std::string& r) {
  return r == "rz" ? rz : r == "rm" ? rm : r == "rp" ? rp : rn;
}

template <template <int> class D, int N>
Handler directed32(Round r, bool ftz, bool sat) {
  return r == rz   ? f32_handler<D<rz>, N>(ftz, sat)
         : r == rm ? f32_handler<D<rm>, N>(ftz, sat)
                   : f32_handler<D<rp>, N>(ftz, sat);
}
template <class F, class T, int N>
Handler fenv_handler(Round r) {
  return r == rz   ? n_ary<Fenv<1, F>, T, N>()
         : r == rm ? n_ary<Fenv<2, F>, T, N>()
                   : n_ary<Fenv<3, F>, T, N>();
}

}  // namespace

bool decode_float(Decoder& d, const Instruction& s) {
  static const char* known[] = {"add", "sub", "mul", "fma",  "mad",   "div",     "min",
                                "max", "abs", "neg", "rcp",  "sqrt",  "rsqrt",   "sin",
                                "cos", "ex2", "lg2", "tanh", "testp", "copysign"};
  std::string op = s.opcode;
  bool mine = false;
  for (const char* k : known) mine |= op == k;
  if (!mine) return false;
  Mods m(s);
  std::string t = m.type();
  bool half = t == "f16" || t == "f16x2" || t == "bf16" || t == "bf16x2";
  if (!half && t != "f32" && t != "f64") m.fail("type ." + t + " is not supported here");
  int bytes = static_cast<int>(type_bytes(t, s.line));
  auto emit = [&](Handler h, size_t n, const char* klass) {
    if (!h) m.fail("this form is not supported");
    m.finish();
    d.operands(n + 1);
    std::vector<Shape> in;
    for (size_t i = 1; i <= n; ++i) in.push_back(d.in(d.operand(i), t));
    d.emit(h, klass, std::vector<Shape>{d.out(d.operand(0), bytes)}, in);
    return true;
  };
  const char* klass = half ? "half" : t == "f64" ? "f64" : op == "fma" || op == "mad" ? "fma" : "float";
  if (op == "testp") {
    static const char* tests[] = {"finite", "infinite", "number", "notanumber", "normal", "subnormal"};
    int k = -1;
    for (int i = 0; i < 6; ++i)
      if (m.take(tests[i])) k = i;
    m.finish();
    d.operands(2);
    if (k < 0 || half) d.fail("expected a test and .f32 or .f64 for testp");
    d.emit(&testp, "float", {d.pred_out(d.operand(0))}, {d.in(d.operand(1), t)}).mode =
        static_cast<uint8_t>(k);
    return true;
  }
  if (op == "copysign") {
    if (half) m.fail("expected .f32 or .f64");
    return emit(bytes == 4 ? &alu<CopySign, float, float, float> : &alu<CopySign, double, double, double>, 2,
                klass);
  }
  bool ftz = m.take("ftz");
  if (op == "mad") op = "fma";
  if (op == "neg" || op == "abs") {
    bool neg = op == "neg";
    if (t == "f32")
      return emit(
          neg ? (ftz ? &alu<Raw32<FNeg, true>, float, float> : &alu<Raw32<FNeg, false>, float, float>)
              : (ftz ? &alu<Raw32<FAbs, true>, float, float> : &alu<Raw32<FAbs, false>, float, float>),
          1, klass);
    if (ftz && t[0] == 'b') m.fail("unknown modifier '.ftz'");
    if (t == "f64") {
      if (ftz) m.fail("unknown modifier '.ftz'");
      return emit(neg ? &alu<F64<FNeg>, double, double> : &alu<F64<FAbs>, double, double>, 1, klass);
    }
    return emit(neg ? sign16<Neg16>(bytes == 4, ftz) : sign16<Abs16>(bytes == 4, ftz), 1, klass);
  }
  if (op == "min" || op == "max") {
    bool nan = m.take("NaN"), mx = op == "max";
    const bool xorsign = m.take("xorsign");
    if (xorsign && !m.take("abs")) m.fail("expected .xorsign.abs");
    if (xorsign) d.require(72, 86, "min and max with .xorsign.abs");
    if (ftz && t[0] == 'b') m.fail("unknown modifier '.ftz'");
    auto of = [&](auto f) {
      using F = decltype(f);
      if (half) return half_handler<F, 2>(t, ftz, 0);
      return f32_handler<F, 2>(ftz, false);
    };
    if (t == "f64") {
      if (nan || xorsign || ftz) m.fail("unknown modifier for .f64");
      return emit(mx ? &alu<F64<FMax>, double, double, double> : &alu<F64<FMin>, double, double, double>, 2,
                  klass);
    }
    Handler h = xorsign ? (nan ? (mx ? of(XorSign<FMaxNan>{}) : of(XorSign<FMinNan>{}))
                               : (mx ? of(XorSign<FMax>{}) : of(XorSign<FMin>{})))
                        : (nan ? (mx ? of(FMaxNan{}) : of(FMinNan{})) : (mx ? of(FMax{}) : of(FMin{})));
    return emit(h, 2, klass);
  }
  bool sat = m.take("sat"), relu = m.take("relu");
  bool approx = m.take("approx"), full = m.take("full");
  std::string round_name = m.any({"rn", "rz", "rm", "rp"});
  Round r = rounding(round_name);
  if (op == "add" || op == "sub" || op == "mul" || op == "fma") {
    if (approx || full) m.fail("unknown modifier .approx");
    size_t n = op == "fma" ? 3 : 2;
    if (op == "fma" && round_name.empty()) m.fail("expected a rounding");
    if (half) {
      if (r != rn) m.fail("halves round to nearest only");
      if (t[0] == 'b' && op != "fma") d.require(78, 90, "add, sub and mul of bf16");
      if (t[0] == 'b' && (ftz || sat)) m.fail("unknown modifier .ftz or .sat for bf16");
      if (relu && op != "fma") m.fail("unknown modifier .relu");
      int clamp = sat ? 1 : relu ? 2 : 0;
      Handler h = op == "add"   ? half_handler<FAdd, 2>(t, ftz, clamp)
                  : op == "sub" ? half_handler<FSub, 2>(t, ftz, clamp)
                  : op == "mul" ? half_handler<FMul, 2>(t, ftz, clamp)
                                : half_handler<FFma, 3>(t, ftz, clamp);
      return emit(h, n, klass);
    }
    if (relu) m.fail("unknown modifier .relu");
    if (t == "f64") {
      if (ftz || sat) m.fail("unknown modifier for .f64");
      Handler h = op == "add"
                      ? (r == rn ? &alu<F64<FAdd>, double, double, double> : fenv_handler<FAdd, double, 2>(r))
                  : op == "sub"
                      ? (r == rn ? &alu<F64<FSub>, double, double, double> : fenv_handler<FSub, double, 2>(r))
                  : op == "mul"
                      ? (r == rn ? &alu<F64<FMul>, double, double, double> : fenv_handler<FMul, double, 2>(r))
                      : (r == rn ? &alu<F64<FFma>, double, double, double, double>
                                 : fenv_handler<FFma, double, 3>(r));
      return emit(h, n, klass);
    }
    Handler h;
    if (r == rn)
      h = op == "add"   ? f32_handler<FAdd, 2>(ftz, sat)
          : op == "sub" ? f32_handler<FSub, 2>(ftz, sat)
          : op == "mul" ? f32_handler<FMul, 2>(ftz, sat)
                        : f32_handler<FFma, 3>(ftz, sat);
    else
      h = op == "add"   ? directed32<DAdd, 2>(r, ftz, sat)
          : op == "sub" ? directed32<DSub, 2>(r, ftz, sat)
          : op == "mul" ? directed32<DMul, 2>(r, ftz, sat)
                        : directed32<DFma, 3>(r, ftz, sat);
    return emit(h, n, klass);
  }
  if (sat || relu) m.fail("unknown modifier .sat or .relu");
  if (op == "div" || op == "rcp" || op == "sqrt") {
    size_t n = op == "div" ? 2 : 1;
    if (half) m.fail("type ." + t + " is not supported here");
    if (!approx && !full && round_name.empty()) m.fail("expected .approx or a rounding");
    if (t == "f64") {
      if (op == "rcp" && approx && ftz) return emit(&alu<F64<FRcpUpper>, double, double>, n, klass);
      if (approx || full || ftz) m.fail("unknown modifier for .f64");
      Handler h =
          op == "div" ? (r == rn ? &alu<F64<FDiv>, double, double, double> : fenv_handler<FDiv, double, 2>(r))
          : op == "rcp" ? (r == rn ? &alu<F64<FRcp>, double, double> : fenv_handler<FRcp, double, 1>(r))
                        : (r == rn ? &alu<F64<FSqrt>, double, double> : fenv_handler<FSqrt, double, 1>(r));
      return emit(h, n, klass);
    }
    if (r != rn)
      return emit(op == "div"   ? directed32<DDiv, 2>(r, ftz, false)
                  : op == "rcp" ? directed32<DRcp, 1>(r, ftz, false)
                                : directed32<DSqrt, 1>(r, ftz, false),
                  n, "special");
    return emit(op == "div"   ? f32_handler<FDiv, 2>(ftz, false)
                : op == "rcp" ? f32_handler<FRcp, 1>(ftz, false)
                              : f32_handler<FSqrt, 1>(ftz, false),
                n, "special");
  }
  if (!round_name.empty() || full) m.fail("unknown modifier for " + op);
  if (!approx) m.fail("expected .approx");
  if (half) {
    if (op != "ex2" && op != "tanh") m.fail("type ." + t + " is not supported here");
    const bool bf = t[0] == 'b';
    if (bf) d.require(78, 90, "ex2 and tanh of bf16");
    if (ftz != (bf && op == "ex2")) m.fail(ftz ? "unknown modifier '.ftz'" : "expected .ftz");
    return emit(op == "ex2" ? half_handler<FEx2, 1>(t, ftz, 0) : half_handler<FTanh, 1>(t, ftz, 0), 1,
                "special");
  }
  if (t == "f64") {
    if (op == "rsqrt") return emit(&alu<F64<FRsqrt>, double, double>, 1, "special");
    m.fail("type .f64 is not supported here");
  }
  if (op == "tanh" && ftz) m.fail("unknown modifier '.ftz'");
  Handler h = op == "rsqrt" ? f32_handler<FRsqrt, 1>(ftz, false)
              : op == "sin" ? f32_handler<FSin, 1>(ftz, false)
              : op == "cos" ? f32_handler<FCos, 1>(ftz, false)
              : op == "ex2" ? f32_handler<FEx2, 1>(ftz, false)
              : op == "lg2" ? f32_handler<FLg2, 1>(ftz, false)
                            : f32_handler<FTanh, 1>(ftz, false);
  return emit(h, 1, "special");
}

}  // namespace mgm::emulator
