// Start-up, devices and contexts.
#include <signal.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <sstream>

#include "driver.h"
#include "mgm_emulator.h"

namespace mgm::emulator::cuda {

Driver& driver() {
  // Never destroyed: exit handlers may still call in.
  static Driver* instance = new Driver;
  return *instance;
}

ThreadState& thread_state() {
  thread_local ThreadState state;
  return state;
}

std::string hex(uint64_t value) {
  char text[32];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

const char* error_name(int error) {
#define MGM_CASE(name, value, text) \
  case value:                       \
    return #name;
  switch (error) { MGM_CUDA_ERRORS(MGM_CASE) }
#undef MGM_CASE
  return nullptr;
}

CUresult misuse(const char* name, CUresult result, const std::string& why) {
  add_report(ReportKind::api_misuse, std::string(name) + ": " + why);
  return result;
}

bool is_sticky(CUresult error) {
  return error == CUDA_ERROR_ILLEGAL_ADDRESS || error == CUDA_ERROR_LAUNCH_TIMEOUT ||
         error == CUDA_ERROR_ASSERT || (error >= 714 && error <= 719);
}

CUresult enter(const char* name, unsigned flags, Lock& lock, std::shared_ptr<Context>* context) {
  Driver& d = driver();
  if (d.exiting) return CUDA_ERROR_DEINITIALIZED;
  if (!d.initialized && !(flags & kNoInit)) return CUDA_ERROR_NOT_INITIALIZED;
  ThreadState& thread = thread_state();
  if (thread.in_host_fn && !(flags & kAnyThread))
    return misuse(name, CUDA_ERROR_NOT_PERMITTED,
                  "called from a host function, which may not call the driver");
  d.collect_garbage();
  if (flags & kContext) {
    if (thread.stack.empty() || !thread.stack.back()) return CUDA_ERROR_INVALID_CONTEXT;
    *context = thread.stack.back();
    if (!(*context)->active) return CUDA_ERROR_CONTEXT_IS_DESTROYED;
    if (int error = (*context)->error) return error;
  }
  if (flags & kCaptureUnsafe) {
    bool refused = false;
    for (auto capture : std::set(d.captures)) {
      bool own = capture->owner == std::this_thread::get_id();
      bool hit = (thread.capture_mode == 0 && capture->mode == 0) ||
                 (thread.capture_mode != 2 && capture->mode != 2 && own);
      if (!hit) continue;
      d.invalidate(capture);
      refused = true;
    }
    if (refused) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  }
  (void)lock;
  const CUresult planned = d.planned_error(name, false);
  // Of calls that need no context the one they act on is the current one.
  if (is_sticky(planned))
    if (const auto hit = *context || thread.stack.empty() ? *context : thread.stack.back())
      hit->error = planned;
  return planned;
}

CUresult leave(const char* name, CUresult result, Context* context) {
  if (context && result == CUDA_SUCCESS && context->active && context->error) result = context->error;
  if (driver().trace) {
    const char* text = error_name(result);
    std::fprintf(stderr, "mgm-emulator: %s -> %s\n", name, text ? text : "?");
  }
  return result;
}

namespace {

struct sigaction previous_segv;
struct HostRange {
  std::atomic<uint64_t> low{UINT64_MAX}, high{0};
};
constexpr int kMaxDevices = 16;
HostRange device_ranges[kMaxDevices];

// A host access to a device address ends the process as on a real machine, but says so first.
void on_segv(int signal, siginfo_t* info, void* ucontext) {
  auto address = reinterpret_cast<uint64_t>(info->si_addr);
  for (auto& range : device_ranges) {
    if (address < range.low || address >= range.high) continue;
    static std::atomic<bool> said{false};
    if (!said.exchange(true))
      add_report(ReportKind::host_access,
                 "The host read or wrote device memory at " + hex(address) + " through a pointer", address);
    break;
  }
  if (previous_segv.sa_flags & SA_SIGINFO) {
    previous_segv.sa_sigaction(signal, info, ucontext);
  } else if (previous_segv.sa_handler != SIG_DFL && previous_segv.sa_handler != SIG_IGN) {
    previous_segv.sa_handler(signal);
  } else {
    ::signal(SIGSEGV, SIG_DFL);  // returns to the faulting instruction
  }
}

[[noreturn]] void bad_setting(const char* name, const char* expected, const std::string& value) {
  throw std::runtime_error(std::string("expected ") + expected + " for " + name + " but received \"" + value +
                           "\"");
}

double parse_number(const char* name, const std::string& text, const char* expected) {
  char* end = nullptr;
  double value = std::strtod(text.c_str(), &end);
  if (text.empty() || *end || !(value >= 0)) bad_setting(name, expected, text);
  return value;
}

// "80,90:4G" -> two devices. "" or "none": no device.
void parse_devices(Driver& d, const std::string& text) {
  if (text == "none" || text.empty()) return;
  size_t at = 0;
  while (at <= text.size()) {
    size_t end = std::min(text.find(',', at), text.size());
    std::string item = text.substr(at, end - at);
    at = end + 1;
    const char* expected = "capability[:memory], as 80 or 90:4G, separated by commas";
    size_t colon = item.find(':');
    std::string capability = item.substr(0, colon);
    static const int known[] = {80, 86, 89, 90, 100, 120};
    int number = std::atoi(capability.c_str());
    if (std::to_string(number) != capability ||
        std::find(std::begin(known), std::end(known), number) == std::end(known))
      bad_setting("MGM_EMULATOR_DEVICES", expected, item);
    auto device = std::make_unique<Device>();
    device->index = static_cast<int>(d.devices.size());
    device->spec = device_spec(number);
    device->spec.driver_version = d.version;
    if (device->spec.name.find("emulat") == std::string::npos) device->spec.name += " (emulated)";
    if (colon != std::string::npos) {
      std::string size = item.substr(colon + 1);
      double unit = 1;
      if (!size.empty()) {
        switch (size.back()) {
          case 'K':
            unit = 1024.0;
            break;
          case 'M':
            unit = 1024.0 * 1024;
            break;
          case 'G':
            unit = 1024.0 * 1024 * 1024;
            break;
        }
        if (unit > 1) size.pop_back();
      }
      double bytes = parse_number("MGM_EMULATOR_DEVICES", size, expected) * unit;
      if (bytes < 1 || bytes > 1e15) bad_setting("MGM_EMULATOR_DEVICES", expected, item);
      device->spec.memory_bytes = static_cast<size_t>(bytes);
    }
    device->memory = std::make_unique<Memory>(device->spec, device->index);
    device->default_pool = std::make_shared<Pool>();
    device->default_pool->handle = d.handle();
    device->default_pool->device_index = device->index;
    d.pools.live[device->default_pool->handle] = device->default_pool;
    device->pool = device->default_pool;
    d.devices.push_back(std::move(device));
    if (d.devices.size() > kMaxDevices) bad_setting("MGM_EMULATOR_DEVICES", "at most 16 devices", text);
  }
}

// "cuMemAllocAsync:3=2,rms_norm=700"
std::vector<PlannedError> parse_errors(const std::string& text) {
  std::vector<PlannedError> errors;
  std::istringstream items(text);
  for (std::string item; std::getline(items, item, ',');) {
    char name[128];
    int count = 1, error = 0, end = 0;
    const bool parsed = (std::sscanf(item.c_str(), "%127[^:=]:%d=%d%n", name, &count, &error, &end) == 3 ||
                         std::sscanf(item.c_str(), "%127[^:=]=%d%n", name, &error, &end) == 2) &&
                        static_cast<size_t>(end) == item.size();
    if (!parsed || count < 1 || !error_name(error))
      bad_setting("MGM_EMULATOR_FAIL", "name[:count]=error, separated by commas", item);
    errors.push_back({name, count, error});
  }
  return errors;
}

bool configure(Driver& d, const std::string& key, const std::string& value) {
  const std::string name = "MGM_EMULATOR_" + key;
  auto flag = [&] {
    if (value != "0" && value != "1") bad_setting(name.c_str(), "0 or 1", value);
    return value == "1";
  };
  if (key == "seed") {
    d.options.seed = static_cast<uint64_t>(parse_number(name.c_str(), value, "a number"));
    d.random.seed(d.options.seed);
  } else if (key == "checks") {
    d.options.checks = flag();
  } else if (key == "counters") {
    d.options.counters = flag();
  } else if (key == "threads") {
    d.options.threads =
        static_cast<int>(std::min(1024.0, parse_number(name.c_str(), value, "a number of threads")));
  } else if (key == "sample") {
    d.options.sample = static_cast<uint64_t>(parse_number(name.c_str(), value, "a number of blocks"));
  } else if (key == "watchdog") {
    d.options.watchdog_seconds = parse_number(name.c_str(), value, "seconds");
  } else if (key == "mma") {
    if (!parse_mma_sum(value, &d.options.mma))
      bad_setting(name.c_str(), "exact, hardware or permuted", value);
  } else if (key == "order") {
    if (value == "random") {
      d.order = Order::random;
    } else if (value == "lazy") {
      d.order = Order::lazy;
    } else if (value == "eager") {
      d.order = Order::eager;
    } else {
      bad_setting(name.c_str(), "random, lazy or eager", value);
    }
  } else if (key == "peers") {
    d.peers = flag();
  } else if (key == "fail") {
    d.planned_errors = parse_errors(value);
  } else {
    return false;
  }
  return true;
}

}  // namespace

void note_device_range(int device, uint64_t address, size_t bytes) {
  if (device >= kMaxDevices) return;
  HostRange& range = device_ranges[device];
  if (address < range.low) range.low = address;
  if (address + bytes > range.high) range.high = address + bytes;
}

CUresult Driver::initialize() {
  if (initialized) return devices.empty() ? CUDA_ERROR_NO_DEVICE : CUDA_SUCCESS;
  try {
    auto environment = [](const char* name) {
      const char* value = std::getenv(name);
      return std::string(value ? value : "");
    };
    options = options_from_environment();
    for (auto [key, name] : {std::pair{"order", "MGM_EMULATOR_ORDER"},
                             {"peers", "MGM_EMULATOR_PEERS"},
                             {"fail", "MGM_EMULATOR_FAIL"}}) {
      if (std::string value = environment(name); !value.empty()) configure(*this, key, value);
    }
    random.seed(options.seed);
    trace = environment("MGM_EMULATOR_TRACE") == "1";
    if (std::string text = environment("MGM_EMULATOR_DRIVER_VERSION"); !text.empty()) {
      const char* expected = "a version as 12040 or 12.4";
      double number = parse_number("MGM_EMULATOR_DRIVER_VERSION", text, expected);
      if (size_t dot = text.find('.'); dot != std::string::npos)
        number = std::atoi(text.c_str()) * 1000 + std::atoi(text.c_str() + dot + 1) * 10;
      if (number < 10000 || number > 99990) bad_setting("MGM_EMULATOR_DRIVER_VERSION", expected, text);
      version = static_cast<int>(number);
    }
    const char* listed = std::getenv("MGM_EMULATOR_DEVICES");
    parse_devices(*this, listed ? listed : "80");
  } catch (const std::exception& error) {
    devices.clear();
    std::fprintf(stderr, "mgm-emulator: %s\n", error.what());
    return CUDA_ERROR_INVALID_VALUE;
  }
  initialized = true;
  std::atexit([] { driver().stop(); });
  const char* handle_segv = std::getenv("MGM_EMULATOR_SEGV");
  if (!handle_segv || std::strcmp(handle_segv, "0") != 0) {
    struct sigaction action {};
    action.sa_sigaction = on_segv;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, &previous_segv);
  }
  return devices.empty() ? CUDA_ERROR_NO_DEVICE : CUDA_SUCCESS;
}

CUresult Driver::planned_error(const std::string& name, bool kernel) {
  for (auto it = planned_errors.begin(); it != planned_errors.end(); ++it) {
    const bool named = kernel ? it->name == "launch" || name.rfind(it->name, 0) == 0 : it->name == name;
    if (!named || --it->count > 0) continue;
    const CUresult error = it->error;
    planned_errors.erase(it);
    return error;
  }
  return CUDA_SUCCESS;
}

// Ends a context: its work is carried out (or dropped after an error), what it still owns is reported and
// freed.
void Driver::tear_down(Lock& lock, Context& context) {
  for (auto capture : std::set(captures)) {
    if (capture->graph->context.get() != &context) continue;
    invalidate(capture);
    for (Stream* stream : capture->streams) stream->capture.reset();
    captures.erase(capture);
  }
  wait_context(lock, context);
  bool failed = context.error != 0;
  context.active = false;
  std::erase_if(execs.live, [&](auto& item) { return item.second->context.get() == &context; });
  std::erase_if(graphs.live, [&](auto& item) { return item.second->context.get() == &context; });
  std::erase_if(functions.live, [&](auto& item) { return item.second->module->context == &context; });
  std::erase_if(modules.live, [&](auto& item) { return item.second->context == &context; });
  for (auto& [handle, library] : libraries.live) library->modules.erase(&context);
  for (auto& event : events.live) {
    if (event.second->context.get() == &context) event.second->op.reset();
  }
  std::erase_if(events.live, [&](auto& item) { return item.second->context.get() == &context; });
  std::erase_if(streams.live, [&](auto& item) { return item.second->context.get() == &context; });
  context.blocking.clear();
  context.per_thread.clear();
  context.orphan_tails.clear();
  context.legacy.reset();
  context.peers.clear();
  for (auto& [handle, other] : contexts.live) other->peers.erase(&context);
  for (auto& op : recent) {
    if (op->context.get() == &context && op->state == Op::done) observe(op);
  }
  collect_garbage();
  size_t leaked = 0, leaked_bytes = 0;
  std::vector<uint64_t> mine;
  for (auto& [address, allocation] : allocations) {
    if (allocation->context == &context) mine.push_back(address);
  }
  for (uint64_t address : mine) {
    auto allocation = allocations[address];
    if (allocation->kind != Allocation::graph) {
      ++leaked;
      leaked_bytes += allocation->bytes;
    }
    release(address, false);
  }
  if (leaked && !failed && options.checks)
    add_report(ReportKind::leak, std::to_string(leaked) + " allocations of together " +
                                     std::to_string(leaked_bytes) +
                                     " bytes were never freed before the context of device " +
                                     std::to_string(context.device->index) + " ended");
  context.error = 0;
}

namespace {

std::shared_ptr<Context> make_context(Driver& d, Device& device, bool primary, unsigned flags) {
  auto context = std::make_shared<Context>();
  context->handle = d.handle();
  context->device = &device;
  context->primary = primary;
  context->flags = flags;
  d.contexts.live[context->handle] = context;
  return context;
}

void activate(Driver& d, const std::shared_ptr<Context>& context) {
  context->active = true;
  context->error = 0;
  context->limits = {{0, 1024}, {1, size_t{1} << 20}, {2, size_t{8} << 20}, {3, 2}, {4, 2048}, {5, 64},
                     {6, 0}};
  context->legacy = std::make_shared<Stream>();
  context->legacy->context = context;
  context->legacy->legacy = true;
  context->legacy->id = d.next_stream++;
}

Device* device_of(Driver& d, CUdevice index) {
  return index >= 0 && index < static_cast<int>(d.devices.size())
             ? d.devices[static_cast<size_t>(index)].get()
             : nullptr;
}

CUcontext handle_of(const std::shared_ptr<Context>& context) {
  return context ? reinterpret_cast<CUcontext>(context->handle) : nullptr;
}

CUresult create_context(const char* name, CUcontext* out, unsigned flags, CUdevice index) {
  return call(name, kPlain, [&](Driver& d, Lock&, Context&) -> CUresult {
    Device* device = device_of(d, index);
    if (!out) return CUDA_ERROR_INVALID_VALUE;
    if (!device) return CUDA_ERROR_INVALID_DEVICE;
    auto context = make_context(d, *device, false, flags);
    activate(d, context);
    thread_state().stack.push_back(context);
    *out = handle_of(context);
    return CUDA_SUCCESS;
  });
}

CUresult release_primary(const char* name, CUdevice index, bool reset) {
  return call(name, kPlain, [&](Driver& d, Lock& lock, Context&) -> CUresult {
    Device* device = device_of(d, index);
    if (!device) return CUDA_ERROR_INVALID_DEVICE;
    // A reset leaves the count as it is: whoever retained still has to release.
    if (!reset && device->retained-- == 0) {
      device->retained = 0;
      return CUDA_ERROR_INVALID_CONTEXT;
    }
    if ((reset || device->retained == 0) && device->primary && device->primary->active)
      d.tear_down(lock, *device->primary);
    return CUDA_SUCCESS;
  });
}

}  // namespace
}  // namespace mgm::emulator::cuda

