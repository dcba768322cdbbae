// Provokes the refusals of the CUDA backend's host side that no JavaScript can: mistakes of launchers and of
// callers inside the addon. Prints a line for each; test/cuda/driver.test.ts reads them.
#include <cstdio>
#include <functional>
#include <vector>

#include "../../runtime/error.h"
#include "../context.h"
#include "../device.h"

using namespace mgm;
using namespace mgm::cuda;

namespace {

void say(const std::function<void()>& body) {
  try {
    body();
    std::puts("ok");
  } catch (const Error& error) {
    std::printf("%s %s\n", error.code().c_str(), error.what());
  }
}

}  // namespace

int main() {
  const std::shared_ptr<Context> context = Context::open(0);
  context->use();
  const KernelEntry& entry = kernel_entries().front();
  const Kernel some{entry.family, entry.name};
  const std::vector<std::byte> params(entry.param_bytes + 8);
  const auto launch = [&](const Kernel& kernel, Grid grid, size_t bytes, size_t dynamic_shared) {
    say([&] { context->launch(kernel, grid, 32, dynamic_shared, params.data(), bytes, nullptr); });
  };
  launch({entry.family, "nobody"}, {1}, entry.param_bytes, 0);
  launch(some, {1}, entry.param_bytes + 8, 0);
  launch(some, {1}, entry.param_bytes, size_t{1} << 20);
  launch(some, {1, 65536}, entry.param_bytes, 0);
  launch(some, {-1}, entry.param_bytes, 0);
  launch(some, {0}, entry.param_bytes, 0);  // of an empty tensor: nothing to do
  context->leave();

  const std::shared_ptr<mgm::Device> one = open_device(0, 0), other = open_device(0, 0);
  say([&] { one->end_capture(); });
  one->begin_capture();
  const std::shared_ptr<Graph> graph = one->end_capture();
  say([&] { one->replay(graph); });
  say([&] { other->replay(graph); });
  return 0;
}
