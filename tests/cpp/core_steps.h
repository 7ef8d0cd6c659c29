// Sequences of calls on racing ranks, compared bit for bit with core_reference.h. No two ranks meet between calls: what
// one call left in slots, flags and headers is what the next one finds.
#pragma once
#include <algorithm>
#include <cstdio>
#include <random>

#include "check.h"
#include "core_reference.h"
#include "racing.h"

namespace steps {

using namespace dpcomm;
using racing::Shape;
using racing::World;
using Buffer = std::vector<char>;
using Layout = std::vector<int64_t>;  // elements of each segment

// One codec of one element type, on one kind of lanes.
template <class Lanes>
struct Coding {
  CodecKind codec;
  Dtype dtype;
  bool (*all_reduce)(Lanes&, const Team&, const Bucket&, const Header&);
};
template <class Lanes, class Codec>
Coding<Lanes> coding(CodecKind codec, Dtype dtype) {
  return {codec, dtype, &dpcomm::all_reduce<Codec, Lanes>};
}

// Ordinary numbers, some far below their neighbours, and in stretches of 300 elements: huge, tiny, denormal, and
// non-finite among ordinary ones.
inline double number(std::mt19937_64& random, int64_t i) {
  const double x = std::normal_distribution<double>()(random);
  switch (i / 300 % 5) {
    case 1:
      return x * 1e30;
    case 2:
      return x * 1e-30;
    case 3:
      return x * 1e-42;
    case 4:
      if (random() % 50 == 0) return random() % 2 ? -INFINITY : NAN;
  }
  return i % 7 == 0 ? -0.0 : i % 7 == 3 ? std::ldexp(x, -int(i % 45)) : x;
}

inline void fill(char* at, int64_t n, Dtype dtype, std::mt19937_64& random) {
  const int64_t size = element_bytes(dtype);
  for (int64_t i = 0; i < n; ++i) {
    const double x = number(random, i);
    const float f = float(x);
    uint64_t bits = random();  // integers: anything
    if (dtype == Dtype::float32) bits = expected::bits_of<uint32_t>(std::isnan(f) ? -f : f);
    if (dtype == Dtype::float64) bits = expected::bits_of<uint64_t>(x);
    if (dtype == Dtype::bfloat16) bits = expected::Bfloat16::nearest(f).code;
    if (dtype == Dtype::float16) bits = expected::Float16::nearest(f).code;
    std::memcpy(at + i * size, &bits, size_t(size));
  }
}

// One call of all ranks. Each has one allocation: its segments, with guard bytes around them that must survive.
class Step {
 public:
  Step(Algorithm algorithm, CodecKind codec, Dtype dtype, Op op, Layout layout, bool misaligned, int ranks,
       uint32_t seed)
      : algorithm(algorithm), codec(codec), dtype(dtype), op(op), layout(std::move(layout)) {
    const int64_t size = element_bytes(dtype);
    int64_t end = kGuard + (misaligned ? size : 0);
    for (const int64_t n : this->layout) {
      offsets_.push_back(end);
      end += (n * size + 15) / 16 * 16 + kGuard;
    }
    for (int r = 0; r < ranks; ++r) {
      memory.emplace_back(size_t(end), '\xa5');
      std::mt19937_64 random(seed * 64 + uint32_t(r));
      for (size_t s = 0; s < offsets_.size(); ++s)
        fill(&memory.back()[size_t(offsets_[s])], this->layout[s], dtype, random);
    }
    input = memory;
    table_.resize(memory.size());
  }

  // Call it once per rank before the lanes run: they share the table.
  Bucket bucket(int rank) {
    auto& table = table_[size_t(rank)];
    table.clear();
    int64_t groups = 0;
    for (size_t s = 0; s < layout.size(); ++s) {
      table.push_back({&memory[size_t(rank)][size_t(offsets_[s])], layout[s], groups});
      groups += groups_of(layout[s]);
    }
    return {table.data(), int64_t(table.size()), groups};
  }
  Header header(uint64_t sequence) const {
    Header h{};
    h.sequence = sequence;
    for (const int64_t n : layout) h.numel += n, h.layout = h.layout * 31 + uint64_t(n);
    h.tensors = int32_t(layout.size());
    h.bucket = -1;
    h.op = uint8_t(op), h.dtype = uint8_t(dtype), h.codec = uint8_t(codec), h.algorithm = uint8_t(algorithm);
    return h;
  }
  // What every rank's memory must hold afterwards, guard bytes and the padding of segments included.
  Buffer result(int rank) const {
    Buffer out = input[size_t(rank)];
    for (size_t s = 0; s < layout.size(); ++s) {
      const Buffer segment = reduced(s);
      std::copy(segment.begin(), segment.end(), out.begin() + offsets_[s]);
    }
    return out;
  }

  const Algorithm algorithm;
  const CodecKind codec;
  const Dtype dtype;
  const Op op;
  const Layout layout;
  std::vector<std::vector<int>> hosts;            // of algorithm two_level
  bool fp16_inside = false, fp16_between = true;  // of a call with codec fp16
  std::vector<Buffer> memory, input;

 private:
  static constexpr int64_t kGuard = 64;

