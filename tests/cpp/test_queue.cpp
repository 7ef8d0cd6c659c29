// The queue in front of an engine that does nothing: what callers may rely on when calls end.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <future>
#include <memory>
#include <thread>

#include "check.h"
#include "queue.h"

using namespace dpcomm;

namespace {

// Counts its calls; each asks `during` first. Once aborted it refuses them.
class Idle : public Engine {
 public:
  explicit Idle(
      std::function<void(int)> during, bool outside = false, std::function<void()> closing = [] {})
      : during_(std::move(during)), outside_(outside), closing_(std::move(closing)) {}
  int rank() const override { return 0; }
  int nranks() const override { return 1; }
  bool in_forked_child() const override { return false; }
  bool served_from_outside() const override { return outside_; }
  void allreduce(const Call&) override {
    if (aborted_) throw Error(Code::aborted, "aborted");
    during_(calls_++);
  }
  void abort(const std::string&) override { aborted_ = true; }
  void check() override {}
  void close() override { closing_(); }
  Stats stats(bool) override { return {}; }
  Description describe() override { return {}; }
  bool aborted() const { return aborted_; }

 private:
  const std::function<void(int)> during_;
  const bool outside_;
  const std::function<void()> closing_;
  std::atomic<bool> aborted_{false};
  int calls_ = 0;
};

// Calls something in a thread of its own. If it does not return, the program ends there: nothing after it is to be had.
void must_return(const char* what, const std::function<void()>& call) {
  std::future<void> done = std::async(std::launch::async, call);
  if (done.wait_for(std::chrono::seconds(10)) == std::future_status::ready) return done.get();
  std::fprintf(stderr, "%s does not return\n", what);
  std::_Exit(1);
}

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

// A rank may leave as soon as its last call has ended: nothing is under way then that the others would hear of.
void test_close_behind_the_last_call_aborts_nothing() {
  int aborted = 0;
  for (int i = 0; i < 1000; ++i) {
    auto engine = std::make_unique<Idle>([](int) {});
    const Idle& idle = *engine;
    Queue queue(std::move(engine));
    const auto job = queue.submit({});
    while (!job->done()) {  // sees the end sooner than wait()
    }
    queue.close(0);
    aborted += idle.aborted();
  }
  CHECK(aborted == 0);
}

void test_calls_that_nobody_serves_end_with_the_queue() {
  int calls = 0;
  Queue queue(std::make_unique<Idle>([&](int) { ++calls; }, true));
  const std::shared_ptr<Job> jobs[] = {queue.submit({}), queue.submit({})};
  must_return("close", [&] { queue.close(0.05); });
  for (const auto& job : jobs) CHECK(job->done() && job->error());
  must_return("serve", [&] { queue.serve(); });
  CHECK(calls == 0);
}

void test_calls_that_are_served_late_end_before_the_queue() {
  int calls = 0;
  Queue queue(std::make_unique<Idle>([&](int) { ++calls; }, true));
  const auto job = queue.submit({});
  std::thread server([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    queue.serve();
  });
  must_return("close", [&] { queue.close(10); });
  server.join();
  CHECK(job->done() && !job->error() && calls == 1);
}

// As a signal's handler does that comes while an engine closes.
void test_a_close_within_a_close_returns() {
  int closed = 0;
  Queue* itself = nullptr;
  Queue queue(std::make_unique<Idle>([](int) {}, false,
                                     [&] {
                                       itself->close(0);
                                       ++closed;
                                     }));
  itself = &queue;
  must_return("close", [&] { queue.close(10); });
  CHECK(closed == 1);
}

void test_the_queue_answers_while_its_engine_closes() {
  std::atomic<int> refused{0}, second{0};
  std::thread closer;
  Queue* asked = nullptr;
  Queue queue(std::make_unique<Idle>([](int) {}, false,
                                     [&] {
                                       closer = std::thread([&] {
                                         asked->close(0);
                                         ++second;
                                       });
                                       must_return("submit", [&] {
                                         try {
                                           asked->submit({});
                                         } catch (const Error&) {
                                           ++refused;
                                         }
                                       });
                                       std::this_thread::sleep_for(std::chrono::milliseconds(50));
                                       CHECK(second == 0);  // it waits for the engine
                                     }));
  asked = &queue;
  must_return("close", [&] { queue.close(0); });
  must_return("the second close", [&] { closer.join(); });
  CHECK(refused == 1 && second == 1);
}

}  // namespace

int main() {
  test_calls_end_in_the_order_of_their_submission();
  test_an_error_ends_its_own_job_only();
  test_nothing_begins_after_close();
  test_close_behind_the_last_call_aborts_nothing();
  test_calls_that_nobody_serves_end_with_the_queue();
  test_calls_that_are_served_late_end_before_the_queue();
  test_a_close_within_a_close_returns();
  test_the_queue_answers_while_its_engine_closes();
  return finish();
}
