// What is known of memory: the pieces that exist, and where some were that are gone.
#pragma once
#include "state.h"

namespace stand_in {

// In the last page of a piece of device memory's file, which importers map too. Pids, not a count: a process that was
// killed has nothing open.
struct Importers {
  static constexpr int kMost = 512;
  uint32_t pids[kMost];  // 0: free
};

struct Piece {
  Kind kind;
  char* base;
  size_t bytes;
  int device;                      // ordinal here
  int fd = -1;                     // device: what others map
  Importers* importers = nullptr;  // device, imported
  uint64_t inode = 0;              // imported: which file
  int opened = 0;                  // imported: times
};

// All under the mutex of the state.
struct Memory {
  std::map<uintptr_t, Piece> pieces;        // by base
  std::map<uintptr_t, size_t> gone;         // device memory that was freed: reserved, so that using it is a fault
  std::deque<uintptr_t> oldest;             // of those
  std::array<size_t, kMostDevices> used{};  // bytes
};
Memory& memory();

constexpr size_t kPage = 4096;
inline size_t whole_pages(size_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

Piece* find_piece(const void* address);  // that contains it; null: none
void reserve_gone(char* base, size_t bytes);
void unmap_importers(Piece& piece);

}  // namespace stand_in
