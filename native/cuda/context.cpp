#include "context.h"

#include <cstdlib>

#include "../runtime/error.h"

namespace mgm::cuda {
namespace {

std::mutex& registry_mutex() {
  static auto* mutex = new std::mutex;  // exit handlers may outlive static objects
  return *mutex;
}
std::map<int, std::weak_ptr<Context>>& registry() {
  static auto* contexts = new std::map<int, std::weak_ptr<Context>>;
  return *contexts;
}

// Failures that say "not this image", after which another may do.
bool is_image_error(CUresult result) {
  return result == kInvalidImage || result == kNoBinaryForGpu || result == kInvalidPtx ||
         result == kUnsupportedPtxVersion;
}

}  // namespace

std::string image_name(const Image& image) {
  return image.capability ? format("sm_%d cubin", image.capability)
                          : format("PTX %d.%d", image.ptx_version / 10, image.ptx_version % 10);
}

std::vector<const Image*> images_for(std::string_view family, int capability) {
  const char* asked = std::getenv("MGM_CUDA_IMAGE");
  // The emulator executes PTX and nothing else.
  const bool ptx_only = driver().emulated || (asked && std::string_view(asked) == "ptx");
  const Image *cubin = nullptr, *ptx = nullptr;
  for (const Image& image : images()) {
    if (family != image.family) continue;
    if (image.capability == 0)
      ptx = &image;
    else if (!ptx_only && image.capability / 10 == capability / 10 && image.capability <= capability &&
             (!cubin || image.capability > cubin->capability))
      cubin = &image;
  }
  std::vector<const Image*> usable;
  if (cubin) usable.push_back(cubin);
  if (ptx) usable.push_back(ptx);
  return usable;
}

std::shared_ptr<Context> Context::open(int index) {
  std::lock_guard lock(registry_mutex());
  std::weak_ptr<Context>& slot = registry()[index];
  if (auto shared = slot.lock()) return shared;
  const DeviceInfo info = device_info(index);
  if (info.major < kRequiredMajor)
    throw Error("DEVICE_UNAVAILABLE",
                format("expected a GPU of compute capability %d.0 or newer but found %s with %d.%d",
                       kRequiredMajor, info.name.c_str(), info.major, info.minor));
  CUdevice device;
  MGM_CU(cuDeviceGet(&device, index));
  int pools = 0;
  MGM_CU(cuDeviceGetAttribute(&pools, kAttributeMemoryPools, device));
  if (!pools)
    throw Error("DEVICE_UNAVAILABLE",
                format("expected stream-ordered memory pools but %s (driver %d.%d) has none",
                       info.name.c_str(), driver().version / 1000, driver().version % 1000 / 10));
  std::shared_ptr<Context> context(new Context(info));
  slot = context;
  return context;
}

Context::Context(DeviceInfo info) : info_(std::move(info)) {
  MGM_CU(cuDeviceGet(&device_, info_.index));
  MGM_CU(cuDevicePrimaryCtxRetain(&handle_, device_));
  try {
    use();
    MGM_CU(cuDeviceGetDefaultMemPool(&pool_, device_));
    // Freed memory stays in the pool until trim().
    uint64_t keep = ~uint64_t{0};
    MGM_CU(cuMemPoolSetAttribute(pool_, kPoolReleaseThreshold, &keep));
  } catch (...) {
    driver().cuDevicePrimaryCtxRelease_v2(device_);
    throw;
  }
}

Context::~Context() {
  // Results do not matter: a lost context refuses, and goes with its last reference all the same.
  const Driver& api = driver();
  api.cuCtxSetCurrent(handle_);
  for (const auto& [family, module] : modules_) api.cuModuleUnload(module);
  api.cuDevicePrimaryCtxRelease_v2(device_);
}

CUmodule Context::module(const char* family) {
  if (const auto it = modules_.find(family); it != modules_.end()) return it->second;
  std::string refusals;
  for (const Image* image : images_for(family, info_.capability())) {
    char log[4096] = "";
    int options[] = {kJitErrorLog, kJitErrorLogBytes};
    void* values[] = {log, reinterpret_cast<void*>(sizeof log - 1)};
    CUmodule loaded;
    const CUresult result = driver().cuModuleLoadDataEx(&loaded, image->begin, 2, options, values);
    if (result == kSuccess) return modules_[family] = loaded;
    if (!is_image_error(result)) fail(result, "cuModuleLoadDataEx", __FILE__, __LINE__);
    refusals +=
        format("; %s: %s%s%s", image_name(*image).c_str(), describe(result).c_str(), *log ? ": " : "", log);
  }
  throw Error("DEVICE_UNAVAILABLE",
              format("no embedded image of the %s kernels runs on %s (sm_%d, driver for CUDA %d.%d)%s",
                     family, info_.name.c_str(), info_.capability(), driver().version / 1000,
                     driver().version % 1000 / 10, refusals.c_str()));
}

CUfunction Context::function(const Kernel& kernel, size_t param_bytes, size_t dynamic_shared) {
  std::lock_guard lock(mutex_);
  auto it = functions_.find(kernel.name);
  if (it == functions_.end()) {
    const KernelEntry* entry = nullptr;
    for (const KernelEntry& known : kernel_entries())
      if (std::string_view(known.name) == kernel.name && std::string_view(known.family) == kernel.family)
        entry = &known;
    if (!entry)
      throw Error("INTERNAL", format("the kernel %s of %s was not compiled", kernel.name, kernel.family));
    CUfunction handle;
    MGM_CU(cuModuleGetFunction(&handle, module(entry->family), kernel.name));
    it = functions_.emplace(entry->name, Function{handle, entry->param_bytes, size_t{48} << 10}).first;
  }
  Function& found = it->second;
  if (found.param_bytes != param_bytes)
    throw Error("INTERNAL", format("the kernel %s takes %zu bytes of parameters but its launcher has %zu",
                                   kernel.name, found.param_bytes, param_bytes));
  if (dynamic_shared > found.shared_allowed) {
    if (dynamic_shared > info_.shared_optin)
      throw Error("UNSUPPORTED", format("the kernel %s needs %zu bytes of shared memory but %s has %zu",
                                        kernel.name, dynamic_shared, info_.name.c_str(), info_.shared_optin));
    MGM_CU(cuFuncSetAttribute(found.handle, kFunctionMaxDynamicShared, static_cast<int>(dynamic_shared)));
    found.shared_allowed = dynamic_shared;
  }
  return found.handle;
}

}  // namespace mgm::cuda
