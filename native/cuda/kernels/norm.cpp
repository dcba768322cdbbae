#include "norm.h"

#include "../launch.h"

namespace mgm::cuda {
namespace {

bool aligned(const View& rows) {
  return !rows || (reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && rows.strides[0] % 4 == 0);
}

void run(Queue& queue, const char* kernel, const View& x, const View& residual, const View& weight,
         const View& bias, const View& out, const View& sum, float eps, float weight_offset) {
  const NormParams p{x.f32(),
                     residual.f32(),
                     weight.f32(),
                     bias.f32(),
                     out.f32(),
                     sum.f32(),
                     x.strides[0],
                     residual.strides[0],
                     out.strides[0],
                     sum.strides[0],
                     static_cast<int32_t>(x.shape[1]),
                     aligned(x) && aligned(residual) && aligned(out) && aligned(sum),
                     eps,
                     weight_offset};
  queue.launch({"norm", kernel}, {x.shape[0]}, kNormThreads, p);
}

}  // namespace

void rms_norm(Queue& queue, const RmsNormArgs& args) {
  run(queue, "rms_norm", args.x, args.residual, args.weight, {}, args.out, args.sum, args.eps,
      args.weight_offset);
}

void layer_norm(Queue& queue, const LayerNormArgs& args) {
  run(queue, "layer_norm", args.x, args.residual, args.weight, args.bias, args.out, args.sum, args.eps, 0.0f);
}

}  // namespace mgm::cuda
