// The stand-in libcuda.so.1 through its exported functions, as a host program sees it: start-up, contexts,
// memory, streams and events, graphs, modules, errors, and planted misuse that must be reported.
//
//   driver_test [libcuda.so.1]
//
// Results are compared with plain loops on the host. Runs itself again for what only a fresh process shows.
#include <dlfcn.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <string>
#include <thread>
#include <vector>

#include "../driver/cuda_abi.h"
#include "../driver/mgm_emulator.h"

#ifndef MGM_LIBCUDA
#define MGM_LIBCUDA "libcuda.so.1"
#endif

namespace {

int passed = 0, failed = 0;

void check(bool ok, const char* text, int line) {
  ++(ok ? passed : failed);
  if (!ok) std::printf("line %d: %s\n", line, text);
}
void check_equal(long long got, long long want, const char* text, int line) {
  ++(got == want ? passed : failed);
  if (got != want) std::printf("line %d: %s: expected %lld but received %lld\n", line, text, want, got);
}
#define CHECK(x) check(x, #x, __LINE__)
#define EQUAL(x, want) check_equal(static_cast<long long>(x), static_cast<long long>(want), #x, __LINE__)
#define OK(x) check_equal(x, 0, #x, __LINE__)

void* library = nullptr;

template <class F>
F* entry(const char* name) {
  void* symbol = dlsym(library, name);
  if (!symbol) {
    std::printf("the library has no %s\n0 passed, 1 failed\n", name);
    std::exit(1);
  }
  return reinterpret_cast<F*>(symbol);
}

#define ENTRY_POINTS(X)                                                                               \
  X(cuInit, unsigned)                                                                                 \
  X(cuDriverGetVersion, int*)                                                                         \
  X(cuGetErrorName, int, const char**)                                                                \
  X(cuGetErrorString, int, const char**)                                                              \
  X(cuGetProcAddress_v2, const char*, void**, int, uint64_t, int*)                                    \
  X(cuDeviceGetCount, int*)                                                                           \
  X(cuDeviceGet, int*, int)                                                                           \
  X(cuDeviceGetName, char*, int, int)                                                                 \
  X(cuDeviceGetAttribute, int*, int, int)                                                             \
  X(cuDeviceTotalMem_v2, size_t*, int)                                                                \
  X(cuDevicePrimaryCtxRetain, CUcontext*, int)                                                        \
  X(cuDevicePrimaryCtxRelease_v2, int)                                                                \
  X(cuDevicePrimaryCtxReset_v2, int)                                                                  \
  X(cuDevicePrimaryCtxGetState, int, unsigned*, int*)                                                 \
  X(cuCtxCreate_v2, CUcontext*, unsigned, int)                                                        \
  X(cuCtxDestroy_v2, CUcontext)                                                                       \
  X(cuCtxSetCurrent, CUcontext)                                                                       \
  X(cuCtxGetCurrent, CUcontext*)                                                                      \
  X(cuCtxPushCurrent_v2, CUcontext)                                                                   \
  X(cuCtxPopCurrent_v2, CUcontext*)                                                                   \
  X(cuCtxGetDevice, int*)                                                                             \
  X(cuDeviceCanAccessPeer, int*, int, int)                                                            \
  X(cuCtxEnablePeerAccess, CUcontext, unsigned)                                                       \
  X(cuCtxDisablePeerAccess, CUcontext)                                                                \
  X(cuDeviceGetDefaultMemPool, CUmemoryPool*, int)                                                    \
  X(cuMemPoolSetAccess, CUmemoryPool, const CUmemAccessDesc*, size_t)                                 \
  X(cuMemPoolGetAccess, int*, CUmemoryPool, CUmemLocation*)                                           \
  X(cuCtxSynchronize, )                                                                               \
  X(cuMemGetInfo_v2, size_t*, size_t*)                                                                \
  X(cuMemAlloc_v2, CUdeviceptr*, size_t)                                                              \
  X(cuMemFree_v2, CUdeviceptr)                                                                        \
  X(cuMemAllocAsync, CUdeviceptr*, size_t, CUstream)                                                  \
  X(cuMemFreeAsync, CUdeviceptr, CUstream)                                                            \
  X(cuMemHostAlloc, void**, size_t, unsigned)                                                         \
  X(cuMemFreeHost, void*)                                                                             \
  X(cuMemHostRegister_v2, void*, size_t, unsigned)                                                    \
  X(cuMemHostUnregister, void*)                                                                       \
  X(cuMemHostGetDevicePointer_v2, CUdeviceptr*, void*, unsigned)                                      \
  X(cuPointerGetAttribute, void*, int, CUdeviceptr)                                                   \
  X(cuMemcpyHtoD_v2, CUdeviceptr, const void*, size_t)                                                \
  X(cuMemcpyDtoH_v2, void*, CUdeviceptr, size_t)                                                      \
  X(cuMemcpyHtoDAsync_v2, CUdeviceptr, const void*, size_t, CUstream)                                 \
  X(cuMemcpyDtoHAsync_v2, void*, CUdeviceptr, size_t, CUstream)                                       \
  X(cuMemcpyDtoDAsync_v2, CUdeviceptr, CUdeviceptr, size_t, CUstream)                                 \
  X(cuMemcpy2DAsync_v2, const CUDA_MEMCPY2D*, CUstream)                                               \
  X(cuMemcpyPeerAsync, CUdeviceptr, CUcontext, CUdeviceptr, CUcontext, size_t, CUstream)              \
  X(cuMemsetD8Async, CUdeviceptr, unsigned char, size_t, CUstream)                                    \
  X(cuMemsetD32Async, CUdeviceptr, unsigned, size_t, CUstream)                                        \
  X(cuMemsetD32_v2, CUdeviceptr, unsigned, size_t)                                                    \
  X(cuMemAddressReserve, CUdeviceptr*, size_t, size_t, CUdeviceptr, unsigned long long)               \
  X(cuModuleLoadDataEx, CUmodule*, const void*, unsigned, int*, void**)                               \
  X(cuModuleUnload, CUmodule)                                                                         \
  X(cuModuleGetFunction, CUfunction*, CUmodule, const char*)                                          \
  X(cuModuleGetGlobal_v2, CUdeviceptr*, size_t*, CUmodule, const char*)                               \
  X(cuFuncGetAttribute, int*, int, CUfunction)                                                        \
  X(cuFuncSetAttribute, CUfunction, int, int)                                                         \
  X(cuFuncGetParamInfo, CUfunction, size_t, size_t*, size_t*)                                         \
  X(cuLaunchKernel, CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, \
    CUstream, void**, void**)                                                                         \
  X(cuLaunchKernelEx, const CUlaunchConfig*, CUfunction, void**, void**)                              \
  X(cuLaunchHostFunc, CUstream, CUhostFn, void*)                                                      \
  X(cuOccupancyMaxActiveBlocksPerMultiprocessor, int*, CUfunction, int, size_t)                       \
  X(cuStreamCreate, CUstream*, unsigned)                                                              \
  X(cuStreamDestroy_v2, CUstream)                                                                     \
  X(cuStreamSynchronize, CUstream)                                                                    \
  X(cuStreamQuery, CUstream)                                                                          \
  X(cuStreamWaitEvent, CUstream, CUevent, unsigned)                                                   \
  X(cuStreamBeginCapture_v2, CUstream, int)                                                           \
  X(cuStreamEndCapture, CUstream, CUgraph*)                                                           \
  X(cuStreamIsCapturing, CUstream, int*)                                                              \
  X(cuThreadExchangeStreamCaptureMode, int*)                                                          \
  X(cuEventCreate, CUevent*, unsigned)                                                                \
  X(cuEventDestroy_v2, CUevent)                                                                       \
  X(cuEventRecord, CUevent, CUstream)                                                                 \
  X(cuEventQuery, CUevent)                                                                            \
  X(cuEventSynchronize, CUevent)                                                                      \
  X(cuEventElapsedTime, float*, CUevent, CUevent)                                                     \
  X(cuGraphInstantiateWithFlags, CUgraphExec*, CUgraph, unsigned long long)                           \
  X(cuGraphLaunch, CUgraphExec, CUstream)                                                             \
  X(cuGraphExecUpdate_v2, CUgraphExec, CUgraph, CUgraphExecUpdateResultInfo*)                         \
  X(cuGraphExecDestroy, CUgraphExec)                                                                  \
  X(cuGraphDestroy, CUgraph)                                                                          \
  X(cuGraphGetNodes, CUgraph, CUgraphNode*, size_t*)

#define DECLARE(name, ...) CUresult (*name)(__VA_ARGS__);
ENTRY_POINTS(DECLARE)
int (*report_count)(const char*);
int (*report_text)(int, char*, int);
void (*reset_reports)();
int (*configure)(const char*, const char*);
int (*pending)();
int (*launch_text)(int, char*, int);

void load(const char* path) {
  library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    std::printf("%s\n0 passed, 1 failed\n", dlerror());
    std::exit(1);
  }
#define LOAD(name, ...) name = entry<CUresult(__VA_ARGS__)>(#name);
  ENTRY_POINTS(LOAD)
  report_count = entry<int(const char*)>("mgmEmulatorReportCount");
  report_text = entry<int(int, char*, int)>("mgmEmulatorReport");
  reset_reports = entry<void()>("mgmEmulatorResetReports");
  configure = entry<int(const char*, const char*)>("mgmEmulatorConfigure");
  pending = entry<int()>("mgmEmulatorPending");
  launch_text = entry<int(int, char*, int)>("mgmEmulatorLaunch");
}

