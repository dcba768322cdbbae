#include "../../runtime/error.h"
#include "../launch.h"

namespace mgm::cuda {

void attention(Queue&, const AttentionArgs&) {
  throw Error("UNSUPPORTED", "[attention] has no CUDA kernel yet");
}

}  // namespace mgm::cuda