using namespace mgm::emulator;
using namespace mgm::emulator::cuda;

extern "C" __attribute__((visibility("default"))) int mgmEmulatorConfigure(const char* key,
                                                                           const char* value) {
  if (!key || !value) return 1;
  Lock lock(driver().mutex);
  try {
    return configure(driver(), key, value) ? 0 : 1;
  } catch (const std::exception&) {
    return 1;
  }
}

extern "C" __attribute__((visibility("default"))) int mgmEmulatorPending(void) {
  Lock lock(driver().mutex);
  return static_cast<int>(driver().pending);
}

MGM_CU cuInit(unsigned flags) {
  return call("cuInit", kNoInit, [&](Driver& d, Lock&, Context&) -> CUresult {
    return flags ? CUDA_ERROR_INVALID_VALUE : d.initialize();
  });
}

MGM_CU cuDriverGetVersion(int* version) {
  return call("cuDriverGetVersion", kNoInit | kAnyThread, [&](Driver& d, Lock&, Context&) -> CUresult {
    if (!version) return CUDA_ERROR_INVALID_VALUE;
    // Legal before cuInit, but the pretended version is read from the environment there.
    if (CUresult error = d.initialize(); error && error != CUDA_ERROR_NO_DEVICE) return error;
    *version = d.version;
    return CUDA_SUCCESS;
  });
}

