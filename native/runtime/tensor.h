// Owned tensors: a View and the storage that keeps its memory.
#pragma once
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "view.h"

namespace mgm {

class Device;

// Memory of a device, given back when the last tensor over it goes. Storages live and die on the thread that
// owns the device (the JS thread); enqueued work holds bare pointers, because giving back is ordered with the
// work.
class Storage {
 public:
  virtual ~Storage() = default;
  Device& device() const { return *device_; }
  std::byte* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 protected:
  Storage(std::shared_ptr<Device> device, void* data, size_t bytes)
      : device_(std::move(device)), data_(static_cast<std::byte*>(data)), bytes_(bytes) {}
  std::shared_ptr<Device> device_;

 private:
  std::byte* data_;
  size_t bytes_;
};

using Shape = std::vector<int64_t>;

struct Tensor {
  std::shared_ptr<Storage> storage;
  View view;

  Device& device() const { return storage->device(); }
  DType dtype() const { return view.dtype; }
  int rank() const { return view.rank; }
  int64_t dim(int i) const { return view.shape[i < 0 ? i + view.rank : i]; }
  Shape shape() const { return Shape(view.shape, view.shape + view.rank); }
  bool packed() const { return view.layout != Layout::strided; }
  bool contiguous() const;
  // True if everything after dimension 0 is contiguous.
  bool rows_contiguous() const;
  size_t byte_length() const;  // of a strided tensor: of its elements; of a packed one: of its storage

  Tensor narrow(int64_t dim, int64_t start, int64_t length) const;
  Tensor reshape(Shape shape) const;
};

using OptTensor = std::optional<Tensor>;
using TensorList = std::vector<Tensor>;

size_t dtype_size(DType dtype);  // bytes of one element; 0 for int8 and int4, which have none
const char* dtype_name(DType dtype);
std::optional<DType> parse_dtype(const std::string& name);
const char* layout_name(Layout layout);
std::string shape_string(const View& view);  // "f32 [2, 3]"
std::string shape_string(const Shape& shape);

// The product of `shape` as a checked size, or an Error naming `what`.
int64_t checked_numel(const Shape& shape, const char* what);
View contiguous_view(void* data, DType dtype, const Shape& shape);

}  // namespace mgm
