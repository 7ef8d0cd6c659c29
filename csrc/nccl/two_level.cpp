// Two levels: NCCL carries what goes inside a host, too. It takes the fastest way between two GPUs of a host that works
// (NVLink, PCIe, host memory), and has tried it.
#include <algorithm>

#include "../host/call_facts.h"
#include "launcher.h"

namespace dpcomm {

// What moves values inside the host: a launch before an exchange, and one behind it. All is in the order of the steps'
// stream, so one slot for each rank is enough.
class NcclEngine::InsideHost final : public Inside {
 public:
  InsideHost(NcclEngine& engine, const Flight& flight, const Shards& shards, std::vector<Launcher>& between)
      : engine_(engine),
        memory_(*engine.memory_->two_level),
        all_(memory_.partition()),
        bucket_{engine.segments_.data(), flight.table.count, flight.table.groups},
        shards_(shards),
        between_(between),
        codec_(memory_.inside(flight.call.codec)),
        group_bytes_(group_bytes(flight.call.dtype, codec_)),
        kernel_(inside_kernel(flight.call.dtype, codec_)),
        launch_{.bucket = flight.table,
                .shards = shards,
                .slice = 0,
                .number = 0,
                .part = 0,
                .count = 0,
                .moves = {},
                .rank = all_.local(),
                .size = all_.size(),
                .stride = memory_.inside_slot_bytes(),
                .op = flight.call.op,
                .nonfinite_groups = engine.memory_->nonfinite_groups.data()} {}

  bool round(LocalTurn turn, int64_t slice, int part) override {
    for (Launcher& steps : between_) steps.pause();                  // what they have written is spread now
    if (all_.size() == 1 && codec_ == CodecKind::none) return true;  // its own sum already
    launch_.slice = slice, launch_.part = part;
    for (launch_.number = 0; launch_.number < shards_.messages(); ++launch_.number) {
      sends_.clear(), receives_.clear();
      if (!(turn == LocalTurn::gather ? gather() : spread())) return false;
    }
    return true;
  }
  const Arrival& end() const { return end_; }

 private:
  bool gather() {
    const int me = all_.local();
    const Range mine = range_of(me);
    each_other([&](int owner) {
      const Range theirs = range_of(owner);
      send(owner, shown_in(owner, memory_.given(owner)), theirs);
      receive(owner, memory_.contribution(owner), mine);
    });
    if (codec_ != CodecKind::none) move(InsideMove::Kind::put, me, memory_.contribution(me));  // added like everyone's
    if (!exchange()) return false;
    move(InsideMove::Kind::add, me, memory_.contribution(0));
    pause();
    return true;
  }

  bool spread() {
    const int me = all_.local();
    const Range mine = range_of(me);
    char* const from = shown_in(me, memory_.shown(me));
    if (codec_ != CodecKind::none) {  // as all others will decode it
      pause();
      move(InsideMove::Kind::get, me, from);
    }
    each_other([&](int owner) {
      const Range theirs = range_of(owner);
      send(owner, from, mine);
      char* const to = in_memory(theirs);
      receive(owner, to ? to : memory_.shown(owner), theirs);
    });
    if (!exchange()) return false;
    each_other([&](int owner) {
      const Range theirs = range_of(owner);
      if (!in_memory(theirs)) move(InsideMove::Kind::get, owner, memory_.shown(owner));
    });
    pause();
    return true;
  }

  // My neighbour first: not all at local rank 0 at once.
  template <class Body>
  void each_other(Body body) const {
    for (int step = 1; step < all_.size(); ++step) body((all_.local() + step) % all_.size());
  }
  char* in_memory(Range range) const {
    return codec_ == CodecKind::none ? values_in(bucket_, range, group_bytes_) : nullptr;
  }
  Range range_of(int owner) const { return shards_.range(owner, launch_.slice, launch_.part, launch_.number); }
  // Where what is of an owner can be sent from: user memory, or the slot that it is put into.
  char* shown_in(int owner, char* slot) {
    if (char* const from = in_memory(range_of(owner))) return from;
    move(InsideMove::Kind::put, owner, slot);
    return slot;
  }
  void send(int local, char* from, Range range) {
    if (range.groups > 0) sends_.push_back({all_.rank_of(local), from, range.groups * group_bytes_});
  }
  void receive(int local, char* to, Range range) {
    if (range.groups > 0) receives_.push_back({all_.rank_of(local), to, range.groups * group_bytes_});
  }
  bool exchange() {
    pause();
    if (sends_.empty() && receives_.empty()) return true;
    end_ = engine_.carrier_->wait(engine_.carrier_->exchange(sends_, receives_), engine_.timeout_s_);
    return end_.kind == Arrival::Kind::here;
  }