// The reports since the last reset are `count` of this kind, each with this text, and none of another.
void expect_reports(const char* kind, const char* text, int line) {
  int all = report_count(nullptr);
  bool good = all > 0;
  for (int i = 0; i < all; ++i) {
    char json[4096];
    report_text(i, json, sizeof json);
    good = good && std::strstr(json, text) && std::strstr(json, (std::string("\"kind\":\"") + kind).c_str());
    if (!good) std::printf("line %d: expected %s \"%s\" but received %s\n", line, kind, text, json);
  }
  if (!all) std::printf("line %d: expected a report %s \"%s\"\n", line, kind, text);
  ++(good ? passed : failed);
  reset_reports();
}
#define REPORTED(kind, text) expect_reports(kind, text, __LINE__)
void expect_no_reports(int line) {
  for (int i = 0; i < report_count(nullptr); ++i) {
    char json[4096];
    report_text(i, json, sizeof json);
    std::printf("line %d: unexpected report %s\n", line, json);
  }
  ++(report_count(nullptr) == 0 ? passed : failed);
  reset_reports();
}
#define NO_REPORTS() expect_no_reports(__LINE__)

const char* const kPtx = R"(
.version 7.0
.target sm_80
.address_size 64

.visible .global .align 4 .u32 offset = 3;

// out[i] = in[i] * 2 + offset
.visible .entry twice(.param .u64 out, .param .u64 in, .param .u32 n)
{
  .reg .pred %p<2>;
  .reg .b32 %r<10>;
  .reg .b64 %rd<10>;
  ld.param.u64 %rd1, [out];
  ld.param.u64 %rd2, [in];
  ld.param.u32 %r1, [n];
  mov.u32 %r2, %ctaid.x;
  mov.u32 %r3, %ntid.x;
  mov.u32 %r4, %tid.x;
  mad.lo.s32 %r5, %r2, %r3, %r4;
  setp.ge.u32 %p1, %r5, %r1;
  @%p1 bra DONE;
  cvta.to.global.u64 %rd3, %rd1;
  cvta.to.global.u64 %rd4, %rd2;
  mul.wide.u32 %rd5, %r5, 4;
  add.s64 %rd6, %rd4, %rd5;
  ld.global.u32 %r6, [%rd6];
  shl.b32 %r7, %r6, 1;
  ld.global.u32 %r8, [offset];
  add.s32 %r7, %r7, %r8;
  add.s64 %rd7, %rd3, %rd5;
  st.global.u32 [%rd7], %r7;
DONE:
  ret;
}

// p[tid] = tid, through dynamic shared memory
.extern .shared .align 4 .b8 room[];
.visible .entry through_shared(.param .u64 p)
{
  .reg .b32 %r<4>;
  .reg .b64 %rd<6>;
  ld.param.u64 %rd1, [p];
  cvta.to.global.u64 %rd2, %rd1;
  mov.u32 %r1, %tid.x;
  mov.u32 %r2, room;
  shl.b32 %r3, %r1, 2;
  add.s32 %r2, %r2, %r3;
  st.shared.u32 [%r2], %r1;
  ld.shared.u32 %r1, [%r2];
  cvt.u64.u32 %rd3, %r3;
  add.s64 %rd4, %rd2, %rd3;
  st.global.u32 [%rd4], %r1;
  ret;
}

.visible .entry bounded(.param .u64 p)
.maxntid 64, 1, 1
{
  ret;
}
)";

CUcontext context;
CUmodule module_handle;
CUfunction twice, through_shared, bounded;
constexpr unsigned kCount = 1000;

CUresult launch_twice(CUdeviceptr out, CUdeviceptr in, CUstream stream, unsigned n = kCount) {
  void* params[] = {&out, &in, &n};
  return cuLaunchKernel(twice, (n + 127) / 128, 1, 1, 128, 1, 1, 0, stream, params, nullptr);
}

CUdeviceptr allocate(size_t bytes) {
  CUdeviceptr address = 0;
  OK(cuMemAlloc_v2(&address, bytes));
  return address;
}

std::vector<unsigned> numbers(unsigned n = kCount, unsigned seed = 1) {
  std::vector<unsigned> out(n);
  for (unsigned i = 0; i < n; ++i) out[i] = i * 2654435761u + seed;
  return out;
}

bool doubled(const unsigned* got, const std::vector<unsigned>& in, int times = 1) {
  for (size_t i = 0; i < in.size(); ++i) {
    unsigned want = in[i];
    for (int t = 0; t < times; ++t) want = want * 2 + 3;
    if (got[i] != want) return false;
  }
  return true;
}

void start_up() {
  int count = 0, version = 0, value = 0;
  EQUAL(cuDeviceGetCount(&count), CUDA_ERROR_NOT_INITIALIZED);
  OK(cuInit(0));
  OK(cuDriverGetVersion(&version));
  EQUAL(version, 13000);
  OK(cuDeviceGetCount(&count));
  EQUAL(count, 2);
  EQUAL(cuDeviceGet(&value, 2), CUDA_ERROR_INVALID_DEVICE);
  OK(cuDeviceGetAttribute(&value, 75, 1));
  EQUAL(value, 9);
  OK(cuDeviceGetAttribute(&value, 97, 0));
  EQUAL(value, 163 << 10);
  EQUAL(cuDeviceGetAttribute(&value, 100000, 0), CUDA_ERROR_INVALID_VALUE);
  char name[100];
  OK(cuDeviceGetName(name, sizeof name, 0));
  CHECK(std::strstr(name, "emulat"));
  size_t total = 0;
  OK(cuDeviceTotalMem_v2(&total, 1));
  EQUAL(total, size_t{64} << 20);
  const char* text = nullptr;
  OK(cuGetErrorName(700, &text));
  CHECK(std::strcmp(text, "CUDA_ERROR_ILLEGAL_ADDRESS") == 0);
  OK(cuGetErrorString(2, &text));
  CHECK(std::strcmp(text, "out of memory") == 0);
  EQUAL(cuGetErrorName(12345, &text), CUDA_ERROR_INVALID_VALUE);

  // By version: until 12.8 the old name meant the old function.
  void *function = nullptr, *other = nullptr;
  int status = -1;
  OK(cuGetProcAddress_v2("cuMemAlloc", &function, 12000, 0, &status));
  CHECK(function == dlsym(library, "cuMemAlloc_v2"));
  EQUAL(status, 0);
  OK(cuGetProcAddress_v2("cuStreamGetCaptureInfo", &function, 11030, 0, &status));
  OK(cuGetProcAddress_v2("cuStreamGetCaptureInfo", &other, 12030, 0, &status));
  CHECK(function == dlsym(library, "cuStreamGetCaptureInfo_v2") &&
        other == dlsym(library, "cuStreamGetCaptureInfo_v3"));
  OK(cuGetProcAddress_v2("cuMemAllocAsync", &function, 11000, 0, &status));
  CHECK(!function);
  EQUAL(status, 2);
  OK(cuGetProcAddress_v2("cuNoSuchThing", &function, 12000, 0, &status));
  EQUAL(status, 1);
  EQUAL(cuGetProcAddress_v2("cuInit", &function, 99000, 0, &status), CUDA_ERROR_INVALID_VALUE);
}

