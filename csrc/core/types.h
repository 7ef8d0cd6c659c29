// The words that a call is described with. Plain data, the same for every instruction set and both sides of a wire.
#pragma once
#include <cstdint>

namespace dpcomm {

constexpr int kGroup = 256;      // elements that share a scale; chunks are cut between groups
constexpr int kMaxRanks = 64;    // of one communicator whose ranks share memory
constexpr uint32_t kLayout = 2;  // version of everything below csrc/core that two ranks must agree on

enum class Op : uint8_t { sum, mean, min, max };
enum class Dtype : uint8_t { float32, float64, float16, bfloat16, int32, int64 };
enum class CodecKind : uint8_t { none, fp16, bf16 };  // bf16: of native only
// native: none of ours, the library that carries the messages adds up itself. Its codecs are plain 16 bits (native.h).
// two_level: inside hosts first, then direct or oneshot between them (local.h).
enum class Algorithm : uint8_t { automatic, direct, oneshot, ring, native, two_level };
// What lies between the ranks: memory that all of them see, or something that takes a message to one peer.
enum class Reach : uint8_t { memory, network };

constexpr int64_t element_bytes(Dtype dtype) {
  switch (dtype) {
    case Dtype::float16:
    case Dtype::bfloat16:
      return 2;
    case Dtype::float32:
    case Dtype::int32:
      return 4;
    case Dtype::float64:
    case Dtype::int64:
      return 8;
  }
  return 0;
}

// Bytes that a group takes in a message of ours: its codes, and for fp16 one int8 exponent.
constexpr int64_t group_bytes(Dtype dtype, CodecKind codec) {
  switch (codec) {
    case CodecKind::none:
      return kGroup * element_bytes(dtype);
    case CodecKind::fp16:
      return kGroup * 2 + 1;
    case CodecKind::bf16:
      return kGroup * 2;
  }
  return 0;
}
constexpr int64_t kNativeGroupBytes = kGroup * 2;  // of codes that a library adds up

// What "auto" stands for: a fixed table of data that are equal on all ranks. Its two entries give the same bits; ring
// has bits of its own and is taken on request only.
// oneshot reads (N-1) whole buckets and needs one hand-over instead of two: it pays while latency is everything. On a
// network it sends (N-1)(N-2)/N buckets more than direct, for which the slowest line counts: 8 KiB take 0.7 ms at 0.1
// Gb/s, a hand-over a third of that. For two ranks it is none; their limit is the work of adding everything twice.
constexpr Algorithm choose_algorithm(int64_t groups, Dtype dtype, CodecKind codec, int nranks, Reach reach) {
  constexpr int64_t kib = 1024;
  const int64_t bytes = groups * group_bytes(dtype, codec);
  const bool small = reach == Reach::memory
                         ? bytes * nranks <= 64 * kib
                         : bytes <= 3072 * kib && bytes * (nranks - 1) * (nranks - 2) <= 8 * kib * nranks;
  return small ? Algorithm::oneshot : Algorithm::direct;
}

}  // namespace dpcomm
