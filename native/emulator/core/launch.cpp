// Blocks, warps, barriers and launches.
#include <algorithm>
#include <cstdio>
#include <thread>

#include "exec.h"

namespace mgm::emulator {

std::string hex(uint64_t v) {
  char text[24];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(v));
  return text;
}

// ---- reports ----

void Launch::add(Report r) {
  std::lock_guard lock(mutex);
  size_t same = 0;
  for (const Report& o : result.reports) same += o.kind == r.kind && o.ptx_line == r.ptx_line;
  if (same < 1 && result.reports.size() < 100) result.reports.push_back(std::move(r));
}

static Report make_report(Warp& w, int line, int lane, ReportKind kind, const std::string& message,
                          uint64_t address) {
  Block& b = *w.block;
  Launch& l = *b.launch;
  Report r{};
  r.kind = kind;
  r.kernel = l.kernel->info.name;
  uint32_t t = static_cast<uint32_t>(w.index * 32 + std::max(lane, 0));
  uint32_t x = l.config.block[0], y = l.config.block[1];
  r.thread[0] = t % x;
  r.thread[1] = t / x % y;
  r.thread[2] = t / (x * y);
  std::copy(b.id, b.id + 3, r.block);
  r.ptx_line = line;
  r.address = address;
  auto triple = [](const uint32_t* v) {
    return "(" + std::to_string(v[0]) + "," + std::to_string(v[1]) + "," + std::to_string(v[2]) + ")";
  };
  r.message = message + ", in kernel '" + r.kernel + "', block " + triple(r.block) + ", thread " +
              triple(r.thread) + ", PTX line " + std::to_string(line) + ".";
  return r;
}

void Warp::note(const Inst& in, int lane, ReportKind kind, const std::string& message, uint64_t address) {
  block->launch->add(make_report(*this, in.line, lane, kind, message, address));
}
void Warp::fail(const Inst& in, int lane, ReportKind kind, int error, const std::string& message,
                uint64_t address) {
  note(in, lane, kind, message, address);
  throw Fault{kind, error};
}

// ---- groups of lanes ----

void Warp::store_current() {
  groups[current].pc = pc;
  groups[current].mask = active;
}

// Lanes at the same place run together; the group that is furthest behind runs first, which makes diverged
// paths meet again. Now and then another one is chosen, so that a spinning group cannot starve the rest.
bool Warp::select() {
  for (size_t i = 0; i < groups.size(); ++i) {
    if (!groups[i].mask) {
      groups[i--] = groups.back();
      groups.pop_back();
      continue;
    }
    if (groups[i].wait == Wait::barrier) continue;
    for (size_t j = i + 1; j < groups.size();) {
      if (groups[j].pc == groups[i].pc && groups[j].wait != Wait::barrier) {
        groups[i].mask |= groups[j].mask;
        groups[i].passed |= groups[j].passed;
        groups[i].skipped |= groups[j].skipped;
        groups[i].wait = Wait::none;
        groups[j] = groups.back();
        groups.pop_back();
      } else {
        ++j;
      }
    }
  }
  size_t best = SIZE_MAX;
  size_t runnable = 0;
  for (size_t i = 0; i < groups.size(); ++i) {
    if (groups[i].wait != Wait::none || !groups[i].mask) continue;
    ++runnable;
    if (best == SIZE_MAX || groups[i].pc < groups[best].pc) best = i;
  }
  if (best == SIZE_MAX) return false;
  if (runnable > 1 && block->random() % 16 == 0) {
    size_t k = block->random() % runnable;
    for (size_t i = 0; i < groups.size(); ++i)
      if (groups[i].wait == Wait::none && groups[i].mask && k-- == 0) best = i;
  }
  current = best;
  pc = groups[best].pc;
  active = groups[best].mask;
  switch_pc = INT32_MAX;
  for (const Group& g : groups)
    if (g.pc > pc) switch_pc = std::min(switch_pc, g.pc);
  return true;
}

