#include "../../runtime/error.h"
#include "../launch.h"

namespace mgm::cuda {

void moe_route(Queue&, const MoeRouteArgs&) {
  throw Error("UNSUPPORTED", "[moe_route] has no CUDA kernel yet");
}

}  // namespace mgm::cuda
