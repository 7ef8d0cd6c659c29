#include "communicators.h"

#include <unistd.h>

#include <map>
#include <mutex>

#include "fork_guard.h"

namespace dpcomm {
namespace {

struct Known {
  std::mutex mutex;
  uint64_t next = 0;
  std::map<uint64_t, std::function<FailureText()>> texts;
};

Known& known() {
  static Known* const all = new Known;  // never destroyed: communicators may outlive static objects
  return *all;
}

const std::string& host_of(const FailureText& text, size_t rank) {
  static const std::string here;
  return text.hosts.empty() ? here : text.hosts[rank];
}

}  // namespace

KnownCommunicator::KnownCommunicator(std::function<FailureText()> text) : generation_(fork_generation()) {
  Known& all = known();
  const std::lock_guard lock(all.mutex);
  number_ = all.next++;
  all.texts[number_] = std::move(text);
}

KnownCommunicator::~KnownCommunicator() {
  if (generation_ != fork_generation()) return;
  Known& all = known();
  const std::lock_guard lock(all.mutex);
  all.texts.erase(number_);
}

std::string call_elsewhere(const FailureText& asking, int pid, const std::string& host) {
  if (pid == 0 || pid == ::getpid()) return "";  // not known here; or ranks are threads, which share a number
  Known& all = known();
  const std::lock_guard lock(all.mutex);
  // The newest first: older ones may have failed, and nobody has closed them.
  for (auto it = all.texts.rbegin(); it != all.texts.rend(); ++it) {
    const FailureText text = it->second();
    if (text.control == asking.control) continue;
    for (int r = 0; r < text.nranks; ++r) {
      const uint64_t call = text.last_sequence(r);
      if (text.pids[size_t(r)] != pid || host_of(text, size_t(r)) != host || call <= text.sequence) continue;
      return "it has begun call " + std::to_string(call - text.uncounted) + " of communicator " + text.name +
             ", which this rank has not made: calls of two communicators come in the same order on all ranks "
             "(docs/subgroups.md)";
    }
  }
  return "";
}

}  // namespace dpcomm
