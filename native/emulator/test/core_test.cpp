// The emulator's core: control flow, barriers, planted bugs that it must report, refusals at load time; and
// the parts in core_*.cpp.
#include <functional>

#include "harness.h"

using namespace mgm::emulator;
using namespace mgm::emulator::test;

namespace {

int passed = 0, failed = 0;

}  // namespace

void mgm::emulator::test::check(bool ok, const std::string& what) {
  if (ok) {
    ++passed;
  } else {
    ++failed;
    std::printf("FAILED: %s\n", what.c_str());
  }
}

namespace {

std::string load_error(const std::string& ptx, int* code, DeviceSpec spec = device_spec(80)) {
  Memory memory(spec, 0);
  std::string log;
  auto m = Module::load(ptx, spec, memory, &log, code);
  return log;
}

// A kernel on shared memory with one pointer parameter.
std::string shared_kernel(const std::string& body, const char* shared = ".shared .align 16 .b8 s[1024];") {
  return std::string(kHead) +
         ".visible .entry k(.param .u64 p)\n{\n.reg .b32 %r<30>; .reg .b64 %rd<20>; .reg .pred %p<10>; .reg "
         ".b16 %h<8>; .reg .f32 %f<10>;\n" +
         shared +
         "\nld.param.u64 %rd1, [p]; mov.u32 %r1, %tid.x; mov.u32 %r2, s; shl.b32 %r3, %r1, 2; add.u32 %r4, "
         "%r2, %r3; mad.wide.u32 %rd2, %r1, 4, %rd1;\n" +
         body + "\nret;\n}\n";
}

void expect_report(const char* what, const std::string& ptx, ReportKind kind, uint32_t block,
                   size_t words = 256, size_t shared = 0, const char* mention = "PTX line") {
  for (uint64_t seed = 0; seed < 4; ++seed) {
    Device d;
    d.options.seed = seed;
    uint64_t p = d.put(std::vector<uint32_t>(words, 1));
    auto r = d.run(ptx, {p}, 1, block, shared);
    bool found = false;
    for (const Report& x : r.reports)
      found |= x.kind == kind && x.message.find(mention) != std::string::npos && x.kernel == "k";
    if (!found) {
      std::printf("%s seed %d: error %d\n", what, static_cast<int>(seed), r.error);
      for (const Report& x : r.reports) std::printf("  %s\n", x.message.c_str());
    }
    check(found, std::string(what) + ", seed " + std::to_string(seed));
  }
}
void expect_clean(const char* what, const std::string& ptx, uint32_t block, const std::vector<uint32_t>& want,
                  uint32_t grid = 1, size_t shared = 0) {
  for (uint64_t seed = 0; seed < 4; ++seed) {
    Device d;
    d.options.seed = seed;
    d.options.threads = 1 + static_cast<int>(seed % 2);
    uint64_t p = d.put(std::vector<uint32_t>(256, 1));
    auto r = d.run(ptx, {p}, grid, block, shared);
    auto got = d.get<uint32_t>(p, want.size());
    bool ok = r.error == 0 && r.reports.empty() && got == want;
    if (!ok) {
      std::printf("%s seed %d: error %d\n", what, static_cast<int>(seed), r.error);
      for (const Report& x : r.reports) std::printf("  %s\n", x.message.c_str());
      for (size_t i = 0; i < want.size(); ++i)
        if (got[i] != want[i]) {
          std::printf("  [%zu] = %u, expected %u\n", i, got[i], want[i]);
          break;
        }
    }
    check(ok, std::string(what) + ", seed " + std::to_string(seed));
  }
}
std::vector<uint32_t> filled(size_t n, uint32_t (*f)(uint32_t)) {
  std::vector<uint32_t> v(n);
  for (uint32_t i = 0; i < n; ++i) v[i] = f(i);
  return v;
}

void bugs() {
  const std::string reverse =
      "st.shared.u32 [%r4], %r1; BARRIER sub.u32 %r5, 127, %r1; shl.b32 %r5, %r5, 2; add.u32 %r5, %r5, %r2; "
      "ld.shared.u32 %r6, [%r5]; st.global.u32 [%rd2], %r6;";
  auto with = [](std::string s, const std::string& from, const std::string& to) {
    return s.replace(s.find(from), from.size(), to);
  };
  expect_clean("barrier", shared_kernel(with(reverse, "BARRIER", "bar.sync 0;")), 128,
               filled(128, [](uint32_t i) { return 127 - i; }));
  for (uint64_t seed = 0; seed < 4; ++seed) {  // reported as a race or as a read of what is not written yet
    Device d;
    d.options.seed = seed;
    auto r = d.run(shared_kernel(with(reverse, "BARRIER", "")), {d.put(std::vector<uint32_t>(256))}, 1, 128);
    bool found = false;
    for (auto& x : r.reports) found |= x.kind == ReportKind::shared_race;
    check(found, "missing barrier");
  }
  const std::string async =
      "mad.wide.u32 %rd3, %r1, 4, %rd1; cp.async.ca.shared.global [%r4], [%rd3], 4; cp.async.commit_group; "
      "WAIT bar.sync 0; xor.b32 %r5, %r4, 4; ld.shared.u32 %r6, [%r5]; add.u32 %r6, %r6, 4; bar.sync 0; "
      "st.global.u32 [%rd2], %r6;";
  expect_clean("cp.async", shared_kernel(with(async, "WAIT", "cp.async.wait_group 0;")), 128,
               filled(128, [](uint32_t) { return 5u; }));
  expect_report("missing wait", shared_kernel(with(async, "WAIT", "")), ReportKind::shared_race, 128);
  expect_report("wait for too few groups", shared_kernel(with(async, "WAIT", "cp.async.wait_group 1;")),
                ReportKind::shared_race, 128);
  expect_clean(
      "cp.async zero fill",
      shared_kernel(
          "mad.wide.u32 %rd3, %r1, 16, %rd1; shl.b32 %r5, %r1, 4; add.u32 %r5, %r5, %r2; "
          "cp.async.cg.shared.global [%r5], [%rd3], 16, 4; cp.async.wait_all; ld.shared.v4.u32 {%r6, %r7, "
          "%r8, %r9}, [%r5]; add.u32 %r6, %r6, %r7; add.u32 %r6, %r6, %r9; st.global.u32 [%rd2], %r6;"),
      32, filled(32, [](uint32_t) { return 1u; }));
  expect_report("global overrun by one", shared_kernel("st.global.u32 [%rd2+4], %r1;"),
                ReportKind::out_of_bounds, 64, 64);
  expect_report("shared overrun by one",
                shared_kernel("st.shared.u32 [%r4+4], %r1;", ".shared .align 4 .b8 s[256];"),
                ReportKind::out_of_bounds, 64);
  expect_report("misaligned vector", shared_kernel("ld.global.v2.u32 {%r5, %r6}, [%rd2];"),
                ReportKind::misaligned, 64);
  expect_report("uninitialised shared", shared_kernel("ld.shared.u32 %r5, [%r4]; st.global.u32 [%rd2], %r5;"),
                ReportKind::uninitialized_read, 64);
  expect_report("mask without the caller",
                shared_kernel("shfl.sync.idx.b32 %r5, %r1, 0, 31, 0x0000ffff; st.global.u32 [%rd2], %r5;"),
                ReportKind::bad_mask, 32);
  expect_report("mask names absent lanes",
                shared_kernel("setp.lt.u32 %p1, %r1, 16; @!%p1 bra $E; shfl.sync.bfly.b32 %r5, %r1, 1, 31, "
                              "0xffffffff; st.global.u32 [%rd2], %r5; $E: st.global.u32 [%rd2+128], %r1;"),
                ReportKind::bad_mask, 32);
  expect_report("shfl reads a lane outside",
                shared_kernel("setp.lt.u32 %p1, %r1, 16; @!%p1 bra $E; shfl.sync.bfly.b32 %r5, %r1, 16, 31, "
                              "0xffff; st.global.u32 [%rd2], %r5; $E:"),
                ReportKind::bad_mask, 32);
  const char* divergent = "setp.lt.u32 %p1, %r1, N; @!%p1 bra $E; bar.sync 0; $E: st.global.u32 [%rd2], %r1;";
  expect_report("barrier in half a warp", shared_kernel(with(divergent, "N", "16")),
                ReportKind::divergent_barrier, 64);
  expect_report("barrier in one warp of two", shared_kernel(with(divergent, "N", "32")),
                ReportKind::divergent_barrier, 64);
  expect_clean("early return before a barrier",
               shared_kernel("setp.ge.u32 %p1, %r1, 40; @%p1 ret; st.shared.u32 [%r4], %r1; bar.sync 0; "
                             "ld.shared.u32 %r5, [s+156]; st.global.u32 [%rd2], %r5;"),
               64, filled(40, [](uint32_t) { return 39u; }));
  const char* local = ".shared .align 16 .b8 s[1024]; .local .align 16 .b8 l[64];";
  expect_report("uninitialised local",
                shared_kernel("ld.local.u32 %r5, [l+8]; st.global.u32 [%rd2], %r5;", local),
                ReportKind::uninitialized_read, 64);
  expect_clean(
      "local",
      shared_kernel("st.local.u32 [l+8], %r1; ld.local.u32 %r5, [l+8]; st.global.u32 [%rd2], %r5;", local),
      64, filled(64, [](uint32_t i) { return i; }));
  expect_clean("leaving to the end of the kernel before a barrier",
               shared_kernel("setp.ge.u32 %p1, %r1, 40; @%p1 bra $E; st.shared.u32 [%r4], %r1; bar.sync 0; "
                             "ld.shared.u32 %r5, [s+156]; st.global.u32 [%rd2], %r5; $E:"),
               96, filled(40, [](uint32_t) { return 39u; }));
  expect_clean(
      "leaving a loop with a barrier, a warp after the other",
      shared_kernel("shr.u32 %r6, %r1, 5; mov.u32 %r5, 0; $L: setp.gt.u32 %p1, %r5, %r6; @%p1 bra $E; "
                    "bar.sync 0; add.u32 %r5, %r5, 1; st.global.u32 [%rd2], %r5; bra $L; $E:"),
      96, filled(96, [](uint32_t i) { return i / 32 + 1; }));
  expect_report(
      "passing by a barrier with work behind it",
      shared_kernel("setp.ge.u32 %p1, %r1, 32; @%p1 bra $W; st.shared.u32 [%r4], %r1; bar.sync 0; $W: "
                    "add.u32 %r5, %r1, 1; setp.gt.u32 %p2, %r1, 200; @%p2 bra $E; st.global.u32 [%rd2], "
                    "%r5; $E:"),
      ReportKind::divergent_barrier, 64);
  // Four warps read one word; a barrier of three of them does not order the fourth before the write.
  expect_report(
      "write after the read of one of many",
      shared_kernel("st.shared.u32 [s], 5; bar.sync 0; ld.shared.u32 %r5, [s]; shr.u32 %r6, %r1, 5; "
                    "setp.eq.u32 %p1, %r6, 2; @%p1 bra $E; bar.sync 1, 96; setp.eq.u32 %p2, %r1, 96; "
                    "@%p2 st.shared.u32 [s], 7; $E: st.global.u32 [%rd2], %r5;"),
      ReportKind::shared_race, 128);
  expect_report(
      "write after a lane's read",
      shared_kernel("st.shared.u32 [s], 5; bar.sync 0; ld.shared.u32 %r5, [s]; setp.eq.u32 %p2, %r1, 9; "
                    "@%p2 st.shared.u32 [s], 7; st.global.u32 [%rd2], %r5;"),
      ReportKind::shared_race, 32);
  expect_report(
      "own copy before the mbarrier says so",
      shared_kernel("setp.eq.u32 %p1, %r1, 0; @%p1 mbarrier.init.shared.b64 [s+512], 32; bar.sync 0; "
                    "mad.wide.u32 %rd3, %r1, 4, %rd1; cp.async.ca.shared.global [%r4], [%rd3], 4; "
                    "cp.async.mbarrier.arrive.noinc.shared.b64 [s+512]; ld.shared.u32 %r5, [%r4]; "
                    "st.global.u32 [%rd2], %r5;"),
      ReportKind::shared_race, 32);
  // Without .noinc the copies' arrivals come on top of the 32; lanes look at one of two mbarriers.
  expect_clean(
      "arrivals beyond those counted in advance",
      shared_kernel(
          "and.b32 %r7, %r1, 1; shl.b32 %r7, %r7, 3; add.u32 %r7, %r7, %r2; setp.lt.u32 %p1, %r1, 2; "
          "@%p1 mbarrier.init.shared.b64 [%r7+512], 16; bar.sync 0; mad.wide.u32 %rd3, %r1, 4, "
          "%rd1; cp.async.ca.shared.global [%r4], [%rd3], 4; cp.async.mbarrier.arrive.shared.b64 "
          "[%r7+512]; mbarrier.arrive.shared.b64 %rd4, [%r7+512]; $W: "
          "mbarrier.test_wait.shared.b64 %p3, [%r7+512], %rd4; @!%p3 bra $W; ld.shared.u32 %r5, "
          "[%r4]; add.u32 %r5, %r5, %r1; st.global.u32 [%rd2], %r5;"),
      32, filled(32, [](uint32_t i) { return i + 1; }));
  expect_report("barrier of too few",
                shared_kernel("setp.lt.u32 %p1, %r1, 32; @%p1 bar.sync 1, 96; bar.sync 0;"),
                ReportKind::divergent_barrier, 64, 256, 0, "wait at barrier 1");
  expect_report("trap", shared_kernel("trap;"), ReportKind::trap, 32);
  {
    Device d;
    uint64_t p = d.put(std::vector<uint32_t>(64));
    std::vector<Report> reports;
    check(d.memory.free(p, &reports) && reports.empty(), "free");
    auto r = d.run(shared_kernel("st.global.u32 [%rd2], %r1;"), {p}, 1, 32);
    check(r.error == 700 && !r.reports.empty() && r.reports[0].kind == ReportKind::use_after_free,
          "use after free");
    check(!d.memory.free(p, &reports) && reports.size() == 1 && reports[0].kind == ReportKind::invalid_free,
          "double free");
    uint64_t q = d.memory.allocate(256);
    check(d.memory.first_uninitialized(q, 256) == 0, "fresh memory is not initialised");
    r = d.run(shared_kernel("ld.global.u32 %r5, [%rd2];"), {q}, 1, 32);
    check(r.error == 0 && r.reports.size() == 1 && r.reports[0].kind == ReportKind::uninitialized_read,
          "uninitialised global");
    uint32_t host[32] = {};
    r = d.run(shared_kernel("st.global.u32 [%rd2], %r1;"), {reinterpret_cast<uint64_t>(host)}, 1, 32);
    check(r.error == 700 && host[5] == 0, "host pointer on the device");
    uint64_t mapped = d.memory.map_host(host, sizeof host);
    r = d.run(shared_kernel("st.global.u32 [%rd2], %r1;"), {mapped}, 1, 32);
    check(r.error == 0 && host[5] == 5, "mapped host memory");
    check(d.run(shared_kernel("ret;"), {q}, 1, 64, 60000).error == 1,
          "too much shared memory without opt-in");
    check(d.run(shared_kernel("ret;"), {q}, 1, 1025).error == 1, "too many threads");
    // Lanes i and i + 16 meet in one bank: two cycles instead of one.
    d.options.counters = true;
    r = d.run(shared_kernel("add.u32 %r4, %r4, %r3;\nst.shared.u32 [%r4], %r1;"), {q}, 1, 32);
    check(r.error == 0 && r.counters.shared_conflict_cycles == 1 &&
              r.counters.conflicts_by_line.size() == 1 && r.counters.conflicts_by_line.begin()->second == 1,
          "bank conflicts by line");
    d.options.watchdog_seconds = 0.2;
    r = d.run(shared_kernel("$L: ld.volatile.global.u32 %r5, [%rd1]; setp.ne.u32 %p1, %r5, 77; @%p1 bra $L;"),
              {d.put(std::vector<uint32_t>(64))}, 1, 32);
    check(r.error == 719 && !r.reports.empty() && r.reports[0].kind == ReportKind::deadlock, "watchdog");
    r = d.run(shared_kernel("setp.lt.u32 %p2, %r1, 32; @%p2 bra $B; $L: ld.volatile.global.u32 %r5, [%rd1]; "
                            "setp.ne.u32 %p1, %r5, 77; @%p1 bra $L; $B: bar.sync 0;"),
              {d.put(std::vector<uint32_t>(64))}, 1, 64);
    check(r.error == 719 && !r.reports.empty() && r.reports[0].kind == ReportKind::deadlock &&
              r.reports[0].message.find("warp 0 lanes 0xffffffff wait at barrier 0") != std::string::npos &&
              r.reports[0].message.find("warp 1 lanes 0xffffffff run") != std::string::npos,
          "the watchdog says who waits for what");
  }
}

// Random programs of nested branches and loops, each thread on its own data, against the same steps one by
// one.
struct Program {
  std::mt19937 random;
  std::string text;
  int labels = 0, statements = 0;
  using Step = std::function<void(uint32_t*)>;

