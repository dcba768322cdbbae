#include "random_normal.h"

#include "../../runtime/tensor.h"
#include "../launch.h"

namespace mgm::cuda {

void random_normal(Queue& queue, const RandomNormalArgs& args) {
  const int64_t rows = args.out.shape[0], numbers = args.out.shape[1];
  const int64_t blocks = ceil_div(numbers, 4 * kNormalThreads);
  queue.launch({"random_normal", "random_normal"}, {rows * blocks}, kNormalThreads,
               NormalParams{args.seeds.i32(), args.out.f32(), numbers, static_cast<int32_t>(blocks),
                            numbers % 4 == 0});
}

}  // namespace mgm::cuda
