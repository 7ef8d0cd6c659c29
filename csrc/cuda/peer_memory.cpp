#include "peer_memory.h"

#include <cerrno>
#include <utility>

#include "../gpu/cuda_check.h"
#include "../gpu/device.h"

namespace dpcomm {

PeerMemory PeerMemory::allocate(size_t bytes) {
  PeerMemory memory;
  void* p = nullptr;
  const cudaError_t status = cudaMalloc(&p, bytes);
  if (status == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    size_t free = 0, total = 0;
    check_cuda(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
    throw resource_error("an arena of " + std::to_string(bytes) + " bytes of GPU memory is needed, and " +
                             std::to_string(free) + " of " + std::to_string(total) +
                             " are free: lower DPCOMM_ARENA_MB or free memory (torch.cuda.empty_cache())",
                         ENOMEM);
  }
  check_cuda(status, "cudaMalloc");
  check_cuda(cudaGetDevice(&memory.device_), "cudaGetDevice");
  memory.how_ = How::own;
  memory.data_ = static_cast<char*>(p);
  memory.bytes_ = bytes;
  check_cuda(cudaMemset(p, 0, bytes), "cudaMemset");
  check_cuda(cudaStreamSynchronize(nullptr), "cudaStreamSynchronize");  // before anybody is told of it
  return memory;
}

PeerMemory PeerMemory::open(const PeerExport& theirs, int rank) {
  const auto refuse = [&](const std::string& why) {
    return Error(Code::p2p, "memory of rank " + std::to_string(rank) + " (GPU " + text_of_uuid(theirs.uuid) +
                                ") cannot be reached: " + why);
  };
  if (theirs.kind != PeerExport::kIpc) throw refuse("an unknown kind of handle, " + std::to_string(theirs.kind));
  PeerMemory memory;
  check_cuda(cudaGetDevice(&memory.device_), "cudaGetDevice");
  const int device = device_with(theirs.uuid);
  if (device >= 0 && device != memory.device_) require_peer_access(memory.device_, device, rank);
  void* p = nullptr;
  const cudaError_t status = cudaIpcOpenMemHandle(&p, theirs.ipc, cudaIpcMemLazyEnablePeerAccess);
  if (status != cudaSuccess) {
    cudaGetLastError();
    throw refuse(std::string("cudaIpcOpenMemHandle: ") + cudaGetErrorString(status) +
                 " (containers need a shared PID namespace, --pid=host, and --ipc=host)");
  }
  memory.how_ = How::imported;
  memory.data_ = static_cast<char*>(p);
  memory.bytes_ = theirs.bytes;
  return memory;
}

PeerMemory PeerMemory::borrow(char* address) {
  PeerMemory memory;
  memory.how_ = How::borrowed;
  memory.data_ = address;
  return memory;
}

PeerMemory PeerMemory::pin(char* host, size_t bytes) {
  PeerMemory memory;
  const cudaError_t status = cudaHostRegister(host, bytes, cudaHostRegisterPortable | cudaHostRegisterMapped);
  if (status != cudaSuccess) {
    cudaGetLastError();
    throw resource_error("cudaHostRegister of " + std::to_string(bytes) + " bytes: " + cudaGetErrorString(status) +
                             "; look at ulimit -l",
                         ENOMEM);
  }
  check_cuda(cudaGetDevice(&memory.device_), "cudaGetDevice");
  memory.how_ = How::pinned;
  memory.host_ = host;
  memory.bytes_ = bytes;
  void* p = nullptr;
  check_cuda(cudaHostGetDevicePointer(&p, host, 0), "cudaHostGetDevicePointer");
  memory.data_ = static_cast<char*>(p);
  return memory;
}

const char* PeerMemory::how() const {
  switch (how_) {
    case How::none:
      return "none";
    case How::own:
      return "own";
    case How::imported:
      return "ipc";
    case How::borrowed:
      return "plain pointer";
    case How::pinned:
      return "pinned host memory";
  }
  return "none";
}

PeerExport PeerMemory::exported(int device) const {
  PeerExport mine{};
  mine.device = uint32_t(device);
  uuid_of(device, mine.uuid);
  mine.bytes = bytes_;
  mine.address = reinterpret_cast<uint64_t>(data_);
  if (how_ != How::own) return mine;
  const cudaError_t status = cudaIpcGetMemHandle(&mine.ipc, data_);
  if (status != cudaSuccess) {
    cudaGetLastError();
    throw Error(Code::p2p, std::string("cudaIpcGetMemHandle: ") + cudaGetErrorString(status) +
                               ". This GPU's memory cannot be shared between processes (WSL, MIG or vGPU?).");
  }
  mine.kind = PeerExport::kIpc;
  return mine;
}

// Errors have nowhere to go: what could fail here was reported by the call that broke it.
void PeerMemory::release() {
  const How how = std::exchange(how_, How::none);
  if (how == How::none || how == How::borrowed) return;
  try {
    const CurrentDevice current(device_);
    if (how == How::own) cudaFree(data_);
    if (how == How::imported) cudaIpcCloseMemHandle(data_);
    if (how == How::pinned) cudaHostUnregister(host_);
  } catch (const Error&) {  // the context is lost, and the memory with it
  }
  cudaGetLastError();
}

void PeerMemory::swap(PeerMemory& other) noexcept {
  std::swap(how_, other.how_);
  std::swap(device_, other.device_);
  std::swap(data_, other.data_);
  std::swap(host_, other.host_);
  std::swap(bytes_, other.bytes_);
}

}  // namespace dpcomm
