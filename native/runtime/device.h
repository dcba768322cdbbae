// A device: memory, one ordered queue of work, and the ops of the contract.
#pragma once
#include <exception>
#include <functional>
#include <memory>

#include "../ops.h"
#include "tensor.h"

namespace mgm {

struct MemoryStats {
  size_t used, reserved, peak, limit;
  size_t available;  // bytes that allocate() may still hand out; on the CPU only the limit counts
};

// Work recorded by a capture, with the memory it owns. Replayed on the device that recorded it.
class Graph {
 public:
  virtual ~Graph() = default;
  virtual size_t length() const = 0;
};

// Called on the owning (JS) thread only, but for the `done` callbacks, which the device calls on a thread of
// its own.
class Device : public std::enable_shared_from_this<Device> {
 public:
  using Done = std::function<void(std::exception_ptr)>;

  virtual ~Device() = default;

  virtual std::shared_ptr<Storage> allocate(size_t bytes) = 0;
  // Copies `bytes` from `source` now; the destination changes in order with the queue.
  virtual void write(const View& destination, const void* source, size_t bytes) = 0;
  // In order with the queue: copies the strided elements of `source` to `destination`, then calls done. The
  // first failure of the work before it is passed on and forgotten.
  virtual void read(const View& source, void* destination, Done done) = 0;
  virtual void synchronize(Done done) = 0;
  // Runs `release` once everything enqueued so far is done.
  virtual void defer(std::function<void()> release) = 0;

  virtual void begin_capture() = 0;
  virtual std::shared_ptr<Graph> end_capture() = 0;
  virtual void abort_capture() = 0;
  virtual void replay(const std::shared_ptr<Graph>& graph) = 0;
  // While capturing: makes the recorded work keep `tensor` alive.
  virtual void hold(const Tensor& tensor) = 0;

  // False: memory of the host, a mapped file's say, must be copied to the device before ops can use it.
  virtual bool uses_host_memory() const = 0;
  // Whether activations may be of this type; `matrices`: for the ops that multiply matrices.
  virtual bool computes_in(DType activations, bool matrices) const = 0;
  virtual size_t packed_bytes(DType dtype, Layout layout, int64_t n, int64_t k) const = 0;
  virtual MemoryStats memory() const = 0;
  virtual void trim() = 0;
  virtual int threads() const = 0;
  virtual const char* isa() const = 0;

  // No work is accepted any more; calls done when the queue has drained.
  virtual void close(Done done) = 0;
  // Drops what has not started and waits for what has. For the end of an environment.
  virtual void terminate() = 0;

#define MGM_DECLARE(name, Args) virtual void name(const Args& args) = 0;
  MGM_OPS(MGM_DECLARE)
#undef MGM_DECLARE
};

}  // namespace mgm
