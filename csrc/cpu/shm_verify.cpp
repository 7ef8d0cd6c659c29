// The first calls of an shm communicator: does memory written here arrive there, and which kind of store is faster?
#include <algorithm>
#include <cmath>

#include "shm_engine.h"

namespace dpcomm {

namespace {
constexpr int kRounds = 4;  // of each policy; the fastest counts, so that one preemption does not decide
}

void ShmEngine::verify(double timeout_s, const std::string& name) {
  timeout_ns_ = int64_t(std::min(timeout_s * 1e9, 9e18));
  if (team_.nranks > 1) {
    check_pattern();
    // 1 MiB a call shows the difference at its largest; with many ranks 16 groups of each do.
    std::vector<float> data(size_t(1) << 18, 1.0f);
    Call call;
    call.addresses = {reinterpret_cast<char*>(data.data())};
    call.counts = {team_.nranks <= 8 ? int64_t(data.size()) : int64_t{16} * kGroup * team_.nranks};
    call.op = Op::mean;
    call.algorithm = Algorithm::direct;
    data.resize(size_t(call.counts[0]), 1.0f);
    call.addresses[0] = reinterpret_cast<char*>(data.data());
    touch_all_slots(call);
    const double plain = fastest_call(call, Store::plain), streaming = fastest_call(call, Store::streaming);
    store_ = streaming < plain ? Store::streaming : Store::plain;
  }
  uncounted_ = box_[team_.rank]->sequence;
  stats(true);
  name_ = name;
}

// A slot's first use costs page faults, which would be charged to the policy that is measured first.
void ShmEngine::touch_all_slots(const Call& call) {
  const uint32_t* sent = box_[team_.rank]->sent;
  for (const uint32_t end = sent[kGiven] + uint32_t(team_.slots); !reached(sent[kGiven], end);) allreduce(call);
}

double ShmEngine::fastest_call(Call& call, Store store) {
  store_ = store;
  int64_t best = INT64_MAX;
  for (int i = 0; i < kRounds; ++i) {
    const int64_t start = now_ns();
    allreduce(call);
    best = std::min(best, now_ns() - start);
  }
  return double(best);
}

// Whole numbers, different on each rank and at each place: the sum is known, and a slot that two ranks see at different
// addresses or not at all shows.
void ShmEngine::check_pattern() {
  std::vector<int32_t> data(size_t(kGroup) * 64 + 1);
  for (size_t i = 0; i < data.size(); ++i) data[i] = int32_t(i * 31 + size_t(team_.rank) * 1000003);
  Call call;
  call.addresses = {reinterpret_cast<char*>(data.data())};
  call.counts = {int64_t(data.size())};
  call.dtype = Dtype::int32;
  call.algorithm = Algorithm::direct;
  allreduce(call);
  const uint32_t n = uint32_t(team_.nranks);
  for (size_t i = 0; i < data.size(); ++i)
    if (uint32_t(data[i]) != uint32_t(i) * 31 * n + 1000003 * (n * (n - 1) / 2))
      throw Error(Code::internal,
                  prefix(Code::internal, &call) + "shared memory does not hold what was written to it, at element " +
                      std::to_string(i) + ". Please report this with the output of `python -m dpcomm info`.");
}

}  // namespace dpcomm
