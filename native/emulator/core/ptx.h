// PTX text as a tree: directives, symbols, statements. Grammar only; meaning is decode.cpp's.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace mgm::emulator {

struct PtxError : std::runtime_error {
  int line, code;
  PtxError(int line_, const std::string& message, int code_ = 218)
      : std::runtime_error(message), line(line_), code(code_) {}
};

enum class Space : uint8_t { generic, global, shared, constant, local, param, reg };

struct Operand {
  enum Kind : uint8_t { name, integer, real32, real64, address, vector, none } kind = none;
  bool negate = false;         // !%p
  std::string text;            // name; for address: base register or symbol ("" when absolute)
  std::string second;          // %p|%q
  int64_t value = 0;           // integer, offset of an address or of sym+n, float bits
  std::vector<Operand> items;  // vector, and the list in call's parentheses
};

struct Instruction {
  int line = 0;
  std::string guard;
  bool guard_negated = false;
  std::string opcode;              // "ld"
  std::vector<std::string> parts;  // "global", "f32"
  std::vector<Operand> operands;
};

struct Initializer {
  int64_t value = 0;
  std::string symbol;
  bool generic = false, is_float = false;
  double real = 0;
};

struct Variable {
  std::string name, type;  // "b8"
  Space space = Space::global;
  size_t element = 1, vector = 1, count = 1, align = 1;
  bool is_extern = false, unsized = false;
  std::vector<Initializer> init;
  int line = 0;
  size_t bytes() const { return element * vector * count; }
};

struct Statement {
  enum Kind : uint8_t { instruction, label, declare, reg, open, close, targets } kind;
  Instruction inst;
  std::string name;                 // label; reg: prefix or name
  std::string type;                 // reg
  int64_t count = -1;               // reg %r<count>
  Variable variable;                // declare
  std::vector<std::string> labels;  // branch targets
  int line = 0;
};

struct Function {
  std::string name;
  bool entry = false, defined = false;
  std::vector<Variable> params, returns;
  std::vector<Statement> body;
  int max_threads = 0, required[3] = {0, 0, 0}, min_blocks = 0;
  bool has_required = false;
  int line = 0;
};

struct PtxModule {
  int version = 0, target = 0;  // 90 = 9.0; 80 = sm_80
  bool arch_specific = false;   // sm_90a
  int address_size = 64;
  std::vector<Variable> variables;
  std::vector<Function> functions;
  std::map<std::string, int> registers;  // of "// mgm-registers: name count" comments
};

size_t type_bytes(std::string_view type, int line);
PtxModule parse_ptx(std::string_view text);

}  // namespace mgm::emulator
