// A GPU as a device: one stream, stream-ordered memory, and a thread that waits for events, so that the
// owning thread never does.
#include "device.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "../runtime/error.h"
#include "context.h"

namespace mgm::cuda {
namespace {

// Four sizes an octave, as on the CPU: blocks of a captured graph are reused by size.
size_t round_up(size_t bytes) {
  if (bytes <= 256) return 256;
  const int octave = 63 - __builtin_clzll(bytes - 1);
  const size_t step = size_t{1} << (octave > 2 ? octave - 2 : 0);
  return std::max<size_t>((bytes + step - 1) / step * step, 256);
}

std::string fault_text(const Fault& fault) {
  const auto ll = [](int64_t value) { return static_cast<long long>(value); };
  switch (static_cast<FaultKind>(fault.kind)) {
    case FaultKind::embedding_id:
      return format("[embedding] expected an id below %lld but received %lld", ll(fault.limit),
                    ll(fault.value));
    case FaultKind::expert_id:
      return format("[grouped_linear] expected an expert from 0 to %lld but received %lld",
                    ll(fault.limit - 1), ll(fault.value));
    case FaultKind::splice_index:
      return format("[splice_embeddings] expected an index from %lld to %lld but received %lld",
                    ll(fault.low), ll(fault.limit - 1), ll(fault.value));
    case FaultKind::cache_slot:
      return format("expected a slot below %lld (or a negative one) for token %lld but received %lld",
                    ll(fault.limit), ll(fault.where), ll(fault.value));
    case FaultKind::history_length:
      return format("expected a history length up to %lld for row %lld but received %lld", ll(fault.limit),
                    ll(fault.where), ll(fault.value));
    case FaultKind::history_id:
      return format("expected an id below %lld for a history entry of row %lld but received %lld",
                    ll(fault.limit), ll(fault.where), ll(fault.value));
    case FaultKind::query_offset:
    case FaultKind::key_offset:
      return format(
          "expected non-decreasing offsets from 0 to %lld for %s but received %lld after %lld at index %lld",
          ll(fault.limit), fault.kind == static_cast<int32_t>(FaultKind::query_offset) ? "cu_q" : "cu_k",
          ll(fault.value), ll(fault.low), ll(fault.where));
    case FaultKind::context_length:
      return format(
          "expected %lld (its queries) to %lld (its pages) for context_lens of sequence %lld but received "
          "%lld",
          ll(fault.low), ll(fault.limit), ll(fault.where), ll(fault.value));
    case FaultKind::page:
      return format(
          "expected a page below %lld for block_table entry %lld of sequence %lld but received %lld",
          ll(fault.limit), ll(fault.low), ll(fault.where), ll(fault.value));
    default:
      return format("a kernel reported fault %d", fault.kind);
  }
}

// Page-locked host memory, through which all copies go: only from there do they run beside the caller. Blocks
// are kept and reused.
class Staging {
 public:
  static constexpr size_t kSmallest = size_t{64} << 10;

  explicit Staging(Context& context) : context_(context) {}

  struct Block {
    std::byte* data;
    size_t bytes;
  };

  Block take(size_t bytes) {
    size_t size = kSmallest;
    while (size < bytes) size *= 2;
    {
      std::lock_guard lock(mutex_);
      auto& list = free_[size];
      if (!list.empty()) {
        std::byte* data = list.back();
        list.pop_back();
        return {data, size};
      }
    }
    void* data;
    context_.check(driver().cuMemHostAlloc(&data, size, 0), "cuMemHostAlloc");
    std::lock_guard lock(mutex_);
    all_.push_back(data);
    return {static_cast<std::byte*>(data), size};
  }
  void give_back(Block block) {
    std::lock_guard lock(mutex_);
    free_[block.bytes].push_back(block.data);
  }
  void free_all() {
    std::lock_guard lock(mutex_);
    for (void* data : all_) driver().cuMemFreeHost(data);
    all_.clear();
    free_.clear();
  }

