#include "context.h"

#include <algorithm>
#include <cstdlib>
#include <utility>

#include "../runtime/error.h"
#include "inflate.h"

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

std::string unusable(const DeviceInfo& info) {
  if (info.major < kRequiredMajor)
    return format("expected a GPU of compute capability %d.0 or newer but found %s with %d.%d",
                  kRequiredMajor, info.name.c_str(), info.major, info.minor);
  if (!info.memory_pools)
    return format("expected stream-ordered memory pools but %s (driver %d.%d) has none", info.name.c_str(),
                  driver().version / 1000, driver().version % 1000 / 10);
  return "";
}

std::shared_ptr<Context> Context::open(int index) {
  std::lock_guard lock(registry_mutex());
  std::weak_ptr<Context>& slot = registry()[index];
  std::shared_ptr<Context> context = slot.lock();
  if (context && context->lost()) {
    if (context->users_ > 0)
      throw Error(
          "DEVICE_LOST",
          format("the context of GPU %d died of %s; close all devices on it before it is opened again", index,
                 context->loss().c_str()));
    context->retire();
    context = nullptr;
  }
  if (!context) {
    const DeviceInfo info = device_info(index);
    if (const std::string why = unusable(info); !why.empty()) throw Error("DEVICE_UNAVAILABLE", why);
    context.reset(new Context(info));
    slot = context;
  }
  ++context->users_;
  return context;
}

void Context::leave() {
  std::lock_guard lock(registry_mutex());
  --users_;
}

Context::Context(DeviceInfo info) : info_(std::move(info)) {
  const Driver& api = driver();
  check(api.cuDeviceGet(&device_, info_.index), "cuDeviceGet");
  const CUresult retained = api.cuDevicePrimaryCtxRetain(&handle_, device_);
  if (retained == kOutOfMemory || is_sticky(retained)) check(retained, "cuDevicePrimaryCtxRetain");
  if (retained != kSuccess)
    throw Error("DEVICE_UNAVAILABLE",
                format("%s could not be opened: %s", info_.name.c_str(), describe(retained).c_str()));
  try {
    use();
    check(api.cuDeviceGetDefaultMemPool(&pool_, device_), "cuDeviceGetDefaultMemPool");
    // Freed memory stays in the pool until trim().
    uint64_t keep = ~uint64_t{0};
    check(api.cuMemPoolSetAttribute(pool_, kPoolReleaseThreshold, &keep), "cuMemPoolSetAttribute");
  } catch (...) {
    api.cuDevicePrimaryCtxRelease_v2(device_);
    throw;
  }
}

Context::~Context() {
  const Driver& api = driver();
  while_alive([&] {
    for (const auto& [family, module] : modules_) api.cuModuleUnload(module);
  });
  if (lost_)
    retire();
  else
    api.cuDevicePrimaryCtxRelease_v2(device_);
}

// Gives up a lost context, so that the next one is new.
void Context::retire() {
  std::unique_lock lock(lifetime_);
  if (std::exchange(retired_, true)) return;
  const Driver& api = driver();
  api.cuDevicePrimaryCtxRelease_v2(device_);
  unsigned flags = 0;
  int active = 0;
  // Where somebody else in the process retains it, only a reset ends it.
  if (api.cuDevicePrimaryCtxGetState(device_, &flags, &active) == kSuccess && active)
    api.cuDevicePrimaryCtxReset_v2(device_);
}

void Context::check(CUresult result, const char* call, const std::source_location& place) {
  if (is_sticky(result)) lose(result, call);
  cuda::check(result, call, place);
}

void Context::lose(CUresult result, const char* call) {
  std::lock_guard lock(loss_mutex_);
  if (lost_) return;
  loss_ = format("%s, seen by %s", describe(result).c_str(), call);
  lost_ = true;
}

std::string Context::loss() const {
  std::lock_guard lock(loss_mutex_);
  return loss_;
}

void Context::reach(const std::shared_ptr<Context>& peer) {
  std::lock_guard lock(mutex_);
  std::weak_ptr<Context>& reached = reached_[peer->info_.index];
  if (reached.lock() == peer) return;
  reached = peer;
  const Driver& api = driver();
  int can = 0;
  check(api.cuDeviceCanAccessPeer(&can, device_, peer->device_), "cuDeviceCanAccessPeer");
  if (!can) return;
  use();
  // Refusals (too many peers, say) leave it at staged copies.
  const CUresult enabled = api.cuCtxEnablePeerAccess(peer->handle_, 0);
  if (is_sticky(enabled)) check(enabled, "cuCtxEnablePeerAccess");
  // Memory of a pool has access rights of its own.
  const CUmemAccessDesc access{kLocationDevice, device_, kAccessReadWrite};
  const CUresult granted = api.cuMemPoolSetAccess(peer->pool_, &access, 1);
  if (is_sticky(granted)) check(granted, "cuMemPoolSetAccess");
}

