#include "reports.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <mutex>
#include <vector>

#include "mgm_emulator.h"

namespace mgm::emulator::cuda {
namespace {

// Never destroyed: launches may still end while the process exits.
struct Sink {
  std::mutex mutex;
  std::vector<std::pair<ReportKind, std::string>> reports;
  std::deque<std::string> launches;
};
Sink& sink() {
  static Sink* instance = new Sink;
  return *instance;
}

constexpr size_t kLaunchesKept = 64;
constexpr size_t kReportsKept = 10000;

std::string quoted(std::string_view text) {
  std::string out = "\"";
  for (char c : text) {
    if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (static_cast<unsigned char>(c) < 0x20) {
      char escape[8];
      std::snprintf(escape, sizeof escape, "\\u%04x", c);
      out += escape;
    } else {
      out += c;
    }
  }
  return out + '"';
}

std::string triple(const uint32_t v[3]) {
  return "[" + std::to_string(v[0]) + "," + std::to_string(v[1]) + "," + std::to_string(v[2]) + "]";
}

int copy_out(const std::string& text, char* buffer, int size) {
  if (buffer && size > 0) {
    size_t n = std::min(text.size(), static_cast<size_t>(size) - 1);
    std::memcpy(buffer, text.data(), n);
    buffer[n] = 0;
  }
  return static_cast<int>(text.size());
}

// Appends to the file that the environment names, if it names one.
void append_line(const char* variable, const std::string& json) {
  const char* path = std::getenv(variable);
  if (!path || !*path) return;
  if (FILE* file = std::fopen(path, "a")) {
    std::fprintf(file, "%s\n", json.c_str());
    std::fclose(file);
  } else {
    std::fprintf(stderr, "mgm-emulator: cannot write %s=%s\n", variable, path);
  }
}

}  // namespace

void add_report(const Report& report) {
  char address[32];
  std::snprintf(address, sizeof address, "\"0x%llx\"", static_cast<unsigned long long>(report.address));
  std::string json = "{\"kind\":" + quoted(report_name(report.kind)) +
                     ",\"message\":" + quoted(report.message) + ",\"kernel\":" + quoted(report.kernel) +
                     ",\"block\":" + triple(report.block) + ",\"thread\":" + triple(report.thread) +
                     ",\"ptxLine\":" + std::to_string(report.ptx_line) + ",\"address\":" + address + "}";
  Sink& s = sink();
  std::lock_guard lock(s.mutex);
  std::fprintf(stderr, "mgm-emulator: %s: %s\n", report_name(report.kind), report.message.c_str());
  append_line("MGM_EMULATOR_REPORT", json);
  // Past the limit only the count grows.
  s.reports.emplace_back(report.kind, s.reports.size() < kReportsKept ? std::move(json) : std::string("{}"));
}

void add_report(ReportKind kind, std::string message, uint64_t address) {
  Report report{};
  report.kind = kind;
  report.message = std::move(message);
  report.address = address;
  add_report(report);
}

int report_count() {
  Sink& s = sink();
  std::lock_guard lock(s.mutex);
  return static_cast<int>(s.reports.size());
}

void record_launch(const std::string& kernel, int device, const LaunchConfig& config, int error,
                   const Counters& counters) {
  std::string json = "{\"kernel\":" + quoted(kernel) + ",\"device\":" + std::to_string(device) +
                     ",\"grid\":" + triple(config.grid) + ",\"block\":" + triple(config.block) +
                     ",\"dynamicShared\":" + std::to_string(config.dynamic_shared) +
                     ",\"error\":" + std::to_string(error) +
                     ",\"blocksRun\":" + std::to_string(counters.blocks) +
                     ",\"warpInstructions\":" + std::to_string(counters.warp_instructions) + ",\"byClass\":{";
  const char* comma = "";
  for (auto& [name, count] : counters.by_class) {
    json += comma + quoted(name) + ":" + std::to_string(count);
    comma = ",";
  }
  json += "},\"conflictsByLine\":{";
  comma = "";
  for (auto [line, cycles] : counters.conflicts_by_line) {
    json += comma + quoted(std::to_string(line)) + ":" + std::to_string(cycles);
    comma = ",";
  }
  json += "},\"tensorFlops\":" + std::to_string(counters.tensor_flops) +
          ",\"globalSectorsRequested\":" + std::to_string(counters.global_sectors_requested) +
          ",\"globalSectorsTouched\":" + std::to_string(counters.global_sectors_touched) +
          ",\"sharedAccesses\":" + std::to_string(counters.shared_accesses) +
          ",\"sharedConflictCycles\":" + std::to_string(counters.shared_conflict_cycles) +
          ",\"barriers\":" + std::to_string(counters.barriers) + "}";
  Sink& s = sink();
  std::lock_guard lock(s.mutex);
  append_line("MGM_EMULATOR_LAUNCHES", json);
  s.launches.push_front(std::move(json));
  if (s.launches.size() > kLaunchesKept) s.launches.pop_back();
}

}  // namespace mgm::emulator::cuda

using mgm::emulator::cuda::sink;

#define MGM_EXPORT extern "C" __attribute__((visibility("default")))

MGM_EXPORT int mgmEmulatorVersion(void) {
  return 1;
}

MGM_EXPORT int mgmEmulatorReportCount(const char* kind) {
  auto& s = sink();
  std::lock_guard lock(s.mutex);
  if (!kind) return static_cast<int>(s.reports.size());
  int count = 0;
  for (auto& report : s.reports) count += std::strcmp(mgm::emulator::report_name(report.first), kind) == 0;
  return count;
}

MGM_EXPORT int mgmEmulatorReport(int index, char* buffer, int size) {
  auto& s = sink();
  std::lock_guard lock(s.mutex);
  if (index < 0 || index >= static_cast<int>(s.reports.size())) return -1;
  return mgm::emulator::cuda::copy_out(s.reports[index].second, buffer, size);
}

MGM_EXPORT void mgmEmulatorResetReports(void) {
  auto& s = sink();
  std::lock_guard lock(s.mutex);
  s.reports.clear();
}

MGM_EXPORT int mgmEmulatorLaunch(int back, char* buffer, int size) {
  auto& s = sink();
  std::lock_guard lock(s.mutex);
  if (back < 0 || back >= static_cast<int>(s.launches.size())) return -1;
  return mgm::emulator::cuda::copy_out(s.launches[back], buffer, size);
}
