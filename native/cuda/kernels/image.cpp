#include "../../runtime/error.h"
#include "../launch.h"

namespace mgm::cuda {

void to_uint8(Queue&, const ToUint8Args&) {
  throw Error("UNSUPPORTED", "[toUint8] has no CUDA kernel yet");
}

void add_tile(Queue&, const AddTileArgs&) {
  throw Error("UNSUPPORTED", "[addTile] has no CUDA kernel yet");
}

}  // namespace mgm::cuda
