// State of the stand-in driver: devices, contexts, streams, and the operations enqueued in them.
//
// Work is a graph of operations (Op). A call enqueues one with edges to everything that CUDA orders before it
// and returns; nothing runs until a wait needs it (the waiting thread then runs its ancestors in random
// order) or the background worker picks it at a random time. Two operations that no chain of edges joins are
// unordered, whatever happened to run first, so misuse is found from the graph as well as from what the
// delays do to the data.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <deque>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "../emulator.h"
#include "cuda_abi.h"
#include "reports.h"

namespace mgm::emulator::cuda {

using Lock = std::unique_lock<std::mutex>;

struct Device;
struct Context;
struct Stream;
struct Op;
struct Graph;
struct GraphExec;
struct GraphAlloc;
struct Allocation;
using OpPtr = std::shared_ptr<Op>;

enum class WorkKind { empty, kernel, copy, fill, host, alloc, free, event };
const char* work_name(WorkKind kind);

// A range that an operation reads or writes. Inexact: it may touch only a part (2D copies), so an overlap
// alone is no conflict.
struct Access {
  uint64_t address;
  size_t bytes;
  bool write;
  bool host = false;
  bool exact = true;
};

struct LoadedModule {
  std::shared_ptr<Module> module;
  std::vector<FunctionInfo> functions;
  Context* context = nullptr;
  uint64_t handle = 0;
  std::map<std::string, uint64_t> function_handles;
};

struct Function {
  std::shared_ptr<LoadedModule> module;
  int index = 0;
  int max_dynamic_shared = 0;  // opted in by cuFuncSetAttribute
  int carveout = -1;
  const FunctionInfo& info() const { return module->functions[static_cast<size_t>(index)]; }
};

// What an operation does; immutable once enqueued, so a graph's nodes and their launches share it.
struct Work {
  WorkKind kind = WorkKind::empty;
  std::string label;  // for reports: "cuMemcpyHtoDAsync_v2", the kernel's name
  std::vector<Access> accesses;
  // A kernel's arguments that are addresses of device memory; what it does with them is not known.
  std::vector<uint64_t> pointers;
  std::function<void(Context&)> run;
  CUhostFn host_fn = nullptr;
  void* user_data = nullptr;
  uint64_t alloc_address = 0;               // alloc, free
  std::shared_ptr<GraphAlloc> graph_alloc;  // alloc and free in a graph
  std::shared_ptr<Function> function;       // kernel
  LaunchConfig config;
  std::vector<std::byte> params;
};
using WorkPtr = std::shared_ptr<const Work>;

// A range of device memory that only an unordered operation may be using: if a kernel changes it, that is a
// race.
struct Watch {
  uint64_t address;
  size_t bytes;
  std::string other;
};

struct Op {
  enum State { pending, running, done };
  WorkPtr work;
  std::shared_ptr<Context> context;
  uint64_t stream_id = 0;
  std::vector<OpPtr> deps;        // kept until the host has seen the end of this operation
  std::vector<OpPtr> dependents;  // until done
  int waiting = 0;
  State state = pending;
  bool demanded = false;  // somebody waits or asks for it
  bool observed = false;  // the host knows that it ended: everything enqueued from now on comes after it
  std::vector<Watch> watches;
  std::chrono::steady_clock::time_point finished;
};

struct Allocation {
  enum Kind { device, stream_ordered, graph, host, registered };
  Kind kind = device;
  uint64_t address = 0;
  size_t bytes = 0;
  int device_index = 0;
  Context* context = nullptr;
  OpPtr alloc_op, free_op;  // stream-ordered ones
  uint64_t pool = 0;
  bool live = true;  // graph: between its alloc node and its free
  std::weak_ptr<GraphAlloc> graph_alloc;
  struct User {
    OpPtr op;
    Access access;
    bool kernel;
  };
  std::vector<User> users;         // not observed yet
  std::map<int, uint64_t> mapped;  // pinned: device index -> device address
  unsigned flags = 0;
};

// Memory of a graph's alloc node: one address for every launch, given back with the last graph that names it.
struct GraphAlloc {
  uint64_t address = 0;
  size_t bytes = 0;
  int device_index = 0;
  ~GraphAlloc();
};

struct Node {
  WorkPtr work;
  std::vector<Node*> deps;
  Graph* graph = nullptr;
  uint64_t handle = 0;
};

struct Graph {
  uint64_t handle = 0;
  std::shared_ptr<Context> context;
  std::vector<std::unique_ptr<Node>> nodes;
  ~Graph();
};

struct GraphExec {
  uint64_t handle = 0;
  std::shared_ptr<Context> context;
  struct Item {
    WorkPtr work;
    std::vector<size_t> deps;
    uint64_t source = 0;  // handle of the node it was made from
  };
  std::vector<Item> items;  // in an order that respects deps
  uint64_t flags = 0;
  OpPtr last;
};

struct Capture {
  uint64_t id = 0;
  std::shared_ptr<Graph> graph;
  int mode = 0;
  std::thread::id owner;
  Stream* origin = nullptr;
  bool invalid = false;
  std::set<Stream*> streams;
};

struct Stream {
  uint64_t handle = 0, id = 0;
  std::shared_ptr<Context> context;
  unsigned flags = 0;
  int priority = 0;
  bool legacy = false;
  OpPtr tail;
  std::shared_ptr<Capture> capture;
  std::vector<Node*> capture_deps;
  std::vector<uint64_t> capture_handles;  // what cuStreamGetCaptureInfo pointed at
  bool blocking() const { return !legacy && !(flags & 1); }
};

struct Event {
  uint64_t handle = 0;
  std::shared_ptr<Context> context;
  unsigned flags = 0;
  OpPtr op;
  std::shared_ptr<Capture> capture;
  std::vector<Node*> capture_deps;
};

struct Pool {
  uint64_t handle = 0;
  int device_index = 0;
  std::map<int, uint64_t> attributes;
  size_t used = 0, used_high = 0;
  std::set<int> readers;  // other devices given access
};

struct Library {
  uint64_t handle = 0;
  std::string image;
  std::map<Context*, std::shared_ptr<LoadedModule>> modules;
  std::map<std::string, uint64_t> kernels;
};

struct Kernel {
  uint64_t handle = 0;
  std::shared_ptr<Library> library;
  std::string name;
};

struct Context {
  uint64_t handle = 0;
  Device* device = nullptr;
  bool primary = false, active = true;
  unsigned flags = 0;
  unsigned api_version = 3020;
  std::atomic<int> error{0};  // sticky
  std::map<int, size_t> limits;
  int cache_config = 0;
  std::shared_ptr<Stream> legacy;
  std::map<std::thread::id, std::shared_ptr<Stream>> per_thread;
  std::set<Stream*> blocking;       // live ones
  std::vector<OpPtr> orphan_tails;  // of destroyed blocking streams
  std::set<Context*> peers;         // enabled
};

struct Device {
  int index = 0;
  DeviceSpec spec;
  std::unique_ptr<Memory> memory;
  std::shared_ptr<Context> primary;
  int retained = 0;
  std::shared_ptr<Pool> default_pool, pool;
};

// Objects by handle. Handles are numbers that are never used twice, so that a stale one is always recognised.
template <class T>
struct Table {
  std::unordered_map<uint64_t, std::shared_ptr<T>> live;
  std::shared_ptr<T> find(const void* handle) const {
    auto it = live.find(reinterpret_cast<uint64_t>(handle));
    return it == live.end() ? nullptr : it->second;
  }
};

enum class Order { random, lazy, eager };

// An error that a test asked for: of the count-th call of a driver function, of that name, or launch of a
// kernel whose name begins so.
struct PlannedError {
  std::string name;
  int count, error;
};

struct Driver {
  std::mutex mutex;
  std::condition_variable changed;
  bool initialized = false;
  std::atomic<bool> exiting{false};
  int version = 13000;
  Options options;
  Order order = Order::random;
  bool trace = false;
  bool peers = true;  // devices can access each other's memory (copies only, here)
  std::vector<PlannedError> planned_errors;
  std::mt19937_64 random;
  std::vector<std::unique_ptr<Device>> devices;
  uint64_t next_handle = 0x7e000010;
  uint64_t next_stream = 1;
  uint64_t next_capture = 1;

