#include "../../runtime/error.h"
#include "../launch.h"

namespace mgm::cuda {

void paged_attention(Queue&, const PagedAttentionArgs&) {
  throw Error("UNSUPPORTED", "[paged_attention] has no CUDA kernel yet");
}

}  // namespace mgm::cuda
