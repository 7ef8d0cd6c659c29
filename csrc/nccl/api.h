// The part of NCCL's C interface that dpcomm uses, declared here so that building needs no NCCL and one build serves
// every version from kLeastVersion on. tests/test_nccl_library.py compares values, sizes and signatures with nccl.h.
#pragma once
#include <climits>
#include <cstddef>

struct CUstream_st;

namespace dpcomm::nccl {

constexpr int kLeastVersion = 21800;  // 2.18.0: ncclCommInitRankConfig and non-blocking communicators that abort well

using Comm = struct ncclComm*;
using Stream = CUstream_st*;

struct UniqueId {
  char internal[128];
};

enum class Result : int {
  success = 0,
  unhandled_cuda_error = 1,
  system_error = 2,
  internal_error = 3,
  invalid_argument = 4,
  invalid_usage = 5,
  remote_error = 6,
  in_progress = 7,
};

enum class DataType : int {
  int8 = 0,
  uint8 = 1,
  int32 = 2,
  uint32 = 3,
  int64 = 4,
  uint64 = 5,
  float16 = 6,
  float32 = 7,
  float64 = 8,
  bfloat16 = 9,
};

enum class RedOp : int { sum = 0, prod = 1, max = 2, min = 3, avg = 4 };

// The beginning of ncclConfig_t, as it was in 2.14: a library reads as many members as the size and the version given
// here promise, and takes its own defaults for the rest.
struct Config {
  size_t size = sizeof(Config);
  unsigned magic = 0xcafebeef;
  unsigned version = 21400;  // NCCL_VERSION(2, 14, 0)
  int blocking = INT_MIN;    // NCCL_CONFIG_UNDEF_INT
};

// Names as in nccl.h, without the prefix "nccl".
struct Api {
  Result (*GetVersion)(int* version);
  Result (*GetUniqueId)(UniqueId* id);
  Result (*CommInitRankConfig)(Comm* comm, int nranks, UniqueId id, int rank, Config* config);
  Result (*CommFinalize)(Comm comm);
  Result (*CommDestroy)(Comm comm);
  Result (*CommAbort)(Comm comm);
  Result (*CommGetAsyncError)(Comm comm, Result* error);
  const char* (*GetErrorString)(Result result);
  const char* (*GetLastError)(Comm comm);
  Result (*GroupStart)();
  Result (*GroupEnd)();
  Result (*Send)(const void* from, size_t count, DataType type, int peer, Comm comm, Stream stream);
  Result (*Recv)(void* to, size_t count, DataType type, int peer, Comm comm, Stream stream);
  Result (*AllReduce)(const void* from, void* to, size_t count, DataType type, RedOp op, Comm comm, Stream stream);
};

}  // namespace dpcomm::nccl