void contexts() {
  CUdeviceptr address = 0;
  EQUAL(cuMemAlloc_v2(&address, 16), CUDA_ERROR_INVALID_CONTEXT);
  unsigned flags = 0;
  int active = -1, device = -1;
  OK(cuDevicePrimaryCtxGetState(0, &flags, &active));
  EQUAL(active, 0);
  EQUAL(cuDevicePrimaryCtxRelease_v2(0), CUDA_ERROR_INVALID_CONTEXT);
  OK(cuDevicePrimaryCtxRetain(&context, 0));
  CUcontext again = nullptr, second = nullptr, current = nullptr;
  OK(cuDevicePrimaryCtxRetain(&again, 0));
  CHECK(again == context);
  OK(cuDevicePrimaryCtxRelease_v2(0));
  OK(cuCtxSetCurrent(context));
  OK(cuCtxCreate_v2(&second, 0, 1));
  OK(cuCtxGetDevice(&device));
  EQUAL(device, 1);
  OK(cuCtxPopCurrent_v2(&current));
  CHECK(current == second);
  OK(cuCtxGetCurrent(&current));
  CHECK(current == context);
  OK(cuCtxPushCurrent_v2(second));
  // Leaks are found when a context ends.
  address = allocate(100);
  NO_REPORTS();
  OK(cuCtxDestroy_v2(second));
  REPORTED("leak", "1 allocations of together 100 bytes");
  OK(cuCtxGetCurrent(&current));
  CHECK(current == context);
  EQUAL(cuCtxSetCurrent(second), CUDA_ERROR_INVALID_CONTEXT);
}

void memory() {
  size_t free_before = 0, free_after = 0, total = 0;
  OK(cuMemGetInfo_v2(&free_before, &total));
  CUdeviceptr a = allocate(kCount * 4), b = allocate(kCount * 4);
  OK(cuMemGetInfo_v2(&free_after, &total));
  CHECK(free_before - free_after >= kCount * 8);
  auto in = numbers();
  std::vector<unsigned> out(kCount);
  OK(cuMemcpyHtoD_v2(a, in.data(), kCount * 4));
  OK(cuMemcpyDtoDAsync_v2(b, a, kCount * 4, nullptr));
  OK(cuMemcpyDtoH_v2(out.data(), b, kCount * 4));
  CHECK(out == in);
  OK(cuMemsetD32_v2(a, 0x01020304, 10));
  OK(cuMemsetD8Async(a + 4, 0xff, 3, nullptr));
  OK(cuMemcpyDtoH_v2(out.data(), a, 40));
  CHECK(out[0] == 0x01020304 && out[1] == 0x01ffffff && out[9] == 0x01020304);
  // A 3 x 5 byte rectangle out of rows of 7 bytes into rows of 11.
  std::vector<unsigned char> wide(35), back(55, 9);
  for (size_t i = 0; i < wide.size(); ++i) wide[i] = static_cast<unsigned char>(i);
  CUDA_MEMCPY2D box{};
  box.srcMemoryType = 1;
  box.srcHost = wide.data();
  box.srcPitch = 7;
  box.srcXInBytes = 2;
  box.dstMemoryType = 2;
  box.dstDevice = b;
  box.dstPitch = 11;
  box.dstY = 1;
  box.WidthInBytes = 3;
  box.Height = 4;
  OK(cuMemcpy2DAsync_v2(&box, nullptr));
  OK(cuMemcpyDtoH_v2(back.data(), b, 55));
  bool same = true;
  for (int y = 0; y < 4; ++y)
    for (int x = 0; x < 3; ++x) same = same && back[(y + 1) * 11 + x] == wide[y * 7 + x + 2];
  CHECK(same);
  NO_REPORTS();

  // Misuse of addresses.
  EQUAL(cuMemcpyHtoD_v2(a + 4, in.data(), kCount * 4), CUDA_ERROR_INVALID_VALUE);
  REPORTED("out_of_bounds", "4 bytes past the end of the allocation of 4000 bytes");
  EQUAL(cuMemcpyHtoD_v2(b, reinterpret_cast<void*>(a), 4), CUDA_ERROR_INVALID_VALUE);
  REPORTED("host_access", "as a host pointer");
  EQUAL(cuMemFree_v2(a + 16), CUDA_ERROR_INVALID_VALUE);
  REPORTED("invalid_free", "not at the start");
  OK(cuMemFree_v2(a));
  EQUAL(cuMemFree_v2(a), CUDA_ERROR_INVALID_VALUE);
  REPORTED("invalid_free", "freed");
  EQUAL(cuMemcpyDtoH_v2(out.data(), a, 4), CUDA_ERROR_INVALID_VALUE);
  REPORTED("use_after_free", "inside the freed allocation");
  CUdeviceptr fresh = allocate(64);
  OK(cuMemcpyDtoH_v2(out.data(), fresh, 64));
  REPORTED("uninitialized_read", "byte 0 of 64");
  // What was never written stays so where it is copied to.
  CUdeviceptr target = allocate(64);
  OK(cuMemsetD32_v2(fresh, 7, 8));
  OK(cuMemcpyDtoDAsync_v2(target, fresh, 64, nullptr));
  OK(cuMemcpyDtoH_v2(out.data(), target, 32));
  NO_REPORTS();
  OK(cuMemcpyDtoH_v2(out.data(), target, 64));
  REPORTED("uninitialized_read", "byte 32 of 64");
  for (CUdeviceptr address : {b, fresh, target}) OK(cuMemFree_v2(address));
  CUdeviceptr huge = 0;
  EQUAL(cuMemAlloc_v2(&huge, size_t{1} << 50), CUDA_ERROR_OUT_OF_MEMORY);
  EQUAL(cuMemAlloc_v2(&huge, 0), CUDA_ERROR_INVALID_VALUE);
  OK(cuMemGetInfo_v2(&free_after, &total));
  EQUAL(free_after, free_before);
  // Not provided, and says so.
  EQUAL(cuMemAddressReserve(&huge, 1 << 21, 0, 0, 0), CUDA_ERROR_NOT_SUPPORTED);
  REPORTED("api_misuse", "cuMemAddressReserve");
}

