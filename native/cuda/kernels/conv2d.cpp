#include "../../runtime/error.h"
#include "../launch.h"

namespace mgm::cuda {

void conv2d(Queue&, const Conv2dArgs&) {
  throw Error("UNSUPPORTED", "[conv2d] has no CUDA kernel yet");
}

}  // namespace mgm::cuda
