// One step of a diffusion sampler (native/ops.h has the formula). A thread makes one latent number: latents
// are some 64 Ki numbers an image, of which every operand is read and every result written once. Coefficients
// come from the first-level cache.
#include "common.cuh"
#include "scheduler_step.h"

namespace mgm::cuda {
namespace {

template <class T>
__device__ __forceinline__ void step(const SchedulerParams& p) {
  const int64_t image = blockIdx.x / p.blocks;
  const int64_t number = static_cast<int64_t>(blockIdx.x % p.blocks) * kSchedulerThreads + threadIdx.x;
  if (number >= p.numbers) return;
  const int64_t i = image * p.numbers + number;
  const float* k = p.coefficients + image * 8;
  const float x = p.x[i];
  float y = k[3] * x;
  if (p.model) {
    const T* model = static_cast<const T*>(p.model) + i;
    float m = to_float(model[0]);
    if (p.half) m = fmaf(k[0], to_float(model[p.half]) - m, m);
    p.predicted[i] = fmaf(k[2], m, k[1] * x);
    y = fmaf(k[4], m, y);
  }
  if (p.previous) y = fmaf(k[5], p.previous[i], y);
  if (p.noise) y = fmaf(k[6], p.noise[i], y);
  p.out[i] = y;
  T* input = static_cast<T*>(p.input) + i;
  input[0] = from_float<T>(k[7] * y);
  if (p.half) input[p.half] = input[0];
}

}  // namespace

#define STEP(name, T)                                             \
  extern "C" __global__ void __launch_bounds__(kSchedulerThreads) \
      name(const __grid_constant__ SchedulerParams p) {           \
    step<T>(p);                                                   \
  }
STEP(scheduler_step_f32, float)
STEP(scheduler_step_bf16, __nv_bfloat16)
STEP(scheduler_step_f16, __half)

}  // namespace mgm::cuda
