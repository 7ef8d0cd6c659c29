// Device memory, pinned and registered host memory. A piece of device memory is a memfd, so that other processes can
// map it, between two pages that nobody may touch; what it has of its last page beyond its size is checked when it is
// freed.
#include "memory.h"

#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>

namespace stand_in {
namespace {

constexpr unsigned char kFresh = 0xcb;  // as a float or a half: a large negative number
constexpr unsigned char kTail = 0xa5;
constexpr size_t kFilled = size_t{4} << 20;  // of fresh memory; the rest would only cost time
constexpr size_t kRemembered = 4096;         // freed pieces; each is a mapping, of which a process may have 65530

char* map_between_guards(int fd, size_t bytes) {
  char* all = static_cast<char*>(mmap(nullptr, bytes + 2 * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (all == MAP_FAILED) die("mmap of %zu bytes: %s", bytes, std::strerror(errno));
  void* base = mmap(all + kPage, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0);
  if (base == MAP_FAILED) die("mmap of %zu bytes: %s", bytes, std::strerror(errno));
  madvise(base, bytes, MADV_DONTFORK);  // a forked child has no device memory
  return all + kPage;
}

Piece make_device_memory(size_t bytes) {
  const size_t mapped = whole_pages(bytes);
  Piece piece{Kind::device, nullptr, bytes, current_device()};
  piece.fd = memfd_create("stand-in device memory", MFD_CLOEXEC);
  if (piece.fd < 0 || ftruncate(piece.fd, off_t(mapped + kPage)) != 0) die("memfd_create: %s", std::strerror(errno));
  piece.base = map_between_guards(piece.fd, mapped);
  void* last = mmap(nullptr, kPage, PROT_READ | PROT_WRITE, MAP_SHARED, piece.fd, off_t(mapped));
  if (last == MAP_FAILED) die("mmap: %s", std::strerror(errno));
  piece.importers = static_cast<Importers*>(last);
  std::memset(piece.base, kFresh, std::min(bytes, kFilled));
  std::memset(piece.base + bytes, kTail, mapped - bytes);
  return piece;
}

// A zombie has closed everything.
bool is_alive(uint32_t pid) {
  char path[64], text[512] = {};
  std::snprintf(path, sizeof path, "/proc/%u/stat", pid);
  std::FILE* file = std::fopen(path, "re");
  if (!file) return false;
  const size_t got = std::fread(text, 1, sizeof text - 1, file);
  std::fclose(file);
  const char* name_end = got ? std::strrchr(text, ')') : nullptr;
  return name_end && name_end[2] != 'Z' && name_end[2] != 'X';
}

void check_importers(const Piece& piece) {
  for (uint32_t& word : piece.importers->pids) {
    const uint32_t pid = __atomic_load_n(&word, __ATOMIC_ACQUIRE);
    if (pid == 0 || !is_alive(pid)) continue;
    if (!machine().allow_free_while_imported)
      die("cudaFree of memory that process %u has imported and not closed", pid);
    ++counters().freed_while_imported;
  }
}

void free_device_memory(Piece& piece) {
  check_importers(piece);
  const size_t mapped = whole_pages(piece.bytes);
  for (size_t i = piece.bytes; i < mapped; ++i)
    if (static_cast<unsigned char>(piece.base[i]) != kTail)
      die("cudaFree: somebody wrote %zu bytes behind the end of %zu bytes", i - piece.bytes + 1, piece.bytes);
  munmap(piece.importers, kPage);
  close(piece.fd);
  reserve_gone(piece.base, mapped);
  memory().used[size_t(piece.device)] -= piece.bytes;
  --counters().allocations;
}

cudaError_t allocate_pinned(void** address, size_t bytes) {
  if (!address || bytes == 0) return cudaErrorInvalidValue;
  if (posix_memalign(address, kPage, bytes) != 0) return cudaErrorMemoryAllocation;
  std::unique_lock lock(state().mutex);
  memory().pieces[uintptr_t(*address)] = {Kind::pinned, static_cast<char*>(*address), bytes, current_device()};
  ++counters().host_allocations;
  return cudaSuccess;
}

// Of a kind, that begins exactly there; null: none.
Piece* piece_at(const void* address, Kind kind) {
  const auto found = memory().pieces.find(uintptr_t(address));
  return found != memory().pieces.end() && found->second.kind == kind ? &found->second : nullptr;
}

bool overlaps(const char* address, size_t bytes) {
  const auto next = memory().pieces.lower_bound(uintptr_t(address));
  return find_piece(address) || (next != memory().pieces.end() && next->first < uintptr_t(address) + bytes);
}

bool is_gone(const void* address) {
  auto next = memory().gone.upper_bound(uintptr_t(address));
  return next != memory().gone.begin() && (--next, uintptr_t(address) < next->first + next->second);
}

}  // namespace

Memory& memory() {
  static Memory* const only = new Memory;
  return *only;
}

Piece* find_piece(const void* address) {
  auto next = memory().pieces.upper_bound(uintptr_t(address));
  if (next == memory().pieces.begin()) return nullptr;
  Piece& piece = (--next)->second;
  return uintptr_t(address) < uintptr_t(piece.base) + piece.bytes ? &piece : nullptr;
}

void reserve_gone(char* base, size_t bytes) {
  Memory& m = memory();
  if (mmap(base, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED)
    die("mmap: %s", std::strerror(errno));
  m.gone[uintptr_t(base)] = bytes;
  m.oldest.push_back(uintptr_t(base));
  if (m.oldest.size() <= kRemembered) return;
  const auto first = m.gone.find(m.oldest.front());
  munmap(reinterpret_cast<void*>(first->first - kPage), first->second + 2 * kPage);
  m.gone.erase(first);
  m.oldest.pop_front();
}

bool check_range(const char* name, const void* address, size_t bytes, bool ordinary, Kind* kind) {
  std::unique_lock lock(state().mutex);
  const Piece* piece = find_piece(address);
  if (!piece) {
    if (is_gone(address)) die("%s: %p was freed", name, address);
    if (overlaps(static_cast<const char*>(address), bytes))
      die("%s: %p + %zu runs into other memory", name, address, bytes);
    if (!ordinary) die("%s: %p is neither device nor registered memory", name, address);
    return false;
  }
  const size_t left = size_t(piece->base + piece->bytes - static_cast<const char*>(address));
  if (bytes > left) die("%s: %p + %zu is %zu bytes past the end of its memory", name, address, bytes, bytes - left);
  if (kind) *kind = piece->kind;
  return true;
}

void adopt_memory(void* address, size_t bytes, int device) {
  std::unique_lock lock(state().mutex);
  if (overlaps(static_cast<char*>(address), bytes)) die("adopt_memory: %p is known already", address);
  memory().pieces[uintptr_t(address)] = {Kind::adopted, static_cast<char*>(address), bytes, device};
}

void forget_memory(void* address) {
  std::unique_lock lock(state().mutex);
  if (!piece_at(address, Kind::adopted)) die("forget_memory: %p was not adopted", address);
  memory().pieces.erase(uintptr_t(address));
}

}  // namespace stand_in

using namespace stand_in;

cudaError_t cudaMalloc(void** address, size_t bytes) {
  ++counters().malloc_calls;
  return call("cudaMalloc", Rule::unsafe, [&] {
    if (!address) return cudaErrorInvalidValue;
    *address = nullptr;
    if (bytes == 0) return cudaSuccess;
    std::unique_lock lock(state().mutex);
    size_t& used = memory().used[size_t(current_device())];
    if (bytes > machine().memory_bytes || used > machine().memory_bytes - bytes) return cudaErrorMemoryAllocation;
    used += bytes;
    const Piece piece = make_device_memory(bytes);
    memory().pieces[uintptr_t(piece.base)] = piece;
    ++counters().allocations;
    *address = piece.base;
    return cudaSuccess;
  });
}

cudaError_t cudaFree(void* address) {
  return call("cudaFree", Rule::unsafe, [&] {
    if (!address) return cudaSuccess;
    const cudaError_t error = drain(-1);
    if (error != cudaSuccess) return error;
    std::unique_lock lock(state().mutex);
    if (memory().gone.count(uintptr_t(address))) die("cudaFree: %p was freed before", address);
    Piece* piece = piece_at(address, Kind::device);
    if (!piece) die("cudaFree: %p does not come from cudaMalloc", address);
    free_device_memory(*piece);
    memory().pieces.erase(uintptr_t(address));
    return cudaSuccess;
  });
}

cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  return call("cudaMemGetInfo", Rule::plain, [&] {
    std::unique_lock lock(state().mutex);
    *total = machine().memory_bytes;
    *free = *total - memory().used[size_t(current_device())];
    return cudaSuccess;
  });
}

cudaError_t cudaHostAlloc(void** address, size_t bytes, unsigned) {
  return call("cudaHostAlloc", Rule::unsafe, [&] { return allocate_pinned(address, bytes); });
}

cudaError_t cudaMallocHost(void** address, size_t bytes) {
  return call("cudaMallocHost", Rule::unsafe, [&] { return allocate_pinned(address, bytes); });
}

cudaError_t cudaFreeHost(void* address) {
  return call("cudaFreeHost", Rule::unsafe, [&] {
    if (!address) return cudaSuccess;
    const cudaError_t error = drain(-1);
    if (error != cudaSuccess) return error;
    std::unique_lock lock(state().mutex);
    if (!piece_at(address, Kind::pinned)) die("cudaFreeHost: %p does not come from cudaHostAlloc", address);
    memory().pieces.erase(uintptr_t(address));
    std::free(address);
    --counters().host_allocations;
    return cudaSuccess;
  });
}

cudaError_t cudaHostRegister(void* address, size_t bytes, unsigned) {
  return call("cudaHostRegister", Rule::unsafe, [&] {
    const cudaError_t planted = machine().host_register;
    if (planted != cudaSuccess) return planted;
    if (!address || bytes == 0) return cudaErrorInvalidValue;
    std::unique_lock lock(state().mutex);
    if (overlaps(static_cast<char*>(address), bytes)) return cudaErrorHostMemoryAlreadyRegistered;
    memory().pieces[uintptr_t(address)] = {Kind::registered, static_cast<char*>(address), bytes, current_device()};
    ++counters().registrations;
    return cudaSuccess;
  });
}

cudaError_t cudaHostUnregister(void* address) {
  return call("cudaHostUnregister", Rule::unsafe, [&] {
    const cudaError_t error = drain(-1);
    if (error != cudaSuccess) return error;
    std::unique_lock lock(state().mutex);
    if (!piece_at(address, Kind::registered)) return cudaErrorHostMemoryNotRegistered;
    memory().pieces.erase(uintptr_t(address));
    --counters().registrations;
    return cudaSuccess;
  });
}

cudaError_t cudaHostGetDevicePointer(void** device, void* host, unsigned flags) {
  return call("cudaHostGetDevicePointer", Rule::plain, [&] {
    std::unique_lock lock(state().mutex);
    const Piece* piece = find_piece(host);
    if (flags || !piece || (piece->kind != Kind::registered && piece->kind != Kind::pinned))
      return cudaErrorInvalidValue;
    *device = host;
    return cudaSuccess;
  });
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* address) {
  return call("cudaPointerGetAttributes", Rule::plain, [&] {
    std::unique_lock lock(state().mutex);
    const Piece* piece = find_piece(address);
    void* const here = const_cast<void*>(address);
    *attributes = {};
    attributes->type = cudaMemoryTypeUnregistered;
    attributes->device = cudaInvalidDeviceId;
    attributes->hostPointer = here;
    if (!piece) return cudaSuccess;
    const bool host = piece->kind == Kind::pinned || piece->kind == Kind::registered;
    attributes->type = host ? cudaMemoryTypeHost : cudaMemoryTypeDevice;
    attributes->device = piece->device;
    attributes->devicePointer = here;
    attributes->hostPointer = host ? here : nullptr;
    return cudaSuccess;
  });
}
