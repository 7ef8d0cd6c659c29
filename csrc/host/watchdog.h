// Tells when a peer's end of a socket closes, which is how a death shows, or when it has said something, and looks
// after what nobody else looks at: one thread per process for all communicators. Knows nothing of ranks.
#pragma once
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <thread>

#include "unique_fd.h"

namespace dpcomm {

// The thread starts with the first watch and ends with the last. A forked child starts with none, and ids of its parent
// mean nothing there.
class Watchdog {
 public:
  static Watchdog& instance();

  // Calls on_hangup once, from the watchdog's thread, when the other end of the socket has closed. It must not throw.
  // Bytes that arrive meanwhile are dropped. fd stays the caller's, open until forget() and watched once at a time.
  uint64_t watch(int fd, std::function<void()> on_hangup);

  // The same for a caller who reads the socket itself: calls on_readable whenever there is something to read, the end
  // included, until it returns false. It must not throw, and not wait.
  uint64_t watch_bytes(int fd, std::function<bool()> on_readable);

  // Calls on_tick again and again, every kTickMs, from the watchdog's thread. It must not throw, and not wait.
  uint64_t tick(std::function<void()> on_tick);
  static constexpr int kTickMs = 100;

  // When it returns the callback neither runs nor will run: do not hold a lock that the callback takes. From inside the
  // callback it returns at once. Unknown ids are ignored.
  void forget(uint64_t id);

 private:
  struct Watch {
    int fd;                          // -1 once it has hung up, and for what ticks
    bool ticks;                      // else it waits for fd
    std::function<bool()> callback;  // false: not again. Empty while it runs
  };

  explicit Watchdog(Watchdog* inherited) : generation_(fork_generation()), inherited_(inherited) {}
  void start();
  void run();
  uint64_t add_watch(Watch watch);
  void look(uint64_t id, std::unique_lock<std::mutex>& lock);
  void tick_all(std::unique_lock<std::mutex>& lock);
  void call(uint64_t id, std::unique_lock<std::mutex>& lock);
  void stop_polling(Watch& watch) const;
  void wake() const;

  const uint64_t generation_;
  Watchdog* const inherited_;  // the parent's, kept reachable: its mutex may be locked for ever
  std::mutex mutex_;           // guards all below
  std::condition_variable changed_;
  std::map<uint64_t, Watch> watches_;
  uint64_t calling_ = 0;  // whose callback runs now; 0: nobody's
  bool running_ = false;
  int ticking_ = 0;  // watches that tick
  std::thread::id thread_;
  UniqueFd epoll_, wake_;
};

}  // namespace dpcomm
