#include "../../runtime/error.h"
#include "../launch.h"

namespace mgm::cuda {

void scheduler_step(Queue&, const SchedulerStepArgs&) {
  throw Error("UNSUPPORTED", "[schedulerStep] has no CUDA kernel yet");
}

}  // namespace mgm::cuda