  void move(InsideMove::Kind kind, int owner, char* message) {
    if (range_of(owner).groups == 0) return;
    if (launch_.count == kMostMoves) pause();
    launch_.moves[launch_.count++] = {kind, owner, message};
  }
  void pause() {
    if (launch_.count == 0) return;
    int64_t groups = 0;
    for (int i = 0; i < launch_.count; ++i) groups += range_of(launch_.moves[i].owner).groups;
    engine_.launch(kernel_, ctas_of(groups, engine_.most_ctas_), &launch_);
    launch_.count = 0;
  }

  NcclEngine& engine_;
  TwoLevelMemory& memory_;
  const Partition& all_;
  const Bucket bucket_;
  const Shards& shards_;
  std::vector<Launcher>& between_;
  const CodecKind codec_;
  const int64_t group_bytes_;
  const void* const kernel_;
  InsideLaunch launch_;
  std::vector<Transfer> sends_, receives_;
  Arrival end_;
};

bool NcclEngine::serves_two_levels(const Call& call) const {
  Call open = call;
  open.algorithm = Algorithm::automatic;
  return memory_->two_level && served(open);
}

// Cuts the bucket into shards; the tables of those that this rank owns come behind the bucket's own.
void NcclEngine::cut_shards(Flight& flight, std::vector<Segment>& table) const {
  const TwoLevelMemory& memory = *memory_->two_level;
  const Partition& all = memory.partition();
  flight.header.layout ^= all.hash();
  flight.between = header_between(flight.header, flight.table.groups, all);
  flight.shards = memory.cut(flight.table.groups, flight.between);
  const Bucket whole{table.data(), flight.table.count, flight.table.groups};
  std::vector<Segment> tables, part;
  for (int j = 0; j < all.owned(); ++j) {
    const Range range = flight.shards.shard(all.shard(j));
    const Bucket shard = part_of(whole, range, element_bytes(flight.call.dtype), part);
    flight.parts.push_back({flight.table.count + int64_t(tables.size()), shard.count, shard.groups});
    tables.insert(tables.end(), part.begin(), part.end());
    flight.wire_bytes += dpcomm::wire_bytes(flight.between, range.groups, all.host(), all.nhosts(), Reach::network);
  }
  table.insert(table.end(), tables.begin(), tables.end());
}

Arrival NcclEngine::move_in_two_levels(const Flight& flight) {
  const TwoLevelMemory& memory = *memory_->two_level;
  const Partition& all = memory.partition();
  const int64_t bytes = group_bytes(flight.call.dtype, flight.call.codec);
  carrier_->begin(true);
  std::vector<std::vector<int>> owners;
  std::vector<Bucket> buckets;
  std::vector<Launcher> steps;
  std::vector<Player> players;
  owners.reserve(flight.parts.size()), buckets.reserve(flight.parts.size());
  steps.reserve(flight.parts.size()), players.reserve(flight.parts.size());
  for (size_t j = 0; j < flight.parts.size(); ++j) {
    const Part& part = flight.parts[j];
    const Team& team = memory.team(int(j));
    owners.push_back(all.owners(all.shard(int(j))));
    buckets.push_back({segments_.data() + part.first, part.count, part.groups});
    steps.emplace_back(*this, team, flight.between, table_of(flight, part));
    const CarriedCall call{team, buckets.back(), flight.between, bytes, timeout_s_, owners.back().data()};
    players.emplace_back(*carrier_, steps.back(), call);
  }
  InsideHost inside(*this, flight, flight.shards, steps);
  const auto end = play(players, inside, flight.shards, all.host());
  for (Launcher& last : steps) last.pause();
  return end ? *end : inside.end();
}

}  // namespace dpcomm
