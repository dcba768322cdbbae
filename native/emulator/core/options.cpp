#include <cerrno>
#include <cstdlib>
#include <stdexcept>

#include "../emulator.h"

namespace mgm::emulator {
namespace {

bool number(const char* name, double* value) {
  const char* text = std::getenv(name);
  if (!text || !*text) return false;
  char* end = nullptr;
  errno = 0;
  *value = std::strtod(text, &end);
  if (errno || *end || *value < 0)
    throw std::runtime_error(std::string("expected a number >= 0 for ") + name + " but received '" + text +
                             "'");
  return true;
}

}  // namespace

bool parse_mma_sum(std::string_view name, MmaSum* mma) {
  if (name == "exact")
    *mma = MmaSum::exact;
  else if (name == "hardware")
    *mma = MmaSum::hardware;
  else if (name == "permuted")
    *mma = MmaSum::permuted;
  else
    return false;
  return true;
}

Options options_from_environment() {
  Options options;
  double v;
  if (number("MGM_EMULATOR_SEED", &v)) options.seed = static_cast<uint64_t>(v);
  if (number("MGM_EMULATOR_CHECKS", &v)) options.checks = v != 0;
  if (number("MGM_EMULATOR_COUNTERS", &v)) options.counters = v != 0;
  if (number("MGM_EMULATOR_THREADS", &v)) options.threads = static_cast<int>(v);
  if (number("MGM_EMULATOR_SAMPLE", &v)) options.sample = static_cast<uint64_t>(v);
  if (number("MGM_EMULATOR_WATCHDOG", &v)) options.watchdog_seconds = v;
  if (const char* name = std::getenv("MGM_EMULATOR_MMA"); name && *name && !parse_mma_sum(name, &options.mma))
    throw std::runtime_error(
        std::string("expected exact, hardware or permuted for MGM_EMULATOR_MMA but received '") + name + "'");
  return options;
}

}  // namespace mgm::emulator
