// Which rank of a host owns which groups of a bucket, and in which pieces hosts exchange them. Pure arithmetic.
//
// A shard is cut like a bucket of its own (chunks.h): into a chunk for each host, a chunk into slices. Shards differ in
// size (the last ones may be shorter or empty), and so in their slices; all ranks of a host count as many rounds and
// messages as the largest shard needs.
#pragma once
#include "chunks.h"

namespace dpcomm {

enum class LocalTurn : uint8_t { gather, spread };  // see local.h

inline namespace DPCOMM_ISA {

struct Shards {
  int64_t groups, shard_groups;  // of the bucket; of a shard, but for the last ones
  int count, parts;              // shards; chunks of each: hosts, or 1 where all hosts get all
  int64_t most_slice_groups;     // of what hosts exchange
  int ranks;                     // of this host
  int64_t message_groups;        // at most, in memory

  DPCOMM_HD static Shards cut(int64_t groups, int count, int parts, int64_t most_slice_groups, int ranks,
                              int64_t message_groups) {
    return {groups, (groups + count - 1) / count, count, parts, most_slice_groups, ranks, message_groups};
  }

  DPCOMM_HD Range shard(int s) const {
    const int64_t begin = least(groups, s * shard_groups);
    return {begin, s < count ? least(groups, begin + shard_groups) - begin : 0};
  }
  DPCOMM_HD Chunks chunks(int s) const { return Chunks::cut(shard(s).groups, parts, most_slice_groups); }
  DPCOMM_HD int64_t slices() const { return chunks(0).slices; }  // shard 0 is the largest

  // Shards that a rank of this host owns at most: `local rank`, then every `ranks`-th.
  DPCOMM_HD int owned() const { return (count + ranks - 1) / ranks; }
  // Messages that a round takes: a slice has at most most_slice_groups, whatever the shard.
  DPCOMM_HD int64_t messages_of_a_shard() const {
    const int64_t chunk = (shard_groups + parts - 1) / parts;
    return (least(chunk, most_slice_groups) + message_groups - 1) / message_groups;
  }
  DPCOMM_HD int64_t messages() const { return owned() * messages_of_a_shard(); }

  // What a message of a round carries of what `owner` owns.
  DPCOMM_HD Range range(int owner, int64_t slice, int part, int64_t message) const {
    const int64_t each = messages_of_a_shard();
    const int s = owner + int(message / each) * ranks;
    const Range whole = shard(s), piece = chunks(s).range(slice, part);
    const int64_t begin = least(piece.groups, message % each * message_groups);
    return {whole.first + piece.first + begin, least(piece.groups, begin + message_groups) - begin};
  }

 private:
  DPCOMM_HD static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
};

}  // namespace DPCOMM_ISA
}  // namespace dpcomm