 private:
  Context& context_;
  std::mutex mutex_;
  std::map<size_t, std::vector<std::byte*>> free_;
  std::vector<void*> all_;
};

struct Counters {
  size_t used = 0, peak = 0, limit = 0;
};

class CudaDevice;

// Blocks that only one graph uses, so that nothing else lies there between its replays.
struct GraphPool {
  std::map<size_t, std::vector<CUdeviceptr>> free;
  std::weak_ptr<Device> device;
  ~GraphPool();
};

struct CudaGraph : Graph {
  CUgraphExec exec = nullptr;
  size_t ops = 0;
  std::vector<std::shared_ptr<Storage>> held;
  std::shared_ptr<GraphPool> pool;
  std::weak_ptr<Device> device;
  size_t length() const override { return ops; }
  ~CudaGraph() override;
};

class CudaStorage : public Storage {
 public:
  CudaStorage(std::shared_ptr<CudaDevice> device, CUdeviceptr data, size_t bytes, size_t capacity,
              std::shared_ptr<GraphPool> pool);
  ~CudaStorage() override;
  const std::shared_ptr<GraphPool>& pool() const { return pool_; }

 private:
  std::shared_ptr<GraphPool> pool_;  // null: the stream's memory pool
  size_t capacity_;
};

class CudaDevice final : public Device, private Queue {
 public:
  static constexpr size_t kChunk = size_t{8} << 20;         // largest piece of a write
  static constexpr size_t kMostWriting = size_t{64} << 20;  // written pieces under way before write() waits

  CudaDevice(std::shared_ptr<Context> context, size_t memory_limit)
      : Queue(context->info()),
        context_(std::move(context)),
        isa_(format("sm_%d", info().capability())),
        staging_(*context_) {
    counters_.limit = memory_limit;
    const Driver& api = driver();
    try {
      use();
      check(api.cuStreamCreate(&stream_, kStreamNonBlocking), "cuStreamCreate");
      check(api.cuStreamCreate(&capture_stream_, kStreamNonBlocking), "cuStreamCreate");
      check(api.cuMemAllocAsync(&fault_, sizeof(Fault), stream_), "cuMemAllocAsync");
      check(api.cuMemsetD8Async(fault_, 0, sizeof(Fault), stream_), "cuMemsetD8Async");
      waiter_ = std::thread([this] { wait_for_events(); });
    } catch (...) {
      release();
      context_->leave();
      throw;
    }
  }

  ~CudaDevice() override {
    terminate();
    release();
  }

  std::shared_ptr<Storage> allocate(size_t bytes) override {
    require_open();
    use();
    const size_t capacity = round_up(bytes);
    const auto self = std::static_pointer_cast<CudaDevice>(shared_from_this());
    CUdeviceptr data = 0;
    if (capture_) {
      auto& list = capture_->pool->free[capacity];
      if (!list.empty()) {
        data = list.back();
        list.pop_back();
      }
    }
    if (!data) {
      if (counters_.limit && counters_.used + capacity > counters_.limit)
        out_of_memory(capacity, counters_.limit - std::min(counters_.limit, counters_.used));
      // Also during a capture: the memory is stream_'s, where replays run.
      CUresult result = driver().cuMemAllocAsync(&data, capacity, stream_);
      if (result == kOutOfMemory) {
        // What was freed counts as free only once the work before it is done.
        driver().cuStreamSynchronize(stream_);
        trim();
        result = driver().cuMemAllocAsync(&data, capacity, stream_);
      }
      if (result == kOutOfMemory) {
        size_t available = 0, total = 0;
        check(driver().cuMemGetInfo_v2(&available, &total), "cuMemGetInfo");
        out_of_memory(capacity, available);
      }
      check(result, "cuMemAllocAsync");
    }
    counters_.used += capacity;
    counters_.peak = std::max(counters_.peak, counters_.used);
    return std::make_shared<CudaStorage>(self, data, bytes, capacity, capture_ ? capture_->pool : nullptr);
  }

  void give_back(CUdeviceptr data, size_t capacity, GraphPool* pool) {
    counters_.used -= capacity;
    if (pool)
      pool->free[capacity].push_back(data);
    else
      free_now(data);
  }

  // In order with the stream.
  void free_now(CUdeviceptr data) {
    context_->while_alive([&] { driver().cuMemFreeAsync(data, stream_); });
  }

