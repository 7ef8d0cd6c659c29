// The first calls of an shm communicator: does memory written here arrive there, and which kind of store is faster?
#include <algorithm>

#include "../host/pattern.h"
#include "shm_engine.h"

namespace dpcomm {

namespace {

constexpr int64_t kMostSample = int64_t{4} << 20;  // floats; more would be memory that nobody has counted with
constexpr int kRounds = 4;  // of everything measured; the fastest counts, so that one preemption does not decide

// A sum of ones in place, as a call.
struct Sample {
  std::vector<float> data;
  Call call;
  explicit Sample(int64_t elems) : data(size_t(elems), 1.0f) {
    call.addresses = {reinterpret_cast<char*>(data.data())};
    call.counts = {elems};
    call.op = Op::mean;
    call.algorithm = Algorithm::direct;
  }
};

}  // namespace

void ShmEngine::verify(double timeout_s, const std::string& name) {
  timeout_ns_ = int64_t(std::min(timeout_s * 1e9, 9e18));
  if (team_.nranks > 1) {
    const int channels = used_channels_;
    threads_.start(channels);
    check_pattern();
    used_channels_ = 1;
    // 1 MiB a call shows the difference at its largest; with many ranks 16 groups of each do.
    Sample sample(team_.nranks <= 8 ? int64_t{1} << 18 : int64_t{16} * kGroup * team_.nranks);
    touch_all_slots(sample.call);
    std::vector<float> times;
    for (const Store store : {Store::plain, Store::streaming}) {
      stores_.choose(store);
      times.push_back(float(fastest_call(sample.call)));
    }
    of_slowest_rank(times);
    stores_.choose(times[1] < times[0] ? Store::streaming : Store::plain);
    used_channels_ = channels;
    if (fewer_channels_ && channels > 1) choose_channels();
    trials_ = true;
  }
  uncounted_ = mine().sequence;
  stats(true);
  name_ = name;
  known_.emplace([this] { return failure_text(); });
}

// A slot's first use costs page faults, which would be charged to the policy that is measured first.
void ShmEngine::touch_all_slots(const Call& call) {
  const uint32_t* sent = mine().sent;
  for (const uint32_t end = sent[kGiven] + uint32_t(team_.slots); !reached(sent[kGiven], end);) allreduce(call);
}

double ShmEngine::fastest_call(const Call& call) {
  int64_t best = INT64_MAX;
  for (int i = 0; i < kRounds; ++i) {
    const int64_t start = now_ns();
    allreduce(call);
    best = std::min(best, now_ns() - start);
  }
  return double(best);
}

// Afterwards all ranks have the same times, and so choose the same.
void ShmEngine::of_slowest_rank(std::vector<float>& times) {
  Call compare;
  compare.addresses = {reinterpret_cast<char*>(times.data())};
  compare.counts = {int64_t(times.size())};
  compare.dtype = Dtype::float32;
  compare.op = Op::max;
  allreduce(compare);
}

// A channel is played by all ranks or by none.
void ShmEngine::choose_channels() {
  constexpr double kWorthIt = 0.9;  // of the time with half as many
  const int most = used_channels_;
  const int64_t elems = int64_t{team_.nranks} * most << 16;  // two slices of floats a channel
  used_channels_ = 1;
  if (elems > kMostSample) return;
  Sample sample(elems);
  std::vector<float> times;
  for (used_channels_ = 1; used_channels_ <= most; used_channels_ *= 2) {
    allreduce(sample.call);  // first touch
    times.push_back(float(fastest_call(sample.call)));
  }
  used_channels_ = 1;
  of_slowest_rank(times);
  size_t best = 0;
  for (size_t i = 1; i < times.size(); ++i)
    if (times[i] < times[best] * kWorthIt) best = i;
  used_channels_ = 1 << best;
}

void ShmEngine::check_pattern() {
  PatternCall pattern(team_.rank);
  allreduce(pattern.call);
  if (const int64_t at = pattern.first_wrong(team_.nranks); at >= 0)
    throw Error(Code::internal, prefix(Code::internal, &pattern.call) +
                                    "shared memory does not hold what was written to it, at element " +
                                    std::to_string(at) +
                                    ". Please report this with the output of `python -m dpcomm info`.");
}

}  // namespace dpcomm
