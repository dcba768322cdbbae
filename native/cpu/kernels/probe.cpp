// The most multiply-adds this instruction set can do: 24 independent chains in registers (portable: as many
// as fit), nothing from memory. One thread's worth; benches run it on as many threads as they compare with.
#include "../kernels.h"
#include "../simd/simd.h"

namespace mgm::cpu::MGM_ISA {

double fma_probe(int64_t iterations, float* sink) {
  constexpr int kChains = kWidth == 16 ? 24 : 12;
  vf acc[kChains];
#pragma GCC unroll 24
  for (int i = 0; i < kChains; ++i) acc[i] = set1(static_cast<float>(i) * 0x1p-10f);
  const vf a = set1(0.999f + *sink * 0x1p-60f), b = set1(0x1p-12f);
  for (int64_t n = 0; n < iterations; ++n) {
#pragma GCC unroll 24
    for (int i = 0; i < kChains; ++i) acc[i] = fma(acc[i], a, b);
  }
  vf total = acc[0];
#pragma GCC unroll 24
  for (int i = 1; i < kChains; ++i) total = total + acc[i];
  *sink = sum(total);
  return 2.0 * kWidth * kChains * static_cast<double>(iterations);
}

}  // namespace mgm::cpu::MGM_ISA
