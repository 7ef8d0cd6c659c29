// The arena of one rank as this process sees it, and what to do with it at the end.
#pragma once
#include <cuda_runtime_api.h>
#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <string>

namespace dpcomm {

// What a rank tells the others of its arena, in memory that they share. Plain data.
struct PeerExport {
  enum Kind : uint32_t { kNone, kIpc, kPosixFd };  // kPosixFd: for virtual memory management; nobody offers it yet
  uint32_t kind;
  uint32_t device;   // ordinal in the exporter's process
  uint8_t uuid[16];  // of the GPU: ordinals differ between processes
  uint64_t bytes;
  uint64_t address;  // in the exporter's process
  cudaIpcMemHandle_t ipc;
};

class PeerMemory {
 public:
  PeerMemory() = default;
  // On the current device, zeroed: what is exported must be a whole allocation of ours, in multiples of 2 MiB.
  static PeerMemory allocate(size_t bytes);
  // A peer's, mapped for the current device. Error(p2p) that says what the driver answered.
  static PeerMemory open(const PeerExport& theirs, int rank);
  // Memory of this process that somebody else owns.
  static PeerMemory borrow(char* address);
  // Host memory, registered so that the GPUs of this process reach it. It must stay mapped for longer than this object.
  static PeerMemory pin(char* host, size_t bytes);

  PeerMemory(PeerMemory&& other) noexcept { swap(other); }
  PeerMemory& operator=(PeerMemory&& other) noexcept {
    swap(other);
    return *this;
  }
  ~PeerMemory() { release(); }

  char* data() const { return data_; }  // where kernels find it
  const char* how() const;              // "own", "ipc", "plain pointer", "pinned host memory"
  PeerExport exported(int device) const;
  void release();
  // Never frees it: a peer that died may still be mapped to it, or its GPU still be writing.
  void leak() { how_ = How::none; }

 private:
  enum class How { none, own, imported, borrowed, pinned };
  void swap(PeerMemory& other) noexcept;

  How how_ = How::none;
  int device_ = -1;
  char* data_ = nullptr;
  char* host_ = nullptr;  // of pinned memory
  size_t bytes_ = 0;
};

}  // namespace dpcomm
