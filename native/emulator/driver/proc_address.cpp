// cuGetProcAddress: of the functions that share a name, the newest that the asked-for CUDA version knows.
#include <cstring>

#include "driver.h"

// Base name, exported symbol, first CUDA version whose headers mean this symbol by the name.
// clang-format off
#define MGM_ENTRY_POINTS(X) \
  X(cuCtxCreate, cuCtxCreate_v2, 3020) \
  X(cuCtxCreate, cuCtxCreate_v3, 11040) \
  X(cuCtxCreate, cuCtxCreate_v4, 12050) \
  X(cuCtxDestroy, cuCtxDestroy_v2, 4000) \
  X(cuCtxDisablePeerAccess, cuCtxDisablePeerAccess, 4000) \
  X(cuCtxEnablePeerAccess, cuCtxEnablePeerAccess, 4000) \
  X(cuCtxGetApiVersion, cuCtxGetApiVersion, 3020) \
  X(cuCtxGetCacheConfig, cuCtxGetCacheConfig, 3020) \
  X(cuCtxGetCurrent, cuCtxGetCurrent, 4000) \
  X(cuCtxGetDevice, cuCtxGetDevice, 2000) \
  X(cuCtxGetDevice, cuCtxGetDevice_v2, 13000) \
  X(cuCtxGetFlags, cuCtxGetFlags, 7000) \
  X(cuCtxGetLimit, cuCtxGetLimit, 3010) \
  X(cuCtxGetStreamPriorityRange, cuCtxGetStreamPriorityRange, 5050) \
  X(cuCtxPopCurrent, cuCtxPopCurrent_v2, 4000) \
  X(cuCtxPushCurrent, cuCtxPushCurrent_v2, 4000) \
  X(cuCtxSetCacheConfig, cuCtxSetCacheConfig, 3020) \
  X(cuCtxSetCurrent, cuCtxSetCurrent, 4000) \
  X(cuCtxSetLimit, cuCtxSetLimit, 3010) \
  X(cuCtxSynchronize, cuCtxSynchronize, 2000) \
  X(cuCtxSynchronize, cuCtxSynchronize_v2, 13000) \
  X(cuDeviceCanAccessPeer, cuDeviceCanAccessPeer, 4000) \
  X(cuDeviceComputeCapability, cuDeviceComputeCapability, 2000) \
  X(cuDeviceGet, cuDeviceGet, 2000) \
  X(cuDeviceGetAttribute, cuDeviceGetAttribute, 2000) \
  X(cuDeviceGetCount, cuDeviceGetCount, 2000) \
  X(cuDeviceGetDefaultMemPool, cuDeviceGetDefaultMemPool, 11020) \
  X(cuDeviceGetMemPool, cuDeviceGetMemPool, 11020) \
  X(cuDeviceGetName, cuDeviceGetName, 2000) \
  X(cuDeviceGetPCIBusId, cuDeviceGetPCIBusId, 4010) \
  X(cuDeviceGetUuid, cuDeviceGetUuid, 9020) \
  X(cuDeviceGetUuid, cuDeviceGetUuid_v2, 11040) \
  X(cuDevicePrimaryCtxGetState, cuDevicePrimaryCtxGetState, 7000) \
  X(cuDevicePrimaryCtxRelease, cuDevicePrimaryCtxRelease, 7000) \
  X(cuDevicePrimaryCtxRelease, cuDevicePrimaryCtxRelease_v2, 11000) \
  X(cuDevicePrimaryCtxReset, cuDevicePrimaryCtxReset, 7000) \
  X(cuDevicePrimaryCtxReset, cuDevicePrimaryCtxReset_v2, 11000) \
  X(cuDevicePrimaryCtxRetain, cuDevicePrimaryCtxRetain, 7000) \
  X(cuDevicePrimaryCtxSetFlags, cuDevicePrimaryCtxSetFlags, 7000) \
  X(cuDevicePrimaryCtxSetFlags, cuDevicePrimaryCtxSetFlags_v2, 11000) \
  X(cuDeviceSetMemPool, cuDeviceSetMemPool, 11020) \
  X(cuDeviceTotalMem, cuDeviceTotalMem_v2, 3020) \
  X(cuDriverGetVersion, cuDriverGetVersion, 2020) \
  X(cuEventCreate, cuEventCreate, 2000) \
  X(cuEventDestroy, cuEventDestroy_v2, 4000) \
  X(cuEventElapsedTime, cuEventElapsedTime, 2000) \
  X(cuEventElapsedTime, cuEventElapsedTime_v2, 12080) \
  X(cuEventQuery, cuEventQuery, 2000) \
  X(cuEventRecord, cuEventRecord, 2000) \
  X(cuEventRecordWithFlags, cuEventRecordWithFlags, 11010) \
  X(cuEventSynchronize, cuEventSynchronize, 2000) \
  X(cuFuncGetAttribute, cuFuncGetAttribute, 2020) \
  X(cuFuncGetModule, cuFuncGetModule, 11000) \
  X(cuFuncGetName, cuFuncGetName, 12030) \
  X(cuFuncGetParamInfo, cuFuncGetParamInfo, 12040) \
  X(cuFuncSetAttribute, cuFuncSetAttribute, 9000) \
  X(cuFuncSetCacheConfig, cuFuncSetCacheConfig, 3000) \
  X(cuGetErrorName, cuGetErrorName, 6000) \
  X(cuGetErrorString, cuGetErrorString, 6000) \
  X(cuGetProcAddress, cuGetProcAddress, 11030) \
  X(cuGetProcAddress, cuGetProcAddress_v2, 12000) \
  X(cuGraphAddEmptyNode, cuGraphAddEmptyNode, 10000) \
  X(cuGraphAddKernelNode, cuGraphAddKernelNode_v2, 12000) \
  X(cuGraphCreate, cuGraphCreate, 10000) \
  X(cuGraphDestroy, cuGraphDestroy, 10000) \
  X(cuGraphExecDestroy, cuGraphExecDestroy, 10000) \
  X(cuGraphExecKernelNodeSetParams, cuGraphExecKernelNodeSetParams_v2, 12000) \
  X(cuGraphExecUpdate, cuGraphExecUpdate, 10020) \
  X(cuGraphExecUpdate, cuGraphExecUpdate_v2, 12000) \
  X(cuGraphGetNodes, cuGraphGetNodes, 10000) \
  X(cuGraphInstantiate, cuGraphInstantiate, 10000) \
  X(cuGraphInstantiate, cuGraphInstantiate_v2, 11000) \
  X(cuGraphInstantiate, cuGraphInstantiateWithFlags, 12000) \
  X(cuGraphInstantiateWithFlags, cuGraphInstantiateWithFlags, 11040) \
  X(cuGraphLaunch, cuGraphLaunch, 10000) \
  X(cuGraphNodeGetDependencies, cuGraphNodeGetDependencies, 10000) \
  X(cuGraphNodeGetDependencies, cuGraphNodeGetDependencies_v2, 12030) \
  X(cuGraphNodeGetType, cuGraphNodeGetType, 10000) \
  X(cuGraphUpload, cuGraphUpload, 11010) \
  X(cuInit, cuInit, 2000) \
  X(cuKernelGetAttribute, cuKernelGetAttribute, 12000) \
  X(cuKernelGetFunction, cuKernelGetFunction, 12000) \
  X(cuKernelGetParamInfo, cuKernelGetParamInfo, 12040) \
  X(cuKernelSetAttribute, cuKernelSetAttribute, 12000) \
  X(cuLaunchCooperativeKernel, cuLaunchCooperativeKernel, 9000) \
  X(cuLaunchHostFunc, cuLaunchHostFunc, 10000) \
  X(cuLaunchKernel, cuLaunchKernel, 4000) \
  X(cuLaunchKernelEx, cuLaunchKernelEx, 11060) \
  X(cuLibraryGetKernel, cuLibraryGetKernel, 12000) \
  X(cuLibraryGetModule, cuLibraryGetModule, 12000) \
  X(cuLibraryLoadData, cuLibraryLoadData, 12000) \
  X(cuLibraryUnload, cuLibraryUnload, 12000) \
  X(cuLinkAddData, cuLinkAddData_v2, 6050) \
  X(cuLinkComplete, cuLinkComplete, 5050) \
  X(cuLinkCreate, cuLinkCreate_v2, 6050) \
  X(cuLinkDestroy, cuLinkDestroy, 5050) \
  X(cuMemAddressFree, cuMemAddressFree, 10020) \
  X(cuMemAddressReserve, cuMemAddressReserve, 10020) \
  X(cuMemAlloc, cuMemAlloc_v2, 3020) \
  X(cuMemAllocAsync, cuMemAllocAsync, 11020) \
  X(cuMemAllocFromPoolAsync, cuMemAllocFromPoolAsync, 11020) \
  X(cuMemAllocHost, cuMemAllocHost_v2, 3020) \
  X(cuMemAllocManaged, cuMemAllocManaged, 6000) \
  X(cuMemAllocPitch, cuMemAllocPitch_v2, 3020) \
  X(cuMemCreate, cuMemCreate, 10020) \
  X(cuMemFree, cuMemFree_v2, 3020) \
  X(cuMemFreeAsync, cuMemFreeAsync, 11020) \
  X(cuMemFreeHost, cuMemFreeHost, 2000) \
  X(cuMemGetAddressRange, cuMemGetAddressRange_v2, 3020) \
  X(cuMemGetAllocationGranularity, cuMemGetAllocationGranularity, 10020) \
  X(cuMemGetInfo, cuMemGetInfo_v2, 3020) \
  X(cuMemHostAlloc, cuMemHostAlloc, 2020) \
  X(cuMemHostGetDevicePointer, cuMemHostGetDevicePointer_v2, 3020) \
  X(cuMemHostGetFlags, cuMemHostGetFlags, 2030) \
  X(cuMemHostRegister, cuMemHostRegister_v2, 6050) \
  X(cuMemHostUnregister, cuMemHostUnregister, 4000) \
  X(cuMemMap, cuMemMap, 10020) \
  X(cuMemPoolCreate, cuMemPoolCreate, 11020) \
  X(cuMemPoolDestroy, cuMemPoolDestroy, 11020) \
  X(cuMemPoolGetAccess, cuMemPoolGetAccess, 11020) \
  X(cuMemPoolGetAttribute, cuMemPoolGetAttribute, 11020) \
  X(cuMemPoolSetAccess, cuMemPoolSetAccess, 11020) \
  X(cuMemPoolSetAttribute, cuMemPoolSetAttribute, 11020) \
  X(cuMemPoolTrimTo, cuMemPoolTrimTo, 11020) \
  X(cuMemRelease, cuMemRelease, 10020) \
  X(cuMemSetAccess, cuMemSetAccess, 10020) \
  X(cuMemUnmap, cuMemUnmap, 10020) \
  X(cuMemcpy, cuMemcpy, 4000) \
  X(cuMemcpy2D, cuMemcpy2D_v2, 3020) \
  X(cuMemcpy2DAsync, cuMemcpy2DAsync_v2, 3020) \
  X(cuMemcpy2DUnaligned, cuMemcpy2DUnaligned_v2, 3020) \
  X(cuMemcpyAsync, cuMemcpyAsync, 4000) \
  X(cuMemcpyDtoD, cuMemcpyDtoD_v2, 3020) \
  X(cuMemcpyDtoDAsync, cuMemcpyDtoDAsync_v2, 3020) \
  X(cuMemcpyDtoH, cuMemcpyDtoH_v2, 3020) \
  X(cuMemcpyDtoHAsync, cuMemcpyDtoHAsync_v2, 3020) \
  X(cuMemcpyHtoD, cuMemcpyHtoD_v2, 3020) \
  X(cuMemcpyHtoDAsync, cuMemcpyHtoDAsync_v2, 3020) \
  X(cuMemcpyPeer, cuMemcpyPeer, 4000) \
  X(cuMemcpyPeerAsync, cuMemcpyPeerAsync, 4000) \
  X(cuMemsetD16, cuMemsetD16_v2, 3020) \
  X(cuMemsetD16Async, cuMemsetD16Async, 3020) \
  X(cuMemsetD2D16, cuMemsetD2D16_v2, 3020) \
  X(cuMemsetD2D16Async, cuMemsetD2D16Async, 3020) \
  X(cuMemsetD2D32, cuMemsetD2D32_v2, 3020) \
  X(cuMemsetD2D32Async, cuMemsetD2D32Async, 3020) \
  X(cuMemsetD2D8, cuMemsetD2D8_v2, 3020) \
  X(cuMemsetD2D8Async, cuMemsetD2D8Async, 3020) \
  X(cuMemsetD32, cuMemsetD32_v2, 3020) \
  X(cuMemsetD32Async, cuMemsetD32Async, 3020) \
  X(cuMemsetD8, cuMemsetD8_v2, 3020) \
  X(cuMemsetD8Async, cuMemsetD8Async, 3020) \
  X(cuModuleGetFunction, cuModuleGetFunction, 2000) \
  X(cuModuleGetFunctionCount, cuModuleGetFunctionCount, 12040) \
  X(cuModuleGetGlobal, cuModuleGetGlobal_v2, 3020) \
  X(cuModuleLoad, cuModuleLoad, 2000) \
  X(cuModuleLoadData, cuModuleLoadData, 2000) \
  X(cuModuleLoadDataEx, cuModuleLoadDataEx, 2010) \
  X(cuModuleLoadFatBinary, cuModuleLoadFatBinary, 2000) \
  X(cuModuleUnload, cuModuleUnload, 2000) \
  X(cuOccupancyAvailableDynamicSMemPerBlock, cuOccupancyAvailableDynamicSMemPerBlock, 10020) \
  X(cuOccupancyMaxActiveBlocksPerMultiprocessor, cuOccupancyMaxActiveBlocksPerMultiprocessor, 6050) \
  X(cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags, cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags, 7000) \
  X(cuOccupancyMaxPotentialBlockSize, cuOccupancyMaxPotentialBlockSize, 6050) \
  X(cuOccupancyMaxPotentialBlockSizeWithFlags, cuOccupancyMaxPotentialBlockSizeWithFlags, 7000) \
  X(cuPointerGetAttribute, cuPointerGetAttribute, 4000) \
  X(cuProfilerStart, cuProfilerStart, 4000) \
  X(cuProfilerStop, cuProfilerStop, 4000) \
  X(cuStreamAddCallback, cuStreamAddCallback, 5000) \
  X(cuStreamBeginCapture, cuStreamBeginCapture_v2, 10010) \
  X(cuStreamCreate, cuStreamCreate, 2000) \
  X(cuStreamCreateWithPriority, cuStreamCreateWithPriority, 5050) \
  X(cuStreamDestroy, cuStreamDestroy_v2, 4000) \
  X(cuStreamEndCapture, cuStreamEndCapture, 10000) \
  X(cuStreamGetCaptureInfo, cuStreamGetCaptureInfo, 10010) \
  X(cuStreamGetCaptureInfo, cuStreamGetCaptureInfo_v2, 11030) \
  X(cuStreamGetCaptureInfo, cuStreamGetCaptureInfo_v3, 12030) \
  X(cuStreamGetCtx, cuStreamGetCtx, 9020) \
  X(cuStreamGetCtx, cuStreamGetCtx_v2, 12050) \
  X(cuStreamGetFlags, cuStreamGetFlags, 5050) \
  X(cuStreamGetPriority, cuStreamGetPriority, 5050) \
  X(cuStreamIsCapturing, cuStreamIsCapturing, 10000) \
  X(cuStreamQuery, cuStreamQuery, 2000) \
  X(cuStreamSynchronize, cuStreamSynchronize, 2000) \
  X(cuStreamWaitEvent, cuStreamWaitEvent, 3020) \
  X(cuTensorMapEncodeIm2col, cuTensorMapEncodeIm2col, 12000) \
  X(cuTensorMapEncodeTiled, cuTensorMapEncodeTiled, 12000) \
  X(cuThreadExchangeStreamCaptureMode, cuThreadExchangeStreamCaptureMode, 10010)