void pinned() {
  void* block = nullptr;
  OK(cuMemHostAlloc(&block, kCount * 4, 0));
  auto* data = static_cast<unsigned*>(block);
  CUdeviceptr a = allocate(kCount * 4), mapped = 0;
  CUstream stream = nullptr;
  OK(cuStreamCreate(&stream, 1));
  auto in = numbers();
  OK(configure("order", "lazy"));
  // The copy reads pinned memory when it is carried out, not when it is enqueued.
  std::memcpy(data, in.data(), kCount * 4);
  OK(cuMemcpyHtoDAsync_v2(a, data, kCount * 4, stream));
  CHECK(pending() > 0);
  data[5] = 12345;
  OK(cuStreamSynchronize(stream));
  std::vector<unsigned> out(kCount);
  OK(cuMemcpyDtoH_v2(out.data(), a, kCount * 4));
  EQUAL(out[5], 12345);
  // Pageable memory is read at the call.
  OK(cuMemcpyHtoDAsync_v2(a, in.data(), kCount * 4, stream));
  unsigned kept = in[5];
  in[5] = 1;
  OK(cuStreamSynchronize(stream));
  OK(cuMemcpyDtoH_v2(out.data(), a, kCount * 4));
  EQUAL(out[5], kept);
  // A result that is looked at before the stream has ended is not there.
  std::memcpy(data, in.data(), kCount * 4);
  OK(cuMemcpyDtoHAsync_v2(data, a, kCount * 4, stream));
  EQUAL(data[5], 0xa5a5a5a5);
  OK(cuStreamSynchronize(stream));
  EQUAL(data[5], kept);
  NO_REPORTS();
  // Freed while a copy still uses it.
  OK(cuMemcpyDtoHAsync_v2(data, a, kCount * 4, stream));
  OK(cuMemFreeHost(block));
  REPORTED("use_after_free", "still uses");
  OK(configure("order", "random"));
  std::vector<unsigned> own(256);
  OK(cuMemHostRegister_v2(own.data(), 1024, 2));
  EQUAL(cuMemHostRegister_v2(own.data() + 8, 16, 0), CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED);
  OK(cuMemHostGetDevicePointer_v2(&mapped, own.data() + 1, 0));
  CHECK(mapped != reinterpret_cast<uint64_t>(own.data() + 1));
  unsigned type = 0;
  OK(cuPointerGetAttribute(&type, 2, reinterpret_cast<uint64_t>(own.data())));
  EQUAL(type, 1);
  OK(cuPointerGetAttribute(&type, 2, a));
  EQUAL(type, 2);
  OK(cuMemHostUnregister(own.data()));
  EQUAL(cuMemHostUnregister(own.data()), CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED);
  OK(cuStreamDestroy_v2(stream));
  OK(cuMemFree_v2(a));
  NO_REPORTS();
}

void modules() {
  // Logs: the line of the mistake.
  char log[512] = "";
  int options[] = {5, 6};
  void* values[] = {log, reinterpret_cast<void*>(sizeof log)};
  CUmodule module = nullptr;
  const char* bad =
      ".version 7.0\n.target sm_80\n.address_size 64\n.visible .entry f()\n{\n  frobnicate.u32 %r1, 2;\n}\n";
  EQUAL(cuModuleLoadDataEx(&module, bad, 2, options, values), CUDA_ERROR_INVALID_PTX);
  CHECK(std::strstr(log, "frobnicate") && std::strstr(log, "6"));
  CHECK(reinterpret_cast<size_t>(values[1]) == std::strlen(log) + 1);
  unsigned char elf[64] = {0x7f, 'E', 'L', 'F'};
  values[1] = reinterpret_cast<void*>(sizeof log);
  EQUAL(cuModuleLoadDataEx(&module, elf, 2, options, values), CUDA_ERROR_NO_BINARY_FOR_GPU);
  CHECK(std::strstr(log, "cubin"));
  EQUAL(cuModuleLoadDataEx(&module, ".version 99.0\n.target sm_80\n.address_size 64\n", 0, nullptr, nullptr),
        CUDA_ERROR_UNSUPPORTED_PTX_VERSION);

  OK(cuModuleLoadDataEx(&module_handle, kPtx, 0, nullptr, nullptr));
  OK(cuModuleGetFunction(&twice, module_handle, "twice"));
  OK(cuModuleGetFunction(&through_shared, module_handle, "through_shared"));
  OK(cuModuleGetFunction(&bounded, module_handle, "bounded"));
  CUfunction none = nullptr;
  EQUAL(cuModuleGetFunction(&none, module_handle, "thrice"), CUDA_ERROR_NOT_FOUND);
  size_t offset = 0, size = 0;
  OK(cuFuncGetParamInfo(twice, 2, &offset, &size));
  EQUAL(offset, 16);
  EQUAL(size, 4);
  EQUAL(cuFuncGetParamInfo(twice, 3, &offset, &size), CUDA_ERROR_INVALID_VALUE);
  CUdeviceptr global = 0;
  OK(cuModuleGetGlobal_v2(&global, &size, module_handle, "offset"));
  EQUAL(size, 4);
  unsigned value = 0;
  OK(cuMemcpyDtoH_v2(&value, global, 4));
  EQUAL(value, 3);
  int threads = 0;
  OK(cuFuncGetAttribute(&threads, 0, bounded));
  EQUAL(threads, 64);
  NO_REPORTS();
}

void launches() {
  CUdeviceptr a = allocate(kCount * 4), b = allocate(kCount * 4);
  auto in = numbers();
  std::vector<unsigned> out(kCount);
  OK(cuMemcpyHtoD_v2(a, in.data(), kCount * 4));
  OK(launch_twice(b, a, nullptr));
  OK(cuMemcpyDtoH_v2(out.data(), b, kCount * 4));
  CHECK(doubled(out.data(), in));
  // Packed parameters, by value at the call.
  struct Packed {
    CUdeviceptr out, in;
    unsigned n, pad;
  } packed{a, b, kCount, 0};
  size_t size = 20;
  void* extra[] = {reinterpret_cast<void*>(1), &packed, reinterpret_cast<void*>(2), &size, nullptr};
  OK(cuLaunchKernel(twice, 8, 1, 1, 128, 1, 1, 0, nullptr, nullptr, extra));
  packed = {};
  OK(cuMemcpyDtoH_v2(out.data(), a, kCount * 4));
  CHECK(doubled(out.data(), in, 2));
  NO_REPORTS();
  packed = {a, b, kCount, 0};
  size = 16;
  EQUAL(cuLaunchKernel(twice, 8, 1, 1, 128, 1, 1, 0, nullptr, nullptr, extra), CUDA_ERROR_INVALID_VALUE);
  REPORTED("invalid_launch", "expected 20 bytes of parameters but received 16");
  EQUAL(cuLaunchKernel(twice, 8, 1, 1, 128, 1, 1, 0, nullptr, nullptr, nullptr), CUDA_ERROR_INVALID_VALUE);
  REPORTED("invalid_launch", "expected 3 parameters but received none");
  void* params[] = {&a};
  EQUAL(cuLaunchKernel(bounded, 1, 1, 1, 65, 1, 1, 0, nullptr, params, nullptr),
        CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES);
  REPORTED("invalid_launch", "launch bounds");
  EQUAL(cuLaunchKernel(through_shared, 1, 1, 1, 1025, 1, 1, 0, nullptr, params, nullptr),
        CUDA_ERROR_INVALID_VALUE);
  REPORTED("invalid_launch", "limits");
  EQUAL(cuLaunchKernel(through_shared, 1, 65536, 1, 32, 1, 1, 0, nullptr, params, nullptr),
        CUDA_ERROR_INVALID_VALUE);
  REPORTED("invalid_launch", "limits");
  // Shared memory above 48 KiB only when asked for.
  EQUAL(cuLaunchKernel(through_shared, 1, 1, 1, 32, 1, 1, 100 << 10, nullptr, params, nullptr),
        CUDA_ERROR_INVALID_VALUE);
  REPORTED("invalid_launch", "dynamic shared memory");
  EQUAL(cuFuncSetAttribute(through_shared, 8, 164 << 10), CUDA_ERROR_INVALID_VALUE);
  REPORTED("invalid_launch", "cuFuncSetAttribute");
  OK(cuFuncSetAttribute(through_shared, 8, 100 << 10));
  OK(cuLaunchKernel(through_shared, 1, 1, 1, 32, 1, 1, 100 << 10, nullptr, params, nullptr));
  OK(cuMemcpyDtoH_v2(out.data(), a, 128));
  EQUAL(out[31], 31);
  int blocks = 0;
  OK(cuOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, through_shared, 128, 80 << 10));
  EQUAL(blocks, 2);
  OK(cuOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, through_shared, 128, 160 << 10));
  EQUAL(blocks, 1);
  // The Ex form: what is only allowed is taken, what would be promised is refused.
  CUlaunchAttribute attribute{};
  attribute.id = 6;
  attribute.value.integer = 1;
  CUlaunchConfig config{1, 1, 1, 32, 1, 1, 256, nullptr, &attribute, 1};
  OK(cuLaunchKernelEx(&config, through_shared, params, nullptr));
  OK(cuCtxSynchronize());
  NO_REPORTS();
  attribute.id = 2;
  EQUAL(cuLaunchKernelEx(&config, through_shared, params, nullptr), CUDA_ERROR_NOT_SUPPORTED);
  REPORTED("api_misuse", "cooperative");
  OK(configure("counters", "1"));
  OK(launch_twice(b, a, nullptr, 32));
  OK(cuCtxSynchronize());
  OK(configure("counters", "0"));
  char json[4096];
  CHECK(launch_text(0, json, sizeof json) > 0);
  CHECK(std::strstr(json, "\"kernel\":\"twice\"") && !std::strstr(json, "\"warpInstructions\":0,"));
  CHECK(std::strstr(json, "\"blocksRun\":1,"));
  // A sample of a larger grid: so many blocks run, the same ones again with the same seed, the others not.
  std::string file = (std::filesystem::temp_directory_path() / "mgm-launches-XXXXXX").string();
  int descriptor = mkstemp(file.data());
  setenv("MGM_EMULATOR_LAUNCHES", file.c_str(), 1);
  OK(configure("sample", "3"));
  OK(cuMemsetD32_v2(b, 0x55555555, kCount));
  OK(launch_twice(b, a, nullptr));
  OK(cuCtxSynchronize());
  OK(configure("sample", "0"));
  OK(launch_twice(b, a, nullptr, 32));
  OK(cuCtxSynchronize());
  unsetenv("MGM_EMULATOR_LAUNCHES");
  OK(cuMemcpyDtoH_v2(out.data(), b, kCount * 4));
  long long written = 0;
  for (unsigned block = 1; block * 128 < kCount; ++block) written += out[block * 128] != 0x55555555;
  CHECK(written == 2 || written == 3);  // the first block ran once more
  char lines[8192] = "";
  CHECK(read(descriptor, lines, sizeof lines - 1) > 0 && std::strstr(lines, "\"blocksRun\":3,"));
  CHECK(std::count(lines, lines + std::strlen(lines), '\n') == 2 && std::strstr(lines, "\"blocksRun\":1,"));
  close(descriptor);
  unlink(file.c_str());
  OK(cuMemFree_v2(a));
  OK(cuMemFree_v2(b));
  NO_REPORTS();
}