  std::string reg(uint32_t i) { return "%r" + std::to_string(20 + i); }
  Step block(int depth) {
    std::vector<Step> steps;
    for (uint32_t n = 1 + random() % 3; n--;) steps.push_back(statement(depth));
    return [steps](uint32_t* v) {
      for (const Step& s : steps) s(v);
    };
  }
  Step statement(int depth) {
    const uint32_t a = random() % 4, b = random() % 4, c = random() % 1000, kind = random() % 8;
    const std::string label = std::to_string(labels++);
    if (depth == 0 || ++statements > 40 || kind < 3) {
      text += "mad.lo.u32 " + reg(a) + ", " + reg(b) + ", " + std::to_string(c | 1) + ", " + reg(a) + ";\n";
      return [=](uint32_t* v) { v[a] = v[b] * (c | 1) + v[a]; };
    }
    if (kind < 6) {
      const uint32_t bit = 1u << random() % 5;
      text += "and.b32 %r5, " + reg(a) + ", " + std::to_string(bit) +
              "; setp.eq.u32 %p1, %r5, 0; @%p1 bra $E" + label + ";\n";
      Step yes = block(depth - 1);
      text += "bra $J" + label + "; $E" + label + ":\n";
      Step no = block(depth - 1);
      text += "$J" + label + ":\n";
      return [=](uint32_t* v) { v[a] & bit ? yes(v) : no(v); };
    }
    const std::string counter = "%r" + std::to_string(6 + depth);
    text += "and.b32 " + counter + ", " + reg(a) + ", 3; $L" + label + ": setp.eq.u32 %p1, " + counter +
            ", 0; @%p1 bra $X" + label + ";\n";
    Step body = block(depth - 1);
    text += "sub.u32 " + counter + ", " + counter + ", 1; bra $L" + label + "; $X" + label + ":\n";
    return [=](uint32_t* v) {
      for (uint32_t n = v[a] & 3; n--;) body(v);
    };
  }
};

void torture() {
  for (uint32_t seed = 0; seed < 40; ++seed) {
    Program p;
    p.random.seed(seed);
    const Program::Step all = p.block(5);
    std::vector<uint32_t> want(64);
    for (uint32_t i = 0; i < 64; ++i) {
      uint32_t v[4] = {i, i * 3, i ^ 21, 7};
      all(v);
      want[i] = v[0] ^ v[1] ^ v[2] ^ v[3];
    }
    // The exchanges at the end need all lanes: they must have met again.
    expect_clean(
        ("divergence, program " + std::to_string(seed)).c_str(),
        shared_kernel(
            "mov.u32 %r20, %r1; mul.lo.u32 %r21, %r1, 3; xor.b32 %r22, %r1, 21; mov.u32 %r23, 7;\n" + p.text +
            "xor.b32 %r5, %r20, %r21; xor.b32 %r6, %r22, %r23; xor.b32 %r5, %r5, %r6; shfl.sync.bfly.b32 "
            "%r8, %r5, 1, 31, -1; shfl.sync.bfly.b32 %r5, %r8, 1, 31, -1; "
            "st.global.u32 [%rd2], %r5;"),
        64, want);
  }
}

// Sums of small integers in pairs of halves: exact whatever the order.
void paired_atomics() {
  for (const char* type : {"f16x2", "bf16x2"})
    for (uint64_t seed = 0; seed < 4; ++seed) {
      const bool bf = type[0] == 'b';
      Device d;
      d.spec = device_spec(bf ? 90 : 80);
      d.options.seed = seed;
      d.options.threads = 2;
      std::string k = shared_kernel(
          "and.b32 %r5, %r1, 1; setp.eq.u32 %p1, %r5, 0; selp.b32 %r6, ONE, TWO, %p1; "
          "atom.global.add.noftz.TYPE %r7, "
          "[%rd1], %r6; red.global.add.noftz.TYPE [%rd1+4], %r6;");
      const std::pair<std::string, std::string> words[] = {{"ONE", bf ? "0x40003f80" : "0x40003c00"},
                                                           {"TWO", bf ? "0x3f803f80" : "0x3c003c00"},
                                                           {"TYPE", type},
                                                           {"TYPE", type},
                                                           {"sm_80", bf ? "sm_90" : "sm_80"}};
      for (const auto& [from, to] : words) k.replace(k.find(from), from.size(), to);
      const uint64_t at = d.put(std::vector<uint32_t>(2));
      const LaunchResult r = d.run(k, {at}, 4, 32);
      const std::vector<uint32_t> got = d.get<uint32_t>(at, 2);
      auto half = [&](uint32_t h) { return half_value(h & 0xffff, bf ? 8 : 5, bf ? 7 : 10); };
      check(r.error == 0 && r.reports.empty() && got[0] == got[1] && half(got[0]) == 128 &&
                half(got[0] >> 16) == 192,
            std::string("atomics on ") + type);
    }
}

void control() {
  // Collatz steps: every lane leaves the loop at its own time.
  expect_clean(
      "divergent loop",
      shared_kernel(
          "add.u32 %r5, %r1, 1; mov.u32 %r6, 0; $L: setp.eq.u32 %p1, %r5, 1; @%p1 bra $D; and.b32 %r7, %r5, "
          "1; setp.eq.u32 %p2, %r7, 0; @%p2 bra $V; mad.lo.u32 %r5, %r5, 3, 1; bra $N; $V: shr.u32 %r5, %r5, "
          "1; $N: add.u32 %r6, %r6, 1; bra $L; $D: bar.warp.sync -1; st.global.u32 [%rd2], %r6;"),
      64, filled(64, [](uint32_t i) {
        uint32_t x = i + 1, n = 0;
        while (x != 1) {
          x = x % 2 ? 3 * x + 1 : x / 2;
          ++n;
        }
        return n;
      }));
  expect_clean(
      "brx.idx",
      shared_kernel(
          "and.b32 %r5, %r1, 3; T: .branchtargets $A, $B, $C, $A; brx.idx %r5, T; $A: mov.u32 %r6, 10; bra "
          "$E; $B: mov.u32 %r6, 20; bra $E; $C: mov.u32 %r6, 30; $E: st.global.u32 [%rd2], %r6;"),
      64, filled(64, [](uint32_t i) {
        static const uint32_t v[] = {10, 20, 30, 10};
        return v[i % 4];
      }));
  // A lock taken by diverged lanes: ends only if each of them makes progress.
  expect_clean(
      "spin lock",
      shared_kernel("setp.ne.u32 %p1, %r1, 0; @%p1 bra $W; mov.u32 %r5, 0; st.shared.u32 [s], %r5; "
                    "st.shared.u32 [s+4], %r5; $W: bar.sync 0; $L: atom.shared.cas.b32 %r5, [s], 0, 1; "
                    "setp.ne.u32 %p2, %r5, 0; @%p2 bra $L; ld.volatile.shared.u32 %r6, [s+4]; add.u32 %r6, "
                    "%r6, 1; st.volatile.shared.u32 [s+4], %r6; membar.cta; atom.shared.exch.b32 %r7, [s], "
                    "0; bar.sync 0; ld.volatile.shared.u32 %r8, [s+4]; st.global.u32 [%rd2], %r8;"),
      64, filled(64, [](uint32_t) { return 64u; }));
  expect_clean("atomics",
               shared_kernel("atom.global.add.u32 %r5, [%rd1], 1; red.global.max.u32 [%rd1+4], %r1; "
                             "red.global.or.b32 [%rd1+8], %r1;"),
               96, {1 + 96 * 4, 95, 127}, 4);
  expect_clean("shfl scan",
               shared_kernel("mov.u32 %r5, %r1; and.b32 %r6, %r1, 31; mov.u32 %r7, 1; $L: shfl.sync.up.b32 "
                             "%r8|%p1, %r5, %r7, 0, -1; @%p1 add.u32 %r5, %r5, %r8; shl.b32 %r7, %r7, 1; "
                             "setp.lt.u32 %p2, %r7, 32; @%p2 bra $L; st.global.u32 [%rd2], %r5;"),
               32, filled(32, [](uint32_t i) { return i * (i + 1) / 2; }));
  expect_clean(
      "vote match redux",
      shared_kernel("setp.lt.u32 %p1, %r1, 5; vote.sync.ballot.b32 %r5, %p1, -1; and.b32 %r6, %r1, 7; "
                    "match.any.sync.b32 %r7, %r6, -1; popc.b32 %r7, %r7; redux.sync.max.u32 %r8, %r1, -1; "
                    "add.u32 %r5, %r5, %r7; add.u32 %r5, %r5, %r8; st.global.u32 [%rd2], %r5;"),
      32, filled(32, [](uint32_t) { return 31u + 4 + 31; }));
  expect_clean("named barriers",
               shared_kernel("setp.lt.u32 %p1, %r1, 64; @%p1 bra $P; bar.sync 1, 128; ld.shared.u32 %r5, "
                             "[%r4+-256]; bra $E; $P: add.u32 %r5, %r1, 7; st.shared.u32 [%r4], %r5; "
                             "bar.arrive 1, 128; $E: st.global.u32 [%rd2], %r5;"),
               128, filled(128, [](uint32_t i) { return i % 64 + 7; }));
  // Half the block produces through an mbarrier, half consumes.
  const std::string mbarrier =
      R"(setp.ne.u32 %p1, %r1, 0; @%p1 bra $S; mbarrier.init.shared.b64 [s], 32; $S: bar.sync 0;
      setp.ge.u32 %p2, %r1, 32; @%p2 bra $C; mad.wide.u32 %rd3, %r1, 4, %rd1; cp.async.ca.shared.global [%r4+64], [%rd3], 4;
      cp.async.mbarrier.arrive.noinc.shared.b64 [s]; bra $E;
      $C: WAIT ld.shared.u32 %r6, [%r4+-64]; add.u32 %r6, %r6, %r1; st.global.u32 [%rd2], %r6; $E:)";
  auto replaced = [](std::string t, const std::string& to) { return t.replace(t.find("WAIT"), 4, to); };
  std::vector<uint32_t> after = filled(64, [](uint32_t i) { return i < 32 ? 1 : i + 1; });
  expect_clean(
      "mbarrier",
      shared_kernel(replaced(mbarrier, "mbarrier.test_wait.parity.shared.b64 %p3, [s], 0; @!%p3 bra $C;")),
      64, after);
  for (uint64_t seed = 0; seed < 4; ++seed) {  // the same without the wait
    Device d;
    d.options.seed = seed;
    auto r = d.run(shared_kernel(replaced(mbarrier, "")), {d.put(std::vector<uint32_t>(256, 1))}, 1, 64);
    check(!r.reports.empty(), "missing mbarrier wait");
  }
  expect_clean(
      "bar.red",
      shared_kernel("setp.lt.u32 %p1, %r1, 37; bar.red.popc.u32 %r5, 0, %p1; st.global.u32 [%rd2], %r5;"), 96,
      filled(96, [](uint32_t) { return 37u; }));
  // Stored row by row, read as the transposed 8x8 matrix.
  expect_clean("ldmatrix.trans",
               shared_kernel(
                   "cvt.u16.u32 %h1, %r1; add.u16 %h2, %h1, 32; shl.b32 %r5, %r1, 1; add.u32 %r5, %r5, %r2; "
                   "st.shared.u16 [%r5], %h1; st.shared.u16 [%r5+64], %h2; bar.sync 0; and.b32 %r6, %r1, 7; "
                   "shl.b32 %r6, %r6, 4; add.u32 %r6, %r6, %r2; "
                   "ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%r7}, [%r6]; st.global.u32 [%rd2], %r7;"),
               32, filled(32, [](uint32_t i) {
                 uint32_t row = i % 4 * 2, col = i / 4;
                 return row * 8 + col | (row * 8 + 8 + col) << 16;
               }));
  expect_clean("call",
               std::string(kHead) +
                   ".func (.param .b32 y) twice(.param .b32 x)\n{ .reg .b32 %r<4>; .reg .pred %p; "
                   "ld.param.b32 %r1, [x]; setp.gt.u32 %p, %r1, 9; @%p bra $X; add.u32 %r1, %r1, %r1; "
                   "st.param.b32 [y], %r1; ret; $X: mov.u32 %r1, 99; st.param.b32 [y], %r1; ret; }\n"
                   ".visible .entry k(.param .u64 p)\n{ .reg .b32 %r<10>; .reg .b64 %rd<5>; ld.param.u64 "
                   "%rd1, [p]; mov.u32 %r1, %tid.x; { .param .b32 a; .param .b32 b; st.param.b32 [a+0], %r1; "
                   "call.uni (b), twice, (a); ld.param.b32 %r4, [b+0]; } mad.wide.u32 %rd1, %r1, 4, %rd1; "
                   "st.global.u32 [%rd1], %r4; ret; }\n",
               32, filled(32, [](uint32_t i) { return i > 9 ? 99u : 2 * i; }));
  expect_clean("dynamic shared",
               std::string(kHead) +
                   ".extern .shared .align 16 .b8 dyn[];\n.shared .align 4 .b8 st[20];\n.visible .entry "
                   "k(.param .u64 p)\n{ .reg .b32 %r<10>; .reg .b64 %rd<5>; ld.param.u64 %rd1, [p]; mov.u32 "
                   "%r1, %tid.x; mov.u32 %r2, dyn; shl.b32 %r3, %r1, 2; add.u32 %r2, %r2, %r3; st.shared.u32 "
                   "[%r2], %r1; st.shared.u32 [st+16], 5; ld.shared.u32 %r4, [%r2]; mad.wide.u32 %rd1, %r1, "
                   "4, %rd1; st.global.u32 [%rd1], %r4; ret; }\n",
               32, filled(32, [](uint32_t i) { return i; }), 1, 128);
}

