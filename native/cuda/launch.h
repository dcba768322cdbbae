// What launchers (kernels/*.cpp) see of the device: where to launch, scratch memory, the fault record.
#pragma once
#include <memory>

#include "../ops.h"
#include "driver.h"
#include "kernels/fault.h"

namespace mgm {
class Storage;
}

namespace mgm::cuda {

// One kernel: the family is the name of its file, and of the module it lives in.
struct Kernel {
  const char* family;
  const char* name;
};

struct Grid {
  int64_t x, y = 1, z = 1;
};

class Queue {
 public:
  virtual ~Queue() = default;
  const DeviceInfo& info() const { return info_; }
  // Device memory for the op at hand: it may be given back as soon as the last launch that uses it is
  // enqueued.
  virtual std::shared_ptr<Storage> scratch(size_t bytes) = 0;
  // Where kernels report what only data can show.
  virtual Fault* fault() = 0;

  // `args` is the kernel's only parameter; its size is checked against what the compiled kernel declares.
  template <class Args>
  void launch(const Kernel& kernel, Grid grid, int threads, const Args& args, size_t dynamic_shared = 0) {
    launch_bytes(kernel, grid, threads, dynamic_shared, &args, sizeof(Args));
  }

 protected:
  explicit Queue(DeviceInfo info) : info_(std::move(info)) {}
  virtual void launch_bytes(const Kernel& kernel, Grid grid, int threads, size_t dynamic_shared,
                            const void* args, size_t bytes) = 0;

 private:
  DeviceInfo info_;
};

#define MGM_DECLARE(name, Args) void name(Queue& queue, const Args& args);
MGM_OPS(MGM_DECLARE)
#undef MGM_DECLARE

// Bytes of a packed matrix [n, k]. Throws Error("UNSUPPORTED") for storage types without a kernel.
size_t packed_bytes(DType dtype, Layout layout, int64_t n, int64_t k);

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

}  // namespace mgm::cuda
