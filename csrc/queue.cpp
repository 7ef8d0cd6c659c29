#include "queue.h"

#include <pthread.h>
#include <signal.h>

namespace dpcomm {

using std::chrono::duration;
using std::chrono::milliseconds;

bool Job::wait(double timeout_s) {
  std::unique_lock lock(mutex_);
  if (timeout_s < 0) {
    changed_.wait(lock, [&] { return done_.load(); });
    return true;
  }
  return changed_.wait_for(lock, duration<double>(timeout_s), [&] { return done_.load(); });
}

void Job::finish(std::exception_ptr error) {
  const std::lock_guard lock(mutex_);
  error_ = error;
  done_.store(true, std::memory_order_release);
  changed_.notify_all();
}

Queue::Queue(std::unique_ptr<Engine> engine) : engine_(std::move(engine)) {}

Queue::~Queue() {
  if (in_forked_child()) {  // neither the worker nor the shared memory is here
    static_cast<void>(worker_.release());
    static_cast<void>(engine_.release());
    return;
  }
  close(0);
}

bool Queue::in_forked_child() const { return engine_->in_forked_child(); }

uint64_t Queue::take_ticket() {
  if (closing_.load()) throw Error(Code::aborted, "[dpcomm:ABORTED] the communicator has been closed. Make a new one.");
  return next_++;
}

// A call whose caller gave up still takes its turn: it then finds the communicator poisoned and ends at once.
void Queue::wait_turn(uint64_t ticket, const Call* call) {
  std::unique_lock lock(mutex_);
  bool given_up = false;
  while (serving_ != ticket) {
    changed_.wait_for(lock, milliseconds(100), [&] { return serving_ == ticket; });
    if (serving_ == ticket || !call || !call->interrupted || given_up) continue;
    lock.unlock();  // the question takes Python's lock, whose holder may be waiting for ours
    given_up = call->interrupted();
    if (given_up) engine_->abort("interrupted while it waited for earlier calls");
    lock.lock();
  }
}

void Queue::next_turn() {
  const std::lock_guard lock(mutex_);
  ++serving_;
  changed_.notify_all();
}

template <class Body>
auto Queue::in_turn(const Call& call, Body body) {
  uint64_t ticket;
  bool mine;
  {
    const std::lock_guard lock(mutex_);
    ticket = take_ticket();
    mine = serving_ == ticket;
  }
  if (!mine) wait_turn(ticket, &call);
  struct Turn {
    Queue& queue;
    ~Turn() { queue.next_turn(); }
  } turn{*this};
  return body();
}

void Queue::run(const Call& call) {
  if (in_forked_child()) return engine_->allreduce(call);  // throws ForkError
  if (engine_->served_from_outside()) return run_outside(call);
  in_turn(call, [&] { engine_->allreduce(call); });
}

std::shared_ptr<Pending> Queue::enqueue(const Call& call, uintptr_t stream) {
  if (in_forked_child()) return engine_->enqueue(call, stream);  // throws ForkError
  return in_turn(call, [&] { return engine_->enqueue(call, stream); });
}

std::shared_ptr<Job> Queue::submit(Call call) {
  auto job = std::make_shared<Job>(std::move(call));
  if (in_forked_child()) engine_->allreduce(job->call);  // throws ForkError
  const std::lock_guard lock(mutex_);
  if (!worker_ && !closing_ && !engine_->served_from_outside())
    worker_ = std::make_unique<std::thread>([this] { work(); });
  jobs_.emplace_back(take_ticket(), job);  // after what may fail: a ticket that nobody serves would stop the queue
  changed_.notify_all();
  return job;
}

// The call's end is bounded, as an aborted call's is.
void Queue::run_outside(const Call& call) {
  const std::shared_ptr<Job> job = submit(call);
  bool given_up = false;
  while (!job->wait(0.1)) {
    if (given_up || !call.interrupted || !call.interrupted()) continue;
    given_up = true;
    engine_->abort("interrupted");
  }
  if (job->error()) std::rethrow_exception(job->error());
}

void Queue::serve() {
  {
    const std::lock_guard lock(mutex_);
    if (stop_) return;
    serving_outside_ = true;
  }
  work();
  const std::lock_guard lock(mutex_);
  serving_outside_ = false;
  changed_.notify_all();
}

void Queue::work() {
  sigset_t all;
  sigfillset(&all);
  pthread_sigmask(SIG_BLOCK, &all, nullptr);  // signals belong to the program's own threads
  pthread_setname_np(pthread_self(), "dpcomm-worker");
  run_jobs();
}

void Queue::run_jobs() {
  for (;;) {
    std::pair<uint64_t, std::shared_ptr<Job>> next;
    {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [&] { return stop_ || !jobs_.empty(); });
      if (jobs_.empty()) return;
      next = std::move(jobs_.front());
      jobs_.pop_front();
    }
    wait_turn(next.first, nullptr);
    std::exception_ptr error;
    try {
      engine_->allreduce(next.second->call);
    } catch (...) {
      error = std::current_exception();
    }
    // Before the next call begins: calls end in the order of their submission. And with its turn: whoever saw the end
    // may close(0), which aborts what is still under way.
    const std::lock_guard lock(mutex_);
    next.second->finish(error);
    ++serving_;
    changed_.notify_all();
  }
}

void Queue::close(double grace_s) {
  if (in_forked_child()) return;
  closing_ = true;
  std::unique_ptr<std::thread> worker;
  {
    std::unique_lock lock(mutex_);
    const auto idle = [&] { return serving_ == next_; };
    if (!changed_.wait_for(lock, duration<double>(grace_s), idle)) {
      const bool unserved = engine_->served_from_outside() && !serving_outside_;
      if (unserved) stop_ = true;  // a serve() that comes from now on returns at once
      lock.unlock();
      engine_->abort("closed while operations were in flight");
      if (unserved) run_jobs();  // nobody else ends them
      lock.lock();
      changed_.wait(lock, idle);  // bounded: an aborted call ends within 100 ms
    }
    stop_ = true;
    worker = std::move(worker_);
    changed_.notify_all();
    changed_.wait(lock, [&] { return !serving_outside_; });
  }
  if (worker) worker->join();
  close_engine();
}

// Without the lock: an engine may wait for threads that ask this queue, or for Python's lock, whose holder may.
void Queue::close_engine() {
  {
    std::unique_lock lock(mutex_);
    if (closer_ == std::this_thread::get_id()) return;  // a signal's handler, on top of close() itself
    if (engine_closing_) return changed_.wait(lock, [&] { return engine_closed_; });
    engine_closing_ = true;
    closer_ = std::this_thread::get_id();
  }
  struct Closed {
    Queue& queue;
    ~Closed() {
      const std::lock_guard lock(queue.mutex_);
      queue.engine_closed_ = true;
      queue.closer_ = {};
      queue.changed_.notify_all();
    }
  } closed{*this};
  engine_->close();
}

}  // namespace dpcomm
