// Standard normal numbers (native/ops.h has the formula). A thread makes the four numbers of one Philox
// counter; 4 bytes a number are written, nothing is read.
#include "common.cuh"
#include "philox.cuh"
#include "random_normal.h"

namespace mgm::cuda {
namespace {

// In (0, 1]: the sum is rounded to f32, as on the CPU.
__device__ __forceinline__ float uniform(uint32_t word) {
  return (static_cast<float>(word) + 0.5f) * 0x1p-32f;
}

__device__ __forceinline__ float2 box_muller(uint32_t radius_word, uint32_t angle_word) {
  const float radius = sqrtf(-2.0f * logf(uniform(radius_word)));
  float sine, cosine;
  sincospif(2.0f * uniform(angle_word), &sine, &cosine);
  return {radius * cosine, radius * sine};
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kNormalThreads)
    random_normal(const __grid_constant__ NormalParams p) {
  const int64_t row = blockIdx.x / p.blocks;
  const int64_t quad = static_cast<int64_t>(blockIdx.x % p.blocks) * kNormalThreads + threadIdx.x;
  const int64_t left = p.numbers - quad * 4;
  if (left <= 0) return;
  const int32_t* seed = p.seeds + row * 3;
  const uint4 words = philox({static_cast<uint32_t>(quad), 0, static_cast<uint32_t>(seed[2]), 0},
                             {static_cast<uint32_t>(seed[0]), static_cast<uint32_t>(seed[1])});
  const float2 a = box_muller(words.x, words.y), b = box_muller(words.z, words.w);
  const Vector<float, 4> four{{a.x, a.y, b.x, b.y}};
  float* to = p.out + row * p.numbers + quad * 4;
  if (p.aligned) return store_vector(to, four);
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (i < left) to[i] = four.at[i];
}

}  // namespace mgm::cuda
