// What the stand-in libcuda.so.1 exports beside the driver API, for tests and benches. All are thread safe.
#pragma once
#include <cstdint>

extern "C" {

// The version of these functions: 1. A process that finds this symbol runs on an emulated device.
int mgmEmulatorVersion(void);

// Findings since the start or the last reset; `kind` as report_name() spells it ("shared_race"), nullptr:
// all.
int mgmEmulatorReportCount(const char* kind);
// Writes the index-th finding as one line of JSON into buffer (cut at `size`, always terminated). Returns its
// full length, or -1 where there is none.
int mgmEmulatorReport(int index, char* buffer, int size);
void mgmEmulatorResetReports(void);

// Counters of a launch as JSON, 0 the latest (64 are kept). Returns the full length or -1.
int mgmEmulatorLaunch(int back, char* buffer, int size);

// key: "seed", "checks", "counters", "threads", "watchdog", "order" ("random", "lazy", "eager"). 0, or 1
// where key or value is unknown. Holds from the next operation on.
int mgmEmulatorConfigure(const char* key, const char* value);

// Operations enqueued in any stream and not yet carried out.
int mgmEmulatorPending(void);
}
