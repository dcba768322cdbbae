// GroupNorm over one or two images that are taken as one of more channels.
#include "../kernels.h"
#include "../simd/math.h"
#include "../simd/simd.h"

namespace mgm::cpu::MGM_ISA {

void group_norm(const GroupNormArgs& args, ThreadPool& pool) {
  const int64_t batch = args.x.shape[0], pixels = args.x.shape[1] * args.x.shape[2], c1 = args.x.shape[3],
                c2 = args.more ? args.more.shape[3] : 0, channels = c1 + c2, width = channels / args.groups;
  const float *weight = args.weight.f32(), *bias = args.bias.f32();
  pool.parallel_for(batch * args.groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / args.groups, first = task % args.groups * width;
      const auto at = [&](int64_t pixel, int64_t c) {
        return c < c1 ? args.x.f32()[(b * pixels + pixel) * c1 + c]
                      : args.more.f32()[(b * pixels + pixel) * c2 + c - c1];
      };
      double mean = 0.0, square = 0.0;
      for (int64_t p = 0; p < pixels; ++p)
        for (int64_t c = first; c < first + width; ++c) mean += at(p, c);
      mean /= static_cast<double>(pixels * width);
      for (int64_t p = 0; p < pixels; ++p)
        for (int64_t c = first; c < first + width; ++c) square += (at(p, c) - mean) * (at(p, c) - mean);
      const double r = 1.0 / __builtin_sqrt(square / static_cast<double>(pixels * width) + args.eps);
      for (int64_t p = 0; p < pixels; ++p)
        for (int64_t c = first; c < first + width; ++c) {
          const float y = static_cast<float>((at(p, c) - mean) * r) * weight[c] + bias[c];
          args.out.f32()[(b * pixels + p) * channels + c] =
              args.activation == Activation::silu ? y / (1.0f + __builtin_expf(-y)) : y;
        }
    }
  });
}

}  // namespace mgm::cpu::MGM_ISA
