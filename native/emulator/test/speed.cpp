// How fast the emulator is: parsing all the PTX we ship, and a 256 x 256 x 256 bf16 GEMM on one core, without
// and with checks. Times are of the emulator, never of a GPU. Run by `npm run bench:emulator`.
//
//   speed libcuda.so.1 linear.ptx [other.ptx ...]
#include <dlfcn.h>

#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "../../cuda/kernels/linear.h"
#include "../driver/mgm_emulator.h"

namespace {

void* library;

template <class Function>
Function symbol(const char* name) {
  void* address = dlsym(library, name);
  if (!address) {
    std::fprintf(stderr, "%s is not in the library\n", name);
    std::exit(1);
  }
  return reinterpret_cast<Function>(address);
}

template <class... Args>
void call(const char* name, Args... args) {
  const int result = symbol<int (*)(Args...)>(name)(args...);
  if (result != 0) {
    std::fprintf(stderr, "%s failed with %d\n", name, result);
    std::exit(1);
  }
}

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

std::string read(const char* path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

double counter(const std::string& json, const char* name) {
  const size_t at = json.find(std::string("\"") + name + "\":");
  return at == std::string::npos ? 0 : std::atof(json.c_str() + at + std::strlen(name) + 3);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3 || !(library = dlopen(argv[1], RTLD_NOW))) {
    std::fprintf(stderr, "usage: speed libcuda.so.1 linear.ptx [other.ptx ...]\n");
    return 1;
  }
  const auto configure = symbol<int (*)(const char*, const char*)>("mgmEmulatorConfigure");
  using Pointer = unsigned long long;
  call("cuInit", 0u);
  void* context = nullptr;
  call("cuDevicePrimaryCtxRetain", &context, 0);
  call("cuCtxSetCurrent", context);

  void* linear = nullptr;
  size_t bytes = 0;
  const auto parsing = std::chrono::steady_clock::now();
  for (int i = 2; i < argc; ++i) {
    const std::string text = read(argv[i]);
    void* module = nullptr;
    call("cuModuleLoadData", &module, static_cast<const void*>(text.c_str()));
    if (i == 2) linear = module;
    bytes += text.size();
  }
  std::printf("parse    %d modules, %.0f kB of PTX: %.3f s\n", argc - 2, static_cast<double>(bytes) / 1e3,
              seconds_since(parsing));

  constexpr int kSize = 256;
  constexpr mgm::cuda::Tile kTile = mgm::cuda::kTiles[mgm::cuda::kSmall];
  constexpr unsigned kGrid[] = {unsigned{kSize} / kTile.m, unsigned{kSize} / kTile.n};
  constexpr auto kThreads = static_cast<unsigned>(mgm::cuda::threads_of(mgm::cuda::kSmall));
  constexpr int kShared = mgm::cuda::tile_shared_bytes(mgm::cuda::kSmall, mgm::cuda::WeightType::half);
  Pointer x = 0, w = 0, out = 0;
  call("cuMemAlloc_v2", &x, size_t{kSize * kSize * 2});
  call("cuMemAlloc_v2", &w, size_t{kSize * kSize * 2});
  call("cuMemAlloc_v2", &out, size_t{kSize * kSize * 4});
  std::vector<uint16_t> ones(kSize * kSize, 0x3f80);  // 1.0 in bf16
  call("cuMemcpyHtoD_v2", x, static_cast<const void*>(ones.data()), ones.size() * 2);
  call("cuMemcpyHtoD_v2", w, static_cast<const void*>(ones.data()), ones.size() * 2);
  void* kernel = nullptr;
  call("cuModuleGetFunction", &kernel, linear, "linear_bf16_small");
  constexpr int kMaxDynamicShared = 8;  // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
  call("cuFuncSetAttribute", kernel, kMaxDynamicShared, kShared);

  mgm::cuda::LinearParams params{};
  params.x = reinterpret_cast<const void*>(x);
  params.w = reinterpret_cast<const uint8_t*>(w);  // all ones: in any order
  params.x_stride = params.m = params.k = kSize;
  params.panels = static_cast<int>(mgm::cuda::panels_of(kSize, false));
  params.blocks = static_cast<int>(mgm::cuda::blocks_of(kSize));
  params.epilogue.out = reinterpret_cast<void*>(out);
  params.epilogue.outputs = kSize;
  params.epilogue.residual_rows = 1;
  params.epilogue.out_f32 = params.epilogue.aligned = true;
  void* arguments[] = {&params};
  configure("threads", "1");
  for (const char* checks : {"0", "1"}) {
    configure("checks", checks);
    double best = 1e9;
    for (int round = 0; round < 3; ++round) {
      const auto start = std::chrono::steady_clock::now();
      call("cuLaunchKernel", kernel, kGrid[0], kGrid[1], 1u, kThreads, 1u, 1u, static_cast<unsigned>(kShared),
           static_cast<void*>(nullptr), arguments, static_cast<void**>(nullptr));
      call("cuCtxSynchronize");
      best = std::fmin(best, seconds_since(start));
    }
    // One more launch with counters, not timed, tells how many warp instructions that was.
    configure("counters", "1");
    call("cuLaunchKernel", kernel, kGrid[0], kGrid[1], 1u, kThreads, 1u, 1u, static_cast<unsigned>(kShared),
         static_cast<void*>(nullptr), arguments, static_cast<void**>(nullptr));
    call("cuCtxSynchronize");
    configure("counters", "0");
    std::string json(1 << 16, '\0');
    symbol<int (*)(int, char*, int)>("mgmEmulatorLaunch")(0, json.data(), static_cast<int>(json.size()));
    const double instructions = counter(json, "warpInstructions");
    std::printf(
        "gemm     256 x 256 x 256 bf16, one thread, checks %s: %.3f s, %.1f million warp instructions/s "
        "(%.0f)\n",
        *checks == '1' ? "on " : "off", best, instructions / best / 1e6, instructions);
  }
  float result = 0;
  call("cuMemcpyDtoH_v2", static_cast<void*>(&result), out + 4 * (kSize * kSize - 1), size_t{4});
  if (result != kSize) {
    std::fprintf(stderr, "expected %d in the last place but received %g\n", kSize, result);
    return 1;
  }
  return 0;
}
