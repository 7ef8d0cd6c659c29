#include "two_level.h"

#include <algorithm>

namespace dpcomm {
namespace {

// Slice `slice` of every part but `host`'s; or of that alone.
bool spread(Inside& inside, const Shards& shards, int64_t slice, int host, bool own) {
  if (slice < 0 || slice >= shards.slices()) return true;
  for (int part = 0; part < shards.parts; ++part)
    if ((part == host) == own && !inside.round(LocalTurn::spread, slice, part)) return false;
  return true;
}

}  // namespace

std::optional<Arrival> play(std::vector<Player>& players, Inside& inside, const Shards& shards, int host) {
  const int own = shards.parts == 1 ? 0 : host;  // in oneshot every host reduces all
  for (int64_t number = 0; number < shards.slices() + 2 * kAhead; ++number) {
    for (int part = 0; part < shards.parts && number < shards.slices(); ++part)
      if (!inside.round(LocalTurn::gather, number, part)) return std::nullopt;
    for (Player& player : players)
      if (!player.round(number)) return player.end();
    if (!spread(inside, shards, number - kAhead, own, true)) return std::nullopt;
    if (!spread(inside, shards, number - 2 * kAhead, own, false)) return std::nullopt;
  }
  return Arrival{};
}

Header header_between(const Header& header, int64_t groups, const Partition& partition) {
  Header between = header;
  const int64_t shard_groups = (groups + partition.shards() - 1) / partition.shards();
  between.algorithm = uint8_t(
      choose_algorithm(shard_groups, Dtype(header.dtype), CodecKind(header.codec), partition.nhosts(), Reach::network));
  return between;
}

Bucket part_of(const Bucket& bucket, Range range, int64_t element_bytes, std::vector<Segment>& table) {
  table.clear();
  const int64_t end = range.first + range.groups;
  for (int64_t s = segment_of(bucket, range.first); s < bucket.count; ++s) {
    const Segment& whole = bucket.segments[s];
    if (whole.first_group >= end) break;
    const int64_t from = std::max<int64_t>(0, range.first - whole.first_group);  // of the segment's groups
    const int64_t skipped = std::min(from * kGroup, whole.elems);
    const int64_t elems = std::min(whole.elems - skipped, (end - whole.first_group - from) * kGroup);
    table.push_back({whole.data + skipped * element_bytes, elems, whole.first_group + from - range.first});
  }
  if (table.empty()) table.push_back({nullptr, 0, 0});
  return {table.data(), int64_t(table.size()), range.groups};
}

}  // namespace dpcomm
