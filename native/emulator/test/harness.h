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
void test_arithmetic();  // every instruction that computes, lane by lane
void test_matrices();    // ldmatrix and mma.sync
void test_grammar();     // each form of tier A against ptxas

}  // namespace mgm::emulator::test
