// The executor's view of a kernel: flat decoded instructions, warps of 32 lanes, blocks, launches.
//
// A register is an array of 32 lanes in the warp's register file (predicates: one 32-bit mask). An operand is
// a byte offset into that file, or ~offset into the kernel's pool of constants, laid out in the same way, so
// a handler never asks which of the two it got.
#pragma once
#include <array>
#include <atomic>
#include <chrono>
#include <cstring>
#include <deque>
#include <initializer_list>
#include <mutex>
#include <random>
#include <tuple>

#include "memory_impl.h"
#include "ptx.h"

namespace mgm::emulator {

struct Inst;
struct Warp;
struct Block;
struct Launch;
using Handler = void (*)(Warp&, const Inst&, uint32_t mask);

constexpr int32_t kNone = INT32_MIN;
constexpr uint32_t kAll = ~0u;
// Generic addresses of the windows; device addresses are host addresses and lie below.
constexpr uint64_t kSharedWindow = uint64_t{0x80} << 48, kLocalWindow = uint64_t{0x90} << 48,
                   kParamWindow = uint64_t{0xa0} << 48, kWindowMask = uint64_t{0xff} << 48;
constexpr uint64_t kCallParam = uint64_t{1} << 40;  // parameter-space address of a call's own parameters

struct Inst {
  Handler fn = nullptr;
  int32_t o[16];
  uint8_t w[16] = {};  // bytes per lane of each operand
  int32_t pred = kNone;
  bool pred_negated = false;
  uint8_t count = 0, outputs = 0;  // operands; the first `outputs` are written
  Space space = Space::generic;
  uint8_t bytes = 0, vec = 1, mode = 0;  // element size, vector length, what the handler makes of it
  uint8_t flag = 0;
  uint16_t klass = 0;
  int32_t line = 0, target = 0;
  int64_t imm = 0;
  uint64_t past = 0;  // barriers (a bit each) that this instruction comes after for good
};

enum SpecialRegister : uint8_t {
  tid_x,
  tid_y,
  tid_z,
  ntid_x,
  ntid_y,
  ntid_z,
  ctaid_x,
  ctaid_y,
  ctaid_z,
  nctaid_x,
  nctaid_y,
  nctaid_z,
  laneid,
  warpid,
  nwarpid,
  smid,
  nsmid,
  gridid,
  lanemask_eq,
  lanemask_lt,
  lanemask_le,
  lanemask_gt,
  lanemask_ge,
  dynamic_smem_size,
  total_smem_size,
};
struct Special {
  int32_t reg;
  SpecialRegister what;
};

struct Kernel {
  FunctionInfo info;
  std::vector<Inst> code;
  std::vector<uint8_t> pool;
  std::vector<Special> specials;
  std::vector<std::vector<int32_t>> tables;  // branch targets
  std::vector<const char*> classes;
  size_t register_bytes = 0;
  size_t local_bytes = 0, static_shared = 0;
  size_t shared_granule = 4;  // smallest access to shared memory: the race checker's cell
  int required[3] = {0, 0, 0};
  bool has_required = false;
};

struct Fault {
  ReportKind kind;
  int error;
};

enum class Wait : uint8_t { none, sync, converge, barrier };
struct Group {
  int32_t pc;
  uint32_t mask;
  Wait wait = Wait::none;
  int barrier = -1;
  // Barriers for the whole block, as bits: those executed, and those that were left behind without.
  uint64_t passed = 0, skipped = 0;
};

// A cp.async, or the arrival of a cp.async.mbarrier.arrive that follows all earlier ones of its lanes.
struct AsyncCopy {
  uint32_t pending = 0;
  const Inst* arrival = nullptr;
  std::vector<uint32_t> clock;  // of the warp at the arrival
  uint32_t group[32];
  uint32_t shared[32];
  const std::byte* source[32];
  const uint8_t* init[32];
  uint8_t bytes = 0, source_bytes[32];
  int line = 0;
};

struct Warp {
  uint8_t* regs = nullptr;
  const uint8_t* pool = nullptr;
  Block* block = nullptr;
  const Kernel* kernel = nullptr;
  int index = 0;
  uint32_t lanes = 0, alive = 0;
  std::vector<Group> groups;
  size_t current = 0;
  // While a group runs:
  int32_t pc = 0, switch_pc = INT32_MAX;
  uint32_t active = 0;
  bool stop = false;
  bool blocked = false;
  // cp.async
  std::deque<AsyncCopy> copies;
  uint32_t group_now[32] = {};
  // race checker: clock[v] = what this warp knows of warp v
  std::vector<uint32_t> clock;
  Allocation* cached = nullptr;
  uint64_t instructions = 0;

