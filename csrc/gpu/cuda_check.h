// Return codes of the CUDA runtime as exceptions, and what must be given back as objects.
#pragma once
#include <cuda_runtime_api.h>

#include <cstddef>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "../core/types.h"
#include "../error.h"

namespace dpcomm {

inline void check_cuda(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // it has been seen: the next call must not report it again
  Error error(Code::cuda,
              std::string(what) + ": " + cudaGetErrorString(status) + " (" + cudaGetErrorName(status) + ")");
  error.errnum = int(status);  // a cudaError_t, for who must tell them apart
  throw error;
}

// device.cpp
bool is_capturing(cudaStream_t stream);
int attribute(cudaDeviceAttr name, int device);
int threads_of(const void* kernel, int device);  // of a CTA, at most. Error(version): built for other GPUs
// Those that `find` has for a dtype, codec and algorithm of the core.
std::vector<const void*> kernels_of(const void* (*find)(Dtype, CodecKind, Algorithm));

// Elements of plain data in the memory of the current device, zero at first.
template <class T>
class DeviceArray {
 public:
  explicit DeviceArray(size_t count) : count_(count) {
    void* p = nullptr;
    check_cuda(cudaMalloc(&p, bytes()), "cudaMalloc");
    data_.reset(static_cast<T*>(p));
    check_cuda(cudaMemset(p, 0, bytes()), "cudaMemset");
  }
  explicit DeviceArray(const std::vector<T>& host) : DeviceArray(host.size()) { write(data(), host); }

  T* data() const { return data_.get(); }
  std::vector<T> read() const {
    std::vector<T> host(count_);
    check_cuda(cudaMemcpy(host.data(), data(), bytes(), cudaMemcpyDeviceToHost), "cudaMemcpy from the device");
    return host;
  }
  template <class U>
  static void write(T* to, const std::vector<U>& host) {
    check_cuda(cudaMemcpy(to, host.data(), host.size() * sizeof(U), cudaMemcpyHostToDevice),
               "cudaMemcpy to the device");
    check_cuda(cudaStreamSynchronize(nullptr), "cudaStreamSynchronize");  // it may return before the data have arrived
  }

 private:
  struct Free {
    void operator()(T* p) const { cudaFree(p); }  // an error here was reported by the call that caused it
  };
  size_t bytes() const { return count_ * sizeof(T); }

  size_t count_;
  std::unique_ptr<T, Free> data_;
};

// The device of the calling thread, put back at the end. Put back is the driver's context, if there was one: naming the
// device again with cudaSetDevice would make one there, some hundred MiB, on the first GPU for every rank of a host.
class CurrentDevice {
 public:
  explicit CurrentDevice(int device) {
    check_cuda(cudaGetDevice(&before_), "cudaGetDevice");
    if (before_ == device) return;
    const Driver& driver = Driver::get();
    changed_ = true;
    saved_ = driver.get_context && driver.get_context(&context_) == 0;
    check_cuda(cudaSetDevice(device), "cudaSetDevice");
  }
  ~CurrentDevice() {
    if (!changed_) return;
    if (saved_)
      Driver::get().set_context(context_);
    else
      cudaSetDevice(before_);
  }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

 private:
  // Two functions of libcuda, which is not linked. Both have been the same since CUDA 4.0.
  struct Driver {
    int (*get_context)(void**) = nullptr;
    int (*set_context)(void*) = nullptr;

    static const Driver& get() {
      static const Driver driver = [] {
        Driver d;
        void *get = nullptr, *set = nullptr;
        cudaDriverEntryPointQueryResult found{};
        const auto ask = [&](const char* name, void** to) {
          return cudaGetDriverEntryPointByVersion(name, to, 4000, cudaEnableDefault, &found) == cudaSuccess &&
                 found == cudaDriverEntryPointSuccess && *to;
        };
        if (ask("cuCtxGetCurrent", &get) && ask("cuCtxSetCurrent", &set)) {
          d.get_context = reinterpret_cast<int (*)(void**)>(get);
          d.set_context = reinterpret_cast<int (*)(void*)>(set);
        }
        cudaGetLastError();
        return d;
      }();
      return driver;
    }
  };

  int before_ = 0;
  bool changed_ = false, saved_ = false;
  void* context_ = nullptr;
};

}  // namespace dpcomm
