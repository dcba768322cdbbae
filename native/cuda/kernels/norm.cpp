#include "norm.h"

#include <string>

#include "../../runtime/tensor.h"
#include "../launch.h"

namespace mgm::cuda {
namespace {

bool aligned(const View& rows) {
  return !rows || (reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 &&
                   rows.strides[0] * static_cast<int64_t>(dtype_size(rows.dtype)) % 16 == 0);
}

void run(Queue& queue, const char* name, const View& x, const View& residual, const View& weight,
         const View& bias, const View& out, const View& sum, float eps, float weight_offset) {
  const int64_t rows = x.shape[0], width = x.shape[1];
  const char* size = width <= kNormNarrow   ? "_narrow"
                     : width <= kNormMiddle ? "_middle"
                     : width <= kNormWide   ? "_wide"
                                            : "_long";
  const int64_t group = width <= kNormNarrow ? 32 : width <= kNormWide ? kNormGroup : kNormThreads;
  // A block for each multiprocessor reads the weights seldom; no more blocks than their rounds need.
  const int64_t at_once = kNormThreads / group, steps = ceil_div(rows, at_once);
  const int64_t blocks = ceil_div(steps, ceil_div(steps, queue.info().multiprocessors));
  const int64_t floats = width <= kNormWide ? ceil_div(width, 8) * 8 * (bias ? 2 : 1) : 0;
  const std::string kernel = std::string(name) + dtype_name(x.dtype) + size;
  queue.launch(
      {"norm", kernel.c_str()}, {blocks}, kNormThreads,
      NormParams{x.data, residual.data, weight.f32(), bias.f32(), out.data, sum.data, rows, x.strides[0],
                 residual.strides[0], out.strides[0], sum.strides[0], static_cast<int32_t>(width),
                 aligned(x) && aligned(residual) && aligned(out) && aligned(sum), eps, weight_offset},
      static_cast<size_t>(floats) * 4);
}

}  // namespace

void rms_norm(Queue& queue, const RmsNormArgs& args) {
  run(queue, "rms_norm_", args.x, args.residual, args.weight, {}, args.out, args.sum, args.eps,
      args.weight_offset);
}

void layer_norm(Queue& queue, const LayerNormArgs& args) {
  run(queue, "layer_norm_", args.x, args.residual, args.weight, args.bias, args.out, args.sum, args.eps,
      0.0f);
}

}  // namespace mgm::cuda
