#include <cctype>
#include <cerrno>
#include <cstdlib>
#include <cstring>

#include "ptx.h"

namespace mgm::emulator {
namespace {

struct Token {
  enum Kind : uint8_t { word, number, string, punct, end } kind = end;
  std::string_view text;
  int line = 0;
};

bool word_start(char c) {
  return std::isalpha(static_cast<unsigned char>(c)) || (c && strchr("_$%.", c));
}
bool word_char(char c) {
  return std::isalnum(static_cast<unsigned char>(c)) || (c && strchr("_$%.", c));
}

class Lexer {
 public:
  explicit Lexer(std::string_view text) : s_(text) {}
  std::map<std::string, int> registers;

  std::vector<Token> all() {
    std::vector<Token> out;
    out.reserve(s_.size() / 4);
    while (next()) out.push_back(t_);
    t_ = {Token::end, "end of text", line_};
    out.push_back(t_);
    return out;
  }

 private:
  char at(size_t i) const { return i < s_.size() ? s_[i] : '\0'; }
  bool next() {
    for (;;) {
      char c = at(p_);
      if (c == '\0') return false;
      if (c == '\n') {
        ++line_;
        ++p_;
      } else if (std::isspace(static_cast<unsigned char>(c))) {
        ++p_;
      } else if (c == '/' && at(p_ + 1) == '/') {
        size_t e = s_.find('\n', p_);
        if (e == std::string_view::npos) e = s_.size();
        note(s_.substr(p_, e - p_));
        p_ = e;
      } else if (c == '/' && at(p_ + 1) == '*') {
        size_t e = s_.find("*/", p_ + 2);
        if (e == std::string_view::npos) throw PtxError(line_, "comment without an end");
        for (size_t i = p_; i < e; ++i) line_ += s_[i] == '\n';
        p_ = e + 2;
      } else {
        break;
      }
    }
    size_t b = p_;
    char c = at(p_);
    if (c == '"') {
      size_t e = s_.find('"', p_ + 1);
      if (e == std::string_view::npos) throw PtxError(line_, "string without an end");
      p_ = e + 1;
      t_ = {Token::string, s_.substr(b + 1, e - b - 1), line_};
    } else if (std::isdigit(static_cast<unsigned char>(c))) {
      while (word_char(at(p_)) || ((at(p_) == '+' || at(p_) == '-') && decimal_exponent(b))) ++p_;
      t_ = {Token::number, s_.substr(b, p_ - b), line_};
    } else if (c == '.') {  // ".reg.b16" is two words
      do ++p_;
      while (at(p_) != '.' && word_char(at(p_)));
      t_ = {Token::word, s_.substr(b, p_ - b), line_};
    } else if (word_start(c)) {
      while (word_char(at(p_)) || (at(p_) == ':' && at(p_ + 1) == ':')) p_ += at(p_) == ':' ? 2 : 1;
      t_ = {Token::word, s_.substr(b, p_ - b), line_};
    } else {
      ++p_;
      t_ = {Token::punct, s_.substr(b, 1), line_};
    }
    return true;
  }
  bool decimal_exponent(size_t b) const {
    char e = s_[p_ - 1];
    return (e == 'e' || e == 'E') && s_.substr(b, p_ - b).find('.') != std::string_view::npos;
  }
  void note(std::string_view comment) {
    constexpr std::string_view tag = "// mgm-registers: ";
    if (!comment.starts_with(tag)) return;
    std::string rest(comment.substr(tag.size()));
    size_t space = rest.find(' ');
    if (space != std::string::npos) registers[rest.substr(0, space)] = std::atoi(rest.c_str() + space);
  }
  std::string_view s_;
  size_t p_ = 0;
  int line_ = 1;
  Token t_;
};

class Parser {
 public:
  explicit Parser(std::string_view text) : lexer_(text), tokens_(lexer_.all()) {}

  PtxModule module() {
    m_.registers = lexer_.registers;
    while (peek().kind != Token::end) top();
    if (!m_.version) fail("expected a .version directive but found none");
    if (!m_.target) fail("expected a .target directive but found none");
    if (m_.address_size != 64)
      fail("expected .address_size 64 but received " + std::to_string(m_.address_size));
    return std::move(m_);
  }

