#include "addon.h"

#include <cmath>

#include "runtime/error.h"

namespace mgm::addon {

State::State(Napi::Env env)
    : queue_(Napi::ThreadSafeFunction::New(env, Napi::Function::New(env, [](const Napi::CallbackInfo&) {}),
                                           "mgm", 0, 1)),
      env_(env) {
  queue_.Unref(env);
}

void State::stop() {
  for (const auto& weak : devices)
    if (const auto device = weak.lock()) device->terminate();
}

void State::expect() {
  if (expected_++ == 0) queue_.Ref(env_);
}

void State::post(std::function<void(Napi::Env)> callback) {
  auto* owned = new std::function<void(Napi::Env)>(std::move(callback));
  const napi_status status =
      queue_.NonBlockingCall(owned, [](Napi::Env env, Napi::Function, std::function<void(Napi::Env)>* call) {
        std::unique_ptr<std::function<void(Napi::Env)>> guard(call);
        // A null environment: it is being torn down and nobody waits any more.
        if (static_cast<napi_env>(env) == nullptr) return;
        State& current = state(env);
        if (--current.expected_ == 0) current.queue_.Unref(env);
        (*call)(env);
      });
  if (status != napi_ok) delete owned;
}

State& state(Napi::Env env) {
  return *env.GetInstanceData<State>();
}

Napi::Value make_error(Napi::Env env, const std::string& code, const std::string& message) {
  const Napi::FunctionReference& error_class = state(env).error_class;
  if (error_class.IsEmpty()) {
    Napi::Error error = Napi::Error::New(env, message);
    error.Set("code", Napi::String::New(env, code));
    return error.Value();
  }
  return error_class.New({Napi::String::New(env, code), Napi::String::New(env, message)});
}

Napi::Value make_error(Napi::Env env, std::exception_ptr failure) {
  try {
    std::rethrow_exception(failure);
  } catch (const Error& error) {
    return make_error(env, error.code(), error.what());
  } catch (const std::bad_alloc&) {
    return make_error(env, "OUT_OF_MEMORY", "the system refused memory");
  } catch (const std::exception& error) {
    return make_error(env, "INTERNAL", error.what());
  }
}

void throw_error(Napi::Env env, const std::string& code, const std::string& message) {
  throw Napi::Error(env, make_error(env, code, message));
}

Pending make_pending(Napi::Env env, std::function<Napi::Value(Napi::Env)> value) {
  auto deferred = std::make_shared<Napi::Promise::Deferred>(Napi::Promise::Deferred::New(env));
  State* owner = &state(env);
  owner->expect();
  return {deferred->Promise(), [deferred, owner, value = std::move(value)](std::exception_ptr failure) {
            owner->post([deferred, value, failure](Napi::Env env) {
              Napi::HandleScope scope(env);
              if (failure)
                deferred->Reject(make_error(env, failure));
              else
                deferred->Resolve(value ? value(env) : env.Undefined());
            });
          }};
}

int64_t to_integer(const Napi::Value& value, const char* name) {
  const double number = value.IsNumber() ? value.As<Napi::Number>().DoubleValue() : std::nan("");
  if (!(std::trunc(number) == number) || std::abs(number) > 0x1p53)
    throw_error(
        value.Env(), "INVALID_ARGUMENT",
        format("expected an integer for %s but received %s", name, value.ToString().Utf8Value().c_str()));
  return static_cast<int64_t>(number);
}

Shape to_shape(const Napi::Value& value, const char* name) {
  if (!value.IsArray())
    throw_error(value.Env(), "INVALID_ARGUMENT", format("expected an array of integers for %s", name));
  const auto array = value.As<Napi::Array>();
  Shape shape;
  for (uint32_t i = 0; i < array.Length(); ++i) shape.push_back(to_integer(array.Get(i), name));
  return shape;
}

Napi::Object init(Napi::Env env, Napi::Object exports) {
  auto* current = new State(env);
  env.SetInstanceData(current);
  env.AddCleanupHook([current] { current->stop(); });
  exports.Set("setErrorClass", Napi::Function::New(env, [](const Napi::CallbackInfo& info) {
                state(info.Env()).error_class = Napi::Persistent(info[0].As<Napi::Function>());
              }));
  init_tensor(env, exports);
  init_device(env, exports);
  init_ops(env, exports);
  init_image(env, exports);
  return exports;
}

NODE_API_MODULE(mgm, init)

}  // namespace mgm::addon
