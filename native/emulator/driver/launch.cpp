// Launches, their limits, and occupancy.
#include <algorithm>
#include <cstring>

#include "driver.h"

namespace mgm::emulator::cuda {
namespace {

CUresult invalid_launch(const char* name, const FunctionInfo& info, CUresult error, const std::string& why) {
  Report report{};
  report.kind = ReportKind::invalid_launch;
  report.kernel = info.name;
  report.message = std::string(name) + " of " + info.name + ": " + why;
  add_report(report);
  return error;
}

std::string dims(const uint32_t v[3]) {
  return std::to_string(v[0]) + "x" + std::to_string(v[1]) + "x" + std::to_string(v[2]);
}

// Registers are given out to warps in units of 256.
int registers_of_block(int registers, uint64_t threads) {
  uint64_t warps = (threads + 31) / 32;
  uint64_t each = (static_cast<uint64_t>(registers) * 32 + 255) / 256 * 256;
  return static_cast<int>(std::min<uint64_t>(warps * each, INT32_MAX));
}

// What a driver refuses at the call.
CUresult check_limits(const char* name, const DeviceSpec& spec, const Function& function,
                      const LaunchConfig& config) {
  const FunctionInfo& info = function.info();
  const uint32_t *grid = config.grid, *block = config.block;
  for (int i = 0; i < 3; ++i) {
    if (!grid[i] || !block[i])
      return invalid_launch(
          name, info, CUDA_ERROR_INVALID_VALUE,
          "expected no empty dimension but received grid " + dims(grid) + ", block " + dims(block));
  }
  if (grid[0] > 2147483647u || grid[1] > 65535 || grid[2] > 65535)
    return invalid_launch(name, info, CUDA_ERROR_INVALID_VALUE,
                          "grid " + dims(grid) + " is above the device's limits");
  uint64_t threads = uint64_t{block[0]} * block[1] * block[2];
  if (block[0] > 1024 || block[1] > 1024 || block[2] > 64 ||
      threads > static_cast<uint64_t>(spec.max_threads_per_block))
    return invalid_launch(name, info, CUDA_ERROR_INVALID_VALUE,
                          "block " + dims(block) + " is above the device's limits");
  if (info.max_threads > 0 && threads > static_cast<uint64_t>(info.max_threads))
    return invalid_launch(name, info, CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES,
                          "expected at most " + std::to_string(info.max_threads) +
                              " threads (its launch bounds) but received " + std::to_string(threads));
  if (registers_of_block(info.registers, threads) > spec.registers_per_sm)
    return invalid_launch(name, info, CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES,
                          std::to_string(threads) + " threads of " + std::to_string(info.registers) +
                              " registers need more than the " + std::to_string(spec.registers_per_sm) +
                              " of a multiprocessor");
  size_t limit = function.max_dynamic_shared
                     ? static_cast<size_t>(function.max_dynamic_shared)
                     : spec.shared_per_block - std::min(spec.shared_per_block, info.static_shared);
  if (config.dynamic_shared > limit)
    return invalid_launch(name, info, CUDA_ERROR_INVALID_VALUE,
                          "expected at most " + std::to_string(limit) +
                              " bytes of dynamic shared memory but received " +
                              std::to_string(config.dynamic_shared) +
                              (function.max_dynamic_shared ? "" : " (cuFuncSetAttribute allows more)"));
  return CUDA_SUCCESS;
}

// Copies the arguments by value, from single pointers or from a packed buffer.
CUresult pack(const char* name, const FunctionInfo& info, void** params, void** extra,
              std::vector<std::byte>* out) {
  out->assign(info.param_bytes, std::byte{0});
  if (params && extra)
    return invalid_launch(name, info, CUDA_ERROR_INVALID_VALUE, "received both kernelParams and extra");
  if (extra) {
    const void* buffer = nullptr;
    const size_t* size = nullptr;
    for (int i = 0; extra[i]; i += 2) {
      auto key = reinterpret_cast<uint64_t>(extra[i]);
      if (key == 1) {
        buffer = extra[i + 1];
      } else if (key == 2) {
        size = static_cast<const size_t*>(extra[i + 1]);
      } else {
        return invalid_launch(name, info, CUDA_ERROR_INVALID_VALUE, "received an unknown key in extra");
      }
    }
    if (!buffer || !size)
      return invalid_launch(name, info, CUDA_ERROR_INVALID_VALUE, "extra names no buffer or no size");
    // The last parameter's end, or that rounded up as sizeof of a struct is.
    size_t align = 1;
    for (auto& param : info.params) align = std::max(align, param.align);
    size_t rounded = (info.param_bytes + align - 1) / align * align;
    if (*size != info.param_bytes && *size != rounded)
      return invalid_launch(name, info, CUDA_ERROR_INVALID_VALUE,
                            "expected " + std::to_string(info.param_bytes) +
                                " bytes of parameters but received " + std::to_string(*size));
    std::memcpy(out->data(), buffer, info.param_bytes);
    return CUDA_SUCCESS;
  }
  if (!params && !info.params.empty())
    return invalid_launch(name, info, CUDA_ERROR_INVALID_VALUE,
                          "expected " + std::to_string(info.params.size()) + " parameters but received none");
  for (size_t i = 0; i < info.params.size(); ++i) {
    if (!params[i])
      return invalid_launch(name, info, CUDA_ERROR_INVALID_VALUE,
                            "expected " + std::to_string(info.params.size()) + " parameters but number " +
                                std::to_string(i) + " is a null pointer");
    std::memcpy(out->data() + info.params[i].offset, params[i], info.params[i].size);
  }
  return CUDA_SUCCESS;
}

}  // namespace

CUresult kernel_work(Driver& d, const char* name, const std::shared_ptr<Function>& function,
                     const LaunchConfig& config, void** params, void** extra, std::shared_ptr<Work>* out) {
  Context& context = *function->module->context;
  const FunctionInfo& info = function->info();
  if (CUresult error = check_limits(name, context.device->spec, *function, config)) return error;
  auto work = std::make_shared<Work>();
  work->kind = WorkKind::kernel;
  work->label = info.name;
  work->function = function;
  work->config = config;
  work->config.max_dynamic_shared = static_cast<size_t>(function->max_dynamic_shared);
  if (CUresult error = pack(name, info, params, extra, &work->params)) return error;
  for (auto& param : info.params) {
    for (size_t at = (param.offset + 7) / 8 * 8; at + 8 <= param.offset + param.size; at += 8) {
      uint64_t value;
      std::memcpy(&value, work->params.data() + at, 8);
      if (d.find_device(value)) work->pointers.push_back(value);
    }
  }
  std::sort(work->pointers.begin(), work->pointers.end());
  work->pointers.erase(std::unique(work->pointers.begin(), work->pointers.end()), work->pointers.end());
  // The work outlives module handles, and is copied into graphs: it owns what it needs.
  work->run = [function, config = work->config, arguments = work->params](Context& own) {
    Driver& driver_state = driver();
    Options options;
    CUresult planned;
    {
      Lock lock(driver_state.mutex);
      options = driver_state.options;
      // Every launch its own schedule, all decided by the seed.
      options.seed = driver_state.random();
      planned = driver_state.planned_error(function->info().name, true);
    }
    if (planned) {
      own.error = planned;
      return;
    }
    LaunchResult result = launch(*function->module->module, function->index, config, arguments.data(),
                                 own.device->spec, *own.device->memory, options);
    for (auto& report : result.reports) add_report(report);
    record_launch(function->info().name, own.device->index, config, result.error, result.counters);
    if (result.error) {
      int expected = 0;
      own.error.compare_exchange_strong(expected, result.error);
    }
  };
  *out = work;
  return CUDA_SUCCESS;
}

int max_active_blocks(const DeviceSpec& spec, const Function& function, int threads, size_t dynamic_shared) {
  const FunctionInfo& info = function.info();
  if (threads <= 0 || threads > spec.max_threads_per_block || threads > info.max_threads) return 0;
  int warps = (threads + 31) / 32;
  int blocks = std::min(spec.max_blocks_per_sm, spec.max_threads_per_sm / 32 / warps);
  if (info.registers > 0)
    blocks = std::min(
        blocks, spec.registers_per_sm / registers_of_block(info.registers, static_cast<uint64_t>(threads)));
  // Each block costs 1 KiB more; shared memory is given out in units of 128 bytes.
  size_t shared = info.static_shared + dynamic_shared;
  if (shared > spec.shared_per_block_optin) return 0;
  size_t each = (shared + 1024 + 127) / 128 * 128;
  return std::min(blocks, static_cast<int>(spec.shared_per_sm / each));
}

namespace {

CUresult launch_call(const char* name, CUfunction handle, const LaunchConfig& config, CUstream stream_handle,
                     void** params, void** extra) {
  return call(name, kContext, [&](Driver& d, Lock& lock, Context& context) -> CUresult {
    std::shared_ptr<Stream> stream;
    std::shared_ptr<Function> function;
    if (CUresult error = find_stream(d, context, stream_handle, &stream)) return error;
    if (CUresult error = find_function(d, lock, context, handle, &function)) return error;
    if (function->module->context != &context)
      return misuse(name, CUDA_ERROR_INVALID_HANDLE,
                    "the function is of another context than the current one");
    std::shared_ptr<Work> work;
    if (CUresult error = kernel_work(d, name, function, config, params, extra, &work)) return error;
    return d.enqueue(*stream, work);
  });
}

LaunchConfig make_config(unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                         unsigned shared) {
  LaunchConfig config;
  const uint32_t grid[3] = {gx, gy, gz}, block[3] = {bx, by, bz};
  std::copy(grid, grid + 3, config.grid);
  std::copy(block, block + 3, config.block);
  config.dynamic_shared = shared;
  return config;
}

}  // namespace
}  // namespace mgm::emulator::cuda

