#include "scheduler_step.h"

#include <string>

#include "../../runtime/tensor.h"
#include "../launch.h"

namespace mgm::cuda {

void scheduler_step(Queue& queue, const SchedulerStepArgs& args) {
  const int64_t batch = args.x.shape[0], numbers = args.x.numel() / batch;
  const int64_t blocks = ceil_div(numbers, kSchedulerThreads);
  const bool halves = args.input.shape[0] != batch;
  const std::string kernel = std::string("scheduler_step_") + dtype_name(args.input.dtype);
  queue.launch({"scheduler_step", kernel.c_str()}, {batch * blocks}, kSchedulerThreads,
               SchedulerParams{args.x.f32(), args.model.data, args.coefficients.f32(), args.previous.f32(),
                               args.noise.f32(), args.out.f32(), args.predicted.f32(), args.input.data,
                               numbers, halves ? batch * numbers : 0, static_cast<int32_t>(blocks)});
}

}  // namespace mgm::cuda
