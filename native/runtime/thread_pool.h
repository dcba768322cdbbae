// Fork-join pool of a CPU device. The thread that calls parallel_for works too, so `threads` counts it.
#pragma once
#include <cstdint>
#include <memory>

namespace mgm {

class ThreadPool {
 public:
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const;

  // Calls body(begin, end) over disjoint chunks of [0, n), at most `grain` long, until all are done. Chunks
  // are handed out dynamically, so no result may depend on which thread runs which chunk. Not reentrant. fn
  // must not throw. A kernel that needs scratch memory per worker asks thread_index().
  template <class Body>
  void parallel_for(int64_t n, int64_t grain, const Body& body) {
    run(
        n, grain,
        [](const void* ctx, int64_t begin, int64_t end) { (*static_cast<const Body*>(ctx))(begin, end); },
        &body);
  }

  // 0 .. size()-1 inside parallel_for (0 is the calling thread).
  static int thread_index();

  // Scratch of at least `bytes` (64-byte aligned) that belongs to the calling worker until its next call with
  // the same slot (0..3). Contents are undefined. Grows only; freed with the pool.
  void* scratch(int slot, size_t bytes);

 private:
  using Fn = void (*)(const void*, int64_t, int64_t);
  void run(int64_t n, int64_t grain, Fn fn, const void* ctx);
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace mgm
