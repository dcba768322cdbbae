// A sampler's step over latents: guidance and a linear combination (native/ops.h).
#include "../kernels.h"
#include "../simd/simd.h"

namespace mgm::cpu::MGM_ISA {

void scheduler_step(const SchedulerStepArgs& args, ThreadPool& pool) {
  constexpr int64_t kChunk = 1 << 13;
  const int64_t batch = args.x.shape[0], n = args.x.numel() / batch, chunks = (n + kChunk - 1) / kChunk;
  const bool halves = args.input.shape[0] != batch;
  const float *model = args.model.f32(), *previous = args.previous.f32(), *noise = args.noise.f32();
  float *predicted = args.predicted.f32(), *input = args.input.f32();
  pool.parallel_for(batch * chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      const int64_t b = task / chunks, chunk = task % chunks;
      const float* k = args.coefficients.f32() + b * 8;
      const vf guidance = set1(k[0]), p_x = set1(k[1]), p_m = set1(k[2]), c_x = set1(k[3]), c_m = set1(k[4]),
               c_p = set1(k[5]), c_n = set1(k[6]), s = set1(k[7]);
      const int64_t end = b * n + ((chunk + 1) * kChunk < n ? (chunk + 1) * kChunk : n);
      for (int64_t i = b * n + chunk * kChunk; i < end; i += kWidth) {
        const int64_t left = end - i;
        const vf x = load_up_to(args.x.f32() + i, left);
        vf y = c_x * x;
        if (model) {
          vf m = load_up_to(model + i, left);
          if (halves) m = fma(guidance, load_up_to(model + batch * n + i, left) - m, m);
          store_up_to(predicted + i, fma(p_m, m, p_x * x), left);
          y = fma(c_m, m, y);
        }
        if (previous) y = fma(c_p, load_up_to(previous + i, left), y);
        if (noise) y = fma(c_n, load_up_to(noise + i, left), y);
        store_up_to(args.out.f32() + i, y, left);
        const vf scaled = s * y;
        store_up_to(input + i, scaled, left);
        if (halves) store_up_to(input + batch * n + i, scaled, left);
      }
    }
  });
}

}  // namespace mgm::cpu::MGM_ISA
