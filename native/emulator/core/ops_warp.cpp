// Control flow, barriers, exchange between lanes, calls of external functions.
#include <algorithm>
#include <cstdio>
#include <thread>

#include "numeric.h"

namespace mgm::emulator {

void exit_now(Warp& w, const Inst&, uint32_t m) {
  w.exit_lanes(m);
}
void skip_if(Warp& w, const Inst& in, uint32_t m) {
  w.branch(m, in.target);
}

namespace {

void branch_indexed(Warp& w, const Inst& in, uint32_t m) {
  const std::vector<int32_t>& t = w.kernel->tables[static_cast<size_t>(in.imm)];
  uint32_t left = m;
  while (left) {
    int lane = __builtin_ctz(left);
    uint64_t k = w.value(in, 0, lane);
    if (k >= t.size())
      w.fail(in, lane, ReportKind::illegal_instruction, 715,
             "the index " + std::to_string(k) + " of brx.idx exceeds its " + std::to_string(t.size()) +
                 " targets");
    uint32_t same = 0;
    each_lane(left, [&](int i) { same |= static_cast<uint32_t>(w.value(in, 0, i) == k) << i; });
    left &= ~same;
    if (same == w.active) {
      w.pc = t[k];
      if (w.groups.size() > 1) w.stop = true;
      return;
    }
    Group other = w.groups[w.current];
    other.pc = t[k];
    other.mask = same;
    w.groups.push_back(other);
    w.active &= ~same;
    w.stop = true;
  }
}
void trap(Warp& w, const Inst& in, uint32_t m) {
  w.fail(in, __builtin_ctz(m), ReportKind::trap, 719, "trap executed");
}
void nanosleep(Warp& w, const Inst&, uint32_t) {
  w.stop = true;
  std::this_thread::yield();
}

// mode: 0 sync, 1 arrive, 2 red.popc, 3 red.and, 4 red.or. flag: 1 aligned, 2 negated vote, 4 has a count.
// o: [result], id, [count], [vote].
void barrier(Warp& w, const Inst& in, uint32_t m) {
  if (in.flag & 1) {
    bool ready;
    w.converge(in, m, "an aligned barrier", &ready);
    if (!ready) return;
  }
  int k = in.outputs, lane = __builtin_ctz(m);
  uint64_t id = w.value(in, k, lane), count = in.flag & 4 ? w.value(in, k + 1, lane) : 0;
  each_lane(m, [&](int i) {
    if (w.value(in, k, i) != id || (in.flag & 4 && w.value(in, k + 1, i) != count))
      w.fail(in, i, ReportKind::divergent_barrier, 719,
             "the threads of a warp name different barriers or counts");
  });
  if (id > 15)
    w.fail(in, lane, ReportKind::illegal_instruction, 715,
           "expected a barrier from 0 to 15 but received " + std::to_string(id));
  if (in.flag & 4 && (count == 0 || count % 32 || count > 1024))
    w.fail(in, lane, ReportKind::illegal_instruction, 715,
           "expected a thread count that is a multiple of 32 for a barrier but received " +
               std::to_string(count));
  Block& b = *w.block;
  if (in.mode >= 2) {
    uint32_t v = w.predicate(in.o[in.count - 1]);
    if (in.flag & 2) v = ~v;
    b.barriers[id].count_true += static_cast<uint32_t>(__builtin_popcount(v & m));
    b.barriers[id].waiting_votes += static_cast<uint32_t>(__builtin_popcount(m));
    b.barriers[id].results.push_back({w.index, in.o[0], static_cast<uint8_t>(in.mode - 2), in.w[0], m});
  }
  b.arrive(w, in, static_cast<int>(id), static_cast<uint32_t>(count), m, in.mode != 1);
}

// Runs f(members, mask) for each set of lanes with the same member mask (operand k), once all of them are
// here.
template <class F>
void collective(Warp& w, const Inst& in, uint32_t m, int k, const char* what, F f) {
  struct Part {
    uint32_t members;
  } parts[32];
  int n = 0;
  for (uint32_t left = m; left;) {
    int lane = __builtin_ctz(left);
    uint32_t named = static_cast<uint32_t>(w.value(in, k, lane)), same = 0;
    each_lane(left, [&](int i) {
      same |= static_cast<uint32_t>(static_cast<uint32_t>(w.value(in, k, i)) == named) << i;
    });
    each_lane(same & ~named, [&](int i) {
      bool r;
      w.join(in, same, i, named, what, &r);
    });
    bool ready;
    w.join(in, same, lane, named, what, &ready);
    if (!ready) return;
    parts[n++].members = same;
    left &= ~same;
  }
  for (int i = 0; i < n; ++i) f(parts[i].members);
  w.sync_memory();
}

void warp_barrier(Warp& w, const Inst& in, uint32_t m) {
  collective(w, in, m, 0, "bar.warp.sync", [](uint32_t) {});
}

enum { up, down, bfly, idx };
// o: d, p; a, b, c, mask
void shuffle(Warp& w, const Inst& in, uint32_t m) {
  collective(w, in, m, 5, "shfl.sync", [&](uint32_t members) {
    uint32_t v[32], d[32], p = 0;
    std::memcpy(v, w.src<uint32_t>(in.o[2]), sizeof v);
    each_lane(members, [&](int i) {
      int b = static_cast<int>(w.value(in, 3, i) & 31);
      uint32_t c = static_cast<uint32_t>(w.value(in, 4, i));
      int segment = static_cast<int>(c >> 8 & 31), clamp = static_cast<int>(c & 31);
      int last = (i & segment) | (clamp & ~segment), first = i & segment, j;
      bool ok;
      switch (in.mode) {
        case up:
          j = i - b;
          ok = j >= last;
          break;
        case down:
          j = i + b;
          ok = j <= last;
          break;
        case bfly:
          j = i ^ b;
          ok = j <= last;
          break;
        default:
          j = first | (b & ~segment);
          ok = j <= last;
      }
      if (!ok) j = i;
      if (!(members >> j & 1))
        w.fail(in, i, ReportKind::bad_mask, 719,
               "shfl.sync reads lane " + std::to_string(j) + ", which does not take part (mask " +
                   hex(members) + ")");
      d[i] = v[j];
      p |= static_cast<uint32_t>(ok) << i;
    });
    each_lane(members, [&](int i) { w.dst<uint32_t>(in.o[0])[i] = d[i]; });
    w.set_predicate(in.o[1], members, p);
  });
}
// mode: 0 all, 1 any, 2 uni, 3 ballot. o: d, predicate, mask
void vote(Warp& w, const Inst& in, uint32_t m) {
  collective(w, in, m, 2, "vote.sync", [&](uint32_t members) {
    uint32_t v = w.predicate(in.o[1]);
    if (in.flag) v = ~v;
    v &= members;
    if (in.mode == 3)
      each_lane(members, [&](int i) { w.dst<uint32_t>(in.o[0])[i] = v; });
    else
      w.set_predicate(in.o[0], members,
                      (in.mode == 0   ? v == members
                       : in.mode == 1 ? v != 0
                                      : v == members || v == 0)
                          ? kAll
                          : 0);
  });
}
// mode: 0 any, 1 all. o: d, p; a, mask
void match(Warp& w, const Inst& in, uint32_t m) {
  collective(w, in, m, 3, "match.sync", [&](uint32_t members) {
    uint64_t a[32];
    uint32_t d[32], p = 0;
    each_lane(members, [&](int i) { a[i] = w.value(in, 2, i); });
    each_lane(members, [&](int i) {
      uint32_t same = 0;
      each_lane(members, [&](int j) { same |= static_cast<uint32_t>(a[i] == a[j]) << j; });
      bool all = same == members;
      d[i] = in.mode == 0 ? same : all ? members : 0;
      p |= static_cast<uint32_t>(all) << i;
    });
    each_lane(members, [&](int i) { w.dst<uint32_t>(in.o[0])[i] = d[i]; });
    w.set_predicate(in.o[1], members, p);
  });
}
// mode: add min max and or xor; flag: signed. o: d; a, mask
void redux(Warp& w, const Inst& in, uint32_t m) {
  collective(w, in, m, 2, "redux.sync", [&](uint32_t members) {
    const uint32_t* a = w.src<uint32_t>(in.o[1]);
    uint32_t r = a[__builtin_ctz(members)];
    each_lane(members & (members - 1), [&](int i) {
      uint32_t v = a[i];
      bool less = in.flag ? static_cast<int32_t>(v) < static_cast<int32_t>(r) : v < r;
      switch (in.mode) {
        case 0:
          r += v;
          break;
        case 1:
          r = less ? v : r;
          break;
        case 2:
          r = less ? r : v;
          break;
        case 3:
          r &= v;
          break;
        case 4:
          r |= v;
          break;
        default:
          r ^= v;
      }
    });
    each_lane(members, [&](int i) { w.dst<uint32_t>(in.o[0])[i] = r; });
  });
}
void activemask(Warp& w, const Inst& in, uint32_t m) {
  each_lane(m, [&](int i) { w.dst<uint32_t>(in.o[0])[i] = m; });
}

// ---- externals ----

uint64_t frame(Warp& w, const Inst& in, int k, int lane, size_t bytes) {
  uint64_t offset = w.value(in, k, lane), v = 0;
  std::memcpy(&v, &w.block->local[static_cast<size_t>(w.index * 32 + lane) * w.kernel->local_bytes + offset],
              bytes);
  return v;
}
std::string text_at(Warp& w, const Inst& in, int lane, uint64_t address) {
  std::string s;
  for (; s.size() < 4096; ++address) {
    char c = static_cast<char>(*w.at(in, lane, Space::generic, address, 1, 1));
    if (!c) break;
    s += c;
  }
  return s;
}

}  // namespace

bool is_barrier(const Inst& in) {
  return in.fn == &barrier;
}
bool is_branch(const Inst& in) {
  return in.fn == &skip_if;
}
int branch_table(const Inst& in) {
  return in.fn == &branch_indexed ? static_cast<int>(in.imm) : -1;
}

// o: format, arguments, result. The arguments lie packed by their natural alignment.
void call_vprintf(Warp& w, const Inst& in, uint32_t m) {
  each_lane(m, [&](int lane) {
    std::string format = text_at(w, in, lane, frame(w, in, 0, lane, 8)), out;
    uint64_t args = frame(w, in, 1, lane, 8), at = 0;
    auto next = [&](uint32_t bytes) {
      at = (at + bytes - 1) / bytes * bytes;
      uint64_t v = 0;
      std::memcpy(&v, w.at(in, lane, Space::generic, args + at, bytes, 1), bytes);
      at += bytes;
      return v;
    };
    int written = 0;
    for (size_t i = 0; i < format.size(); ++i) {
      if (format[i] != '%') {
        out += format[i];
        continue;
      }
      std::string spec = "%";
      bool wide = false;
      for (++i; i < format.size() && strchr("-+ #0123456789.*lhz", format[i]); ++i) {
        if (format[i] == 'l' || format[i] == 'z')
          wide = true;
        else if (format[i] == '*')
          spec += std::to_string(static_cast<int>(next(4)));
        else if (format[i] != 'h')
          spec += format[i];
      }
      if (i >= format.size()) break;
      char c = format[i], text[512];
      if (spec.size() > 40) spec = "%";
      switch (c) {
        case '%':
          out += '%';
          continue;
        case 'd':
        case 'i':
          std::snprintf(
              text, sizeof text, (spec + "lld").c_str(),
              wide ? static_cast<long long>(next(8)) : static_cast<long long>(static_cast<int32_t>(next(4))));
          break;
        case 'u':
        case 'x':
        case 'X':
        case 'o':
          std::snprintf(text, sizeof text, (spec + "ll" + c).c_str(),
                        static_cast<unsigned long long>(wide ? next(8) : next(4)));
          break;
        case 'c':
          std::snprintf(text, sizeof text, (spec + c).c_str(), static_cast<int>(next(4)));
          break;
        case 'p':
          std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(next(8)));
          break;
        case 's':
          out += text_at(w, in, lane, next(8));
          ++written;
          continue;
        case 'f':
        case 'e':
        case 'g':
        case 'F':
        case 'E':
        case 'G':
        case 'a':
        case 'A':
          std::snprintf(text, sizeof text, (spec + c).c_str(), bits_as<double>(next(8)));
          break;
        default:
          w.fail(in, lane, ReportKind::illegal_instruction, 715,
                 std::string("unknown conversion '%") + c + "' in a printf");
      }
      out += text;
      ++written;
    }
    std::fwrite(out.data(), 1, out.size(), stdout);
    if (in.count > 2) {
      int32_t r = written;
      std::memcpy(w.at(in, lane, Space::local, w.value(in, 2, lane), 4, 2), &r, 4);
    }
  });
}
// o: message, file, line, function, character size
void call_assertfail(Warp& w, const Inst& in, uint32_t m) {
  int lane = __builtin_ctz(m);
  std::string message = text_at(w, in, lane, frame(w, in, 0, lane, 8)),
              file = text_at(w, in, lane, frame(w, in, 1, lane, 8)),
              function = text_at(w, in, lane, frame(w, in, 3, lane, 8));
  uint64_t line = frame(w, in, 2, lane, 4);
  w.fail(in, lane, ReportKind::assertion, 710,
         "assertion `" + message + "` failed at " + file + ":" + std::to_string(line) + " in " + function);
}

