#include "device.h"

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <deque>
#include <map>
#include <mutex>
#include <thread>
#include <utility>

#include "../runtime/error.h"
#include "../runtime/thread_pool.h"
#include "kernels.h"

namespace mgm::cpu {
namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kHuge = size_t{2} << 20;

// Four sizes an octave: at most a quarter of a block is wasted and blocks of similar tensors are
// interchangeable.
size_t round_up(size_t bytes) {
  if (bytes <= 256) return 256;
  const int octave = 63 - __builtin_clzll(bytes - 1);
  const size_t step = size_t{1} << (octave > 2 ? octave - 2 : 0);
  return (bytes + step - 1) / step * step;
}

void* system_allocate(size_t bytes) {
  if (bytes < kHuge)
    return std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
  void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) return nullptr;
  madvise(data, bytes, MADV_HUGEPAGE);
  return data;
}

void system_free(void* data, size_t bytes) {
  if (bytes < kHuge)
    std::free(data);
  else
    munmap(data, bytes);
}

// Free blocks by size. The queue runs in order, so a block freed now may be handed out now: whoever gets it
// works later.
struct Pool {
  std::map<size_t, std::vector<void*>> free;
  size_t reserved = 0;  // bytes in `free`
  std::weak_ptr<Device> device;
  ~Pool();
};

struct MemoryCounters {
  size_t used = 0, peak = 0, limit = 0;
};

class PoolStorage : public Storage {
 public:
  PoolStorage(std::shared_ptr<Device> device, void* data, size_t bytes, size_t capacity,
              std::shared_ptr<Pool> pool, std::shared_ptr<MemoryCounters> counters)
      : Storage(std::move(device), data, bytes),
        pool_(std::move(pool)),
        counters_(std::move(counters)),
        capacity_(capacity) {}
  ~PoolStorage() override {
    pool_->free[capacity_].push_back(data());
    pool_->reserved += capacity_;
    counters_->used -= capacity_;
  }
  const std::shared_ptr<Pool>& pool() const { return pool_; }

 private:
  std::shared_ptr<Pool> pool_;
  std::shared_ptr<MemoryCounters> counters_;
  size_t capacity_;
};

struct CpuGraph : Graph {
  using Ops = std::vector<std::function<void()>>;
  std::shared_ptr<Ops> ops = std::make_shared<Ops>();  // shared with replays under way
  std::vector<std::shared_ptr<Storage>> held;
  std::shared_ptr<Pool> pool;
  std::weak_ptr<Device> device;
  size_t length() const override { return ops->size(); }
};

void copy_strided(const View& source, std::byte* destination, int dim, const std::byte* from, size_t item) {
  const int64_t count = source.shape[dim];
  const int64_t step = source.strides[dim] * static_cast<int64_t>(item);
  if (dim == source.rank - 1) {
    if (source.strides[dim] == 1) {
      std::memcpy(destination, from, static_cast<size_t>(count) * item);
    } else {
      for (int64_t i = 0; i < count; ++i)
        std::memcpy(destination + static_cast<size_t>(i) * item, from + i * step, item);
    }
    return;
  }
  size_t inner = item;
  for (int i = dim + 1; i < source.rank; ++i) inner *= static_cast<size_t>(source.shape[i]);
  for (int64_t i = 0; i < count; ++i)
    copy_strided(source, destination + static_cast<size_t>(i) * inner, dim + 1, from + i * step, item);
}

class CpuDevice : public Device {
 public:
  CpuDevice(int threads, size_t memory_limit)
      : kernels_(cpu::kernels()),
        counters_(std::make_shared<MemoryCounters>()),
        pool_(std::make_shared<Pool>()),
        threads_(threads) {
    counters_->limit = memory_limit;
    worker_ = std::thread([this] { run(); });
  }

  ~CpuDevice() override { terminate(); }

  std::shared_ptr<Storage> allocate(size_t bytes) override {
    require_open();
    const size_t capacity = round_up(bytes);
    void* data = nullptr;
    // A captured graph keeps its own memory, so that nothing else may use it between replays.
    Pool& pool = capture_ ? *capture_->pool : *pool_;
    if (auto it = pool.free.find(capacity); it != pool.free.end() && !it->second.empty()) {
      data = it->second.back();
      it->second.pop_back();
      pool.reserved -= capacity;
    } else {
      if (counters_->limit && counters_->used + pool_->reserved + capacity > counters_->limit) trim();
      if (counters_->limit && counters_->used + capacity > counters_->limit)
        out_of_memory(capacity, counters_->limit - std::min(counters_->limit, counters_->used));
      data = system_allocate(capacity);
      if (!data) {
        trim();
        data = system_allocate(capacity);
      }
      if (!data) out_of_memory(capacity, 0);
    }
    counters_->used += capacity;
    counters_->peak = std::max(counters_->peak, counters_->used);
    return std::make_shared<PoolStorage>(shared_from_this(), data, bytes, capacity,
                                         capture_ ? capture_->pool : pool_, counters_);
  }