using namespace mgm::emulator;
using namespace mgm::emulator::cuda;

MGM_CU cuLaunchKernel(CUfunction function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                      unsigned bz, unsigned shared, CUstream stream, void** params, void** extra) {
  return launch_call("cuLaunchKernel", function, make_config(gx, gy, gz, bx, by, bz, shared), stream, params,
                     extra);
}

MGM_CU cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction function, void** params, void** extra) {
  if (!c || (c->numAttrs && !c->attrs)) return CUDA_ERROR_INVALID_VALUE;
  for (unsigned i = 0; i < c->numAttrs; ++i) {
    const CUlaunchAttribute& attribute = c->attrs[i];
    auto refuse = [&](const char* what) {
      return misuse("cuLaunchKernelEx", CUDA_ERROR_NOT_SUPPORTED, std::string("the emulator has no ") + what);
    };
    switch (attribute.id) {
      case 0:   // ignore
      case 1:   // access policy window
      case 3:   // synchronisation policy
      case 6:   // programmatic stream serialisation: an earlier start that is allowed, never promised
      case 8:   // priority
      case 9:   // memory synchronisation domain map
      case 10:  // and domain
      case 14:  // shared memory carve-out
        break;
      case 2:
        if (attribute.value.integer) return refuse("cooperative launch");
        break;
      case 4:
        if (attribute.value.dim[0] != 1 || attribute.value.dim[1] != 1 || attribute.value.dim[2] != 1)
          return refuse("clusters of more than one block");
        break;
      default:
        return misuse("cuLaunchKernelEx", CUDA_ERROR_NOT_SUPPORTED,
                      "launch attribute " + std::to_string(attribute.id));
    }
  }
  return launch_call("cuLaunchKernelEx", function,
                     make_config(c->gridDimX, c->gridDimY, c->gridDimZ, c->blockDimX, c->blockDimY,
                                 c->blockDimZ, c->sharedMemBytes),
                     c->hStream, params, extra);
}

