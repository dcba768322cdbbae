// How long the emulator takes to parse PTX. Run by `npm run bench:emulator` over all that is shipped.
//
//   speed libcuda.so.1 kernels.ptx [...]
#include <dlfcn.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <string>

namespace {

void* library;

template <class... Args>
void call(const char* name, Args... args) {
  void* address = dlsym(library, name);
  const int result = address ? reinterpret_cast<int (*)(Args...)>(address)(args...) : -1;
  if (result == 0) return;
  std::fprintf(stderr, "%s failed with %d\n", name, result);
  std::exit(1);
}

std::string read(const char* path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3 || !(library = dlopen(argv[1], RTLD_NOW))) {
    std::fprintf(stderr, "usage: speed libcuda.so.1 kernels.ptx [...]\n");
    return 1;
  }
  call("cuInit", 0u);
  void* context = nullptr;
  call("cuDevicePrimaryCtxRetain", &context, 0);
  call("cuCtxSetCurrent", context);
  size_t bytes = 0;
  const auto start = std::chrono::steady_clock::now();
  for (int i = 2; i < argc; ++i) {
    const std::string text = read(argv[i]);
    void* module = nullptr;
    call("cuModuleLoadData", &module, static_cast<const void*>(text.c_str()));
    bytes += text.size();
  }
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  std::printf("parse    %d modules, %.0f kB of PTX: %.3f s\n", argc - 2, static_cast<double>(bytes) / 1e3,
              seconds.count());
}
