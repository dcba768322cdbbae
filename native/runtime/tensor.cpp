#include "tensor.h"

#include "error.h"

namespace mgm {

size_t dtype_size(DType dtype) {
  switch (dtype) {
    case DType::f32:
    case DType::i32:
      return 4;
    case DType::bf16:
    case DType::f16:
      return 2;
    case DType::u8:
      return 1;
    case DType::int8:
    case DType::int4:
      return 0;
  }
  return 0;
}

const char* dtype_name(DType dtype) {
  static constexpr const char* names[] = {"f32", "bf16", "f16", "i32", "u8", "int8", "int4"};
  return names[static_cast<int>(dtype)];
}

std::optional<DType> parse_dtype(const std::string& name) {
  for (int i = 0; i <= static_cast<int>(DType::int4); ++i)
    if (name == dtype_name(static_cast<DType>(i))) return static_cast<DType>(i);
  return std::nullopt;
}

const char* layout_name(Layout layout) {
  static constexpr const char* names[] = {"strided", "panels", "gated_panels"};
  return names[static_cast<int>(layout)];
}

std::string shape_string(const Shape& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

std::string shape_string(const View& view) {
  std::string text = dtype_name(view.dtype) + (" " + shape_string(Shape(view.shape, view.shape + view.rank)));
  if (view.layout != Layout::strided) text += format(" (%s)", layout_name(view.layout));
  return text;
}

int64_t checked_numel(const Shape& shape, const char* what) {
  if (shape.size() > kMaxRank)
    throw Error("INVALID_ARGUMENT", format("expected at most %d dimensions for %s but received %zu", kMaxRank,
                                           what, shape.size()));
  int64_t numel = 1;
  for (const int64_t size : shape) {
    if (size < 0 || __builtin_mul_overflow(numel, size, &numel) || numel > (int64_t{1} << 46))
      throw Error("INVALID_ARGUMENT", format("expected a representable shape for %s but received %s", what,
                                             shape_string(shape).c_str()));
  }
  return numel;
}

View contiguous_view(void* data, DType dtype, const Shape& shape) {
  View view;
  view.data = data;
  view.dtype = dtype;
  view.rank = static_cast<int>(shape.size());
  int64_t stride = 1;
  for (int i = view.rank - 1; i >= 0; --i) {
    view.shape[i] = shape[static_cast<size_t>(i)];
    view.strides[i] = stride;
    stride *= view.shape[i];
  }
  return view;
}

bool Tensor::contiguous() const {
  if (packed()) return false;
  int64_t stride = 1;
  for (int i = view.rank - 1; i >= 0; --i) {
    if (view.shape[i] != 1 && view.strides[i] != stride) return false;
    stride *= view.shape[i];
  }
  return true;
}

bool Tensor::rows_contiguous() const {
  if (packed()) return false;
  int64_t stride = 1;
  for (int i = view.rank - 1; i >= 1; --i) {
    if (view.shape[i] != 1 && view.strides[i] != stride) return false;
    stride *= view.shape[i];
  }
  return true;
}

size_t Tensor::byte_length() const {
  return packed() ? storage->bytes() : static_cast<size_t>(view.numel()) * dtype_size(view.dtype);
}

Tensor Tensor::narrow(int64_t dim, int64_t start, int64_t length) const {
  if (packed())
    throw Error("INVALID_ARGUMENT", "expected a strided tensor for narrow but received packed weights");
  if (dim < 0 || dim >= view.rank)
    throw Error("INVALID_ARGUMENT", format("expected a dimension of %s for narrow but received %lld",
                                           shape_string(view).c_str(), static_cast<long long>(dim)));
  const int64_t size = view.shape[dim];
  if (start < 0 || length < 0 || start > size || length > size - start)
    throw Error(
        "INVALID_ARGUMENT",
        format(
            "expected a range within %lld for narrow of dimension %lld but received start %lld, length %lld",
            static_cast<long long>(size), static_cast<long long>(dim), static_cast<long long>(start),
            static_cast<long long>(length)));
  Tensor result = *this;
  result.view.shape[dim] = length;
  result.view.data = static_cast<std::byte*>(view.data) +
                     static_cast<size_t>(start * view.strides[dim]) * dtype_size(view.dtype);
  return result;
}

Tensor Tensor::reshape(Shape shape) const {
  if (packed())
    throw Error("INVALID_ARGUMENT", "expected a strided tensor for reshape but received packed weights");
  const int64_t numel = view.numel();
  int64_t known = 1;
  int inferred = -1;
  for (size_t i = 0; i < shape.size(); ++i) {
    if (shape[i] == -1 && inferred < 0)
      inferred = static_cast<int>(i);
    else if (shape[i] < 0 || __builtin_mul_overflow(known, shape[i], &known))
      known = -1;
  }
  if (inferred >= 0 && known > 0 && numel % known == 0) {
    shape[static_cast<size_t>(inferred)] = numel / known;
    known = numel;
  }
  if (known != numel || shape.size() > kMaxRank ||
      (inferred >= 0 && shape[static_cast<size_t>(inferred)] < 0))
    throw Error(
        "INVALID_ARGUMENT",
        format("expected a shape of %lld elements for reshape of %s but received %s",
               static_cast<long long>(numel), shape_string(view).c_str(), shape_string(shape).c_str()));
  Tensor result = *this;
  result.view = contiguous_view(view.data, view.dtype, shape);
  if (contiguous() || numel == 0) return result;

  // Walk both shapes from the back; each run of old dimensions that is contiguous may be split or merged
  // freely.
  int old_dim = view.rank - 1, new_dim = static_cast<int>(shape.size()) - 1;
  while (old_dim >= 0) {
    int64_t run = view.shape[old_dim], base = view.strides[old_dim];
    while (old_dim > 0 && (view.shape[old_dim - 1] == 1 || view.strides[old_dim - 1] == run * base))
      run *= view.shape[--old_dim];
    int64_t taken = 1;
    while (new_dim >= 0 && (taken < run || shape[static_cast<size_t>(new_dim)] == 1)) {
      result.view.strides[new_dim] = taken * base;
      taken *= shape[static_cast<size_t>(new_dim--)];
    }
    if (taken != run)
      throw Error("INVALID_ARGUMENT", format("expected strides that allow reshape of %s to %s but received a "
                                             "strided view; copy it first with cast",
                                             shape_string(view).c_str(), shape_string(shape).c_str()));
    --old_dim;
  }
  return result;
}

}  // namespace mgm
