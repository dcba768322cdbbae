// A sampler's step over latents: guidance and a linear combination.
#include "../kernels.h"

namespace mgm::cpu::MGM_ISA {

void scheduler_step(const SchedulerStepArgs& args, ThreadPool& pool) {
  const int64_t batch = args.x.shape[0], n = args.x.numel() / batch;
  const bool halves = args.input.shape[0] != batch;
  const float *model = args.model.f32(), *previous = args.previous.f32(), *noise = args.noise.f32();
  pool.parallel_for(batch * n, 1 << 14, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float* k = args.coefficients.f32() + i / n * 8;
      const float x = args.x.f32()[i];
      float m = 0.0f;
      if (model) m = halves ? model[i] + k[0] * (model[batch * n + i] - model[i]) : model[i];
      if (model) args.predicted.f32()[i] = k[1] * x + k[2] * m;
      float y = k[3] * x;
      if (model) y += k[4] * m;
      if (previous) y += k[5] * previous[i];
      if (noise) y += k[6] * noise[i];
      args.out.f32()[i] = y;
      args.input.f32()[i] = k[7] * y;
      if (halves) args.input.f32()[batch * n + i] = k[7] * y;
    }
  });
}

}  // namespace mgm::cpu::MGM_ISA