  void write(const View& destination, const void* source, size_t bytes) override {
    refuse_in_capture("write");
    std::vector<std::byte> copy(static_cast<const std::byte*>(source),
                                static_cast<const std::byte*>(source) + bytes);
    enqueue(
        [data = destination.data, copy = std::move(copy)] { std::memcpy(data, copy.data(), copy.size()); });
  }

  void read(const View& source, void* destination, Done done) override {
    refuse_in_capture("read");
    enqueue_final([this, source, destination, done = std::move(done)] {
      std::exception_ptr failure = std::exchange(failure_, nullptr);
      if (!failure && source.numel() > 0) {
        if (source.rank == 0)
          std::memcpy(destination, source.data, dtype_size(source.dtype));
        else
          copy_strided(source, static_cast<std::byte*>(destination), 0,
                       static_cast<const std::byte*>(source.data), dtype_size(source.dtype));
      }
      done(failure);
    });
  }

  void synchronize(Done done) override {
    refuse_in_capture("synchronize");
    enqueue_final([this, done = std::move(done)] { done(std::exchange(failure_, nullptr)); });
  }

  void defer(std::function<void()> release) override {
    std::unique_lock lock(mutex_);
    if (finished_) {
      lock.unlock();
      release();
      return;
    }
    queue_.push_back({std::move(release), true});
    lock.unlock();
    wake_.notify_one();
  }

  void begin_capture() override {
    require_open();
    refuse_in_capture("capture");
    capture_ = std::make_shared<CpuGraph>();
    capture_->pool = std::make_shared<Pool>();
    capture_->pool->device = weak_from_this();
    capture_->device = weak_from_this();
  }

  std::shared_ptr<Graph> end_capture() override {
    std::shared_ptr<CpuGraph> graph = std::move(capture_);
    capture_ = nullptr;
    return graph;
  }

  void abort_capture() override { capture_ = nullptr; }

  void hold(const Tensor& tensor) override {
    if (!capture_) return;
    const auto* pooled = dynamic_cast<PoolStorage*>(tensor.storage.get());
    if (pooled && pooled->pool() == capture_->pool) return;
    for (const auto& held : capture_->held)
      if (held == tensor.storage) return;
    capture_->held.push_back(tensor.storage);
  }

  void replay(const std::shared_ptr<Graph>& graph) override {
    refuse_in_capture("replay");
    auto recorded = std::static_pointer_cast<CpuGraph>(graph);
    if (recorded->device.lock().get() != this)
      throw Error("INVALID_ARGUMENT", "expected a graph of this device for replay but received another's");
    enqueue([ops = recorded->ops] {
      for (const auto& op : *ops) op();
    });
  }

  bool uses_host_memory() const override { return true; }
  bool computes_in(DType activations, bool) const override { return activations == DType::f32; }
  size_t packed_bytes(DType dtype, Layout layout, int64_t n, int64_t k) const override {
    return kernels_.packed_bytes(dtype, layout, n, k);
  }
  MemoryStats memory() const override {
    const size_t limit = counters_->limit;
    return {counters_->used, pool_->reserved, counters_->peak, limit,
            limit ? limit - std::min(limit, counters_->used) : std::numeric_limits<size_t>::max()};
  }
  int threads() const override { return threads_; }
  const char* isa() const override { return kernels_.isa; }

  void trim() override {
    Pool idle;
    idle.device = weak_from_this();
    std::swap(idle.free, pool_->free);
    std::swap(idle.reserved, pool_->reserved);
  }

  void close(Done done) override {
    std::unique_lock lock(mutex_);
    if (closed_) {
      lock.unlock();
      done(nullptr);
      return;
    }
    capture_ = nullptr;
    queue_.push_back({[done = std::move(done)] { done(nullptr); }, true});
    closed_ = true;
    lock.unlock();
    wake_.notify_one();
  }

