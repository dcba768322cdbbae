#include <algorithm>

#include "exec.h"
#include "numeric.h"

namespace mgm::emulator {

LaunchResult launch_kernel(const Kernel& k, const LaunchConfig& config, const std::byte* params,
                           const DeviceSpec& spec, Memory& memory, const Options& options);

namespace {

class ModuleImpl final : public Module {
 public:
  explicit ModuleImpl(Memory& memory) : memory_(memory) {}
  ~ModuleImpl() override {
    for (auto& [name, where] : globals) memory_.free(where.first, nullptr);
  }
  std::vector<FunctionInfo> functions() const override {
    std::vector<FunctionInfo> out;
    for (const Kernel& k : kernels) out.push_back(k.info);
    return out;
  }
  int find_function(std::string_view name) const override {
    for (size_t i = 0; i < kernels.size(); ++i)
      if (kernels[i].info.name == name) return static_cast<int>(i);
    return -1;
  }
  bool find_global(std::string_view name, uint64_t* address, size_t* bytes) const override {
    auto it = globals.find(std::string(name));
    if (it == globals.end()) return false;
    if (address) *address = it->second.first;
    if (bytes) *bytes = it->second.second;
    return true;
  }
  std::vector<Kernel> kernels;
  std::map<std::string, std::pair<uint64_t, size_t>> globals;

 private:
  Memory& memory_;
};

// Newest PTX .version that a driver of this number loads.
int newest_ptx(int driver) {
  static const std::pair<int, int> table[] = {
      {11000, 70}, {11010, 71}, {11020, 72}, {11030, 73}, {11040, 74}, {11050, 75}, {11060, 76},
      {11070, 77}, {11080, 78}, {12000, 80}, {12010, 81}, {12020, 82}, {12030, 83}, {12040, 84},
      {12050, 85}, {12060, 85}, {12070, 86}, {12080, 87}, {12090, 88}, {13000, 90}, {13010, 91}};
  int best = 65;
  for (auto [d, v] : table)
    if (driver >= d) best = v;
  return best;
}

void fill(const Variable& v, const std::map<std::string, std::pair<uint64_t, size_t>>& globals,
          std::byte* to) {
  for (size_t i = 0; i < v.init.size(); ++i) {
    const Initializer& x = v.init[i];
    std::byte* at = to + i * v.element;
    if (!x.symbol.empty()) {
      auto it = globals.find(x.symbol);
      if (it == globals.end())
        throw PtxError(v.line, "unknown name '" + x.symbol + "' in the initial value of '" + v.name + "'");
      if (v.element != 8)
        throw PtxError(v.line, "an address needs 64 bits in the initial value of '" + v.name + "'");
      uint64_t a = it->second.first + static_cast<uint64_t>(x.value);
      std::memcpy(at, &a, 8);
    } else if (v.type == "f32") {
      float f = static_cast<float>(x.real);
      std::memcpy(at, &f, 4);
    } else if (v.type == "f64") {
      std::memcpy(at, &x.real, 8);
    } else if (v.type == "f16" && x.is_float) {
      uint16_t h = to_half(x.real);
      std::memcpy(at, &h, 2);
    } else if (x.is_float) {
      float f = static_cast<float>(x.real);
      if (v.element != 4)
        throw PtxError(v.line, "a float does not fit the initial value of '" + v.name + "'");
      std::memcpy(at, &f, 4);
    } else {
      std::memcpy(at, &x.value, v.element);
    }
  }
}

}  // namespace

std::shared_ptr<Module> Module::load(std::string_view text, const DeviceSpec& spec, Memory& memory,
                                     std::string* log, int* error) {
  auto fail = [&](int code, int line, const std::string& message) {
    if (log) *log += "line " + std::to_string(line) + ": " + message + "\n";
    if (error) *error = code;
    return nullptr;
  };
  if (error) *error = 0;
  try {
    PtxModule ptx = parse_ptx(text);
    int newest = newest_ptx(spec.driver_version);
    auto dotted = [](int v) { return std::to_string(v / 10) + "." + std::to_string(v % 10); };
    if (ptx.version > newest)
      return fail(222, 1,
                  "unsupported .version " + dotted(ptx.version) + "; the driver " +
                      std::to_string(spec.driver_version) + " knows up to " + dotted(newest));
    int capability = spec.major * 10 + spec.minor;
    if (ptx.target > capability || (ptx.arch_specific && ptx.target != capability))
      return fail(209, 1,
                  "target sm_" + std::to_string(ptx.target) + (ptx.arch_specific ? "a" : "") +
                      " does not run on this device, sm_" + std::to_string(capability));
    auto m = std::make_shared<ModuleImpl>(memory);
    size_t const_bytes = 0;
    for (const Variable& v : ptx.variables) {
      if (v.space == Space::shared) continue;
      if (v.space != Space::global && v.space != Space::constant)
        throw PtxError(v.line, "variable '" + v.name + "' has a state space that modules cannot have");
      if (v.is_extern) throw PtxError(v.line, "unresolved extern variable '" + v.name + "'");
      if (v.space == Space::constant) const_bytes += v.bytes();
      if (const_bytes > (64 << 10)) throw PtxError(v.line, "constant memory of the module exceeds 64 KB");
      uint64_t at = memory.allocate(std::max<size_t>(v.bytes(), 1));
      if (!at) return fail(2, v.line, "out of memory for '" + v.name + "'");
      if (m->globals.count(v.name)) throw PtxError(v.line, "'" + v.name + "' is defined twice");
      m->globals[v.name] = {at, v.bytes()};
    }
    for (const Variable& v : ptx.variables) {
      if (v.space == Space::shared) continue;
      uint64_t at = m->globals[v.name].first;
      std::byte* data = memory.resolve(at, v.bytes());
      std::memset(data, 0, v.bytes());
      fill(v, m->globals, data);
      memory.mark_initialized(at, v.bytes());
    }
    for (const Function& f : ptx.functions) {
      if (!f.entry || !f.defined) continue;
      if (m->find_function(f.name) >= 0) throw PtxError(f.line, "'" + f.name + "' is defined twice");
      Decoder d(ptx, spec, m->globals);
      Kernel k = d.kernel(f);
      k.info.const_bytes = const_bytes;
      if (k.static_shared > spec.shared_per_block)
        throw PtxError(f.line, "'" + f.name + "' uses " + std::to_string(k.static_shared) +
                                   " bytes of static shared memory; the limit is " +
                                   std::to_string(spec.shared_per_block));
      m->kernels.push_back(std::move(k));
    }
    return m;
  } catch (const PtxError& e) {
    return fail(e.code, e.line, e.what());
  }
}

LaunchResult launch(Module& module, int function, const LaunchConfig& config, const std::byte* params,
                    const DeviceSpec& spec, Memory& memory, const Options& options) {
  ModuleImpl& m = static_cast<ModuleImpl&>(module);
  if (function < 0 || static_cast<size_t>(function) >= m.kernels.size()) {
    LaunchResult r;
    r.error = 400;
    return r;
  }
  return launch_kernel(m.kernels[static_cast<size_t>(function)], config, params, spec, memory, options);
}

}  // namespace mgm::emulator
