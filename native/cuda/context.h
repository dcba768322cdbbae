// A GPU's primary context and the kernels loaded into it, shared by all devices of the process on that GPU.
#pragma once
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>

#include "driver.h"
#include "images.h"
#include "launch.h"

namespace mgm::cuda {

class Context {
 public:
  // Retains the primary context of GPU `index`, or joins those who have. Throws Error("DEVICE_UNAVAILABLE").
  static std::shared_ptr<Context> open(int index);
  ~Context();
  Context(const Context&) = delete;

  const DeviceInfo& info() const { return info_; }
  CUcontext handle() const { return handle_; }
  CUmemoryPool pool() const { return pool_; }
  // Binds the context to the calling thread.
  void use() const { MGM_CU(cuCtxSetCurrent(handle_)); }

  // The loaded kernel, its module loaded at first use. Throws if its parameter is not of `param_bytes`.
  CUfunction function(const Kernel& kernel, size_t param_bytes, size_t dynamic_shared);

 private:
  explicit Context(DeviceInfo info);
  CUmodule module(const char* family);

  struct Function {
    CUfunction handle;
    size_t param_bytes, shared_allowed;
  };
  DeviceInfo info_;
  CUdevice device_ = 0;
  CUcontext handle_ = nullptr;
  CUmemoryPool pool_ = nullptr;
  std::mutex mutex_;
  std::map<std::string_view, CUmodule> modules_;    // by family
  std::map<std::string_view, Function> functions_;  // by kernel
};

// The images of `family` that a GPU of this capability can run, best first: the nearest cubin of its major
// version, then PTX.
std::vector<const Image*> images_for(std::string_view family, int capability);
std::string image_name(const Image& image);

}  // namespace mgm::cuda
