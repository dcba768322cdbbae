#include "../../runtime/error.h"
#include "../launch.h"

namespace mgm::cuda {

void depthwise_conv_norm(Queue&, const DepthwiseConvNormArgs&) {
  throw Error("UNSUPPORTED", "[depthwise_conv_norm] has no CUDA kernel yet");
}

}  // namespace mgm::cuda