void loading() {
  int code;
  std::string log =
      load_error(std::string(kHead) + ".visible .entry k()\n{\nfrobnicate.u32 %r1;\n}\n", &code);
  check(code == 218 && log.find("frobnicate") != std::string::npos && log.find("line 6") != std::string::npos,
        "unknown opcode is named");
  log = load_error(
      std::string(kHead) + ".visible .entry k()\n{\n.reg .u32 %a; add.bogus.u32 %a, %a, %a;\n}\n", &code);
  check(code == 218 && log.find("bogus") != std::string::npos, "unknown modifier is named");
  log = load_error(std::string(kHead) + ".visible .entry k()\n{\n.frob 1;\n}\n", &code);
  check(code == 218 && log.find("frob") != std::string::npos, "unknown directive is named");
  DeviceSpec old = device_spec(80);
  old.driver_version = 11040;
  load_error(std::string(kHead) + ".visible .entry k()\n{ ret; }\n", &code, old);
  check(code == 222, "old driver refuses a new .version");
  load_error(".version 7.8\n.target sm_90\n.address_size 64\n", &code);
  check(code == 209, "newer target is refused");
  load_error(std::string(kHead) + ".visible .entry k()\n{ .reg .b32 %a; add.rn.bf16x2 %a, %a, %a; }\n",
             &code);
  check(code == 218, "add.bf16x2 needs sm_90");
  std::mt19937 random(3);
  std::string good = shared_kernel("st.global.u32 [%rd2], %r1;");
  for (int i = 0; i < 300; ++i) {  // damaged text never crashes
    std::string bad = good.substr(0, random() % good.size());
    if (i % 2) {
      bad = good;
      bad[random() % bad.size()] = static_cast<char>(32 + random() % 95);
    }
    load_error(bad, &code);
  }
  check(true, "damaged PTX");
}

}  // namespace

int main() {
  test_integers();
  test_floats();
  test_conversions();
  test_matrices();
  test_grammar();
  control();
  torture();
  paired_atomics();
  bugs();
  loading();
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}
