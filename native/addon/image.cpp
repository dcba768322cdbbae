// Image functions: they run on libuv's thread pool, read the caller's bytes in place and settle a promise.
#include <functional>
#include <vector>

#include "addon.h"
#include "processing/image.h"
#include "runtime/error.h"

namespace mgm::addon {
namespace {

// `input` must not be changed or transferred until the promise settles.
class ImageWork : public Napi::AsyncWorker {
 public:
  ImageWork(Napi::Env env, Napi::Value input, Napi::Value result, std::function<void()> body)
      : Napi::AsyncWorker(env, "mgm:image"),
        deferred_(Napi::Promise::Deferred::New(env)),
        input_(Napi::Reference<Napi::Value>::New(input, 1)),
        result_(Napi::Reference<Napi::Value>::New(result, 1)),
        body_(std::move(body)) {}

  Napi::Promise promise() const { return deferred_.Promise(); }

 protected:
  void Execute() override {
    try {
      body_();
    } catch (...) {
      failure_ = std::current_exception();
    }
  }
  void OnOK() override {
    Napi::HandleScope scope(Env());
    if (failure_)
      deferred_.Reject(make_error(Env(), failure_));
    else
      deferred_.Resolve(result_.Value());
  }

 private:
  Napi::Promise::Deferred deferred_;
  Napi::Reference<Napi::Value> input_, result_;
  std::function<void()> body_;
  std::exception_ptr failure_;
};

Napi::Value start(Napi::Env env, Napi::Value input, Napi::Value result, std::function<void()> body) {
  auto* work = new ImageWork(env, input, result, std::move(body));
  work->Queue();
  return work->promise();
}

struct Picture {
  Napi::Uint8Array bytes;
  const uint8_t* data;
  int64_t width, height;
};

Picture to_picture(const Napi::CallbackInfo& info, int64_t channels) {
  if (!info[0].IsTypedArray() || info[0].As<Napi::TypedArray>().TypedArrayType() != napi_uint8_array)
    throw_error(info.Env(), "INVALID_ARGUMENT", "expected a Uint8Array for data");
  const auto bytes = info[0].As<Napi::Uint8Array>();
  const int64_t width = to_integer(info[1], "width"), height = to_integer(info[2], "height");
  if (width < 1 || height < 1 || width > processing::kMaxSide || height > processing::kMaxSide ||
      static_cast<int64_t>(bytes.ByteLength()) != width * height * channels)
    throw_error(info.Env(), "INVALID_ARGUMENT",
                format("expected width * height * %lld bytes, sides of 1 to %lld, for data but received %zu "
                       "bytes, %lld x %lld",
                       static_cast<long long>(channels), static_cast<long long>(processing::kMaxSide),
                       bytes.ByteLength(), static_cast<long long>(width), static_cast<long long>(height)));
  return {bytes, bytes.Data(), width, height};
}

std::vector<float> to_floats(const Napi::Value& value, const char* name, float low, float high) {
  std::vector<float> numbers;
  if (value.IsArray()) {
    const auto array = value.As<Napi::Array>();
    for (uint32_t i = 0; i < array.Length() && i < 4; ++i) {
      const Napi::Value item = array.Get(i);
      const float number = item.IsNumber() ? item.As<Napi::Number>().FloatValue() : low - 1;
      if (number >= low && number <= high) numbers.push_back(number);
    }
  }
  if (numbers.size() != 3)
    throw_error(value.Env(), "INVALID_ARGUMENT",
                format("expected three numbers from %g to %g for %s", static_cast<double>(low),
                       static_cast<double>(high), name));
  return numbers;
}

// { width, height, cropX, cropY, cropWidth, cropHeight, pad?: [r, g, b] }
processing::Resize to_resize(const Napi::Value& value) {
  if (!value.IsObject()) throw_error(value.Env(), "INVALID_ARGUMENT", "expected an object for resize");
  const auto object = value.As<Napi::Object>();
  processing::Resize resize = {};
  resize.width = to_integer(object.Get("width"), "width");
  resize.height = to_integer(object.Get("height"), "height");
  resize.crop_x = to_integer(object.Get("cropX"), "cropX");
  resize.crop_y = to_integer(object.Get("cropY"), "cropY");
  resize.crop_width = to_integer(object.Get("cropWidth"), "cropWidth");
  resize.crop_height = to_integer(object.Get("cropHeight"), "cropHeight");
  for (const int64_t side : {resize.crop_width, resize.crop_height})
    if (side < 1 || side > processing::kMaxSide)
      throw_error(value.Env(), "INVALID_ARGUMENT",
                  format("expected 1 to %lld for a side of the crop but received %lld",
                         static_cast<long long>(processing::kMaxSide), static_cast<long long>(side)));
  const Napi::Value pad = object.Get("pad");
  resize.pad = !pad.IsUndefined() && !pad.IsNull();
  if (resize.pad) {
    const std::vector<float> color = to_floats(pad, "pad", 0, 255);
    for (size_t c = 0; c < 3; ++c) resize.color[c] = static_cast<uint8_t>(color[c]);
  }
  return resize;
}

// resizeBicubic(data, width, height, resize): Promise<Uint8Array>
Napi::Value resize_bicubic(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    const Picture picture = to_picture(info, 3);
    const processing::Resize resize = to_resize(info[3]);
    auto out = Napi::Uint8Array::New(
        info.Env(), static_cast<size_t>(resize.crop_width) * static_cast<size_t>(resize.crop_height) * 3);
    uint8_t* to = out.Data();
    return start(info.Env(), picture.bytes, out,
                 [data = picture.data, width = picture.width, height = picture.height, resize, to] {
                   processing::resize_bicubic(data, width, height, resize, to);
                 });
  });
}

