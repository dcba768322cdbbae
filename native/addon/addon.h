// What the binding's files share: the state of one environment (a JS thread), and errors.
#pragma once
#include <napi.h>

#include <exception>
#include <functional>
#include <memory>
#include <vector>

#include "runtime/device.h"

namespace mgm::addon {

// Owned by the environment; everything here is touched on its JS thread only.
struct State {
  explicit State(Napi::Env env);
  // Stops the devices' threads; called before the environment gives up its heap.
  void stop();

  Napi::FunctionReference error_class;  // MgmError of lib/errors.ts
  Napi::FunctionReference tensor, device, mapped_file, graph;
  std::vector<std::weak_ptr<Device>> devices;  // to be stopped with the environment

  // Runs `callback` on the JS thread; callable from any thread. The environment stays alive while `expect`
  // calls are outstanding: one expect() before, one callback after.
  void expect();
  void post(std::function<void(Napi::Env)> callback);

 private:
  Napi::ThreadSafeFunction queue_;
  int64_t expected_ = 0;
  Napi::Env env_;
};

State& state(Napi::Env env);

Napi::Value make_error(Napi::Env env, const std::string& code, const std::string& message);
Napi::Value make_error(Napi::Env env, std::exception_ptr failure);
[[noreturn]] void throw_error(Napi::Env env, const std::string& code, const std::string& message);

// Runs `body` with C++ exceptions turned into MgmErrors.
template <class Body>
auto guarded(Napi::Env env, Body&& body) -> decltype(body()) {
  try {
    return body();
  } catch (const Napi::Error&) {
    throw;
  } catch (...) {
    throw Napi::Error(env, make_error(env, std::current_exception()));
  }
}

// A promise that a device settles from its own thread through the returned Done.
struct Pending {
  Napi::Promise promise;
  Device::Done done;
};
// `value` makes the resolved value on the JS thread (undefined when empty).
Pending make_pending(Napi::Env env, std::function<Napi::Value(Napi::Env)> value = {});
// `start` hands pending.done to a device. If it throws instead, the promise is rejected: a Done that is never
// called would keep the process alive.
template <class Start>
Napi::Value promise_of(const Pending& pending, Start&& start) {
  try {
    start(pending.done);
  } catch (...) {
    pending.done(std::current_exception());
  }
  return pending.promise;
}

Napi::Value wrap_tensor(Napi::Env env, Tensor tensor);
const Tensor& unwrap_tensor(const Napi::Value& value);
bool is_tensor(const Napi::Value& value);

Shape to_shape(const Napi::Value& value, const char* name);
int64_t to_integer(const Napi::Value& value, const char* name);

void init_tensor(Napi::Env env, Napi::Object exports);
void init_device(Napi::Env env, Napi::Object exports);
void init_ops(Napi::Env env, Napi::Object exports);
Napi::Object init_image(Napi::Env env, Napi::Object exports);

}  // namespace mgm::addon
