// From a function's statements to a flat array of instructions with resolved operands. Calls are inlined, so
// the executor knows neither scopes nor stacks.
#include <algorithm>

#include "exec.h"

namespace mgm::emulator {

bool Mods::take(std::string_view name) {
  auto it = std::find(left_.begin(), left_.end(), name);
  if (it == left_.end()) return false;
  left_.erase(it);
  return true;
}
std::string Mods::any(std::initializer_list<std::string_view> names) {
  for (std::string_view n : names)
    if (take(n)) return std::string(n);
  return "";
}
std::string Mods::type() {
  if (left_.empty()) fail("expected a type");
  std::string t = left_.back();
  left_.pop_back();
  return t;
}
std::string Mods::front() {
  if (left_.empty()) fail("expected a modifier");
  std::string t = left_.front();
  left_.erase(left_.begin());
  return t;
}
std::string Mods::all() const {
  std::string t = in_.opcode;
  for (const std::string& p : in_.parts) t += "." + p;
  return t;
}
void Mods::fail(const std::string& message) const {
  throw PtxError(in_.line, message + " in '" + all() + "'");
}
void Mods::finish() const {
  if (!left_.empty()) fail("unknown modifier '." + left_.front() + "'");
}

void Decoder::fail(const std::string& message) const {
  std::string t = now->opcode;
  for (const std::string& p : now->parts) t += "." + p;
  throw PtxError(now->line, message + " in '" + t + "'");
}
void Decoder::require(int version, int target, const char* what) const {
  if (module_.version < version || module_.target < target)
    fail(std::string(what) + " needs .version " + std::to_string(version / 10) + "." +
         std::to_string(version % 10) + " and sm_" + std::to_string(target) +
         " but the module has .version " + std::to_string(module_.version / 10) + "." +
         std::to_string(module_.version % 10) + " and sm_" + std::to_string(module_.target));
}
const Operand& Decoder::operand(size_t i) const {
  if (i >= now->operands.size()) fail("expected at least " + std::to_string(i + 1) + " operands");
  return now->operands[i];
}
void Decoder::operands(size_t n) const {
  operands(n, n);
}
void Decoder::operands(size_t least, size_t most) const {
  size_t n = now->operands.size();
  if (n < least || n > most)
    fail("expected " + std::to_string(least) + (most > least ? " to " + std::to_string(most) : "") +
         " operands but received " + std::to_string(n));
}

int32_t Decoder::new_reg(int bytes) {
  reg_bytes_.push_back(static_cast<uint8_t>(bytes));
  return static_cast<int32_t>(reg_bytes_.size()) - 1;
}
Shape Decoder::scratch(int bytes) {
  return {new_reg(bytes), static_cast<uint8_t>(bytes)};
}  // 0: a predicate

Shape Decoder::constant(uint64_t value, int bytes) {
  auto key = std::make_pair(value, bytes);
  auto it = pooled_.find(key);
  if (it == pooled_.end()) {
    size_t at = (k_.pool.size() + 63) / 64 * 64;
    k_.pool.resize(at + 32 * static_cast<size_t>(bytes));
    for (int i = 0; i < 32; ++i)
      std::memcpy(&k_.pool[at + static_cast<size_t>(i * bytes)], &value, static_cast<size_t>(bytes));
    it = pooled_.emplace(key, ~static_cast<int32_t>(at)).first;
  }
  return {it->second, static_cast<uint8_t>(bytes)};
}

bool Decoder::special(const std::string& name, Shape* shape) {
  static const std::map<std::string, SpecialRegister> names = {{"%tid.x", tid_x},
                                                               {"%tid.y", tid_y},
                                                               {"%tid.z", tid_z},
                                                               {"%ntid.x", ntid_x},
                                                               {"%ntid.y", ntid_y},
                                                               {"%ntid.z", ntid_z},
                                                               {"%ctaid.x", ctaid_x},
                                                               {"%ctaid.y", ctaid_y},
                                                               {"%ctaid.z", ctaid_z},
                                                               {"%nctaid.x", nctaid_x},
                                                               {"%nctaid.y", nctaid_y},
                                                               {"%nctaid.z", nctaid_z},
                                                               {"%laneid", laneid},
                                                               {"%warpid", warpid},
                                                               {"%nwarpid", nwarpid},
                                                               {"%smid", smid},
                                                               {"%nsmid", nsmid},
                                                               {"%gridid", gridid},
                                                               {"%lanemask_eq", lanemask_eq},
                                                               {"%lanemask_lt", lanemask_lt},
                                                               {"%lanemask_le", lanemask_le},
                                                               {"%lanemask_gt", lanemask_gt},
                                                               {"%lanemask_ge", lanemask_ge},
                                                               {"%dynamic_smem_size", dynamic_smem_size},
                                                               {"%total_smem_size", total_smem_size}};
  auto it = names.find(name);
  if (it == names.end()) return false;
  auto [at, fresh] = specials_.try_emplace(it->second, 0);
  if (fresh) at->second = new_reg(it->second == gridid ? 8 : 4);
  *shape = {at->second, reg_bytes_[static_cast<size_t>(at->second)]};
  return true;
}

Decoder::Symbol* Decoder::find(std::string_view name) {
  size_t digits = name.size();
  while (digits > 0 && std::isdigit(static_cast<unsigned char>(name[digits - 1]))) --digits;
  for (size_t i = scopes_.size(); i-- > 0;) {
    Scope& scope = scopes_[i];
    if (auto it = scope.names.find(name); it != scope.names.end()) return &it->second;
    if (digits < name.size()) {
      if (auto it = scope.prefixes.find(name.substr(0, digits)); it != scope.prefixes.end()) {
        std::string number(name.substr(digits));
        if (number.size() < 8 && std::atoi(number.c_str()) < it->second.first &&
            (number == "0" || number[0] != '0')) {
          Symbol s{};
          s.kind = Symbol::reg;
          s.predicate = it->second.second == "pred";
          s.width =
              s.predicate ? 0 : static_cast<uint8_t>(std::max<size_t>(2, type_bytes(it->second.second, 0)));
          s.id = new_reg(s.width);
          return &scope.names.emplace(std::string(name), s).first->second;
        }
      }
    }
    if (scope.function) break;  // a callee does not see its caller's names
  }
  std::string key(name);
  Scope& outer = scopes_.front();
  if (auto it = outer.names.find(name); it != outer.names.end()) return &it->second;
  if (auto it = globals_.find(key); it != globals_.end()) {
    Symbol s{};
    s.kind = Symbol::global;
    s.offset = it->second.first;
    return &outer.names.emplace(key, s).first->second;
  }
  for (const Variable& v : module_.variables)
    if (v.space == Space::shared && v.name == key) {
      Symbol s{};
      s.kind = v.unsized ? Symbol::dynamic : Symbol::shared;
      s.offset = place_shared(v);
      return &outer.names.emplace(key, s).first->second;
    }
  return nullptr;
}
Decoder::Symbol* Decoder::find_or_fail(const std::string& name) {
  Symbol* s = find(name);
  if (!s) fail("unknown name '" + name + "'");
  return s;
}

uint64_t Decoder::place_shared(const Variable& v) {
  if (v.unsized) {
    dynamic_align_ = std::max(dynamic_align_, v.align);
    return 0;
  }
  k_.static_shared = (k_.static_shared + v.align - 1) / v.align * v.align;
  uint64_t at = k_.static_shared;
  k_.static_shared += v.bytes();
  if (k_.static_shared > (size_t{1} << 24))
    throw PtxError(v.line, "too much shared memory: '" + v.name + "'");
  return at;
}
uint64_t Decoder::place_local(const Variable& v) {
  local_ = (local_ + v.align - 1) / v.align * v.align;
  uint64_t at = local_;
  local_ += v.bytes();
  if (local_ > (512 << 10)) throw PtxError(v.line, "more than 512 KB of local memory: '" + v.name + "'");
  return at;
}

void Decoder::declare(const Variable& v) {
  Symbol s{};
  switch (v.space) {
    case Space::shared:
      s.kind = v.unsized ? Symbol::dynamic : Symbol::shared;
      s.offset = place_shared(v);
      break;
    case Space::local:
      s.kind = Symbol::local;
      s.offset = place_local(v);
      break;
    case Space::param:
      s.kind = Symbol::call_param;
      s.offset = place_local(v);
      break;
    default:
      throw PtxError(v.line,
                     "variables of this state space inside a function are not supported: '" + v.name + "'");
  }
  scopes_.back().names[v.name] = s;
}

Shape Decoder::out(const Operand& o, int bytes) {
  if (o.kind != Operand::name || o.value || !o.second.empty()) fail("expected a register to write to");
  if (o.text == "_") return scratch(bytes ? bytes : 8);
  Symbol* s = find_or_fail(o.text);
  if (s->kind != Symbol::reg || s->predicate)
    fail("expected a register to write to but received '" + o.text + "'");
  if (bytes && s->width != bytes)
    fail("expected a register of " + std::to_string(8 * bytes) + " bits but '" + o.text + "' has " +
         std::to_string(8 * s->width));
  return {s->id, s->width};
}

Shape Decoder::in(const Operand& o, std::string_view type) {
  int bytes = 0;
  if (!type.empty()) bytes = static_cast<int>(std::max<size_t>(2, type_bytes(type, now->line)));
  bool f = type == "f32" || type == "f64";
  switch (o.kind) {
    case Operand::integer:
      if (f && o.value) {
        double d = static_cast<double>(o.value);
        return type == "f64" ? constant(bits_as<uint64_t>(d), 8)
                             : constant(bits_as<uint32_t>(static_cast<float>(d)), 4);
      }
      if (bytes == 0) bytes = 8;
      return constant(bytes == 8 ? static_cast<uint64_t>(o.value)
                                 : static_cast<uint64_t>(o.value) & ((uint64_t{1} << (8 * bytes)) - 1),
                      bytes);
    case Operand::real32:
      if (type == "f64")
        return constant(
            bits_as<uint64_t>(static_cast<double>(bits_as<float>(static_cast<uint32_t>(o.value)))), 8);
      if (bytes != 4) fail("a 32-bit constant does not fit the type");
      return constant(static_cast<uint64_t>(o.value), 4);
    case Operand::real64:
      if (type == "f32") return constant(bits_as<uint32_t>(static_cast<float>(bits_as<double>(o.value))), 4);
      if (bytes != 8) fail("a 64-bit constant does not fit the type");
      return constant(static_cast<uint64_t>(o.value), 8);
    case Operand::name:
      break;
    default:
      fail("expected a register or a constant");
  }
  if (o.negate) fail("'!' is for predicates");
  Shape shape;
  if (o.text == "WARP_SZ") return constant(32, bytes ? bytes : 4);
  if (special(o.text, &shape)) {
    if (now->opcode != "mov" && now->opcode != "cvt")
      fail("'" + o.text + "' can be read by mov and cvt alone");
    if (bytes && shape.width != bytes)
      fail("expected a type of " + std::to_string(8 * shape.width) + " bits for '" + o.text + "'");
    return shape;
  }
  Symbol* s = find_or_fail(o.text);
  if (s->kind == Symbol::reg) {
    if (s->predicate) fail("'" + o.text + "' is a predicate");
    if (bytes && s->width != bytes)
      fail("expected a register of " + std::to_string(8 * bytes) + " bits but '" + o.text + "' has " +
           std::to_string(8 * s->width));
    return {s->id, s->width};
  }
  if (bytes != 4 && bytes != 8) fail("the address of '" + o.text + "' needs 32 or 64 bits");
  uint64_t at = s->offset + static_cast<uint64_t>(o.value);
  if (s->kind == Symbol::call_param) at |= kCallParam;
  if (s->kind == Symbol::dynamic) {
    Shape c = constant(at | uint64_t{1} << 62 | (bytes == 4 ? uint64_t{1} << 61 : 0), 8);  // a key of its own
    dynamic_.emplace_back(static_cast<size_t>(~c.operand), at);
    return {c.operand, static_cast<uint8_t>(bytes)};
  }
  return constant(at, bytes);
}

Shape Decoder::pred_name(const std::string& name) {
  if (name == "%carry flag") {
    auto [it, fresh] = scopes_.front().names.try_emplace(name);
    if (fresh) {
      it->second.kind = Symbol::reg;
      it->second.predicate = true;
      it->second.id = new_reg(0);
    }
    return {it->second.id, 0};
  }
  Symbol* s = find_or_fail(name);
  if (s->kind != Symbol::reg || !s->predicate) fail("expected a predicate but received '" + name + "'");
  return {s->id, 0};
}
Shape Decoder::pred_out(const Operand& o) {
  if (o.kind != Operand::name) fail("expected a predicate register");
  return o.text == "_" ? scratch(0) : pred_name(o.text);
}
Shape Decoder::pred_in(const Operand& o) {
  if (o.kind == Operand::integer) {
    Shape c = constant(o.value ? kAll : 0, 4);
    return {c.operand, 0};
  }
  return pred_out(o);
}

Shape Decoder::address(const Operand& o, Space* space, int64_t* imm) {
  if (o.kind != Operand::address) fail("expected an address in brackets");
  *imm = o.value;
  if (o.text.empty()) return constant(0, 8);
  Symbol* s = find_or_fail(o.text);
  if (s->kind == Symbol::reg) {
    if (s->predicate || s->width < 4) fail("expected a 32 or 64 bit address register");
    return {s->id, s->width};
  }
  auto needs = [&](Space want, const char* name) {
    if (*space == Space::generic) fail("'" + o.text + "' needs an explicit state space");
    if (*space != want) fail("'" + o.text + "' is in " + name + " memory");
  };
  switch (s->kind) {
    case Symbol::shared:
    case Symbol::dynamic: {
      needs(Space::shared, "shared");
      Operand n;
      n.kind = Operand::name;
      n.text = o.text;
      return in(n, "u64");
    }
    case Symbol::local:
      needs(Space::local, "local");
      break;
    case Symbol::param:
      needs(Space::param, "parameter");
      break;
    case Symbol::call_param:
      needs(Space::param, "parameter");
      *space = Space::local;
      break;
    default:
      if (*space != Space::global && *space != Space::constant && *space != Space::generic)
        fail("'" + o.text + "' is in global memory");
  }
  return constant(s->offset, 8);
}

Inst& Decoder::emit(Handler fn, const char* klass, std::initializer_list<Shape> outputs,
                    std::initializer_list<Shape> inputs) {
  return emit(fn, klass, std::vector<Shape>(outputs), std::vector<Shape>(inputs));
}
Inst& Decoder::emit(Handler fn, const char* klass, const std::vector<Shape>& outputs,
                    const std::vector<Shape>& inputs) {
  if (outputs.size() + inputs.size() > 16) fail("too many operands");
  Inst in;
  for (int32_t& o : in.o) o = kNone;
  in.fn = fn;
  in.line = now->line;
  for (const auto* list : {&outputs, &inputs})
    for (const Shape& s : *list) {
      in.o[in.count] = s.operand;
      in.w[in.count++] = s.width;
    }
  in.outputs = static_cast<uint8_t>(outputs.size());
  if (!now->guard.empty()) {
    in.pred = pred_name(now->guard).operand;
    in.pred_negated = now->guard_negated;
  }
  auto [it, fresh] = class_ids_.try_emplace(klass, static_cast<int>(k_.classes.size()));
  if (fresh) k_.classes.push_back(klass);
  in.klass = static_cast<uint16_t>(it->second);
  k_.code.push_back(in);
  return k_.code.back();
}

int Decoder::label(const std::string& name) {
  for (size_t i = scopes_.size(); i-- > 0;) {
    if (auto it = scopes_[i].labels.find(name); it != scopes_[i].labels.end()) return it->second;
    if (scopes_[i].function) break;
  }
  fail("unknown label '" + name + "'");
}
int Decoder::table(const std::string& name) {
  for (size_t i = scopes_.size(); i-- > 0;) {
    if (auto it = scopes_[i].tables.find(name); it != scopes_[i].tables.end()) return it->second;
    if (scopes_[i].function) break;
  }
  fail("unknown branch targets '" + name + "'");
}

// Labels of the scope that starts at statement `from`.
void Decoder::collect(const std::vector<Statement>& body, size_t from) {
  int depth = 0;
  for (size_t i = from; i < body.size(); ++i) {
    const Statement& s = body[i];
    if (s.kind == Statement::open) ++depth;
    if (s.kind == Statement::close && depth-- == 0) return;
    if (depth) continue;
    if (s.kind == Statement::label) {
      if (!scopes_.back().labels.emplace(s.name, static_cast<int>(labels_.size())).second)
        throw PtxError(s.line, "label '" + s.name + "' is defined twice");
      labels_.push_back(-1);
    }
    if (s.kind == Statement::targets) scopes_.back().tables.emplace(s.name, -1);
  }
}

void Decoder::body(const Function& f) {
  collect(f.body, 0);
  const Instruction* outer = now;
  Instruction here;
  for (size_t i = 0; i < f.body.size(); ++i) {
    const Statement& s = f.body[i];
    here.line = s.line;
    now = &here;
    switch (s.kind) {
      case Statement::open:
        scopes_.emplace_back();
        collect(f.body, i + 1);
        break;
      case Statement::close:
        scopes_.pop_back();
        break;
      case Statement::label:
        labels_[static_cast<size_t>(label(s.name))] = static_cast<int32_t>(k_.code.size());
        break;
      case Statement::targets: {
        std::vector<int32_t> t;
        for (const std::string& l : s.labels) t.push_back(label(l));
        scopes_.back().tables[s.name] = static_cast<int>(k_.tables.size());
        k_.tables.push_back(t);
        break;
      }
      case Statement::reg: {
        bool predicate = s.type == "pred";
        size_t bytes = type_bytes(s.type, s.line);
        if (s.count >= 0) {
          scopes_.back().prefixes[s.name] = {static_cast<int>(s.count), s.type};
        } else {
          Symbol sym{};
          sym.kind = Symbol::reg;
          sym.predicate = predicate;
          sym.width = predicate ? 0 : static_cast<uint8_t>(std::max<size_t>(2, bytes));
          sym.id = new_reg(sym.width);
          scopes_.back().names[s.name] = sym;
        }
        break;
      }
      case Statement::declare:
        declare(s.variable);
        break;
      case Statement::instruction:
        instruction(s.inst);
        break;
    }
    if (k_.code.size() > 4000000)
      throw PtxError(s.line, "function '" + f.name + "' is too large once inlined");
  }
  now = outer;
}

void Decoder::instruction(const Instruction& s) {
  now = &s;
  if (s.opcode == "call") return call(s);
  if (decode_integer(*this, s) || decode_mbarrier(*this, s) || decode_float(*this, s) ||
      decode_convert(*this, s) || decode_memory(*this, s) || decode_warp(*this, s) || decode_matrix(*this, s))
    return;
  std::string t = s.opcode;
  for (const std::string& p : s.parts) t += "." + p;
  throw PtxError(s.line, "unknown opcode '" + s.opcode + "' in '" + t + "'");
}

void Decoder::call(const Instruction& s) {
  for (const std::string& p : s.parts)
    if (p != "uni") fail("unknown modifier '." + p + "'");
  size_t i = 0;
  std::vector<Operand> returns, args;
  if (i < s.operands.size() && s.operands[i].kind == Operand::vector) returns = s.operands[i++].items;
  std::string name = operand(i++).text;
  if (i < s.operands.size() && s.operands[i].kind == Operand::vector) args = s.operands[i++].items;
  const Function* f = nullptr;
  for (const Function& g : module_.functions)
    if (g.name == name && (!f || g.defined)) f = &g;
  if (!f) fail("indirect calls are not supported; unknown function '" + name + "'");
  if (args.size() != f->params.size() || returns.size() != f->returns.size())
    fail("expected " + std::to_string(f->params.size()) + " arguments for '" + name + "' but received " +
         std::to_string(args.size()));
  auto param = [&](const Operand& o) {
    Symbol* p = o.kind == Operand::name ? find_or_fail(o.text) : nullptr;
    if (!p || p->kind != Symbol::call_param)
      fail("expected a .param variable for the call of '" + name + "'");
    return *p;
  };
  std::vector<std::pair<std::string, Symbol>> bound;
  for (size_t k = 0; k < args.size(); ++k) bound.emplace_back(f->params[k].name, param(args[k]));
  for (size_t k = 0; k < returns.size(); ++k) bound.emplace_back(f->returns[k].name, param(returns[k]));

  if (!f->defined) {
    Handler h = name == "vprintf" ? &call_vprintf : name == "__assertfail" ? &call_assertfail : nullptr;
    if (!h) fail("unknown external function '" + name + "'");
    std::vector<Shape> in;
    for (auto& [n, sym] : bound) in.push_back(constant(sym.offset, 8));
    emit(h, "call", std::vector<Shape>{}, in);
    return;
  }
  if (std::find(stack_.begin(), stack_.end(), name) != stack_.end())
    fail("recursion is not supported: '" + name + "'");
  // Guarded call: the lanes that do not take part branch around it.
  int end = static_cast<int>(labels_.size());
  labels_.push_back(-1);
  if (!s.guard.empty()) {
    Inst& b = emit(&skip_if, "branch", {}, {});
    b.pred_negated = !b.pred_negated;
    b.target = end;
  }
  stack_.push_back(name);
  exits_.push_back(end);
  scopes_.emplace_back();
  scopes_.back().function = true;
  for (auto& [n, sym] : bound) scopes_.back().names[n] = sym;
  body(*f);
  scopes_.pop_back();
  exits_.pop_back();
  stack_.pop_back();
  labels_[static_cast<size_t>(end)] = static_cast<int32_t>(k_.code.size());
}

Kernel Decoder::kernel(const Function& f) {
  k_ = Kernel{};
  Instruction here;
  here.line = f.line;
  now = &here;
  scopes_.emplace_back();  // module scope
  scopes_.emplace_back();
  scopes_.back().function = true;
  k_.info.name = f.name;
  size_t offset = 0;
  for (const Variable& p : f.params) {
    offset = (offset + p.align - 1) / p.align * p.align;
    k_.info.params.push_back({offset, p.bytes(), p.align});
    Symbol s{};
    s.kind = Symbol::param;
    s.offset = offset;
    scopes_.back().names[p.name] = s;
    offset += p.bytes();
  }
  k_.info.param_bytes = offset;
  if (offset > (module_.target >= 70 && module_.version >= 81 ? 32764u : 4352u))
    throw PtxError(f.line, "parameters of '" + f.name + "' take " + std::to_string(offset) +
                               " bytes; the limit is 4096");
  stack_.push_back(f.name);
  body(f);
  here.line = k_.code.empty() ? f.line : k_.code.back().line;
  here.guard.clear();
  now = &here;
  emit(&exit_now, "branch", {}, {});

  for (Inst& in : k_.code) {
    if (in.fn == nullptr) throw PtxError(in.line, "internal: unresolved instruction");
  }
  for (auto& t : k_.tables)
    for (int32_t& l : t) l = labels_[static_cast<size_t>(l)];

  for (Inst& in : k_.code)
    if (is_branch(in)) in.target = labels_[static_cast<size_t>(in.target)];
  mark_barriers();
  // Dynamic shared memory begins after the static part.
  size_t base = (k_.static_shared + dynamic_align_ - 1) / dynamic_align_ * dynamic_align_;
  if (!dynamic_.empty()) k_.static_shared = base;
  for (auto [at, value] : dynamic_)
    for (size_t i = 0; i < 32; ++i) {
      uint64_t v = value + base;
      std::memcpy(&k_.pool[at + i * 8], &v, 8);
    }
  for (Inst& in : k_.code)
    for (int k = 0; k < in.count; ++k)
      if (in.o[k] < 0 && in.o[k] != kNone && in.w[k] == 4)
        for (auto [at, value] : dynamic_)
          if (~in.o[k] == static_cast<int32_t>(at)) {
            Shape c = constant(value + base, 4);
            in.o[k] = c.operand;
            break;
          }
  k_.local_bytes = (local_ + 15) / 16 * 16;
  for (auto [what, reg] : specials_) k_.specials.push_back({reg, static_cast<SpecialRegister>(what)});
  allocate_registers();
  k_.info.static_shared = k_.static_shared;
  k_.info.local_bytes = k_.local_bytes;
  k_.info.max_threads = f.max_threads    ? f.max_threads
                        : f.has_required ? f.required[0] * f.required[1] * f.required[2]
                                         : spec_.max_threads_per_block;
  k_.info.max_threads = std::min(k_.info.max_threads, spec_.max_threads_per_block);
  // ptxas spills rather than make a kernel that cannot be launched with the threads it is declared for.
  if (f.max_threads || f.has_required) {
    const int warps = (k_.info.max_threads + 31) / 32;
    k_.info.registers = std::min(k_.info.registers, spec_.registers_per_sm / (warps * 32) / 8 * 8);
  }
  k_.info.ptx_version = module_.version;
  k_.info.target = module_.target;
  if (auto it = module_.registers.find(f.name); it != module_.registers.end()) k_.info.registers = it->second;
  k_.has_required = f.has_required;
  std::copy(f.required, f.required + 3, k_.required);
  k_.shared_granule = granule_;
  return std::move(k_);
}

// For each barrier of the whole block: the instructions that come after it on some path and never before it.
void Decoder::mark_barriers() {
  const size_t n = k_.code.size();
  std::vector<std::vector<int32_t>> before(n);
  auto successors = [&](size_t i, auto visit) {
    const Inst& in = k_.code[i];
    const bool always = in.pred == kNone;
    if (const int t = branch_table(in); t >= 0)
      for (int32_t l : k_.tables[static_cast<size_t>(t)]) visit(static_cast<size_t>(l));
    if (is_branch(in)) visit(static_cast<size_t>(in.target));
    const bool leaves = is_branch(in) || in.fn == &exit_now || branch_table(in) >= 0;
    if (!(leaves && always)) visit(i + 1);
  };
  int count = 0;
  for (Inst& in : k_.code)
    if (is_barrier(in) && !(in.flag & 4) && count < 64) in.imm = ++count;
  if (!count) return;
  for (size_t i = 0; i < n; ++i)
    successors(i, [&](size_t to) {
      if (to < n) before[to].push_back(static_cast<int32_t>(i));
    });
  for (size_t b = 0; b < n; ++b) {
    const uint64_t bit = barrier_bit(k_.code[b]);
    if (!bit) continue;
    std::vector<char> after(n, 0), ahead(n, 0);
    std::vector<size_t> work{b};
    auto reach = [&](std::vector<char>& seen, size_t to) {
      if (to < n && !seen[to]) {
        seen[to] = 1;
        work.push_back(to);
      }
    };
    while (!work.empty()) {
      const size_t i = work.back();
      work.pop_back();
      successors(i, [&](size_t to) { reach(after, to); });
    }
    work.push_back(b);
    while (!work.empty()) {
      const size_t i = work.back();
      work.pop_back();
      for (int32_t from : before[i]) reach(ahead, static_cast<size_t>(from));
    }
    for (size_t i = 0; i < n; ++i) {
      Inst& in = k_.code[i];
      if (after[i] && !ahead[i] && i != b && !is_branch(in) && in.fn != &exit_now) in.past |= bit;
    }
  }
}

// Linear scan over live intervals, so that a warp's registers stay in cache. A lane's liveness follows that
// lane's own path, so the usual analysis holds for diverged warps too: lanes never share storage.
void Decoder::allocate_registers() {
  const size_t n = k_.code.size(), regs = reg_bytes_.size(), words = (regs + 63) / 64;
  // Blocks.
  std::vector<char> leader(n + 1, 0);
  leader[0] = 1;
  for (size_t i = 0; i < n; ++i)
    if (is_branch(k_.code[i]) || k_.code[i].fn == &exit_now) {
      leader[i + 1] = 1;
      if (is_branch(k_.code[i])) leader[static_cast<size_t>(k_.code[i].target)] = 1;
    }
  for (auto& t : k_.tables)
    for (int32_t l : t) leader[static_cast<size_t>(l)] = 1;

  for (size_t i = 0; i < n; ++i)
    if (branch_table(k_.code[i]) >= 0) leader[i + 1] = 1;
  std::vector<size_t> begin;
  std::vector<int> block_of(n + 1, 0);
  for (size_t i = 0; i < n; ++i) {
    if (leader[i]) begin.push_back(i);
    block_of[i] = static_cast<int>(begin.size()) - 1;
  }
  size_t blocks = begin.size();
  begin.push_back(n);
  using Set = std::vector<uint64_t>;
  std::vector<Set> use(blocks, Set(words)), def(blocks, Set(words)), live_in(blocks, Set(words)),
      live_out(blocks, Set(words));
  auto test = [](const Set& s, int32_t r) { return s[static_cast<size_t>(r) / 64] >> (r % 64) & 1; };
  auto add = [](Set& s, int32_t r) { s[static_cast<size_t>(r) / 64] |= uint64_t{1} << (r % 64); };
  for (size_t b = 0; b < blocks; ++b)
    for (size_t i = begin[b]; i < begin[b + 1]; ++i) {
      const Inst& in = k_.code[i];
      if (in.pred != kNone && !test(def[b], in.pred)) add(use[b], in.pred);
      for (int k = in.outputs; k < in.count; ++k)
        if (in.o[k] >= 0 && !test(def[b], in.o[k])) add(use[b], in.o[k]);
      for (int k = 0; k < in.outputs; ++k)
        if (in.o[k] >= 0) {
          if (in.pred != kNone) {
            if (!test(def[b], in.o[k])) add(use[b], in.o[k]);
          } else {
            add(def[b], in.o[k]);
          }
        }
    }
  for (bool changed = true; changed;) {
    changed = false;
    for (size_t b = blocks; b-- > 0;) {
      Set out(words);
      auto join = [&](size_t pc) {
        if (pc >= n) return;
        const Set& s = live_in[static_cast<size_t>(block_of[pc])];
        for (size_t k = 0; k < words; ++k) out[k] |= s[k];
      };
      const Inst& last = k_.code[begin[b + 1] - 1];
      if (is_branch(last)) join(static_cast<size_t>(last.target));
      if (int t = branch_table(last); t >= 0)
        for (int32_t l : k_.tables[static_cast<size_t>(t)]) join(static_cast<size_t>(l));
      join(begin[b + 1]);
      for (size_t k = 0; k < words; ++k) {
        uint64_t v = use[b][k] | (out[k] & ~def[b][k]);
        if (v != live_in[b][k]) {
          live_in[b][k] = v;
          changed = true;
        }
      }
      live_out[b] = std::move(out);
    }
  }
  // One interval per register, from the first to the last instruction where it may be live.
  std::vector<int> first(regs, INT32_MAX), last(regs, -1);
  auto touch = [&](int32_t r, size_t at) {
    first[static_cast<size_t>(r)] = std::min(first[static_cast<size_t>(r)], static_cast<int>(at));
    last[static_cast<size_t>(r)] = std::max(last[static_cast<size_t>(r)], static_cast<int>(at));
  };
  for (size_t b = 0; b < blocks; ++b)
    for (size_t k = 0; k < words; ++k) {
      for (uint64_t v = live_in[b][k]; v; v &= v - 1)
        touch(static_cast<int32_t>(64 * k) + __builtin_ctzll(v), begin[b]);
      for (uint64_t v = live_out[b][k]; v; v &= v - 1)
        touch(static_cast<int32_t>(64 * k) + __builtin_ctzll(v), begin[b + 1] - 1);
    }
  for (size_t i = 0; i < n; ++i) {
    const Inst& in = k_.code[i];
    if (in.pred != kNone) touch(in.pred, i);
    for (int k = 0; k < in.count; ++k)
      if (in.o[k] >= 0) touch(in.o[k], i);
  }
  for (const Special& s : k_.specials) {
    first[static_cast<size_t>(s.reg)] = 0;
    last[static_cast<size_t>(s.reg)] = static_cast<int>(n);
  }
  std::vector<int32_t> order, offset(regs, kNone);
  for (size_t r = 0; r < regs; ++r)
    if (last[r] >= 0) order.push_back(static_cast<int32_t>(r));
  std::sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    return std::tuple(first[static_cast<size_t>(a)], a) < std::tuple(first[static_cast<size_t>(b)], b);
  });
  std::map<int, std::vector<int32_t>> free_slots;
  std::multimap<int, int32_t> ends;
  int live_words = 0, most = 0;
  size_t top = 0;
  for (int32_t r : order) {
    int start = first[static_cast<size_t>(r)];
    while (!ends.empty() && ends.begin()->first < start) {
      int32_t old = ends.begin()->second;
      free_slots[reg_bytes_[static_cast<size_t>(old)]].push_back(offset[static_cast<size_t>(old)]);
      live_words -= reg_bytes_[static_cast<size_t>(old)] == 8 ? 2
                    : reg_bytes_[static_cast<size_t>(old)]    ? 1
                                                              : 0;
      ends.erase(ends.begin());
    }
    int bytes = reg_bytes_[static_cast<size_t>(r)];
    auto& slots = free_slots[bytes];
    if (!slots.empty()) {
      offset[static_cast<size_t>(r)] = slots.back();
      slots.pop_back();
    } else {
      offset[static_cast<size_t>(r)] = static_cast<int32_t>(top);
      top += bytes ? static_cast<size_t>(bytes) * 32 : 64;
    }
    ends.emplace(last[static_cast<size_t>(r)], r);
    live_words += bytes == 8 ? 2 : bytes ? 1 : 0;
    most = std::max(most, live_words);
  }
  k_.register_bytes = (top + 63) / 64 * 64;
  for (Inst& in : k_.code) {
    if (in.pred != kNone) in.pred = offset[static_cast<size_t>(in.pred)];
    for (int k = 0; k < in.count; ++k)
      if (in.o[k] >= 0) in.o[k] = offset[static_cast<size_t>(in.o[k])];
  }
  for (Special& s : k_.specials) s.reg = offset[static_cast<size_t>(s.reg)];
  k_.info.registers = std::clamp(most, 16, 255);  // an estimate: no scheduling, no spills
}

}  // namespace mgm::emulator
