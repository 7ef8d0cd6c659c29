#include "device.h"

#include <cstdio>
#include <cstring>

#include "cuda_check.h"

namespace dpcomm {

std::string cuda_version() {
  int version = 0;
  check_cuda(cudaRuntimeGetVersion(&version), "cudaRuntimeGetVersion");
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

std::string cuda_unusable_reason() {
  int devices = 0;
  const cudaError_t status = cudaGetDeviceCount(&devices);
  cudaGetLastError();
  if (status != cudaSuccess) return std::string("cudaGetDeviceCount: ") + cudaGetErrorString(status);
  return devices > 0 ? "" : "cudaGetDeviceCount: no device";
}

namespace {

cudaDeviceProp properties(int device) {
  cudaDeviceProp p{};
  check_cuda(cudaGetDeviceProperties(&p, device), "cudaGetDeviceProperties");
  return p;
}

}  // namespace

bool is_capturing(cudaStream_t stream) {
  if (stream == nullptr || stream == cudaStreamLegacy) return false;  // which cannot be captured
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check_cuda(cudaStreamIsCapturing(stream, &status), "cudaStreamIsCapturing");
  return status != cudaStreamCaptureStatusNone;
}

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, name, device), "cudaDeviceGetAttribute");
  return value;
}

int threads_of(const void* kernel, int device) {
  const CurrentDevice current(device);
  cudaFuncAttributes is{};
  const cudaError_t status = cudaFuncGetAttributes(&is, kernel);
  if (status == cudaErrorNoKernelImageForDevice || status == cudaErrorUnsupportedPtxVersion) {
    cudaGetLastError();
    const cudaDeviceProp p = properties(device);
    throw Error(Code::version, std::string("dpcomm's kernels do not run on GPU ") + std::to_string(device) + " (" +
                                   p.name + ", sm_" + std::to_string(p.major) + std::to_string(p.minor) +
                                   "): " + cudaGetErrorString(status) +
                                   ". Build dpcomm on this machine with CUDAARCHS set, or update the driver.");
  }
  check_cuda(status, "cudaFuncGetAttributes");
  return is.maxThreadsPerBlock;
}

std::vector<const void*> kernels_of(const void* (*find)(Dtype, CodecKind, Algorithm)) {
  std::vector<const void*> kernels;
  for (const Dtype dtype :
       {Dtype::float32, Dtype::float64, Dtype::float16, Dtype::bfloat16, Dtype::int32, Dtype::int64})
    for (const CodecKind codec : {CodecKind::none, CodecKind::fp16})
      for (const Algorithm algorithm : {Algorithm::direct, Algorithm::oneshot, Algorithm::ring})
        if (const void* kernel = find(dtype, codec, algorithm)) kernels.push_back(kernel);
  return kernels;
}

std::vector<DeviceInfo> cuda_devices() {
  std::vector<DeviceInfo> all;
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess) devices = 0;
  cudaGetLastError();
  for (int d = 0; d < devices; ++d) {
    const cudaDeviceProp p = properties(d);
    char bus[32];
    std::snprintf(bus, sizeof bus, "%04x:%02x:%02x.0", p.pciDomainID, p.pciBusID, p.pciDeviceID);
    uint8_t uuid[16];
    uuid_of(d, uuid);
    all.push_back({d, p.name, text_of_uuid(uuid), bus, std::to_string(p.major) + "." + std::to_string(p.minor),
                   p.multiProcessorCount});
  }
  return all;
}

int device_of(uintptr_t address) {
  cudaPointerAttributes at{};
  const cudaError_t status = cudaPointerGetAttributes(&at, reinterpret_cast<void*>(address));
  cudaGetLastError();
  return status == cudaSuccess && at.type == cudaMemoryTypeDevice ? at.device : -1;
}

void uuid_of(int device, uint8_t uuid[16]) {
  const cudaDeviceProp p = properties(device);
  std::memcpy(uuid, p.uuid.bytes, 16);
}

std::string text_of_uuid(const uint8_t uuid[16]) {
  std::string text = "GPU-";
  for (int i = 0; i < 16; ++i) {
    char hex[4];
    std::snprintf(hex, sizeof hex, "%02x", uuid[i]);
    text += hex;
    if (i == 3 || i == 5 || i == 7 || i == 9) text += '-';
  }
  return text;
}

int device_with(const uint8_t uuid[16]) {
  int devices = 0;
  check_cuda(cudaGetDeviceCount(&devices), "cudaGetDeviceCount");
  for (int d = 0; d < devices; ++d) {
    uint8_t other[16];
    uuid_of(d, other);
    if (std::memcmp(uuid, other, 16) == 0) return d;
  }
  return -1;
}

void require_peer_access(int from, int to, int rank) {
  int can = 0;
  check_cuda(cudaDeviceCanAccessPeer(&can, from, to), "cudaDeviceCanAccessPeer");
  if (!can)
    throw Error(Code::p2p, "GPU " + std::to_string(from) + " has no peer access to GPU " + std::to_string(to) +
                               " of rank " + std::to_string(rank));
}

void enable_peer_access(int from, int to, int rank) {
  require_peer_access(from, to, rank);
  const CurrentDevice current(from);
  const cudaError_t status = cudaDeviceEnablePeerAccess(to, 0);
  cudaGetLastError();
  if (status != cudaSuccess && status != cudaErrorPeerAccessAlreadyEnabled)
    throw Error(Code::p2p, std::string("cudaDeviceEnablePeerAccess: ") + cudaGetErrorString(status));
}

}  // namespace dpcomm
