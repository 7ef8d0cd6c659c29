// Peer access, and device memory of other processes: a handle names a file of /proc that the opener maps.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "memory.h"

namespace stand_in {
namespace {

struct Ticket {
  static constexpr uint64_t kMagic = 0x6e692d646e617473;  // "stand-in"
  uint64_t magic;
  int32_t pid, fd, physical, reserved;
  uint64_t inode, bytes;
};
static_assert(sizeof(Ticket) <= sizeof(cudaIpcMemHandle_t));

bool exists(int device) { return device >= 0 && device < machine().devices; }
bool says(int from, int to) { return machine().says[size_t(physical_device(from))][size_t(physical_device(to))]; }

std::set<std::pair<int, int>>& enabled() {
  static auto* const only = new std::set<std::pair<int, int>>;
  return *only;
}

int ordinal_of(int physical) {
  for (int device = 0; device < machine().devices; ++device)
    if (physical_device(device) == physical) return device;
  return -1;  // not visible here
}

void announce(Importers& importers, uint32_t from, uint32_t to) {
  for (uint32_t& word : importers.pids) {
    uint32_t expected = from;
    if (__atomic_compare_exchange_n(&word, &expected, to, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) return;
  }
  if (to != 0) die("cudaIpcOpenMemHandle: more than %d processes have it open", Importers::kMost);
}

// A copy that nothing more arrives in, or leaves.
void* map_private_copy(int fd, size_t bytes) {
  void* original = mmap(nullptr, bytes, PROT_READ, MAP_SHARED, fd, 0);
  void* copy = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (original == MAP_FAILED || copy == MAP_FAILED) die("mmap: %s", std::strerror(errno));
  for (size_t i = 0; i < bytes / sizeof(uint64_t); ++i)  // others write meanwhile
    static_cast<uint64_t*>(copy)[i] = __atomic_load_n(static_cast<uint64_t*>(original) + i, __ATOMIC_RELAXED);
  munmap(original, bytes);
  return copy;
}

// Maps what the ticket names. -1 or a descriptor of another file: it is gone.
cudaError_t open_ticket(const Ticket& ticket, Piece& piece) {
  char path[64];
  std::snprintf(path, sizeof path, "/proc/%d/fd/%d", ticket.pid, ticket.fd);
  const int fd = open(path, O_RDWR | O_CLOEXEC);
  if (fd < 0) return cudaErrorInvalidResourceHandle;
  const size_t mapped = whole_pages(ticket.bytes);
  struct stat status{};
  if (fstat(fd, &status) != 0 || status.st_ino != ticket.inode || size_t(status.st_size) != mapped + kPage) {
    close(fd);
    return cudaErrorInvalidResourceHandle;
  }
  const auto mine = size_t(physical_device(current_device()));
  const bool arrives = machine().holds[mine][size_t(ticket.physical)];
  void* base =
      arrives ? mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0) : map_private_copy(fd, mapped);
  void* last = mmap(nullptr, kPage, PROT_READ | PROT_WRITE, MAP_SHARED, fd, off_t(mapped));
  if (base == MAP_FAILED || last == MAP_FAILED) die("mmap: %s", std::strerror(errno));
  close(fd);
  madvise(base, mapped, MADV_DONTFORK);
  const int device = ordinal_of(ticket.physical);
  piece = {Kind::imported, static_cast<char*>(base), ticket.bytes, device < 0 ? current_device() : device};
  piece.importers = static_cast<Importers*>(last);
  piece.inode = ticket.inode;
  piece.opened = 1;
  announce(*piece.importers, 0, uint32_t(getpid()));
  return cudaSuccess;
}

Piece* find_imported(uint64_t inode) {
  for (auto& [base, piece] : memory().pieces)
    if (piece.kind == Kind::imported && piece.inode == inode) return &piece;
  return nullptr;
}

void leave(Piece& piece) {
  announce(*piece.importers, uint32_t(getpid()), 0);
  munmap(piece.importers, kPage);
}

}  // namespace

void release_imports() {
  std::unique_lock lock(state().mutex);
  for (auto& [base, piece] : memory().pieces)
    if (piece.kind == Kind::imported) leave(piece);
}

}  // namespace stand_in

using namespace stand_in;

