// The queue in front of an engine that does nothing: what callers may rely on when calls end.
#include <memory>
#include <thread>

#include "check.h"
#include "queue.h"

using namespace dpcomm;

namespace {

// Counts its calls; each asks `during` first.
class Idle : public Engine {
 public:
  explicit Idle(std::function<void(int)> during) : during_(std::move(during)) {}
  int rank() const override { return 0; }
  int nranks() const override { return 1; }
  bool in_forked_child() const override { return false; }
  void allreduce(const Call&) override { during_(calls_++); }
  void abort(const std::string&) override {}
  void check() override {}
  void close() override {}
  Stats stats(bool) override { return {}; }
  Description describe() override { return {}; }

 private:
  std::function<void(int)> during_;
  int calls_ = 0;
};

void test_calls_end_in_the_order_of_their_submission() {
  constexpr int kRounds = 2000;
  std::shared_ptr<Job> earlier;
  int early = 0;  // synchronous calls that began before the asynchronous one ahead of them had ended
  Queue queue(std::make_unique<Idle>([&](int call) { early += call % 2 && !earlier->done(); }));
  for (int i = 0; i < kRounds; ++i) {
    earlier = queue.submit({});
    queue.run({});
    early += !earlier->done();
  }
  CHECK(early == 0);
}

void test_an_error_ends_its_own_job_only() {
  Queue queue(std::make_unique<Idle>([](int call) {
    if (call == 1) throw Error(Code::argument, "the second");
  }));
  std::shared_ptr<Job> jobs[3];
  for (auto& job : jobs) job = queue.submit({});
  for (auto& job : jobs) CHECK(job->wait(10));
  CHECK(!jobs[0]->error());
  CHECK(jobs[1]->error());
  CHECK(!jobs[2]->error());
}

void test_nothing_begins_after_close() {
  int calls = 0;
  Queue queue(std::make_unique<Idle>([&](int) { ++calls; }));
  const auto job = queue.submit({});
  queue.close(10);
  CHECK(job->done() && calls == 1);
  int refused = 0;
  try {
    queue.run({});
  } catch (const Error& e) {
    refused += e.code == Code::aborted;
  }
  CHECK(refused == 1 && calls == 1);
}

}  // namespace

int main() {
  test_calls_end_in_the_order_of_their_submission();
  test_an_error_ends_its_own_job_only();
  test_nothing_begins_after_close();
  return finish();
}
