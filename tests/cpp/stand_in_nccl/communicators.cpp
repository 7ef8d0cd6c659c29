// Communicators: ids, how ranks join, errors that come later, how they end.
#include <unistd.h>

#include <cstdio>
#include <cstring>

#include "state.h"

namespace stand_in_nccl {
namespace {

constexpr char kMagic[8] = {'s', 't', 'a', 'n', 'd', '-', 'i', 'n'};

// What a unique id holds.
struct Id {
  char magic[8];
  uint64_t pid, number;
};

std::string whose(const Communicator& comm) {
  return "rank " + std::to_string(comm.rank) + " of " + std::to_string(comm.ranks);
}

uint64_t number_of(const UniqueId& unique) {
  Id id;
  std::memcpy(&id, unique.internal, sizeof id);
  if (std::memcmp(id.magic, kMagic, sizeof kMagic) != 0) die("ncclCommInitRankConfig: no id of ncclGetUniqueId");
  if (id.pid != uint64_t(getpid()))
    die("ncclCommInitRankConfig: the id is of process %d: ranks are threads of one process here", int(id.pid));
  return id.number;
}

void join(const Shared& comm, uint64_t id) {
  auto& clique = state().cliques[id];
  if (!clique) {
    clique = std::make_shared<Clique>();
    clique->ranks = comm->ranks;
  }
  if (clique->ranks != comm->ranks)
    die("ncclCommInitRankConfig: %s joins %d ranks", whose(*comm).c_str(), clique->ranks);
  if (!clique->joined.insert({comm->rank, comm->device}).second)
    die("ncclCommInitRankConfig: %s joins twice", whose(*comm).c_str());
  comm->clique = clique;
}

// Another rank is on the device of this one.
void refuse_shared_device(Communicator& comm) {
  for (const auto& [rank, device] : comm.clique->joined) {
    if (rank == comm.rank || device != comm.device) continue;
    char text[128];
    std::snprintf(text, sizeof text, "Duplicate GPU detected : rank %d and rank %d both on CUDA device %x000",
                  comm.rank, rank, unsigned(runtime().physical_device(device)) + 1);
    return set_error(comm, Result::invalid_usage, text);
  }
}

// Waits for the other ranks.
void set_up(Lock& lock, const Shared& comm, uint64_t id) {
  const int64_t planted = knob("fail_init", comm->rank);
  if (planted != 0) set_error(*comm, Result(planted), "planted: initialization fails");
  if (comm->error == Result::success) {
    join(comm, id);
    state().changed.notify_all();
    wait(lock, "ncclCommInitRankConfig: " + whose(*comm) + " waits for the others", [&] {
      return comm->aborted || comm->error != Result::success || int(comm->clique->joined.size()) == comm->ranks;
    });
  }
  if (comm->error == Result::success && !comm->aborted && knob("refuse_shared_device")) refuse_shared_device(*comm);
  comm->pending = false;
  state().changed.notify_all();
}

// It exists no more.
void forget(Communicator& comm) {
  count("comms", comm.rank, -1);
  state().comms.erase(comm.handle);
  state().changed.notify_all();
}

void wait_for_graphs(Lock& lock, const char* call, Communicator& comm) {
  wait(lock, std::string(call) + ": " + whose(comm) + " waits for graphs that captured it",
       [&] { return comm.captured == 0 || !knob("graphs_hold"); });
}

void wait_for_operations(Lock& lock, const char* call, Communicator& comm) {
  wait(lock, std::string(call) + ": " + whose(comm) + " waits for its operations",
       [&] { return comm.aborted || (comm.finished == comm.enqueued && comm.running == 0); });
}

Result init(Handle* handle, int ranks, const UniqueId& unique, int rank, const Config* config) {
  if (begin("ncclCommInitRankConfig") != cudaSuccess) return Result::unhandled_cuda_error;
  if (!handle || ranks < 1 || rank < 0 || rank >= ranks) return Result::invalid_argument;
  if (config && (config->magic != 0xcafebeef || config->size < sizeof(Config) || config->version < 21400))
    return Result::invalid_argument;
  const uint64_t id = number_of(unique);
  const auto comm = std::make_shared<Communicator>();
  comm->rank = rank;
  comm->ranks = ranks;
  comm->device = runtime().current_device();
  comm->blocking = !config || config->blocking != 0;
  comm->pending = true;
  Lock lock(state().mutex);
  comm->handle = *handle = reinterpret_cast<Handle>(uintptr_t(0x1000 + 16 * ++state().next_handle));
  state().comms[comm->handle] = comm;
  count("comms", rank);
  count("inits", rank);
  if (!comm->blocking) {
    in_background(comm->device, [comm, id] {
      Lock own(state().mutex);
      set_up(own, comm, id);
    });
    return Result::in_progress;
  }
  set_up(lock, comm, id);
  if (comm->error == Result::success) return Result::success;
  *handle = nullptr;
  forget(*comm);
  return comm->error;
}

Result finalize(Handle handle) {
  Lock lock(state().mutex);
  const Shared comm = find("ncclCommFinalize", handle);
  if (comm->error != Result::success) return comm->error;
  if (comm->finalized) die("ncclCommFinalize: %s is finalized twice", whose(*comm).c_str());
  comm->finalized = true;
  if (comm->blocking) {
    wait_for_operations(lock, "ncclCommFinalize", *comm);
    return Result::success;
  }
  comm->pending = true;
  in_background(comm->device, [comm] {
    Lock own(state().mutex);
    wait_for_operations(own, "ncclCommFinalize", *comm);
    comm->pending = false;
    state().changed.notify_all();
  });
  return Result::in_progress;
}

Result destroy(Handle handle) {
  Lock lock(state().mutex);
  const Shared comm = find("ncclCommDestroy", handle);
  comm->finalized = true;
  wait_for_operations(lock, "ncclCommDestroy", *comm);
  wait_for_graphs(lock, "ncclCommDestroy", *comm);
  if (state().comms.count(handle) == 0) die("ncclCommDestroy: %s was aborted meanwhile", whose(*comm).c_str());
  comm->destroyed = true;
  forget(*comm);
  return Result::success;
}

Result abort(Handle handle) {
  Lock lock(state().mutex);
  const Shared comm = find("ncclCommAbort", handle, true);
  const auto begun = stand_in::Clock::now();
  wait(lock, "ncclCommAbort: " + whose(*comm) + " hangs", [&] {
    const int64_t seconds = knob("abort_hangs_s", comm->rank);
    return seconds == 0 || (seconds > 0 && stand_in::Clock::now() - begun >= std::chrono::seconds(seconds));
  });
  if (comm->aborted) die("ncclCommAbort: %s is aborted twice", whose(*comm).c_str());
  comm->aborted = true;
  count("aborts", comm->rank);
  withdraw(*comm);
  state().changed.notify_all();
  wait(lock, "ncclCommAbort: " + whose(*comm) + " waits for its threads",
       [&] { return comm->running == 0 && !comm->pending; });
  wait_for_graphs(lock, "ncclCommAbort", *comm);
  forget(*comm);
  return Result::success;
}

}  // namespace

const char* name_of(Result result) {
  switch (result) {
    case Result::success:
      return "no error";
    case Result::unhandled_cuda_error:
      return "unhandled cuda error (run with NCCL_DEBUG=INFO for details)";
    case Result::system_error:
      return "unhandled system error (run with NCCL_DEBUG=INFO for details)";
    case Result::internal_error:
      return "internal error - please report this issue to the NCCL developers";
    case Result::invalid_argument:
      return "invalid argument (run with NCCL_DEBUG=WARN for details)";
    case Result::invalid_usage:
      return "invalid usage (run with NCCL_DEBUG=WARN for details)";
    case Result::remote_error:
      return "remote process exited or there was a network error";
    case Result::in_progress:
      return "NCCL operation in progress";
  }
  return "unknown result code";
}

Shared find(const char* call, Handle handle, bool may_be_pending) {
  const auto found = state().comms.find(handle);
  if (found == state().comms.end()) die("%s: %p is no communicator, or was destroyed or aborted", call, (void*)handle);
  const Shared& comm = found->second;
  if (comm->pending && !may_be_pending) die("%s: %s is still in progress", call, whose(*comm).c_str());
  if (comm->aborted && !may_be_pending) die("%s: %s is being aborted", call, whose(*comm).c_str());
  return comm;
}

void set_error(Communicator& comm, Result error, const std::string& text) {
  comm.error = error;
  state().last_error = &*state().texts.insert(text).first;
}

}  // namespace stand_in_nccl

