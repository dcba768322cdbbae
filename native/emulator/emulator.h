// The emulated GPU without its driver API: memory, modules, launches. Test equipment, never shipped.
//
// native/emulator/core/   implements this header: PTX front end, executor, memory with shadow state, reports.
// native/emulator/driver/ implements libcuda.so.1 on top: contexts, streams, events, graphs, every cu* entry
// point.
//
// The core is synchronous: launch() returns when the grid is done. Order and delay between operations belong
// to the driver part.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace mgm::emulator {

// What a device claims to be. Presets by capability in core/spec.cpp: 80, 86, 89, 90, 100, 120.
struct DeviceSpec {
  std::string name;
  int major = 8, minor = 0;
  int sm_count = 108;
  size_t memory_bytes = size_t{2} << 30;
  int max_threads_per_block = 1024;
  int max_threads_per_sm = 2048;
  int max_blocks_per_sm = 32;
  int registers_per_sm = 65536;
  size_t shared_per_block = 48 << 10;         // without opt-in
  size_t shared_per_block_optin = 163 << 10;  // with cuFuncSetAttribute
  size_t shared_per_sm = 164 << 10;
  int driver_version = 13000;  // what cuDriverGetVersion says; decides which PTX .version loads
};
DeviceSpec device_spec(int capability);

// How mma.sync adds up its products: exactly (rounded once), as the tensor cores of the device's generation
// do (cut off while they are aligned), or in f32 in an order drawn anew for each instruction.
enum class MmaSum : uint8_t { exact, hardware, permuted };

// How strictly and in which order things run. From the environment (MGM_EMULATOR_*), see core/options.cpp.
struct Options {
  uint64_t seed = 0;      // schedule of warps and blocks, delays, poison
  bool checks = true;     // memory, race, init and sync checks; off: the fast mode
  bool counters = false;  // sectors, bank conflicts, instruction classes
  int threads = 0;        // that blocks spread over; 0: all cores
  uint64_t sample = 0;    // run so many blocks of a larger grid, spread over it: for counters only; 0: all
  double watchdog_seconds = 60;
  MmaSum mma = MmaSum::exact;
};
// MGM_EMULATOR_SEED, _CHECKS, _COUNTERS, _THREADS, _SAMPLE, _WATCHDOG, each a number, and _MMA, a name of
// MmaSum. Throws std::runtime_error for anything else.
Options options_from_environment();
// False for an unknown name.
bool parse_mma_sum(std::string_view name, MmaSum* mma);

enum class ReportKind {
  out_of_bounds,
  misaligned,
  uninitialized_read,
  use_after_free,
  invalid_free,
  leak,
  shared_race,
  divergent_barrier,
  bad_mask,
  deadlock,
  trap,
  assertion,
  illegal_instruction,
  invalid_launch,
  host_access,
  api_misuse,
};
const char* report_name(ReportKind kind);

// One finding. A launch stops at its first fatal one, as the hardware faults.
struct Report {
  ReportKind kind;
  std::string message;  // complete sentence with kernel, block, thread, PTX line and address where they apply
  std::string kernel;
  uint32_t block[3] = {}, thread[3] = {};
  int ptx_line = 0;
  uint64_t address = 0;
};

struct Counters {
  uint64_t blocks = 0;  // that ran
  uint64_t warp_instructions = 0;
  std::map<std::string, uint64_t> by_class;  // "fma", "mma", "ld.global", "bar", ...
  uint64_t tensor_flops = 0;
  uint64_t global_sectors_requested = 0,
           global_sectors_touched = 0;  // 32-byte sectors: lanes' bytes / 32 at best, and as accessed
  uint64_t shared_accesses = 0, shared_conflict_cycles = 0;
  std::map<int, uint64_t> conflicts_by_line;  // of the PTX
  uint64_t barriers = 0;
};

// Device memory in an address range of its own, which the host cannot dereference (addresses are not host
// pointers). Every allocation is poisoned and fenced by red zones; every byte has an "initialized" bit.
// Thread safe.
class Memory {
 public:
  explicit Memory(const DeviceSpec& spec, int device_index);
  ~Memory();
  Memory(const Memory&) = delete;

  // 0 if it does not fit in memory_bytes. 256-byte aligned.
  uint64_t allocate(size_t bytes);
  // False (and a report) for an address that is not the start of a live allocation. Freed ranges are not
  // reused soon.
  bool free(uint64_t address, std::vector<Report>* reports);
  size_t used() const;
  size_t total() const;

  // Host copies: nullptr unless [address, address + bytes) lies in one live allocation. The pointer is valid
  // until it is freed.
  std::byte* resolve(uint64_t address, size_t bytes);
  // Base and size of the live allocation around `address`; false if none.
  bool find(uint64_t address, uint64_t* base, size_t* bytes) const;
  void mark_initialized(uint64_t address, size_t bytes);
  // First byte in the range never written, or -1.
  int64_t first_uninitialized(uint64_t address, size_t bytes) const;
  // Host-mapped (pinned) memory made visible to the device at the returned address.
  uint64_t map_host(void* host, size_t bytes);
  bool unmap_host(uint64_t address);

  struct Impl;
  Impl& impl() { return *impl_; }

 private:
  std::unique_ptr<Impl> impl_;
};

struct Param {
  size_t offset, size, align;
};

struct FunctionInfo {
  std::string name;
  std::vector<Param> params;
  size_t param_bytes = 0;
  size_t static_shared = 0, local_bytes = 0, const_bytes = 0;
  int registers =
      0;  // of ptxas if the module carries them (see Module::load), else an estimate; for launch limits
  int max_threads = 1024;
  int ptx_version = 0, target = 0;  // 70 = .version 7.0; 80 = sm_80
};

class Module {
 public:
  // Parses PTX (or a NUL-terminated string). On failure returns nullptr, fills `log` with "line N: ..."
  // naming the opcode, modifier or directive, and sets `error` to the CUresult a driver would return (218
  // invalid PTX, 222 unsupported version, 209 no binary for device).
  static std::shared_ptr<Module> load(std::string_view ptx, const DeviceSpec& spec, Memory& memory,
                                      std::string* log, int* error);
  virtual ~Module() = default;
  virtual std::vector<FunctionInfo> functions() const = 0;
  virtual int find_function(std::string_view name) const = 0;  // -1: none
  virtual bool find_global(std::string_view name, uint64_t* address, size_t* bytes) const = 0;
};

struct LaunchConfig {
  uint32_t grid[3] = {1, 1, 1}, block[3] = {1, 1, 1};
  size_t dynamic_shared = 0;
  size_t max_dynamic_shared = 0;  // opted in by cuFuncSetAttribute; 0: the default limit holds
};

struct LaunchResult {
  int error = 0;  // CUresult: 0, 1 invalid value, 700 illegal address, 701 out of resources, 715 illegal
                  // instruction, 716 misaligned, 719 launch failed, 710 assert
  std::vector<Report> reports;
  Counters counters;
};

// `params` holds param_bytes bytes laid out as FunctionInfo::params says.
LaunchResult launch(Module& module, int function, const LaunchConfig& config, const std::byte* params,
                    const DeviceSpec& spec, Memory& memory, const Options& options);

}  // namespace mgm::emulator