bool Warp::run(int budget) {
  const bool count = block->launch->options.counters, checks = block->launch->options.checks;
  const Inst* code = kernel->code.data();
  while (budget > 0) {
    if (!select()) return false;
    stop = false;
    int before = budget;
    while (!stop && budget-- > 0) {
      if (pc >= switch_pc) break;
      const Inst& in = code[pc++];
      uint32_t m = active;
      if (in.pred != kNone) m &= in.pred_negated ? ~predicate(in.pred) : predicate(in.pred);
      if (count) ++block->classes[in.klass];
      if (in.past && checks && m) groups[current].skipped |= in.past & ~groups[current].passed;
      if (m) in.fn(*this, in, m);
    }
    instructions += static_cast<uint64_t>(before - std::max(budget, 0));
    if (!groups.empty() && current < groups.size() && !blocked) store_current();
    blocked = false;
  }
  return true;
}

void Warp::branch(uint32_t taken, int32_t target) {
  if (taken == active) {
    pc = target;
    if (groups.size() > 1) stop = true;
    return;
  }
  Group other = groups[current];
  other.pc = target;
  other.mask = taken;
  active &= ~taken;
  groups.push_back(other);
  stop = true;
}

// Threads that have ended count as arrived at barriers for all threads (PTX ISA, exit), so an early return is
// fine. Reported is who ends after work behind a barrier that others still come to.
void Warp::exit_lanes(uint32_t mask) {
  const uint64_t skipped = groups[current].skipped;
  const Inst& in = kernel->code[static_cast<size_t>(pc - 1)];
  if (skipped) {
    block->skipped |= skipped;
    block->skip_line = in.line;
    for (const Warp& w : block->warps)
      for (const Group& g : w.groups) {
        if (!g.mask || g.wait == Wait::none || (&w == this && &g == &groups[current])) continue;
        const Inst& at = kernel->code[static_cast<size_t>(g.wait == Wait::barrier ? g.pc - 1 : g.pc)];
        if (skipped & barrier_bit(at))
          fail(in, __builtin_ctz(mask), ReportKind::divergent_barrier, 719,
               "the thread ends after passing by the barrier of PTX line " + std::to_string(at.line) +
                   ", where others of its block wait");
      }
  }
  alive &= ~mask;
  active &= ~mask;
  for (Group& g : groups) g.mask &= ~mask;
  if (!active || groups.size() > 1) stop = true;
  for (Group& g : groups)
    if (g.wait == Wait::sync || g.wait == Wait::converge) g.wait = Wait::none;  // look again
  if (!alive) block->check_barriers();
}

void Warp::wait_here(Wait kind) {
  groups[current].pc = pc - 1;
  groups[current].mask = active;
  groups[current].wait = kind;
  blocked = true;
  stop = true;
}

// For instructions that all live lanes of the warp must execute together.
void Warp::converge(const Inst& in, uint32_t mask, const char* what, bool* ready) {
  *ready = false;
  if (mask != active)
    fail(in, __builtin_ctz(active & ~mask), ReportKind::divergent_barrier, 719,
         std::string("a predicate keeps this thread out of ") + what +
             ", which all threads of the warp must execute");
  if (active == alive) {
    *ready = true;
    return;
  }
  wait_here(Wait::converge);
}

// Lanes of `mask` whose member mask equals that of `lane`. Checks that all of them are here; waits if they
// can still come.
uint32_t Warp::join(const Inst& in, uint32_t mask, int lane, uint32_t named, const char* what, bool* ready) {
  *ready = false;
  if (!(named >> lane & 1))
    fail(in, lane, ReportKind::bad_mask, 719,
         std::string("the mask ") + hex(named) + " of " + what +
             " does not name the thread that executes it (lane " + std::to_string(lane) + ")");
  uint32_t missing = named & ~mask & lanes;
  if (uint32_t gone = missing & ~alive)
    fail(in, lane, ReportKind::bad_mask, 719,
         std::string("the mask ") + hex(named) + " of " + what + " names lane " +
             std::to_string(__builtin_ctz(gone)) + ", which has exited");
  if (uint32_t skipped = missing & active)
    fail(in, lane, ReportKind::bad_mask, 719,
         std::string("the mask ") + hex(named) + " of " + what + " names lane " +
             std::to_string(__builtin_ctz(skipped)) + ", which does not execute it");
  if (missing) {
    wait_here(Wait::sync);
    return 0;
  }
  *ready = true;
  return named & mask;
}

