// What the parts of core_test share: counting checks, a device to run PTX on, bits of numbers.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "../emulator.h"

namespace mgm::emulator::test {

void check(bool ok, const std::string& what);

inline const char* kHead = ".version 7.8\n.target sm_80\n.address_size 64\n";

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

// A kernel of one warp: each of `n` threads loads its inputs, runs `body`, stores its outputs. Inputs and
// outputs are 32-bit registers %a, %b, %c -> %d; wide ones %la.. -> %ld.
inline std::string lanes_kernel(const std::string& body, bool wide = false, std::string s = kHead) {
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

// The value of a float of that layout, by arithmetic on its fields.
inline double half_value(uint32_t h, int exponent_bits, int mantissa_bits) {
  int e = h >> mantissa_bits & ((1 << exponent_bits) - 1), m = h & ((1 << mantissa_bits) - 1),
      bias = (1 << (exponent_bits - 1)) - 1;
  double s = h >> (exponent_bits + mantissa_bits) & 1 ? -1 : 1;
  if (e == (1 << exponent_bits) - 1) return m ? NAN : s * INFINITY;
  return s * (e ? std::pow(2.0, e - bias) * (1 + m / std::pow(2.0, mantissa_bits))
                : std::pow(2.0, 1 - bias) * m / std::pow(2.0, mantissa_bits));
}

// The parts.
void test_integers();
void test_floats();
void test_conversions();
void test_matrices();  // ldmatrix and mma.sync
void test_grammar();   // each form of tier A against ptxas

}  // namespace mgm::emulator::test
