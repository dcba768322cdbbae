#include "addon.h"
#include "runtime/error.h"

namespace mgm::addon {
namespace {

class TensorObject : public Napi::ObjectWrap<TensorObject> {
 public:
  // Made by wrap_tensor, which passes the tensor as an external.
  explicit TensorObject(const Napi::CallbackInfo& info) : ObjectWrap(info) {
    if (info.Length() != 1 || !info[0].IsExternal())
      throw_error(info.Env(), "INVALID_ARGUMENT", "expected tensors to be made by a device");
    tensor = std::move(*info[0].As<Napi::External<Tensor>>().Data());
    Napi::Object self = info.This().As<Napi::Object>();
    Napi::Array shape = Napi::Array::New(info.Env(), static_cast<size_t>(tensor.rank()));
    for (int i = 0; i < tensor.rank(); ++i)
      shape.Set(static_cast<uint32_t>(i), Napi::Number::New(info.Env(), static_cast<double>(tensor.dim(i))));
    self.Set("shape", shape);
    self.Set("dtype", Napi::String::New(info.Env(), dtype_name(tensor.dtype())));
    self.Set("layout", Napi::String::New(info.Env(), layout_name(tensor.view.layout)));
  }

  Tensor tensor;  // without storage once disposed

  const Tensor& alive(Napi::Env env) const {
    if (!tensor.storage)
      throw_error(env, "INVALID_ARGUMENT", "expected a live tensor but received a disposed one");
    return tensor;
  }

  static Napi::Function define(Napi::Env env) {
    return DefineClass(env, "NativeTensor",
                       {
                           InstanceMethod<&TensorObject::narrow>("narrow"),
                           InstanceMethod<&TensorObject::reshape>("reshape"),
                           InstanceMethod<&TensorObject::read>("read"),
                           InstanceMethod<&TensorObject::write>("write"),
                           InstanceMethod<&TensorObject::dispose>("dispose"),
                           InstanceAccessor<&TensorObject::byte_length>("byteLength"),
                       });
  }

 private:
  Napi::Value narrow(const Napi::CallbackInfo& info) {
    return guarded(info.Env(), [&] {
      return wrap_tensor(info.Env(), alive(info.Env())
                                         .narrow(to_integer(info[0], "dim"), to_integer(info[1], "start"),
                                                 to_integer(info[2], "length")));
    });
  }

  Napi::Value reshape(const Napi::CallbackInfo& info) {
    return guarded(info.Env(), [&] {
      return wrap_tensor(info.Env(), alive(info.Env()).reshape(to_shape(info[0], "shape")));
    });
  }

  Napi::Value read(const Napi::CallbackInfo& info) {
    const Napi::Env env = info.Env();
    return guarded(env, [&]() -> Napi::Value {
      const Tensor& source = alive(env);
      if (source.packed())
        throw Error("INVALID_ARGUMENT", "expected a strided tensor for read but received packed weights");
      const auto count = static_cast<size_t>(source.view.numel());
      Napi::ArrayBuffer buffer = Napi::ArrayBuffer::New(env, count * dtype_size(source.dtype()));
      Napi::Value array;
      switch (source.dtype()) {
        case DType::f32:
          array = Napi::Float32Array::New(env, count, buffer, 0);
          break;
        case DType::i32:
          array = Napi::Int32Array::New(env, count, buffer, 0);
          break;
        case DType::u8:
          array = Napi::Uint8Array::New(env, count, buffer, 0);
          break;
        default:
          array = Napi::Uint16Array::New(env, count, buffer, 0);
      }
      // The reference keeps the bytes in place until the copy has been made.
      auto held = std::make_shared<Napi::ObjectReference>(Napi::Persistent(array.As<Napi::Object>()));
      const Pending pending = make_pending(env, [held](Napi::Env) -> Napi::Value {
        Napi::Value result = held->Value();
        held->Reset();
        return result;
      });
      return promise_of(
          pending, [&](const Device::Done& done) { source.device().read(source.view, buffer.Data(), done); });
    });
  }

  void write(const Napi::CallbackInfo& info) {
    const Napi::Env env = info.Env();
    guarded(env, [&] {
      const Tensor& target = alive(env);
      if (!target.contiguous())
        throw Error("INVALID_ARGUMENT",
                    "expected a contiguous tensor for write but received a strided view or packed weights");
      if (!info[0].IsTypedArray()) throw Error("INVALID_ARGUMENT", "expected a typed array for write");
      const auto data = info[0].As<Napi::TypedArray>();
      const napi_typedarray_type kind = data.TypedArrayType();
      const bool fits = target.dtype() == DType::f32   ? kind == napi_float32_array
                        : target.dtype() == DType::i32 ? kind == napi_int32_array
                        : target.dtype() == DType::u8
                            ? kind == napi_uint8_array || kind == napi_uint8_clamped_array
                            : kind == napi_uint16_array;
      if (!fits || data.ElementLength() != static_cast<size_t>(target.view.numel()))
        throw Error("INVALID_ARGUMENT",
                    format("expected %lld elements for write of %s but received %zu of %s type",
                           static_cast<long long>(target.view.numel()), shape_string(target.view).c_str(),
                           data.ElementLength(), fits ? "the right" : "another"));
      if (data.ByteLength() == 0) return;
      const auto* bytes = static_cast<const std::byte*>(data.ArrayBuffer().Data()) + data.ByteOffset();
      target.device().write(target.view, bytes, data.ByteLength());
    });
  }

  void dispose(const Napi::CallbackInfo&) { tensor.storage.reset(); }

  Napi::Value byte_length(const Napi::CallbackInfo& info) {
    return Napi::Number::New(info.Env(), static_cast<double>(alive(info.Env()).byte_length()));
  }
};

}  // namespace

Napi::Value wrap_tensor(Napi::Env env, Tensor tensor) {
  return state(env).tensor.New({Napi::External<Tensor>::New(env, &tensor)});
}

bool is_tensor(const Napi::Value& value) {
  return value.IsObject() && value.As<Napi::Object>().InstanceOf(state(value.Env()).tensor.Value());
}

const Tensor& unwrap_tensor(const Napi::Value& value) {
  if (!is_tensor(value))
    throw_error(value.Env(), "INVALID_ARGUMENT", "expected a tensor but received another value");
  return TensorObject::Unwrap(value.As<Napi::Object>())->alive(value.Env());
}

void init_tensor(Napi::Env env, Napi::Object) {
  state(env).tensor = Napi::Persistent(TensorObject::define(env));
}

}  // namespace mgm::addon
