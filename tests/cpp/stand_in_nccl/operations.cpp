// Operations: what a stream does when it comes to a group. Bytes move as soon as both sides are there, in the thread of
// the second.
#include <cstring>

#include "state.h"

namespace stand_in_nccl {
namespace {

// What a group has posted while it runs. Others point to it, so it never moves.
struct Posted {
  std::deque<Posting> messages;
  std::deque<Part> parts;
  bool all_done() const {
    for (const Posting& message : messages)
      if (!message.done) return false;
    for (const Part& part : parts)
      if (!part.done) return false;
    return true;
  }
};

bool is_well(const Communicator& comm) { return comm.error == Result::success && !comm.aborted; }

// In order, and not past a pair that does not fit.
void match(Channel& channel) {
  while (!channel.sends.empty() && !channel.receives.empty()) {
    Posting &from = *channel.sends.front(), &to = *channel.receives.front();
    if (from.bytes != to.bytes || !is_well(*from.comm) || !is_well(*to.comm)) return;
    if (from.bytes > 0) std::memmove(to.address, from.address, from.bytes);
    count("bytes", from.comm->rank, int64_t(from.bytes));
    from.done = to.done = true;
    channel.sends.pop_front();
    channel.receives.pop_front();
  }
}

// True: the next message of this rank is not to arrive.
bool is_lost(const Communicator& comm) {
  int64_t& left = knob("lose_messages", comm.rank);
  if (left == 0) return false;
  if (left > 0) --left;
  count("lost", comm.rank);
  return true;
}

void post_send(const Call& call, Posting& message) {
  const Communicator& comm = *call.comm;
  count("sends", comm.rank);
  Channel& channel = comm.clique->channels[{comm.rank, call.peer}];
  if (is_lost(comm)) channel.broken = true;
  message.done = channel.broken;
  if (!channel.broken) channel.sends.push_back(&message);
  match(channel);
}

void post_receive(const Call& call, Posting& message) {
  const Communicator& comm = *call.comm;
  count("receives", comm.rank);
  Channel& channel = comm.clique->channels[{call.peer, comm.rank}];
  channel.receives.push_back(&message);
  match(channel);
}

// Who comes last computes it for all, unless the ranks do not agree on what it is.
void post_part(const Call& call, Part& part) {
  Communicator& comm = *call.comm;
  count("all_reduces", comm.rank);
  auto& round = comm.clique->rounds[comm.reductions++];
  round.resize(size_t(comm.ranks));
  if (is_lost(comm)) return;
  round[size_t(comm.rank)] = &part;
  for (const Part* other : round)
    if (!other || !is_well(*other->comm) || other->count != part.count || other->type != part.type ||
        other->op != part.op)
      return;
  reduce(round);
  for (Part* other : round) other->done = true;
  comm.clique->rounds.erase(comm.reductions - 1);
}

// Memory may have gone since the call.
void check_memory(const Call& call) {
  const size_t bytes = call.count * size_of(call.type);
  if (bytes == 0) return;
  if (call.kind != Kind::receive) runtime().check_range("an NCCL operation", call.from, bytes, false, nullptr);
  if (call.kind != Kind::send) runtime().check_range("an NCCL operation", call.to, bytes, false, nullptr);
}

void post(const Call& call, Posted& posted) {
  Communicator* comm = call.comm.get();
  const size_t bytes = call.count * size_of(call.type);
  check_memory(call);
  switch (call.kind) {
    case Kind::send:
      return post_send(call, posted.messages.emplace_back(Posting{comm, const_cast<void*>(call.from), bytes}));
    case Kind::receive:
      return post_receive(call, posted.messages.emplace_back(Posting{comm, call.to, bytes}));
    case Kind::all_reduce:
      return post_part(call, posted.parts.emplace_back(Part{comm, call.from, call.to, call.count, call.type, call.op}));
  }
}

std::string describe(const Work& work) {
  std::string text = "rank " + std::to_string(work.comm->rank) + " in a group of";
  for (const Call& call : work.calls) {
    const char* verb = call.kind == Kind::send      ? "send to "
                       : call.kind == Kind::receive ? "receive from "
                                                    : "all-reduce";
    text += std::string(&call == &work.calls.front() ? " " : ", ") + verb;
    if (call.kind != Kind::all_reduce) text += std::to_string(call.peer);
  }
  return text;
}

}  // namespace

void run(const Work& work) {
  Communicator& comm = *work.comm;
  Lock lock(state().mutex);
  wait(lock, describe(work) + " (an earlier operation)",
       [&] { return comm.aborted || !work.ticket || comm.finished + 1 == work.ticket; });
  if (comm.destroyed) die("rank %d: a graph uses a communicator that was destroyed", comm.rank);
  if (comm.aborted && work.captured) count("late_replays", comm.rank);
  if (comm.aborted || state().stopping) return;
  ++comm.running;
  count("groups", comm.rank);
  Posted posted;
  for (const Call& call : work.calls) post(call, posted);
  state().changed.notify_all();
  wait(lock, describe(work), [&] { return comm.aborted || posted.all_done(); });
  if (state().stopping) withdraw(comm);
  --comm.running;
  if (work.ticket) ++comm.finished;
  state().changed.notify_all();
}

void withdraw(Communicator& comm) {
  const auto erase = [&](std::deque<Posting*>& side) {
    std::erase_if(side, [&](const Posting* message) { return message->comm == &comm; });
  };
  if (!comm.clique) return;
  for (auto& [pair, channel] : comm.clique->channels) {
    erase(channel.sends);
    erase(channel.receives);
  }
  for (auto& [number, round] : comm.clique->rounds)
    for (Part*& part : round)
      if (part && part->comm == &comm) part = nullptr;
}

}  // namespace stand_in_nccl