 private:
  const Token& peek(size_t n = 0) const { return tokens_[std::min(i_ + n, tokens_.size() - 1)]; }
  const Token& get() { return tokens_[i_ + 1 < tokens_.size() ? i_++ : i_]; }
  bool is(std::string_view text) const { return peek().text == text && peek().kind != Token::string; }
  bool accept(std::string_view text) {
    if (!is(text)) return false;
    get();
    return true;
  }
  [[noreturn]] void fail(const std::string& message) const { throw PtxError(peek().line, message); }
  void expect(std::string_view text) {
    if (!accept(text))
      fail("expected '" + std::string(text) + "' but received '" + std::string(peek().text) + "'");
  }
  std::string word() {
    if (peek().kind != Token::word) fail("expected a name but received '" + std::string(peek().text) + "'");
    return std::string(get().text);
  }

  int64_t integer() {
    bool negative = false, invert = false;
    while (is("-") || is("~") || is("+")) {
      if (accept("-"))
        negative = !negative;
      else if (accept("~"))
        invert = !invert;
      else
        get();
    }
    if (peek().kind != Token::number)
      fail("expected a number but received '" + std::string(peek().text) + "'");
    int64_t v = literal(get());
    if (negative) v = static_cast<int64_t>(0 - static_cast<uint64_t>(v));
    return invert ? ~v : v;
  }
  int64_t literal(const Token& t) const {
    std::string s(t.text);
    if (!s.empty() && s.back() == 'U') s.pop_back();
    char* end = nullptr;
    errno = 0;
    uint64_t v;
    if (s.size() > 2 && s[0] == '0' && (s[1] == 'b' || s[1] == 'B'))
      v = std::strtoull(s.c_str() + 2, &end, 2);
    else
      v = std::strtoull(s.c_str(), &end, 0);
    if (*end || errno)
      throw PtxError(t.line, "expected an integer but received '" + std::string(t.text) + "'");
    return static_cast<int64_t>(v);
  }

  void top() {
    const Token t = peek();
    if (accept(".version")) {
      std::string v(get().text);
      size_t dot = v.find('.');
      if (dot == std::string::npos) fail("expected major.minor for .version but received '" + v + "'");
      m_.version = std::atoi(v.c_str()) * 10 + std::atoi(v.c_str() + dot + 1);
    } else if (accept(".target")) {
      do {
        std::string v(get().text);
        if (v.starts_with("sm_")) {
          m_.target = std::atoi(v.c_str() + 3);
          m_.arch_specific = v.back() == 'a' || v.back() == 'f';
        } else if (v != "debug" && v != "texmode_independent" && v != "texmode_unified") {
          fail("unknown target '" + v + "'");
        }
      } while (accept(","));
    } else if (accept(".address_size")) {
      m_.address_size = static_cast<int>(integer());
    } else if (accept(".file")) {
      integer();
      get();
      while (accept(",")) integer();
    } else if (accept(".loc")) {
      skip_loc();
    } else if (accept(".section")) {
      while (!is("{")) get();
      skip_braces();
    } else if (accept(".pragma")) {
      while (!accept(";")) get();
    } else if (accept(";")) {
    } else if (t.kind == Token::word && t.text[0] == '.') {
      declaration();
    } else {
      fail("expected a directive but received '" + std::string(t.text) + "'");
    }
  }
  void skip_loc() {
    integer();
    integer();
    integer();
    while (accept(",")) {
      std::string key = word();
      if (key == "function_name") {
        word();
        if (accept("+")) integer();
      } else if (key == "inlined_at") {
        integer();
        integer();
        integer();
      } else {
        fail("unknown .loc attribute '" + key + "'");
      }
    }
  }
  void skip_braces() {
    expect("{");
    for (int depth = 1; depth;) {
      if (peek().kind == Token::end) fail("'{' without '}'");
      const Token& t = get();
      if (t.kind != Token::punct) continue;
      if (t.text == "{") ++depth;
      if (t.text == "}") --depth;
    }
  }

