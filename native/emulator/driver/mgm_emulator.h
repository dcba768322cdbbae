// What the stand-in libcuda.so.1 exports beside the driver API, for tests and benches. All are thread safe.
//
// Environment, read at cuInit:
//   MGM_EMULATOR_DEVICES         capability[:memory], as "80,90:4G"; "none". Default "80".
//   MGM_EMULATOR_DRIVER_VERSION  what the driver pretends to be, as 12040 or 12.4. Default 13000.
//   MGM_EMULATOR_SEED, _CHECKS, _COUNTERS, _THREADS, _SAMPLE, _WATCHDOG, _MMA  see emulator.h's Options.
//   MGM_EMULATOR_ORDER           when enqueued work runs. random (default): what somebody waits or asks for
//                                soon, the rest at random times; lazy: only what is waited or asked for;
//                                eager: at once.
//   MGM_EMULATOR_PEERS           1 (default): devices can reach each other's memory; 0: copies are staged.
//   MGM_EMULATOR_FAIL            errors to provoke, each once, as "cuMemAllocAsync:3=2,rms_norm=700": the
//                                third call of that function (as exported) fails, and the first launch of
//                                a kernel whose name begins so faults; "launch" is any kernel.
//   MGM_EMULATOR_REPORT          file that findings are appended to, a line of JSON each.
//   MGM_EMULATOR_LAUNCHES        file that the counters of every launch are appended to, a line of JSON each.
//   MGM_EMULATOR_TRACE=1         every call and its result on stderr.
//   MGM_EMULATOR_SEGV=0          no handler that names host accesses to device memory.
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

// key: "seed", "checks", "counters", "threads", "sample", "watchdog", "mma", "order", "peers" or "fail",
// value as in the environment. 0, or 1 where key or value is unknown. Holds from the next operation on.
int mgmEmulatorConfigure(const char* key, const char* value);

// Operations enqueued in any stream and not yet carried out.
int mgmEmulatorPending(void);
}
