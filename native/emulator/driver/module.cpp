// Modules, libraries, functions: images are PTX text, or fat binaries that carry some. Machine code is
// refused as a driver refuses that of another architecture, so hosts fall back to PTX.
#include <algorithm>
#include <cstring>

#include "driver.h"

namespace mgm::emulator::cuda {
namespace {

template <class T>
T read(const std::byte* at) {
  T value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

constexpr uint32_t kElfMagic = 0x464c457f, kFatbinMagic = 0xba55ed50, kWrapperMagic = 0x466243b1;

// Block format of LZ4, as nvcc compresses with by default before CUDA 13. False where it does not add up.
bool unpack_lz4(const std::byte* in, size_t in_size, std::string* out, size_t out_size) {
  size_t at = 0;
  auto length = [&](size_t value) -> size_t {
    if (value < 15) return value;
    uint8_t byte = 255;
    while (byte == 255 && at < in_size) value += byte = std::to_integer<uint8_t>(in[at++]);
    return value;
  };
  while (at < in_size) {
    uint8_t token = std::to_integer<uint8_t>(in[at++]);
    size_t literals = length(token >> 4);
    if (literals > in_size - at || literals > out_size - out->size()) return false;
    out->append(reinterpret_cast<const char*>(in + at), literals);
    at += literals;
    if (at >= in_size) break;
    if (in_size - at < 2) return false;
    size_t distance = read<uint16_t>(in + at);
    at += 2;
    size_t copy = length(token & 15) + 4;
    if (distance == 0 || distance > out->size() || copy > out_size - out->size()) return false;
    for (size_t i = 0; i < copy; ++i) out->push_back((*out)[out->size() - distance]);
  }
  return out->size() == out_size;
}

// The PTX for the device inside of a fat binary; its highest target that is not above the device.
CUresult ptx_of_fatbin(const std::byte* image, const DeviceSpec& spec, std::string* ptx, std::string* log) {
  size_t header = read<uint16_t>(image + 6);
  uint64_t size = read<uint64_t>(image + 8);
  if (header < 16 || size > (uint64_t{1} << 32)) {
    *log = "the fat binary's header is damaged";
    return CUDA_ERROR_INVALID_IMAGE;
  }
  const std::byte *at = image + header, *end = at + size;
  uint32_t best = 0;
  int machine = 0;
  while (static_cast<size_t>(end - at) >= 64) {
    uint16_t kind = read<uint16_t>(at);
    uint32_t entry_header = read<uint32_t>(at + 4);
    uint64_t payload = read<uint64_t>(at + 8);
    uint32_t packed = read<uint32_t>(at + 16);
    uint32_t target = read<uint32_t>(at + 28);
    uint64_t flags = read<uint64_t>(at + 40), unpacked = read<uint64_t>(at + 56);
    if (entry_header < 64 || entry_header > static_cast<size_t>(end - at) ||
        payload > static_cast<size_t>(end - at) - entry_header || packed > payload) {
      *log = "an entry of the fat binary is damaged";
      return CUDA_ERROR_INVALID_IMAGE;
    }
    const std::byte* data = at + entry_header;
    at = data + payload;
    machine += kind == 2;
    if (kind != 1 || target < best || target > static_cast<uint32_t>(spec.major * 10 + spec.minor)) continue;
    std::string text;
    if (flags & 0x2000) {
      if (unpacked > (uint64_t{1} << 31) || !unpack_lz4(data, packed, &text, unpacked)) {
        *log = "an entry of the fat binary is damaged (LZ4)";
        return CUDA_ERROR_INVALID_IMAGE;
      }
    } else if (flags & 0x8000) {
      *log =
          "the PTX in the fat binary is compressed with zstd, which the emulator does not read (nvcc "
          "--no-compress)";
      continue;
    } else {
      text.assign(reinterpret_cast<const char*>(data), payload);
    }
    *ptx = std::move(text);
    best = target;
  }
  if (best) return CUDA_SUCCESS;
  if (log->empty())
    *log = "the fat binary has no PTX for sm_" + std::to_string(spec.major * 10 + spec.minor) +
           " or below (" + std::to_string(machine) + " cubins, which the emulator does not execute)";
  return CUDA_ERROR_NO_BINARY_FOR_GPU;
}

}  // namespace

CUresult load_module(Driver& d, Lock& lock, Context& context, const void* image, std::string* log,
                     std::shared_ptr<LoadedModule>* out) {
  if (!image) return CUDA_ERROR_INVALID_VALUE;
  auto* bytes = static_cast<const std::byte*>(image);
  uint32_t magic = 0;
  // Text may be shorter than four bytes.
  for (size_t i = 0; i < 4; ++i) {
    magic |= std::to_integer<uint32_t>(bytes[i]) << (8 * i);
    if (bytes[i] == std::byte{0}) break;
  }
  const DeviceSpec& spec = context.device->spec;
  std::string ptx;
  if (magic == kElfMagic) {
    *log = "the image is machine code (a cubin), which the emulator does not execute; load the PTX instead";
    return CUDA_ERROR_NO_BINARY_FOR_GPU;
  }
  if (magic == kWrapperMagic) {
    bytes = read<const std::byte*>(bytes + 8);
    if (!bytes) return CUDA_ERROR_INVALID_IMAGE;
    magic = read<uint32_t>(bytes);
  }
  if (magic == kFatbinMagic) {
    if (CUresult error = ptx_of_fatbin(bytes, spec, &ptx, log)) return error;
    ptx.resize(std::strlen(ptx.c_str()));
  } else {
    ptx = reinterpret_cast<const char*>(bytes);
  }
  int error = 0;
  Memory& memory = *context.device->memory;
  lock.unlock();  // parsing takes a while
  std::shared_ptr<Module> module;
  try {
    module = Module::load(ptx, spec, memory, log, &error);
  } catch (...) {
    lock.lock();
    throw;
  }
  lock.lock();
  if (!module) return error ? error : CUDA_ERROR_INVALID_PTX;
  auto loaded = std::make_shared<LoadedModule>();
  loaded->module = std::move(module);
  loaded->functions = loaded->module->functions();
  loaded->context = &context;
  loaded->handle = d.handle();
  d.modules.live[loaded->handle] = loaded;
  *out = loaded;
  return CUDA_SUCCESS;
}

namespace {

CUresult function_of(Driver& d, const std::shared_ptr<LoadedModule>& module, const std::string& name,
                     uint64_t* handle) {
  auto known = module->function_handles.find(name);
  if (known != module->function_handles.end()) {
    *handle = known->second;
    return CUDA_SUCCESS;
  }
  int index = module->module->find_function(name);
  if (index < 0 || index >= static_cast<int>(module->functions.size())) return CUDA_ERROR_NOT_FOUND;
  auto function = std::make_shared<Function>();
  function->module = module;
  function->index = index;
  *handle = d.handle();
  d.functions.live[*handle] = function;
  module->function_handles[name] = *handle;
  return CUDA_SUCCESS;
}

CUresult library_module(Driver& d, Lock& lock, Context& context, Library& library,
                        std::shared_ptr<LoadedModule>* out, std::string* log) {
  auto& module = library.modules[&context];
  if (!module) {
    std::shared_ptr<LoadedModule> loaded;
    if (CUresult error = load_module(d, lock, context, library.image.c_str(), log, &loaded)) return error;
    library.modules[&context] = loaded;
    *out = loaded;
  } else {
    *out = module;
  }
  return CUDA_SUCCESS;
}

void put_log(const std::string& text, void* buffer, size_t* size) {
  if (!buffer || !*size) {
    *size = 0;
    return;
  }
  size_t n = std::min(text.size(), *size - 1);
  std::memcpy(buffer, text.data(), n);
  static_cast<char*>(buffer)[n] = 0;
  *size = n ? n + 1 : 0;
}

CUresult load(const char* name, CUmodule* out, const void* image, unsigned count, const int* options,
              void** values) {
  return call(name, kContext | kCaptureUnsafe, [&](Driver& d, Lock& lock, Context& context) -> CUresult {
    if (!out || !image || (count && (!options || !values))) return CUDA_ERROR_INVALID_VALUE;
    // Sizes come and go in the value itself, not behind it.
    void *info = nullptr, *errors = nullptr;
    void **info_size = nullptr, **error_size = nullptr;
    for (unsigned i = 0; i < count; ++i) {
      if (options[i] < 0 || options[i] > 34) return CUDA_ERROR_INVALID_VALUE;
      if (options[i] == 3) info = values[i];
      if (options[i] == 4) info_size = &values[i];
      if (options[i] == 5) errors = values[i];
      if (options[i] == 6) error_size = &values[i];
    }
    std::string log;
    std::shared_ptr<LoadedModule> module;
    CUresult error = load_module(d, lock, context, image, &log, &module);
    auto give = [](const std::string& text, void* buffer, void** place) {
      if (!place) return;
      size_t size = static_cast<unsigned>(reinterpret_cast<uint64_t>(*place));
      put_log(text, buffer, &size);
      *place = reinterpret_cast<void*>(size);
    };
    give(error ? "" : log, info, info_size);
    give(error ? log : "", errors, error_size);
    if (error && !error_size) std::fprintf(stderr, "mgm-emulator: %s: %s\n", name, log.c_str());
    if (!error) *out = reinterpret_cast<CUmodule>(module->handle);
    return error;
  });
}

}  // namespace

CUresult find_function(Driver& d, Lock& lock, Context& context, CUfunction handle,
                       std::shared_ptr<Function>* out) {
  *out = d.functions.find(handle);
  if (!*out) {
    // A CUkernel may stand where a CUfunction does.
    if (auto kernel = d.kernels.find(handle)) {
      std::shared_ptr<LoadedModule> module;
      std::string log;
      uint64_t function = 0;
      if (CUresult error = library_module(d, lock, context, *kernel->library, &module, &log)) return error;
      if (CUresult error = function_of(d, module, kernel->name, &function)) return error;
      *out = d.functions.find(reinterpret_cast<void*>(function));
    }
  }
  return *out ? CUDA_SUCCESS
              : misuse("function", CUDA_ERROR_INVALID_HANDLE,
                       "a call received a function that does not exist (any more)");
}

}  // namespace mgm::emulator::cuda

using namespace mgm::emulator;
using namespace mgm::emulator::cuda;

MGM_CU cuModuleLoadData(CUmodule* out, const void* image) {
  return load("cuModuleLoadData", out, image, 0, nullptr, nullptr);
}
MGM_CU cuModuleLoadDataEx(CUmodule* out, const void* image, unsigned count, int* options, void** values) {
  return load("cuModuleLoadDataEx", out, image, count, options, values);
}
MGM_CU cuModuleLoadFatBinary(CUmodule* out, const void* image) {
  return load("cuModuleLoadFatBinary", out, image, 0, nullptr, nullptr);
}
MGM_CU cuModuleLoad(CUmodule* out, const char* path) {
  if (!path) return CUDA_ERROR_INVALID_VALUE;
  FILE* file = std::fopen(path, "rb");
  if (!file) return CUDA_ERROR_FILE_NOT_FOUND;
  std::string data;
  char chunk[65536];
  for (size_t n; (n = std::fread(chunk, 1, sizeof chunk, file)) > 0;) data.append(chunk, n);
  std::fclose(file);
  return load("cuModuleLoad", out, data.c_str(), 0, nullptr, nullptr);
}

MGM_CU cuModuleUnload(CUmodule handle) {
  return call("cuModuleUnload", kContext | kCaptureUnsafe,
              [&](Driver& d, Lock& lock, Context& context) -> CUresult {
                auto module = d.modules.find(handle);
                if (!module || module->context != &context) return CUDA_ERROR_INVALID_HANDLE;
                d.wait_context(lock, context);
                for (auto& [name, function] : module->function_handles) d.functions.live.erase(function);
                d.modules.live.erase(module->handle);
                return CUDA_SUCCESS;
              });
}

MGM_CU cuModuleGetFunction(CUfunction* out, CUmodule handle, const char* name) {
  return call("cuModuleGetFunction", kContext, [&](Driver& d, Lock&, Context&) -> CUresult {
    if (!out || !name) return CUDA_ERROR_INVALID_VALUE;
    auto module = d.modules.find(handle);
    if (!module) return CUDA_ERROR_INVALID_HANDLE;
    uint64_t function = 0;
    if (CUresult error = function_of(d, module, name, &function)) return error;
    *out = reinterpret_cast<CUfunction>(function);
    return CUDA_SUCCESS;
  });
}

MGM_CU cuModuleGetFunctionCount(unsigned* count, CUmodule handle) {
  return call("cuModuleGetFunctionCount", kContext, [&](Driver& d, Lock&, Context&) -> CUresult {
    auto module = d.modules.find(handle);
    if (!count || !module) return CUDA_ERROR_INVALID_VALUE;
    *count = static_cast<unsigned>(module->functions.size());
    return CUDA_SUCCESS;
  });
}

MGM_CU cuModuleGetGlobal_v2(CUdeviceptr* address, size_t* bytes, CUmodule handle, const char* name) {
  return call("cuModuleGetGlobal_v2", kContext, [&](Driver& d, Lock&, Context&) -> CUresult {
    auto module = d.modules.find(handle);
    if (!module) return CUDA_ERROR_INVALID_HANDLE;
    if (!name) return CUDA_ERROR_INVALID_VALUE;
    uint64_t at = 0;
    size_t size = 0;
    if (!module->module->find_global(name, &at, &size)) return CUDA_ERROR_NOT_FOUND;
    if (address) *address = at;
    if (bytes) *bytes = size;
    return CUDA_SUCCESS;
  });
}

MGM_CU cuLibraryLoadData(CUlibrary* out, const void* image, int* jit_options, void** jit_values,
                         unsigned jit_count, int* options, void** values, unsigned count) {
  (void)jit_options;
  (void)jit_values;
  (void)options;
  (void)values;
  return call("cuLibraryLoadData", kContext | kCaptureUnsafe,
              [&](Driver& d, Lock& lock, Context& context) -> CUresult {
                if (!out || !image) return CUDA_ERROR_INVALID_VALUE;
                if (jit_count || count)
                  return misuse("cuLibraryLoadData", CUDA_ERROR_NOT_SUPPORTED,
                                "options; use cuModuleLoadDataEx for those");
                auto* bytes = static_cast<const unsigned char*>(image);
                if (bytes[0] == 0x7f || bytes[0] == 0x50 || bytes[0] == 0xb1)
                  return misuse("cuLibraryLoadData", CUDA_ERROR_NO_BINARY_FOR_GPU, "only PTX text");
                auto library = std::make_shared<Library>();
                library->image = static_cast<const char*>(image);
                std::shared_ptr<LoadedModule> module;
                std::string log;
                if (CUresult error = library_module(d, lock, context, *library, &module, &log)) {
                  std::fprintf(stderr, "mgm-emulator: cuLibraryLoadData: %s\n", log.c_str());
                  return error;
                }
                library->handle = d.handle();
                d.libraries.live[library->handle] = library;
                *out = reinterpret_cast<CUlibrary>(library->handle);
                return CUDA_SUCCESS;
              });
}

MGM_CU cuLibraryUnload(CUlibrary handle) {
  return call("cuLibraryUnload", kContext | kCaptureUnsafe, [&](Driver& d, Lock& lock, Context&) -> CUresult {
    auto library = d.libraries.find(handle);
    if (!library) return CUDA_ERROR_INVALID_HANDLE;
    for (auto& [context, module] : library->modules) {
      d.wait_context(lock, *context);
      for (auto& [name, function] : module->function_handles) d.functions.live.erase(function);
      d.modules.live.erase(module->handle);
    }
    for (auto& [name, kernel] : library->kernels) d.kernels.live.erase(kernel);
    d.libraries.live.erase(library->handle);
    return CUDA_SUCCESS;
  });
}

MGM_CU cuLibraryGetModule(CUmodule* out, CUlibrary handle) {
  return call("cuLibraryGetModule", kContext, [&](Driver& d, Lock& lock, Context& context) -> CUresult {
    auto library = d.libraries.find(handle);
    if (!out || !library) return CUDA_ERROR_INVALID_HANDLE;
    std::shared_ptr<LoadedModule> module;
    std::string log;
    if (CUresult error = library_module(d, lock, context, *library, &module, &log)) return error;
    *out = reinterpret_cast<CUmodule>(module->handle);
    return CUDA_SUCCESS;
  });
}

MGM_CU cuLibraryGetKernel(CUkernel* out, CUlibrary handle, const char* name) {
  return call("cuLibraryGetKernel", kContext, [&](Driver& d, Lock& lock, Context& context) -> CUresult {
    auto library = d.libraries.find(handle);
    if (!library) return CUDA_ERROR_INVALID_HANDLE;
    if (!out || !name) return CUDA_ERROR_INVALID_VALUE;
    uint64_t& known = library->kernels[name];
    if (!known) {
      std::shared_ptr<LoadedModule> module;
      std::string log;
      CUresult error = library_module(d, lock, context, *library, &module, &log);
      if (!error && module->module->find_function(name) < 0) error = CUDA_ERROR_NOT_FOUND;
      if (error) {
        library->kernels.erase(name);
        return error;
      }
      auto kernel = std::make_shared<Kernel>();
      kernel->handle = known = d.handle();
      kernel->library = library;
      kernel->name = name;
      d.kernels.live[kernel->handle] = kernel;
    }
    *out = reinterpret_cast<CUkernel>(known);
    return CUDA_SUCCESS;
  });
}

MGM_CU cuKernelGetFunction(CUfunction* out, CUkernel handle) {
  return call("cuKernelGetFunction", kContext, [&](Driver& d, Lock& lock, Context& context) -> CUresult {
    auto kernel = d.kernels.find(handle);
    if (!out || !kernel) return CUDA_ERROR_INVALID_HANDLE;
    std::shared_ptr<LoadedModule> module;
    std::string log;
    uint64_t function = 0;
    if (CUresult error = library_module(d, lock, context, *kernel->library, &module, &log)) return error;
    if (CUresult error = function_of(d, module, kernel->name, &function)) return error;
    *out = reinterpret_cast<CUfunction>(function);
    return CUDA_SUCCESS;
  });
}

MGM_CU cuFuncGetModule(CUmodule* out, CUfunction handle) {
  return call("cuFuncGetModule", kContext, [&](Driver& d, Lock&, Context&) -> CUresult {
    auto function = d.functions.find(handle);
    if (!out || !function) return CUDA_ERROR_INVALID_HANDLE;
    *out = reinterpret_cast<CUmodule>(function->module->handle);
    return CUDA_SUCCESS;
  });
}

MGM_CU cuFuncGetName(const char** name, CUfunction handle) {
  return call("cuFuncGetName", kContext, [&](Driver& d, Lock&, Context&) -> CUresult {
    auto function = d.functions.find(handle);
    if (!name || !function) return CUDA_ERROR_INVALID_VALUE;
    *name = function->info().name.c_str();
    return CUDA_SUCCESS;
  });
}

MGM_CU cuFuncGetParamInfo(CUfunction handle, size_t index, size_t* offset, size_t* size) {
  return call("cuFuncGetParamInfo", kContext, [&](Driver& d, Lock& lock, Context& context) -> CUresult {
    std::shared_ptr<Function> function;
    if (CUresult error = find_function(d, lock, context, handle, &function)) return error;
    auto& params = function->info().params;
    if (!offset || index >= params.size()) return CUDA_ERROR_INVALID_VALUE;
    *offset = params[index].offset;
    if (size) *size = params[index].size;
    return CUDA_SUCCESS;
  });
}
MGM_CU cuKernelGetParamInfo(CUkernel kernel, size_t index, size_t* offset, size_t* size) {
  return cuFuncGetParamInfo(reinterpret_cast<CUfunction>(kernel), index, offset, size);
}

MGM_CU cuFuncGetAttribute(int* value, int attribute, CUfunction handle) {
  return call("cuFuncGetAttribute", kContext, [&](Driver& d, Lock& lock, Context& context) -> CUresult {
    std::shared_ptr<Function> function;
    if (!value) return CUDA_ERROR_INVALID_VALUE;
    if (CUresult error = find_function(d, lock, context, handle, &function)) return error;
    const FunctionInfo& info = function->info();
    const DeviceSpec& spec = context.device->spec;
    switch (attribute) {
      case 0:
        *value = std::min(info.max_threads, spec.max_threads_per_block);
        break;
      case 1:
        *value = static_cast<int>(info.static_shared);
        break;
      case 2:
        *value = static_cast<int>(info.const_bytes);
        break;
      case 3:
        *value = static_cast<int>(info.local_bytes);
        break;
      case 4:
        *value = info.registers;
        break;
      case 5:
        *value = info.target;
        break;
      case 6:
        *value = spec.major * 10 + spec.minor;
        break;
      case 7:
        *value = 0;
        break;
      case 8:
        *value = function->max_dynamic_shared ? function->max_dynamic_shared
                                              : static_cast<int>(spec.shared_per_block - info.static_shared);
        break;
      case 9:
        *value = function->carveout;
        break;
      case 10:
      case 11:
      case 12:
      case 13:
      case 14:
      case 15:
        *value = 0;
        break;
      default:
        return CUDA_ERROR_INVALID_VALUE;
    }
    return CUDA_SUCCESS;
  });
}

MGM_CU cuFuncSetAttribute(CUfunction handle, int attribute, int value) {
  return call("cuFuncSetAttribute", kContext, [&](Driver& d, Lock& lock, Context& context) -> CUresult {
    std::shared_ptr<Function> function;
    if (CUresult error = find_function(d, lock, context, handle, &function)) return error;
    if (attribute == 8) {
      size_t limit = context.device->spec.shared_per_block_optin;
      if (value < 0 || static_cast<size_t>(value) + function->info().static_shared > limit) {
        add_report(ReportKind::invalid_launch,
                   "cuFuncSetAttribute: expected at most " + std::to_string(limit) +
                       " bytes of shared memory for " + function->info().name + " but received " +
                       std::to_string(value) + " beside " + std::to_string(function->info().static_shared) +
                       " static ones");
        return CUDA_ERROR_INVALID_VALUE;
      }
      function->max_dynamic_shared = value;
    } else if (attribute == 9) {
      if (value < -1 || value > 100) return CUDA_ERROR_INVALID_VALUE;
      function->carveout = value;
    } else {
      return misuse("cuFuncSetAttribute", CUDA_ERROR_NOT_SUPPORTED, "attribute " + std::to_string(attribute));
    }
    return CUDA_SUCCESS;
  });
}
MGM_CU cuFuncSetCacheConfig(CUfunction handle, int config) {
  return call("cuFuncSetCacheConfig", kContext, [&](Driver& d, Lock& lock, Context& context) -> CUresult {
    std::shared_ptr<Function> function;
    if (CUresult error = find_function(d, lock, context, handle, &function)) return error;
    return config < 0 || config > 3 ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
  });
}
MGM_CU cuKernelGetAttribute(int* value, int attribute, CUkernel kernel, CUdevice) {
  return cuFuncGetAttribute(value, attribute, reinterpret_cast<CUfunction>(kernel));
}
MGM_CU cuKernelSetAttribute(int attribute, int value, CUkernel kernel, CUdevice) {
  return cuFuncSetAttribute(reinterpret_cast<CUfunction>(kernel), attribute, value);
}

#define MGM_NO_LINKER(name, ...)                                                                        \
  MGM_CU name(__VA_ARGS__) {                                                                            \
    return call(#name, kPlain, [](Driver&, Lock&, Context&) -> CUresult {                               \
      return misuse(#name, CUDA_ERROR_NOT_SUPPORTED, "the emulator has no linker; load whole modules"); \
    });                                                                                                 \
  }
MGM_NO_LINKER(cuLinkCreate_v2, unsigned, int*, void**, CUlinkState*)
MGM_NO_LINKER(cuLinkAddData_v2, CUlinkState, int, void*, size_t, const char*, unsigned, int*, void**)
MGM_NO_LINKER(cuLinkComplete, CUlinkState, void**, size_t*)
MGM_NO_LINKER(cuLinkDestroy, CUlinkState)