bool decode_warp(Decoder& d, const Instruction& s) {
  const std::string& op = s.opcode;
  Mods m(s);
  if (op == "bra") {
    m.take("uni");
    m.finish();
    d.operands(1);
    d.emit(&skip_if, "branch", {}, {}).target = d.label(d.operand(0).text);
    return true;
  }
  if (op == "brx") {
    if (!m.take("idx")) d.fail("expected brx.idx");
    m.take("uni");
    m.finish();
    d.operands(2);
    int t = d.table(d.operand(1).text);
    if (t < 0) d.fail("the branch targets must come before brx.idx");
    d.emit(&branch_indexed, "branch", {}, {d.in(d.operand(0), "u32")}).imm = t;
    return true;
  }
  if (op == "ret" || op == "exit") {
    m.take("uni");
    m.finish();
    d.operands(0);
    if (op == "ret" && d.exit_label() >= 0)
      d.emit(&skip_if, "branch", {}, {}).target = d.exit_label();
    else
      d.emit(&exit_now, "branch", {}, {});
    return true;
  }
  if (op == "trap" || op == "brkpt") {
    m.finish();
    d.emit(&trap, "trap", {}, {});
    return true;
  }
  if (op == "pmevent") {  // a profiler's
    m.take("mask");
    m.finish();
    d.operands(1);
    return true;
  }
  if (op == "nanosleep") {
    m.type();
    m.finish();
    d.operands(1);
    d.emit(&nanosleep, "branch", {}, {d.in(d.operand(0), "u32")});
    return true;
  }
  if (op == "bar" || op == "barrier") {
    if (m.take("warp")) {
      if (!m.take("sync")) m.fail("expected .sync");
      m.finish();
      d.operands(1);
      d.emit(&warp_barrier, "bar", {}, {d.in(d.operand(0), "b32")});
      return true;
    }
    if (m.take("cluster")) m.fail("barrier.cluster is not supported");
    if (m.take("cta")) d.require(78, 80, "the scope .cta of a barrier");
    std::string kind = m.any({"sync", "arrive", "red"});
    if (kind.empty()) m.fail("expected .sync, .arrive or .red");
    bool aligned = m.take("aligned") || op == "bar";
    std::string r = kind == "red" ? m.any({"popc", "and", "or"}) : "";
    if (kind == "red") {
      if (r.empty()) m.fail("expected .popc, .and or .or");
      if (m.any({"u32", "pred"}) != (r == "popc" ? "u32" : "pred")) m.fail("unknown type");
    }
    m.finish();
    size_t n = s.operands.size(), first = kind == "red" ? 1 : 0, last = kind == "red" ? n - 1 : n;
    if (n < first + 1 || last - first < 1 || last - first > 2) d.fail("wrong number of operands");
    std::vector<Shape> out, in{d.in(d.operand(first), "u32")};
    bool count = last - first == 2;
    if (count) in.push_back(d.in(d.operand(first + 1), "u32"));
    if (kind == "arrive" && !count) d.fail("expected a thread count");
    uint8_t flag = static_cast<uint8_t>((aligned ? 1 : 0) | (count ? 4 : 0));
    if (kind == "red") {
      out.push_back(r == "popc" ? d.out(d.operand(0), 4) : d.pred_out(d.operand(0)));
      in.push_back(d.pred_in(d.operand(n - 1)));
      if (d.operand(n - 1).negate) flag |= 2;
    }
    Inst& i = d.emit(&barrier, "bar", out, in);
    i.mode = kind == "sync" ? 0 : kind == "arrive" ? 1 : r == "popc" ? 2 : r == "and" ? 3 : 4;
    i.flag = flag;
    return true;
  }
  if (op == "shfl") {
    if (!m.take("sync")) m.fail("expected shfl.sync");
    std::string mode = m.any({"up", "down", "bfly", "idx"});
    if (!m.take("b32") || mode.empty()) m.fail("expected a mode and .b32");
    m.finish();
    d.operands(5);
    const Operand& to = d.operand(0);
    Operand plain = to;
    plain.second.clear();
    Shape p = to.second.empty() || to.second == "_" ? d.scratch(0) : d.pred_name(to.second);
    Inst& i = d.emit(&shuffle, "shfl", {d.out(plain, 4), p},
                     {d.in(d.operand(1), "b32"), d.in(d.operand(2), "b32"), d.in(d.operand(3), "b32"),
                      d.in(d.operand(4), "b32")});
    i.mode = mode == "up" ? up : mode == "down" ? down : mode == "bfly" ? bfly : idx;
    return true;
  }
  if (op == "vote") {
    if (!m.take("sync")) m.fail("expected vote.sync");
    std::string mode = m.any({"all", "any", "uni", "ballot"});
    bool ballot = mode == "ballot";
    if (mode.empty() || !m.take(ballot ? "b32" : "pred")) m.fail("expected a mode and its type");
    m.finish();
    d.operands(3);
    Shape out = ballot ? d.out(d.operand(0), 4) : d.pred_out(d.operand(0));
    Inst& i = d.emit(&vote, "vote", {out}, {d.pred_in(d.operand(1)), d.in(d.operand(2), "b32")});
    i.mode = mode == "all" ? 0 : mode == "any" ? 1 : mode == "uni" ? 2 : 3;
    i.flag = d.operand(1).negate;
    return true;
  }
  if (op == "match") {
    std::string mode = m.any({"any", "all"}), t = m.type();
    if (mode.empty() || !m.take("sync") || (t != "b32" && t != "b64"))
      m.fail("expected match.{any,all}.sync.{b32,b64}");
    m.finish();
    d.operands(3);
    const Operand& to = d.operand(0);
    Operand plain = to;
    plain.second.clear();
    Shape p = to.second.empty() || to.second == "_" ? d.scratch(0) : d.pred_name(to.second);
    d.emit(&match, "match", {d.out(plain, 4), p}, {d.in(d.operand(1), t), d.in(d.operand(2), "b32")}).mode =
        mode == "all";
    return true;
  }
  if (op == "redux") {
    d.require(70, 80, "redux");
    std::string t = m.type(), o = m.any({"add", "min", "max", "and", "or", "xor"});
    if (!m.take("sync") || o.empty() || (t != "u32" && t != "s32" && t != "b32"))
      m.fail("expected redux.sync.op.{u32,s32,b32}");
    m.finish();
    d.operands(3);
    Inst& i = d.emit(&redux, "redux", {d.out(d.operand(0), 4)},
                     {d.in(d.operand(1), "b32"), d.in(d.operand(2), "b32")});
    const bool bitwise = o == "and" || o == "or" || o == "xor";
    if (bitwise != (t == "b32")) m.fail("type ." + t + " is not supported here");
    i.mode = o == "add" ? 0 : o == "min" ? 1 : o == "max" ? 2 : o == "and" ? 3 : o == "or" ? 4 : 5;
    i.flag = t == "s32";
    return true;
  }
  if (op == "activemask") {
    if (m.type() != "b32") m.fail("expected .b32");
    m.finish();
    d.operands(1);
    d.emit(&activemask, "vote", {d.out(d.operand(0), 4)}, {});
    return true;
  }
  return false;
}

}  // namespace mgm::emulator
