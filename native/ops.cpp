// The checks of the contract: every op validates its inputs, allocates its output and hands both to the
// device.
#include "ops.h"

#include <cmath>

#include "op_table.h"
#include "runtime/device.h"
#include "runtime/error.h"

namespace mgm {
namespace {

using Ints = std::vector<int64_t>;

// -- checks
// ----------------------------------------------------------------------------------------------------------

thread_local const char* current_op = "";

[[noreturn]] void refuse(const std::string& expected, const char* name, const std::string& received) {
  throw Error("INVALID_ARGUMENT", format("[%s] expected %s for %s but received %s", current_op,
                                         expected.c_str(), name, received.c_str()));
}

long long ll(int64_t value) {
  return static_cast<long long>(value);
}

constexpr int64_t kAny = -1;

std::string pattern(DType dtype, const Shape& shape) {
  std::string text = std::string(dtype_name(dtype)) + " [";
  for (size_t i = 0; i < shape.size(); ++i)
    text += (i ? ", " : "") + (shape[i] == kAny ? std::string("any") : std::to_string(shape[i]));
  return text + "]";
}

enum class Rows { contiguous, strided };

// dtype, rank and sizes (kAny matches all) and the allowed strides.
void check(const Tensor& tensor, const char* name, DType dtype, const Shape& shape,
           Rows rows = Rows::contiguous) {
  bool ok = !tensor.packed() && tensor.dtype() == dtype && tensor.rank() == static_cast<int>(shape.size());
  for (size_t i = 0; ok && i < shape.size(); ++i) ok = shape[i] == kAny || tensor.view.shape[i] == shape[i];
  if (!ok) refuse(pattern(dtype, shape), name, shape_string(tensor.view));
  const bool strides = rows == Rows::strided ? tensor.rows_contiguous() : tensor.contiguous();
  if (!strides)
    refuse(rows == Rows::strided ? "contiguous rows" : "a contiguous tensor", name,
           "a strided view; copy it with cast");
}

View check(const OptTensor& tensor, const char* name, DType dtype, const Shape& shape,
           Rows rows = Rows::contiguous) {
  if (!tensor) return {};
  check(*tensor, name, dtype, shape, rows);
  return tensor->view;
}

void check_float(const Tensor& tensor, const char* name) {
  if (tensor.packed() ||
      (tensor.dtype() != DType::f32 && tensor.dtype() != DType::bf16 && tensor.dtype() != DType::f16))
    refuse("f32, bf16 or f16", name, shape_string(tensor.view));
}

// Device::computes_in of x's type.
DType check_activations(const Tensor& x, const char* name, bool matrices) {
  const DType dtype = x.dtype();
  if (x.packed() || !x.device().computes_in(dtype, matrices)) {
    std::string types;
    for (const DType one : {DType::f32, DType::bf16, DType::f16})
      if (x.device().computes_in(one, matrices))
        types += (types.empty() ? "" : " or ") + std::string(dtype_name(one));
    refuse(types + " activations", name, shape_string(x.view));
  }
  return dtype;
}

// What an op writes that may keep its sums' precision: the type of its activations, or f32.
DType check_result(DType asked, DType activations) {
  if (asked != activations && asked != DType::f32)
    refuse(std::string(dtype_name(activations)) + (activations == DType::f32 ? "" : " or f32"), "out",
           dtype_name(asked));
  return asked;
}

void check_rank(const Tensor& tensor, const char* name, int rank) {
  if (tensor.rank() != rank) refuse(format("%d dimensions", rank), name, shape_string(tensor.view));
}

int64_t check_range(int64_t value, const char* name, int64_t low, int64_t high) {
  if (value < low || value > high)
    refuse(format("an integer from %lld to %lld", ll(low), ll(high)), name, std::to_string(value));
  return value;
}

float check_finite(double value, const char* name, bool positive) {
  if (!std::isfinite(value) || (positive && value <= 0))
    refuse(positive ? "a positive number" : "a finite number", name, format("%g", value));
  return static_cast<float>(value);
}

// The packed matrix for activations of type `a` and width k; its number of outputs (half its rows when
// gated).
int64_t check_packed(const Tensor& w, const char* name, DType a, int64_t k) {
  if (!w.packed() || w.rank() != 2) refuse("weights packed by packLinear", name, shape_string(w.view));
  const bool quantized = w.dtype() == DType::int8 || w.dtype() == DType::int4;
  if (a != DType::f32 && !quantized && w.dtype() != a)
    refuse(format("%s, int8 or int4 weights with %s activations", dtype_name(a), dtype_name(a)), name,
           shape_string(w.view));
  if (w.dim(1) != k) refuse(format("packed weights [any, %lld]", ll(k)), name, shape_string(w.view));
  return w.view.layout == Layout::gated_panels ? w.dim(0) / 2 : w.dim(0);
}

// -- outputs
// -----------------------------------------------------------------------------------------------------------

Tensor make(Device& device, DType dtype, const Shape& shape) {
  const auto numel = static_cast<size_t>(checked_numel(shape, current_op));
  Tensor tensor;
  tensor.storage = device.allocate(numel * dtype_size(dtype));
  tensor.view = contiguous_view(tensor.storage->data(), dtype, shape);
  return tensor;
}

Tensor make(Device& device, const Shape& shape) {
  return make(device, DType::f32, shape);
}

// [..., C] as [rows, C]; leading dimensions must be contiguous unless there is only one.
Tensor as_rows(const Tensor& x, const char* name) {
  if (x.packed() || x.rank() < 2) refuse("[rows, channels]", name, shape_string(x.view));
  if (x.rank() == 2) {
    if (!x.rows_contiguous()) refuse("contiguous rows", name, "a strided view; copy it with cast");
    return x;
  }
  if (!x.contiguous()) refuse("a contiguous tensor", name, "a strided view; copy it with cast");
  int64_t rows = 1;
  for (int i = 0; i < x.rank() - 1; ++i) rows *= x.view.shape[i];
  return x.reshape({rows, x.dim(-1)});
}

Tensor with_channels(const Tensor& rows, const Tensor& like, int64_t channels) {
  Shape shape = like.shape();
  shape.back() = channels;
  return rows.reshape(shape);
}

// -- ops
// ---------------------------------------------------------------------------------------------------------------

Tensor cast(const Tensor& x, DType dtype) {
  if (x.packed()) refuse("a strided tensor", "x", shape_string(x.view));
  if (dtype != x.dtype()) {
    check_float(x, "x");
    if (dtype != DType::f32 && dtype != DType::bf16 && dtype != DType::f16)
      refuse("f32, bf16 or f16", "dtype", dtype_name(dtype));
  }
  Tensor out = make(x.device(), dtype, x.shape());
  if (x.view.numel() > 0) x.device().cast({x.view, out.view});
  return out;
}

Tensor permute(const Tensor& x, const Ints& dims) {
  if (x.packed()) refuse("a strided tensor", "x", shape_string(x.view));
  PermuteArgs args{x.view, {}, {}};
  Shape shape;
  unsigned seen = 0;
  for (size_t i = 0; i < dims.size(); ++i) {
    if (dims.size() != static_cast<size_t>(x.rank()) || dims[i] < 0 || dims[i] >= x.rank() ||
        (seen >> dims[i] & 1))
      refuse(format("a permutation of %d dimensions", x.rank()), "dims", shape_string(dims));
    seen |= 1u << dims[i];
    args.dims[i] = static_cast<int>(dims[i]);
    shape.push_back(x.dim(static_cast<int>(dims[i])));
  }
  if (dims.size() != static_cast<size_t>(x.rank()))
    refuse(format("a permutation of %d dimensions", x.rank()), "dims", shape_string(dims));
  Tensor out = make(x.device(), x.dtype(), shape);
  args.out = out.view;
  if (x.view.numel() > 0) x.device().permute(args);
  return out;
}

Tensor scale_columns(const Tensor& w, const Tensor& scale) {
  const DType a = check_activations(w, "w", false);
  check(w, "w", a, {kAny, kAny}, Rows::strided);
  check(scale, "scale", DType::f32, {w.dim(1)});
  Tensor out = make(w.device(), a, w.shape());
  w.device().scale_columns({w.view, scale.view, out.view});
  return out;
}

Tensor pack_linear(const TensorList& weights, DType dtype, bool gated) {
  if (weights.empty()) refuse("at least one matrix", "weights", "none");
  if (dtype == DType::i32 || dtype == DType::u8)
    refuse("f32, bf16, f16, int8 or int4", "dtype", dtype_name(dtype));
  int64_t n = 0;
  std::vector<View> views;
  for (const Tensor& w : weights) {
    check_float(w, "weights");
    check_rank(w, "weights", 2);
    if (!w.rows_contiguous()) refuse("contiguous rows", "weights", "a strided view");
    if (w.dim(1) != weights[0].dim(1) || w.dim(1) == 0 || w.dim(0) == 0)
      refuse(format("matrices [any, %lld]", ll(weights[0].dim(1))), "weights", shape_string(w.view));
    n += w.dim(0);
    views.push_back(w.view);
  }
  if (gated && n % 2) refuse("an even number of rows", "gated weights", std::to_string(n));
  Device& device = weights[0].device();
  const Layout layout = gated ? Layout::gated_panels : Layout::panels;
  Tensor out;
  out.storage = device.allocate(device.packed_bytes(dtype, layout, n, weights[0].dim(1)));
  out.view = contiguous_view(out.storage->data(), dtype, {n, weights[0].dim(1)});
  out.view.layout = layout;
  device.pack_linear({views.data(), static_cast<int>(views.size()), out.view});
  return out;
}

// The epilogue's tensors for `rows` rows of `n` outputs.
void check_epilogue(DType a, const Tensor& w, const OptTensor& bias, const OptTensor& scale,
                    const OptTensor& residual, int64_t rows, int64_t n) {
  check(bias, "bias", DType::f32, {w.dim(0)});
  check(scale, "scale", DType::f32, {n});
  check(residual, "residual", a, {kAny, n}, Rows::strided);
  if (residual && rows > 0 && (residual->dim(0) == 0 || rows % residual->dim(0)))
    refuse(format("a divisor of %lld rows", ll(rows)), "residual", shape_string(residual->view));
}

View view_of(const OptTensor& tensor) {
  return tensor ? tensor->view : View{};
}

Tensor linear(const Tensor& x, const Tensor& w, const OptTensor& bias, const OptTensor& scale,
              const OptTensor& residual, Activation activation, DType result) {
  const DType a = check_activations(x, "x", true);
  const Tensor rows = as_rows(x, "x");
  const int64_t n = check_packed(w, "w", a, rows.dim(1));
  OptTensor added = residual;
  if (added && added->rank() > 2) added = as_rows(*added, "residual");
  check_epilogue(a, w, bias, scale, added, rows.dim(0), n);
  Tensor out = make(x.device(), check_result(result, a), {rows.dim(0), n});
  if (rows.dim(0) > 0)
    x.device().linear(
        {rows.view, w.view, view_of(bias), view_of(scale), view_of(added), activation, out.view});
  return with_channels(out, x, n);
}

std::vector<Tensor> moe_route(const Tensor& logits, int64_t top_k) {
  check(logits, "logits", DType::f32, {kAny, kAny});
  check_range(top_k, "topK", 1, std::min<int64_t>(logits.dim(1), 64));
  Tensor weights = make(logits.device(), {logits.dim(0), top_k});
  Tensor ids = make(logits.device(), DType::i32, {logits.dim(0), top_k});
  if (logits.dim(0) > 0) logits.device().moe_route({logits.view, weights.view, ids.view});
  return {weights, ids};
}

Tensor grouped_linear(const Tensor& x, const TensorList& w, const Tensor& ids, const OptTensor& weights,
                      const OptTensor& residual, Activation activation) {
  const DType a = check_activations(x, "x", true);
  check(x, "x", a, {kAny, kAny}, Rows::strided);
  check(ids, "ids", DType::i32, {kAny, kAny});
  if (w.empty()) refuse("at least one expert", "w", "none");
  const int64_t tokens = ids.dim(0), k = ids.dim(1), n = check_packed(w[0], "w", a, x.dim(1));
  std::vector<View> views;
  for (const Tensor& expert : w) {
    check_packed(expert, "w", a, x.dim(1));
    if (expert.dim(0) != w[0].dim(0) || expert.dtype() != w[0].dtype() ||
        expert.view.layout != w[0].view.layout)
      refuse(shape_string(w[0].view), "every expert of w", shape_string(expert.view));
    views.push_back(expert.view);
  }
  if (x.dim(0) != (weights ? tokens * k : tokens))
    refuse(format("%lld rows", ll(weights ? tokens * k : tokens)), "x", shape_string(x.view));
  check(weights, "weights", DType::f32, {tokens, k});
  if (residual && !weights) refuse("none without weights", "residual", shape_string(residual->view));
  check(residual, "residual", a, {tokens, n}, Rows::strided);
  Tensor out = make(x.device(), a, {weights ? tokens : tokens * k, n});
  if (tokens > 0)
    x.device().grouped_linear({x.view, views.data(), static_cast<int>(views.size()), ids.view,
                               view_of(weights), view_of(residual), activation, out.view});
  return out;
}

Tensor conv2d(const Tensor& x, const Tensor& w, const OptTensor& bias, const OptTensor& scale,
              const OptTensor& residual, const Ints& kernel, int64_t stride, const Ints& pad,
              const Ints& resize, Activation activation) {
  const DType a = check_activations(x, "x", true);
  check(x, "x", a, {kAny, kAny, kAny, kAny});
  if (kernel.size() != 2) refuse("two sizes", "kernel", shape_string(kernel));
  if (pad.size() != 2) refuse("zeros before and after", "pad", shape_string(pad));
  if (resize.size() != 0 && resize.size() != 2) refuse("height and width", "resize", shape_string(resize));
  const int64_t kh = check_range(kernel[0], "kernel", 1, 1024),
                kw = check_range(kernel[1], "kernel", 1, 1024);
  check_range(stride, "stride", 1, 1024);
  const int64_t before = check_range(pad[0], "pad", 0, 1024), after = check_range(pad[1], "pad", 0, 1024);
  const int64_t batch = x.dim(0), channels = x.dim(3);
  int64_t height = x.dim(1), width = x.dim(2);
  if (!resize.empty()) {
    if (height == 0 || width == 0) refuse("at least one pixel", "x", shape_string(x.view));
    height = check_range(resize[0], "resize", 1, 1 << 20);
    width = check_range(resize[1], "resize", 1, 1 << 20);
  }
  const int64_t padded_h = height + before + after, padded_w = width + before + after;
  if (padded_h < kh || padded_w < kw)
    refuse(format("at least %lld x %lld pixels", ll(kh - before - after), ll(kw - before - after)), "x",
           shape_string(x.view));
  const int64_t oh = (padded_h - kh) / stride + 1, ow = (padded_w - kw) / stride + 1;
  const int64_t n = check_packed(w, "w", a, kh * kw * channels), rows = batch * oh * ow;
  if (w.view.layout != Layout::panels) refuse("ungated weights", "w", shape_string(w.view));
  if (a != DType::f32 && w.dtype() != a)
    refuse(format("%s weights", dtype_name(a)), "w", shape_string(w.view));
  OptTensor per_image = bias;
  if (bias && bias->rank() == 1 && bias->contiguous()) per_image = bias->reshape({1, bias->dim(0)});
  check(per_image, "bias", DType::f32, {kAny, n}, Rows::strided);
  if (per_image && per_image->dim(0) != 1) check(per_image, "bias", DType::f32, {batch, n}, Rows::strided);
  check_epilogue(a, w, {}, scale, residual, rows, n);
  Tensor out = make(x.device(), a, {batch, oh, ow, n});
  if (rows > 0)
    x.device().conv2d({x.view, w.view, view_of(per_image), view_of(scale), view_of(residual),
                       static_cast<int>(kh), static_cast<int>(kw), static_cast<int>(stride),
                       static_cast<int>(before), static_cast<int>(after), static_cast<int>(height),
                       static_cast<int>(width), activation, out.view});
  return out;
}

Tensor depthwise_conv_norm(const Tensor& x, const Tensor& w, const Tensor& bias, const Tensor& norm_weight,
                           const Tensor& norm_bias, double eps) {
  const DType a = check_activations(x, "x", true);
  check(x, "x", a, {kAny, kAny, kAny, kAny});
  const int64_t channels = x.dim(3);
  check(w, "w", DType::f32, {kAny, kAny, channels});
  if (w.dim(0) % 2 == 0 || w.dim(1) % 2 == 0) refuse("odd kernel sizes", "w", shape_string(w.view));
  check(bias, "bias", DType::f32, {channels});
  check(norm_weight, "normWeight", DType::f32, {channels});
  check(norm_bias, "normBias", DType::f32, {channels});
  Tensor out = make(x.device(), a, x.shape());
  if (x.view.numel() > 0)
    x.device().depthwise_conv_norm({x.view, w.view, bias.view, norm_weight.view, norm_bias.view,
                                    check_finite(eps, "eps", true), out.view});
  return out;
}

std::vector<Tensor> rms_norm(const Tensor& x, const Tensor& weight, const OptTensor& residual, double eps,
                             double weight_offset) {
  const DType a = check_activations(x, "x", false);
  const Tensor rows = as_rows(x, "x");
  check(weight, "weight", DType::f32, {rows.dim(1)});
  OptTensor added;
  if (residual) added = as_rows(*residual, "residual");
  check(added, "residual", a, {rows.dim(0), rows.dim(1)}, Rows::strided);
  std::vector<Tensor> out{make(x.device(), a, rows.shape())};
  if (added) out.push_back(make(x.device(), a, rows.shape()));
  if (rows.view.numel() > 0)
    x.device().rms_norm({rows.view, view_of(added), weight.view, check_finite(eps, "eps", false),
                         check_finite(weight_offset, "weightOffset", false), out[0].view,
                         added ? out[1].view : View{}});
  for (Tensor& tensor : out) tensor = tensor.reshape(x.shape());
  return out;
}

std::vector<Tensor> layer_norm(const Tensor& x, const Tensor& weight, const Tensor& bias,
                               const OptTensor& residual, double eps) {
  const DType a = check_activations(x, "x", false);
  const Tensor rows = as_rows(x, "x");
  check(weight, "weight", DType::f32, {rows.dim(1)});
  check(bias, "bias", DType::f32, {rows.dim(1)});
  OptTensor added;
  if (residual) added = as_rows(*residual, "residual");
  check(added, "residual", a, {rows.dim(0), rows.dim(1)}, Rows::strided);
  std::vector<Tensor> out{make(x.device(), a, rows.shape())};
  if (added) out.push_back(make(x.device(), a, rows.shape()));
  if (rows.view.numel() > 0)
    x.device().layer_norm({rows.view, view_of(added), weight.view, bias.view, check_finite(eps, "eps", false),
                           out[0].view, added ? out[1].view : View{}});
  for (Tensor& tensor : out) tensor = tensor.reshape(x.shape());
  return out;
}

Tensor group_norm(const Tensor& x, const OptTensor& more, const Tensor& weight, const Tensor& bias,
                  int64_t groups, double eps, Activation activation) {
  const DType a = check_activations(x, "x", false);
  check(x, "x", a, {kAny, kAny, kAny, kAny});
  check(more, "more", a, {x.dim(0), x.dim(1), x.dim(2), kAny});
  const int64_t channels = x.dim(3) + (more ? more->dim(3) : 0);
  check(weight, "weight", DType::f32, {channels});
  check(bias, "bias", DType::f32, {channels});
  check_range(groups, "groups", 1, std::max<int64_t>(channels, 1));
  if (channels % groups)
    refuse(format("a divisor of %lld channels", ll(channels)), "groups", std::to_string(groups));
  if (activation != Activation::none && activation != Activation::silu)
    refuse("none or silu", "activation", "another one");
  Tensor out = make(x.device(), a, {x.dim(0), x.dim(1), x.dim(2), channels});
  if (out.view.numel() > 0)
    x.device().group_norm({x.view, view_of(more), weight.view, bias.view, static_cast<int>(groups),
                           check_finite(eps, "eps", true), activation, out.view});
  return out;
}

void check_heads(int64_t heads, int64_t kv_heads) {
  if (kv_heads == 0 || heads % kv_heads)
    refuse(format("a number of kv heads that divides %lld", ll(heads)), "k", std::to_string(kv_heads));
}

Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_q, const Tensor& cu_k,
                 double scale, bool causal) {
  const DType a = check_activations(q, "q", true);
  check(q, "q", a, {kAny, kAny, kAny}, Rows::strided);
  check_range(q.dim(2), "the head dimension of q", 1, 512);
  check(k, "k", a, {kAny, kAny, q.dim(2)}, Rows::strided);
  check(v, "v", a, {k.dim(0), k.dim(1), q.dim(2)}, Rows::strided);
  check_heads(q.dim(1), k.dim(1));
  check(cu_q, "cuQ", DType::i32, {kAny});
  check(cu_k, "cuK", DType::i32, {cu_q.dim(0)});
  check_range(cu_q.dim(0), "the length of cuQ", 1, 1 << 24);
  Tensor out = make(q.device(), a, q.shape());
  if (q.view.numel() > 0)
    q.device().attention({q.view, k.view, v.view, cu_q.view, cu_k.view, check_finite(scale, "scale", false),
                          causal, out.view});
  return out;
}

void check_pages(const Tensor& k_pages, const Tensor& v_pages, int64_t head_dim) {
  check_float(k_pages, "kPages");
  check(k_pages, "kPages", k_pages.dtype(), {kAny, kAny, kAny, head_dim});
  check(v_pages, "vPages", k_pages.dtype(), k_pages.shape());
  check_range(k_pages.dim(2), "the page size of kPages", 1, 1 << 16);
}

Tensor paged_attention(const Tensor& q, const Tensor& k_pages, const Tensor& v_pages,
                       const Tensor& block_table, const Tensor& cu_q, const Tensor& context_lens,
                       double scale) {
  const DType a = check_activations(q, "q", true);
  check(q, "q", a, {kAny, kAny, kAny}, Rows::strided);
  check_range(q.dim(2), "the head dimension of q", 1, 512);
  check_pages(k_pages, v_pages, q.dim(2));
  if (a != DType::f32 && k_pages.dtype() != a)
    refuse(std::string(dtype_name(a)) + " pages", "kPages", shape_string(k_pages.view));
  check_heads(q.dim(1), k_pages.dim(1));
  check(context_lens, "contextLens", DType::i32, {kAny});
  check(block_table, "blockTable", DType::i32, {context_lens.dim(0), kAny});
  check(cu_q, "cuQ", DType::i32, {context_lens.dim(0) + 1});
  Tensor out = make(q.device(), a, q.shape());
  if (q.view.numel() > 0)
    q.device().paged_attention({q.view, k_pages.view, v_pages.view, block_table.view, cu_q.view,
                                context_lens.view, check_finite(scale, "scale", false), out.view});
  return out;
}

Tensor rope_and_cache(const Tensor& qkv, const Tensor& positions, const Tensor& slots, const Tensor& inv_freq,
                      const Tensor& k_pages, const Tensor& v_pages) {
  const DType a = check_activations(qkv, "qkv", false);
  check(qkv, "qkv", a, {kAny, kAny}, Rows::strided);
  check(inv_freq, "invFreq", DType::f32, {kAny});
  const int64_t head_dim = 2 * inv_freq.dim(0);
  check_pages(k_pages, v_pages, head_dim);
  check(positions, "positions", DType::i32, {qkv.dim(0)});
  check(slots, "slots", DType::i32, {qkv.dim(0)});
  const int64_t kv_heads = k_pages.dim(1), heads = head_dim ? qkv.dim(1) / head_dim - 2 * kv_heads : 0;
  if (heads < 1 || (heads + 2 * kv_heads) * head_dim != qkv.dim(1))
    refuse(format("rows of (heads + %lld) x %lld", ll(2 * kv_heads), ll(head_dim)), "qkv",
           shape_string(qkv.view));
  check_heads(heads, kv_heads);
  Tensor out = make(qkv.device(), a, {qkv.dim(0), heads, head_dim});
  if (qkv.dim(0) > 0)
    qkv.device().rope_and_cache(
        {qkv.view, positions.view, slots.view, inv_freq.view, k_pages.view, v_pages.view, out.view});
  return out;
}

Tensor patch_mining(const Tensor& g, const TensorList& stages, int64_t grid, int64_t downscale, double eps,
                    double scale) {
  check(g, "g", DType::f32, {kAny, kAny});
  if (stages.size() != 4) refuse("four maps", "stages", std::to_string(stages.size()));
  check_range(grid, "grid", 1, 4096);
  check_range(downscale, "downscale", 1, 16);
  PatchMiningArgs args{};
  const DType a = check_activations(stages[0], "stages", true);
  int64_t channels = 0;
  for (size_t i = 0; i < 4; ++i) {
    check(stages[i], "stages", a, {stages[0].dim(0), kAny, kAny, kAny});
    if (stages[i].view.numel() == 0)
      refuse("maps that are not empty", "stages", shape_string(stages[i].view));
    channels += stages[i].dim(3);
    args.stages[i] = stages[i].view;
  }
  check(g, "g", DType::f32,
        {stages[0].dim(0) * grid * grid, g.dim(1) == channels + 1 ? channels + 1 : channels});
  const int64_t side = std::min(stages[0].dim(1), stages[0].dim(2)) / downscale;
  if (side < grid)
    refuse(format("at least %lld positions a side", ll(grid)), "stages", shape_string(stages[0].view));
  Tensor out = make(g.device(), a, {g.dim(0), channels});
  args.g = g.view;
  args.grid = static_cast<int>(grid);
  args.downscale = static_cast<int>(downscale);
  args.eps = check_finite(eps, "eps", true);
  args.scale = check_finite(scale, "scale", true);
  args.out = out.view;
  g.device().patch_mining(args);
  return out;
}

Tensor resize_bilinear(const Tensor& x, int64_t height, int64_t width) {
  const DType a = check_activations(x, "x", false);
  check(x, "x", a, {kAny, kAny, kAny, kAny});
  check_range(height, "height", 1, 1 << 20);
  check_range(width, "width", 1, 1 << 20);
  if (x.view.numel() == 0) refuse("at least one pixel", "x", shape_string(x.view));
  Tensor out = make(x.device(), a, {x.dim(0), height, width, x.dim(3)});
  x.device().resize_bilinear({x.view, out.view});
  return out;
}

Tensor embedding(const Tensor& table, const Tensor& ids, double scale, DType result) {
  check_rank(table, "table", 2);
  if (!table.packed()) {
    check_float(table, "table");
    if (!table.rows_contiguous()) refuse("contiguous rows", "table", "a strided view");
  }
  check(ids, "ids", DType::i32, {kAny});
  if (!table.device().computes_in(result, false)) refuse("a type of activations", "out", dtype_name(result));
  Tensor out = make(table.device(), result, {ids.dim(0), table.dim(1)});
  if (out.view.numel() > 0)
    table.device().embedding({table.view, ids.view, check_finite(scale, "scale", false), out.view});
  return out;
}

Tensor splice_embeddings(const Tensor& text, const Tensor& image, const Tensor& index) {
  const DType a = check_activations(text, "text", false);
  check(text, "text", a, {kAny, kAny}, Rows::strided);
  check(image, "image", a, {kAny, text.dim(1)}, Rows::strided);
  check(index, "index", DType::i32, {kAny});
  Tensor out = make(text.device(), a, {index.dim(0), text.dim(1)});
  if (out.view.numel() > 0) text.device().splice_embeddings({text.view, image.view, index.view, out.view});
  return out;
}

std::vector<Tensor> sample(const Tensor& logits, const Tensor& options, const Tensor& state,
                           const OptTensor& history, const OptTensor& mask, int64_t top_logprobs) {
  check(logits, "logits", DType::f32, {kAny, kAny}, Rows::strided);
  const int64_t rows = logits.dim(0), vocab = logits.dim(1);
  check_range(vocab, "the vocabulary of logits", 1, 1 << 28);
  check(options, "options", DType::f32, {rows, 6});
  check(state, "state", DType::i32, {rows, 5});
  check(history, "history", DType::i32, {rows, kAny});
  check(mask, "mask", DType::u8, {rows, (vocab + 7) / 8});
  check_range(top_logprobs, "topLogprobs", 0, std::min<int64_t>(vocab, 1024));
  Device& device = logits.device();
  std::vector<Tensor> out{make(device, DType::i32, {rows}), make(device, {rows, 1 + top_logprobs})};
  if (top_logprobs > 0) out.push_back(make(device, DType::i32, {rows, top_logprobs}));
  if (rows > 0)
    device.sample({logits.view, options.view, state.view, view_of(history), view_of(mask), out[0].view,
                   out[1].view, top_logprobs > 0 ? out[2].view : View{}});
  return out;
}

std::vector<Tensor> scheduler_step(const Tensor& x, const OptTensor& model, const Tensor& coefficients,
                                   const OptTensor& previous, const OptTensor& noise, int64_t halves,
                                   DType input) {
  check(x, "x", DType::f32, {kAny, kAny, kAny, kAny});
  const Shape shape = x.shape();
  check_range(halves, "halves", 1, 2);
  if (!x.device().computes_in(input, false)) refuse("a type of activations", "input", dtype_name(input));
  const Shape twice = {halves * shape[0], shape[1], shape[2], shape[3]};
  check(model, "model", input, twice);
  check(coefficients, "coefficients", DType::f32, {shape[0], 8});
  check(previous, "previous", DType::f32, shape);
  check(noise, "noise", DType::f32, shape);
  Device& device = x.device();
  std::vector<Tensor> out{make(device, shape), make(device, input, twice)};
  if (model) out.push_back(make(device, shape));
  if (x.view.numel() > 0)
    device.scheduler_step({x.view, view_of(model), coefficients.view, view_of(previous), view_of(noise),
                           out[0].view, model ? out[2].view : View{}, out[1].view});
  return out;
}

Tensor random_normal(const Tensor& seeds, const Ints& shape) {
  check(seeds, "seeds", DType::i32, {kAny, 3});
  Shape full{seeds.dim(0)};
  for (const int64_t size : shape) full.push_back(check_range(size, "shape", 0, 1ll << 31));
  if (full.size() > kMaxRank) refuse(format("at most %d sizes", kMaxRank - 1), "shape", shape_string(shape));
  Tensor out = make(seeds.device(), full);
  if (out.view.numel() > 0)
    seeds.device().random_normal({seeds.view, out.reshape({full[0], out.view.numel() / full[0]}).view});
  return out;
}

Tensor to_uint8(const Tensor& x, double scale, double offset) {
  check_activations(x, "x", false);
  if (!x.contiguous()) refuse("a contiguous tensor", "x", "a strided view; copy it with cast");
  Tensor out = make(x.device(), DType::u8, x.shape());
  if (x.view.numel() > 0)
    x.device().to_uint8(
        {x.view, check_finite(scale, "scale", false), check_finite(offset, "offset", false), out.view});
  return out;
}

std::vector<Tensor> add_tile(const Tensor& canvas, const Tensor& tile, const Tensor& rows,
                             const Tensor& columns, int64_t y, int64_t x) {
  check(canvas, "canvas", DType::f32, {kAny, kAny, kAny, kAny});
  const DType a = check_activations(tile, "tile", false);
  check(tile, "tile", a, {canvas.dim(0), kAny, kAny, canvas.dim(3)});
  check(rows, "rows", DType::f32, {tile.dim(1)});
  check(columns, "columns", DType::f32, {tile.dim(2)});
  if (tile.dim(1) > canvas.dim(1) || tile.dim(2) > canvas.dim(2))
    refuse(format("a tile of at most %lld x %lld pixels", ll(canvas.dim(1)), ll(canvas.dim(2))), "tile",
           shape_string(tile.view));
  check_range(y, "y", 0, canvas.dim(1) - tile.dim(1));
  check_range(x, "x", 0, canvas.dim(2) - tile.dim(2));
  if (tile.view.numel() > 0)
    tile.device().add_tile(
        {canvas.view, tile.view, rows.view, columns.view, static_cast<int>(y), static_cast<int>(x)});
  return {};
}

// -- the table: parameter kinds are read off the signatures
// ---------------------------------------------------------------

template <class T>
struct Param;  // type: its name in the table; get: the value or an Error

[[noreturn]] void wrong(const char* type, const OpParam& param) {
  refuse(type, param.name.c_str(), "another type");
}

template <class T, class Stored>
struct Plain {
  static T get(const Value& value, const OpParam& param) {
    if (const auto* stored = std::get_if<Stored>(&value)) return T(*stored);
    wrong(Param<T>::type, param);
  }
};
template <>
struct Param<Tensor> : Plain<Tensor, Tensor> {
  static constexpr const char* type = "tensor";
};
template <>
struct Param<TensorList> : Plain<TensorList, TensorList> {
  static constexpr const char* type = "tensor[]";
};
template <>
struct Param<double> : Plain<double, double> {
  static constexpr const char* type = "float";
};
template <>
struct Param<bool> : Plain<bool, bool> {
  static constexpr const char* type = "bool";
};
template <>
struct Param<Ints> : Plain<Ints, Ints> {
  static constexpr const char* type = "int[]";
};
template <>
struct Param<OptTensor> {
  static constexpr const char* type = "tensor?";
  static OptTensor get(const Value& value, const OpParam& param) {
    if (std::holds_alternative<std::monostate>(value)) return std::nullopt;
    if (const auto* tensor = std::get_if<Tensor>(&value)) return *tensor;
    wrong(type, param);
  }
};
template <>
struct Param<int64_t> {
  static constexpr const char* type = "int";
  static int64_t get(const Value& value, const OpParam& param) {
    const auto* number = std::get_if<double>(&value);
    if (!number || std::trunc(*number) != *number || std::abs(*number) > 0x1p53) wrong("an integer", param);
    return static_cast<int64_t>(*number);
  }
};
template <>
struct Param<DType> {
  static constexpr const char* type = "dtype";
  static DType get(const Value& value, const OpParam& param) {
    const auto* name = std::get_if<std::string>(&value);
    const auto dtype = name ? parse_dtype(*name) : std::nullopt;
    if (!dtype) refuse("a dtype", param.name.c_str(), name ? *name : "another type");
    return *dtype;
  }
};
template <>
struct Param<Activation> {
  static constexpr const char* type = "activation";
  static Activation get(const Value& value, const OpParam& param) {
    static constexpr const char* names[] = {"none", "gelu", "gelu_tanh", "quick_gelu", "silu"};
    const auto* name = std::get_if<std::string>(&value);
    for (int i = 0; name && i < 5; ++i)
      if (*name == names[i]) return static_cast<Activation>(i);
    refuse("none, gelu, gelu_tanh, quick_gelu or silu", param.name.c_str(), name ? *name : "another type");
  }
};

void check_devices(const std::vector<Value>& values) {
  Device* device = nullptr;
  auto visit = [&](const Tensor& tensor) {
    if (device && device != &tensor.device())
      refuse("tensors of one device", "all arguments", "tensors of two");
    device = &tensor.device();
  };
  for (const Value& value : values) {
    if (const auto* tensor = std::get_if<Tensor>(&value)) visit(*tensor);
    if (const auto* list = std::get_if<TensorList>(&value))
      for (const Tensor& tensor : *list) visit(tensor);
  }
  if (!device) return;
  for (const Value& value : values) {
    if (const auto* tensor = std::get_if<Tensor>(&value)) device->hold(*tensor);
    if (const auto* list = std::get_if<TensorList>(&value))
      for (const Tensor& tensor : *list) device->hold(tensor);
  }
}

std::vector<Tensor> listed(Tensor tensor) {
  return {std::move(tensor)};
}
std::vector<Tensor> listed(std::vector<Tensor> tensors) {
  return tensors;
}

template <class Result, class... Args, size_t... I>
Op entry(const char* name, Result (*function)(Args...), const std::vector<std::string>& names,
         std::index_sequence<I...>) {
  Op op{name, {OpParam{names.at(I), Param<std::decay_t<Args>>::type}...}, nullptr};
  op.run = [name, function, params = op.params](const std::vector<Value>& values) {
    current_op = name;
    if (values.size() != params.size())
      throw Error("INVALID_ARGUMENT",
                  format("[%s] expected %zu arguments but received %zu", name, params.size(), values.size()));
    check_devices(values);
    return listed(function(Param<std::decay_t<Args>>::get(values[I], params[I])...));
  };
  return op;
}

template <class Result, class... Args>
Op op(const char* name, Result (*function)(Args...), const std::vector<std::string>& names) {
  return entry(name, function, names, std::index_sequence_for<Args...>{});
}

}  // namespace

