// Devices: how many, which, what they can do.
#include <cstdio>
#include <cstring>

#include "state.h"

namespace stand_in {
namespace {

bool exists(int device) { return device >= 0 && device < machine().devices; }

// 16 bytes that are the same in every process, and differ between physical devices.
cudaUUID_t uuid_of(int device) {
  cudaUUID_t uuid;
  std::memcpy(uuid.bytes, "stand-in device", 16);
  uuid.bytes[15] = static_cast<char>('0' + physical_device(device));
  return uuid;
}

int bus_of(int device) { return 0x10 + physical_device(device); }

int attribute_of(cudaDeviceAttr attribute, int device) {
  const Machine& m = machine();
  static const std::map<int, int> fixed = {
      {cudaDevAttrMaxThreadsPerBlock, 1024},
      {cudaDevAttrMaxBlockDimX, 1024},
      {cudaDevAttrMaxGridDimX, 2147483647},
      {cudaDevAttrWarpSize, 32},
      {cudaDevAttrPciDeviceId, 0},
      {cudaDevAttrPciDomainId, 0},
      {cudaDevAttrConcurrentKernels, 1},
      {cudaDevAttrCanMapHostMemory, 1},
      {cudaDevAttrUnifiedAddressing, 1},
      {cudaDevAttrIntegrated, 0},
      {cudaDevAttrComputeMode, 0},
      {cudaDevAttrHostNativeAtomicSupported, 0},
      {cudaDevAttrPageableMemoryAccess, 0},
      {cudaDevAttrCanUseHostPointerForRegisteredMem, 1},
      {cudaDevAttrCooperativeLaunch, 1},
      {cudaDevAttrHostRegisterSupported, 1},
      {cudaDevAttrStreamPrioritiesSupported, 1},
      {cudaDevAttrIpcEventSupport, 0},
      {cudaDevAttrMaxThreadsPerMultiProcessor, 2048},
  };
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      return m.sms;
    case cudaDevAttrComputeCapabilityMajor:
      return m.major;
    case cudaDevAttrComputeCapabilityMinor:
      return m.minor;
    case cudaDevAttrPciBusId:
      return bus_of(device);
    default:
      break;
  }
  const auto found = fixed.find(attribute);
  if (found == fixed.end()) die("cudaDeviceGetAttribute: the stand-in does not know attribute %d", int(attribute));
  return found->second;
}

}  // namespace
}  // namespace stand_in

using namespace stand_in;

cudaError_t cudaGetDeviceCount(int* count) {
  return call("cudaGetDeviceCount", Rule::asks, [&] {
    *count = machine().devices;
    return cudaSuccess;
  });
}

cudaError_t cudaGetDevice(int* device) {
  return call("cudaGetDevice", Rule::asks, [&] {
    *device = current_device();
    return cudaSuccess;
  });
}

cudaError_t cudaSetDevice(int device) {
  return call("cudaSetDevice", Rule::asks, [&] {
    if (!exists(device)) return cudaErrorInvalidDevice;
    if (in_device_code()) return cudaErrorNotPermitted;
    current_device() = device;
    return cudaSuccess;
  });
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  return call("cudaDeviceGetAttribute", Rule::asks, [&] {
    if (!exists(device)) return cudaErrorInvalidDevice;
    *value = attribute_of(attribute, device);
    return cudaSuccess;
  });
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  return call("cudaGetDeviceProperties", Rule::asks, [&] {
    if (!exists(device)) return cudaErrorInvalidDevice;
    cudaDeviceProp& p = *properties;
    std::memset(&p, 0, sizeof p);
    std::snprintf(p.name, sizeof p.name, "Stand-in GPU");
    p.uuid = uuid_of(device);
    p.totalGlobalMem = machine().memory_bytes;
    p.pciBusID = bus_of(device);
    p.major = machine().major;
    p.minor = machine().minor;
    p.multiProcessorCount = machine().sms;
    p.warpSize = 32;
    p.maxThreadsPerBlock = 1024;
    p.maxThreadsPerMultiProcessor = 2048;
    p.unifiedAddressing = p.canMapHostMemory = p.concurrentKernels = p.cooperativeLaunch = 1;
    p.hostRegisterSupported = p.canUseHostPointerForRegisteredMem = p.streamPrioritiesSupported = 1;
    return cudaSuccess;
  });
}

cudaError_t cudaDeviceGetPCIBusId(char* text, int length, int device) {
  return call("cudaDeviceGetPCIBusId", Rule::asks, [&] {
    if (!exists(device)) return cudaErrorInvalidDevice;
    const int needed = std::snprintf(text, static_cast<size_t>(length), "0000:%02X:00.0", bus_of(device));
    return needed < length ? cudaSuccess : cudaErrorInvalidValue;
  });
}

cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  return call("cudaDeviceGetStreamPriorityRange", Rule::asks, [&] {
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return cudaSuccess;
  });
}