  Table<Context> contexts;
  Table<Stream> streams;
  Table<Event> events;
  Table<LoadedModule> modules;
  Table<Function> functions;
  Table<Graph> graphs;
  Table<GraphExec> execs;
  Table<Pool> pools;
  Table<Library> libraries;
  Table<Kernel> kernels;
  std::unordered_map<uint64_t, Node*> nodes;
  std::set<std::shared_ptr<Capture>> captures;

  std::map<uint64_t, std::shared_ptr<Allocation>> allocations;  // device memory by address
  std::map<uint64_t, std::shared_ptr<Allocation>> host;         // pinned memory by host address
  std::map<uint64_t, size_t> freed;                             // the last ranges given back, for messages
  std::deque<uint64_t> freed_order;

  std::vector<OpPtr> ready;
  size_t pending = 0;
  bool busy = false;  // one operation runs at a time; host functions run beside it
  std::deque<OpPtr> recent;
  std::deque<OpPtr> host_queue;
  size_t demanded = 0;
  bool threads_started = false;

  std::mutex garbage_mutex;
  std::vector<std::pair<int, uint64_t>> garbage;  // graph memory to give back

  uint64_t handle() { return next_handle += 16; }
  bool chance(int one_in) { return random() % static_cast<uint64_t>(one_in) == 0; }