  void declaration() {
    bool is_extern = false;
    for (;;) {
      if (accept(".extern")) {
        is_extern = true;
      } else if (accept(".visible") || accept(".weak") || accept(".common")) {
      } else {
        break;
      }
    }
    if (is(".entry") || is(".func")) {
      function();
      return;
    }
    for (Variable& v : variables()) {
      v.is_extern = is_extern;
      m_.variables.push_back(std::move(v));
    }
    expect(";");
  }

  std::vector<Variable> variables() {
    Variable v;
    v.line = peek().line;
    std::string space = word();
    if (space == ".global")
      v.space = Space::global;
    else if (space == ".shared")
      v.space = Space::shared;
    else if (space == ".const")
      v.space = Space::constant;
    else if (space == ".local")
      v.space = Space::local;
    else if (space == ".param")
      v.space = Space::param;
    else
      throw PtxError(v.line, "unknown directive '" + space + "'");
    std::vector<Variable> out;
    type_of(v);
    do {
      Variable one = v;
      one.name = word();
      dims(one);
      if (accept("=")) {
        initial(one);
      }
      out.push_back(std::move(one));
    } while (v.space != Space::param && accept(","));
    return out;
  }
  void type_of(Variable& v) {
    bool aligned = false;
    for (;;) {
      const Token t = peek();
      if (t.kind != Token::word || t.text[0] != '.')
        fail("expected a type but received '" + std::string(t.text) + "'");
      get();
      std::string_view s = t.text.substr(1);
      if (s == "align") {
        v.align = static_cast<size_t>(integer());
        aligned = true;
      } else if (s == "attribute") {
        expect("(");
        while (!accept(")")) get();
      } else if (s == "v2" || s == "v4") {
        v.vector = s == "v2" ? 2 : 4;
      } else {
        v.type = s;
        v.element = type_bytes(s, t.line);
        break;
      }
    }
    if (accept(".ptr")) {  // attributes of a pointer parameter
      while (is(".global") || is(".shared") || is(".const") || is(".local")) get();
      if (accept(".align")) integer();
    }
    if (!aligned) v.align = v.element * v.vector;
    if (v.align == 0 || (v.align & (v.align - 1)) || v.align > 4096)
      fail("expected a power of two for .align but received " + std::to_string(v.align));
  }
  void dims(Variable& v) {
    while (accept("[")) {
      if (accept("]")) {
        v.unsized = true;
        v.count = 0;
        continue;
      }
      int64_t n = integer();
      if (n < 0 || n > (int64_t{1} << 40)) fail("expected an array size but received " + std::to_string(n));
      if (__builtin_mul_overflow(v.count, static_cast<size_t>(n), &v.count) || v.count > (size_t{1} << 40))
        fail("array '" + v.name + "' is too large");
      expect("]");
    }
  }
  void initial(Variable& v) {
    if (accept("{")) {
      if (accept("}")) return;
      do {
        if (is("{"))
          initial(v);
        else
          v.init.push_back(initial_value());
      } while (accept(","));
      expect("}");
    } else {
      v.init.push_back(initial_value());
    }
    if (v.unsized) v.count = std::max(v.count, v.init.size() / v.vector);
    if (v.init.size() > v.count * v.vector) fail("too many initial values for '" + v.name + "'");
  }
  Initializer initial_value() {
    Initializer r;
    if (peek().kind == Token::word) {
      r.symbol = word();
      if (r.symbol == "generic") {
        expect("(");
        r.symbol = word();
        r.generic = true;
        expect(")");
      }
      if (accept("+"))
        r.value = integer();
      else if (is("-"))
        r.value = integer();
      return r;
    }
    bool minus = false;
    while (is("-") && peek(1).kind == Token::number) {
      minus = !minus;
      get();
    }
    Operand o;
    number_operand(o, minus);
    if (o.kind == Operand::integer) {
      r.value = o.value;
      r.real = static_cast<double>(o.value);
    } else {
      r.is_float = true;
      if (o.kind == Operand::real32) {
        float f;
        uint32_t b = static_cast<uint32_t>(o.value);
        std::memcpy(&f, &b, 4);
        r.real = f;
      } else {
        std::memcpy(&r.real, &o.value, 8);
      }
    }
    return r;
  }

