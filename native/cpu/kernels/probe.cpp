// What this instruction set can do at most, one thread's worth each; benches run them on as many threads as
// they compare with. fma_probe: 24 independent chains of multiply-adds in registers (portable: as many as
// fit), nothing from memory. read_probe: nothing but loads.
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

void read_probe(const std::byte* data, size_t bytes, int streams, size_t stride, float* sink) {
  vf acc[4] = {set1(0.0f), set1(0.0f), set1(0.0f), set1(0.0f)};
  for (size_t offset = 0; offset < bytes; offset += 64)
    for (int stream = 0; stream < streams; ++stream) {
      const auto* line = reinterpret_cast<const float*>(data + offset + static_cast<size_t>(stream) * stride);
      for (int i = 0; i < 16; i += kWidth) acc[i / kWidth] = max(acc[i / kWidth], load(line + i));
    }
  *sink += sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
}

}  // namespace mgm::cpu::MGM_ISA
