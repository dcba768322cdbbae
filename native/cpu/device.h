#pragma once
#include "../runtime/device.h"

namespace mgm::cpu {

// The CPU as a device: a thread that runs the queue in order, helped by a pool of threads - 1 more.
// memory_limit 0: none.
std::shared_ptr<Device> open_device(int threads, size_t memory_limit);

// Probes for benches and doctor; they block the calling thread for about `seconds`.
double fma_peak(int threads, double seconds);        // FLOP/s of the chosen instruction set
double read_bandwidth(int threads, double seconds);  // bytes/s from main memory
const char* best_isa();                              // of this processor, whatever MGM_CPU_ISA says

}  // namespace mgm::cpu
