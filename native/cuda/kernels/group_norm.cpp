#include "../../runtime/error.h"
#include "../launch.h"

namespace mgm::cuda {

void group_norm(Queue&, const GroupNormArgs&) {
  throw Error("UNSUPPORTED", "[groupNorm] has no CUDA kernel yet");
}

}  // namespace mgm::cuda
