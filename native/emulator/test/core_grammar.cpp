// Each form of tier A (instruction x type x modifier): what ptxas assembles, the emulator must load and
// execute, and what ptxas refuses, the emulator must refuse, so that nothing passes here which a driver would
// not take.
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <set>

#include "harness.h"

namespace mgm::emulator::test {
namespace {

struct Forms {
  std::string version, target;
  std::vector<std::string> patterns;
};

std::vector<Forms> read_forms() {
  std::vector<Forms> out;
  std::ifstream in(MGM_FORMS);
  for (std::string line; std::getline(in, line);) {
    char version[8], target[8];
    if (std::sscanf(line.c_str(), ".version %7s .target %7s", version, target) == 2)
      out.push_back({version, target, {}});
    else if (!line.empty() && line[0] != '#')
      out.back().patterns.push_back(line);
  }
  return out;
}

// Registers by type, an address in global memory, arrays in each state space.
const char* kPrologue =
    ".global .align 16 .b8 gl[64];\n.const .align 16 .b8 cs[64] = {1, 2, 3};\n"
    ".visible .entry k(.param .u64 p, .param .align 16 .b8 prm[16])\n{\n"
    ".reg .pred %p<8>; .reg .b16 %h<16>; .reg .b32 %r<40>; .reg .b64 %q<16>; .reg .f32 %f<24>; .reg .f64 "
    "%e<8>; "
    ".reg .b64 %g, %s, %c, %l; .reg .b32 %t; .reg .b8 %b<8>;\n"
    ".shared .align 128 .b8 sh[4096]; .local .align 16 .b8 lo[128]; .shared .align 8 .b64 bar;\n"
    "ld.param.u64 %g, [p]; mov.u32 %t, %tid.x; mov.u64 %s, sh; mov.u64 %l, lo;\n"
    "setp.lt.u32 %p1, %t, 7; setp.lt.u32 %p2, %t, 40; setp.ge.u32 %p3, %t, 9; mov.pred %p4, %p1; "
    "mad.wide.u32 %c, %t, 16, %s; add.u64 %c, %c, 1024;\n";

std::string prologue() {
  std::string s = kPrologue;
  auto all = [&](const char* prefix, int n, const char* type, const char* value) {
    for (int i = 1; i < n; ++i)
      s += std::string("mov.") + type + " %" + prefix + std::to_string(i) + ", " + value + "; ";
    s += "\n";
  };
  all("h", 16, "b16", "0x3c00");
  all("r", 40, "b32", "3");
  all("q", 16, "b64", "5");
  all("f", 24, "f32", "0f3f000000");
  all("e", 8, "f64", "0d3fe0000000000000");
  s += "mov.u32 %r38, 1; mov.u32 %r39, -1;\n";
  // Every thread prepares the same bytes.
  for (int i = 0; i < 128; i += 8)
    s += "st.shared.b64 [sh+" + std::to_string(i) + "], %q1; st.local.b64 [lo+" + std::to_string(i) +
         "], %q1; ";
  return s + "\nsetp.eq.u32 %p5, %t, 0; @%p5 mbarrier.init.shared.b64 [bar], 7;\nbar.warp.sync -1;\n";
}

std::vector<std::string> expand(const std::string& pattern) {
  size_t open = pattern.find('<');
  if (open == std::string::npos) return {pattern};
  size_t close = pattern.find('>', open);
  std::vector<std::string> out;
  for (size_t at = open + 1; at <= close;) {
    size_t end = std::min(pattern.find('|', at), close);
    for (const std::string& s :
         expand(pattern.substr(0, open) + pattern.substr(at, end - at) + pattern.substr(close + 1)))
      out.push_back(s);
    at = end + 1;
  }
  return out;
}

// [A] and [B] are places to read and to write in the state space that the form names, H the operand of a
// cache hint.
std::string place(std::string form) {
  auto has = [&](const char* text) { return form.find(text) != std::string::npos; };
  const std::string base = has(".shared") ? "sh" : has(".local") ? "lo" : has(".const") ? "cs" : "%g";
  const std::string hint = has("cache_hint") ? ", %q1;" : ";";
  for (auto [name, address] :
       {std::pair{std::string("[A]"), "[" + base + "]"}, {"[B]", "[" + base + "+32]"}, {"H;", hint}})
    if (size_t at = form.find(name); at != std::string::npos) form.replace(at, name.size(), address);
  return form;
}

std::string head(const Forms& f) {
  return ".version " + f.version + "\n.target " + f.target + "\n.address_size 64\n";
}

// Which of `forms` ptxas assembles; false where there is no ptxas.
bool assemble(const Forms& set, const std::vector<std::string>& forms, std::set<size_t>* refused) {
  std::string path = (std::filesystem::temp_directory_path() / "mgm-grammar-XXXXXX").string();
  int descriptor = mkstemp(path.data());
  if (descriptor < 0) return false;
  close(descriptor);
  const std::string start = head(set) + prologue();
  const size_t first = static_cast<size_t>(std::count(start.begin(), start.end(), '\n')) + 1;
  bool present = false;
  for (bool again = true; again;) {  // ptxas gives up at the first error of syntax: once more without it
    std::ofstream out(path);
    out << start;
    for (size_t i = 0; i < forms.size(); ++i)
      out << (refused->count(i) ? "" : "{ " + forms[i] + " }") << "\n";
    out << "ret;\n}\n";
    out.close();
    FILE* pipe = popen(
        ("ptxas -O0 -arch=" + set.target + " -o /dev/null " + path + " 2>&1; echo code $?").c_str(), "r");
    if (!pipe) break;
    again = false;
    char line[1024];
    while (std::fgets(line, sizeof line, pipe)) {
      size_t number;
      if (const char* at = std::strstr(line, ", line ");
          at && std::sscanf(at, ", line %zu", &number) == 1 && std::strstr(line, "error") && number >= first)
        again |= refused->insert(number - first).second;
      int code;
      if (std::sscanf(line, "code %d", &code) == 1) {
        present = code != 127;
        if (code && !again && present) std::printf("ptxas fails without a line: %s", line);
      }
    }
    pclose(pipe);
  }
  unlink(path.c_str());
  return present;
}

}  // namespace

void test_grammar() {
  const std::vector<Forms> table = read_forms();
  check(!table.empty(), "the table of forms is there");
  for (const Forms& set : table) {
    std::vector<std::string> forms;
    for (const std::string& pattern : set.patterns)
      for (const std::string& form : expand(pattern)) forms.push_back(place(form));
    std::set<size_t> refused;
    const bool compared = assemble(set, forms, &refused);
    const std::string where = " (.version " + set.version + ", " + set.target + ")";
    for (size_t i = 0; i < forms.size(); ++i) {
      Device d;
      d.spec = device_spec(std::atoi(set.target.c_str() + 3));
      std::string log;
      int error;
      auto m = Module::load(head(set) + prologue() + "{ " + forms[i] + " }\nret;\n}\n", d.spec, d.memory,
                            &log, &error);
      if (!compared && !m) continue;
      check(!m == (refused.count(i) != 0),
            (m ? "ptxas refuses: " : "ptxas takes: ") + forms[i] + where + (m ? "" : "; we say " + log));
      if (!m) continue;
      LaunchConfig config;
      config.block[0] = 32;
      struct {
        uint64_t p, pad;
        uint8_t prm[16];
      } params = {d.put(std::vector<uint64_t>(64, 5)), 0, {1, 2, 3}};
      LaunchResult r =
          launch(*m, 0, config, reinterpret_cast<const std::byte*>(&params), d.spec, d.memory, d.options);
      check(r.error == 0 && r.reports.empty(),
            forms[i] + where + " runs" + (r.reports.empty() ? "" : ": " + r.reports[0].message));
    }
  }
}

}  // namespace mgm::emulator::test