MGM_CU cuLaunchCooperativeKernel(CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                                 unsigned, CUstream, void**) {
  return misuse("cuLaunchCooperativeKernel", CUDA_ERROR_NOT_SUPPORTED,
                "the emulator has no cooperative launch");
}

MGM_CU cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, CUfunction handle, int threads,
                                                            size_t shared, unsigned flags) {
  return call("cuOccupancyMaxActiveBlocksPerMultiprocessor", kContext,
              [&](Driver& d, Lock& lock, Context& context) -> CUresult {
                std::shared_ptr<Function> function;
                if (!blocks || threads <= 0 || flags > 1) return CUDA_ERROR_INVALID_VALUE;
                if (CUresult error = find_function(d, lock, context, handle, &function)) return error;
                *blocks = max_active_blocks(context.device->spec, *function, threads, shared);
                return CUDA_SUCCESS;
              });
}
MGM_CU cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, CUfunction function, int threads,
                                                   size_t shared) {
  return cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function, threads, shared, 0);
}

MGM_CU cuOccupancyMaxPotentialBlockSizeWithFlags(int* grid, int* block, CUfunction handle,
                                                 CUoccupancyB2DSize shared_of, size_t shared, int limit,
                                                 unsigned flags) {
  return call(
      "cuOccupancyMaxPotentialBlockSize", kContext, [&](Driver& d, Lock& lock, Context& context) -> CUresult {
        std::shared_ptr<Function> function;
        if (!grid || !block || flags > 1) return CUDA_ERROR_INVALID_VALUE;
        if (CUresult error = find_function(d, lock, context, handle, &function)) return error;
        const DeviceSpec& spec = context.device->spec;
        int most = std::min(spec.max_threads_per_block, function->info().max_threads);
        if (limit > 0) most = std::min(most, limit);
        int best = 0;
        *grid = *block = 0;
        for (int threads = most; threads > 0; threads = threads > 32 ? (threads - 1) / 32 * 32 : 0) {
          int blocks = max_active_blocks(spec, *function, threads, shared_of ? shared_of(threads) : shared);
          if (blocks * threads <= best) continue;
          best = blocks * threads;
          *block = threads;
          *grid = blocks * spec.sm_count;
        }
        return best ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
      });
}
MGM_CU cuOccupancyMaxPotentialBlockSize(int* grid, int* block, CUfunction function,
                                        CUoccupancyB2DSize shared_of, size_t shared, int limit) {
  return cuOccupancyMaxPotentialBlockSizeWithFlags(grid, block, function, shared_of, shared, limit, 0);
}

