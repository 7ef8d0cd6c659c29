#include "device.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <utility>

#include "cuda_check.h"
#include "p2p_call.h"
#include "p2p_kernels.h"

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

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, name, device), "cudaDeviceGetAttribute");
  return value;
}

cudaDeviceProp properties(int device) {
  cudaDeviceProp p{};
  check_cuda(cudaGetDeviceProperties(&p, device), "cudaGetDeviceProperties");
  return p;
}

std::vector<const void*> all_kernels() {
  std::vector<const void*> kernels;
  for (const Dtype dtype :
       {Dtype::float32, Dtype::float64, Dtype::float16, Dtype::bfloat16, Dtype::int32, Dtype::int64})
    for (const CodecKind codec : {CodecKind::none, CodecKind::fp16})
      for (const Algorithm algorithm : {Algorithm::direct, Algorithm::oneshot, Algorithm::ring})
        if (const void* kernel = p2p_kernel(dtype, codec, algorithm)) kernels.push_back(kernel);
  return kernels;
}

// CTAs of any of our kernels that run at once on the device.
int capacity(int device) {
  const CurrentDevice current(device);
  if (!attribute(cudaDevAttrCooperativeLaunch, device))
    throw Error(Code::unsupported, "GPU " + std::to_string(device) + " has no cooperative launch.");
  int least = INT32_MAX;
  for (const void* kernel : all_kernels()) {
    cudaFuncAttributes is{};
    const cudaError_t status = cudaFuncGetAttributes(&is, kernel);
    if (status == cudaErrorNoKernelImageForDevice || status == cudaErrorUnsupportedPtxVersion) {
      cudaGetLastError();
      throw Error(Code::version, std::string("dpcomm's kernels do not run on GPU ") + std::to_string(device) + " (" +
                                     properties(device).name + ", sm_" +
                                     std::to_string(attribute(cudaDevAttrComputeCapabilityMajor, device)) +
                                     std::to_string(attribute(cudaDevAttrComputeCapabilityMinor, device)) +
                                     "): " + cudaGetErrorString(status) +
                                     ". Build dpcomm on this machine with CUDAARCHS set, or update the driver.");
    }
    check_cuda(status, "cudaFuncGetAttributes");
    int per_sm = 0;
    check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, kernel, is.maxThreadsPerBlock, 0),
               "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
    least = std::min(least, per_sm);
  }
  return least * attribute(cudaDevAttrMultiProcessorCount, device);
}

// Of this process: another process has the device in turns with it.
struct Budget {
  std::mutex mutex;
  std::map<int, int> capacity, leased;  // by device

  static Budget& all() {
    static Budget* const budget = new Budget;  // leases may end while the process does
    return *budget;
  }
  int left(int device) {  // under the mutex
    if (!capacity.contains(device)) capacity[device] = dpcomm::capacity(device);
    return capacity[device] - leased[device];
  }
};

}  // namespace

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

CtaLease::CtaLease(int device, int ctas) {
  Budget& budget = Budget::all();
  const std::lock_guard lock(budget.mutex);
  const int left = budget.left(device);
  if (ctas > left)
    throw resource_error("GPU " + std::to_string(device) + " runs " + std::to_string(budget.capacity[device]) +
                             " CTAs at once, of which live communicators of this process have leased " +
                             std::to_string(budget.leased[device]) + ", and " + std::to_string(ctas) +
                             " more would wait for ever: close communicators, or give them fewer with max_ctas=",
                         EBUSY);
  budget.leased[device] += ctas;
  device_ = device, ctas_ = ctas;
}

CtaLease::CtaLease(CtaLease&& other) noexcept
    : device_(std::exchange(other.device_, -1)), ctas_(std::exchange(other.ctas_, 0)) {}

CtaLease& CtaLease::operator=(CtaLease&& other) noexcept {
  std::swap(device_, other.device_);
  std::swap(ctas_, other.ctas_);
  return *this;
}

CtaLease::~CtaLease() {
  if (ctas_ == 0) return;
  Budget& budget = Budget::all();
  const std::lock_guard lock(budget.mutex);
  budget.leased[device_] -= ctas_;
}

int CtaLease::left(int device) {
  Budget& budget = Budget::all();
  const std::lock_guard lock(budget.mutex);
  return budget.left(device);
}

}  // namespace dpcomm