// clang-format on

#define MGM_DECLARE(base, symbol, version) extern "C" void symbol();
namespace entry {
MGM_ENTRY_POINTS(MGM_DECLARE)
}
#undef MGM_DECLARE

namespace mgm::emulator::cuda {
namespace {

struct Entry {
  const char* name;
  void (*symbol)();
  int version;
};
#define MGM_ROW(base, symbol, version) {#base, &entry::symbol, version},
constexpr Entry kEntries[] = {MGM_ENTRY_POINTS(MGM_ROW)};
#undef MGM_ROW

CUresult look_up(const char* name, void** out, int version, uint64_t flags, int* status, bool must_exist) {
  return call("cuGetProcAddress", kNoInit | kAnyThread, [&](Driver& d, Lock&, Context&) -> CUresult {
    if (!name || !out || flags > 2) return CUDA_ERROR_INVALID_VALUE;
    if (CUresult error = d.initialize(); error && error != CUDA_ERROR_NO_DEVICE) return error;
    *out = nullptr;
    if (version > d.version) return CUDA_ERROR_INVALID_VALUE;
    if (flags == 2)
      return misuse("cuGetProcAddress", CUDA_ERROR_NOT_SUPPORTED, "per-thread forms of the default stream");
    bool known = false;
    for (auto& entry : kEntries) {
      if (std::strcmp(entry.name, name) != 0) continue;
      known = true;
      if (entry.version <= version) *out = reinterpret_cast<void*>(entry.symbol);
    }
    if (status) *status = *out ? 0 : known ? 2 : 1;
    return *out || !must_exist ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
  });
}

}  // namespace
}  // namespace mgm::emulator::cuda

using namespace mgm::emulator::cuda;

extern "C" __attribute__((visibility("default"))) int mgm_get_proc_address_v1(
    const char* name, void** out, int version, uint64_t flags) __asm__("cuGetProcAddress");
extern "C" __attribute__((visibility("default"))) int mgm_get_proc_address_v2(
    const char* name, void** out, int version, uint64_t flags, int* status) __asm__("cuGetProcAddress_v2");

int mgm_get_proc_address_v1(const char* name, void** out, int version, uint64_t flags) {
  return look_up(name, out, version, flags, nullptr, true);
}
int mgm_get_proc_address_v2(const char* name, void** out, int version, uint64_t flags, int* status) {
  return look_up(name, out, version, flags, status, false);
}
