// Runs the Triton kernels of test/fixtures/triton (made by tools/triton_fixtures.py) through the driver API:
// PyTorch's results under three schedules, all checks on, no report. Two planted bugs show that the checks
// look at this code too.
//
//   foreign_test [libcuda.so.1 [fixture folder [kernel]]]
//
// With a real libcuda.so.1 it compares results only: the same fixtures then judge the emulator's
// expectations. Kernels whose parameters are buffers (zeros in, nothing compared) run for their counters:
// bench/kernels.
#include <dlfcn.h>

#include <algorithm>
#include <bit>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../driver/cuda_abi.h"
#include "../driver/mgm_emulator.h"

#ifndef MGM_LIBCUDA
#define MGM_LIBCUDA "libcuda.so.1"
#endif
#ifndef MGM_FIXTURES
#define MGM_FIXTURES "test/fixtures/triton"
#endif

namespace {

// As much of JSON as index.json has: no escapes in strings, nothing empty.
struct Json {
  double number = 0;
  std::string text;
  std::vector<Json> items;
  std::vector<std::pair<std::string, Json>> fields;

  const Json* find(const char* name) const {
    for (auto& [key, value] : fields)
      if (key == name) return &value;
    return nullptr;
  }
  const Json& operator[](const char* name) const {
    if (const Json* value = find(name)) return *value;
    throw std::runtime_error(std::string("index.json: expected a field '") + name + "'");
  }
};

class JsonReader {
 public:
  explicit JsonReader(const std::string& text) : p_(text.c_str()) {}

  Json value() {
    Json out;
    switch (peek()) {
      case '{':
        do {
          ++p_;
          std::string key = string();
          expect(':');
          out.fields.emplace_back(key, value());
        } while (peek() == ',');
        expect('}');
        return out;
      case '[':
        do {
          ++p_;
          out.items.push_back(value());
        } while (peek() == ',');
        expect(']');
        return out;
      case '"':
        out.text = string();
        return out;
      default: {
        char* end = nullptr;
        out.number = std::strtod(p_, &end);
        if (end == p_) fail("a number");
        p_ = end;
        return out;
      }
    }
  }

 private:
  char peek() {
    while (*p_ == ' ' || *p_ == '\n') ++p_;
    return *p_;
  }
  void expect(char c) {
    if (peek() != c) fail(std::string(1, c));
    ++p_;
  }
  std::string string() {
    expect('"');
    const char* end = std::strchr(p_, '"');
    if (!end) fail("a closing quote");
    std::string out(p_, end);
    p_ = end + 1;
    return out;
  }
  [[noreturn]] void fail(const std::string& expected) {
    throw std::runtime_error("index.json: expected " + expected + " but received '" +
                             std::string(p_).substr(0, 20) + "'");
  }
  const char* p_;
};

std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot read " + path);
  return {std::istreambuf_iterator<char>(file), {}};
}

// The driver.

void* library = nullptr;

template <class F>
F* symbol(const char* name) {
  void* found = dlsym(library, name);
  if (!found) throw std::runtime_error(std::string("libcuda.so.1 has no ") + name);
  return reinterpret_cast<F*>(found);
}

struct DriverError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <class... Args>
void cu(const char* name, Args... args) {
  CUresult result = symbol<CUresult(Args...)>(name)(args...);
  if (result == CUDA_SUCCESS) return;
  const char* text = nullptr;
  symbol<CUresult(CUresult, const char**)>("cuGetErrorName")(result, &text);
  throw DriverError(std::string(name) + ": " + (text ? text : std::to_string(result)));
}

// The emulator's own functions; a real driver has none of them.
bool emulated() {
  return dlsym(library, "mgmEmulatorVersion") != nullptr;
}

void configure(const char* key, const std::string& value) {
  if (emulated() && symbol<decltype(mgmEmulatorConfigure)>("mgmEmulatorConfigure")(key, value.c_str()))
    throw std::runtime_error(std::string("the emulator refused ") + key + " = " + value);
}

int report_count() {
  return emulated() ? symbol<decltype(mgmEmulatorReportCount)>("mgmEmulatorReportCount")(nullptr) : 0;
}

