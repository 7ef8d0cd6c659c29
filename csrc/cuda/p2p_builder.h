// How a p2p communicator comes to be: in stages, so that all ranks can compare outcomes between them and either all go
// on or all raise the same error.
#pragma once
#include <map>
#include <memory>

#include "../host/rendezvous.h"
#include "p2p_engine.h"

namespace dpcomm {

// Stage validate: CTAs that each of `ranks_here` ranks of this process may use on the device. Loads all kernels.
int p2p_channels(int device, int ranks_here, const P2pWish& wish);

class P2pBuilder {
 public:
  // Stage allocate: host memory, the arena, a listening socket. channels: the least that any rank may use.
  P2pBuilder(int rank, int nranks, int device, const P2pWish& wish, int channels);

  ~P2pBuilder();

  const Endpoint& endpoint() const { return rendezvous_.endpoint(); }
  std::vector<bool> probe(const std::vector<Endpoint>& endpoints) { return rendezvous_.probe(endpoints); }
  // Stage bind: handshakes, descriptors, mappings; the peers' arenas.
  void bind(const Secret& secret, double timeout_s);
  // Stage verify: the first calls. The builder is used up.
  std::unique_ptr<P2pEngine> finish(double timeout_s, const std::string& name);

  int rejected() const { return rendezvous_.rejected(); }
  const std::vector<std::string>& warnings() const { return rendezvous_.warnings(); }

 private:
  void reach(int rank, int pid);

  const int rank_, device_;
  const P2pGeometry geometry_;
  const size_t host_bytes_;
  Arena host_;
  PeerMemory arena_;
  Rendezvous rendezvous_;
  std::shared_ptr<P2pMemory> memory_;
  std::vector<P2pEngine::Peer> peers_;
};

// Several ranks in this process, one for each device that is named; a device may be named more than once.
std::vector<std::unique_ptr<P2pEngine>> p2p_local(const std::vector<int>& devices, const P2pWish& wish,
                                                  double timeout_s, const std::string& name);

}  // namespace dpcomm
