// Copies and fills. What they touch is checked when they are asked for, and again when they run.
#include <cstring>

#include "state.h"

namespace stand_in {
namespace {

struct Copy {
  const char* name;
  void* to;
  const void* from;
  size_t bytes;
  bool known_to, known_from;  // device or registered memory
  std::shared_ptr<std::vector<char>> staged;

  void operator()() const {
    check_range(name, to, bytes, !known_to);
    if (!staged) check_range(name, from, bytes, !known_from);
    std::memmove(to, staged ? staged->data() : from, bytes);
  }
};

bool is_host(bool known, Kind kind) { return !known || kind == Kind::pinned || kind == Kind::registered; }

// The direction must fit the memory.
cudaError_t prepare(Copy& copy, cudaMemcpyKind kind) {
  const bool any = kind == cudaMemcpyDefault;
  if (kind < cudaMemcpyHostToHost || kind > cudaMemcpyDefault) return cudaErrorInvalidMemcpyDirection;
  const bool to_host = kind == cudaMemcpyHostToHost || kind == cudaMemcpyDeviceToHost;
  const bool from_host = kind == cudaMemcpyHostToHost || kind == cudaMemcpyHostToDevice;
  Kind kind_to{}, kind_from{};
  copy.known_to = check_range(copy.name, copy.to, copy.bytes, any || to_host, &kind_to);
  copy.known_from = check_range(copy.name, copy.from, copy.bytes, any || from_host, &kind_from);
  if (any) return cudaSuccess;
  if ((to_host && !is_host(copy.known_to, kind_to)) || (from_host && !is_host(copy.known_from, kind_from)))
    return cudaErrorInvalidValue;
  return cudaSuccess;
}

bool captures(cudaStream_t handle) {
  std::unique_lock lock(state().mutex);
  const Stream* stream = find_stream(handle);
  return stream && stream->capture;
}

// Pageable memory goes through a buffer of the runtime's, as in cudart: it may change as soon as the call is back, and
// what is copied to it is there by then.
cudaError_t copy_async(Copy copy, cudaMemcpyKind kind, cudaStream_t stream, bool wait) {
  if (copy.bytes == 0) return cudaSuccess;
  const cudaError_t error = prepare(copy, kind);
  if (error != cudaSuccess) return error;
  if (!captures(stream)) {
    wait |= !copy.known_to;
    if (!copy.known_from) {
      const char* from = static_cast<const char*>(copy.from);
      copy.staged = std::make_shared<std::vector<char>>(from, from + copy.bytes);
    }
  }
  return wait ? submit_and_wait(stream, {copy.name, copy, {}}) : submit(stream, {copy.name, copy, {}});
}

cudaError_t fill(const char* name, void* to, int value, size_t bytes, cudaStream_t stream) {
  if (bytes == 0) return cudaSuccess;
  check_range(name, to, bytes, false);
  return submit(stream, {name,
                         [=] {
                           check_range(name, to, bytes, false);
                           std::memset(to, value, bytes);
                         },
                         {}});
}

// Device to device is the one direction in which cudaMemcpy does not wait.
bool on_device(const void* to, const void* from, cudaMemcpyKind kind) {
  if (kind != cudaMemcpyDefault) return kind == cudaMemcpyDeviceToDevice;
  Kind kind_to{}, kind_from{};
  const bool known_to = check_range("cudaMemcpy", to, 1, true, &kind_to);
  const bool known_from = check_range("cudaMemcpy", from, 1, true, &kind_from);
  return !is_host(known_to, kind_to) && !is_host(known_from, kind_from);
}

}  // namespace
}  // namespace stand_in

using namespace stand_in;

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  return call("cudaMemcpy", Rule::unsafe, [&] {
    return copy_async({"cudaMemcpy", to, from, bytes, false, false, {}}, kind, cudaStreamLegacy,
                      bytes > 0 && !on_device(to, from, kind));
  });
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  return call("cudaMemcpyAsync", Rule::plain,
              [&] { return copy_async({"cudaMemcpyAsync", to, from, bytes, false, false, {}}, kind, stream, false); });
}

// Asynchronous, like the real one: a stream with cudaStreamNonBlocking may overtake it.
cudaError_t cudaMemset(void* to, int value, size_t bytes) {
  return call("cudaMemset", Rule::unsafe, [&] { return fill("cudaMemset", to, value, bytes, cudaStreamLegacy); });
}

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  return call("cudaMemsetAsync", Rule::plain, [&] { return fill("cudaMemsetAsync", to, value, bytes, stream); });
}
