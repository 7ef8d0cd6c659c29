// Compiled into what holds the stand-in CUDA runtime: programs and the extension.
#include "runtime.h"

const stand_in_nccl::Runtime* stand_in_cuda_runtime() {
  static const stand_in_nccl::Runtime table{
      stand_in::begin,          stand_in::submit,          stand_in::check_range, stand_in::start_thread,
      stand_in::current_device, stand_in::physical_device, cudaStreamGetDevice,   cudaStreamIsCapturing,
  };
  return &table;
}

// For Python's tests, which reach them with ctypes: arrays of the host in the role of a device's.
extern "C" [[gnu::visibility("default")]] void stand_in_adopt(void* address, size_t bytes, int device);
extern "C" [[gnu::visibility("default")]] void stand_in_forget(void* address);

void stand_in_adopt(void* address, size_t bytes, int device) { stand_in::adopt_memory(address, bytes, device); }
void stand_in_forget(void* address) { stand_in::forget_memory(address); }

// From now on the context is lost, with this cudaError_t; 0: it is as new.
extern "C" [[gnu::visibility("default")]] void stand_in_break(int status);
void stand_in_break(int status) { stand_in::machine().sticky = cudaError_t(status); }