void Warp::sync_memory() {
  if (!clock.empty()) ++clock[static_cast<size_t>(index)];
}

// ---- barriers ----

void Block::arrive(Warp& w, const Inst& in, int id, uint32_t threads_, uint32_t mask, bool wait) {
  Barrier& b = barriers[id];
  if (const uint64_t bit = barrier_bit(in)) {
    if (skipped & bit)
      w.fail(in, __builtin_ctz(mask), ReportKind::divergent_barrier, 719,
             "other threads of the block passed by this barrier and ended at PTX line " +
                 std::to_string(skip_line));
    w.groups[w.current].passed |= bit;
  }
  bool fresh = b.arrived == 0 && b.joined.empty() && b.threads == 0;
  if (fresh) {
    b.expected = threads_;
    if (!b.clock.empty()) std::fill(b.clock.begin(), b.clock.end(), 0);
  } else if (b.expected != threads_) {
    w.fail(in, __builtin_ctz(mask), ReportKind::divergent_barrier, 719,
           "barrier " + std::to_string(id) + " is used with " + std::to_string(threads_) +
               " threads here but " + std::to_string(b.expected) + " elsewhere");
  }
  // Lanes that have exited, or never existed, count as arrived: the hardware counts warps.
  uint32_t n = static_cast<uint32_t>(__builtin_popcount(mask));
  if (mask == w.alive) n = 32;
  b.arrived += n;
  b.threads += n;
  if (!w.clock.empty())
    for (size_t i = 0; i < warps.size(); ++i) b.clock[i] = std::max(b.clock[i], w.clock[i]);
  if (wait) {
    b.joined.emplace_back(w.index, mask);
    w.groups[w.current].pc = w.pc;
    w.groups[w.current].mask = w.active;
    w.groups[w.current].wait = Wait::barrier;
    w.groups[w.current].barrier = id;
    w.blocked = true;
    w.stop = true;
  } else if (!w.clock.empty()) {
    ++w.clock[static_cast<size_t>(w.index)];
  }
  if (b.expected && b.arrived > (b.expected + 31) / 32 * 32)
    w.fail(in, __builtin_ctz(mask), ReportKind::divergent_barrier, 719,
           "more threads than the " + std::to_string(b.expected) + " expected arrive at barrier " +
               std::to_string(id));
  check_barriers();
}

void Block::check_barriers() {
  for (int id = 0; id < 16; ++id) {
    Barrier& b = barriers[id];
    if (b.threads == 0) continue;
    bool full;
    if (b.expected) {
      full = b.arrived >= (b.expected + 31) / 32 * 32;
    } else {
      uint32_t waiting = 0, live = 0;
      for (auto [wi, mask] : b.joined) waiting += static_cast<uint32_t>(__builtin_popcount(mask));
      for (Warp& w : warps) live += static_cast<uint32_t>(__builtin_popcount(w.alive));
      full = waiting >= live;
    }
    if (full) complete(id);
  }
}

void Block::complete(int id) {
  Barrier& b = barriers[id];
  ++counters.barriers;
  for (auto& r : b.results) {
    Warp& w = warps[static_cast<size_t>(r.warp)];
    if (r.op == 0)
      each_lane(r.mask, [&](int i) { w.dst<uint32_t>(r.reg)[i] = b.count_true; });
    else
      w.set_predicate(r.reg, r.mask,
                      (r.op == 1 ? b.count_true == b.waiting_votes : b.count_true > 0) ? kAll : 0);
  }
  for (auto [wi, mask] : b.joined) {
    Warp& w = warps[static_cast<size_t>(wi)];
    for (Group& g : w.groups)
      if (g.wait == Wait::barrier && g.barrier == id) {
        g.wait = Wait::none;
        g.barrier = -1;
      }
    if (!w.clock.empty()) {
      for (size_t i = 0; i < warps.size(); ++i) w.clock[i] = std::max(w.clock[i], b.clock[i]);
      ++w.clock[static_cast<size_t>(wi)];
    }
  }
  b.arrived = b.expected = b.threads = b.count_true = b.waiting_votes = 0;
  b.joined.clear();
  b.results.clear();
  std::fill(b.clock.begin(), b.clock.end(), 0);
}

