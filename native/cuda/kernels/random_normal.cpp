#include "../../runtime/error.h"
#include "../launch.h"

namespace mgm::cuda {

void random_normal(Queue&, const RandomNormalArgs&) {
  throw Error("UNSUPPORTED", "[randomNormal] has no CUDA kernel yet");
}

}  // namespace mgm::cuda
