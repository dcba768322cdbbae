#include "resize_bilinear.h"

#include <algorithm>

#include "../launch.h"

namespace mgm::cuda {

void resize_bilinear(Queue& queue, const ResizeBilinearArgs& args) {
  const View &x = args.x, &out = args.out;
  const auto side = [](int64_t size) { return static_cast<int32_t>(size); };
  queue.launch({"resize_bilinear", "resize_bilinear"},
               {std::min<int64_t>(ceil_div(out.numel(), kResizeThreads), 65535)}, kResizeThreads,
               ResizeParams{x.f32(), out.f32(), out.numel(), side(x.shape[1]), side(x.shape[2]),
                            side(out.shape[1]), side(out.shape[2]), x.shape[3]});
}

}  // namespace mgm::cuda
