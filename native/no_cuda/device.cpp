// What a build without nvcc has in place of native/cuda: the same functions, which refuse.
#include "../cuda/device.h"

#include "../runtime/error.h"

namespace mgm::cuda {
namespace {

constexpr const char* kWhy =
    "this build has only the CPU backend (it was compiled without nvcc); use device: 'cpu' or 'auto'";

}  // namespace

std::shared_ptr<Device> open_device(int, size_t) {
  throw Error("DEVICE_UNAVAILABLE", kWhy);
}

void copy_between(const Tensor&, const Tensor&) {
  throw Error("DEVICE_UNAVAILABLE", kWhy);
}

Survey survey() {
  Survey found{};
  found.error = kWhy;
  return found;
}

}  // namespace mgm::cuda
