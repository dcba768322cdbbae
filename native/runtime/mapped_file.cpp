#include "mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "device.h"
#include "error.h"

namespace mgm {
namespace {

class MappedStorage : public Storage {
 public:
  MappedStorage(std::shared_ptr<Device> device, std::shared_ptr<MappedFile> file, size_t offset, size_t bytes)
      : Storage(std::move(device), const_cast<std::byte*>(file->data()) + offset, bytes),
        file_(std::move(file)) {}
  // Enqueued ops may still read the mapping.
  ~MappedStorage() override {
    device_->defer([file = std::move(file_)] {});
  }

 private:
  std::shared_ptr<MappedFile> file_;
};

}  // namespace

std::shared_ptr<MappedFile> MappedFile::open(const std::string& path) {
  const auto refuse = [&](const char* reason) {
    throw Error("CHECKPOINT_INVALID",
                format("expected a readable file for %s but received: %s", path.c_str(), reason));
  };
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor < 0) refuse(std::strerror(errno));
  struct stat info = {};
  if (fstat(descriptor, &info) != 0 || !S_ISREG(info.st_mode)) {
    ::close(descriptor);
    refuse("not a regular file");
  }
  const auto size = static_cast<size_t>(info.st_size);
  void* data = nullptr;
  if (size > 0) data = mmap(nullptr, size, PROT_READ, MAP_PRIVATE, descriptor, 0);
  const int failure = errno;
  ::close(descriptor);
  if (data == MAP_FAILED) refuse(std::strerror(failure));
  return std::shared_ptr<MappedFile>(new MappedFile(path, static_cast<const std::byte*>(data), size));
}

MappedFile::~MappedFile() {
  if (size_ > 0) munmap(const_cast<std::byte*>(data_), size_);
}

Tensor tensor_from_file(Device& device, const std::shared_ptr<MappedFile>& file, int64_t offset, DType dtype,
                        const Shape& shape) {
  const size_t item = dtype_size(dtype);
  if (item == 0)
    throw Error("INVALID_ARGUMENT",
                format("expected a plain dtype for a file's tensor but received %s", dtype_name(dtype)));
  const size_t bytes = static_cast<size_t>(checked_numel(shape, "a file's tensor")) * item;
  if (offset < 0 || static_cast<size_t>(offset) > file->size() ||
      bytes > file->size() - static_cast<size_t>(offset))
    throw Error("CHECKPOINT_INVALID",
                format("expected %zu bytes at offset %lld of %s but received a file of %zu bytes", bytes,
                       static_cast<long long>(offset), file->path().c_str(), file->size()));
  Tensor tensor;
  if (device.uses_host_memory() && static_cast<size_t>(offset) % item == 0) {
    tensor.storage =
        std::make_shared<MappedStorage>(device.shared_from_this(), file, static_cast<size_t>(offset), bytes);
    tensor.view = contiguous_view(tensor.storage->data(), dtype, shape);
  } else {
    tensor.storage = device.allocate(bytes);
    tensor.view = contiguous_view(tensor.storage->data(), dtype, shape);
    if (bytes > 0) device.write(tensor.view, file->data() + offset, bytes);
  }
  return tensor;
}

}  // namespace mgm
