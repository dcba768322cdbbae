#include "op_table.h"

#include "addon.h"
#include "runtime/error.h"

namespace mgm::addon {
namespace {

Value to_value(const Napi::Value& value) {
  if (value.IsUndefined() || value.IsNull()) return std::monostate();
  if (value.IsNumber()) return value.As<Napi::Number>().DoubleValue();
  if (value.IsBoolean()) return value.As<Napi::Boolean>().Value();
  if (value.IsString()) return value.As<Napi::String>().Utf8Value();
  if (value.IsArray()) {
    const auto array = value.As<Napi::Array>();
    if (array.Length() == 0) return std::vector<int64_t>();
    if (!is_tensor(array.Get(0u))) return to_shape(value, "an array argument");
    TensorList list;
    for (uint32_t i = 0; i < array.Length(); ++i) list.push_back(unwrap_tensor(array.Get(i)));
    return list;
  }
  return unwrap_tensor(value);
}

// call(index in the table, arguments in the table's order) -> outputs
Napi::Value call(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  return guarded(env, [&]() -> Napi::Value {
    const int64_t index = to_integer(info[0], "the op");
    if (index < 0 || index >= static_cast<int64_t>(op_table().size()) || !info[1].IsArray())
      throw Error("INVALID_ARGUMENT", "expected an op of the table and an array of arguments");
    const auto args = info[1].As<Napi::Array>();
    std::vector<Value> values;
    values.reserve(args.Length());
    for (uint32_t i = 0; i < args.Length(); ++i) values.push_back(to_value(args.Get(i)));
    std::vector<Tensor> outputs = op_table()[static_cast<size_t>(index)].run(values);
    Napi::Array result = Napi::Array::New(env, outputs.size());
    for (size_t i = 0; i < outputs.size(); ++i)
      result.Set(static_cast<uint32_t>(i), wrap_tensor(env, std::move(outputs[i])));
    return result;
  });
}

Napi::Value table(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  Napi::Array result = Napi::Array::New(env);
  for (const Op& op : op_table()) {
    Napi::Array params = Napi::Array::New(env);
    for (const OpParam& param : op.params) {
      Napi::Object entry = Napi::Object::New(env);
      entry.Set("name", Napi::String::New(env, param.name));
      entry.Set("type", Napi::String::New(env, param.type));
      params.Set(params.Length(), entry);
    }
    Napi::Object entry = Napi::Object::New(env);
    entry.Set("name", Napi::String::New(env, op.name));
    entry.Set("params", params);
    result.Set(result.Length(), entry);
  }
  return result;
}

}  // namespace

void init_ops(Napi::Env env, Napi::Object exports) {
  exports.Set("call", Napi::Function::New(env, call));
  exports.Set("opTable", Napi::Function::New(env, table));
}

}  // namespace mgm::addon
