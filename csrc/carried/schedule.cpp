#include "schedule.h"

#include <utility>

namespace dpcomm {

namespace {

// Slots of a stream are used in turn. In direct, message c is in use from round c to c + kAhead if it is given, from
// c + kAhead to c + 2 kAhead if it is a result: never more than kAhead + 1 of a stream at once. In a ring a window of
// kCarriedSlots / 2 messages is on its way while as many are being read.
static_assert(kCarriedSlots > kAhead && (kCarriedSlots & (kCarriedSlots - 1)) == 0);

class Player {
 public:
  Player(Carrier& carrier, Stepper& stepper, const CarriedCall& call)
      : carrier_(carrier),
        stepper_(stepper),
        call_(call),
        t_(call.team),
        algorithm_(Algorithm(call.header.algorithm)),
        chunks_(Chunks::cut(call.bucket.groups, algorithm_ == Algorithm::oneshot ? 1 : t_.nranks,
                            most_groups(t_.slot_bytes, t_.slice_bytes, call.group_bytes))),
        values_travel_(CodecKind(call.header.codec) == CodecKind::none) {}

  Arrival play() {
    if (call_.bucket.groups == 0) return {};
    switch (algorithm_) {
      case Algorithm::direct:
        direct();
        break;
      case Algorithm::oneshot:
        oneshot();
        break;
      case Algorithm::ring:
        ring();
        break;
      case Algorithm::automatic:
      case Algorithm::native:
        break;  // the engine has chosen
    }
    stepper_.pause();
    return std::move(end_);
  }

 private:
  void direct() {
    for (int64_t c = 0; c < chunks_.slices + 2 * kAhead && good_; ++c) {
      if (c < chunks_.slices) give(c);
      if (good_ && in_call(c - kAhead)) reduce(c - kAhead);
      if (good_ && in_call(c - 2 * kAhead)) take(c - 2 * kAhead);
    }
  }

  void give(int64_t slice) {
    const Range mine = chunks_.range(slice, t_.rank);
    begin();
    for (int step = 1; step < t_.nranks; ++step) {  // my neighbour first: not all at rank 0 at once
      const int peer = (t_.rank + step) % t_.nranks;
      const Range range = chunks_.range(slice, peer);
      char* from = in_memory(range);
      if (!from) {
        from = slot(t_, kGiven, t_.rank, peer, uint32_t(slice));
        if (range.groups > 0) run({Step::Kind::give, peer, slice, 0, 0, 0});
      }
      send(peer, from, range);
      receive(peer, slot(t_, kGiven, peer, t_.rank, uint32_t(slice)), mine);
    }
    // What a codec makes of my own contribution is added, like everyone's.
    if (!values_travel_ && mine.groups > 0) run({Step::Kind::give, t_.rank, slice, 0, 0, 0});
    start();
  }

  void reduce(int64_t slice) {
    if (!arrived()) return;
    const Range mine = chunks_.range(slice, t_.rank);
    char* const place = in_memory(mine);
    char* const from = place ? place : slot(t_, kResult, t_.rank, t_.rank, uint32_t(slice));
    if (mine.groups > 0) run({Step::Kind::reduce, t_.rank, slice, 0, 0, 0}, place != nullptr);
    begin();
    for (int step = 1; step < t_.nranks; ++step) {
      const int peer = (t_.rank + step) % t_.nranks;
      const Range range = chunks_.range(slice, peer);
      char* const to = in_memory(range);
      send(peer, from, mine);
      receive(peer, to ? to : slot(t_, kResult, peer, t_.rank, uint32_t(slice)), range);
    }
    start();
  }

  void take(int64_t slice) {
    if (!arrived()) return;
    for (int step = 1; step < t_.nranks; ++step) {
      const int peer = (t_.rank + step) % t_.nranks;
      const Range range = chunks_.range(slice, peer);
      if (range.groups > 0 && !in_memory(range)) run({Step::Kind::take, peer, slice, 0, 0, 0});
    }
  }

