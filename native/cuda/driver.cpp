#include "driver.h"

#include <dlfcn.h>

#include <cstdlib>
#include <cstring>

#include "../runtime/error.h"

namespace mgm::cuda {
namespace {

[[noreturn]] void unavailable(const std::string& why) {
  throw Error("DEVICE_UNAVAILABLE", why);
}

std::string version_name(int version) {
  return format("%d.%d", version / 1000, version % 1000 / 10);
}

Driver open_driver() {
  Driver loaded;
  const char* asked = std::getenv("MGM_LIBCUDA");
  loaded.path = asked && *asked ? asked : "libcuda.so.1";
  void* library = dlopen(loaded.path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    const char* reason = dlerror();
    unavailable(
        format("the NVIDIA driver's library could not be opened (%s); it comes with the driver, and "
               "MGM_LIBCUDA may name it",
               reason ? reason : loaded.path.c_str()));
  }
  const auto version_of = reinterpret_cast<CUresult (*)(int*)>(dlsym(library, "cuDriverGetVersion"));
  if (!version_of || version_of(&loaded.version) != kSuccess)
    unavailable(format("%s is not a CUDA driver: it does not tell its version", loaded.path.c_str()));
  if (loaded.version < kRequiredDriver)
    unavailable(format(
        "expected a driver for CUDA %s or newer but found CUDA %s in %s; update the NVIDIA driver",
        version_name(kRequiredDriver).c_str(), version_name(loaded.version).c_str(), loaded.path.c_str()));
#define MGM_RESOLVE(name, params)                                            \
  loaded.name = reinterpret_cast<CUresult(*) params>(dlsym(library, #name)); \
  if (!loaded.name)                                                          \
    unavailable(                                                             \
        format("%s (CUDA %s) lacks " #name, loaded.path.c_str(), version_name(loaded.version).c_str()));
  MGM_CUDA_SYMBOLS(MGM_RESOLVE)
#undef MGM_RESOLVE
  loaded.cuMemPoolGetAttribute =
      reinterpret_cast<CUresult (*)(CUmemoryPool, int, void*)>(dlsym(library, "cuMemPoolGetAttribute"));
  loaded.emulated = dlsym(library, "mgmEmulatorVersion") != nullptr;
  if (const CUresult result = loaded.cuInit(0); result != kSuccess) {
    const char *name = nullptr, *text = nullptr;
    loaded.cuGetErrorName(result, &name);
    loaded.cuGetErrorString(result, &text);
    unavailable(format("the NVIDIA driver (CUDA %s) did not start: %s (%d): %s",
                       version_name(loaded.version).c_str(), name ? name : "?", result, text ? text : "?"));
  }
  return loaded;
}

}  // namespace

const Driver& driver() {
  // Never destroyed: threads and exit handlers may still call it. A failure is thrown again on the next call.
  static const Driver* loaded = new Driver(open_driver());
  return *loaded;
}

int device_count() {
  int count = 0;
  check(driver().cuDeviceGetCount(&count), "cuDeviceGetCount");
  return count;
}

DeviceInfo device_info(int index) {
  const int count = device_count();
  if (index < 0 || index >= count)
    unavailable(count == 0 ? std::string("the driver sees no GPU")
                           : format("expected a GPU from 0 to %d but received %d", count - 1, index));
  const Driver& api = driver();
  CUdevice device;
  check(api.cuDeviceGet(&device, index), "cuDeviceGet");
  DeviceInfo info{};
  info.index = index;
  char name[256] = {};
  check(api.cuDeviceGetName(name, sizeof name - 1, device), "cuDeviceGetName");
  info.name = name;
  const auto attribute = [&](int which) {
    int value = 0;
    check(api.cuDeviceGetAttribute(&value, which, device), "cuDeviceGetAttribute");
    return value;
  };
  info.major = attribute(kAttributeMajor);
  info.minor = attribute(kAttributeMinor);
  info.multiprocessors = attribute(kAttributeMultiprocessors);
  info.memory_pools = attribute(kAttributeMemoryPools) != 0;
  info.shared_optin = static_cast<size_t>(attribute(kAttributeSharedOptin));
  check(api.cuDeviceTotalMem_v2(&info.memory, device), "cuDeviceTotalMem");
  return info;
}

std::string describe(CUresult result) {
  const char *name = nullptr, *text = nullptr;
  driver().cuGetErrorName(result, &name);
  driver().cuGetErrorString(result, &text);
  return format("%s (%d): %s", name ? name : "unknown error", result, text ? text : "no description");
}

bool is_sticky(CUresult result) {
  switch (result) {
    case 214:  // ECC_UNCORRECTABLE
    case 220:  // NVLINK_UNCORRECTABLE
    case 700:  // ILLEGAL_ADDRESS
    case 702:  // LAUNCH_TIMEOUT
    case 709:  // CONTEXT_IS_DESTROYED
    case 710:  // ASSERT
    case 714:  // HARDWARE_STACK_ERROR
    case 715:  // ILLEGAL_INSTRUCTION
    case 716:  // MISALIGNED_ADDRESS
    case 717:  // INVALID_ADDRESS_SPACE
    case 718:  // INVALID_PC
    case 719:  // LAUNCH_FAILED
    case 999:  // UNKNOWN
      return true;
    default:
      return false;
  }
}

void fail(CUresult result, const char* call, const std::source_location& place) {
  const char* base = std::strrchr(place.file_name(), '/');
  const char* code = is_sticky(result)        ? "DEVICE_LOST"
                     : result == kOutOfMemory ? "OUT_OF_MEMORY"
                                              : "INTERNAL";
  throw Error(code, format("%s, from %s in %s:%u", describe(result).c_str(), call,
                           base ? base + 1 : place.file_name(), static_cast<unsigned>(place.line())));
}

}  // namespace mgm::cuda