  template <class Stored>
  static Buffer raw(const std::vector<Stored>& values) {
    const char* begin = reinterpret_cast<const char*>(values.data());
    return Buffer(begin, begin + values.size() * sizeof(Stored));
  }
  template <class Stored>
  Buffer reduced_as(size_t s) const {
    int64_t before = 0, all = 0;  // groups of the segments before this one; of the bucket
    for (size_t i = 0; i < layout.size(); ++i) {
      if (i < s) before += groups_of(layout[i]);
      all += groups_of(layout[i]);
    }
    const int64_t ranks = int64_t(input.size()), chunk = (all + ranks - 1) / ranks;
    std::vector<Stored> out;
    for (int64_t g = 0; g < groups_of(layout[s]); ++g) {
      std::vector<const Stored*> in;
      for (const Buffer& b : input) in.push_back(reinterpret_cast<const Stored*>(&b[size_t(offsets_[s])]) + g * kGroup);
      const int64_t n = std::min<int64_t>(kGroup, layout[s] - g * kGroup);
      const bool fp16 = codec == CodecKind::fp16;
      const expected::Groups<Stored> group(in, n, op, fp16, input.size());
      const auto y = algorithm == Algorithm::ring ? group.ring(size_t((before + g) / chunk))
                     : algorithm == Algorithm::two_level
                         ? expected::two_level<Stored>(in, hosts, n, op, fp16 && fp16_between, fp16 && fp16_inside)
                         : group.rank_order();
      out.insert(out.end(), y.begin(), y.end());
    }
    return raw(out);
  }
  Buffer reduced(size_t s) const {
    if (algorithm == Algorithm::ring && input.size() == 1) {  // nothing moves
      const char* const begin = &input[0][size_t(offsets_[s])];
      return Buffer(begin, begin + layout[s] * element_bytes(dtype));
    }
    if (dtype == Dtype::float64) return reduced_as<double>(s);
    if (dtype == Dtype::float16) return reduced_as<expected::Float16>(s);
    if (dtype == Dtype::bfloat16) return reduced_as<expected::Bfloat16>(s);
    if (dtype == Dtype::int32) return reduced_as<int32_t>(s);
    if (dtype == Dtype::int64) return reduced_as<int64_t>(s);
    return reduced_as<float>(s);
  }

  std::vector<int64_t> offsets_;
  std::vector<std::vector<Segment>> table_;  // [rank]
};

struct Kind {
  CodecKind codec;
  Dtype dtype;
};

// Every layout with every kind and algorithm, shuffled so that everything follows everything. every: only each
// every-th.
inline std::vector<Step> shuffled(const std::vector<Layout>& layouts, const std::vector<Kind>& kinds, int ranks,
                                  int every, uint32_t seed,
                                  const std::vector<Algorithm>& algorithms = {Algorithm::direct, Algorithm::oneshot,
                                                                              Algorithm::ring}) {
  std::vector<Step> all;
  uint32_t i = seed;
  for (const Layout& layout : layouts)
    for (const Kind& kind : kinds)
      for (const Algorithm algorithm : algorithms) {
        if (++i % uint32_t(every) != 0) continue;
        Op op = Op(i / uint32_t(every) % (kind.codec == CodecKind::fp16 ? 2 : 4));
        const bool whole = kind.dtype == Dtype::int32 || kind.dtype == Dtype::int64;
        if (whole && op == Op::mean) op = Op::sum;
        all.emplace_back(algorithm, kind.codec, kind.dtype, op, layout, i % 3 == 0, ranks, i);
      }
  std::vector<size_t> order(all.size());
  for (size_t k = 0; k < order.size(); ++k) order[k] = k;
  std::shuffle(order.begin(), order.end(), std::mt19937(seed));
  std::vector<Step> shuffled;
  for (const size_t k : order) shuffled.push_back(std::move(all[k]));
  return shuffled;
}

template <class Lanes>
bool play(Lanes& lanes, const Team& team, const std::vector<Coding<Lanes>>& codings, const Step& step,
          const Bucket& bucket, const Header& header) {
  for (const Coding<Lanes>& c : codings)
    if (c.codec == step.codec && c.dtype == step.dtype) return c.all_reduce(lanes, team, bucket, header);
  return CHECK(!"the step's codec is in the table");
}

inline void compare(const Shape& shape, Step& step, size_t number) {
  for (int r = 0; r < shape.ranks; ++r) {
    const Buffer want = step.result(r), &have = step.memory[size_t(r)];
    if (CHECK(have == want)) continue;
    const auto at = std::mismatch(have.begin(), have.end(), want.begin()).first - have.begin();
    std::fprintf(
        stderr,
        "  rank %d/%d, %d lanes, %d slots, shared %d, step %zu: algorithm %d codec %d dtype %d op %d, byte %td\n", r,
        shape.ranks, shape.lanes, shape.slots, shape.shared, number, int(step.algorithm), int(step.codec),
        int(step.dtype), int(step.op), at);
  }
}

// Plays the steps one after the other on all ranks; then compares all of them with the reference.
template <class Lanes>
void run(const Shape& shape, const std::vector<Coding<Lanes>>& codings, std::vector<Step>& script, uint32_t seed) {
  World world(shape);
  std::vector<std::vector<Bucket>> buckets;  // [step][rank]
  for (Step& step : script) {
    buckets.emplace_back();
    for (int r = 0; r < shape.ranks; ++r) buckets.back().push_back(step.bucket(r));
  }
  std::atomic<int> failures{0};
  world.run<Lanes>(seed, [&](Lanes& lanes, const Team& team) {
    constexpr uint64_t kFirst = 0xfffffffe;  // the low half wraps
    for (size_t i = 0; i < script.size(); ++i) {
      if (play(lanes, team, codings, script[i], buckets[i][size_t(team.rank)], script[i].header(kFirst + i))) continue;
      ++failures;
      return;
    }
  });
  if (!CHECK(failures == 0)) {
    const Failure f = unpack(world.failure);
    std::fprintf(stderr, "  %d ranks, %d lanes, %d slots, shared %d: cause %d rank %d field %d sequence %x\n",
                 shape.ranks, shape.lanes, shape.slots, shape.shared, int(f.cause), f.rank, int(f.field), f.sequence);
    return;
  }
  for (size_t i = 0; i < script.size(); ++i) compare(shape, script[i], i);
}

}  // namespace steps
