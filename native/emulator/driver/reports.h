// Findings: printed to stderr, kept for the tests, and appended as JSON lines to MGM_EMULATOR_REPORT.
#pragma once
#include <string>

#include "../emulator.h"

namespace mgm::emulator::cuda {

void add_report(const Report& report);
void add_report(ReportKind kind, std::string message, uint64_t address = 0);
int report_count();
void record_launch(const std::string& kernel, int device, const LaunchConfig& config, int error,
                   const Counters& counters);

}  // namespace mgm::emulator::cuda
