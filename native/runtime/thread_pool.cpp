#include "thread_pool.h"

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace mgm {
namespace {

thread_local int current_index = 0;

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

// A decode step is a chain of short ops: a worker that slept between them would wake too late to help.
constexpr int kSpins = 4000;

struct ScratchBlock {
  void* data = nullptr;
  size_t size = 0;
};

}  // namespace

struct ThreadPool::Impl {
  struct Job {
    Fn fn;
    const void* ctx;
    int64_t n, grain;
  };

  explicit Impl(int threads) : size(threads < 1 ? 1 : threads), scratch(static_cast<size_t>(size)) {
    for (int i = 1; i < size; ++i) workers.emplace_back([this, i] { work(i); });
  }

  ~Impl() {
    {
      std::lock_guard lock(mutex);
      stopping = true;
      generation.fetch_add(1);
    }
    wake.notify_all();
    for (auto& worker : workers) worker.join();
    for (auto& slots : scratch)
      for (auto& block : slots.blocks) std::free(block.data);
  }

  void work(int index) {
    current_index = index;
    uint64_t seen = 0;
    for (;;) {
      for (int spin = 0; generation.load(std::memory_order_acquire) == seen && spin < kSpins; ++spin) pause();
      if (generation.load(std::memory_order_acquire) == seen) {
        std::unique_lock lock(mutex);
        sleepers.fetch_add(1);
        wake.wait(lock, [&] { return generation.load() != seen; });
        sleepers.fetch_sub(1);
      }
      seen = generation.load(std::memory_order_acquire);
      if (stopping) return;
      drain();
      running.fetch_sub(1, std::memory_order_release);
    }
  }

  void drain() {
    for (;;) {
      const int64_t begin = next.fetch_add(job.grain, std::memory_order_relaxed);
      if (begin >= job.n) return;
      const int64_t end = begin + job.grain < job.n ? begin + job.grain : job.n;
      job.fn(job.ctx, begin, end);
    }
  }

  const int size;
  Job job{};
  std::atomic<int64_t> next{0};
  std::atomic<int> running{0};
  std::atomic<int> sleepers{0};
  std::atomic<uint64_t> generation{0};
  std::mutex mutex;
  std::condition_variable wake;
  bool stopping = false;
  std::vector<std::thread> workers;
  struct Slots {
    ScratchBlock blocks[4];
  };
  std::vector<Slots> scratch;
};

ThreadPool::ThreadPool(int threads) : impl_(std::make_unique<Impl>(threads)) {}
ThreadPool::~ThreadPool() = default;

int ThreadPool::size() const {
  return impl_->size;
}
int ThreadPool::thread_index() {
  return current_index;
}

void* ThreadPool::scratch(int slot, size_t bytes) {
  auto& block = impl_->scratch[static_cast<size_t>(current_index)].blocks[slot];
  if (block.size < bytes) {
    std::free(block.data);
    const size_t rounded = (bytes + 4095) & ~size_t{4095};
    block.data = std::aligned_alloc(64, rounded);
    block.size = block.data ? rounded : 0;
    if (!block.data) throw std::bad_alloc();
  }
  return block.data;
}

void ThreadPool::run(int64_t n, int64_t grain, Fn fn, const void* ctx) {
  if (n <= 0) return;
  if (grain < 1) grain = 1;
  Impl& impl = *impl_;
  if (impl.size == 1 || n <= grain) {
    for (int64_t begin = 0; begin < n; begin += grain) fn(ctx, begin, begin + grain < n ? begin + grain : n);
    return;
  }
  impl.job = {fn, ctx, n, grain};
  impl.next.store(0, std::memory_order_relaxed);
  impl.running.store(impl.size - 1, std::memory_order_relaxed);
  impl.generation.fetch_add(1, std::memory_order_seq_cst);
  if (impl.sleepers.load(std::memory_order_seq_cst) > 0) {
    // The lock orders the wake-up after a worker's last look at `generation`.
    { std::lock_guard lock(impl.mutex); }
    impl.wake.notify_all();
  }
  impl.drain();
  // All workers must have left the job before its description (and ctx) may change.
  for (int spin = 0; impl.running.load(std::memory_order_acquire) != 0; ++spin) {
    if (spin < kSpins)
      pause();
    else
      std::this_thread::yield();
  }
}

}  // namespace mgm