const std::vector<Op>& op_table() {
  static const std::vector<Op> table = {
      op("cast", &cast, {"x", "dtype"}),
      op("permute", &permute, {"x", "dims"}),
      op("scaleColumns", &scale_columns, {"w", "scale"}),
      op("packLinear", &pack_linear, {"weights", "dtype", "gated"}),
      op("linear", &linear, {"x", "w", "bias", "scale", "residual", "activation", "out"}),
      op("moeRoute", &moe_route, {"logits", "topK"}),
      op("groupedLinear", &grouped_linear, {"x", "w", "ids", "weights", "residual", "activation"}),
      op("conv2d", &conv2d,
         {"x", "w", "bias", "scale", "residual", "kernel", "stride", "pad", "resize", "activation"}),
      op("depthwiseConvNorm", &depthwise_conv_norm, {"x", "w", "bias", "normWeight", "normBias", "eps"}),
      op("rmsNorm", &rms_norm, {"x", "weight", "residual", "eps", "weightOffset"}),
      op("layerNorm", &layer_norm, {"x", "weight", "bias", "residual", "eps"}),
      op("groupNorm", &group_norm, {"x", "more", "weight", "bias", "groups", "eps", "activation"}),
      op("attention", &attention, {"q", "k", "v", "cuQ", "cuK", "scale", "causal"}),
      op("pagedAttention", &paged_attention,
         {"q", "kPages", "vPages", "blockTable", "cuQ", "contextLens", "scale"}),
      op("ropeAndCache", &rope_and_cache, {"qkv", "positions", "slots", "invFreq", "kPages", "vPages"}),
      op("patchMining", &patch_mining, {"g", "stages", "grid", "downscale", "eps", "scale"}),
      op("resizeBilinear", &resize_bilinear, {"x", "height", "width"}),
      op("embedding", &embedding, {"table", "ids", "scale", "out"}),
      op("spliceEmbeddings", &splice_embeddings, {"text", "image", "index"}),
      op("sample", &sample, {"logits", "options", "state", "history", "mask", "topLogprobs"}),
      op("schedulerStep", &scheduler_step,
         {"x", "model", "coefficients", "previous", "noise", "halves", "input"}),
      op("randomNormal", &random_normal, {"seeds", "shape"}),
      op("toUint8", &to_uint8, {"x", "scale", "offset"}),
      op("addTile", &add_tile, {"canvas", "tile", "rows", "columns", "y", "x"}),
  };
  return table;
}

}  // namespace mgm
