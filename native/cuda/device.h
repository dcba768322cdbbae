#pragma once
#include <string>
#include <vector>

#include "../runtime/device.h"

namespace mgm::cuda {

// GPU `index` as a device: its primary context, one stream, stream-ordered memory. memory_limit 0: none.
// Throws Error("DEVICE_UNAVAILABLE") saying what was found and what is required.
std::shared_ptr<Device> open_device(int index, size_t memory_limit);

// destination = source, both contiguous, of equal size, on two GPUs; ordered with the work of both.
void copy_between(const Tensor& source, const Tensor& destination);

struct Gpu {
  std::string name;
  int capability;     // 80 = 8.0
  size_t memory;      // bytes
  std::string image;  // "sm_80 cubin", "PTX 7.0" or "none: ..."
};

// For diagnosis; throws nothing. error: why there is no GPU to use ("" if there is one).
struct Survey {
  std::string error, library;
  int driver_version;  // 12040 = CUDA 12.4; 0: none
  bool emulated;
  std::vector<Gpu> gpus;
};
Survey survey();

}  // namespace mgm::cuda
