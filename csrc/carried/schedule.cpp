#include "schedule.h"

namespace dpcomm {

// Slots of a stream are used in turn. In direct, message c is in use from round c to c + kAhead if it is given, from
// c + kAhead to c + 2 kAhead if it is a result: never more than kAhead + 1 of a stream at once. In a ring a window of
// kCarriedSlots / 2 messages is on its way while as many are being read.
static_assert(kCarriedSlots > kAhead && (kCarriedSlots & (kCarriedSlots - 1)) == 0);

char* values_in(const Bucket& bucket, Range range, int64_t group_bytes) {
  if (range.groups == 0) return nullptr;
  const Segment& s = bucket.segments[segment_of(bucket, range.first)];
  const int64_t first = range.first - s.first_group;
  return first + range.groups <= s.elems / kGroup ? s.data + first * group_bytes : nullptr;
}

Player::Player(Carrier& carrier, Stepper& stepper, const CarriedCall& call)
    : carrier_(carrier),
      stepper_(stepper),
      call_(call),
      t_(call.team),
      algorithm_(Algorithm(call.header.algorithm)),
      chunks_(Chunks::cut(call.bucket.groups, algorithm_ == Algorithm::oneshot ? 1 : t_.nranks,
                          most_groups(t_.slot_bytes, t_.slice_bytes, call.group_bytes))),
      values_travel_(CodecKind(call.header.codec) == CodecKind::none) {}

bool Player::round(int64_t number) {
  if (call_.bucket.groups == 0) return true;
  if (algorithm_ == Algorithm::oneshot) {
    if (in_call(number)) give_all(number);
    if (!in_call(number - kAhead)) return true;
    if (!arrived()) return false;
    run({Step::Kind::reduce, t_.rank, number - kAhead, 0, 0, 0});
    return true;
  }
  if (in_call(number)) give(number);
  if (in_call(number - kAhead) && !reduce(number - kAhead)) return false;
  return !in_call(number - 2 * kAhead) || take(number - 2 * kAhead);
}

void Player::give(int64_t slice) {
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

bool Player::reduce(int64_t slice) {
  if (!arrived()) return false;
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
  return true;
}

bool Player::take(int64_t slice) {
  if (!arrived()) return false;
  for (int step = 1; step < t_.nranks; ++step) {
    const int peer = (t_.rank + step) % t_.nranks;
    const Range range = chunks_.range(slice, peer);
    if (range.groups > 0 && !in_memory(range)) run({Step::Kind::take, peer, slice, 0, 0, 0});
  }
  return true;
}

void Player::give_all(int64_t slice) {
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
bool Player::ring() {
  const int turns = 2 * t_.nranks - 1;
  const int64_t window = t_.slots / 2;
  if (call_.bucket.groups == 0) return true;
  for (int64_t first = 0; first < chunks_.slices; first += window)
    for (int turn = 0; turn < turns; ++turn)
      for (int64_t c = first; c < first + window && c < chunks_.slices; ++c)
        if (!this->turn(c, turn)) return false;
  return true;
}

bool Player::turn(int64_t slice, int turn) {
  const int next = (t_.rank + 1) % t_.nranks, previous = (t_.rank + t_.nranks - 1) % t_.nranks;
  if (turn > 0 && !arrived()) return false;
  run({Step::Kind::turn, next, slice, turn, ring_sent_, ring_read_});
  if (turn > 0) ++ring_read_;
  if (turn == 2 * t_.nranks - 2) return true;
  begin();
  send(next, slot(t_, kRing, t_.rank, next, ring_sent_), ring_range(slice, t_.rank - turn));
  receive(previous, slot(t_, kRing, previous, t_.rank, ring_sent_), ring_range(slice, previous - turn));
  start();
  ++ring_sent_;
  return true;
}

Range Player::ring_range(int64_t slice, int chunk) const {
  return chunks_.range(slice, (chunk + 2 * t_.nranks) % t_.nranks);
}

char* Player::in_memory(Range range) const {
  if (!values_travel_) return nullptr;
  return values_in(call_.bucket, range, call_.group_bytes);
}

void Player::send(int peer, char* from, Range range) {
  if (range.groups > 0) sends_.push_back({carried(peer), from, range.groups * call_.group_bytes});
}

void Player::receive(int peer, char* to, Range range) {
  if (range.groups > 0) receives_.push_back({carried(peer), to, range.groups * call_.group_bytes});
}

void Player::start() {
  stepper_.pause();
  tickets_.push_back(carrier_.exchange(sends_, receives_));
}

// Every algorithm needs its exchanges in the order in which it started them.
bool Player::arrived() {
  stepper_.pause();
  const int64_t ticket = tickets_.front();
  tickets_.pop_front();
  end_ = carrier_.wait(ticket, call_.timeout_s);
  return end_.kind == Arrival::Kind::here;
}

Arrival play(Carrier& carrier, Stepper& stepper, const CarriedCall& call) {
  Player player(carrier, stepper, call);
  if (Algorithm(call.header.algorithm) == Algorithm::ring) {
    if (!player.ring()) return player.end();
  } else {
    for (int64_t number = 0; number < player.slices() + 2 * kAhead; ++number)
      if (!player.round(number)) return player.end();
  }
  stepper.pause();
  return {};
}

}  // namespace dpcomm
