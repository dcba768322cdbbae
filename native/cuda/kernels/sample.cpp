#include "sample.h"

#include "../../runtime/tensor.h"
#include "../launch.h"

namespace mgm::cuda {

void sample(Queue& queue, const SampleArgs& args) {
  const int64_t rows = args.logits.shape[0], vocab = args.logits.shape[1];
  const auto words = static_cast<size_t>(rows * vocab);
  const bool changes = args.mask || args.history;
  const auto scratch = queue.scratch(words * 4 * (1 + changes + static_cast<bool>(args.history)));
  auto* weights = reinterpret_cast<float*>(scratch->data());
  queue.launch({"sample", "sample"}, {rows}, kSampleThreads,
               SampleParams{args.logits.f32(), args.options.f32(), args.state.i32(), args.history.i32(),
                            args.mask.u8(), args.ids.i32(), args.logprobs.f32(), args.top_ids.i32(), weights,
                            changes ? weights + words : nullptr,
                            args.history ? reinterpret_cast<int32_t*>(weights + 2 * words) : nullptr,
                            queue.fault(), args.logits.strides[0], static_cast<int32_t>(vocab),
                            args.history ? static_cast<int32_t>(args.history.shape[1]) : 0,
                            static_cast<int32_t>(args.logprobs.shape[1] - 1), 0});
}

}  // namespace mgm::cuda
