// mbarrier objects: counted, phased barriers in shared memory.
//
// The 64 bits are opaque to programs: pending arrivals (0-19), expected arrivals (20-39), phase (40), tag
// (56-63).
#include <algorithm>

#include "exec.h"

namespace mgm::emulator {
namespace {

constexpr uint64_t kTag = uint64_t{0xb5} << 56, kCount = (1 << 20) - 1, kPhase = uint64_t{1} << 40;

uint64_t place(Warp& w, const Inst& in, int lane) {
  uint64_t a = w.value(in, in.outputs, lane) + static_cast<uint64_t>(in.imm);
  if (in.w[in.outputs] == 4) a &= 0xffffffff;
  if ((a & kWindowMask) == kSharedWindow) a -= kSharedWindow;
  if (a & 7) w.fail(in, lane, ReportKind::misaligned, 716, "mbarrier at shared address " + hex(a), a);
  return a;
}
uint64_t* object(Warp& w, const Inst& in, int lane, uint64_t a) {
  uint64_t* p = reinterpret_cast<uint64_t*>(w.at_shared(in, lane, a, 8, 3, true));
  if ((*p & uint64_t{0xff} << 56) != kTag)
    w.fail(in, lane, ReportKind::illegal_instruction, 715,
           "no initialised mbarrier at shared address " + hex(a), a);
  return p;
}
void init(Warp& w, const Inst& in, uint32_t m) {
  each_lane(m, [&](int i) {
    uint64_t a = place(w, in, i), n = w.value(in, 1, i);
    if (n == 0 || n > kCount)
      w.fail(in, i, ReportKind::illegal_instruction, 715,
             "expected 1 to 1048575 arrivals for mbarrier.init but received " + std::to_string(n));
    uint64_t v = kTag | n << 20 | n;
    std::memcpy(w.at_shared(in, i, a, 8, 2, true), &v, 8);
    w.block->mbarrier_clocks.erase(a);
  });
}
void invalidate(Warp& w, const Inst& in, uint32_t m) {
  each_lane(m, [&](int i) { *object(w, in, i, place(w, in, i)) = 0; });
}
uint64_t arrive_at(Warp& w, const Inst& in, int lane, uint64_t a, uint64_t count, bool drop,
                   const std::vector<uint32_t>& clock) {
  uint64_t *p = object(w, in, lane, a), old = *p, pending = old & kCount;
  if (count == 0 || count > pending)
    w.fail(in, lane, ReportKind::divergent_barrier, 719,
           std::to_string(count) + " arrivals at an mbarrier that waits for " + std::to_string(pending), a);
  pending -= count;
  uint64_t expected = (old >> 20 & kCount) - (drop ? count : 0), phase = old & kPhase;
  if (pending == 0) {
    pending = expected;
    phase ^= kPhase;
  }
  *p = kTag | phase | expected << 20 | pending;
  if (!clock.empty()) {
    std::vector<uint32_t>& c = w.block->mbarrier_clocks[a];
    c.resize(clock.size());
    for (size_t k = 0; k < c.size(); ++k) c[k] = std::max(c[k], clock[k]);
  }
  return old;
}
// o: [state], address, [count]; mode bits: 1 count, 2 drop
void arrive(Warp& w, const Inst& in, uint32_t m) {
  each_lane(m, [&](int i) {
    uint64_t old = arrive_at(w, in, i, place(w, in, i), in.mode & 1 ? w.value(in, in.outputs + 1, i) : 1,
                             in.mode & 2, w.clock);
    if (in.outputs) w.set(in, 0, i, old);
  });
  w.sync_memory();
}
struct PendingCount {
  static uint32_t call(uint64_t state) { return static_cast<uint32_t>(state & kCount); }
};
// Arrivals that follow asynchronous copies come about only when somebody looks at the mbarrier, and not
// always at the first time: their copies land then.
void land_arrivals(Block& b, uint64_t address) {
  if (b.random() % 4 == 0) return;
  for (Warp& w : b.warps)
    for (size_t k = 0; k < w.copies.size(); ++k) {
      AsyncCopy& arrival = w.copies[k];
      if (!arrival.arrival) continue;
      each_lane(arrival.pending, [&](int i) {
        if (arrival.shared[i] != address) return;
        const uint32_t now = arrival.clock.empty() ? 0 : arrival.clock[static_cast<size_t>(w.index)];
        for (size_t earlier = 0; earlier < k; ++earlier)
          if (!w.copies[earlier].arrival)
            w.land_copy(w.copies[earlier], w.copies[earlier].pending & 1u << i, now);
        arrival.pending &= ~(1u << i);
        arrive_at(w, *arrival.arrival, i, address, 1, false, arrival.clock);
      });
    }
}
// o: predicate, address, state or parity (mode 1)
void test(Warp& w, const Inst& in, uint32_t m) {
  uint32_t r = 0;
  uint64_t last = ~uint64_t{0};
  each_lane(m, [&](int i) {
    const uint64_t a = place(w, in, i);
    if (a != last) land_arrivals(*w.block, a);
    last = a;
  });
  each_lane(m, [&](int i) {
    uint64_t a = place(w, in, i), now = *object(w, in, i, a) >> 40 & 1, v = w.value(in, 2, i);
    bool complete = now != (in.mode ? v & 1 : v >> 40 & 1);
    r |= static_cast<uint32_t>(complete) << i;
    if (complete && !w.clock.empty())
      if (auto it = w.block->mbarrier_clocks.find(a); it != w.block->mbarrier_clocks.end())
        for (size_t k = 0; k < it->second.size(); ++k) w.clock[k] = std::max(w.clock[k], it->second[k]);
  });
  w.set_predicate(in.o[0], m, r);
  if (r != kAll) w.stop = true;  // a waiting loop gives way
}
// Without .noinc the arrival was not counted in advance: pending grows now.
void copy_arrive(Warp& w, const Inst& in, uint32_t m) {
  AsyncCopy arrival;
  arrival.arrival = &in;
  arrival.clock = w.clock;
  arrival.pending = m;
  each_lane(m, [&](int i) {
    const uint64_t a = place(w, in, i);
    uint64_t* p = object(w, in, i, a);
    if (!in.mode) ++*p;
    arrival.shared[i] = static_cast<uint32_t>(a);
  });
  w.copies.push_back(std::move(arrival));
  w.sync_memory();
}

}  // namespace

bool decode_mbarrier(Decoder& d, const Instruction& s) {
  Mods m(s);
  bool copy = s.opcode == "cp";
  if (copy && (s.parts.size() < 2 || s.parts[0] != "async" || s.parts[1] != "mbarrier")) return false;
  if (!copy && s.opcode != "mbarrier") return false;
  d.require(70, 80, "mbarrier");
  Space space = Space::shared;
  int64_t imm = 0;
  if (copy) {
    m.take("async");
    m.take("mbarrier");
    if (!m.take("arrive")) m.fail("expected .arrive");
    bool noinc = m.take("noinc");
    m.any({"shared", "shared::cta"});
    if (m.type() != "b64") m.fail("expected .b64");
    m.finish();
    d.operands(1);
    Shape a = d.address(d.operand(0), &space, &imm);
    Inst& i = d.emit(&copy_arrive, "mbarrier", {}, {a});
    i.mode = noinc;
    i.imm = imm;
    return true;
  }
  std::string what =
      m.any({"init", "inval", "arrive", "arrive_drop", "test_wait", "try_wait", "pending_count"});
  if (what.empty()) m.fail("unsupported operation");
  if (what == "try_wait") d.require(78, 90, "mbarrier.try_wait");
  bool parity = m.take("parity"), nocomplete = m.take("noComplete");
  m.any({"acquire", "release"});
  m.any({"cta"});
  m.any({"shared", "shared::cta"});
  if (m.type() != "b64") m.fail("expected .b64");
  m.finish();
  if (parity && what != "test_wait" && what != "try_wait") d.fail("unknown modifier '.parity'");
  if (what == "pending_count") {
    d.operands(2);
    d.emit(&alu<PendingCount, uint32_t, uint64_t>, "mbarrier", {d.out(d.operand(0), 4)},
           {d.in(d.operand(1), "b64")});
  } else if (what == "init" || what == "inval") {
    bool first = what == "init";
    d.operands(first ? 2 : 1);
    std::vector<Shape> in{d.address(d.operand(0), &space, &imm)};
    if (first) in.push_back(d.in(d.operand(1), "u32"));
    d.emit(first ? &init : &invalidate, "mbarrier", std::vector<Shape>{}, in).imm = imm;
  } else if (what == "arrive" || what == "arrive_drop") {
    d.operands(2, 3);
    bool count = d.now->operands.size() == 3;
    if (nocomplete && !count) d.fail("expected a count");
    Shape state = d.out(d.operand(0), 8);
    std::vector<Shape> in{d.address(d.operand(1), &space, &imm)};
    if (count) in.push_back(d.in(d.operand(2), "u32"));
    Inst& i = d.emit(&arrive, "mbarrier", std::vector<Shape>{state}, in);
    i.mode = static_cast<uint8_t>((count ? 1 : 0) | (what == "arrive_drop" ? 2 : 0));
    i.imm = imm;
  } else {
    d.operands(3, what == "try_wait" ? 4 : 3);
    Shape p = d.pred_out(d.operand(0)), a = d.address(d.operand(1), &space, &imm);
    Inst& i = d.emit(&test, "mbarrier", {p}, {a, d.in(d.operand(2), parity ? "u32" : "b64")});
    i.mode = parity;
    i.imm = imm;
  }
  return true;
}

}  // namespace mgm::emulator
