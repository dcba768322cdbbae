#include "cpu/device.h"

#include "addon.h"
#include "cpu/kernels.h"
#include "cuda/device.h"
#include "runtime/error.h"
#include "runtime/mapped_file.h"

namespace mgm::addon {
namespace {

class MappedFileObject : public Napi::ObjectWrap<MappedFileObject> {
 public:
  explicit MappedFileObject(const Napi::CallbackInfo& info) : ObjectWrap(info) {
    guarded(info.Env(), [&] { file_ = MappedFile::open(info[0].ToString().Utf8Value()); });
  }

  const std::shared_ptr<MappedFile>& file(Napi::Env env) const {
    if (!file_) throw_error(env, "CLOSED", "expected an open file but received a closed one");
    return file_;
  }

  static Napi::Function define(Napi::Env env) {
    return DefineClass(env, "NativeMappedFile",
                       {InstanceAccessor<&MappedFileObject::size>("size"),
                        InstanceMethod<&MappedFileObject::close>("close")});
  }

 private:
  Napi::Value size(const Napi::CallbackInfo& info) {
    return Napi::Number::New(info.Env(), static_cast<double>(file(info.Env())->size()));
  }
  void close(const Napi::CallbackInfo&) { file_.reset(); }
  std::shared_ptr<MappedFile> file_;
};

class GraphObject : public Napi::ObjectWrap<GraphObject> {
 public:
  // Made by DeviceObject::end_capture, which passes the parts as externals.
  explicit GraphObject(const Napi::CallbackInfo& info) : ObjectWrap(info) {
    if (info.Length() != 2 || !info[0].IsExternal())
      throw_error(info.Env(), "INVALID_ARGUMENT", "expected graphs to be made by a device");
    device_ = *info[0].As<Napi::External<std::shared_ptr<Device>>>().Data();
    graph_ = *info[1].As<Napi::External<std::shared_ptr<Graph>>>().Data();
  }

  static Napi::Function define(Napi::Env env) {
    return DefineClass(
        env, "NativeGraph",
        {InstanceAccessor<&GraphObject::length>("length"), InstanceMethod<&GraphObject::replay>("replay"),
         InstanceMethod<&GraphObject::dispose>("dispose")});
  }

 private:
  const std::shared_ptr<Graph>& alive(Napi::Env env) const {
    if (!graph_) throw_error(env, "INVALID_ARGUMENT", "expected a live graph but received a disposed one");
    return graph_;
  }
  Napi::Value length(const Napi::CallbackInfo& info) {
    return Napi::Number::New(info.Env(), static_cast<double>(alive(info.Env())->length()));
  }
  void replay(const Napi::CallbackInfo& info) {
    guarded(info.Env(), [&] {
      const auto& graph = alive(info.Env());
      device_->replay(graph);
    });
  }
  void dispose(const Napi::CallbackInfo&) {
    graph_.reset();
    device_.reset();
  }
  std::shared_ptr<Device> device_;
  std::shared_ptr<Graph> graph_;
};

class DeviceObject : public Napi::ObjectWrap<DeviceObject> {
 public:
  // Made by open_cpu and open_cuda, which pass the device as an external.
  explicit DeviceObject(const Napi::CallbackInfo& info) : ObjectWrap(info) {
    if (info.Length() != 1 || !info[0].IsExternal())
      throw_error(info.Env(), "INVALID_ARGUMENT", "expected devices to be made by openCpu or openCuda");
    device_ = *info[0].As<Napi::External<std::shared_ptr<Device>>>().Data();
    auto& devices = state(info.Env()).devices;
    std::erase_if(devices, [](const auto& weak) { return weak.expired(); });
    devices.push_back(device_);
  }

  static Napi::Function define(Napi::Env env) {
    return DefineClass(env, "NativeDevice",
                       {
                           InstanceAccessor<&DeviceObject::threads>("threads"),
                           InstanceAccessor<&DeviceObject::isa>("isa"),
                           InstanceMethod<&DeviceObject::empty>("empty"),
                           InstanceMethod<&DeviceObject::from_file>("fromFile"),
                           InstanceMethod<&DeviceObject::begin_capture>("beginCapture"),
                           InstanceMethod<&DeviceObject::end_capture>("endCapture"),
                           InstanceMethod<&DeviceObject::abort_capture>("abortCapture"),
                           InstanceMethod<&DeviceObject::synchronize>("synchronize"),
                           InstanceMethod<&DeviceObject::memory>("memory"),
                           InstanceMethod<&DeviceObject::trim>("trim"),
                           InstanceMethod<&DeviceObject::close>("close"),
                       });
  }

