// A GPU's primary context and the kernels loaded into it, shared by all devices of the process on that GPU.
#pragma once
#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <string_view>

#include "driver.h"
#include "images.h"
#include "launch.h"

namespace mgm::cuda {

// After an illegal access or the like a context is lost: every call returns the error, for all devices on it.
// Once the last of them has left, open() makes a new one.
class Context {
 public:
  // Retains the primary context of GPU `index`, or joins those who have; leave() ends that. Throws
  // Error("DEVICE_UNAVAILABLE"), or Error("DEVICE_LOST") while devices are left on a lost context.
  static std::shared_ptr<Context> open(int index);
  void leave();
  ~Context();
  Context(const Context&) = delete;

  const DeviceInfo& info() const { return info_; }
  CUcontext handle() const { return handle_; }
  CUmemoryPool pool() const { return pool_; }
  // Binds the context to the calling thread.
  void use() { check(driver().cuCtxSetCurrent(handle_), "cuCtxSetCurrent"); }

  // Throws unless the call succeeded, and takes note if the context is lost by it.
  void check(CUresult result, const char* call,
             const std::source_location& place = std::source_location::current());
  void lose(CUresult result, const char* call);
  bool lost() const { return lost_; }
  std::string loss() const;  // of what, once it is lost

  // For handles that outlive the device they were made on (memory, graphs): runs `release` with the context
  // bound, unless it is lost and they are gone with it.
  template <class Release>
  void while_alive(Release release) {
    std::shared_lock lock(lifetime_);
    if (!lost_ && driver().cuCtxSetCurrent(handle_) == kSuccess) release();
  }

  // Lets copies from `peer` go straight from GPU to GPU where the hardware can; elsewhere the driver stages
  // them through the host.
  void reach(const std::shared_ptr<Context>& peer);

  // Enqueues a kernel whose only parameter is the `bytes` at `args`. Its module is loaded at first use.
  // Throws Error("INTERNAL") for a parameter of another size than the kernel declares, Error("UNSUPPORTED")
  // for more shared memory than the GPU has.
  void launch(const Kernel& kernel, Grid grid, int threads, size_t dynamic_shared, const void* args,
              size_t bytes, CUstream stream);

 private:
  explicit Context(DeviceInfo info);
  void retire();
  struct Function {
    CUfunction handle;
    size_t param_bytes, static_shared, dynamic_allowed;
  };
  CUmodule module(const char* family);
  Function& function(const Kernel& kernel);
  DeviceInfo info_;
  CUdevice device_ = 0;
  CUcontext handle_ = nullptr;
  CUmemoryPool pool_ = nullptr;
  int users_ = 0;  // devices that have not left; under the registry's lock

  std::shared_mutex lifetime_;
  bool retired_ = false;
  std::atomic<bool> lost_ = false;
  mutable std::mutex loss_mutex_;
  std::string loss_;

  std::mutex mutex_;
  std::map<std::string_view, CUmodule> modules_;                                 // by family
  std::map<std::pair<std::string_view, std::string_view>, Function> functions_;  // by family and kernel
  std::map<int, std::weak_ptr<Context>> reached_;                                // by GPU
};

// Why this library cannot use a GPU; "" if it can.
std::string unusable(const DeviceInfo& info);

// The images of `family` that a GPU of this capability can run, best first: the nearest cubin of its major
// version, then PTX.
std::vector<const Image*> images_for(std::string_view family, int capability);
std::string image_name(const Image& image);

}  // namespace mgm::cuda