// Who waits for what, for reports of a block that does not get on.
std::string Block::who_waits() const {
  std::string who;
  int listed = 0;
  for (const Warp& w : warps)
    for (const Group& g : w.groups) {
      if (!g.mask || listed++ >= 8) continue;
      const bool blocked = g.wait == Wait::barrier;
      who += "; warp " + std::to_string(w.index) + " lanes " + hex(g.mask) +
             (g.wait == Wait::none       ? " run"
              : g.wait == Wait::sync     ? " wait at a warp synchronisation"
              : g.wait == Wait::converge ? " wait at an instruction for the whole warp"
                                         : " wait at barrier " + std::to_string(g.barrier)) +
             ", PTX line " +
             std::to_string(kernel->code[static_cast<size_t>(std::max(0, g.pc - blocked))].line);
    }
  return who;
}

// Nothing in the block can run.
void Block::stuck() {
  Warp* first = nullptr;
  const Group* worst = nullptr;
  for (Warp& w : warps)
    for (const Group& g : w.groups) {
      if (!g.mask || g.wait == Wait::none) continue;
      bool severe =
          g.wait == Wait::sync || (g.wait == Wait::converge && (!worst || worst->wait == Wait::barrier));
      if (!worst || severe) {
        first = &w;
        worst = &g;
      }
    }
  if (!worst) throw Fault{ReportKind::deadlock, 719};
  const Inst& in =
      kernel->code[static_cast<size_t>(worst->wait == Wait::barrier ? worst->pc - 1 : worst->pc)];
  ReportKind kind = worst->wait == Wait::sync ? ReportKind::bad_mask : ReportKind::divergent_barrier;
  first->fail(in, __builtin_ctz(worst->mask), kind, 719,
              "the threads of the block wait for each other for ever" + who_waits());
}

// ---- blocks ----