 private:
  Napi::Value threads(const Napi::CallbackInfo& info) {
    return Napi::Number::New(info.Env(), device_->threads());
  }
  Napi::Value isa(const Napi::CallbackInfo& info) { return Napi::String::New(info.Env(), device_->isa()); }

  static DType dtype_of(const Napi::Value& value) {
    const std::string name = value.ToString().Utf8Value();
    const auto dtype = parse_dtype(name);
    if (!dtype || dtype_size(*dtype) == 0)
      throw Error("INVALID_ARGUMENT",
                  format("expected f32, bf16, f16, i32 or u8 for dtype but received %s", name.c_str()));
    return *dtype;
  }

  Napi::Value empty(const Napi::CallbackInfo& info) {
    return guarded(info.Env(), [&] {
      const Shape shape = to_shape(info[0], "shape");
      const DType dtype = dtype_of(info[1]);
      Tensor tensor;
      tensor.storage =
          device_->allocate(static_cast<size_t>(checked_numel(shape, "a tensor")) * dtype_size(dtype));
      tensor.view = contiguous_view(tensor.storage->data(), dtype, shape);
      return wrap_tensor(info.Env(), std::move(tensor));
    });
  }

  Napi::Value from_file(const Napi::CallbackInfo& info) {
    return guarded(info.Env(), [&] {
      const auto file = MappedFileObject::Unwrap(info[0].As<Napi::Object>())->file(info.Env());
      return wrap_tensor(info.Env(), tensor_from_file(*device_, file, to_integer(info[1], "offset"),
                                                      dtype_of(info[3]), to_shape(info[2], "shape")));
    });
  }

  void begin_capture(const Napi::CallbackInfo& info) {
    guarded(info.Env(), [&] { device_->begin_capture(); });
  }
  Napi::Value end_capture(const Napi::CallbackInfo& info) {
    return guarded(info.Env(), [&]() -> Napi::Value {
      std::shared_ptr<Graph> graph = device_->end_capture();
      return state(info.Env())
          .graph.New({Napi::External<std::shared_ptr<Device>>::New(info.Env(), &device_),
                      Napi::External<std::shared_ptr<Graph>>::New(info.Env(), &graph)});
    });
  }
  void abort_capture(const Napi::CallbackInfo&) { device_->abort_capture(); }

  Napi::Value synchronize(const Napi::CallbackInfo& info) {
    return guarded(info.Env(), [&]() -> Napi::Value {
      return promise_of(make_pending(info.Env()),
                        [&](const Device::Done& done) { device_->synchronize(done); });
    });
  }

  Napi::Value memory(const Napi::CallbackInfo& info) {
    const MemoryStats stats = device_->memory();
    Napi::Object result = Napi::Object::New(info.Env());
    result.Set("used", Napi::Number::New(info.Env(), static_cast<double>(stats.used)));
    result.Set("reserved", Napi::Number::New(info.Env(), static_cast<double>(stats.reserved)));
    result.Set("peak", Napi::Number::New(info.Env(), static_cast<double>(stats.peak)));
    result.Set("limit", Napi::Number::New(info.Env(), static_cast<double>(stats.limit)));
    result.Set("available", Napi::Number::New(info.Env(), static_cast<double>(stats.available)));
    return result;
  }

  void trim(const Napi::CallbackInfo&) { device_->trim(); }

  Napi::Value close(const Napi::CallbackInfo& info) {
    return guarded(info.Env(), [&]() -> Napi::Value {
      return promise_of(make_pending(info.Env()), [&](const Device::Done& done) {
        device_->trim();
        device_->close(done);
      });
    });
  }

  std::shared_ptr<Device> device_;
};

Napi::Value wrap_device(Napi::Env env, std::shared_ptr<Device> device) {
  return state(env).device.New({Napi::External<std::shared_ptr<Device>>::New(env, &device)});
}

size_t memory_limit_of(const Napi::Object& options) {
  const int64_t limit = to_integer(options.Get("memoryLimit"), "memoryLimit");
  if (limit < 0) throw Error("INVALID_ARGUMENT", "expected a memory limit of at least 0");
  return static_cast<size_t>(limit);
}

// openCpu({ threads, memoryLimit })
Napi::Value open_cpu(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    const auto options = info[0].As<Napi::Object>();
    const int64_t threads = to_integer(options.Get("threads"), "threads");
    if (threads < 1 || threads > 1024) throw Error("INVALID_ARGUMENT", "expected 1 to 1024 threads");
    return wrap_device(info.Env(), cpu::open_device(static_cast<int>(threads), memory_limit_of(options)));
  });
}

// openCuda({ index, memoryLimit })
Napi::Value open_cuda(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    const auto options = info[0].As<Napi::Object>();
    const int64_t index = to_integer(options.Get("index"), "index");
    if (index < 0 || index > 1023) throw Error("INVALID_ARGUMENT", "expected a GPU from 0 to 1023");
    return wrap_device(info.Env(), cuda::open_device(static_cast<int>(index), memory_limit_of(options)));
  });
}