void reset_reports() {
  if (emulated()) symbol<decltype(mgmEmulatorResetReports)>("mgmEmulatorResetReports")();
}

// Elements.

size_t element_size(const std::string& dtype) {
  if (dtype == "float32" || dtype == "int32") return 4;
  if (dtype == "int64") return 8;
  if (dtype == "float16" || dtype == "bfloat16") return 2;
  if (dtype == "int8") return 1;
  throw std::runtime_error("index.json: unknown dtype '" + dtype + "'");
}

template <class T>
T load(const std::string& bytes, size_t i) {
  T value;
  std::memcpy(&value, bytes.data() + i * sizeof(T), sizeof(T));
  return value;
}

double element(const std::string& bytes, size_t i, const std::string& dtype) {
  if (dtype == "float32") return load<float>(bytes, i);
  if (dtype == "int32") return load<int32_t>(bytes, i);
  if (dtype == "int8") return load<int8_t>(bytes, i);
  uint16_t bits = load<uint16_t>(bytes, i);
  if (dtype == "bfloat16") return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
  int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  double magnitude = exponent == 31 ? (mantissa ? NAN : INFINITY)
                     : exponent     ? std::ldexp(1024 + mantissa, exponent - 25)
                                    : std::ldexp(mantissa, -24);
  return bits & 0x8000 ? -magnitude : magnitude;
}

// Empty if every |got - want| <= atol + rtol |want|; equal infinities and two NaNs agree.
std::string difference(const std::string& got, const std::string& want, const std::string& dtype, double atol,
                       double rtol) {
  if (dtype == "int64") return got == want ? "" : "other bytes than expected";  // a double does not hold them
  size_t wrong = 0, n = want.size() / element_size(dtype);
  std::string first;
  for (size_t i = 0; i < n; ++i) {
    double g = element(got, i, dtype), w = element(want, i, dtype);
    if (g == w || (std::isnan(g) && std::isnan(w)) || std::fabs(g - w) <= atol + rtol * std::fabs(w))
      continue;
    if (!wrong++) {
      char text[128];
      std::snprintf(text, sizeof text, "element %zu is %.9g, expected %.9g", i, g, w);
      first = text;
    }
  }
  return wrong ? std::to_string(wrong) + " of " + std::to_string(n) + " differ: " + first : "";
}

// Runs.

struct Argument {
  const Json* param = nullptr;
  std::string bytes;  // contents before, then after the launch
  std::string expected;
  uint64_t value = 0;  // what the kernel receives: a device pointer or the scalar's bits
};