MGM_CU cuOccupancyAvailableDynamicSMemPerBlock(size_t* bytes, CUfunction handle, int blocks, int threads) {
  return call("cuOccupancyAvailableDynamicSMemPerBlock", kContext,
              [&](Driver& d, Lock& lock, Context& context) -> CUresult {
                std::shared_ptr<Function> function;
                if (!bytes || blocks <= 0 || threads <= 0) return CUDA_ERROR_INVALID_VALUE;
                if (CUresult error = find_function(d, lock, context, handle, &function)) return error;
                const DeviceSpec& spec = context.device->spec;
                size_t each = spec.shared_per_sm / static_cast<size_t>(blocks) / 128 * 128;
                size_t used = 1024 + function->info().static_shared;
                *bytes = each < used ? 0
                                     : std::min(each - used,
                                                spec.shared_per_block_optin - function->info().static_shared);
                return CUDA_SUCCESS;
              });
}

#define MGM_NO_TENSOR_MAP(name, ...)                                                             \
  MGM_CU name(__VA_ARGS__) {                                                                     \
    return call(#name, kPlain, [](Driver&, Lock&, Context&) -> CUresult {                        \
      return misuse(#name, CUDA_ERROR_NOT_SUPPORTED, "the emulator has no tensor maps (sm_90)"); \
    });                                                                                          \
  }
MGM_NO_TENSOR_MAP(cuTensorMapEncodeTiled, void*, int, uint32_t, void*, const uint64_t*, const uint64_t*,
                  const uint32_t*, const uint32_t*, int, int, int, int)
MGM_NO_TENSOR_MAP(cuTensorMapEncodeIm2col, void*, int, uint32_t, void*, const uint64_t*, const uint64_t*,
                  const int*, const int*, uint32_t, uint32_t, const uint32_t*, int, int, int, int)
