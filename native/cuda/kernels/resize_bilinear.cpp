#include "resize_bilinear.h"

#include <string>

#include "../../runtime/tensor.h"
#include "../launch.h"

namespace mgm::cuda {

void resize_bilinear(Queue& queue, const ResizeBilinearArgs& args) {
  const View &x = args.x, &out = args.out;
  const auto side = [](int64_t size) { return static_cast<int32_t>(size); };
  int64_t width = 16 / static_cast<int64_t>(dtype_size(x.dtype));
  std::string kernel = std::string("resize_bilinear_") + dtype_name(x.dtype);
  if (x.shape[3] % width != 0 || reinterpret_cast<uintptr_t>(x.data) % 16 != 0) {
    kernel += "_1";
    width = 1;
  }
  const int64_t count = out.numel() / width;
  queue.launch({"resize_bilinear", kernel.c_str()}, {ceil_div(count, kResizeThreads)}, kResizeThreads,
               ResizeParams{x.data, out.data, count, x.shape[3] / width, side(x.shape[1]), side(x.shape[2]),
                            side(out.shape[1]), side(out.shape[2])});
}

}  // namespace mgm::cuda