std::atomic<int> host_calls{0};
std::atomic<int> host_result{-1};
void host_function(void* data) {
  host_calls += *static_cast<int*>(data);
  int count = 0;
  host_result = cuDeviceGetCount(&count);
}
void count_calls(void*) {
  ++host_calls;
}

void streams() {
  for (const char* seed : {"1", "2", "3", "4"}) {
    OK(configure("seed", seed));
    CUstream first = nullptr, second = nullptr, blocking = nullptr;
    CUevent event = nullptr, end = nullptr;
    OK(cuStreamCreate(&first, 1));
    OK(cuStreamCreate(&second, 1));
    OK(cuStreamCreate(&blocking, 0));
    OK(cuEventCreate(&event, 0));
    OK(cuEventCreate(&end, 0));
    CUdeviceptr a = allocate(kCount * 4), b = allocate(kCount * 4), c = allocate(kCount * 4);
    auto in = numbers(kCount, 17);
    std::vector<unsigned> out(kCount);
    void* block = nullptr;
    OK(cuMemHostAlloc(&block, kCount * 4, 0));
    // Ordered by events: right under every schedule, and no report.
    OK(cuMemcpyHtoDAsync_v2(a, in.data(), kCount * 4, first));
    OK(launch_twice(b, a, first));
    OK(cuEventRecord(event, first));
    OK(cuStreamWaitEvent(second, event, 0));
    OK(launch_twice(c, b, second));
    OK(cuMemcpyDtoHAsync_v2(block, c, kCount * 4, second));
    OK(cuEventRecord(end, second));
    OK(cuEventSynchronize(end));
    CHECK(doubled(static_cast<unsigned*>(block), in, 2));
    float milliseconds = -1;
    OK(cuEventElapsedTime(&milliseconds, event, end));
    CHECK(milliseconds >= 0);
    // The legacy stream waits for blocking streams, and they for it.
    OK(launch_twice(b, a, blocking));
    OK(launch_twice(c, b, nullptr));
    OK(launch_twice(b, c, blocking));
    OK(cuMemcpyDtoH_v2(out.data(), b, kCount * 4));
    CHECK(doubled(out.data(), in, 3));
    NO_REPORTS();
    // A query ends a wait some time, a host function runs by itself.
    OK(launch_twice(b, a, first));
    CUresult state = 0;
    for (int i = 0; i < 5000 && (state = cuStreamQuery(first)) == CUDA_ERROR_NOT_READY; ++i)
      std::this_thread::sleep_for(std::chrono::microseconds(200));
    OK(state);
    host_calls = 0;
    int step = 5;
    OK(launch_twice(c, b, first));
    OK(cuLaunchHostFunc(first, host_function, &step));
    for (int i = 0; i < 5000 && host_calls == 0; ++i)
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    OK(cuStreamSynchronize(first));
    EQUAL(host_calls.load(), 5);
    EQUAL(host_result.load(), CUDA_ERROR_NOT_PERMITTED);
    REPORTED("api_misuse", "host function");

    // Planted: the event that should join the streams is missing.
    auto other = numbers(kCount, static_cast<unsigned>(std::atoi(seed)));
    OK(cuMemcpyHtoDAsync_v2(a, other.data(), kCount * 4, first));
    OK(cuCtxSynchronize());
    OK(launch_twice(b, a, first));
    OK(launch_twice(c, b, second));
    OK(cuCtxSynchronize());
    REPORTED("api_misuse", "Unordered access");
    OK(cuMemcpyHtoDAsync_v2(a, in.data(), kCount * 4, first));
    OK(launch_twice(b, a, second));
    OK(cuCtxSynchronize());
    REPORTED("api_misuse", "Unordered access");
    OK(cuMemsetD32Async(a, 1, kCount, first));
    OK(cuMemcpyDtoDAsync_v2(b, a, kCount * 4, second));
    OK(cuCtxSynchronize());
    REPORTED("api_misuse", "Unordered access");
    // Not at fault: the host waited in between, or both only read.
    OK(cuMemsetD32Async(a, 1, kCount, first));
    OK(cuStreamSynchronize(first));
    OK(launch_twice(b, a, first));
    OK(launch_twice(c, a, second));
    OK(cuCtxSynchronize());
    NO_REPORTS();

    // Stream-ordered memory: fine in order, found out of order.
    CUdeviceptr pool = 0;
    OK(cuMemAllocAsync(&pool, kCount * 4, first));
    OK(launch_twice(pool, a, first));
    OK(cuEventRecord(event, first));
    OK(cuStreamWaitEvent(second, event, 0));
    OK(launch_twice(b, pool, second));
    OK(cuMemFreeAsync(pool, second));
    OK(cuCtxSynchronize());
    NO_REPORTS();
    OK(configure("order", "lazy"));  // so that the use comes before the free after all, and nothing faults
    OK(cuMemAllocAsync(&pool, kCount * 4, first));
    OK(cuMemsetD32Async(pool, 1, kCount, second));
    REPORTED("api_misuse", "has not provided yet");
    OK(cuMemFreeAsync(pool, first));
    REPORTED("use_after_free", "is not ordered after it");
    OK(cuStreamSynchronize(second));
    OK(cuCtxSynchronize());
    OK(configure("order", "random"));
    NO_REPORTS();
    // A destroyed stream's work goes on, and the legacy stream waits for it.
    OK(launch_twice(b, a, blocking));
    OK(cuStreamDestroy_v2(blocking));
    OK(launch_twice(c, b, nullptr));
    OK(cuMemcpyDtoH_v2(out.data(), c, kCount * 4));
    EQUAL(out[7], (1 * 2 + 3) * 2 + 3);
    EQUAL(cuStreamSynchronize(blocking), CUDA_ERROR_INVALID_HANDLE);
    REPORTED("api_misuse", "does not exist");
    OK(cuStreamDestroy_v2(first));
    OK(cuStreamDestroy_v2(second));
    OK(cuEventDestroy_v2(event));
    OK(cuEventDestroy_v2(end));
    OK(cuMemFreeHost(block));
    for (CUdeviceptr address : {a, b, c}) OK(cuMemFree_v2(address));
    NO_REPORTS();
  }
}