  // scheduler.cpp; all under the lock unless they take it.
  OpPtr submit(const std::shared_ptr<Context>& context, uint64_t stream_id, WorkPtr work,
               std::vector<OpPtr> deps);
  bool before(const OpPtr& a, const OpPtr& b) const;  // a is ordered before b
  void demand(const OpPtr& op);
  void observe(const OpPtr& op);
  void wait(Lock& lock, const OpPtr& op);
  void wait_context(Lock& lock, Context& context);
  void start_threads();
  void stop();

  // stream.cpp
  CUresult enqueue(Stream& stream, WorkPtr work, OpPtr* op = nullptr);
  std::vector<OpPtr> stream_deps(Stream& stream);
  void invalidate(const std::shared_ptr<Capture>& capture);

  // memory.cpp
  Allocation* find_device(uint64_t address);
  Allocation* find_host(uint64_t address);
  void release(uint64_t address, bool report);
  void check_order(const OpPtr& op);
  void collect_garbage();
  std::string describe(uint64_t address, size_t bytes);

  // context.cpp
  CUresult initialize();
  void tear_down(Lock& lock, Context& context);
  CUresult planned_error(const std::string& name, bool kernel);  // 0: none is due

 private:
  bool run_one(Lock& lock, bool only_demanded);
  void run(Lock& lock, const OpPtr& op);
  void finish(const OpPtr& op);
  void worker();
  void host_worker();
};

Driver& driver();

// The calling thread's stack of contexts, and whether it is inside a host function.
struct ThreadState {
  std::vector<std::shared_ptr<Context>> stack;
  int capture_mode = 0;
  bool in_host_fn = false;
};
ThreadState& thread_state();

std::string hex(uint64_t value);
const char* error_name(int error);

// Kinds of calls: what is checked before the body runs.
enum CallFlags : unsigned {
  kPlain = 0,
  kContext = 1,        // needs a current context, which has no sticky error
  kCaptureUnsafe = 2,  // refused while a capture forbids potentially unsafe calls
  kNoInit = 4,         // legal before cuInit
  kAnyThread = 8,      // legal in a host function
};

// True for errors that end a context.
bool is_sticky(CUresult error);

CUresult enter(const char* name, unsigned flags, Lock& lock, std::shared_ptr<Context>* context);
CUresult leave(const char* name, CUresult result, Context* context);

// Runs the body of a driver entry point: lock, checks, exceptions, trace. Body: (Driver&, Lock&, Context&).
template <class Body>
CUresult call(const char* name, unsigned flags, Body&& body) {
  std::shared_ptr<Context> context;
  try {
    Lock lock(driver().mutex);
    if (CUresult refused = enter(name, flags, lock, &context)) return leave(name, refused, nullptr);
    static Context none;
    return leave(name, body(driver(), lock, context ? *context : none), context.get());
  } catch (const std::bad_alloc&) {
    return leave(name, CUDA_ERROR_OUT_OF_MEMORY, nullptr);
  } catch (const std::exception& error) {
    add_report(ReportKind::api_misuse, std::string(name) + " failed inside the emulator: " + error.what());
    return leave(name, CUDA_ERROR_UNKNOWN, nullptr);
  }
}

// Refuses a call by name: reported, so that it cannot pass for success.
CUresult misuse(const char* name, CUresult result, const std::string& why);

// stream.cpp: 0 and 1 are the legacy stream, 2 the calling thread's own.
CUresult find_stream(Driver& d, Context& context, CUstream handle, std::shared_ptr<Stream>* out);
// The same for calls that carry their own context and need none to be current.
CUresult any_stream(Driver& d, CUstream handle, std::shared_ptr<Stream>* out);

// module.cpp
CUresult load_module(Driver& d, Lock& lock, Context& context, const void* image, std::string* log,
                     std::shared_ptr<LoadedModule>* out);
CUresult find_function(Driver& d, Lock& lock, Context& context, CUfunction handle,
                       std::shared_ptr<Function>* out);
// launch.cpp
CUresult kernel_work(Driver& d, const char* name, const std::shared_ptr<Function>& function,
                     const LaunchConfig& config, void** params, void** extra, std::shared_ptr<Work>* out);
int max_active_blocks(const DeviceSpec& spec, const Function& function, int threads, size_t dynamic_shared);

}  // namespace mgm::emulator::cuda

#define MGM_CU extern "C" __attribute__((visibility("default"))) CUresult