  template <class T>
  const T* src(int32_t o) const {
    return reinterpret_cast<const T*>(o >= 0 ? regs + o : pool + ~o);
  }
  template <class T>
  T* dst(int32_t o) {
    return reinterpret_cast<T*>(regs + o);
  }
  uint32_t predicate(int32_t o) const { return *src<uint32_t>(o); }
  // Lane's value of an operand, zero-extended.
  uint64_t value(const Inst& in, int k, int lane) const {
    const uint8_t* p = src<uint8_t>(in.o[k]);
    switch (in.w[k]) {
      case 1:
        return p[lane];
      case 2:
        return reinterpret_cast<const uint16_t*>(p)[lane];
      case 4:
        return reinterpret_cast<const uint32_t*>(p)[lane];
      default:
        return reinterpret_cast<const uint64_t*>(p)[lane];
    }
  }
  void set(const Inst& in, int k, int lane, uint64_t v) {
    uint8_t* p = dst<uint8_t>(in.o[k]);
    switch (in.w[k]) {
      case 1:
        p[lane] = static_cast<uint8_t>(v);
        break;
      case 2:
        reinterpret_cast<uint16_t*>(p)[lane] = static_cast<uint16_t>(v);
        break;
      case 4:
        reinterpret_cast<uint32_t*>(p)[lane] = static_cast<uint32_t>(v);
        break;
      default:
        reinterpret_cast<uint64_t*>(p)[lane] = v;
    }
  }
  void set_predicate(int32_t o, uint32_t mask, uint32_t bits) {
    if (o == kNone) return;
    uint32_t& p = *dst<uint32_t>(o);
    p = (p & ~mask) | (bits & mask);
  }

  bool run(int budget);  // false: nothing in this warp can run now
  bool select();
  void store_current();
  void branch(uint32_t taken, int32_t target);
  void exit_lanes(uint32_t mask);
  void wait_here(Wait kind);  // the group comes back to the instruction that is running
  void converge(const Inst& in, uint32_t mask, const char* what, bool* ready);
  uint32_t join(const Inst& in, uint32_t mask, int lane, uint32_t named, const char* what, bool* ready);

  // Memory. `kind`: 1 read, 2 write, 3 both.
  std::byte* at(const Inst& in, int lane, Space space, uint64_t address, uint32_t bytes, int kind,
                const std::byte* value = nullptr);
  std::byte* at_shared(const Inst& in, int lane, uint64_t offset, uint32_t bytes, int kind,
                       bool atomic = false,
                       const std::byte* value = nullptr);  // value: what a plain store is about to write
  std::byte* at_global(const Inst& in, int lane, uint64_t address, uint32_t bytes, int kind,
                       uint8_t** init = nullptr);
  void count_access(const Inst& in, Space space, uint32_t mask, const uint64_t* address, uint32_t bytes);
  void land(uint32_t mask, uint32_t keep, bool all);
  void land_copy(AsyncCopy& copy, uint32_t lanes,
                 uint32_t now);  // now: the warp's clock for the race checker
  void sync_memory();  // a warp-wide synchronisation: later accesses of other lanes are ordered after

  [[noreturn]] void fail(const Inst& in, int lane, ReportKind kind, int error, const std::string& message,
                         uint64_t address = 0);
  void note(const Inst& in, int lane, ReportKind kind, const std::string& message, uint64_t address = 0);
};

// What the race checker knows of a piece of shared memory: accesses that no later one is ordered after, as
// atomic << 63 | several lanes << 62 | clock << 10 | warp << 5 | lane; 0: none.
struct Cell {
  uint64_t writer = 0, readers[2] = {0, 0};  // of two warps; those of others in Block::readers[more - 1]
  int line = 0;                              // of the writer
  uint32_t more = 0;
};

struct Barrier {
  uint32_t arrived = 0;   // threads
  uint32_t expected = 0;  // 0: all of the block
  bool waiting = false;
  uint32_t count_true = 0, threads = 0, waiting_votes = 0;
  std::vector<std::pair<int, uint32_t>> joined;  // warp, lanes that wait
  std::vector<uint32_t> clock;
  struct Result {
    int warp;
    int32_t reg;
    uint8_t op;
    uint8_t width;
    uint32_t mask;
  };
  std::vector<Result> results;
};

struct Block {
  Launch* launch = nullptr;
  const Kernel* kernel = nullptr;
  uint32_t id[3] = {};
  int threads = 0;
  std::vector<Warp> warps;
  std::vector<uint8_t> registers;
  std::vector<std::byte> shared, local;
  std::vector<uint8_t> local_init;
  std::vector<uint8_t> shared_init;  // bit 0: written; bit 1: an asynchronous copy is under way
  std::vector<Cell> cells;
  std::vector<std::array<uint64_t, 32>> readers;  // a set per cell that more than two warps read, by warp
  std::vector<uint32_t> free_readers;
  std::map<uint64_t, std::vector<uint32_t>> mbarrier_clocks;  // by shared address: what waiting on it orders
  Barrier barriers[16];
  std::mt19937_64 random;
  Counters counters;
  std::vector<uint64_t> classes;
  size_t shared_bytes = 0;
  bool done = false;
  uint64_t skipped = 0;  // barriers that threads left behind before they ended, here:
  int skip_line = 0;

