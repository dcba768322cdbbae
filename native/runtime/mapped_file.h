#pragma once
#include <memory>
#include <string>

#include "tensor.h"

namespace mgm {

// A read-only memory mapping of a regular file.
class MappedFile {
 public:
  // Throws Error("CHECKPOINT_INVALID") naming the file and the system's reason.
  static std::shared_ptr<MappedFile> open(const std::string& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const std::byte* data() const { return data_; }
  size_t size() const { return size_; }
  const std::string& path() const { return path_; }

 private:
  MappedFile(std::string path, const std::byte* data, size_t size)
      : path_(std::move(path)), data_(data), size_(size) {}
  std::string path_;
  const std::byte* data_;
  size_t size_;
};

// A tensor over the bytes at `offset` of the file: mapped in place where the device uses host memory and the
// offset is aligned, else copied to the device.
Tensor tensor_from_file(Device& device, const std::shared_ptr<MappedFile>& file, int64_t offset, DType dtype,
                        const Shape& shape);

}  // namespace mgm
