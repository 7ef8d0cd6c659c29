// A stand-in for libnccl.so.2: the functions of csrc/nccl/api.h with NCCL's ABI, for ranks that are threads of one
// process on the stand-in CUDA runtime (tests/cpp/stand_in). It is a shared library that is loaded at run time; the
// program, or an extension that it has loaded, holds the runtime (runtime.h says how the two meet).
//
// Faithful where an engine could come to depend on it: communicators are joined by id; a group is one operation of its
// stream, its sends and receives progress together and are matched in order between two ranks, and a stream waits until
// both sides are there; the operations of one communicator run in the order in which they were enqueued, whatever their
// streams; peers connect when they first talk; a non-blocking communicator says in_progress and must not be used until
// it says success; what does not match (sizes, types, a rank that is missing) hangs until ncclCommAbort; an error
// that came later is kept and returned by every call; destroying and aborting wait until the graphs that captured the
// communicator are gone.
//
// Not faithful: no timing; a send is never buffered; one communicator and one stream in a group; no in-place overlap is
// refused; which rank a ring starts at (sums are in rank order).
//
// Misuse that NCCL answers with undefined behaviour or with an error that only a wrong program sees ends the process,
// with a line on stderr. So does every wait that lasts longer than the knob deadline_s.
#pragma once
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

// Knobs, which keep their value until they are set again. Rank -1: of all ranks, which is the only choice where no rank
// is named below. Anything else that is no knob ends the process.
//   version                    what ncclGetVersion says (22703)
//   deadline_s                 how long a call or an operation may wait (60)
//   every_group_in_background  1: GroupEnd of a non-blocking communicator always says in_progress, as NCCL 2.27 and
//                              newer; 0: only where peers connect, as NCCL 2.18 (1)
//   refuse_shared_device       1: two ranks on one device are invalid usage, as before NCCL 2.30.3 (0)
//   graphs_hold                1: destroying and aborting wait for graphs that captured the communicator (1)
//   fail_init, of a rank       the ncclResult_t that its next communicators come to (0: they do well)
//   lose_messages, of a rank   how many of its next messages do not arrive, -1: all. Nothing arrives behind one that
//                              is lost; the sender does not notice, but for an all-reduce, which hangs (0)
//   abort_hangs_s, of a rank   how long ncclCommAbort does nothing, -1: until it is set again (0)
// At first use: the environment variable STAND_IN_NCCL, pairs knob=value or knob@rank=value with commas between.
extern "C" void stand_in_nccl_set(const char* knob, int rank, int64_t value);
extern "C" void stand_in_nccl_reset();  // all knobs, to the values above

// The communicators that a rank has now come to an error: ncclCommGetAsyncError and every call say it, and what has not
// moved by now never does.
extern "C" void stand_in_nccl_fail(int rank, int result, const char* last_error);

// What has happened so far, of a rank or (-1) of all:
//   inits  aborts  groups  sends  receives  all_reduces  bytes (of sends, arrived)  lost (messages)
//   background_groups (GroupEnd said in_progress)  late_replays (by a graph, of a communicator that was aborted)
// and comms: communicators that exist now.
extern "C" int64_t stand_in_nccl_count(const char* counter, int rank);

namespace stand_in_nccl {

// The functions above, of a library that is loaded.
struct Control {
  decltype(&stand_in_nccl_set) set;
  decltype(&stand_in_nccl_reset) reset;
  decltype(&stand_in_nccl_fail) fail;
  decltype(&stand_in_nccl_count) count;
};

inline Control control_of(const char* path) {
  void* library = dlopen(path, RTLD_NOW | RTLD_NOLOAD);
  const auto find = [&](auto& function, const char* name) {
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(library ? dlsym(library, name) : nullptr);
    if (function) return;
    std::fprintf(stderr, "%s is not loaded, or has no %s\n", path, name);
    std::abort();
  };
  Control control{};
  find(control.set, "stand_in_nccl_set");
  find(control.reset, "stand_in_nccl_reset");
  find(control.fail, "stand_in_nccl_fail");
  find(control.count, "stand_in_nccl_count");
  return control;
}

}  // namespace stand_in_nccl
