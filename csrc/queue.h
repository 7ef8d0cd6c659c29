// The order of a communicator's calls: one at a time, first come first served, whichever thread they come from.
// Synchronous calls run in the caller's thread, asynchronous ones on a thread of the queue's own, which starts with the
// first of them and never touches Python.
#pragma once
#include <atomic>
#include <condition_variable>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>

#include "engine.h"

namespace dpcomm {

class Job {
 public:
  explicit Job(Call c) : call(std::move(c)) {}
  // False when the time ran out first (negative: no limit). Does not throw the call's error: see error().
  bool wait(double timeout_s);
  bool done() const { return done_.load(std::memory_order_acquire); }
  std::exception_ptr error() const { return done() ? error_ : nullptr; }

  Call call;

 private:
  friend class Queue;
  void finish(std::exception_ptr error);
  std::mutex mutex_;
  std::condition_variable changed_;
  std::exception_ptr error_;  // published by done_
  std::atomic<bool> done_{false};
};

class Queue {
 public:
  explicit Queue(std::unique_ptr<Engine> engine);
  ~Queue();
  Queue(const Queue&) = delete;

  void run(const Call& call);
  std::shared_ptr<Job> submit(Call call);
  // Runs all calls of an engine that is served from outside, until close(). Its thread calls it once.
  void serve();
  // For engines of a device: in the caller's thread, which does not wait for the device.
  std::shared_ptr<Pending> enqueue(const Call& call, uintptr_t stream);
  // Refuses new calls, waits grace_s for those under way, then aborts them. Idempotent; whoever comes second returns
  // when the engine is closed, too.
  void close(double grace_s);
  bool closed() const { return closing_.load(); }
  Engine& engine() { return *engine_; }

 private:
  template <class Body>
  auto in_turn(const Call& call, Body body);
  uint64_t take_ticket();
  void wait_turn(uint64_t ticket, const Call* call);
  void next_turn();
  void work();
  void run_jobs();
  void close_engine();
  void run_outside(const Call& call);
  bool in_forked_child() const;

  std::unique_ptr<Engine> engine_;
  std::mutex mutex_;
  std::condition_variable changed_;
  uint64_t next_ = 0, serving_ = 0;  // tickets: the call that holds `serving_` runs
  std::deque<std::pair<uint64_t, std::shared_ptr<Job>>> jobs_;
  std::atomic<bool> closing_{false};
  bool stop_ = false;
  bool engine_closing_ = false, engine_closed_ = false;
  std::thread::id closer_;               // whose engine_->close() runs
  bool serving_outside_ = false;         // serve() runs
  std::unique_ptr<std::thread> worker_;  // a pointer: in a forked child the thread is not there, and is let go of
};

}  // namespace dpcomm