void graphs() {
  CUstream stream = nullptr, side = nullptr, other = nullptr;
  CUevent fork = nullptr, join = nullptr;
  OK(cuStreamCreate(&stream, 1));
  OK(cuStreamCreate(&side, 1));
  OK(cuStreamCreate(&other, 0));
  OK(cuEventCreate(&fork, 2));
  OK(cuEventCreate(&join, 2));
  CUdeviceptr a = allocate(kCount * 4), b = allocate(kCount * 4), c = allocate(kCount * 4),
              d = allocate(kCount * 4);
  auto in = numbers(kCount, 3);
  std::vector<unsigned> out(kCount);
  OK(cuMemcpyHtoD_v2(a, in.data(), kCount * 4));
  OK(cuCtxSynchronize());
  // A fork and a join: a -> b on the side, a -> c here, then b -> d.
  auto capture = [&](CUdeviceptr last_source, CUgraph* graph) {
    OK(cuStreamBeginCapture_v2(stream, 0));
    OK(cuEventRecord(fork, stream));
    OK(cuStreamWaitEvent(side, fork, 0));
    OK(launch_twice(b, a, side));
    OK(launch_twice(c, a, stream));
    OK(cuEventRecord(join, side));
    OK(cuStreamWaitEvent(stream, join, 0));
    OK(launch_twice(d, last_source, stream));
    OK(cuLaunchHostFunc(stream, count_calls, nullptr));
    OK(cuStreamEndCapture(stream, graph));
  };
  CUgraph graph = nullptr, changed = nullptr;
  CUgraphExec exec = nullptr;
  capture(b, &graph);
  size_t count = 0;
  OK(cuGraphGetNodes(graph, nullptr, &count));
  EQUAL(count, 4);
  OK(cuGraphInstantiateWithFlags(&exec, graph, 0));
  OK(cuGraphDestroy(graph));  // the executable one is a copy
  EQUAL(pending(), 0);        // capturing runs nothing
  for (int round = 0; round < 3; ++round) {
    host_calls = 0;
    in = numbers(kCount, static_cast<unsigned>(round + 100));
    OK(cuMemcpyHtoDAsync_v2(a, in.data(), kCount * 4, stream));
    OK(cuGraphLaunch(exec, stream));
    OK(cuMemcpyDtoHAsync_v2(out.data(), d, kCount * 4, stream));
    CHECK(doubled(out.data(), in, 2));
    EQUAL(host_calls.load(), 1);
  }
  NO_REPORTS();
  // Update: other arguments, same shape.
  CUgraphExecUpdateResultInfo info{};
  capture(a, &changed);
  OK(cuGraphExecUpdate_v2(exec, changed, &info));
  OK(cuGraphDestroy(changed));
  OK(cuGraphLaunch(exec, stream));
  OK(cuMemcpyDtoHAsync_v2(out.data(), d, kCount * 4, stream));
  CHECK(doubled(out.data(), in, 1));
  OK(cuStreamBeginCapture_v2(stream, 0));
  OK(launch_twice(b, a, stream));
  OK(cuStreamEndCapture(stream, &changed));
  EQUAL(cuGraphExecUpdate_v2(exec, changed, &info), CUDA_ERROR_GRAPH_EXEC_UPDATE_FAILURE);
  EQUAL(info.result, 2);
  OK(cuGraphDestroy(changed));
  OK(cuGraphExecDestroy(exec));
  // Memory of the graph's own.
  OK(cuStreamBeginCapture_v2(stream, 0));
  CUdeviceptr own = 0;
  OK(cuMemAllocAsync(&own, kCount * 4, stream));
  OK(launch_twice(own, a, stream));
  OK(launch_twice(d, own, stream));
  OK(cuMemFreeAsync(own, stream));
  OK(cuStreamEndCapture(stream, &graph));
  OK(cuGraphInstantiateWithFlags(&exec, graph, 0));
  for (int round = 0; round < 2; ++round) {
    OK(cuGraphLaunch(exec, stream));
    OK(cuMemcpyDtoHAsync_v2(out.data(), d, kCount * 4, stream));
    CHECK(doubled(out.data(), in, 2));
  }
  OK(cuGraphExecDestroy(exec));
  OK(cuGraphDestroy(graph));
  NO_REPORTS();
  // What ends a capture.
  int status = -1;
  CUdeviceptr fresh = 0;
  OK(cuStreamBeginCapture_v2(stream, 0));
  EQUAL(cuMemAlloc_v2(&fresh, 16), CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
  OK(cuStreamIsCapturing(stream, &status));
  EQUAL(status, 2);
  EQUAL(launch_twice(b, a, stream), CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
  EQUAL(cuStreamEndCapture(stream, &graph), CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
  CHECK(!graph);
  OK(cuStreamIsCapturing(stream, &status));
  EQUAL(status, 0);
  OK(cuStreamBeginCapture_v2(stream, 2));  // relaxed: allowed
  OK(cuMemAlloc_v2(&fresh, 16));
  OK(cuMemFree_v2(fresh));
  EQUAL(cuStreamSynchronize(stream), CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
  EQUAL(cuStreamEndCapture(stream, &graph), CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
  OK(cuStreamBeginCapture_v2(stream, 0));
  OK(cuEventRecord(fork, stream));
  OK(cuStreamWaitEvent(side, fork, 0));
  OK(launch_twice(b, a, side));
  EQUAL(cuStreamEndCapture(stream, &graph), CUDA_ERROR_STREAM_CAPTURE_UNJOINED);
  OK(cuEventRecord(join, side));
  OK(cuStreamBeginCapture_v2(stream, 0));
  EQUAL(cuStreamWaitEvent(stream, join, 0), CUDA_ERROR_STREAM_CAPTURE_ISOLATION);
  EQUAL(cuStreamEndCapture(stream, &graph), CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
  OK(cuStreamBeginCapture_v2(stream, 0));
  OK(cuEventRecord(fork, stream));
  EQUAL(cuEventQuery(fork), CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
  EQUAL(cuStreamEndCapture(stream, &graph), CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
  OK(cuStreamBeginCapture_v2(other, 2));
  EQUAL(launch_twice(b, a, nullptr), CUDA_ERROR_STREAM_CAPTURE_IMPLICIT);
  EQUAL(cuStreamEndCapture(other, &graph), CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
  EQUAL(cuStreamBeginCapture_v2(nullptr, 0), CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
  EQUAL(cuStreamEndCapture(stream, &graph), CUDA_ERROR_ILLEGAL_STATE);
  // The mode is the thread's: another one is not held up by a thread-local capture.
  OK(cuStreamBeginCapture_v2(stream, 1));
  std::thread([&] {
    int mode = 1;
    OK(cuThreadExchangeStreamCaptureMode(&mode));
    EQUAL(mode, 0);
    OK(cuCtxSetCurrent(context));
    OK(cuMemAlloc_v2(&fresh, 16));
    OK(cuMemFree_v2(fresh));
    EQUAL(cuStreamEndCapture(stream, &graph), CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD);
  }).join();
  OK(cuStreamEndCapture(stream, &graph));
  OK(cuGraphDestroy(graph));
  NO_REPORTS();
  for (CUstream item : {stream, side, other}) OK(cuStreamDestroy_v2(item));
  OK(cuEventDestroy_v2(fork));
  OK(cuEventDestroy_v2(join));
  for (CUdeviceptr address : {a, b, c, d}) OK(cuMemFree_v2(address));
}

void devices() {
  CUcontext second = nullptr;
  OK(cuDevicePrimaryCtxRetain(&second, 1));
  CUdeviceptr here = allocate(kCount * 4), there = 0;
  auto in = numbers();
  std::vector<unsigned> out(kCount);
  OK(cuMemcpyHtoD_v2(here, in.data(), kCount * 4));
  OK(cuCtxPushCurrent_v2(second));
  OK(cuMemAlloc_v2(&there, kCount * 4));
  EQUAL(launch_twice(there, there, nullptr), CUDA_ERROR_INVALID_HANDLE);  // a function of the other context
  REPORTED("api_misuse", "another context");
  OK(cuCtxPopCurrent_v2(nullptr));
  OK(cuMemcpyPeerAsync(there, second, here, context, kCount * 4, nullptr));
  OK(cuCtxSynchronize());
  OK(cuMemcpyDtoH_v2(out.data(), there, kCount * 4));
  CHECK(out == in);
  EQUAL(cuMemcpyPeerAsync(there, context, here, context, 4, nullptr), CUDA_ERROR_INVALID_VALUE);
  REPORTED("api_misuse", "not of the device");
  // Peer access, and what is left of it without.
  int can = -1;
  OK(cuDeviceCanAccessPeer(&can, 0, 1));
  EQUAL(can, 1);
  OK(cuDeviceCanAccessPeer(&can, 0, 0));
  EQUAL(can, 0);
  OK(cuCtxEnablePeerAccess(second, 0));
  EQUAL(cuCtxEnablePeerAccess(second, 0), CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED);
  EQUAL(cuCtxEnablePeerAccess(context, 0), CUDA_ERROR_INVALID_CONTEXT);
  OK(cuCtxDisablePeerAccess(second));
  EQUAL(cuCtxDisablePeerAccess(second), CUDA_ERROR_PEER_ACCESS_NOT_ENABLED);
  CUmemoryPool default_pool = nullptr;
  OK(cuDeviceGetDefaultMemPool(&default_pool, 1));
  CUmemLocation reader{1, 0};
  OK(cuMemPoolGetAccess(&can, default_pool, &reader));
  EQUAL(can, 0);
  CUmemAccessDesc grant{reader, 3};
  OK(cuMemPoolSetAccess(default_pool, &grant, 1));
  OK(cuMemPoolGetAccess(&can, default_pool, &reader));
  EQUAL(can, 3);
  grant.flags = 0;
  OK(cuMemPoolSetAccess(default_pool, &grant, 1));
  OK(configure("peers", "0"));
  OK(cuDeviceCanAccessPeer(&can, 0, 1));
  EQUAL(can, 0);
  EQUAL(cuCtxEnablePeerAccess(second, 0), CUDA_ERROR_PEER_ACCESS_UNSUPPORTED);
  grant.flags = 3;
  EQUAL(cuMemPoolSetAccess(default_pool, &grant, 1), CUDA_ERROR_INVALID_DEVICE);
  OK(cuMemcpyPeerAsync(here, context, there, second, kCount * 4, nullptr));
  OK(cuCtxSynchronize());
  OK(configure("peers", "1"));
  OK(cuCtxPushCurrent_v2(second));
  CUdeviceptr more = 0;
  EQUAL(cuMemAlloc_v2(&more, size_t{64} << 20), CUDA_ERROR_OUT_OF_MEMORY);
  OK(cuMemFree_v2(there));
  // Memory that a pending operation is going to free counts as free where it is needed.
  OK(configure("order", "lazy"));
  OK(cuMemAllocAsync(&more, size_t{48} << 20, nullptr));
  OK(cuMemFreeAsync(more, nullptr));
  CHECK(pending() > 0);
  OK(cuMemAllocAsync(&more, size_t{48} << 20, nullptr));
  OK(cuMemFreeAsync(more, nullptr));
  EQUAL(cuMemFreeAsync(more, nullptr), CUDA_ERROR_INVALID_VALUE);
  REPORTED("invalid_free", "already freed");
  OK(configure("order", "random"));
  OK(cuCtxSynchronize());
  OK(cuCtxPopCurrent_v2(nullptr));
  OK(cuMemFree_v2(here));
  OK(cuDevicePrimaryCtxRelease_v2(1));
  NO_REPORTS();
}

void threads() {
  std::vector<std::thread> workers;
  std::atomic<int> wrong{0};
  for (unsigned t = 0; t < 4; ++t) {
    workers.emplace_back([t, &wrong] {
      auto in = numbers(200, t);
      std::vector<unsigned> out(200);
      CUstream stream = nullptr;
      wrong += cuCtxSetCurrent(context) || cuStreamCreate(&stream, 1);
      for (int round = 0; round < 10; ++round) {
        CUdeviceptr a = 0, b = 0;
        wrong += cuMemAllocAsync(&a, 800, stream) || cuMemAllocAsync(&b, 800, stream);
        wrong += cuMemcpyHtoDAsync_v2(a, in.data(), 800, stream) || launch_twice(b, a, stream, 200);
        wrong += cuMemcpyDtoHAsync_v2(out.data(), b, 800, stream) || !doubled(out.data(), in);
        wrong += cuMemFreeAsync(a, stream) || cuMemFreeAsync(b, stream);
      }
      wrong += cuStreamSynchronize(stream) || cuStreamDestroy_v2(stream);
    });
  }
  for (auto& worker : workers) worker.join();
  EQUAL(wrong.load(), 0);
  NO_REPORTS();
}

// A new primary context with the test's module, in place of a dead one.
void start_over() {
  OK(cuDevicePrimaryCtxRelease_v2(0));
  OK(cuDevicePrimaryCtxRetain(&context, 0));
  OK(cuCtxSetCurrent(context));
  OK(cuModuleLoadDataEx(&module_handle, kPtx, 0, nullptr, nullptr));
  OK(cuModuleGetFunction(&twice, module_handle, "twice"));
}

// Planted: kernels that use memory which was given back before, by the host, in the stream, or since their
// capture.
void use_after_free() {
  enum { by_host, in_stream, since_capture };
  for (const char* seed : {"8", "9", "10"}) {
    for (int how : {by_host, in_stream, since_capture}) {
      OK(configure("seed", seed));
      CUstream stream = nullptr;
      OK(cuStreamCreate(&stream, 1));
      CUdeviceptr kept = allocate(kCount * 4), gone = 0;
      OK(cuMemAllocAsync(&gone, kCount * 4, stream));
      OK(cuMemsetD32Async(gone, 1, kCount, stream));
      if (how == by_host) {
        OK(cuMemFree_v2(gone));
        OK(launch_twice(kept, gone, stream));
      } else if (how == in_stream) {
        OK(cuMemFreeAsync(gone, stream));
        OK(launch_twice(kept, gone, stream));
      } else {
        CUgraph graph = nullptr;
        CUgraphExec exec = nullptr;
        OK(cuStreamBeginCapture_v2(stream, 0));
        OK(launch_twice(kept, gone, stream));
        OK(cuStreamEndCapture(stream, &graph));
        OK(cuGraphInstantiateWithFlags(&exec, graph, 0));
        OK(cuGraphLaunch(exec, stream));
        OK(cuStreamSynchronize(stream));
        NO_REPORTS();
        OK(cuMemFreeAsync(gone, stream));
        OK(cuGraphLaunch(exec, stream));
      }
      EQUAL(cuStreamSynchronize(stream), CUDA_ERROR_ILLEGAL_ADDRESS);
      REPORTED("use_after_free", "twice");
      start_over();
    }
  }
  NO_REPORTS();
}

// After a fault every call returns it, until the primary context is reset.
void sticky_errors() {
  for (const char* seed : {"5", "6", "7"}) {
    OK(configure("seed", seed));
    CUstream stream = nullptr;
    OK(cuStreamCreate(&stream, 1));
    CUdeviceptr a = allocate(kCount * 4), b = allocate(kCount * 4 - 4), c = 0;
    OK(cuMemsetD32Async(a, 1, kCount, stream));
    OK(launch_twice(b, a, stream));
    EQUAL(cuStreamSynchronize(stream), CUDA_ERROR_ILLEGAL_ADDRESS);
    REPORTED("out_of_bounds", "twice");
    EQUAL(cuMemAlloc_v2(&c, 16), CUDA_ERROR_ILLEGAL_ADDRESS);
    EQUAL(launch_twice(b, a, stream), CUDA_ERROR_ILLEGAL_ADDRESS);
    EQUAL(cuCtxSynchronize(), CUDA_ERROR_ILLEGAL_ADDRESS);
    EQUAL(cuMemFree_v2(a), CUDA_ERROR_ILLEGAL_ADDRESS);
    // A reset ends the context and leaves who retained it; the last release ends it as well.
    unsigned flags = 0;
    int active = -1;
    CUcontext again = nullptr;
    if (*seed == '5') {
      OK(cuDevicePrimaryCtxReset_v2(0));
      OK(cuDevicePrimaryCtxGetState(0, &flags, &active));
      EQUAL(active, 0);
      EQUAL(cuMemAlloc_v2(&c, 16), CUDA_ERROR_CONTEXT_IS_DESTROYED);
      OK(cuDevicePrimaryCtxRetain(&again, 0));
      OK(cuDevicePrimaryCtxRelease_v2(0));
      OK(cuDevicePrimaryCtxGetState(0, &flags, &active));
      EQUAL(active, 1);
    } else {
      OK(cuDevicePrimaryCtxRelease_v2(0));
      EQUAL(cuMemAlloc_v2(&c, 16), CUDA_ERROR_CONTEXT_IS_DESTROYED);
      OK(cuDevicePrimaryCtxRetain(&again, 0));
    }
    OK(cuCtxSetCurrent(again));
    context = again;
    EQUAL(launch_twice(b, a, stream), CUDA_ERROR_INVALID_HANDLE);  // nothing survives
    reset_reports();
    OK(cuModuleLoadDataEx(&module_handle, kPtx, 0, nullptr, nullptr));
    OK(cuModuleGetFunction(&twice, module_handle, "twice"));
    a = allocate(kCount * 4);
    OK(cuMemsetD32_v2(a, 1, kCount));
    OK(launch_twice(a, a, nullptr));
    OK(cuCtxSynchronize());
    OK(cuMemFree_v2(a));
    NO_REPORTS();
  }
  OK(cuModuleUnload(module_handle));
  OK(cuDevicePrimaryCtxRelease_v2(0));
  EQUAL(cuDevicePrimaryCtxRelease_v2(0), CUDA_ERROR_INVALID_CONTEXT);
  NO_REPORTS();
}

// Errors on request: of a call, and of a kernel where it runs.
void planned_errors() {
  OK(cuDevicePrimaryCtxRetain(&context, 0));
  OK(cuCtxSetCurrent(context));
  OK(cuModuleLoadDataEx(&module_handle, kPtx, 0, nullptr, nullptr));
  OK(cuModuleGetFunction(&twice, module_handle, "twice"));
  CUdeviceptr a = allocate(kCount * 4), b = 0;
  OK(cuMemsetD32_v2(a, 1, kCount));
  EQUAL(configure("fail", "cuMemAlloc_v2"), 1);
  EQUAL(configure("fail", "cuMemAlloc_v2:0=2"), 1);
  EQUAL(configure("fail", "cuMemAlloc_v2:1=12345"), 1);
  OK(configure("fail", "cuMemAlloc_v2:2=2,twice:2=719"));
  b = allocate(16);
  EQUAL(cuMemAlloc_v2(&b, 16), CUDA_ERROR_OUT_OF_MEMORY);
  b = allocate(16);
  OK(launch_twice(a, a, nullptr));
  OK(cuCtxSynchronize());
  OK(launch_twice(a, a, nullptr));
  EQUAL(cuCtxSynchronize(), CUDA_ERROR_LAUNCH_FAILED);
  EQUAL(cuMemAlloc_v2(&b, 16), CUDA_ERROR_LAUNCH_FAILED);
  OK(cuDevicePrimaryCtxRelease_v2(0));
  NO_REPORTS();
}

// Run in a process of their own, by name.
int old_driver() {
  int version = 0, device = 0;
  OK(cuInit(0));
  OK(cuDriverGetVersion(&version));
  EQUAL(version, 11020);
  OK(cuDeviceGet(&device, 0));
  OK(cuDevicePrimaryCtxRetain(&context, 0));
  OK(cuCtxSetCurrent(context));
  CUmodule module = nullptr;
  OK(cuModuleLoadDataEx(&module, kPtx, 0, nullptr, nullptr));
  std::string newer = kPtx;
  newer.replace(newer.find("7.0"), 3, "7.8");
  EQUAL(cuModuleLoadDataEx(&module, newer.c_str(), 0, nullptr, nullptr), CUDA_ERROR_UNSUPPORTED_PTX_VERSION);
  void* function = nullptr;
  int status = 0;
  EQUAL(cuGetProcAddress_v2("cuInit", &function, 12000, 0, &status), CUDA_ERROR_INVALID_VALUE);
  return failed;
}

int no_device() {
  EQUAL(cuInit(0), CUDA_ERROR_NO_DEVICE);
  return failed;
}

int bad_setting() {
  EQUAL(cuInit(0), CUDA_ERROR_INVALID_VALUE);
  return failed;
}

int host_access() {
  cuInit(0);
  cuDevicePrimaryCtxRetain(&context, 0);
  cuCtxSetCurrent(context);
  CUdeviceptr a = allocate(64);
  return *reinterpret_cast<volatile int*>(a) + 1000;
}

void late_call() {
  int count = 0;
  CUresult error = cuDeviceGetCount(&count);
  if (error != CUDA_ERROR_DEINITIALIZED) _exit(3);
}
int at_exit() {
  std::atexit(late_call);  // before the driver's own, so it runs after it
  cuInit(0);
  cuDevicePrimaryCtxRetain(&context, 0);
  cuCtxSetCurrent(context);
  CUdeviceptr a = allocate(64);
  cuMemsetD32Async(a, 1, 16, nullptr);
  return 0;
}

// Exit status, or minus the signal.
int again(const char* self, const char* path, const char* mode, const char* variable, const char* value) {
  pid_t child = fork();
  if (child == 0) {
    setenv(variable, value, 1);
    execl(self, self, path, mode, nullptr);
    _exit(99);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

}  // namespace

int main(int argc, char** argv) {
  const char* path = argc > 1 ? argv[1] : MGM_LIBCUDA;
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  if (argc > 2) {
    load(path);
    std::string mode = argv[2];
    if (mode == "old") return old_driver();
    if (mode == "none") return no_device();
    if (mode == "bad") return bad_setting();
    if (mode == "host") return host_access();
    if (mode == "exit") return at_exit();
    return 98;
  }
  EQUAL(again("/proc/self/exe", path, "old", "MGM_EMULATOR_DRIVER_VERSION", "11.2"), 0);
  EQUAL(again("/proc/self/exe", path, "none", "MGM_EMULATOR_DEVICES", "none"), 0);
  EQUAL(again("/proc/self/exe", path, "bad", "MGM_EMULATOR_DEVICES", "81"), 0);
  EQUAL(again("/proc/self/exe", path, "bad", "MGM_EMULATOR_DEVICES", "80:lots"), 0);
  EQUAL(again("/proc/self/exe", path, "exit", "MGM_EMULATOR_ORDER", "lazy"), 0);
  std::string file = (std::filesystem::temp_directory_path() / "mgm-emulator-XXXXXX").string();
  int descriptor = mkstemp(file.data());
  EQUAL(again("/proc/self/exe", path, "host", "MGM_EMULATOR_REPORT", file.c_str()), -SIGSEGV);
  char line[1024] = "";
  CHECK(read(descriptor, line, sizeof line - 1) > 0 && std::strstr(line, "\"kind\":\"host_access\""));
  close(descriptor);
  unlink(file.c_str());

  setenv("MGM_EMULATOR_DEVICES", "80,90:64M", 1);
  load(path);
  start_up();
  contexts();
  memory();
  pinned();
  modules();
  launches();
  streams();
  graphs();
  devices();
  threads();
  use_after_free();
  sticky_errors();
  planned_errors();
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed ? 1 : 0;
}