  void write(const View& destination, const void* source, size_t bytes) override {
    refuse_in_capture("write");
    const auto* from = static_cast<const std::byte*>(source);
    auto to = reinterpret_cast<CUdeviceptr>(destination.data);
    for (size_t done = 0; done < bytes;) {
      const size_t count = std::min(bytes - done, kChunk);
      wait_for_room(count);
      const Staging::Block block = staging_.take(count);
      std::memcpy(block.data, from + done, count);
      check(driver().cuMemcpyHtoDAsync_v2(to + done, block.data, count, stream_), "cuMemcpyHtoDAsync");
      const auto written = [this, block, count](CUresult) {
        staging_.give_back(block);
        std::lock_guard lock(mutex_);
        writing_ -= count;
        room_.notify_one();
      };
      after(written, count);
      done += count;
    }
  }

  void read(const View& source, void* destination, Done done) override {
    refuse_in_capture("read");
    const size_t bytes = static_cast<size_t>(source.numel()) * dtype_size(source.dtype);
    View from = source;
    std::shared_ptr<Storage> copy;
    if (bytes > 0 && !is_contiguous(source)) {
      copy = allocate(bytes);
      from = contiguous_view(copy->data(), source.dtype, Shape(source.shape, source.shape + source.rank));
      cuda::cast(*this, {source, from});
    }
    const Staging::Block block = staging_.take(sizeof(Fault) + bytes);
    take_fault(block.data);
    if (bytes > 0)
      check(driver().cuMemcpyDtoHAsync_v2(block.data + sizeof(Fault),
                                          reinterpret_cast<CUdeviceptr>(from.data), bytes, stream_),
            "cuMemcpyDtoHAsync");
    after([this, block, bytes, destination, done = std::move(done)](CUresult result) {
      const std::exception_ptr failure = failure_of(result, block.data);
      if (!failure && bytes > 0) std::memcpy(destination, block.data + sizeof(Fault), bytes);
      staging_.give_back(block);
      done(failure);
    });
  }

  void synchronize(Done done) override {
    refuse_in_capture("synchronize");
    const Staging::Block block = staging_.take(sizeof(Fault));
    take_fault(block.data);
    after([this, block, done = std::move(done)](CUresult result) {
      const std::exception_ptr failure = failure_of(result, block.data);
      staging_.give_back(block);
      done(failure);
    });
  }

  void defer(std::function<void()> release) override {
    if (closed_ || context_->lost()) {
      release();
      return;
    }
    after([release = std::move(release)](CUresult) { release(); });
  }

  void begin_capture() override {
    refuse_in_capture("capture");
    auto graph = std::make_shared<CudaGraph>();
    graph->pool = std::make_shared<GraphPool>();
    graph->pool->device = weak_from_this();
    graph->device = weak_from_this();
    // Relaxed: loading a module or allocating for the graph is no part of it and must stay allowed.
    check(driver().cuStreamBeginCapture_v2(capture_stream_, kCaptureRelaxed), "cuStreamBeginCapture");
    capture_ = std::move(graph);
  }

  std::shared_ptr<Graph> end_capture() override {
    use();
    std::shared_ptr<CudaGraph> graph = std::exchange(capture_, nullptr);
    if (!graph) throw Error("INVALID_ARGUMENT", "expected a capture to end but received none");
    CUgraph recorded = nullptr;
    check(driver().cuStreamEndCapture(capture_stream_, &recorded), "cuStreamEndCapture");
    const CUresult result = driver().cuGraphInstantiateWithFlags(&graph->exec, recorded, 0);
    driver().cuGraphDestroy(recorded);
    check(result, "cuGraphInstantiateWithFlags");
    return graph;
  }

  void abort_capture() override {
    if (!capture_) return;
    context_->while_alive([&] {
      CUgraph recorded = nullptr;
      if (driver().cuStreamEndCapture(capture_stream_, &recorded) == kSuccess && recorded)
        driver().cuGraphDestroy(recorded);
    });
    capture_ = nullptr;
  }

  void replay(const std::shared_ptr<Graph>& graph) override {
    refuse_in_capture("replay");
    const auto recorded = std::static_pointer_cast<CudaGraph>(graph);
    if (recorded->device.lock().get() != this)
      throw Error("INVALID_ARGUMENT", "expected a graph of this device for replay but received another's");
    check(driver().cuGraphLaunch(recorded->exec, stream_), "cuGraphLaunch");
  }

