// Finds libnccl.so.2 at run time. One copy serves the process: two would each have threads, shared memory and sockets
// of their own, and a communicator of one means nothing to the other.
#pragma once
#include <string>
#include <vector>

#include "../error.h"
#include "api.h"

namespace dpcomm::nccl {

struct Library {
  Api api{};
  int version = 0;   // 23203 for 2.32.3
  std::string path;  // of the file
  std::string how;   // "loaded already", "wheel", "system", or "DPCOMM_NCCL_LIBRARY"
};

// Where to look beyond what the process has loaded, in order; an empty path is not tried.
struct Places {
  std::string asked;                // DPCOMM_NCCL_LIBRARY: this one, or an error
  std::vector<std::string> wheels;  // libnccl.so.2 of installed wheels
};

// The first call that succeeds decides for the process; any thread may call. Error(version): none is found, the one
// found is older than kLeastVersion or lacks a function, or places.asked is not the copy that is loaded already.
const Library& find_library(const Places& places);
const Library* found_library();  // null: find_library() has not succeeded yet

std::string version_text(int version);  // "2.32.3"

// Of a function that answered neither `success` nor `in_progress`: NCCL's words for the result and the reason it kept.
// CUDA, RESOURCE or PEER_LOST where NCCL blames those, else INTERNAL.
Error nccl_error(const Library& library, const std::string& function, Result result, Comm comm = nullptr);

}  // namespace dpcomm::nccl
