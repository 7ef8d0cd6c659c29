#include "watchdog.h"

#include <pthread.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <system_error>

#include "../error.h"
#include "signals_blocked.h"

namespace dpcomm {
namespace {

using Clock = std::chrono::steady_clock;

constexpr uint64_t kWakeId = 0;  // in epoll's data; watches count from 1

// True when the other end has closed. Reads a little of what came, and drops it: descriptors sent along too. (epoll
// comes back as long as there is more, so the end is found behind any number of bytes.)
bool hung_up(int fd) {
  char dropped[4096];
  const ssize_t n = ::recv(fd, dropped, sizeof dropped, MSG_DONTWAIT);
  return n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR);
}

void add(int epoll, int fd, uint64_t id) {
  epoll_event event{};
  event.events = EPOLLIN;
  event.data.u64 = id;
  if (::epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event) != 0) throw resource_error("epoll_ctl(EPOLL_CTL_ADD)", errno);
}

}  // namespace

// Never destroyed: the thread may still be there while the process exits.
Watchdog& Watchdog::instance() {
  static std::atomic<Watchdog*> current{nullptr};
  Watchdog* seen = current.load(std::memory_order_acquire);  // pairs with (1)
  while (seen == nullptr || seen->generation_ != fork_generation()) {
    auto* const made = new Watchdog(seen);
    if (current.compare_exchange_strong(seen, made, std::memory_order_acq_rel)) return *made;  // (1)
    delete made;
  }
  return *seen;
}

uint64_t Watchdog::watch(int fd, std::function<void()> on_hangup) {
  return watch_bytes(fd, [fd, on_hangup = std::move(on_hangup)] {
    if (!hung_up(fd)) return true;
    on_hangup();
    return false;
  });
}

uint64_t Watchdog::watch_bytes(int fd, std::function<bool()> on_readable) {
  return add_watch({fd, false, std::move(on_readable)});
}

uint64_t Watchdog::tick(std::function<void()> on_tick) {
  return add_watch({-1, true, [on_tick = std::move(on_tick)] {
                      on_tick();
                      return true;
                    }});
}

uint64_t Watchdog::add_watch(Watch watch) {
  static std::atomic<uint64_t> last_id{kWakeId};  // goes on counting in a forked child: no id means two things there
  std::lock_guard lock(mutex_);
  if (!running_) start();
  const uint64_t id = last_id.fetch_add(1, std::memory_order_relaxed) + 1;
  const int fd = watch.fd;
  const bool ticks = watch.ticks;
  try {
    watches_.emplace(id, std::move(watch));
    if (!ticks) add(epoll_.get(), fd, id);
  } catch (...) {
    watches_.erase(id);
    wake();  // the thread ends if it has nothing to look at
    throw;
  }
  if (ticks && ticking_++ == 0) wake();  // it may be waiting without a limit
  changed_.notify_all();                 // a forget() may wait for the thread's end, which is off now
  return id;
}

void Watchdog::forget(uint64_t id) {
  decltype(watches_)::node_type
      gone;  // dies after the lock: what the callback has captured may forget watches of its own
  std::unique_lock lock(mutex_);
  const auto at = watches_.find(id);
  if (at != watches_.end()) {
    stop_polling(at->second);
    if (at->second.ticks) --ticking_;
    gone = watches_.extract(at);
  }
  if (!running_ || std::this_thread::get_id() == thread_) return;
  changed_.wait(lock, [&] { return calling_ != id; });
  if (!watches_.empty()) return;
  wake();
  // Somebody else's callback may take long, or need what our caller holds: then the thread ends without us.
  changed_.wait(lock, [&] { return !running_ || !watches_.empty() || calling_ != 0; });
}

void Watchdog::start() {
  UniqueFd epoll = UniqueFd::opened_by([] { return ::epoll_create1(EPOLL_CLOEXEC); });
  if (!epoll) throw resource_error("epoll_create1", errno);
  UniqueFd eventfd = UniqueFd::opened_by([] { return ::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK); });
  if (!eventfd) throw resource_error("eventfd", errno);
  add(epoll.get(), eventfd.get(), kWakeId);
  try {
    const SignalsBlocked inherited;
    std::thread thread([this] { run(); });
    thread_ = thread.get_id();
    thread.detach();
  } catch (const std::system_error& error) {
    throw resource_error("starting the watchdog's thread", error.code().value());
  }
  epoll_ = std::move(epoll);
  wake_ = std::move(eventfd);
  running_ = true;
}

// epoll keeps no file open, unlike poll: a socket that is forgotten and closed is closed for its peer at once.
void Watchdog::run() {
  pthread_setname_np(pthread_self(), "dpcomm-watchdog");
  std::unique_lock lock(mutex_);
  auto next_tick = Clock::now();
  while (!watches_.empty()) {
    const int epoll = epoll_.get(), limit_ms = ticking_ > 0 ? kTickMs : -1;
    lock.unlock();
    epoll_event events[16];
    const int n = ::epoll_wait(epoll, events, 16, limit_ms);  // ends with the last watch: forget() wakes it
    lock.lock();
    for (int i = 0; i < n; ++i) look(events[i].data.u64, lock);
    if (ticking_ == 0 || Clock::now() < next_tick) continue;
    tick_all(lock);
    next_tick = Clock::now() + std::chrono::milliseconds(kTickMs);
  }
  epoll_.reset();
  wake_.reset();
  running_ = false;
  changed_.notify_all();
}

void Watchdog::look(uint64_t id, std::unique_lock<std::mutex>& lock) {
  if (id == kWakeId) {
    uint64_t count;
    while (::read(wake_.get(), &count, sizeof count) < 0 && errno == EINTR) continue;
    return;
  }
  const auto at = watches_.find(id);
  if (at != watches_.end() && at->second.fd >= 0) call(id, lock);  // else forgotten since epoll_wait returned
}

void Watchdog::tick_all(std::unique_lock<std::mutex>& lock) {
  for (uint64_t id = kWakeId;;) {  // by id: a callback may watch and forget
    auto at = watches_.upper_bound(id);
    while (at != watches_.end() && !at->second.ticks) ++at;
    if (at == watches_.end()) return;
    id = at->first;
    call(id, lock);
  }
}

// What the callback has captured is gone before forget() returns, and goes without the lock: it may forget watches.
void Watchdog::call(uint64_t id, std::unique_lock<std::mutex>& lock) {
  std::function<bool()> callback = std::move(watches_.at(id).callback);
  calling_ = id;
  lock.unlock();
  const bool again = callback();
  lock.lock();
  const auto at = watches_.find(id);
  const bool kept = at != watches_.end();  // not forgotten meanwhile
  if (kept && again) {
    at->second.callback = std::move(callback);
  } else {
    if (kept) stop_polling(at->second);
    lock.unlock();
    callback = nullptr;
    lock.lock();
  }
  calling_ = 0;
  changed_.notify_all();
}

void Watchdog::stop_polling(Watch& watch) const {
  if (watch.fd >= 0) ::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, watch.fd, nullptr);
  watch.fd = -1;
}

void Watchdog::wake() const {
  const uint64_t one = 1;
  while (::write(wake_.get(), &one, sizeof one) < 0 && errno == EINTR) continue;
}

}  // namespace dpcomm
