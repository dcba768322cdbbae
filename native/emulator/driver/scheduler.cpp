// When operations run, and what is ordered before what.
#include <algorithm>
#include <chrono>
#include <cstring>
#include <unordered_set>

#include "driver.h"

namespace mgm::emulator::cuda {

const char* work_name(WorkKind kind) {
  static const char* const names[] = {"empty",         "kernel", "copy", "fill",
                                      "host function", "alloc",  "free", "event"};
  return names[static_cast<int>(kind)];
}

namespace {

// Ends of operations that nobody waits for are forgotten past this many; they then count as seen.
constexpr size_t kRecentKept = 20000;

// Device bytes at a range as they are now; empty where the range is gone.
std::vector<std::byte> snapshot(Context& context, const Watch& watch) {
  std::byte* data = context.device->memory->resolve(watch.address, watch.bytes);
  return data ? std::vector<std::byte>(data, data + watch.bytes) : std::vector<std::byte>{};
}

void execute(Op& op) {
  Context& context = *op.context;
  if (context.error || !op.work->run) return;
  std::vector<std::vector<std::byte>> was;
  for (auto& watch : op.watches) was.push_back(snapshot(context, watch));
  try {
    op.work->run(context);
  } catch (const std::exception& error) {
    add_report(ReportKind::api_misuse, op.work->label + " failed inside the emulator: " + error.what());
    int expected = 0;
    context.error.compare_exchange_strong(expected, CUDA_ERROR_UNKNOWN);
  }
  for (size_t i = 0; i < op.watches.size(); ++i) {
    if (was[i].empty() || snapshot(context, op.watches[i]) == was[i]) continue;
    add_report(ReportKind::api_misuse,
               "Unordered access: " + op.work->label + " on stream " + std::to_string(op.stream_id) +
                   " wrote memory at " + hex(op.watches[i].address) + " that " + op.watches[i].other +
                   " uses, and no event, stream or synchronisation orders the two",
               op.watches[i].address);
  }
}

}  // namespace

OpPtr Driver::submit(const std::shared_ptr<Context>& context, uint64_t stream_id, WorkPtr work,
                     std::vector<OpPtr> deps) {
  start_threads();
  auto op = std::make_shared<Op>();
  op->work = std::move(work);
  op->context = context;
  op->stream_id = stream_id;
  std::sort(deps.begin(), deps.end());
  deps.erase(std::unique(deps.begin(), deps.end()), deps.end());
  for (auto& dep : deps) {
    if (!dep || dep->observed) continue;
    op->deps.push_back(dep);
    if (dep->state != Op::done) {
      dep->dependents.push_back(op);
      ++op->waiting;
    }
  }
  if (options.checks) check_order(op);
  recent.push_back(op);
  while (!recent.empty() &&
         (recent.front()->observed || (recent.size() > kRecentKept && recent.front()->state == Op::done))) {
    observe(recent.front());
    recent.pop_front();
  }
  ++pending;
  if (!op->waiting) ready.push_back(op);
  if (op->work->kind == WorkKind::host) demand(op);
  changed.notify_all();
  return op;
}

bool Driver::before(const OpPtr& a, const OpPtr& b) const {
  if (!a || a->observed || a == b) return true;
  if (a->stream_id == b->stream_id) return true;  // only ever asked for an `a` that was enqueued first
  std::unordered_set<const Op*> seen;
  std::vector<const Op*> stack{b.get()};
  while (!stack.empty()) {
    const Op* op = stack.back();
    stack.pop_back();
    for (auto& dep : op->deps) {
      if (dep == a) return true;
      if (!dep->observed && seen.insert(dep.get()).second) stack.push_back(dep.get());
    }
  }
  return false;
}

void Driver::demand(const OpPtr& first) {
  std::vector<OpPtr> stack{first};
  while (!stack.empty()) {
    OpPtr op = std::move(stack.back());
    stack.pop_back();
    if (!op || op->demanded || op->state == Op::done) continue;
    op->demanded = true;
    ++demanded;
    stack.insert(stack.end(), op->deps.begin(), op->deps.end());
  }
  changed.notify_all();
}

void Driver::observe(const OpPtr& first) {
  std::vector<OpPtr> stack{first};
  while (!stack.empty()) {
    OpPtr op = std::move(stack.back());
    stack.pop_back();
    if (!op || op->observed) continue;
    op->observed = true;
    for (auto& dep : op->deps) stack.push_back(std::move(dep));
    op->deps.clear();
  }
}

void Driver::finish(const OpPtr& op) {
  op->state = Op::done;
  op->finished = std::chrono::steady_clock::now();
  for (auto& next : op->dependents) {
    if (--next->waiting == 0) ready.push_back(next);
  }
  op->dependents.clear();
  op->watches.clear();
  // Staged data and arguments go; the description stays for reports.
  auto rest = std::make_shared<Work>();
  rest->kind = op->work->kind;
  rest->label = op->work->label;
  op->work = std::move(rest);
  --pending;
  if (op->demanded) --demanded;
  changed.notify_all();
}

void Driver::run(Lock& lock, const OpPtr& op) {
  op->state = Op::running;
  if (op->work->kind == WorkKind::host) {
    host_queue.push_back(op);
    changed.notify_all();
    return;
  }
  busy = true;
  lock.unlock();
  execute(*op);
  lock.lock();
  busy = false;
  finish(op);
}

bool Driver::run_one(Lock& lock, bool only_demanded) {
  if (busy || exiting) return false;
  std::vector<size_t> choices;
  for (size_t i = 0; i < ready.size(); ++i) {
    if (!only_demanded || ready[i]->demanded) choices.push_back(i);
  }
  if (choices.empty()) return false;
  size_t index = choices[order == Order::eager ? 0 : random() % choices.size()];
  OpPtr op = ready[index];
  ready.erase(ready.begin() + static_cast<ptrdiff_t>(index));
  run(lock, op);
  return true;
}

void Driver::wait(Lock& lock, const OpPtr& op) {
  if (!op || op->observed) return;
  demand(op);
  while (op->state != Op::done && !exiting) {
    if (order == Order::random && chance(6) && run_one(lock, false)) continue;
    if (op->state == Op::done || run_one(lock, true)) continue;
    changed.wait(lock);
  }
  if (op->state == Op::done) observe(op);
}

void Driver::wait_context(Lock& lock, Context& context) {
  std::vector<OpPtr> mine;
  for (auto& op : recent) {
    if (op->context.get() == &context) mine.push_back(op);
  }
  for (auto& op : mine) wait(lock, op);
}

void Driver::worker() {
  Lock lock(mutex);
  while (true) {
    changed.wait(
        lock, [&] { return exiting || (!busy && !ready.empty() && (demanded > 0 || order != Order::lazy)); });
    if (exiting) return;
    // What somebody asked for comes soon, the rest whenever.
    auto delay = std::chrono::microseconds(0);
    if (order != Order::eager) {
      if (demanded > 0) {
        if (chance(8)) delay = std::chrono::microseconds(random() % 200);
      } else {
        delay = std::chrono::microseconds(1000 + random() % 7000);
      }
    }
    if (delay.count() > 0) {
      lock.unlock();
      std::this_thread::sleep_for(delay);
      lock.lock();
    }
    bool any = order == Order::eager || (order == Order::random && (demanded == 0 || chance(6)));
    if (run_one(lock, !any) || busy || exiting) continue;
    if (demanded > 0) {  // what is asked for waits for a host function
      lock.unlock();
      std::this_thread::sleep_for(std::chrono::microseconds(50));
      lock.lock();
    }
  }
}

void Driver::host_worker() {
  thread_state().in_host_fn = true;
  Lock lock(mutex);
  while (true) {
    changed.wait(lock, [&] { return exiting || !host_queue.empty(); });
    if (exiting) return;
    OpPtr op = host_queue.front();
    host_queue.pop_front();
    for (auto& dep : op->deps) observe(dep);
    WorkPtr work = op->work;
    lock.unlock();
    if (!op->context->error) work->host_fn(work->user_data);
    lock.lock();
    finish(op);
  }
}

void Driver::start_threads() {
  if (threads_started) return;
  threads_started = true;
  std::thread([this] { worker(); }).detach();
  std::thread([this] { host_worker(); }).detach();
}

// The process exits: nothing new starts, what runs may end first (not for ever: it could be what called
// exit).
void Driver::stop() {
  exiting = true;
  changed.notify_all();
  for (int i = 0; i < 200; ++i) {
    {
      Lock lock(mutex, std::try_to_lock);
      if (lock && !busy) return;
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
}

}  // namespace mgm::emulator::cuda
