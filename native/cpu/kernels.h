// The CPU kernels as one table per instruction set. Files in native/cpu/kernels/ are compiled once for each
// of portable, avx2 and avx512 (CMake sets MGM_ISA and the flags); kernels_for() picks a table at run time.
//
// Rules for kernel files: everything lives in namespace mgm::cpu::MGM_ISA; no std:: containers, algorithms or
// iostreams (an inline template compiled for AVX-512 could be the copy the linker keeps for everyone);
// scratch comes from ThreadPool::scratch. Failures that only data can show (an id out of range) are thrown
// with fail().
#pragma once
#include "../ops.h"
#include "../runtime/thread_pool.h"

namespace mgm::cpu {

struct Kernels {
  const char* isa;
#define MGM_DECLARE(name, Args) void (*name)(const Args&, ThreadPool&);
  MGM_OPS(MGM_DECLARE)
#undef MGM_DECLARE
  // Bytes of a packed matrix [n, k].
  size_t (*packed_bytes)(DType dtype, Layout layout, int64_t n, int64_t k);
  // Throughput probes for benches: best case of this instruction set. Returns FLOP done (keeps `sink` alive).
  double (*fma_probe)(int64_t iterations, float* sink);
  // Reads `streams` runs of `bytes` (a multiple of 64) that lie `stride` bytes apart, line by line in turn.
  void (*read_probe)(const std::byte* data, size_t bytes, int streams, size_t stride, float* sink);
};

const Kernels& portable_kernels();
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();

// The widest table that this processor and the environment variable MGM_CPU_ISA (portable, avx2, avx512)
// allow. Throws if the variable names an unknown set or one the processor lacks.
const Kernels& kernels();

// Records an error of the op being executed and ends it (throws std::runtime_error on the stream's thread).
// Call it outside parallel_for.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace mgm::cpu

#ifdef MGM_ISA
namespace mgm::cpu::MGM_ISA {
#define MGM_DECLARE(name, Args) void name(const Args&, ThreadPool&);
MGM_OPS(MGM_DECLARE)
#undef MGM_DECLARE
size_t packed_bytes(DType dtype, Layout layout, int64_t n, int64_t k);
double fma_probe(int64_t iterations, float* sink);
void read_probe(const std::byte* data, size_t bytes, int streams, size_t stride, float* sink);
}  // namespace mgm::cpu::MGM_ISA
#endif