  void function() {
    Function f;
    f.line = peek().line;
    f.entry = word() == ".entry";
    if (accept("(")) f.returns = parameters();
    f.name = word();
    if (accept("(")) f.params = parameters();
    for (;;) {
      int* dims3 = nullptr;
      int ntid[3] = {1, 1, 1};
      if (accept(".maxntid")) {
        dims3 = ntid;
      } else if (accept(".reqntid")) {
        dims3 = f.required;
        f.required[0] = f.required[1] = f.required[2] = 1;
        f.has_required = true;
      } else if (accept(".minnctapersm") || accept(".maxnreg") || accept(".maxnctapersm")) {
        integer();
        continue;
      } else if (accept(".noreturn") || accept(".unique")) {
        continue;
      } else if (accept(".pragma")) {
        while (!accept(";")) get();
        continue;
      } else if (peek().kind == Token::word && peek().text[0] == '.') {
        fail("unknown function directive '" + std::string(peek().text) + "'");
      } else {
        break;
      }
      for (int d = 0; d < 3; ++d) {
        dims3[d] = static_cast<int>(integer());
        if (!accept(",")) break;
      }
      if (dims3 == ntid) f.max_threads = ntid[0] * ntid[1] * ntid[2];
    }
    if (accept(";")) {
      m_.functions.push_back(std::move(f));
      return;
    }
    expect("{");
    f.defined = true;
    body(f);
    for (Function& other : m_.functions)
      if (other.name == f.name && !other.defined) {
        other = std::move(f);
        return;
      }
    m_.functions.push_back(std::move(f));
  }

  std::vector<Variable> parameters() {
    std::vector<Variable> out;
    if (accept(")")) return out;
    do {
      if (is(".reg")) fail(".reg parameters are not supported; expected .param");
      out.push_back(std::move(variables()[0]));
    } while (accept(","));
    expect(")");
    return out;
  }

  void body(Function& f) {
    int depth = 0;
    for (;;) {
      const Token t = peek();
      Statement s{};
      s.line = t.line;
      if (t.kind == Token::end) fail("function '" + f.name + "' without '}'");
      if (accept("{")) {
        ++depth;
        s.kind = Statement::open;
        f.body.push_back(s);
      } else if (accept("}")) {
        if (depth-- == 0) return;
        s.kind = Statement::close;
        f.body.push_back(s);
      } else if (accept(";")) {
      } else if (accept(".loc")) {
        skip_loc();
      } else if (accept(".pragma")) {
        while (!accept(";")) get();
      } else if (accept(".reg")) {
        s.kind = Statement::reg;
        s.type = word();
        if (s.type == ".v2" || s.type == ".v4") fail("vector registers are not supported: .reg " + s.type);
        s.type.erase(0, 1);
        do {
          Statement one = s;
          one.name = word();
          if (accept("<")) {
            one.count = integer();
            if (one.count < 0 || one.count > 1000000)
              fail("expected a register count but received " + std::to_string(one.count));
            expect(">");
          }
          f.body.push_back(one);
        } while (accept(","));
        expect(";");
      } else if (is(".shared") || is(".local") || is(".param") || is(".global") || is(".const") ||
                 is(".extern")) {
        bool is_extern = accept(".extern");
        for (Variable& v : variables()) {
          v.is_extern = is_extern;
          Statement one = s;
          one.kind = Statement::declare;
          one.variable = std::move(v);
          f.body.push_back(std::move(one));
        }
        expect(";");
      } else if (t.kind == Token::word && peek(1).text == ":" && peek(1).kind == Token::punct) {
        s.name = word();
        expect(":");
        if (accept(".branchtargets")) {
          s.kind = Statement::targets;
          do s.labels.push_back(word());
          while (accept(","));
          expect(";");
        } else if (is(".callprototype") || is(".calltargets")) {
          while (!accept(";")) get();
          continue;
        } else {
          s.kind = Statement::label;
        }
        f.body.push_back(std::move(s));
      } else {
        s.kind = Statement::instruction;
        instruction(s.inst);
        f.body.push_back(std::move(s));
      }
    }
  }