  void oneshot() {
    for (int64_t c = 0; c < chunks_.slices + kAhead && good_; ++c) {
      if (c < chunks_.slices) give_all(c);
      if (good_ && in_call(c - kAhead) && arrived()) run({Step::Kind::reduce, t_.rank, c - kAhead, 0, 0, 0});
    }
  }

  void give_all(int64_t slice) {
    const Range range = chunks_.range(slice, 0);
    char* from = in_memory(range);
    if (!from) {
      from = slot(t_, kResult, t_.rank, t_.rank, uint32_t(slice));
      run({Step::Kind::give, t_.rank, slice, 0, 0, 0});
    }
    begin();
    for (int step = 1; step < t_.nranks; ++step) {
      const int peer = (t_.rank + step) % t_.nranks;
      send(peer, from, range);
      receive(peer, slot(t_, kResult, peer, t_.rank, uint32_t(slice)), range);
    }
    start();
  }

  // core/ring.h without its flags: message m of this rank and of the previous one travel in the same exchange.
  void ring() {
    const int turns = 2 * t_.nranks - 1;
    const int next = (t_.rank + 1) % t_.nranks, previous = (t_.rank + t_.nranks - 1) % t_.nranks;
    const int64_t window = t_.slots / 2;
    uint32_t sent = 0, read = 0;
    for (int64_t first = 0; first < chunks_.slices; first += window)
      for (int turn = 0; turn < turns; ++turn)
        for (int64_t c = first; c < first + window && c < chunks_.slices; ++c) {
          if (turn > 0 && !arrived()) return;
          run({Step::Kind::turn, next, c, turn, sent, read});
          if (turn > 0) ++read;
          if (turn == turns - 1) continue;
          begin();
          send(next, slot(t_, kRing, t_.rank, next, sent), ring_range(c, t_.rank - turn));
          receive(previous, slot(t_, kRing, previous, t_.rank, sent), ring_range(c, previous - turn));
          start();
          ++sent;
        }
  }
  Range ring_range(int64_t slice, int chunk) const { return chunks_.range(slice, (chunk + 2 * t_.nranks) % t_.nranks); }

  bool in_call(int64_t slice) const { return slice >= 0 && slice < chunks_.slices; }

  // Where the values of whole groups lie as they would in a message: what travels is what user memory holds.
  char* in_memory(Range range) const {
    if (!values_travel_ || range.groups == 0) return nullptr;
    const Segment& s = call_.bucket.segments[segment_of(call_.bucket, range.first)];
    const int64_t first = range.first - s.first_group;
    return first + range.groups <= s.elems / kGroup ? s.data + first * call_.group_bytes : nullptr;
  }

  void run(const Step& step, bool in_place = false) { stepper_.play(step, in_place); }

  void begin() { sends_.clear(), receives_.clear(); }
  void send(int peer, char* from, Range range) {
    if (range.groups > 0) sends_.push_back({peer, from, range.groups * call_.group_bytes});
  }
  void receive(int peer, char* to, Range range) {
    if (range.groups > 0) receives_.push_back({peer, to, range.groups * call_.group_bytes});
  }
  void start() {
    stepper_.pause();
    const int64_t ticket = carrier_.exchange(sends_, receives_);
    if (next_ < 0) next_ = ticket;
  }

  // Every algorithm needs its exchanges in the order in which it started them.
  bool arrived() {
    stepper_.pause();
    end_ = carrier_.wait(next_++, call_.timeout_s);
    return good_ = end_.kind == Arrival::Kind::here;
  }

  Carrier& carrier_;
  Stepper& stepper_;
  const CarriedCall& call_;
  const Team& t_;
  const Algorithm algorithm_;
  const Chunks chunks_;
  const bool values_travel_;
  std::vector<Transfer> sends_, receives_;
  int64_t next_ = -1;  // ticket to wait for
  bool good_ = true;
  Arrival end_;
};

}  // namespace

Arrival play(Carrier& carrier, Stepper& stepper, const CarriedCall& call) {
  return Player(carrier, stepper, call).play();
}

}  // namespace dpcomm