  void hold(const Tensor& tensor) override {
    if (!capture_) return;
    const auto* storage = dynamic_cast<CudaStorage*>(tensor.storage.get());
    if (storage && storage->pool() == capture_->pool) return;
    for (const auto& held : capture_->held)
      if (held == tensor.storage) return;
    capture_->held.push_back(tensor.storage);
  }

  bool uses_host_memory() const override { return false; }
  bool computes_in(DType activations, bool matrices) const override {
    return activations == DType::bf16 || activations == DType::f16 ||
           (activations == DType::f32 && !matrices);
  }
  size_t packed_bytes(DType dtype, Layout layout, int64_t n, int64_t k) const override {
    return cuda::packed_bytes(dtype, layout, n, k);
  }

  MemoryStats memory() const override {
    uint64_t reserved = 0, used = 0;
    size_t available = 0, total = 0;
    context_->while_alive([&] {
      driver().cuMemGetInfo_v2(&available, &total);
      if (const auto attribute = driver().cuMemPoolGetAttribute) {
        attribute(context_->pool(), kPoolReservedCurrent, &reserved);
        attribute(context_->pool(), kPoolUsedCurrent, &used);
      }
    });
    const size_t pooled = reserved > used ? static_cast<size_t>(reserved - used) : 0, limit = counters_.limit;
    available += pooled;
    if (limit) available = std::min(available, limit - std::min(limit, counters_.used));
    return {counters_.used, pooled, counters_.peak, limit ? std::min(limit, info().memory) : info().memory,
            available};
  }

  void trim() override {
    if (context_->lost() || closed_) return;
    use();
    check(driver().cuMemPoolTrimTo(context_->pool(), 0), "cuMemPoolTrimTo");
  }

  int threads() const override { return info().multiprocessors; }
  const char* isa() const override { return isa_.c_str(); }

  void close(Done done) override {
    if (closed_) {
      done(nullptr);
      return;
    }
    abort_capture();
    CUevent event = nullptr;
    try {
      if (!context_->lost()) event = record();
    } catch (const Error&) {
      // A failure that nobody read goes with the device.
    }
    std::lock_guard lock(mutex_);
    waiting_.push_back({event, [this, done = std::move(done)](CUresult) {
                          leave();
                          done(nullptr);
                        }});
    closed_ = true;
    wake_.notify_one();
  }

  void terminate() override {
    {
      std::lock_guard lock(mutex_);
      closed_ = terminated_ = true;
      wake_.notify_one();
    }
    if (waiter_.joinable()) waiter_.join();
    context_->while_alive([&] { driver().cuStreamSynchronize(stream_); });
    leave();
  }

#define MGM_RUN(name, Args)              \
  void name(const Args& args) override { \
    require_open();                      \
    use();                               \
    cuda::name(*this, args);             \
    if (capture_) ++capture_->ops;       \
  }
  MGM_OPS(MGM_RUN)
#undef MGM_RUN

  CUstream stream() const {
    return stream_;
  }
  const Context& context() const {
    return *context_;
  }
  bool capturing() const {
    return capture_ != nullptr;
  }

  // Makes what is enqueued on this device from now on wait for what `other` has enqueued so far.
  void wait_for(CudaDevice& other) {
    const CUevent event = other.record();
    use();
    const CUresult result = driver().cuStreamWaitEvent(stream_, event, 0);
    other.retire(event);
    check(result, "cuStreamWaitEvent");
  }

  void copy_from(CudaDevice& other, CUdeviceptr to, CUdeviceptr from, size_t bytes) {
    refuse_in_capture("a copy between devices");
    other.refuse_in_capture("a copy between devices");
    context_->reach(other.context_);
    wait_for(other);
    check(driver().cuMemcpyPeerAsync(to, context_->handle(), from, other.context_->handle(), bytes, stream_),
          "cuMemcpyPeerAsync");
    // The source may be freed or overwritten by its own device next.
    other.wait_for(*this);
  }

 private:
  friend struct GraphPool;
  friend struct CudaGraph;

  struct Waiting {
    CUevent event;
    std::function<void(CUresult)> then;
  };

  std::shared_ptr<Storage> scratch(size_t bytes) override {
    return allocate(bytes);
  }
  Fault* fault() override {
    return reinterpret_cast<Fault*>(fault_);
  }