void Block::start(Launch& l, uint64_t linear) {
  launch = &l;
  kernel = l.kernel;
  done = false;
  skipped = 0;
  mbarrier_clocks.clear();
  const LaunchConfig& c = l.config;
  id[0] = static_cast<uint32_t>(linear % c.grid[0]);
  id[1] = static_cast<uint32_t>(linear / c.grid[0] % c.grid[1]);
  id[2] = static_cast<uint32_t>(linear / c.grid[0] / c.grid[1]);
  threads = static_cast<int>(c.block[0] * c.block[1] * c.block[2]);
  size_t count = static_cast<size_t>(threads + 31) / 32;
  random.seed(l.options.seed * 0x9e3779b97f4a7c15ull + linear * 0xd1342543de82ef95ull + 1);
  registers.assign(count * kernel->register_bytes + 64, 0xfb);  // poison: NaN, and far out of any range
  shared_bytes = kernel->static_shared + c.dynamic_shared;
  shared.assign(shared_bytes + 64, std::byte{0xff});
  shared_init.assign(shared_bytes + 64, l.options.checks ? 0 : 1);
  if (l.options.checks) cells.assign(shared_bytes / kernel->shared_granule + 2, Cell{});
  readers.clear();
  free_readers.clear();
  local.assign(kernel->local_bytes * count * 32, std::byte{0xff});
  local_init.assign(l.options.checks ? local.size() : 0, 0);
  classes.assign(kernel->classes.size(), 0);
  counters = Counters{};
  warps.resize(count);
  uint8_t* base = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(registers.data()) + 63) / 64 * 64);
  for (size_t i = 0; i < count; ++i) {
    Warp& w = warps[i];
    w.regs = base + i * kernel->register_bytes;
    w.pool = kernel->pool.data();
    w.block = this;
    w.kernel = kernel;
    w.index = static_cast<int>(i);
    int n = std::min(32, threads - static_cast<int>(i) * 32);
    w.lanes = w.alive = n == 32 ? kAll : (1u << n) - 1;
    w.groups.assign(1, Group{0, w.alive});
    w.copies.clear();
    std::fill(w.group_now, w.group_now + 32, 0);
    w.blocked = false;
    w.cached = nullptr;
    w.instructions = 0;
    w.clock.clear();
    if (l.options.checks) {
      w.clock.assign(count, 0);
      w.clock[i] = 1;
    }
    for (const Special& s : kernel->specials)
      for (uint32_t lane = 0; lane < 32; ++lane) {
        uint32_t t = static_cast<uint32_t>(i * 32) + lane, v = 0;
        switch (s.what) {
          case tid_x:
            v = t % c.block[0];
            break;
          case tid_y:
            v = t / c.block[0] % c.block[1];
            break;
          case tid_z:
            v = t / (c.block[0] * c.block[1]);
            break;
          case ntid_x:
            v = c.block[0];
            break;
          case ntid_y:
            v = c.block[1];
            break;
          case ntid_z:
            v = c.block[2];
            break;
          case ctaid_x:
            v = id[0];
            break;
          case ctaid_y:
            v = id[1];
            break;
          case ctaid_z:
            v = id[2];
            break;
          case nctaid_x:
            v = c.grid[0];
            break;
          case nctaid_y:
            v = c.grid[1];
            break;
          case nctaid_z:
            v = c.grid[2];
            break;
          case laneid:
            v = lane;
            break;
          case warpid:
            v = static_cast<uint32_t>(i);
            break;
          case nwarpid:
            v = static_cast<uint32_t>(count);
            break;
          case smid:
            v = static_cast<uint32_t>(linear % static_cast<uint64_t>(l.spec.sm_count));
            break;
          case nsmid:
            v = static_cast<uint32_t>(l.spec.sm_count);
            break;
          case gridid:
            reinterpret_cast<uint64_t*>(w.regs + s.reg)[lane] = 1;
            continue;
          case lanemask_eq:
            v = 1u << lane;
            break;
          case lanemask_lt:
            v = (1u << lane) - 1;
            break;
          case lanemask_le:
            v = (1u << lane) | ((1u << lane) - 1);
            break;
          case lanemask_gt:
            v = ~((1u << lane) | ((1u << lane) - 1));
            break;
          case lanemask_ge:
            v = ~((1u << lane) - 1);
            break;
          case dynamic_smem_size:
            v = static_cast<uint32_t>(c.dynamic_shared);
            break;
          case total_smem_size:
            v = static_cast<uint32_t>(shared_bytes);
            break;
        }
        reinterpret_cast<uint32_t*>(w.regs + s.reg)[lane] = v;
      }
  }
  for (Barrier& b : barriers) {
    b = Barrier{};
    b.clock.assign(count, 0);
  }
}

bool Block::step() {
  // A random live warp for a random while: short turns find races, long ones are fast.
  size_t n = warps.size();
  for (int turn = 0; turn < 64; ++turn) {
    size_t at = random() % n;
    int budget = launch->options.checks ? 1 << (random() % 11) : 4096;
    bool progress = false, any_alive = false;
    for (size_t k = 0; k < n; ++k) {
      Warp& w = warps[(at + k) % n];
      if (!w.alive) continue;
      any_alive = true;
      uint64_t before = w.instructions;
      w.run(budget);
      if (w.instructions != before || !w.alive) {
        progress = true;
        break;
      }
    }
    if (!any_alive) {
      for (Warp& w : warps) counters.warp_instructions += w.instructions;
      done = true;
      return true;
    }
    if (!progress) stuck();
  }
  return false;
}

// ---- launches ----

