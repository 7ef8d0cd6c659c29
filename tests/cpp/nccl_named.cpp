// A library with NCCL's names, for the tests of finding one. It knows its version and does nothing. NAMED_VERSION: what
// it says; NAMED_RESULT: what it answers to the wish for a communicator. -DncclSend=other takes a function away.
#include "nccl/api.h"

using namespace dpcomm::nccl;

extern "C" {
Result ncclGetVersion(int* version) {
  *version = NAMED_VERSION;
  return NAMED_VERSION < 0 ? Result::internal_error : Result::success;
}
Result ncclGetUniqueId(UniqueId* id) {
  *id = {};
  return Result(NAMED_RESULT);
}
Result ncclCommInitRankConfig(Comm*, int, UniqueId, int, Config*) { return Result(NAMED_RESULT); }
Result ncclCommFinalize(Comm) { return Result::success; }
Result ncclCommDestroy(Comm) { return Result::success; }
Result ncclCommAbort(Comm) { return Result::success; }
Result ncclCommGetAsyncError(Comm, Result* error) { return *error = Result::success; }
const char* ncclGetErrorString(Result) { return "its word"; }
const char* ncclGetLastError(Comm) { return NAMED_RESULT == 2 ? "" : "its reason"; }
Result ncclGroupStart() { return Result::success; }
Result ncclGroupEnd() { return Result::success; }
Result ncclSend(const void*, size_t, DataType, int, Comm, Stream) { return Result::success; }
Result ncclRecv(void*, size_t, DataType, int, Comm, Stream) { return Result::success; }
Result ncclAllReduce(const void*, void*, size_t, DataType, RedOp, Comm, Stream) { return Result::success; }
}