  void terminate() override {
    {
      std::lock_guard lock(mutex_);
      closed_ = true;
      queue_.clear();
    }
    wake_.notify_one();
    if (worker_.joinable()) worker_.join();
  }

#define MGM_ENQUEUE(name, Args)                                     \
  void name(const Args& args) override {                            \
    enqueue([this, args] { kernels_.name(args, *threads_pool_); }); \
  }
  // pack_linear and grouped_linear carry lists, which the enqueued work must own: below.
  MGM_ENQUEUE(cast, CastArgs)
  MGM_ENQUEUE(permute, PermuteArgs)
  MGM_ENQUEUE(scale_columns, ScaleColumnsArgs)
  MGM_ENQUEUE(linear, LinearArgs)
  MGM_ENQUEUE(moe_route, MoeRouteArgs)
  MGM_ENQUEUE(conv2d, Conv2dArgs)
  MGM_ENQUEUE(depthwise_conv_norm, DepthwiseConvNormArgs)
  MGM_ENQUEUE(rms_norm, RmsNormArgs)
  MGM_ENQUEUE(layer_norm, LayerNormArgs)
  MGM_ENQUEUE(group_norm, GroupNormArgs)
  MGM_ENQUEUE(attention, AttentionArgs)
  MGM_ENQUEUE(paged_attention, PagedAttentionArgs)
  MGM_ENQUEUE(rope_and_cache, RopeAndCacheArgs)
  MGM_ENQUEUE(patch_mining, PatchMiningArgs)
  MGM_ENQUEUE(resize_bilinear, ResizeBilinearArgs)
  MGM_ENQUEUE(embedding, EmbeddingArgs)
  MGM_ENQUEUE(splice_embeddings, SpliceEmbeddingsArgs)
  MGM_ENQUEUE(sample, SampleArgs)
  MGM_ENQUEUE(scheduler_step, SchedulerStepArgs)
  MGM_ENQUEUE(random_normal, RandomNormalArgs)
  MGM_ENQUEUE(to_uint8, ToUint8Args)
  MGM_ENQUEUE(add_tile, AddTileArgs)
#undef MGM_ENQUEUE

  void pack_linear(const PackLinearArgs& args) override {
    enqueue([this, call = args, list = std::vector<View>(args.weights, args.weights + args.count)]() mutable {
      call.weights = list.data();
      kernels_.pack_linear(call, *threads_pool_);
    });
  }

  void grouped_linear(const GroupedLinearArgs& args) override {
    enqueue([this, call = args, list = std::vector<View>(args.w, args.w + args.experts)]() mutable {
      call.w = list.data();
      kernels_.grouped_linear(call, *threads_pool_);
    });
  }

 private:
  struct Task {
    std::function<void()> run;
    bool always;  // runs even after an earlier task failed
  };

  void require_open() const {
    if (closed_) throw Error("CLOSED", "expected an open device but received a closed one");
  }

  void refuse_in_capture(const char* what) const {
    require_open();
    if (capture_)
      throw Error("INVALID_ARGUMENT", format("expected only ops during a capture but received %s", what));
  }

  void enqueue(std::function<void()> op) {
    require_open();
    if (capture_) {
      capture_->ops->push_back(std::move(op));
      return;
    }
    push({std::move(op), false});
  }

  void enqueue_final(std::function<void()> op) {
    push({std::move(op), true});
  }

  void push(Task task) {
    {
      std::lock_guard lock(mutex_);
      queue_.push_back(std::move(task));
    }
    wake_.notify_one();
  }

  void run() {
    threads_pool_ = std::make_unique<ThreadPool>(threads_);
    for (;;) {
      Task task;
      {
        std::unique_lock lock(mutex_);
        wake_.wait(lock, [&] { return !queue_.empty() || closed_; });
        if (queue_.empty()) {
          finished_ = true;
          break;
        }
        task = std::move(queue_.front());
        queue_.pop_front();
      }
      if (failure_ && !task.always) continue;
      try {
        task.run();
      } catch (const Error&) {
        failure_ = std::current_exception();
      } catch (const std::bad_alloc&) {
        failure_ =
            std::make_exception_ptr(Error("OUT_OF_MEMORY", "the system refused scratch memory for an op"));
      } catch (const std::exception& error) {
        failure_ = std::make_exception_ptr(Error("INVALID_ARGUMENT", error.what()));
      }
    }
    threads_pool_.reset();
  }

  [[noreturn]] void out_of_memory(size_t needed, size_t available) const {
    throw Error("OUT_OF_MEMORY",
                format("expected %zu free bytes for a tensor but received %zu (in use %zu, limit %zu)",
                       needed, available, counters_->used, counters_->limit));
  }

