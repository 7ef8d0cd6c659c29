// One rank's NCCL communicator. It never blocks: what NCCL has not finished yet is asked for again and again, with a
// deadline; and it can be aborted from any thread at any time.
#pragma once
#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>

#include "../error.h"
#include "library.h"

namespace dpcomm {

class NcclCommunicator {
 public:
  // Thrown where NCCL refuses or breaks; the engine says what is behind it.
  struct Broken : std::runtime_error {
    using std::runtime_error::runtime_error;
  };

  // Whoever lets go of it waits for NCCL two seconds at most; what has not ended by then is left to the process's end.
  struct LetGo {
    void operator()(NcclCommunicator* comm) const;
  };
  static std::unique_ptr<NcclCommunicator, LetGo> make(const nccl::Library& library);
  NcclCommunicator(const NcclCommunicator&) = delete;

  // Joins all ranks, on the current device. `stopped` is asked every few milliseconds; true ends the wait (Broken).
  void connect(const nccl::UniqueId& id, int rank, int nranks, const std::function<bool()>& stopped);

  // Calls body(api, comm) between ncclGroupStart and ncclGroupEnd, and waits until NCCL has taken it all, which is at
  // once but for the first message to a peer. One thread at a time. Throws Broken.
  void group(const std::function<void(const nccl::Api&, nccl::Comm)>& body, const std::function<bool()>& stopped);

  // What has gone wrong on NCCL's own threads; empty: nothing.
  std::string async_error();

  // Ends all of NCCL's work on the GPU, in a thread of its own: ncclCommAbort may take long, or for ever. Any thread.
  void abort();
  bool abort_has_returned() const { return abort_returned_; }
  bool aborting() const { return aborting_; }

  // Gives the communicator back; nothing is in flight. False: NCCL did not come back in time and keeps what it has.
  bool close(double timeout_s);

  const nccl::Library& library() const { return library_; }
  // For body: throws Broken unless NCCL has taken it.
  void took(nccl::Result result, const char* what) const;

 private:
  explicit NcclCommunicator(const nccl::Library& library) : library_(library) {}
  ~NcclCommunicator() = default;
  void settle(const char* what, const std::function<bool()>& stopped);
  std::string text(nccl::Result result, const char* what) const;

  const nccl::Library& library_;
  std::atomic<nccl::Comm> comm_{nullptr};
  std::mutex mutex_;        // held during each of NCCL's calls, but not while waiting between them
  bool unsettled_ = false;  // a wait for NCCL was given up: until it is aborted only its errors may be asked for
  std::atomic<bool> aborting_{false}, abort_returned_{false};
  std::thread ender_;  // runs ncclCommAbort, or what close() calls
};

}  // namespace dpcomm
