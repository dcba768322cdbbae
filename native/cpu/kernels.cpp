#include "kernels.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace mgm::cpu {
namespace {

bool has_avx2() {
#ifdef MGM_X86
  return __builtin_cpu_supports("x86-64-v3");
#else
  return false;
#endif
}

bool has_avx512() {
#ifdef MGM_X86
  return __builtin_cpu_supports("x86-64-v4");
#else
  return false;
#endif
}

const Kernels& choose() {
  const char* asked = std::getenv("MGM_CPU_ISA");
  const std::string isa = asked && *asked ? asked
                          : has_avx512()  ? "avx512"
                          : has_avx2()    ? "avx2"
                                          : "portable";
  if (isa == "portable") return portable_kernels();
#ifdef MGM_X86
  if (isa == "avx2" && has_avx2()) return avx2_kernels();
  if (isa == "avx512" && has_avx512()) return avx512_kernels();
  if (isa == "avx2" || isa == "avx512")
    throw std::runtime_error("expected an instruction set of this processor for MGM_CPU_ISA but received \"" +
                             isa + "\"");
#endif
  throw std::runtime_error("expected portable, avx2 or avx512 for MGM_CPU_ISA but received \"" + isa + "\"");
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

void fail(const char* format, ...) {
  char message[512];
  va_list args;
  va_start(args, format);
  std::vsnprintf(message, sizeof message, format, args);
  va_end(args);
  throw std::runtime_error(message);
}

}  // namespace mgm::cpu
