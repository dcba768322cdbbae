// The CUDA driver, opened at run time. No CUDA header and no CUDA library is needed to build or to load this:
// the few types and constants that we use are declared here, as the driver's ABI fixes them.
#pragma once
#include <cstddef>
#include <cstdint>
#include <source_location>
#include <string>
#include <vector>

namespace mgm::cuda {

using CUresult = int;
using CUdevice = int;
using CUdeviceptr = unsigned long long;
using CUcontext = struct CUctx_st*;
using CUmodule = struct CUmod_st*;
using CUfunction = struct CUfunc_st*;
using CUstream = struct CUstream_st*;
using CUevent = struct CUevent_st*;
using CUgraph = struct CUgraph_st*;
using CUgraphExec = struct CUgraphExec_st*;
using CUmemoryPool = struct CUmemPoolHandle_st*;

inline constexpr CUresult kSuccess = 0, kOutOfMemory = 2, kInvalidImage = 200, kNoBinaryForGpu = 209,
                          kInvalidPtx = 218, kUnsupportedPtxVersion = 222, kNotReady = 600;
// CUdevice_attribute
inline constexpr int kAttributeMultiprocessors = 16, kAttributeMajor = 75, kAttributeMinor = 76,
                     kAttributeSharedOptin = 97, kAttributeMemoryPools = 115;
// CUfunction_attribute
inline constexpr int kFunctionSharedStatic = 1, kFunctionMaxDynamicShared = 8;
// CUjit_option
inline constexpr int kJitErrorLog = 5, kJitErrorLogBytes = 6;
inline constexpr int kPoolReleaseThreshold = 4, kPoolReservedCurrent = 5, kPoolUsedCurrent = 7;
inline constexpr unsigned kStreamNonBlocking = 1, kEventBlockingSync = 1, kEventDisableTiming = 2;
inline constexpr int kCaptureRelaxed = 2;

struct CUmemAccessDesc {
  int location_type, location_id, flags;
};
inline constexpr int kLocationDevice = 1, kAccessReadWrite = 3;

// X(symbol as the driver exports it, parameter types). Names with _v2 are those that 64-bit sizes need.
// clang-format off
#define MGM_CUDA_SYMBOLS(X)                                                                   \
  X(cuInit, (unsigned))                                                                       \
  X(cuDriverGetVersion, (int*))                                                               \
  X(cuGetErrorName, (CUresult, const char**))                                                 \
  X(cuGetErrorString, (CUresult, const char**))                                               \
  X(cuDeviceGetCount, (int*))                                                                 \
  X(cuDeviceGet, (CUdevice*, int))                                                            \
  X(cuDeviceGetName, (char*, int, CUdevice))                                                  \
  X(cuDeviceGetAttribute, (int*, int, CUdevice))                                              \
  X(cuDeviceTotalMem_v2, (size_t*, CUdevice))                                                 \
  X(cuDevicePrimaryCtxRetain, (CUcontext*, CUdevice))                                         \
  X(cuDevicePrimaryCtxRelease_v2, (CUdevice))                                                 \
  X(cuDevicePrimaryCtxGetState, (CUdevice, unsigned*, int*))                                  \
  X(cuDevicePrimaryCtxReset_v2, (CUdevice))                                                   \
  X(cuDeviceCanAccessPeer, (int*, CUdevice, CUdevice))                                        \
  X(cuCtxEnablePeerAccess, (CUcontext, unsigned))                                             \
  X(cuCtxSetCurrent, (CUcontext))                                                             \
  X(cuMemGetInfo_v2, (size_t*, size_t*))                                                      \
  X(cuMemAllocAsync, (CUdeviceptr*, size_t, CUstream))                                        \
  X(cuMemFreeAsync, (CUdeviceptr, CUstream))                                                  \
  X(cuDeviceGetDefaultMemPool, (CUmemoryPool*, CUdevice))                                     \
  X(cuMemPoolSetAttribute, (CUmemoryPool, int, void*))                                        \
  X(cuMemPoolTrimTo, (CUmemoryPool, size_t))                                                  \
  X(cuMemPoolSetAccess, (CUmemoryPool, const CUmemAccessDesc*, size_t))                       \
  X(cuMemHostAlloc, (void**, size_t, unsigned))                                               \
  X(cuMemFreeHost, (void*))                                                                   \
  X(cuMemcpyHtoDAsync_v2, (CUdeviceptr, const void*, size_t, CUstream))                       \
  X(cuMemcpyDtoHAsync_v2, (void*, CUdeviceptr, size_t, CUstream))                             \
  X(cuMemcpyPeerAsync, (CUdeviceptr, CUcontext, CUdeviceptr, CUcontext, size_t, CUstream))    \
  X(cuMemsetD8Async, (CUdeviceptr, unsigned char, size_t, CUstream))                          \
  X(cuModuleLoadDataEx, (CUmodule*, const void*, unsigned, int*, void**))                     \
  X(cuModuleUnload, (CUmodule))                                                               \
  X(cuModuleGetFunction, (CUfunction*, CUmodule, const char*))                                \
  X(cuFuncGetAttribute, (int*, int, CUfunction))                                              \
  X(cuFuncSetAttribute, (CUfunction, int, int))                                               \
  X(cuLaunchKernel, (CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,  \
                     unsigned, CUstream, void**, void**))                                     \
  X(cuStreamCreate, (CUstream*, unsigned))                                                    \
  X(cuStreamDestroy_v2, (CUstream))                                                           \
  X(cuStreamSynchronize, (CUstream))                                                          \
  X(cuStreamWaitEvent, (CUstream, CUevent, unsigned))                                         \
  X(cuEventCreate, (CUevent*, unsigned))                                                      \
  X(cuEventRecord, (CUevent, CUstream))                                                       \
  X(cuEventSynchronize, (CUevent))                                                            \
  X(cuEventDestroy_v2, (CUevent))                                                             \
  X(cuStreamBeginCapture_v2, (CUstream, int))                                                 \
  X(cuStreamEndCapture, (CUstream, CUgraph*))                                                 \
  X(cuGraphInstantiateWithFlags, (CUgraphExec*, CUgraph, unsigned long long))                 \
  X(cuGraphLaunch, (CUgraphExec, CUstream))                                                   \
  X(cuGraphExecDestroy, (CUgraphExec))                                                        \
  X(cuGraphDestroy, (CUgraph))
// clang-format on

// The newest of the symbols above, cuGraphInstantiateWithFlags, came with 11.4.
inline constexpr int kRequiredDriver = 11040;
inline constexpr int kRequiredMajor = 8;

struct Driver {
#define MGM_MEMBER(name, params) CUresult(*name) params = nullptr;
  MGM_CUDA_SYMBOLS(MGM_MEMBER)
#undef MGM_MEMBER
  CUresult (*cuMemPoolGetAttribute)(CUmemoryPool, int, void*) = nullptr;  // optional: for statistics
  std::string path;                                                       // as it was opened
  int version = 0;                                                        // 12040 = CUDA 12.4
  bool emulated = false;
};

// Opens libcuda.so.1, or what MGM_LIBCUDA names, once a process. Throws Error("DEVICE_UNAVAILABLE") with what
// was found and what is required.
const Driver& driver();

struct DeviceInfo {
  int index;
  std::string name;
  int major, minor, multiprocessors;
  size_t memory, shared_optin;
  bool memory_pools;
  int capability() const { return major * 10 + minor; }
};
// Throws Error("DEVICE_UNAVAILABLE") if there is no such device.
DeviceInfo device_info(int index);
int device_count();

// "CUDA_ERROR_ILLEGAL_ADDRESS (700): an illegal memory access was encountered"
std::string describe(CUresult result);
// True for errors after which the context serves nothing any more.
bool is_sticky(CUresult result);
// Throws the Error that `result` stands for: OUT_OF_MEMORY, DEVICE_LOST or INTERNAL, naming the call and its
// place.
[[noreturn]] void fail(CUresult result, const char* call, const std::source_location& place);
// The same, unless the call succeeded.
inline void check(CUresult result, const char* call,
                  const std::source_location& place = std::source_location::current()) {
  if (result != kSuccess) fail(result, call, place);
}

}  // namespace mgm::cuda
