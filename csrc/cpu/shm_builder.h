// How an shm communicator comes to be: in stages, so that all ranks can compare outcomes between them and either all go
// on or all raise the same error.
#pragma once
#include <memory>

#include "../host/rendezvous.h"
#include "host_team.h"
#include "shm_engine.h"

namespace dpcomm {

class ShmBuilder {
 public:
  // Stage allocate: memory and a listening socket. simd: "" for the best usable instruction set.
  ShmBuilder(int rank, int nranks, const Wish& wish, const std::string& simd);

  const Endpoint& endpoint() const { return rendezvous_.endpoint(); }
  std::vector<bool> probe(const std::vector<Endpoint>& endpoints) { return rendezvous_.probe(endpoints); }
  // Stage bind: handshakes, descriptors, mappings.
  void bind(const Secret& secret, double timeout_s);
  // The memory of all ranks, for an engine that shares it inside a host only; after bind. The builder is used up.
  std::unique_ptr<HostMemory> share(std::vector<std::vector<int>> hosts, CodecKind codec);
  // Stage verify: the first calls. The builder is used up.
  std::unique_ptr<ShmEngine> finish(double timeout_s, const std::string& name);

  int rejected() const { return rendezvous_.rejected(); }
  const std::vector<std::string>& warnings() const { return rendezvous_.warnings(); }

 private:
  const int rank_;
  const Isa& isa_;
  const Geometry geometry_;
  Arena arena_;
  Rendezvous rendezvous_;
  std::vector<ShmEngine::Peer> peers_;
};

// Ranks that are threads of this process: memory without a name, no sockets.
std::vector<std::unique_ptr<ShmEngine>> local_engines(int nranks, const Wish& wish, double timeout_s,
                                                      const std::string& simd, const std::string& name);

}  // namespace dpcomm