// One launch in a context of its own; returns what is wrong with the results, driver errors included.
std::string run(const Json& kernel, const std::string& ptx, const std::string& folder) {
  std::vector<Argument> arguments;
  for (const Json& param : kernel["params"].items) {
    Argument& a = arguments.emplace_back();
    a.param = &param;
    const std::string& kind = param["kind"].text;
    if (kind == "in") {
      a.bytes = read_file(folder + "/" + param["file"].text);
    } else if (kind == "out") {
      a.expected = read_file(folder + "/" + param["file"].text);
      if (const Json* initial = param.find("initial")) a.bytes = read_file(folder + "/" + initial->text);
    } else if (kind == "i32") {
      a.value = static_cast<uint32_t>(static_cast<int32_t>(param["value"].number));
    } else if (kind == "f32") {
      a.value = std::bit_cast<uint32_t>(static_cast<float>(param["value"].number));
    } else if (kind != "null" && kind != "buffer") {
      throw std::runtime_error("index.json: unknown kind '" + kind + "'");
    }
    if (kind != "in" && kind != "out" && kind != "buffer") continue;
    size_t bytes = element_size(param["dtype"].text);
    for (const Json& size : param["shape"].items) bytes *= static_cast<size_t>(size.number);
    if (kind == "buffer") a.bytes.assign(bytes, 0);
    for (const std::string* data : {&a.bytes, &a.expected})
      if (!data->empty() && data->size() != bytes)
        throw std::runtime_error(param["name"].text + ": expected " + std::to_string(bytes) +
                                 " bytes in its file");
  }

  CUcontext context = nullptr;
  cu("cuDevicePrimaryCtxRetain", &context, CUdevice{0});
  std::string wrong;
  try {
    cu("cuCtxSetCurrent", context);
    CUmodule module = nullptr;
    std::vector<char> log(8192);
    int options[] = {5, 6};  // CU_JIT_ERROR_LOG_BUFFER and its size
    void* values[] = {log.data(), reinterpret_cast<void*>(log.size())};
    try {
      cu("cuModuleLoadDataEx", &module, static_cast<const void*>(ptx.c_str()), 2u, +options, +values);
    } catch (const DriverError& error) {
      throw DriverError(std::string(error.what()) + ": " + log.data());
    }
    CUfunction function = nullptr;
    cu("cuModuleGetFunction", &function, module, kernel["kernel"].text.c_str());
    auto shared = static_cast<unsigned>(kernel["shared"].number);
    if (shared > 48 << 10) cu("cuFuncSetAttribute", function, 8, static_cast<int>(shared));

    CUstream stream = nullptr;
    cu("cuStreamCreate", &stream, 1u);
    std::vector<void*> params;
    for (Argument& a : arguments) {
      size_t bytes = a.expected.empty() ? a.bytes.size() : a.expected.size();
      if (bytes) cu("cuMemAlloc_v2", static_cast<CUdeviceptr*>(&a.value), bytes);
      // Results without initial contents stay undefined: the kernel must write every element.
      if (!a.bytes.empty())
        cu("cuMemcpyHtoDAsync_v2", CUdeviceptr{a.value}, static_cast<const void*>(a.bytes.data()), bytes,
           stream);
      params.push_back(&a.value);
    }
    auto dim = [&](const char* name, size_t i) {
      return static_cast<unsigned>(kernel[name].items.at(i).number);
    };
    cu("cuLaunchKernel", function, dim("grid", 0), dim("grid", 1), dim("grid", 2), dim("block", 0),
       dim("block", 1), dim("block", 2), shared, stream, params.data(), static_cast<void**>(nullptr));
    for (Argument& a : arguments) {
      if (a.expected.empty()) continue;
      a.bytes.resize(a.expected.size());
      cu("cuMemcpyDtoHAsync_v2", static_cast<void*>(a.bytes.data()), CUdeviceptr{a.value}, a.bytes.size(),
         stream);
    }
    cu("cuStreamSynchronize", stream);
    for (Argument& a : arguments) {
      if (!a.bytes.empty()) cu("cuMemFree_v2", CUdeviceptr{a.value});
      if (a.expected.empty()) continue;
      const Json& p = *a.param;
      std::string difference_of =
          difference(a.bytes, a.expected, p["dtype"].text, p["atol"].number, p["rtol"].number);
      if (!difference_of.empty())
        wrong += (wrong.empty() ? "" : "; ") + p["name"].text + ": " + difference_of;
    }
    cu("cuStreamDestroy_v2", stream);
    cu("cuModuleUnload", module);
  } catch (const DriverError& error) {
    wrong = error.what();
  }
  cu("cuCtxSetCurrent", CUcontext{nullptr});
  cu("cuDevicePrimaryCtxRelease_v2", CUdevice{0});
  return wrong;
}

int passed = 0, failed = 0;

void judge(const std::string& name, const std::string& wrong) {
  ++(wrong.empty() ? passed : failed);
  if (!wrong.empty()) std::printf("FAILED %s: %s\n", name.c_str(), wrong.c_str());
  std::fflush(stdout);
}

std::string first_report() {
  char text[1024] = "";
  symbol<decltype(mgmEmulatorReport)>("mgmEmulatorReport")(0, text, sizeof text);
  return text;
}

constexpr int kSeeds[] = {1, 2, 3};

void run_seeds(const Json& kernel, const std::string& folder) {
  std::string ptx = read_file(folder + "/" + kernel["ptx"].text);
  const auto& params = kernel["params"].items;
  bool compared = std::any_of(params.begin(), params.end(),
                              [](const Json& param) { return param["kind"].text == "out"; });
  for (int seed : kSeeds) {
    configure("seed", std::to_string(seed));
    reset_reports();
    auto start = std::chrono::steady_clock::now();
    std::string wrong = run(kernel, ptx, folder);
    double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    if (int reports = report_count())
      wrong +=
          (wrong.empty() ? "" : "; ") + std::to_string(reports) + " reports, the first: " + first_report();
    std::string name = kernel["name"].text + ", seed " + std::to_string(seed);
    if (wrong.empty()) std::printf("%-28s %6.2f s\n", name.c_str(), seconds);
    judge(name, wrong);
    if (!compared) break;
  }
}