CUmodule Context::module(const char* family) {
  if (const auto it = modules_.find(family); it != modules_.end()) return it->second;
  std::string refusals;
  for (const Image* image : images_for(family, info_.capability())) {
    std::vector<unsigned char> bytes(image->bytes + 1);  // PTX ends with a NUL
    inflate({image->begin, image->end}, std::span(bytes).first(image->bytes));
    char log[4096] = "";
    int options[] = {kJitErrorLog, kJitErrorLogBytes};
    void* values[] = {log, reinterpret_cast<void*>(sizeof log - 1)};
    CUmodule loaded;
    const CUresult result = driver().cuModuleLoadDataEx(&loaded, bytes.data(), 2, options, values);
    if (result == kSuccess) return modules_[family] = loaded;
    if (!is_image_error(result)) check(result, "cuModuleLoadDataEx");
    refusals +=
        format("; %s: %s%s%s", image_name(*image).c_str(), describe(result).c_str(), *log ? ": " : "", log);
  }
  throw Error("DEVICE_UNAVAILABLE",
              format("no embedded image of the %s kernels runs on %s (sm_%d, driver for CUDA %d.%d)%s",
                     family, info_.name.c_str(), info_.capability(), driver().version / 1000,
                     driver().version % 1000 / 10, refusals.c_str()));
}

Context::Function& Context::function(const Kernel& kernel) {
  if (const auto it = functions_.find({kernel.family, kernel.name}); it != functions_.end())
    return it->second;
  const KernelEntry* entry = nullptr;
  for (const KernelEntry& known : kernel_entries())
    if (std::string_view(known.name) == kernel.name && std::string_view(known.family) == kernel.family)
      entry = &known;
  if (!entry)
    throw Error("INTERNAL", format("the kernel %s of %s was not compiled", kernel.name, kernel.family));
  const Driver& api = driver();
  CUfunction handle;
  check(api.cuModuleGetFunction(&handle, module(entry->family), entry->name), "cuModuleGetFunction");
  int static_shared = 0;
  check(api.cuFuncGetAttribute(&static_shared, kFunctionSharedStatic, handle), "cuFuncGetAttribute");
  const size_t own = static_cast<size_t>(static_shared), without_asking = size_t{48} << 10;
  return functions_[{entry->family, entry->name}] = {handle, entry->param_bytes, own,
                                                     without_asking - std::min(without_asking, own)};
}

void Context::launch(const Kernel& kernel, Grid grid, int threads, size_t dynamic_shared, const void* args,
                     size_t bytes, CUstream stream) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;  // of an empty tensor
  if (grid.x < 0 || grid.y < 0 || grid.z < 0 || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535)
    throw Error("INVALID_ARGUMENT",
                format("expected a grid that fits a GPU for %s but received %lld x %lld x %lld", kernel.name,
                       static_cast<long long>(grid.x), static_cast<long long>(grid.y),
                       static_cast<long long>(grid.z)));
  CUfunction handle;
  {
    std::lock_guard lock(mutex_);
    Function& found = function(kernel);
    if (found.param_bytes != bytes)
      throw Error("INTERNAL", format("the kernel %s takes %zu bytes of parameters but its launcher has %zu",
                                     kernel.name, found.param_bytes, bytes));
    if (dynamic_shared > found.dynamic_allowed) {
      const size_t needed = found.static_shared + dynamic_shared;
      if (needed > info_.shared_optin)
        throw Error("UNSUPPORTED", format("the kernel %s needs %zu bytes of shared memory but %s has %zu",
                                          kernel.name, needed, info_.name.c_str(), info_.shared_optin));
      check(driver().cuFuncSetAttribute(found.handle, kFunctionMaxDynamicShared,
                                        static_cast<int>(dynamic_shared)),
            "cuFuncSetAttribute");
      found.dynamic_allowed = dynamic_shared;
    }
    handle = found.handle;
  }
  void* params[] = {const_cast<void*>(args)};
  check(driver().cuLaunchKernel(handle, static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y),
                                static_cast<unsigned>(grid.z), static_cast<unsigned>(threads), 1, 1,
                                static_cast<unsigned>(dynamic_shared), stream, params, nullptr),
        kernel.name);
}

}  // namespace mgm::cuda
