#include "../../runtime/error.h"
#include "../launch.h"

namespace mgm::cuda {

void patch_mining(Queue&, const PatchMiningArgs&) {
  throw Error("UNSUPPORTED", "[patch_mining] has no CUDA kernel yet");
}

}  // namespace mgm::cuda
