// Loads, stores, asynchronous copies, atomics, fences; and the checks of every access.
#include <algorithm>

#include "numeric.h"

namespace mgm::emulator {

// ---- access checks ----

std::byte* Warp::at_global(const Inst& in, int lane, uint64_t address, uint32_t bytes, int kind,
                           uint8_t** init_out) {
  Launch& l = *block->launch;
  Allocation* a = cached;
  if (!a || address - a->base >= a->bytes) {
    a = l.impl->record(address);
    if (!a)
      fail(in, lane, ReportKind::out_of_bounds, 700,
           std::string(kind & 2 ? "write" : "read") + " of " + std::to_string(bytes) + " bytes at " +
               hex(address) + ", which is no device memory",
           address);
    cached = a;
  }
  uint64_t offset = address - a->base;
  if (!a->live.load(std::memory_order_relaxed))
    fail(in, lane, ReportKind::use_after_free, 700,
         std::string(kind & 2 ? "write" : "read") + " of " + std::to_string(bytes) + " bytes at " +
             hex(address) + ", in the freed allocation of " + std::to_string(a->bytes) + " bytes at " +
             hex(a->base),
         address);
  if (offset > a->bytes || bytes > a->bytes - offset)
    fail(in, lane, ReportKind::out_of_bounds, 700,
         std::string(kind & 2 ? "write" : "read") + " of " + std::to_string(bytes) + " bytes at " +
             hex(address) + ", " + std::to_string(offset + bytes - a->bytes) +
             " bytes past the end of the allocation of " + std::to_string(a->bytes) + " bytes at " +
             hex(a->base),
         address);
  if (a->init) {
    uint8_t* init = a->init + offset;
    if (init_out) *init_out = init;
    if (kind & 1 && l.options.checks) {
      bool ok;
      if (bytes == 4) {
        uint32_t v;
        std::memcpy(&v, init, 4);
        ok = v == 0x01010101;
      } else {
        ok = true;
        for (uint32_t i = 0; i < bytes; ++i) ok &= init[i] != 0;
      }
      if (!ok)
        note(in, lane, ReportKind::uninitialized_read,
             "read of " + std::to_string(bytes) + " bytes at " + hex(address) +
                 " of global memory that nothing has written",
             address);
    }
    if (kind & 2) std::memset(init, 1, bytes);
  }
  return a->data + offset;
}

std::byte* Warp::at_shared(const Inst& in, int lane, uint64_t offset, uint32_t bytes, int kind, bool atomic,
                           const std::byte* value) {
  Block& b = *block;
  if (offset > b.shared_bytes || bytes > b.shared_bytes - offset)
    fail(in, lane, ReportKind::out_of_bounds, 700,
         std::string(kind & 2 ? "write" : "read") + " of " + std::to_string(bytes) +
             " bytes at shared address " + hex(offset) + "; the block has " + std::to_string(b.shared_bytes) +
             " bytes",
         offset);
  if (!b.launch->options.checks) return &b.shared[offset];
  uint8_t* init = &b.shared_init[offset];
  uint8_t all = 1, some = 0;
  for (uint32_t i = 0; i < bytes; ++i) {
    all &= init[i];
    some |= init[i];
  }
  if (some & 2) {
    note(in, lane, ReportKind::shared_race,
         std::string(kind & 2 ? "write" : "read") + " of " + std::to_string(bytes) +
             " bytes at shared address " + hex(offset) + " before the matching wait for a cp.async",
         offset);
  } else if (kind & 1 && !(all & 1)) {
    note(in, lane, ReportKind::uninitialized_read,
         "read of " + std::to_string(bytes) + " bytes at shared address " + hex(offset) +
             " that nothing has written",
         offset);
  }
  if (kind & 2)
    for (uint32_t i = 0; i < bytes; ++i) init[i] |= 1;
  constexpr uint64_t kAtomic = uint64_t{1} << 63, kSeveral = uint64_t{1} << 62, kClock = kSeveral - 1;
  const uint64_t mine = clock[static_cast<size_t>(index)];
  const uint64_t id =
      (atomic ? kAtomic : 0) | mine << 10 | static_cast<uint64_t>(index) << 5 | static_cast<uint64_t>(lane);
  auto same_warp = [&](uint64_t v) { return (v >> 5 & 31) == static_cast<uint64_t>(index); };
  auto before = [&](uint64_t v) {
    if (v == 0) return true;
    const uint64_t c = (v & kClock) >> 10;
    if (same_warp(v)) return (!(v & kSeveral) && (v & 31) == static_cast<uint64_t>(lane)) || c < mine;
    return c <= clock[v >> 5 & 31];
  };
  auto ordered = [&](uint64_t v) { return (atomic && v & kAtomic) || before(v); };
  auto race = [&](const char* what, uint64_t v, int line) {
    note(in, lane, ReportKind::shared_race,
         std::string(what) + " at shared address " + hex(offset) +
             ": no barrier orders it after the access of thread " + std::to_string(v & 1023) + " (linear)" +
             (line ? " at PTX line " + std::to_string(line) : ""),
         offset);
  };
  auto read = [&](uint64_t& v) {
    if (v && same_warp(v) && (v & kClock) >> 10 == mine) {
      if ((v ^ id) & 31) v |= kSeveral;
      if (!atomic) v &= ~kAtomic;
    } else {
      v = id;
    }
  };
  size_t g = b.kernel->shared_granule;
  for (size_t c = offset / g; c <= (offset + bytes - 1) / g; ++c) {
    Cell& cell = b.cells[c];
    if (!ordered(cell.writer)) {
      if (kind & 1) race("read after write", cell.writer, cell.line);
      // Lanes of one store to one place: one of them wins, as documented. Threads that write the same value,
      // as compilers let them do for replicated data, change nothing: racecheck counts that as information
      // only.
      else if (!same_warp(cell.writer) && !(value && std::memcmp(value, &b.shared[offset], bytes) == 0))
        race("write after write", cell.writer, cell.line);
    }
    if (kind & 2) {
      for (uint64_t& r : cell.readers) {
        if (!ordered(r)) race("write after read", r, 0);
        r = 0;
      }
      if (cell.more) {
        for (uint64_t& r : b.readers[cell.more - 1]) {
          if (!ordered(r)) race("write after read", r, 0);
          r = 0;
        }
        b.free_readers.push_back(cell.more);
        cell.more = 0;
      }
      cell.writer = id;
      cell.line = in.line;
    } else if (cell.readers[0] && same_warp(cell.readers[0])) {
      read(cell.readers[0]);
    } else if (cell.readers[1] && same_warp(cell.readers[1])) {
      read(cell.readers[1]);
    } else if (before(cell.readers[0])) {
      cell.readers[0] = id;
    } else if (before(cell.readers[1])) {
      cell.readers[1] = id;
    } else {
      if (!cell.more) {
        if (b.free_readers.empty()) {
          b.readers.push_back({});
          b.free_readers.push_back(static_cast<uint32_t>(b.readers.size()));
        }
        cell.more = b.free_readers.back();
        b.free_readers.pop_back();
      }
      read(b.readers[cell.more - 1][static_cast<size_t>(index)]);
    }
  }
  return &b.shared[offset];
}

std::byte* Warp::at(const Inst& in, int lane, Space space, uint64_t address, uint32_t bytes, int kind,
                    const std::byte* value) {
  if (address & (bytes - 1))
    fail(in, lane, ReportKind::misaligned, 716,
         "access of " + std::to_string(bytes) + " bytes at " + hex(address), address);
  if (space == Space::generic) {
    switch (address & kWindowMask) {
      case kSharedWindow:
        space = Space::shared;
        address -= kSharedWindow;
        break;
      case kLocalWindow:
        space = Space::local;
        address -= kLocalWindow;
        break;
      case kParamWindow:
        space = Space::param;
        address -= kParamWindow;
        break;
      default:
        space = Space::global;
    }
  }
  switch (space) {
    case Space::shared:
      return at_shared(in, lane, address, bytes, kind, in.flag & 2, value);
    case Space::local:
    local:
      if (address > kernel->local_bytes || bytes > kernel->local_bytes - address)
        fail(in, lane, ReportKind::out_of_bounds, 700,
             "access of " + std::to_string(bytes) + " bytes at local address " + hex(address) +
                 "; the thread has " + std::to_string(kernel->local_bytes) + " bytes",
             address);
      address += static_cast<size_t>(index * 32 + lane) * kernel->local_bytes;
      if (!block->local_init.empty()) {
        uint8_t* init = &block->local_init[address];
        if (kind & 1 && std::find(init, init + bytes, 0) != init + bytes)
          note(in, lane, ReportKind::uninitialized_read,
               "read of " + std::to_string(bytes) + " bytes of local memory that nothing has written");
        if (kind & 2) std::memset(init, 1, bytes);
      }
      return &block->local[address];
    case Space::param: {
      if (address & kCallParam) {
        address -= kCallParam;
        goto local;
      }
      Launch& l = *block->launch;
      if ((address & kWindowMask) == kParamWindow) address -= kParamWindow;
      if (address > kernel->info.param_bytes || bytes > kernel->info.param_bytes - address || kind & 2)
        fail(in, lane, ReportKind::out_of_bounds, 700,
             "access of " + std::to_string(bytes) + " bytes at parameter offset " + hex(address), address);
      return &l.params[address];
    }
    default:
      return at_global(in, lane, address, bytes, kind);
  }
}

void Warp::count_access(const Inst& in, Space space, uint32_t mask, const uint64_t* address, uint32_t bytes) {
  Counters& c = block->counters;
  if (space == Space::generic) {
    uint64_t first = address[__builtin_ctz(mask)] & kWindowMask;
    space = first == kSharedWindow ? Space::shared : first == 0 ? Space::global : Space::local;
  }
  if (space == Space::global) {
    uint64_t sectors[64];
    size_t n = 0;
    each_lane(mask, [&](int i) {
      sectors[n++] = address[i] / 32;
      if ((address[i] + bytes - 1) / 32 != address[i] / 32) sectors[n++] = (address[i] + bytes - 1) / 32;
    });
    std::sort(sectors, sectors + n);
    c.global_sectors_touched += static_cast<uint64_t>(std::unique(sectors, sectors + n) - sectors);
    // At best: the distinct addresses, packed densely.
    uint64_t distinct[32];
    size_t k = 0;
    each_lane(mask, [&](int i) { distinct[k++] = address[i]; });
    std::sort(distinct, distinct + k);
    k = static_cast<size_t>(std::unique(distinct, distinct + k) - distinct);
    c.global_sectors_requested += (k * bytes + 31) / 32;
  } else if (space == Space::shared) {
    ++c.shared_accesses;
    int phases = bytes > 8 ? 4 : bytes > 4 ? 2 : 1, lanes_each = 32 / phases;
    for (int p = 0; p < phases; ++p) {
      uint64_t words[128];
      size_t n = 0;
      for (int i = p * lanes_each; i < (p + 1) * lanes_each; ++i)
        if (mask >> i & 1)
          for (uint32_t b = 0; b < bytes; b += 4) words[n++] = (address[i] + b) / 4 & 0xffffffffu;
      std::sort(words, words + n);
      n = static_cast<size_t>(std::unique(words, words + n) - words);
      int banks[32] = {}, worst = 0;
      for (size_t i = 0; i < n; ++i) worst = std::max(worst, ++banks[words[i] % 32]);
      if (worst > 1) {
        c.shared_conflict_cycles += static_cast<uint64_t>(worst - 1);
        c.conflicts_by_line[in.line] += static_cast<uint64_t>(worst - 1);
      }
    }
  }
}

// ---- cp.async ----

void Warp::land_copy(AsyncCopy& c, uint32_t due, uint32_t now) {
  each_lane(due, [&](int i) {
    std::byte* d = &block->shared[c.shared[i]];
    std::memcpy(d, c.source[i], c.source_bytes[i]);
    std::memset(d + c.source_bytes[i], 0, static_cast<size_t>(c.bytes - c.source_bytes[i]));
    if (!clock.empty()) {
      std::memset(&block->shared_init[c.shared[i]], 1, c.bytes);
      size_t g = kernel->shared_granule;
      for (size_t k = c.shared[i] / g; k <= (c.shared[i] + c.bytes - 1u) / g; ++k) {
        block->cells[k].writer =
            static_cast<uint64_t>(now) << 10 | static_cast<uint64_t>(index) << 5 | static_cast<uint64_t>(i);
        block->cells[k].line = c.line;
      }
    }
  });
  c.pending &= ~due;
}
void Warp::land(uint32_t mask, uint32_t keep, bool all) {
  for (AsyncCopy& c : copies) {
    if (c.arrival) continue;
    uint32_t due = 0;
    each_lane(c.pending & mask, [&](int i) {
      // A group is complete once `keep` later groups have been committed; the open group is group_now.
      if (all || c.group[i] + keep < group_now[i]) due |= 1u << i;
    });
    land_copy(c, due, clock.empty() ? 0 : clock[static_cast<size_t>(index)]);
  }
  while (!copies.empty() && !copies.front().pending) copies.pop_front();
}

namespace {

// ld: outputs vec registers, then the base. flag: 1 signed, 2 volatile or stronger.
void load(Warp& w, const Inst& in, uint32_t m) {
  const int base = in.vec;
  const uint32_t total = in.bytes * in.vec;
  if (w.block->launch->options.counters && in.space != Space::param && in.space != Space::local) {
    uint64_t a[32];
    each_lane(m, [&](int i) { a[i] = w.value(in, base, i) + static_cast<uint64_t>(in.imm); });
    w.count_access(in, in.space, m, a, total);
  }
  uint64_t address[32];
  if (in.w[base] == 8) {
    const uint64_t* p = w.src<uint64_t>(in.o[base]);
    for (int i = 0; i < 32; ++i) address[i] = p[i] + static_cast<uint64_t>(in.imm);
  } else {
    const uint32_t* p = w.src<uint32_t>(in.o[base]);
    for (int i = 0; i < 32; ++i) address[i] = static_cast<uint32_t>(p[i] + static_cast<uint32_t>(in.imm));
  }
  each_lane(m, [&](int i) {
    const std::byte* p = w.at(in, i, in.space, address[i], total, 1);
    if (in.bytes == 4 && in.w[0] == 4) {
      for (int k = 0; k < in.vec; ++k) std::memcpy(w.dst<uint32_t>(in.o[k]) + i, p + 4 * k, 4);
      return;
    }
    for (int k = 0; k < in.vec; ++k) {
      uint64_t v = 0;
      std::memcpy(&v, p + k * in.bytes, in.bytes);
      if (in.flag & 1 && in.bytes < 8 && v >> (8 * in.bytes - 1)) v |= ~uint64_t{0} << (8 * in.bytes);
      w.set(in, k, i, v);
    }
  });
}
// st: base, then vec values.
void store(Warp& w, const Inst& in, uint32_t m) {
  const uint32_t total = in.bytes * in.vec;
  uint64_t address[32];
  each_lane(m, [&](int i) {
    uint64_t a = w.value(in, 0, i) + static_cast<uint64_t>(in.imm);
    address[i] = in.w[0] == 4 ? a & 0xffffffff : a;
  });
  if (w.block->launch->options.counters && in.space != Space::param && in.space != Space::local)
    w.count_access(in, in.space, m, address, total);
  each_lane(m, [&](int i) {
    std::byte data[32];
    for (int k = 0; k < in.vec; ++k) {
      uint64_t v = w.value(in, k + 1, i);
      std::memcpy(data + k * in.bytes, &v, in.bytes);
    }
    std::memcpy(w.at(in, i, in.space, address[i], total, 2, data), data, total);
  });
}

// The 128 bytes lose their content.
void discard(Warp& w, const Inst& in, uint32_t m) {
  each_lane(m, [&](int i) {
    const uint64_t a = w.value(in, 0, i) + static_cast<uint64_t>(in.imm);
    if (a & 127) w.fail(in, i, ReportKind::misaligned, 716, "discard of 128 bytes at " + hex(a), a);
    uint8_t* init = nullptr;
    std::memset(w.at_global(in, i, a, 128, 2, &init), 0xff, 128);
    if (init) std::memset(init, 0, 128);
  });
}

// cp.async: shared address, global address, [source bytes or a predicate that ignores the source]; mode 1:
// bytes, 2: predicate.
void copy_async(Warp& w, const Inst& in, uint32_t m) {
  AsyncCopy c;
  c.bytes = in.bytes;
  c.line = in.line;
  uint64_t to[32], from[32];
  each_lane(m, [&](int i) {
    to[i] = w.value(in, 0, i) + static_cast<uint64_t>(in.imm);
    if (in.w[0] == 4) to[i] &= 0xffffffff;
    if ((to[i] & kWindowMask) == kSharedWindow) to[i] -= kSharedWindow;
    from[i] = w.value(in, 1, i) + static_cast<uint64_t>(in.target);
  });
  uint32_t reading = 0;
  each_lane(m, [&](int i) {
    if (to[i] & (in.bytes - 1u))
      w.fail(in, i, ReportKind::misaligned, 716,
             "cp.async of " + std::to_string(in.bytes) + " bytes to shared address " + hex(to[i]), to[i]);
    uint32_t n = in.bytes;
    if (in.mode == 1) n = static_cast<uint32_t>(w.value(in, 2, i));
    if (in.mode == 2 && (w.predicate(in.o[2]) >> i & 1) != (in.flag & 1)) n = 0;
    if (n > in.bytes)
      w.fail(in, i, ReportKind::illegal_instruction, 715,
             "the source size " + std::to_string(n) + " of cp.async exceeds its " + std::to_string(in.bytes) +
                 " bytes");
    if (n && from[i] & (in.bytes - 1u))
      w.fail(in, i, ReportKind::misaligned, 716,
             "cp.async of " + std::to_string(in.bytes) + " bytes from " + hex(from[i]), from[i]);
    std::byte* d = w.at_shared(in, i, to[i], in.bytes, 2);
    c.shared[i] = static_cast<uint32_t>(to[i]);
    c.source[i] = n ? w.at_global(in, i, from[i], n, 1) : nullptr;
    if (n)
      reading |= 1u << i;
    else
      c.source[i] = d;  // nothing is read
    c.source_bytes[i] = static_cast<uint8_t>(n);
    c.group[i] = w.group_now[i];
    c.pending |= 1u << i;
    std::memset(d, 0xff, in.bytes);
    if (!w.clock.empty()) std::memset(&w.block->shared_init[to[i]], 2, in.bytes);
  });
  if (w.block->launch->options.counters) {
    w.count_access(in, Space::global, reading, from, in.bytes);
    w.count_access(in, Space::shared, m, to, in.bytes);
  }
  w.copies.push_back(c);
}
void commit_group(Warp& w, const Inst&, uint32_t m) {
  each_lane(m, [&](int i) { ++w.group_now[i]; });
}
void wait_group(Warp& w, const Inst& in, uint32_t m) {
  w.land(m, static_cast<uint32_t>(in.imm), false);
}
void wait_all(Warp& w, const Inst&, uint32_t m) {
  w.land(m, 0, true);
}

// ---- atomics ----

enum AtomOp : uint8_t { a_add, a_min, a_max, a_and, a_or, a_xor, a_exch, a_cas, a_inc, a_dec };
enum AtomType : uint8_t { u32_, s32_, u64_, s64_, f32_, f64_, f16_, bf16_, f16x2_, bf16x2_, b16_ };

uint64_t apply(const Inst& in, uint64_t old, uint64_t b, uint64_t c) {
  auto half_add = [](uint16_t x, uint16_t y) { return half_rn(from_half(x) + from_half(y)); };
  auto bf_add = [](uint16_t x, uint16_t y) { return bf16_rn(from_bf16(x) + from_bf16(y)); };
  switch (in.mode) {
    case a_add:
      switch (in.vec) {
        case f32_:
          return bits(canonical(f32(static_cast<uint32_t>(old)) + f32(static_cast<uint32_t>(b))));
        case f64_:
          return bits_as<uint64_t>(bits_as<double>(old) + bits_as<double>(b));
        case f16_:
          return half_add(static_cast<uint16_t>(old), static_cast<uint16_t>(b));
        case bf16_:
          return bf_add(static_cast<uint16_t>(old), static_cast<uint16_t>(b));
        case f16x2_:
          return half_add(static_cast<uint16_t>(old), static_cast<uint16_t>(b)) |
                 static_cast<uint64_t>(
                     half_add(static_cast<uint16_t>(old >> 16), static_cast<uint16_t>(b >> 16)))
                     << 16;
        case bf16x2_:
          return bf_add(static_cast<uint16_t>(old), static_cast<uint16_t>(b)) |
                 static_cast<uint64_t>(
                     bf_add(static_cast<uint16_t>(old >> 16), static_cast<uint16_t>(b >> 16)))
                     << 16;
        default:
          return old + b;
      }
    case a_min:
    case a_max: {
      bool less = in.vec == s32_   ? static_cast<int32_t>(b) < static_cast<int32_t>(old)
                  : in.vec == s64_ ? static_cast<int64_t>(b) < static_cast<int64_t>(old)
                  : in.vec == u32_ ? static_cast<uint32_t>(b) < static_cast<uint32_t>(old)
                                   : b < old;
      return less == (in.mode == a_min) ? b : old;
    }
    case a_and:
      return old & b;
    case a_or:
      return old | b;
    case a_xor:
      return old ^ b;
    case a_exch:
      return b;
    case a_cas:
      return old == b ? c : old;
    case a_inc:
      return static_cast<uint32_t>(old) >= static_cast<uint32_t>(b) ? 0 : old + 1;
    default:
      return old == 0 || static_cast<uint32_t>(old) > static_cast<uint32_t>(b) ? b : old - 1;
  }
}
template <class T>
uint64_t exchange(const Inst& in, std::byte* p, uint64_t b, uint64_t c) {
  T* t = reinterpret_cast<T*>(p);
  T old = __atomic_load_n(t, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(t, &old,
                                      static_cast<T>(apply(in, old, static_cast<T>(b), static_cast<T>(c))),
                                      false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) {
  }
  return old;
}
// o: [d], base, b, [c]. Lanes in a random order: nothing promises one.
void atomic(Warp& w, const Inst& in, uint32_t m) {
  int base = in.outputs;
  uint32_t turn = static_cast<uint32_t>(w.block->random()) & 31;
  uint64_t address[32];
  each_lane(m, [&](int i) {
    uint64_t a = w.value(in, base, i) + static_cast<uint64_t>(in.imm);
    address[i] = in.w[base] == 4 ? a & 0xffffffff : a;
  });
  if (w.block->launch->options.counters) w.count_access(in, in.space, m, address, in.bytes);
  for (uint32_t k = 0; k < 32; ++k) {
    int i = static_cast<int>((k + turn) & 31);
    if (!(m >> i & 1)) continue;
    std::byte* p = w.at(in, i, in.space, address[i], in.bytes, 3);
    uint64_t b = w.value(in, base + 1, i), c = in.count > base + 2 ? w.value(in, base + 2, i) : 0;
    uint64_t old = in.bytes == 2   ? exchange<uint16_t>(in, p, b, c)
                   : in.bytes == 4 ? exchange<uint32_t>(in, p, b, c)
                                   : exchange<uint64_t>(in, p, b, c);
    if (in.outputs) w.set(in, 0, i, old);
  }
}

void fence(Warp&, const Inst&, uint32_t) {
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
}
struct Same {
  static uint64_t call(uint64_t v) { return v; }
};

Space space_of(Mods& m) {
  std::string s =
      m.any({"global", "shared", "shared::cta", "local", "const", "param", "param::entry", "param::func"});
  if (s == "global") return Space::global;
  if (s.starts_with("shared")) return Space::shared;
  if (s == "local") return Space::local;
  if (s == "const") return Space::constant;
  if (s.starts_with("param")) return Space::param;
  return Space::generic;
}
// Modifiers that change neither the result nor what is checked.
bool cache_hints(Decoder& d, Mods& m) {
  m.any({"ca", "cg", "cs", "lu", "cv", "wb", "wt"});
  m.any({"L1::evict_normal", "L1::evict_unchanged", "L1::evict_first", "L1::evict_last", "L1::no_allocate"});
  m.any({"L2::evict_normal", "L2::evict_first", "L2::evict_last"});
  if (!m.any({"L2::64B", "L2::128B", "L2::256B"}).empty()) d.require(74, 80, "a prefetch size");
  return m.take("L2::cache_hint");
}
void hint_operand(Decoder& d, size_t i) {
  d.in(d.operand(i), "b64");
}

void note_width(Decoder& d, Space space, int bytes) {
  if (space == Space::shared || space == Space::generic) d.shared_access(std::min(bytes, 4));
}

}  // namespace

bool decode_memory(Decoder& d, const Instruction& s) {
  const std::string& op = s.opcode;
  Mods m(s);
  if (op == "ld" || op == "ldu" || op == "st") {
    bool st = op == "st";
    std::string t = m.type();
    if (t == "b128") d.fail("type .b128 is not supported");
    Space space = space_of(m);
    const std::string order = m.any({"volatile", "relaxed", st ? "release" : "acquire"});
    const bool strong = !order.empty();
    if (order == "volatile" && (space == Space::local || space == Space::constant || space == Space::param))
      d.fail("unknown modifier '.volatile' for this state space");
    m.any({"cta", "cluster", "gpu", "sys"});
    m.take("weak");
    if (!st) m.take("nc");
    bool hint = cache_hints(d, m);
    std::string v = m.any({"v2", "v4", "v8"});
    m.finish();
    int vec = v == "v2" ? 2 : v == "v4" ? 4 : v == "v8" ? 8 : 1;
    int bytes = static_cast<int>(type_bytes(t, s.line));
    if (t == "pred") d.fail("predicates cannot be loaded or stored");
    if (vec == 8 || bytes * vec > 16) d.require(88, 100, "a 256-bit access");
    d.operands(hint ? 3 : 2);
    if (hint) hint_operand(d, 2);
    const Operand &a = d.operand(st ? 0 : 1), &given = d.operand(st ? 1 : 0);
    // ptxas takes braces around a single register too.
    const Operand& v0 =
        vec == 1 && given.kind == Operand::vector && given.items.size() == 1 ? given.items[0] : given;
    if ((v0.kind == Operand::vector) != (vec > 1) || (vec > 1 && v0.items.size() != static_cast<size_t>(vec)))
      d.fail("the operand does not match the vector length");
    int64_t imm;
    Shape base = d.address(a, &space, &imm);
    std::vector<Shape> values;
    for (int k = 0; k < vec; ++k) {
      const Operand& o = vec > 1 ? v0.items[static_cast<size_t>(k)] : v0;
      Shape x;
      if (st)
        x = o.kind == Operand::name ? d.in(o, "") : d.in(o, bytes == 1 ? "b16" : t);
      else
        x = d.out(o, 0);
      if (x.width < bytes) d.fail("the register is narrower than the type");
      values.push_back(x);
    }
    if (vec > 8) d.fail("too many elements");
    note_width(d, space, bytes * vec);
    if (st) values.insert(values.begin(), base);
    static const char* loads[] = {"ld.generic", "ld.global", "ld.shared", "ld.const",
                                  "ld.local",   "ld.param",  ""};
    static const char* stores[] = {"st.generic", "st.global", "st.shared", "st.const",
                                   "st.local",   "st.param",  ""};
    if (st && (space == Space::constant || space == Space::param))
      d.fail("this state space cannot be written");
    Inst& i = st ? d.emit(&store, stores[static_cast<int>(space)], std::vector<Shape>{}, values)
                 : d.emit(&load, loads[static_cast<int>(space)], values, std::vector<Shape>{base});
    i.space = space;
    i.bytes = static_cast<uint8_t>(bytes);
    i.vec = static_cast<uint8_t>(vec);
    i.imm = imm;
    i.flag = static_cast<uint8_t>((t[0] == 's' ? 1 : 0) | (strong ? 2 : 0));
    return true;
  }
  if (op == "prefetch" || op == "prefetchu" || op == "applypriority" || op == "discard") {
    Space space = space_of(m);
    m.any({"L1", "L2"});
    m.any({"L2::evict_last", "L2::evict_normal"});
    m.finish();
    if (op != "discard") return true;
    d.require(74, 80, "discard");
    d.operands(2);
    if (d.operand(1).kind != Operand::integer || d.operand(1).value != 128) d.fail("expected a size of 128");
    int64_t imm;
    Shape base = d.address(d.operand(0), &space, &imm);
    Inst& i = d.emit(&discard, "st.global", std::vector<Shape>{}, std::vector<Shape>{base});
    i.imm = imm;
    return true;
  }
  if (op == "createpolicy") {
    d.require(74, 80, "createpolicy");
    m.any({"fractional", "range", "cvt"});
    m.any({"L2", "global"});
    m.any({"L2::evict_last", "L2::evict_normal", "L2::evict_first", "L2::evict_unchanged"});
    m.any({"L2::evict_unchanged", "L2::evict_first"});
    if (m.type() != "b64") d.fail("expected .b64");
    m.finish();
    d.emit(&alu<Same, uint64_t, uint64_t>, "mov", {d.out(d.operand(0), 8)}, {d.constant(0, 8)});
    return true;
  }
  if (op == "membar" || op == "fence") {
    if (op == "membar") {
      m.any({"cta", "gl", "sys"});
    } else {
      m.any({"sc", "acq_rel"});
      m.any({"cta", "gpu", "sys", "cluster"});
    }
    m.finish();
    d.operands(0);
    d.emit(&fence, "fence", {}, {});
    return true;
  }
  if (op == "cp") {
    if (m.front() != "async") m.fail("unknown opcode");
    d.require(70, 80, "cp.async");
    if (m.take("commit_group")) {
      m.finish();
      d.operands(0);
      d.emit(&commit_group, "cp.async", {}, {});
      return true;
    }
    if (m.take("wait_all")) {
      m.finish();
      d.operands(0);
      d.emit(&wait_all, "cp.async", {}, {});
      return true;
    }
    if (m.take("wait_group")) {
      m.finish();
      d.operands(1);
      if (d.operand(0).kind != Operand::integer || d.operand(0).value < 0)
        d.fail("expected a constant number of groups");
      d.emit(&wait_group, "cp.async", {}, {}).imm = d.operand(0).value;
      return true;
    }
    std::string cache = m.any({"ca", "cg"});
    if (cache.empty()) m.fail("unknown opcode");
    if (m.any({"shared", "shared::cta"}).empty() || !m.take("global")) m.fail("expected .shared.global");
    const bool hint = cache_hints(d, m);
    m.finish();
    d.operands(3, 5);
    Space shared = Space::shared, global = Space::global;
    int64_t to_imm, from_imm;
    Shape to = d.address(d.operand(0), &shared, &to_imm), from = d.address(d.operand(1), &global, &from_imm);
    if (d.operand(2).kind != Operand::integer) d.fail("expected a constant copy size");
    int64_t bytes = d.operand(2).value;
    if (bytes != 16 && (cache == "cg" || (bytes != 4 && bytes != 8)))
      d.fail("cp.async." + cache + " cannot copy " + std::to_string(bytes) + " bytes");
    std::vector<Shape> in{to, from};
    size_t n = d.now->operands.size() - (hint ? 1 : 0);
    uint8_t mode = 0;
    bool negate = false;
    if (n == 4) {
      const Operand& o = d.operand(3);
      // A predicate ignores the source; anything else is the number of source bytes.
      bool predicate = o.negate;
      if (o.kind == Operand::name && !predicate) {
        try {
          in.push_back(d.in(o, "b32"));
          mode = 1;
        } catch (const PtxError&) {
          predicate = true;
        }
      } else if (!predicate) {
        in.push_back(d.in(o, "b32"));
        mode = 1;
      }
      if (predicate) {
        in.push_back(d.pred_in(o));
        mode = 2;
        negate = o.negate;
        d.require(75, 80, "ignoring the source of cp.async");
      }
    }
    if (hint) hint_operand(d, n);
    if (from_imm != static_cast<int32_t>(from_imm)) d.fail("the address offset is too large");
    Inst& i = d.emit(&copy_async, "cp.async", std::vector<Shape>{}, in);
    i.bytes = static_cast<uint8_t>(bytes);
    i.mode = mode;
    i.imm = to_imm;
    i.target = static_cast<int32_t>(from_imm);
    // Ignored when the predicate is true: flag is the value of the predicate with which the source is read.
    i.flag = negate ? 1 : 0;
    return true;
  }
  if (op == "atom" || op == "red") {
    bool red = op == "red";
    std::string t = m.type();
    Space space = space_of(m);
    if (red)
      m.any({"relaxed", "release"});
    else
      m.any({"relaxed", "acquire", "release", "acq_rel"});
    m.any({"cta", "cluster", "gpu", "sys"});
    std::string o = m.any({"add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec"});
    const bool noftz = m.take("noftz");
    bool hint = m.take("L2::cache_hint");
    m.finish();
    static const char* ops[] = {"add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec"};
    static const char* types[] = {"u32", "s32",  "u64",   "s64",    "f32", "f64",
                                  "f16", "bf16", "f16x2", "bf16x2", "b16"};
    int oi = -1, ti = -1;
    for (int k = 0; k < 10; ++k)
      if (o == ops[k]) oi = k;
    for (int k = 0; k < 11; ++k)
      if (t == types[k]) ti = k;
    if (t == "b32") ti = u32_;
    if (t == "b64") ti = u64_;
    if (oi < 0) d.fail("expected an atomic operation");
    if (ti < 0) d.fail("type ." + t + " is not supported here");
    bool is_float = ti >= f32_ && ti <= bf16x2_, half = ti >= f16_ && ti <= bf16x2_;
    if (noftz != half) d.fail(half ? "expected .noftz" : "unknown modifier '.noftz'");
    if ((is_float && oi != a_add) || (ti == b16_ && oi != a_cas) ||
        ((oi == a_inc || oi == a_dec) && ti != u32_) || (oi == a_add && ti == s64_) ||
        (red && (oi == a_exch || oi == a_cas)))
      d.fail("this form does not exist");
    if (ti == bf16_ || ti == bf16x2_) d.require(78, 90, "atomics on bf16");
    int bytes = static_cast<int>(type_bytes(t, s.line));
    size_t at = red ? 0 : 1, n = (red ? 2 : 3) + (oi == a_cas) + (hint ? 1u : 0u);
    d.operands(n);
    if (hint) hint_operand(d, n - 1);
    int64_t imm;
    Shape base = d.address(d.operand(at), &space, &imm);
    if (space != Space::generic && space != Space::global && space != Space::shared)
      d.fail("atomics are for global and shared memory");
    std::vector<Shape> out, in{base, d.in(d.operand(at + 1), t)};
    if (oi == a_cas) in.push_back(d.in(d.operand(at + 2), t));
    if (!red) out.push_back(d.out(d.operand(0), bytes));
    note_width(d, space, bytes);
    Inst& i = d.emit(&atomic, red ? "red" : "atom", out, in);
    i.space = space;
    i.bytes = static_cast<uint8_t>(bytes);
    i.mode = static_cast<uint8_t>(oi);
    i.vec = static_cast<uint8_t>(ti);
    i.imm = imm;
    i.flag = 2;
    return true;
  }
  return false;
}

}  // namespace mgm::emulator
