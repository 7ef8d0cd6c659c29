#include "sticky.h"

#include <cuda_runtime_api.h>

namespace dpcomm {

namespace {

bool is_sticky(int status) {
  switch (cudaError_t(status)) {
    case cudaErrorIllegalAddress:
    case cudaErrorAssert:
    case cudaErrorHardwareStackError:
    case cudaErrorIllegalInstruction:
    case cudaErrorMisalignedAddress:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorLaunchFailure:
    case cudaErrorECCUncorrectable:
      return true;
    default:
      return false;
  }
}

}  // namespace

bool is_invalid_stream(const Error& error) {
  return error.code == Code::cuda && error.errnum == cudaErrorInvalidResourceHandle;
}

std::string sticky_text(const Error& error) {
  const std::string what = error.what();
  if (error.code != Code::cuda || !is_sticky(error.errnum)) return what;
  return "earlier asynchronous CUDA error: " + what +
         ". A kernel before this call has caused it, and the process can no longer use the GPU: run it with "
         "CUDA_LAUNCH_BLOCKING=1 to see which.";
}

}  // namespace dpcomm
