// The state, its waits, knobs and counters.
#include "state.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <sstream>

#include "stand_in_nccl.h"

namespace stand_in_nccl {
namespace {

constexpr int kRanks = 64;

struct Values {
  int64_t first;   // what reset() sets
  bool of_a_rank;  // each rank has its own
  int64_t all = first;
  std::map<int, int64_t> ranks{};
};

std::map<std::string, Values>& knobs() {
  static auto* const only = new std::map<std::string, Values>{
      {"version", {22703, false}},          {"deadline_s", {60, false}},  {"every_group_in_background", {1, false}},
      {"refuse_shared_device", {0, false}}, {"graphs_hold", {1, false}},  {"fail_init", {0, true}},
      {"lose_messages", {0, true}},         {"abort_hangs_s", {0, true}},
  };
  return *only;
}

std::map<std::string, std::map<int, int64_t>>& counters() {
  static auto* const only = new std::map<std::string, std::map<int, int64_t>>{
      {"comms", {}},        {"inits", {}},       {"aborts", {}}, {"groups", {}}, {"sends", {}},
      {"receives", {}},     {"all_reduces", {}}, {"bytes", {}},  {"lost", {}},   {"background_groups", {}},
      {"late_replays", {}},
  };
  return *only;
}

void set(const std::string& name, int rank, int64_t value) {
  const auto found = knobs().find(name);
  if (found == knobs().end()) die("'%s' is no knob", name.c_str());
  Values& values = found->second;
  if (rank >= kRanks || rank < -1 || (rank >= 0 && !values.of_a_rank)) die("%s of rank %d", name.c_str(), rank);
  if (rank >= 0) {
    values.ranks[rank] = value;
    return;
  }
  values.all = value;
  values.ranks.clear();
}

void read_environment() {
  const char* text = std::getenv("STAND_IN_NCCL");
  std::istringstream pairs(text ? text : "");
  for (std::string pair; std::getline(pairs, pair, ',');) {
    const size_t equals = pair.find('='), at = pair.find('@');
    char* end = nullptr;
    const int64_t value = equals == std::string::npos ? 0 : std::strtoll(pair.c_str() + equals + 1, &end, 10);
    if (!end || *end || end == pair.c_str() + equals + 1) die("STAND_IN_NCCL: '%s': no whole number", pair.c_str());
    set(pair.substr(0, std::min(equals, at)), at < equals ? std::atoi(pair.c_str() + at + 1) : -1, value);
  }
}

// As the end of a process ends kernels.
void end_operations() {
  Lock lock(state().mutex);
  state().stopping = true;
  state().changed.notify_all();
}

}  // namespace

void die(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  char text[1024];
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  std::fprintf(stderr, "stand-in NCCL: %s\n", text);
  std::abort();
}

State& state() {
  static State* const only = [] {
    read_environment();
    return new State;
  }();
  return *only;
}

cudaError_t begin(const char* call) {
  const cudaError_t error = runtime().begin(call, stand_in::Rule::plain);
  // The runtime's own end waits for its streams. It is registered by now, so this one comes before it.
  static const bool registered = std::atexit(end_operations) == 0;
  return registered ? error : cudaErrorInitializationError;
}

int64_t& knob(const char* name, int rank) {
  Values& values = knobs().at(name);
  const auto own = values.ranks.find(rank);
  return own == values.ranks.end() ? values.all : own->second;
}

void count(const char* counter, int rank, int64_t more) { counters().at(counter)[rank] += more; }

void wait(Lock& lock, const std::string& what, const std::function<bool()>& holds) {
  State& s = state();
  const auto begun = stand_in::Clock::now();
  // Graphs go without a word: see Communicator::captured.
  while (!s.stopping && !holds()) {
    s.changed.wait_for(lock, std::chrono::milliseconds(20));
    const auto waited = std::chrono::duration_cast<std::chrono::seconds>(stand_in::Clock::now() - begun).count();
    if (!s.stopping && waited >= knob("deadline_s") && !holds())
      die("%s: no end after %d s", what.c_str(), int(waited));
  }
}

void in_background(int device, std::function<void()> body) {
  runtime()
      .start_thread([device, body = std::move(body)] {
        runtime().current_device() = device;
        body();
      })
      .detach();
}

}  // namespace stand_in_nccl

using namespace stand_in_nccl;

STAND_IN_EXPORT void stand_in_nccl_set(const char* name, int rank, int64_t value) {
  Lock lock(state().mutex);
  set(name, rank, value);
  state().changed.notify_all();
}

STAND_IN_EXPORT void stand_in_nccl_reset() {
  Lock lock(state().mutex);
  for (auto& [name, values] : knobs()) set(name, -1, values.first);
  state().changed.notify_all();
}

STAND_IN_EXPORT void stand_in_nccl_fail(int rank, int result, const char* last_error) {
  Lock lock(state().mutex);
  for (auto& [handle, comm] : state().comms)
    if (comm->rank == rank) set_error(*comm, Result(result), last_error);
  state().changed.notify_all();
}

STAND_IN_EXPORT int64_t stand_in_nccl_count(const char* counter, int rank) {
  Lock lock(state().mutex);
  const auto found = counters().find(counter);
  if (found == counters().end()) die("'%s' is no counter", counter);
  int64_t sum = 0;
  for (auto& [of, value] : found->second) sum += rank < 0 || rank == of ? value : 0;
  return sum;
}