cudaError_t cudaDeviceCanAccessPeer(int* can, int device, int peer) {
  return call("cudaDeviceCanAccessPeer", Rule::asks, [&] {
    if (!exists(device) || !exists(peer)) return cudaErrorInvalidDevice;
    *can = device != peer && says(device, peer);
    return cudaSuccess;
  });
}

cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned flags) {
  return call("cudaDeviceEnablePeerAccess", Rule::unsafe, [&] {
    const int device = current_device();
    if (flags) return cudaErrorInvalidValue;
    if (!exists(peer) || peer == device) return cudaErrorInvalidDevice;
    if (!says(device, peer)) return cudaErrorPeerAccessUnsupported;
    std::unique_lock lock(state().mutex);
    return enabled().insert({device, peer}).second ? cudaSuccess : cudaErrorPeerAccessAlreadyEnabled;
  });
}

cudaError_t cudaDeviceDisablePeerAccess(int peer) {
  return call("cudaDeviceDisablePeerAccess", Rule::unsafe, [&] {
    if (!exists(peer)) return cudaErrorInvalidDevice;
    std::unique_lock lock(state().mutex);
    return enabled().erase({current_device(), peer}) ? cudaSuccess : cudaErrorPeerAccessNotEnabled;
  });
}

// Of the whole piece, wherever in it the address points, as from cudart.
cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t* handle, void* address) {
  return call("cudaIpcGetMemHandle", Rule::unsafe, [&] {
    const cudaError_t planted = machine().ipc_get;
    if (planted != cudaSuccess) return planted;
    std::unique_lock lock(state().mutex);
    const Piece* piece = find_piece(address);
    struct stat status{};
    if (!handle || !piece || piece->kind != Kind::device || fstat(piece->fd, &status) != 0)
      return cudaErrorInvalidValue;
    const Ticket ticket{Ticket::kMagic, getpid(),    piece->fd, physical_device(piece->device), 0,
                        status.st_ino,  piece->bytes};
    std::memset(handle, 0, sizeof *handle);
    std::memcpy(handle, &ticket, sizeof ticket);
    return cudaSuccess;
  });
}

cudaError_t cudaIpcOpenMemHandle(void** address, cudaIpcMemHandle_t handle, unsigned flags) {
  return call("cudaIpcOpenMemHandle", Rule::unsafe, [&] {
    const cudaError_t planted = machine().ipc_open;
    if (planted != cudaSuccess) return planted;
    if (!address || flags != cudaIpcMemLazyEnablePeerAccess) return cudaErrorInvalidValue;
    Ticket ticket;
    std::memcpy(&ticket, &handle, sizeof ticket);
    if (ticket.magic != Ticket::kMagic) return cudaErrorInvalidResourceHandle;
    if (ticket.pid == getpid()) return cudaErrorDeviceUninitialized;
    if (!machine().says[size_t(physical_device(current_device()))][size_t(ticket.physical)])
      return cudaErrorPeerAccessUnsupported;
    std::unique_lock lock(state().mutex);
    Piece* known = find_imported(ticket.inode);
    if (known) {
      ++known->opened;
      *address = known->base;
      return cudaSuccess;
    }
    Piece piece{};
    const cudaError_t error = open_ticket(ticket, piece);
    if (error != cudaSuccess) return error;
    memory().pieces[uintptr_t(piece.base)] = piece;
    ++counters().imports;
    *address = piece.base;
    return cudaSuccess;
  });
}

cudaError_t cudaIpcCloseMemHandle(void* address) {
  return call("cudaIpcCloseMemHandle", Rule::unsafe, [&] {
    const cudaError_t error = drain(-1);
    if (error != cudaSuccess) return error;
    std::unique_lock lock(state().mutex);
    Memory& m = memory();
    const auto found = m.pieces.find(uintptr_t(address));
    if (found == m.pieces.end() || found->second.kind != Kind::imported)
      die("cudaIpcCloseMemHandle: %p does not come from cudaIpcOpenMemHandle, or was closed", address);
    Piece& piece = found->second;
    if (--piece.opened > 0) return cudaSuccess;
    leave(piece);
    munmap(piece.base, whole_pages(piece.bytes));
    m.pieces.erase(found);
    --counters().imports;
    return cudaSuccess;
  });
}