  void instruction(Instruction& in) {
    in.line = peek().line;
    if (accept("@")) {
      in.guard_negated = accept("!");
      in.guard = word();
    }
    if (peek().kind != Token::word)
      fail("expected an instruction but received '" + std::string(peek().text) + "'");
    in.line = peek().line;
    std::string_view op = get().text;
    if (op[0] == '.') throw PtxError(in.line, "unknown directive '" + std::string(op) + "'");
    size_t dot = op.find('.');
    in.opcode = op.substr(0, dot);
    while (dot != std::string_view::npos) {
      size_t next = op.find('.', dot + 1);
      in.parts.emplace_back(op.substr(dot + 1, next == std::string_view::npos ? next : next - dot - 1));
      dot = next;
    }
    if (accept(";")) return;
    do in.operands.push_back(operand());
    while (accept(","));
    expect(";");
  }

  void number_operand(Operand& o, bool minus) {
    const Token& t = get();
    std::string s(t.text);
    if (s.size() == 10 && s[0] == '0' && (s[1] == 'f' || s[1] == 'F')) {
      o.kind = Operand::real32;
      o.value = static_cast<int64_t>(std::strtoull(s.c_str() + 2, nullptr, 16));
      if (minus) o.value ^= 0x80000000ll;
    } else if (s.size() == 18 && s[0] == '0' && (s[1] == 'd' || s[1] == 'D')) {
      o.kind = Operand::real64;
      o.value = static_cast<int64_t>(std::strtoull(s.c_str() + 2, nullptr, 16));
      if (minus) o.value = static_cast<int64_t>(static_cast<uint64_t>(o.value) ^ (uint64_t{1} << 63));
    } else if (s.find('.') != std::string::npos) {
      o.kind = Operand::real64;
      double d = std::strtod(s.c_str(), nullptr);
      if (minus) d = -d;
      std::memcpy(&o.value, &d, 8);
    } else {
      o.kind = Operand::integer;
      o.value = literal(t);
      if (minus) o.value = static_cast<int64_t>(0 - static_cast<uint64_t>(o.value));
    }
  }

  Operand operand() {
    Operand o;
    if (accept("{")) {
      o.kind = Operand::vector;
      do o.items.push_back(operand());
      while (accept(","));
      expect("}");
      return o;
    }
    if (accept("(")) {
      o.kind = Operand::vector;
      if (accept(")")) return o;
      do o.items.push_back(operand());
      while (accept(","));
      expect(")");
      return o;
    }
    if (accept("[")) {
      o.kind = Operand::address;
      if (peek().kind == Token::word) {
        o.text = word();
        if (accept("+"))
          o.value = integer();
        else if (is("-"))
          o.value = integer();
      } else {
        o.value = integer();
      }
      if (is(",")) fail("tensor and surface addresses are not supported");
      expect("]");
      return o;
    }
    if (accept("!")) o.negate = true;
    bool minus = false, invert = false;
    while (is("-") || is("~")) {
      if (accept("-"))
        minus = !minus;
      else if (accept("~"))
        invert = !invert;
    }
    if (peek().kind == Token::number) {
      number_operand(o, minus);
      if (invert) o.value = ~o.value;
      return o;
    }
    o.kind = Operand::name;
    o.text = word();
    if (minus || invert) fail("expected a number after a sign but received '" + o.text + "'");
    if (accept("|")) o.second = word();
    if (accept("+"))
      o.value = integer();
    else if (is("-"))
      o.value = integer();
    return o;
  }

  Lexer lexer_;
  std::vector<Token> tokens_;
  size_t i_ = 0;
  PtxModule m_;
};

}  // namespace

size_t type_bytes(std::string_view t, int line) {
  if (t == "pred") return 4;
  if (t == "b8" || t == "u8" || t == "s8") return 1;
  if (t == "b16" || t == "u16" || t == "s16" || t == "f16" || t == "bf16") return 2;
  if (t == "b32" || t == "u32" || t == "s32" || t == "f32" || t == "f16x2" || t == "bf16x2") return 4;
  if (t == "b64" || t == "u64" || t == "s64" || t == "f64") return 8;
  throw PtxError(line, "unknown type '." + std::string(t) + "'");
}

PtxModule parse_ptx(std::string_view text) {
  if (size_t nul = text.find('\0'); nul != std::string_view::npos) text = text.substr(0, nul);
  return Parser(text).module();
}

}  // namespace mgm::emulator
