// The kernels that scripts/build-kernels.mjs compiled and embedded, a module a family (native/cuda/kernels).
// Every cubin is assembled from the very PTX that is embedded beside it. Deflated, they take a quarter.
#pragma once
#include <cstddef>
#include <span>

namespace mgm::cuda {

struct Image {
  const char* family;
  int capability;   // 80, 90, ... of a cubin; 0: PTX
  int ptx_version;  // 70 = .version 7.0
  size_t bytes;     // inflated
  const unsigned char* begin;
  const unsigned char* end;
};

struct KernelEntry {
  const char* family;
  const char* name;
  size_t param_bytes;  // of its single parameter, as PTX declares it
};

std::span<const Image> images();
std::span<const KernelEntry> kernel_entries();

}  // namespace mgm::cuda