  void start(Launch& launch, uint64_t linear);
  bool step();  // runs for a while; true when the block has finished
  void arrive(Warp& w, const Inst& in, int id, uint32_t threads, uint32_t mask, bool wait);
  void complete(int id);
  void check_barriers();
  std::string who_waits() const;
  [[noreturn]] void stuck();
};

struct Launch {
  const Kernel* kernel = nullptr;
  LaunchConfig config;
  std::vector<std::byte> params;
  DeviceSpec spec;
  Memory* memory = nullptr;
  Memory::Impl* impl = nullptr;
  Options options;
  std::atomic<bool> abort{false};
  std::atomic<uint64_t> next{0};
  uint64_t blocks = 0, chosen = 0;  // of the grid; of those, how many run
  uint64_t stride = 1, offset = 0;  // the order
  std::mutex mutex;
  LaunchResult result;
  std::chrono::steady_clock::time_point started;
  void add(Report report);
  // The k-th block to run.
  uint64_t block_at(uint64_t k) const;
};

std::string hex(uint64_t v);

// ---- decoding ----

class Decoder;
// Modifiers of an instruction, consumed as they are understood; what is left over is an error.
class Mods {
 public:
  explicit Mods(const Instruction& in) : in_(in), left_(in.parts) {}
  bool take(std::string_view name);
  // The first of `names` present, or "".
  std::string any(std::initializer_list<std::string_view> names);
  std::string type();  // the last remaining type modifier, consumed from the end
  std::string front();
  bool empty() const { return left_.empty(); }
  void finish() const;
  [[noreturn]] void fail(const std::string& message) const;
  std::string all() const;

 private:
  const Instruction& in_;
  std::vector<std::string> left_;
};

struct Shape {
  int32_t operand;
  uint8_t width;
};

class Decoder {
 public:
  Decoder(const PtxModule& module, const DeviceSpec& spec,
          const std::map<std::string, std::pair<uint64_t, size_t>>& globals)
      : module_(module), spec_(spec), globals_(globals) {}
  Kernel kernel(const Function& f);

  // For the decoders of instruction families.
  const Instruction* now = nullptr;
  Inst& emit(Handler fn, const char* klass, std::initializer_list<Shape> outputs,
             std::initializer_list<Shape> inputs);
  Inst& emit(Handler fn, const char* klass, const std::vector<Shape>& outputs,
             const std::vector<Shape>& inputs);
  Shape out(const Operand& o, int bytes);  // bytes 0: any register
  Shape in(const Operand& o,
           std::string_view type);  // register of that width or constant; type "" = any register
  Shape constant(uint64_t value, int bytes);
  Shape scratch(int bytes);
  Shape pred_out(const Operand& o);
  Shape pred_in(const Operand& o);
  Shape pred_name(const std::string& name);
  // Base register or constant; sets space, imm. Call-frame parameters turn Space::param into Space::local.
  Shape address(const Operand& o, Space* space, int64_t* imm);
  const Operand& operand(size_t i) const;
  void operands(size_t n) const;
  void operands(size_t least, size_t most) const;
  [[noreturn]] void fail(const std::string& message) const;
  void require(int version, int target, const char* what) const;
  int label(const std::string& name);  // index into labels, resolved at the end
  int table(const std::string& name);
  void shared_access(int bytes) { granule_ = std::min<size_t>(granule_, static_cast<size_t>(bytes)); }
  void call(const Instruction& s);
  int exit_label() const { return exits_.empty() ? -1 : exits_.back(); }
  const PtxModule& module() const { return module_; }
  bool special(const std::string& name, Shape* shape);