// preprocessImage(data, width, height, resize, mean, std): Promise<Float32Array>
Napi::Value preprocess_image(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    const Picture picture = to_picture(info, 3);
    const processing::Resize resize = to_resize(info[3]);
    const std::vector<float> mean = to_floats(info[4], "mean", -1e6f, 1e6f);
    const std::vector<float> std = to_floats(info[5], "std", 1e-6f, 1e6f);
    const int64_t pixels = resize.crop_width * resize.crop_height;
    auto out = Napi::Float32Array::New(info.Env(), static_cast<size_t>(pixels) * 3);
    float* to = out.Data();
    return start(
        info.Env(), picture.bytes, out,
        [data = picture.data, width = picture.width, height = picture.height, resize, mean, std, pixels, to] {
          std::vector<uint8_t> resized(static_cast<size_t>(pixels) * 3);
          processing::resize_bicubic(data, width, height, resize, resized.data());
          processing::normalize(resized.data(), pixels, mean.data(), std.data(), to);
        });
  });
}

// cmykToRgb(data, width, height): Promise<Uint8Array>
Napi::Value cmyk_to_rgb(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    const Picture picture = to_picture(info, 4);
    const int64_t pixels = picture.width * picture.height;
    auto out = Napi::Uint8Array::New(info.Env(), static_cast<size_t>(pixels) * 3);
    uint8_t* to = out.Data();
    return start(info.Env(), picture.bytes, out,
                 [data = picture.data, pixels, to] { processing::cmyk_to_rgb(data, pixels, to); });
  });
}

}  // namespace

Napi::Object init_image(Napi::Env env, Napi::Object exports) {
  exports.Set("resizeBicubic", Napi::Function::New(env, resize_bicubic, "resizeBicubic"));
  exports.Set("preprocessImage", Napi::Function::New(env, preprocess_image, "preprocessImage"));
  exports.Set("cmykToRgb", Napi::Function::New(env, cmyk_to_rgb, "cmykToRgb"));
  return exports;
}

}  // namespace mgm::addon