  void launch_bytes(const Kernel& kernel, Grid grid, int threads, size_t dynamic_shared, const void* args,
                    size_t bytes) override {
    context_->launch(kernel, grid, threads, dynamic_shared, args, bytes,
                     capture_ ? capture_stream_ : stream_);
  }

  static bool is_contiguous(const View& view) {
    Tensor tensor;
    tensor.view = view;
    return tensor.contiguous();
  }

  void use() const {
    context_->use();
  }

  void check(CUresult result, const char* call,
             const std::source_location& place = std::source_location::current()) const {
    context_->check(result, call, place);
  }

  void require_open() const {
    if (closed_) throw Error("CLOSED", "expected an open device but received a closed one");
    if (context_->lost())
      throw Error("DEVICE_LOST", format("the GPU's context died of %s; close the device and open it again",
                                        context_->loss().c_str()));
  }

  // Once: no thread of this device uses the context any more.
  void leave() {
    if (!left_.exchange(true)) context_->leave();
  }

  void refuse_in_capture(const char* what) const {
    require_open();
    if (capture_)
      throw Error("INVALID_ARGUMENT", format("expected only ops during a capture but received %s", what));
    use();
  }

  CUevent record() {
    use();
    CUevent event = nullptr;
    {
      std::lock_guard lock(mutex_);
      if (!events_.empty()) {
        event = events_.back();
        events_.pop_back();
      }
    }
    if (!event)
      check(driver().cuEventCreate(&event, kEventBlockingSync | kEventDisableTiming), "cuEventCreate");
    const CUresult result = driver().cuEventRecord(event, stream_);
    if (result != kSuccess) retire(event);
    check(result, "cuEventRecord");
    return event;
  }
  void retire(CUevent event) {
    if (!event) return;
    std::lock_guard lock(mutex_);
    events_.push_back(event);
  }

  // Runs `then` on the waiting thread once everything enqueued so far is done.
  void after(std::function<void(CUresult)> then, size_t writing = 0) {
    const CUevent event = record();
    std::lock_guard lock(mutex_);
    writing_ += writing;
    waiting_.push_back({event, std::move(then)});
    wake_.notify_one();
  }

  // The fault record to the host, and a clean one for what follows.
  void take_fault(std::byte* to) {
    check(driver().cuMemcpyDtoHAsync_v2(to, fault_, sizeof(Fault), stream_), "cuMemcpyDtoHAsync");
    check(driver().cuMemsetD8Async(fault_, 0, sizeof(Fault), stream_), "cuMemsetD8Async");
  }

  std::exception_ptr failure_of(CUresult result, const std::byte* record) {
    if (result != kSuccess)
      return std::make_exception_ptr(Error(is_sticky(result) ? "DEVICE_LOST" : "INTERNAL",
                                           "the GPU's work failed: " + describe(result)));
    Fault fault;
    std::memcpy(&fault, record, sizeof fault);
    if (fault.kind == 0) return nullptr;
    return std::make_exception_ptr(Error("INVALID_ARGUMENT", fault_text(fault)));
  }

  void wait_for_room(size_t bytes) {
    std::unique_lock lock(mutex_);
    room_.wait(lock, [&] { return writing_ == 0 || writing_ + bytes <= kMostWriting; });
  }

  void wait_for_events() {
    driver().cuCtxSetCurrent(context_->handle());
    for (;;) {
      Waiting next;
      {
        std::unique_lock lock(mutex_);
        wake_.wait(lock, [&] { return !waiting_.empty() || closed_; });
        if (terminated_ || waiting_.empty()) break;
        next = std::move(waiting_.front());
        waiting_.pop_front();
      }
      const CUresult result = next.event ? driver().cuEventSynchronize(next.event) : kSuccess;
      if (is_sticky(result)) context_->lose(result, "cuEventSynchronize");
      next.then(result);
      retire(next.event);
    }
  }

  [[noreturn]] void out_of_memory(size_t needed, size_t available) const {
    throw Error("OUT_OF_MEMORY",
                format("expected %zu free bytes for a tensor but received %zu (in use %zu, limit %zu)",
                       needed, available, counters_.used, counters_.limit));
  }