using namespace stand_in_nccl;

STAND_IN_EXPORT Result ncclGetVersion(int* version) {
  Lock lock(state().mutex);
  *version = int(knob("version"));
  return Result::success;
}

STAND_IN_EXPORT Result ncclGetUniqueId(UniqueId* unique) {
  Lock lock(state().mutex);
  Id id{{}, uint64_t(getpid()), ++state().next_id};
  std::memcpy(id.magic, kMagic, sizeof kMagic);
  std::memset(unique->internal, 0, sizeof unique->internal);
  std::memcpy(unique->internal, &id, sizeof id);
  return Result::success;
}

STAND_IN_EXPORT Result ncclCommInitRankConfig(Handle* comm, int ranks, UniqueId id, int rank, Config* config) {
  return init(comm, ranks, id, rank, config);
}
STAND_IN_EXPORT Result ncclCommFinalize(Handle comm) { return finalize(comm); }
STAND_IN_EXPORT Result ncclCommDestroy(Handle comm) { return destroy(comm); }
STAND_IN_EXPORT Result ncclCommAbort(Handle comm) { return abort(comm); }

STAND_IN_EXPORT Result ncclCommGetAsyncError(Handle handle, Result* error) {
  Lock lock(state().mutex);
  const Shared comm = find("ncclCommGetAsyncError", handle, true);
  *error = comm->error != Result::success ? comm->error : comm->pending ? Result::in_progress : Result::success;
  return Result::success;
}

STAND_IN_EXPORT const char* ncclGetErrorString(Result result) { return name_of(result); }

// As in NCCL, the last of the process; the communicator means nothing.
STAND_IN_EXPORT const char* ncclGetLastError(Handle) {
  Lock lock(state().mutex);
  return state().last_error ? state().last_error->c_str() : "";
}

AS_DECLARED(GetVersion);
AS_DECLARED(GetUniqueId);
AS_DECLARED(CommInitRankConfig);
AS_DECLARED(CommFinalize);
AS_DECLARED(CommDestroy);
AS_DECLARED(CommAbort);
AS_DECLARED(CommGetAsyncError);
AS_DECLARED(GetErrorString);
AS_DECLARED(GetLastError);