static void merge(Launch& l, Block& b) {
  std::lock_guard lock(l.mutex);
  Counters& c = l.result.counters;
  ++c.blocks;
  c.warp_instructions += b.counters.warp_instructions;
  c.tensor_flops += b.counters.tensor_flops;
  c.global_sectors_requested += b.counters.global_sectors_requested;
  c.global_sectors_touched += b.counters.global_sectors_touched;
  c.shared_accesses += b.counters.shared_accesses;
  c.shared_conflict_cycles += b.counters.shared_conflict_cycles;
  for (auto [line, cycles] : b.counters.conflicts_by_line) c.conflicts_by_line[line] += cycles;
  c.barriers += b.counters.barriers;
  for (size_t i = 0; i < b.classes.size(); ++i)
    if (b.classes[i]) c.by_class[l.kernel->classes[i]] += b.classes[i];
}

// All in a random order (an affine walk that visits each once), or of a sample one anywhere in each of its
// equal parts of the grid.
uint64_t Launch::block_at(uint64_t k) const {
  using Wide = unsigned __int128;
  if (chosen == blocks) return static_cast<uint64_t>((static_cast<Wide>(k) * stride + offset) % blocks);
  const auto first = static_cast<uint64_t>(static_cast<Wide>(k) * blocks / chosen);
  const auto end = static_cast<uint64_t>(static_cast<Wide>(k + 1) * blocks / chosen);
  return first + std::mt19937_64(options.seed + k)() % (end - first);
}

// A block that runs for long without ending may wait for another one, so others are started beside it, as
// many as the device could hold.
static void work(Launch& l, size_t resident_limit) {
  std::vector<std::unique_ptr<Block>> live, spare;
  try {
    size_t turn = 0, steps = 0;
    while (!l.abort.load(std::memory_order_relaxed)) {
      bool take = live.empty() || (steps > 32 && live.size() < resident_limit);
      if (take) {
        uint64_t k = l.next.fetch_add(1);
        if (k < l.chosen) {
          if (spare.empty()) spare.push_back(std::make_unique<Block>());
          live.push_back(std::move(spare.back()));
          spare.pop_back();
          live.back()->start(l, l.block_at(k));
          steps = 0;
        } else if (live.empty()) {
          return;
        }
      }
      turn = (turn + 1) % live.size();
      if (live[turn]->step()) {
        merge(l, *live[turn]);
        spare.push_back(std::move(live[turn]));
        live.erase(live.begin() + static_cast<std::ptrdiff_t>(turn));
        steps = 0;
      } else {
        ++steps;
        if ((steps & 3) == 0 &&
            std::chrono::duration<double>(std::chrono::steady_clock::now() - l.started).count() >
                l.options.watchdog_seconds) {
          Block& b = *live[0];
          for (Warp& w : b.warps)
            for (Group& g : w.groups)
              if (g.mask) {
                const Inst& in =
                    l.kernel->code[static_cast<size_t>(std::max(0, g.pc - (g.wait == Wait::barrier)))];
                w.fail(in, __builtin_ctz(g.mask), ReportKind::deadlock, 719,
                       "the launch did not end within " + std::to_string(l.options.watchdog_seconds) +
                           " s; this thread " + (g.wait == Wait::none ? "still runs" : "waits") +
                           b.who_waits());
              }
        }
      }
    }
  } catch (const Fault& f) {
    std::lock_guard lock(l.mutex);
    if (!l.result.error) l.result.error = f.error;
    l.abort = true;
  } catch (const std::bad_alloc&) {
    std::lock_guard lock(l.mutex);
    if (!l.result.error) l.result.error = 2;
    l.abort = true;
  }
  for (auto& b : live) {
    for (Warp& w : b->warps) b->counters.warp_instructions += w.instructions;
    merge(l, *b);
  }
}

