// Ranks of engine nccl that are threads of one process, on the stand-ins for the CUDA runtime and for NCCL. Memory of a
// test plays device memory only once it is adopted: NCCL looks at every address.
#pragma once
#include "control_plane_group.h"
#include "nccl/engine.h"
#include "p2p_ranks.h"
#include "stand_in_nccl/stand_in_nccl.h"

namespace nccl_ranks {

using namespace p2p;

inline const nccl::Library& library() {
  static const nccl::Library& found = nccl::find_library({NCCL_STAND_IN, {}});
  return found;
}
inline const stand_in_nccl::Control& control() {
  static const auto only = (library(), stand_in_nccl::control_of(NCCL_STAND_IN));
  return only;
}
inline int64_t counted(const char* counter, int rank = -1) { return control().count(counter, rank); }

// Host memory as a device's while this lives.
class Adopted {
 public:
  Adopted(void* address, size_t bytes, int device) : address_(address) {
    if (bytes > 0) stand_in::adopt_memory(address, bytes, device);
    if (bytes == 0) address_ = nullptr;
  }
  Adopted(Adopted&& other) noexcept : address_(std::exchange(other.address_, nullptr)) {}
  ~Adopted() {
    if (address_) stand_in::forget_memory(address_);
  }

 private:
  void* address_;
};

// One tensor of rank r, r + 1 everywhere.
template <class T = float>
struct OnDevice : Data<T> {
  OnDevice(int64_t elems, int rank, int device)
      : Data<T>(elems, rank), adopted(this->x.data(), size_t(elems) * sizeof(T), device) {}
  Adopted adopted;
};

struct Shape {
  int ranks;
  double timeout_s = kLongS;
  int64_t slice_bytes = 4096;  // the smallest slots: many slices, and slots are used again
  int devices = 2;
  double connect_s = kLongS;
  int absent = -1;       // who does not connect
  NcclHosts hosts = {};  // of algorithm two_level; none: without it
  int elsewhere = -1;    // who is told that hosts come in another order
};

constexpr int kStreamsAtOnce = 2 * 8;  // eight ranks', which have two each; those of tests are destroyed

class Group {
 public:
  explicit Group(const Shape& shape) : shape(shape), descriptors_(size_t(shape.ranks)) {
    planes::Mesh mesh = planes::mesh_of(shape.ranks);
    nccl::UniqueId id;
    CHECK(library().api.GetUniqueId(&id) == nccl::Result::success);
    ranks.resize(size_t(shape.ranks));
    engines.resize(size_t(shape.ranks));
    unjoined.resize(size_t(shape.ranks));
    in_threads(shape.ranks, [&](int r) {
      for (const PeerSockets& s : mesh[size_t(r)])
        descriptors_[size_t(r)].push_back({::dup(s.control.get()), ::dup(s.headers.get())});
      NcclEngine::Place place{r,         device_of(r), {64 * kMiB, shape.slice_bytes}, {}, std::move(mesh[size_t(r)]),
                              library(), shape.hosts};
      if (r == shape.elsewhere) std::reverse(place.hosts.hosts.begin(), place.hosts.hosts.end());
      place.peers.assign(size_t(shape.ranks), {getpid(), ""});
      auto engine = NcclEngine::make(std::move(place));
      engines[size_t(r)] = engine.get();
      ranks[size_t(r)] = std::make_unique<Queue>(std::move(engine));
      if (r == shape.absent) return;
      try {
        engines[size_t(r)]->connect(id, shape.connect_s, {});
        engines[size_t(r)]->verify(shape.timeout_s, "abcd", {});
      } catch (const Error& error) {
        unjoined[size_t(r)] = std::make_unique<Error>(error);
      }
    });
  }
  ~Group() {
    in_threads(size(), [&](int r) { ranks[size_t(r)]->close(1); });
    ranks.clear();
    for (const auto& row : descriptors_)
      for (const auto& [control, headers] : row) ::close(control), ::close(headers);
  }

  bool joined() const {
    bool all = true;
    for (const auto& error : unjoined) {
      all = all && !error;
      if (error) std::fprintf(stderr, "  %s\n", error->what());
    }
    return CHECK(all);
  }
  int size() const { return shape.ranks; }
  int device_of(int r) const { return r % shape.devices; }
  Queue& queue(int r) const { return *ranks[size_t(r)]; }
  NcclEngine& engine(int r) const { return *engines[size_t(r)]; }
  void all(const std::function<void(int)>& body) const { in_threads(size(), body); }
  // For its peers it ends without a word, as a process does that is killed.
  void die(int r) const {
    for (const auto& [control, headers] : descriptors_[size_t(r)])
      ::shutdown(control, SHUT_WR), ::shutdown(headers, SHUT_WR);
  }

  const Shape shape;
  std::vector<std::unique_ptr<Queue>> ranks;
  std::vector<NcclEngine*> engines;
  std::vector<std::unique_ptr<Error>> unjoined;

 private:
  std::vector<std::vector<std::pair<int, int>>> descriptors_;
};

// Whether calls still add up, through codes and through NCCL's own all-reduce.
inline bool usable(Group& group) {
  const float sum = float(group.size() * (group.size() + 1) / 2);
  bool all = true;
  for (const CodecKind codec : {CodecKind::fp16, CodecKind::none}) {
    std::vector<std::unique_ptr<OnDevice<>>> data;
    for (int r = 0; r < group.size(); ++r) {
      data.push_back(std::make_unique<OnDevice<>>(7001, r, group.device_of(r)));
      data.back()->call.codec = codec;
    }
    all = run_all(group.ranks, [&](int r) { return data[size_t(r)]->call; }) && all;
    for (const auto& d : data) all = d->all(sum) && all;
  }
  return all;
}

using Round = steps::Step;  // one call of all ranks

inline std::vector<Adopted> adopt(std::vector<Round>& steps, const Group& group) {
  std::vector<Adopted> all;
  for (Round& step : steps)
    for (size_t r = 0; r < step.memory.size(); ++r)
      all.emplace_back(step.memory[r].data(), step.memory[r].size(), group.device_of(int(r)));
  return all;
}

// All calls are on their way before the first result is looked at.
inline void play(Group& group, std::vector<Round>& steps, const char* what) {
  const auto adopted = adopt(steps, group);
  const auto streams = streams_of(group.ranks);
  group.all([&](int r) {
    try {
      for (Round& step : steps) run_on(group.queue(r), call_of(step, r), streams[size_t(r)]);
      CHECK(streams[size_t(r)].done());
      group.engine(r).check();
    } catch (const Error& error) {
      CHECK(!"calls succeed");
      std::fprintf(stderr, "  %s\n", error.what());
    }
  });
  for (const Round& step : steps)
    for (size_t r = 0; r < step.memory.size(); ++r)
      if (!CHECK(step.memory[r] == step.result(int(r)))) {
        std::fprintf(stderr, "  %s, rank %zu/%zu: algorithm %d codec %d dtype %d op %d\n", what, r, step.memory.size(),
                     int(step.algorithm), int(step.codec), int(step.dtype), int(step.op));
        return;
      }
}

inline bool failed(const Group& group, int r) {
  try {
    group.engine(r).check();
  } catch (const Error&) {
    return true;
  }
  return false;
}

}  // namespace nccl_ranks