  void release() {
    context_->while_alive([&] {
      const Driver& api = driver();
      for (const Waiting& left : waiting_)
        if (left.event) api.cuEventDestroy_v2(left.event);
      for (const CUevent event : events_) api.cuEventDestroy_v2(event);
      if (fault_) api.cuMemFreeAsync(fault_, stream_);
      if (stream_) api.cuStreamSynchronize(stream_);
      staging_.free_all();
      for (const CUstream stream : {stream_, capture_stream_})
        if (stream) api.cuStreamDestroy_v2(stream);
    });
  }

  const std::shared_ptr<Context> context_;
  const std::string isa_;
  Counters counters_;
  CUstream stream_ = nullptr, capture_stream_ = nullptr;
  CUdeviceptr fault_ = 0;
  std::shared_ptr<CudaGraph> capture_;
  Staging staging_;

  std::mutex mutex_;
  std::condition_variable wake_, room_;
  std::deque<Waiting> waiting_;
  std::vector<CUevent> events_;  // for reuse
  size_t writing_ = 0;           // bytes
  bool terminated_ = false;
  std::atomic<bool> closed_ = false, left_ = false;
  std::thread waiter_;
};

CudaStorage::CudaStorage(std::shared_ptr<CudaDevice> device, CUdeviceptr data, size_t bytes, size_t capacity,
                         std::shared_ptr<GraphPool> pool)
    : Storage(std::move(device), reinterpret_cast<void*>(data), bytes),
      pool_(std::move(pool)),
      capacity_(capacity) {}

CudaStorage::~CudaStorage() {
  static_cast<CudaDevice&>(device()).give_back(reinterpret_cast<CUdeviceptr>(data()), capacity_, pool_.get());
}

GraphPool::~GraphPool() {
  const auto alive = std::static_pointer_cast<CudaDevice>(device.lock());
  if (!alive) return;
  for (const auto& [capacity, list] : free)
    for (const CUdeviceptr block : list) alive->free_now(block);
}

CudaGraph::~CudaGraph() {
  if (!exec) return;
  const auto alive = std::static_pointer_cast<CudaDevice>(device.lock());
  if (!alive) return;
  const auto destroy = [context = alive->context_, exec = exec] {
    context->while_alive([&] { driver().cuGraphExecDestroy(exec); });
  };
  try {
    alive->defer(destroy);
  } catch (const std::exception&) {
    // The context died meanwhile, and the graph with it.
  }
}

}  // namespace

std::shared_ptr<Device> open_device(int index, size_t memory_limit) {
  return std::make_shared<CudaDevice>(Context::open(index), memory_limit);
}

void copy_between(const Tensor& source, const Tensor& destination) {
  auto* from = dynamic_cast<CudaDevice*>(&source.device());
  auto* to = dynamic_cast<CudaDevice*>(&destination.device());
  if (!from || !to || !destination.contiguous() || !(source.contiguous() || source.packed()) ||
      source.byte_length() != destination.byte_length())
    throw Error("INVALID_ARGUMENT",
                format("expected contiguous tensors of one size on two GPUs but received %s and %s",
                       shape_string(source.view).c_str(), shape_string(destination.view).c_str()));
  to->copy_from(*from, reinterpret_cast<CUdeviceptr>(destination.view.data),
                reinterpret_cast<CUdeviceptr>(source.view.data), source.byte_length());
}

Survey survey() {
  Survey found{};
  try {
    const Driver& api = driver();
    found.library = api.path;
    found.driver_version = api.version;
    found.emulated = api.emulated;
    const int count = device_count();
    bool usable = false;
    for (int i = 0; i < count; ++i) {
      const DeviceInfo info = device_info(i);
      const std::string why = unusable(info);
      // Each family has the same images.
      const auto images = images_for("linear", info.capability());
      found.gpus.push_back({info.name, info.capability(), info.memory,
                            why.empty() && !images.empty() ? image_name(*images[0]) : "none: " + why});
      usable = usable || why.empty();
      if (!usable && found.error.empty()) found.error = why;
    }
    if (usable) found.error.clear();
    if (count == 0) found.error = "the driver sees no GPU";
  } catch (const std::exception& error) {
    found.error = error.what();
  }
  return found;
}

}  // namespace mgm::cuda