  const Kernels& kernels_;
  std::shared_ptr<MemoryCounters> counters_;
  std::shared_ptr<Pool> pool_;
  std::shared_ptr<CpuGraph> capture_;
  const int threads_;
  std::unique_ptr<ThreadPool> threads_pool_;  // made and used by worker_ only
  std::exception_ptr failure_;                // worker_ only

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<Task> queue_;
  bool finished_ = false;  // the worker has left its loop
  std::atomic<bool> closed_ = false;
  std::thread worker_;
};

// Work enqueued before may still use the blocks: they go back to the system in order with it.
Pool::~Pool() {
  auto give_back = [blocks = std::move(free)] {
    for (const auto& [capacity, list] : blocks)
      for (void* block : list) system_free(block, capacity);
  };
  if (const auto alive = device.lock())
    alive->defer(std::move(give_back));
  else
    give_back();
}

}  // namespace

std::shared_ptr<Device> open_device(int threads, size_t memory_limit) {
  return std::make_shared<CpuDevice>(threads, memory_limit);
}

const char* best_isa() {
#ifdef MGM_X86
  if (__builtin_cpu_supports("x86-64-v4")) return "avx512";
  if (__builtin_cpu_supports("x86-64-v3")) return "avx2";
#endif
  return "portable";
}

namespace {

double thread_cpu_seconds() {
  timespec time;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

}  // namespace

// Rates by each thread's own CPU time: neighbours that take turns on the cores do not lower the peak.
double fma_peak(int threads, double seconds) {
  std::atomic<double> total = 0;
  std::vector<std::thread> workers;
  for (int i = 0; i < threads; ++i)
    workers.emplace_back([&] {
      float sink[64] = {};
      double flop = 0, elapsed = 0;
      const double start = thread_cpu_seconds();
      do {
        flop += kernels().fma_probe(100'000, sink);
        elapsed = thread_cpu_seconds() - start;
      } while (elapsed < seconds);
      double rate = total.load();
      while (!total.compare_exchange_weak(rate, rate + flop / elapsed)) {
      }
    });
  for (auto& worker : workers) worker.join();
  return total;
}

// The best few milliseconds of all threads together, so that neighbours who take the cores away for a while
// do not lower it. CPU time would not do here: threads that run one after the other have the memory to
// themselves.
double read_bandwidth(int threads, double seconds) {
  using Clock = std::chrono::steady_clock;
  constexpr double kWindow = 0.005;
  // Each thread walks four streams, as a kernel with several panels does, a step of each at a time.
  constexpr size_t kStreams = 4, kStep = size_t{256} << 10, kChunk = kStreams * kStep;
  // Together far beyond any last-level cache.
  const size_t bytes = size_t{1} << 30;
  const size_t steps = std::max(bytes / kChunk / static_cast<size_t>(threads), size_t{1});  // of a stream
  auto* data = static_cast<std::byte*>(system_allocate(bytes));
  if (!data) throw Error("OUT_OF_MEMORY", "expected 1 GiB free for the bandwidth probe");
  std::memset(data, 1, bytes);
  std::atomic<float> sink = 0;
  std::vector<std::vector<double>> ends(static_cast<size_t>(threads));  // when each chunk was through
  std::vector<std::thread> workers;
  const auto start = Clock::now();
  for (int i = 0; i < threads; ++i)
    workers.emplace_back([&, i] {
      std::vector<double>& mine = ends[static_cast<size_t>(i)];
      const size_t share = steps * kChunk;
      const std::byte* from = data + share * static_cast<size_t>(i);
      float sum = 0;
      double now = 0;
      for (size_t step = 0; now < seconds; step = (step + 1) % steps) {
        kernels().read_probe(from + step * kStep, kStep, kStreams, steps * kStep, &sum);
        now = std::chrono::duration<double>(Clock::now() - start).count();
        mine.push_back(now);
      }
      sink = sum;
    });
  for (auto& worker : workers) worker.join();
  system_free(data, bytes);

  std::vector<double> all;
  for (const auto& mine : ends) all.insert(all.end(), mine.begin(), mine.end());
  std::sort(all.begin(), all.end());
  const double window = std::min(kWindow, all.back());
  size_t best = 0;
  for (size_t from = 0, to = 0; to < all.size(); ++to) {
    while (all[to] - all[from] > window) ++from;
    // The chunk that ended as the window opened was read before it.
    best = std::max(best, to - from);
  }
  return static_cast<double>(best * kChunk) / window;
}

}  // namespace mgm::cpu
