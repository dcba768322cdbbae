#include "../../runtime/error.h"
#include "../launch.h"

namespace mgm::cuda {

void grouped_linear(Queue&, const GroupedLinearArgs&) {
  throw Error("UNSUPPORTED", "[grouped_linear] has no CUDA kernel yet");
}

}  // namespace mgm::cuda