 private:
  struct Symbol {
    enum Kind : uint8_t { reg, local, shared, dynamic, param, call_param, global } kind;
    int32_t id = 0;
    uint64_t offset = 0;
    uint8_t width = 0;
    bool predicate = false;
  };
  struct Scope {
    std::map<std::string, Symbol, std::less<>> names;
    std::map<std::string, std::pair<int, std::string>, std::less<>> prefixes;  // "%r" -> count, type
    std::map<std::string, int, std::less<>> labels;
    std::map<std::string, int, std::less<>> tables;
    bool function = false;
  };
  void collect(const std::vector<Statement>& body, size_t from);
  void body(const Function& f);
  void instruction(const Instruction& s);
  Symbol* find(std::string_view name);
  Symbol* find_or_fail(const std::string& name);
  int32_t new_reg(int bytes);
  void declare(const Variable& v);
  uint64_t place_local(const Variable& v);
  uint64_t place_shared(const Variable& v);
  void mark_barriers();
  void allocate_registers();

  const PtxModule& module_;
  const DeviceSpec& spec_;
  const std::map<std::string, std::pair<uint64_t, size_t>>& globals_;
  Kernel k_;
  std::vector<Scope> scopes_;
  std::vector<uint8_t> reg_bytes_;
  std::vector<int32_t> labels_;  // index -> pc
  std::vector<int> exits_;
  std::vector<std::string> stack_;
  std::vector<std::pair<size_t, uint64_t>>
      dynamic_;  // pool entries that hold an offset into dynamic shared memory
  std::map<std::pair<uint64_t, int>, int32_t> pooled_;
  std::map<std::string, uint64_t> shared_symbols_;
  std::map<std::string, int> class_ids_;
  std::map<int, int32_t> specials_;
  size_t granule_ = 4, dynamic_align_ = 16;
  uint64_t local_ = 0;
};

// Each says whether the opcode is its own; throws PtxError for what it does not understand.
bool decode_integer(Decoder& d, const Instruction& s);
bool decode_float(Decoder& d, const Instruction& s);
bool decode_convert(Decoder& d, const Instruction& s);
bool decode_memory(Decoder& d, const Instruction& s);
bool decode_warp(Decoder& d, const Instruction& s);
bool decode_matrix(Decoder& d, const Instruction& s);
bool decode_mbarrier(Decoder& d, const Instruction& s);

// Control flow that the decoder itself emits or has to recognise.
void skip_if(Warp& w, const Inst& in, uint32_t mask);   // bra
void exit_now(Warp& w, const Inst& in, uint32_t mask);  // exit
bool is_barrier(const Inst& in);
// Of a barrier for the whole block: its bit in Inst::past, and in what Group and Block remember. 0: no such
// one.
inline uint64_t barrier_bit(const Inst& in) {
  return is_barrier(in) && in.imm ? uint64_t{1} << (in.imm - 1) : 0;
}
bool is_branch(const Inst& in);    // target is a label
int branch_table(const Inst& in);  // -1: not brx.idx

// External functions by name, called with their parameters in the call frame.
void call_vprintf(Warp& w, const Inst& in, uint32_t mask);
void call_assertfail(Warp& w, const Inst& in, uint32_t mask);

// ---- lane loops ----

template <class F, class R, class... A, size_t... I>
inline void alu_lanes(Warp& w, const Inst& in, uint32_t m, std::index_sequence<I...>) {
  std::tuple<const A*...> s{w.src<A>(in.o[I + 1])...};
  R t[32];
  for (int i = 0; i < 32; ++i) t[i] = static_cast<R>(F::call(std::get<I>(s)[i]...));
  R* d = w.dst<R>(in.o[0]);
  if (m == kAll) {
    std::memcpy(d, t, sizeof t);
  } else {
    for (int i = 0; i < 32; ++i) d[i] = m >> i & 1 ? t[i] : d[i];
  }
}
// F::call on each lane: output o[0] of type R from inputs o[1].. of types A.
template <class F, class R, class... A>
void alu(Warp& w, const Inst& in, uint32_t m) {
  alu_lanes<F, R, A...>(w, in, m, std::index_sequence_for<A...>{});
}

inline uint32_t pack_bits(const uint8_t* b) {  // 32 bytes of 0 or 1
  uint32_t r = 0;
  for (int i = 0; i < 4; ++i) {
    uint64_t v;
    std::memcpy(&v, b + 8 * i, 8);
    r |= static_cast<uint32_t>((v * 0x0102040810204080ull) >> 56) << (8 * i);
  }
  return r;
}

template <class F>
void each_lane(uint32_t mask, F f) {
  for (uint32_t m = mask; m; m &= m - 1) f(__builtin_ctz(m));
}

template <class To, class From>
inline To bits_as(From v) {
  static_assert(sizeof(To) == sizeof(From));
  To r;
  std::memcpy(&r, &v, sizeof r);
  return r;
}

}  // namespace mgm::emulator