// The kernel without one kind of instruction that orders accesses to shared memory: reported as a race, or as
// a read of what is not written yet, under every seed.
void run_without(const Json& kernel, const std::string& folder, const std::string& instruction) {
  std::string ptx = read_file(folder + "/" + kernel["ptx"].text);
  size_t removed = 0;
  for (size_t at = 0; (at = ptx.find(instruction, at)) != std::string::npos; ++removed) {
    size_t begin = ptx.rfind('\n', at) + 1;
    ptx.erase(begin,
              ptx.find('\n', at) - begin);  // the line stays, empty: numbers in reports keep their meaning
    at = begin;
  }
  for (int seed : kSeeds) {
    configure("seed", std::to_string(seed));
    reset_reports();
    std::string ended = run(kernel, ptx, folder);
    std::string report = first_report(), wrong;
    bool named =
        report.find("race") != std::string::npos || report.find("uninitialized") != std::string::npos;
    if (!removed)
      wrong = "nothing to remove";
    else if (report.empty())
      wrong = "no report; " + ended;
    else if (!named || report.find("shared") == std::string::npos)
      wrong = "reported as something else: " + report;
    judge(kernel["name"].text + " without " + instruction + ", seed " + std::to_string(seed), wrong);
  }
}

// The judge itself: half of the tolerance passes, twice the tolerance does not, nor does NaN.
void check_difference() {
  auto bytes = [](float value) { return std::string(reinterpret_cast<const char*>(&value), sizeof value); };
  bool right = difference(bytes(2.25f), bytes(2), "float32", 0.1, 0.2).empty() &&
               !difference(bytes(3), bytes(2), "float32", 0.1, 0.2).empty() &&
               !difference(bytes(NAN), bytes(2), "float32", 0.1, 0.2).empty() &&
               !difference(bytes(2), bytes(NAN), "float32", 0.1, 0.2).empty() &&
               difference(bytes(-INFINITY), bytes(-INFINITY), "float32", 0, 0).empty() &&
               !difference(bytes(1), bytes(INFINITY), "float32", 0, 0).empty() &&
               element(std::string("\x01\x00\x00\xbc\xff\x7b", 6), 0, "float16") == std::ldexp(1, -24) &&
               element(std::string("\x01\x00\x00\xbc\xff\x7b", 6), 1, "float16") == -1 &&
               element(std::string("\x01\x00\x00\xbc\xff\x7b", 6), 2, "float16") == 65504;
  judge("the comparison", right ? "" : "accepts or refuses the wrong values");
}

}  // namespace

int main(int argc, char** argv) {
  try {
    const char* path = argc > 1 ? argv[1] : MGM_LIBCUDA;
    std::string folder = argc > 2 ? argv[2] : MGM_FIXTURES;
    library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!library) throw std::runtime_error(dlerror());
    cu("cuInit", 0u);
    configure("checks", "1");
    std::printf("%s device\n", emulated() ? "emulated" : "real");
    check_difference();
    std::string index = read_file(folder + "/index.json");
    Json cases = JsonReader(index).value();
    bool found = argc <= 3;
    for (const Json& kernel : cases["cases"].items) {
      if (argc > 3 && kernel["name"].text != argv[3]) continue;
      found = true;
      run_seeds(kernel, folder);
      if (!emulated()) continue;
      if (kernel["name"].text == "softmax") run_without(kernel, folder, "bar.sync");
      if (kernel["name"].text == "matmul_f16") run_without(kernel, folder, "cp.async.wait_group");
    }
    if (!found) throw std::runtime_error(std::string("no kernel ") + argv[3] + " in index.json");
  } catch (const std::exception& error) {
    std::printf("FAILED: %s\n", error.what());
    ++failed;
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed ? 1 : 0;
}