LaunchResult launch_kernel(const Kernel& k, const LaunchConfig& config, const std::byte* params,
                           const DeviceSpec& spec, Memory& memory, const Options& options) {
  Launch l;
  l.kernel = &k;
  l.config = config;
  l.spec = spec;
  l.memory = &memory;
  l.impl = &memory.impl();
  l.options = options;
  auto refuse = [&](int error, const std::string& message) {
    Report r{};
    r.kind = ReportKind::invalid_launch;
    r.kernel = k.info.name;
    r.message = message + ", for kernel '" + k.info.name + "'.";
    l.result.error = error;
    l.result.reports.push_back(r);
    return l.result;
  };
  static const uint32_t grid_max[3] = {0x7fffffff, 65535, 65535}, block_max[3] = {1024, 1024, 64};
  for (int i = 0; i < 3; ++i) {
    if (config.grid[i] == 0 || config.grid[i] > grid_max[i])
      return refuse(1, "expected a grid of 1 to " + std::to_string(grid_max[i]) + " in dimension " +
                           std::to_string(i) + " but received " + std::to_string(config.grid[i]));
    if (config.block[i] == 0 || config.block[i] > block_max[i])
      return refuse(1, "expected a block of 1 to " + std::to_string(block_max[i]) + " in dimension " +
                           std::to_string(i) + " but received " + std::to_string(config.block[i]));
  }
  uint64_t threads = uint64_t{config.block[0]} * config.block[1] * config.block[2];
  if (threads > static_cast<uint64_t>(k.info.max_threads))
    return refuse(1, "expected at most " + std::to_string(k.info.max_threads) +
                         " threads per block but received " + std::to_string(threads));
  if (k.has_required)
    for (int i = 0; i < 3; ++i)
      if (static_cast<uint32_t>(k.required[i]) != config.block[i])
        return refuse(1, "expected the block size that .reqntid demands");
  uint64_t warps = (threads + 31) / 32;
  uint64_t registers = warps * ((static_cast<uint64_t>(k.info.registers) * 32 + 255) / 256 * 256);
  if (registers > static_cast<uint64_t>(spec.registers_per_sm))
    return refuse(701, std::to_string(registers) + " registers exceed the " +
                           std::to_string(spec.registers_per_sm) + " of a multiprocessor");
  size_t shared = k.static_shared + config.dynamic_shared;
  size_t limit =
      std::max(spec.shared_per_block,
               std::min(config.max_dynamic_shared ? config.max_dynamic_shared + k.static_shared : 0,
                        spec.shared_per_block_optin));
  if (shared > limit)
    return refuse(1,
                  std::to_string(shared) + " bytes of shared memory exceed " + std::to_string(limit) +
                      (shared <= spec.shared_per_block_optin ? "; the kernel has not opted in to more" : ""));
  if (!params && k.info.param_bytes) return refuse(1, "expected parameters but received none");
  l.params.assign(params, params + k.info.param_bytes);
  l.params.resize(k.info.param_bytes + 64);
  l.blocks = uint64_t{config.grid[0]} * config.grid[1] * config.grid[2];
  l.started = std::chrono::steady_clock::now();
  l.chosen = options.sample ? std::min(options.sample, l.blocks) : l.blocks;
  if (options.checks && l.blocks > 2) {
    std::mt19937_64 random(options.seed);
    l.offset = random() % l.blocks;
    do l.stride = random() % l.blocks;
    while (std::__gcd(l.stride, l.blocks) != 1);
  }
  int threads_wanted =
      options.threads > 0 ? options.threads : static_cast<int>(std::thread::hardware_concurrency());
  size_t n = std::clamp<size_t>(static_cast<size_t>(std::max(1, threads_wanted)), 1, l.chosen);
  size_t per_sm = std::max<size_t>(1, std::min({static_cast<size_t>(spec.max_blocks_per_sm),
                                                static_cast<size_t>(spec.max_threads_per_sm) / (warps * 32),
                                                spec.shared_per_sm / std::max<size_t>(shared + 1024, 1)}));
  size_t resident = std::max<size_t>(1, per_sm * static_cast<size_t>(spec.sm_count) / n);
  std::vector<std::thread> pool;
  for (size_t i = 1; i < n; ++i) pool.emplace_back(work, std::ref(l), resident);
  work(l, resident);
  for (std::thread& t : pool) t.join();
  return std::move(l.result);
}

}  // namespace mgm::emulator