MGM_CU cuGetErrorName(CUresult error, const char** text) {
  if (!text) return CUDA_ERROR_INVALID_VALUE;
  *text = error_name(error);
  return *text ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

MGM_CU cuGetErrorString(CUresult error, const char** text) {
  if (!text) return CUDA_ERROR_INVALID_VALUE;
  *text = nullptr;
#define MGM_CASE(name, value, words) \
  case value:                        \
    *text = words;                   \
    break;
  switch (error) { MGM_CUDA_ERRORS(MGM_CASE) }
#undef MGM_CASE
  return *text ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

MGM_CU cuDeviceGetCount(int* count) {
  return call("cuDeviceGetCount", kPlain, [&](Driver& d, Lock&, Context&) -> CUresult {
    if (!count) return CUDA_ERROR_INVALID_VALUE;
    *count = static_cast<int>(d.devices.size());
    return CUDA_SUCCESS;
  });
}

MGM_CU cuDeviceGet(CUdevice* device, int ordinal) {
  return call("cuDeviceGet", kPlain, [&](Driver& d, Lock&, Context&) -> CUresult {
    if (!device) return CUDA_ERROR_INVALID_VALUE;
    if (!device_of(d, ordinal)) return CUDA_ERROR_INVALID_DEVICE;
    *device = ordinal;
    return CUDA_SUCCESS;
  });
}

MGM_CU cuDeviceGetName(char* name, int size, CUdevice index) {
  return call("cuDeviceGetName", kPlain, [&](Driver& d, Lock&, Context&) -> CUresult {
    Device* device = device_of(d, index);
    if (!device) return CUDA_ERROR_INVALID_DEVICE;
    if (!name || size <= 0) return CUDA_ERROR_INVALID_VALUE;
    std::snprintf(name, static_cast<size_t>(size), "%s", device->spec.name.c_str());
    return CUDA_SUCCESS;
  });
}

MGM_CU cuDeviceGetUuid_v2(CUuuid* uuid, CUdevice index) {
  return call("cuDeviceGetUuid_v2", kPlain, [&](Driver& d, Lock&, Context&) -> CUresult {
    Device* device = device_of(d, index);
    if (!device) return CUDA_ERROR_INVALID_DEVICE;
    if (!uuid) return CUDA_ERROR_INVALID_VALUE;
    std::memcpy(uuid->bytes, "mgm-emulated-gp", 15);
    uuid->bytes[15] = static_cast<char>(index);
    return CUDA_SUCCESS;
  });
}
MGM_CU cuDeviceGetUuid(CUuuid* uuid, CUdevice index) {
  return cuDeviceGetUuid_v2(uuid, index);
}

MGM_CU cuDeviceTotalMem_v2(size_t* bytes, CUdevice index) {
  return call("cuDeviceTotalMem_v2", kPlain, [&](Driver& d, Lock&, Context&) -> CUresult {
    Device* device = device_of(d, index);
    if (!device) return CUDA_ERROR_INVALID_DEVICE;
    if (!bytes) return CUDA_ERROR_INVALID_VALUE;
    *bytes = device->memory->total();
    return CUDA_SUCCESS;
  });
}

MGM_CU cuDeviceGetPCIBusId(char* text, int size, CUdevice index) {
  return call("cuDeviceGetPCIBusId", kPlain, [&](Driver& d, Lock&, Context&) -> CUresult {
    if (!device_of(d, index)) return CUDA_ERROR_INVALID_DEVICE;
    if (!text || size < 13) return CUDA_ERROR_INVALID_VALUE;
    std::snprintf(text, static_cast<size_t>(size), "0000:%02X:00.0", index + 1);
    return CUDA_SUCCESS;
  });
}

MGM_CU cuDeviceGetAttribute(int* value, int attribute, CUdevice index) {
  return call("cuDeviceGetAttribute", kPlain, [&](Driver& d, Lock&, Context&) -> CUresult {
    Device* device = device_of(d, index);
    if (!device) return CUDA_ERROR_INVALID_DEVICE;
    if (!value || attribute < 1 || attribute > 147) return CUDA_ERROR_INVALID_VALUE;
    const DeviceSpec& s = device->spec;
    switch (attribute) {
      case 1:
        *value = s.max_threads_per_block;
        break;
      case 2:
      case 3:
        *value = 1024;
        break;
      case 4:
        *value = 64;
        break;
      case 5:
        *value = 2147483647;
        break;
      case 6:
      case 7:
        *value = 65535;
        break;
      case 8:
        *value = static_cast<int>(s.shared_per_block);
        break;
      case 9:
        *value = 65536;
        break;
      case 10:
        *value = 32;
        break;
      case 11:
        *value = 2147483647;
        break;
      case 12:
      case 82:
        *value = s.registers_per_sm;
        break;
      case 13:
        *value = 1410000;
        break;  // kHz
      case 14:
        *value = 512;
        break;
      case 15:
        *value = 1;
        break;
      case 16:
        *value = s.sm_count;
        break;
      case 19:
        *value = 1;
        break;
      case 31:
        *value = 1;
        break;
      case 33:
        *value = index + 1;
        break;
      case 36:
        *value = 1215000;
        break;
      case 37:
        *value = 5120;
        break;
      case 38:
        *value = 40 << 20;
        break;
      case 39:
        *value = s.max_threads_per_sm;
        break;
      case 40:
        *value = 2;
        break;
      case 41:
        *value = 1;
        break;
      case 75:
        *value = s.major;
        break;
      case 76:
        *value = s.minor;
        break;
      case 78:
      case 79:
      case 80:
        *value = 1;
        break;
      case 81:
        *value = static_cast<int>(s.shared_per_sm);
        break;
      case 97:
        *value = static_cast<int>(s.shared_per_block_optin);
        break;
      case 99:
        *value = 1;
        break;
      case 106:
        *value = s.max_blocks_per_sm;
        break;
      case 111:
        *value = 1024;
        break;
      case 115:
        *value = 1;
        break;
      // Not in the emulator: 83 managed memory, 91 host pointers on the device, 95 cooperative launch,
      // 102 virtual memory, 120 clusters, 127 tensor maps; nor anything about textures.
      default:
        *value = 0;
    }
    return CUDA_SUCCESS;
  });
}

MGM_CU cuDeviceComputeCapability(int* major, int* minor, CUdevice index) {
  return call("cuDeviceComputeCapability", kPlain, [&](Driver& d, Lock&, Context&) -> CUresult {
    Device* device = device_of(d, index);
    if (!device) return CUDA_ERROR_INVALID_DEVICE;
    if (!major || !minor) return CUDA_ERROR_INVALID_VALUE;
    *major = device->spec.major;
    *minor = device->spec.minor;
    return CUDA_SUCCESS;
  });
}

MGM_CU cuDevicePrimaryCtxRetain(CUcontext* out, CUdevice index) {
  return call("cuDevicePrimaryCtxRetain", kPlain, [&](Driver& d, Lock&, Context&) -> CUresult {
    Device* device = device_of(d, index);
    if (!device) return CUDA_ERROR_INVALID_DEVICE;
    if (!out) return CUDA_ERROR_INVALID_VALUE;
    if (!device->primary) {
      device->primary = make_context(d, *device, true, 0);
      device->primary->active = false;
    }
    ++device->retained;
    if (!device->primary->active) activate(d, device->primary);
    *out = handle_of(device->primary);
    return CUDA_SUCCESS;
  });
}

MGM_CU cuDevicePrimaryCtxRelease_v2(CUdevice index) {
  return release_primary("cuDevicePrimaryCtxRelease_v2", index, false);
}
MGM_CU cuDevicePrimaryCtxRelease(CUdevice index) {
  return cuDevicePrimaryCtxRelease_v2(index);
}
MGM_CU cuDevicePrimaryCtxReset_v2(CUdevice index) {
  return release_primary("cuDevicePrimaryCtxReset_v2", index, true);
}
MGM_CU cuDevicePrimaryCtxReset(CUdevice index) {
  return cuDevicePrimaryCtxReset_v2(index);
}

MGM_CU cuDevicePrimaryCtxGetState(CUdevice index, unsigned* flags, int* active) {
  return call("cuDevicePrimaryCtxGetState", kPlain, [&](Driver& d, Lock&, Context&) -> CUresult {
    Device* device = device_of(d, index);
    if (!device) return CUDA_ERROR_INVALID_DEVICE;
    if (!flags || !active) return CUDA_ERROR_INVALID_VALUE;
    *flags = device->primary ? device->primary->flags : 0;
    *active = device->primary && device->primary->active;
    return CUDA_SUCCESS;
  });
}

MGM_CU cuDevicePrimaryCtxSetFlags_v2(CUdevice index, unsigned flags) {
  return call("cuDevicePrimaryCtxSetFlags_v2", kPlain, [&](Driver& d, Lock&, Context&) -> CUresult {
    Device* device = device_of(d, index);
    if (!device) return CUDA_ERROR_INVALID_DEVICE;
    if (flags & ~0xffu) return CUDA_ERROR_INVALID_VALUE;
    if (!device->primary) {
      device->primary = make_context(d, *device, true, flags);
      device->primary->active = false;
    }
    device->primary->flags = flags;
    return CUDA_SUCCESS;
  });
}
MGM_CU cuDevicePrimaryCtxSetFlags(CUdevice index, unsigned flags) {
  return cuDevicePrimaryCtxSetFlags_v2(index, flags);
}

MGM_CU cuCtxCreate_v2(CUcontext* out, unsigned flags, CUdevice device) {
  return create_context("cuCtxCreate_v2", out, flags, device);
}
MGM_CU cuCtxCreate_v3(CUcontext* out, void* affinity, int count, unsigned flags, CUdevice device) {
  if (affinity || count)
    return misuse("cuCtxCreate_v3", CUDA_ERROR_NOT_SUPPORTED, "no execution affinity here");
  return create_context("cuCtxCreate_v3", out, flags, device);
}
MGM_CU cuCtxCreate_v4(CUcontext* out, void* params, unsigned flags, CUdevice device) {
  if (params) return misuse("cuCtxCreate_v4", CUDA_ERROR_NOT_SUPPORTED, "no creation parameters here");
  return create_context("cuCtxCreate_v4", out, flags, device);
}

MGM_CU cuCtxDestroy_v2(CUcontext handle) {
  return call("cuCtxDestroy_v2", kPlain, [&](Driver& d, Lock& lock, Context&) -> CUresult {
    auto context = d.contexts.find(handle);
    if (!context || context->primary || !context->active) return CUDA_ERROR_INVALID_CONTEXT;
    d.tear_down(lock, *context);
    auto& stack = thread_state().stack;
    if (!stack.empty() && stack.back() == context) stack.pop_back();
    d.contexts.live.erase(context->handle);
    return CUDA_SUCCESS;
  });
}

MGM_CU cuCtxSetCurrent(CUcontext handle) {
  return call("cuCtxSetCurrent", kPlain, [&](Driver& d, Lock&, Context&) -> CUresult {
    auto& stack = thread_state().stack;
    if (!handle) {
      if (!stack.empty()) stack.pop_back();
      return CUDA_SUCCESS;
    }
    auto context = d.contexts.find(handle);
    if (!context) return CUDA_ERROR_INVALID_CONTEXT;
    if (!context->active) return CUDA_ERROR_CONTEXT_IS_DESTROYED;
    if (stack.empty()) stack.emplace_back();
    stack.back() = context;
    return CUDA_SUCCESS;
  });
}

MGM_CU cuCtxGetCurrent(CUcontext* out) {
  return call("cuCtxGetCurrent", kPlain, [&](Driver&, Lock&, Context&) -> CUresult {
    if (!out) return CUDA_ERROR_INVALID_VALUE;
    auto& stack = thread_state().stack;
    *out = stack.empty() ? nullptr : handle_of(stack.back());
    return CUDA_SUCCESS;
  });
}

MGM_CU cuCtxPushCurrent_v2(CUcontext handle) {
  return call("cuCtxPushCurrent_v2", kPlain, [&](Driver& d, Lock&, Context&) -> CUresult {
    auto context = d.contexts.find(handle);
    if (!context) return CUDA_ERROR_INVALID_CONTEXT;
    if (!context->active) return CUDA_ERROR_CONTEXT_IS_DESTROYED;
    thread_state().stack.push_back(context);
    return CUDA_SUCCESS;
  });
}

MGM_CU cuCtxPopCurrent_v2(CUcontext* out) {
  return call("cuCtxPopCurrent_v2", kPlain, [&](Driver&, Lock&, Context&) -> CUresult {
    auto& stack = thread_state().stack;
    if (stack.empty()) return CUDA_ERROR_INVALID_CONTEXT;
    if (out) *out = handle_of(stack.back());
    stack.pop_back();
    return CUDA_SUCCESS;
  });
}

MGM_CU cuCtxGetDevice(CUdevice* device) {
  return call("cuCtxGetDevice", kPlain, [&](Driver&, Lock&, Context&) -> CUresult {
    auto& stack = thread_state().stack;
    if (stack.empty() || !stack.back()) return CUDA_ERROR_INVALID_CONTEXT;
    if (!device) return CUDA_ERROR_INVALID_VALUE;
    *device = stack.back()->device->index;
    return CUDA_SUCCESS;
  });
}

MGM_CU cuCtxGetFlags(unsigned* flags) {
  return call("cuCtxGetFlags", kContext, [&](Driver&, Lock&, Context& context) -> CUresult {
    if (!flags) return CUDA_ERROR_INVALID_VALUE;
    *flags = context.flags;
    return CUDA_SUCCESS;
  });
}

MGM_CU cuCtxGetApiVersion(CUcontext handle, unsigned* version) {
  return call("cuCtxGetApiVersion", kPlain, [&](Driver& d, Lock&, Context&) -> CUresult {
    auto context = d.contexts.find(handle);
    if (handle && !context) return CUDA_ERROR_INVALID_CONTEXT;
    if (!version) return CUDA_ERROR_INVALID_VALUE;
    *version = 3020;
    return CUDA_SUCCESS;
  });
}

namespace mgm::emulator::cuda {
namespace {

CUresult synchronize(Driver& d, Lock& lock, Context& context) {
  bool capturing = false;
  for (auto capture : std::set(d.captures)) {
    if (capture->graph->context.get() != &context) continue;
    d.invalidate(capture);
    capturing = true;
  }
  if (capturing) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  d.wait_context(lock, context);
  return context.error;
}

}  // namespace
}  // namespace mgm::emulator::cuda

MGM_CU cuCtxSynchronize(void) {
  return call("cuCtxSynchronize", kContext, synchronize);
}

// CUDA 13: a context that need not be the current one.
MGM_CU cuCtxSynchronize_v2(CUcontext handle) {
  if (!handle) return cuCtxSynchronize();
  return call("cuCtxSynchronize_v2", kPlain, [&](Driver& d, Lock& lock, Context&) -> CUresult {
    auto context = d.contexts.find(handle);
    if (!context) return CUDA_ERROR_INVALID_CONTEXT;
    if (!context->active) return CUDA_ERROR_CONTEXT_IS_DESTROYED;
    return context->error ? context->error.load() : synchronize(d, lock, *context);
  });
}

MGM_CU cuCtxGetDevice_v2(CUdevice* device, CUcontext handle) {
  if (!handle) return cuCtxGetDevice(device);
  return call("cuCtxGetDevice_v2", kPlain, [&](Driver& d, Lock&, Context&) -> CUresult {
    auto context = d.contexts.find(handle);
    if (!context) return CUDA_ERROR_INVALID_CONTEXT;
    if (!device) return CUDA_ERROR_INVALID_VALUE;
    *device = context->device->index;
    return CUDA_SUCCESS;
  });
}

MGM_CU cuCtxGetStreamPriorityRange(int* least, int* greatest) {
  return call("cuCtxGetStreamPriorityRange", kContext, [&](Driver&, Lock&, Context&) -> CUresult {
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return CUDA_SUCCESS;
  });
}

MGM_CU cuCtxGetLimit(size_t* value, int limit) {
  return call("cuCtxGetLimit", kContext, [&](Driver&, Lock&, Context& context) -> CUresult {
    auto it = context.limits.find(limit);
    if (!value) return CUDA_ERROR_INVALID_VALUE;
    if (it == context.limits.end()) return CUDA_ERROR_UNSUPPORTED_LIMIT;
    *value = it->second;
    return CUDA_SUCCESS;
  });
}

MGM_CU cuCtxSetLimit(int limit, size_t value) {
  return call("cuCtxSetLimit", kContext, [&](Driver&, Lock&, Context& context) -> CUresult {
    auto it = context.limits.find(limit);
    if (it == context.limits.end()) return CUDA_ERROR_UNSUPPORTED_LIMIT;
    it->second = value;
    return CUDA_SUCCESS;
  });
}

MGM_CU cuCtxGetCacheConfig(int* config) {
  return call("cuCtxGetCacheConfig", kContext, [&](Driver&, Lock&, Context& context) -> CUresult {
    if (!config) return CUDA_ERROR_INVALID_VALUE;
    *config = context.cache_config;
    return CUDA_SUCCESS;
  });
}

MGM_CU cuCtxSetCacheConfig(int config) {
  return call("cuCtxSetCacheConfig", kContext, [&](Driver&, Lock&, Context& context) -> CUresult {
    if (config < 0 || config > 3) return CUDA_ERROR_INVALID_VALUE;
    context.cache_config = config;
    return CUDA_SUCCESS;
  });
}

MGM_CU cuDeviceCanAccessPeer(int* can, CUdevice device, CUdevice peer) {
  return call("cuDeviceCanAccessPeer", kPlain, [&](Driver& d, Lock&, Context&) -> CUresult {
    if (!device_of(d, device) || !device_of(d, peer)) return CUDA_ERROR_INVALID_DEVICE;
    if (!can) return CUDA_ERROR_INVALID_VALUE;
    *can = d.peers && device != peer;
    return CUDA_SUCCESS;
  });
}

// For copies, which work without it too: kernels see their own device's memory only.
MGM_CU cuCtxEnablePeerAccess(CUcontext handle, unsigned flags) {
  return call("cuCtxEnablePeerAccess", kContext, [&](Driver& d, Lock&, Context& context) -> CUresult {
    auto peer = d.contexts.find(handle);
    if (!peer || peer->device == context.device) return CUDA_ERROR_INVALID_CONTEXT;
    if (flags) return CUDA_ERROR_INVALID_VALUE;
    if (!d.peers) return CUDA_ERROR_PEER_ACCESS_UNSUPPORTED;
    return context.peers.insert(peer.get()).second ? CUDA_SUCCESS : CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED;
  });
}

MGM_CU cuCtxDisablePeerAccess(CUcontext handle) {
  return call("cuCtxDisablePeerAccess", kContext, [&](Driver& d, Lock&, Context& context) -> CUresult {
    auto peer = d.contexts.find(handle);
    if (!peer) return CUDA_ERROR_INVALID_CONTEXT;
    return context.peers.erase(peer.get()) ? CUDA_SUCCESS : CUDA_ERROR_PEER_ACCESS_NOT_ENABLED;
  });
}

MGM_CU cuProfilerStart(void) {
  return call("cuProfilerStart", kContext, [](Driver&, Lock&, Context&) -> CUresult { return CUDA_SUCCESS; });
}
MGM_CU cuProfilerStop(void) {
  return call("cuProfilerStop", kContext, [](Driver&, Lock&, Context&) -> CUresult { return CUDA_SUCCESS; });
}