// copyBetween(source, destination)
void copy_between(const Napi::CallbackInfo& info) {
  guarded(info.Env(), [&] { cuda::copy_between(unwrap_tensor(info[0]), unwrap_tensor(info[1])); });
}

// cudaSurvey(): what there is of CUDA on this machine and in this build.
Napi::Value cuda_survey(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    const Napi::Env env = info.Env();
    const cuda::Survey found = cuda::survey();
    Napi::Object result = Napi::Object::New(env);
    result.Set("error", found.error.empty() ? env.Null() : Napi::String::New(env, found.error));
    result.Set("library", found.library.empty() ? env.Null() : Napi::String::New(env, found.library));
    result.Set("driverVersion", Napi::Number::New(env, found.driver_version));
    result.Set("emulated", Napi::Boolean::New(env, found.emulated));
    Napi::Array devices = Napi::Array::New(env);
    for (const cuda::Gpu& gpu : found.gpus) {
      Napi::Object entry = Napi::Object::New(env);
      entry.Set("name", Napi::String::New(env, gpu.name));
      entry.Set("capability", Napi::Number::New(env, gpu.capability));
      entry.Set("memory", Napi::Number::New(env, static_cast<double>(gpu.memory)));
      entry.Set("image", Napi::String::New(env, gpu.image));
      devices.Set(devices.Length(), entry);
    }
    result.Set("devices", devices);
    return result;
  });
}

// Runs a blocking probe on libuv's pool.
class Probe : public Napi::AsyncWorker {
 public:
  Probe(Napi::Env env, std::function<double()> body)
      : AsyncWorker(env), deferred_(Napi::Promise::Deferred::New(env)), body_(std::move(body)) {}
  Napi::Promise promise() { return deferred_.Promise(); }
  void Execute() override { result_ = body_(); }
  void OnOK() override { deferred_.Resolve(Napi::Number::New(Env(), result_)); }
  void OnError(const Napi::Error& error) override {
    deferred_.Reject(make_error(Env(), "INTERNAL", error.Message()));
  }

 private:
  Napi::Promise::Deferred deferred_;
  std::function<double()> body_;
  double result_ = 0;
};

Napi::Value probe(const Napi::CallbackInfo& info, double (*body)(int, double)) {
  const auto threads = static_cast<int>(std::clamp<int64_t>(to_integer(info[0], "threads"), 1, 1024));
  const double seconds = std::clamp(info[1].ToNumber().DoubleValue(), 0.01, 30.0);
  auto* worker = new Probe(info.Env(), [=] { return body(threads, seconds); });
  Napi::Promise promise = worker->promise();
  worker->Queue();
  return promise;
}

Napi::Value cpu_features(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    const Napi::Env env = info.Env();
    const std::string best = cpu::best_isa();
    Napi::Object result = Napi::Object::New(env);
    result.Set("isa", Napi::String::New(env, cpu::kernels().isa));
    result.Set("best", Napi::String::New(env, best));
    Napi::Array available = Napi::Array::New(env);
    uint32_t count = 0;
    for (const char* isa : {"portable", "avx2", "avx512"}) {
      available.Set(count++, Napi::String::New(env, isa));
      if (best == isa) break;
    }
    result.Set("available", available);
    return result;
  });
}

}  // namespace

void init_device(Napi::Env env, Napi::Object exports) {
  State& current = state(env);
  current.mapped_file = Napi::Persistent(MappedFileObject::define(env));
  current.graph = Napi::Persistent(GraphObject::define(env));
  current.device = Napi::Persistent(DeviceObject::define(env));
  exports.Set("openCpu", Napi::Function::New(env, open_cpu));
  exports.Set("openCuda", Napi::Function::New(env, open_cuda));
  exports.Set("copyBetween", Napi::Function::New(env, copy_between));
  exports.Set("cudaSurvey", Napi::Function::New(env, cuda_survey));
  exports.Set("mapFile", Napi::Function::New(env, [](const Napi::CallbackInfo& info) -> Napi::Value {
                return state(info.Env()).mapped_file.New({info[0]});
              }));
  exports.Set("cpuFeatures", Napi::Function::New(env, cpu_features));
  exports.Set("fmaPeak", Napi::Function::New(env, [](const Napi::CallbackInfo& info) {
                return probe(info, &cpu::fma_peak);
              }));
  exports.Set("readBandwidth", Napi::Function::New(env, [](const Napi::CallbackInfo& info) {
                return probe(info, &cpu::read_bandwidth);
              }));
}

}  // namespace mgm::addon
