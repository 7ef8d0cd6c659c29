// Which rank owns which groups of a bucket, and in which pieces they travel. Pure arithmetic, no memory.
//
//   bucket   |-------- chunk 0 --------|-------- chunk 1 --------|---- chunk 2 ----|     groups, cut into N chunks
//   slices   |   0   |   1   |   2    |   0   |   1   |   2    |   0   |  1  | 2 |     each chunk into equal slices
//
// Slice c of every chunk travels at the same time, on channel c % channels. Bits never depend on slices or channels; of
// class ring they depend on the chunks.
#pragma once
#include "mailbox.h"
#include "segments.h"

namespace dpcomm {
inline namespace DPCOMM_ISA {

struct Chunks {
  int64_t groups, chunk_groups, slice_groups;
  int64_t slices;         // of this channel
  int channel, channels;  // see Team

  // At least one slice, even of an empty bucket: its message carries the header check.
  DPCOMM_HD static Chunks cut(int64_t groups, int parts, int64_t most_groups, int channel = 0, int channels = 1) {
    const int64_t chunk = (groups + parts - 1) / parts;
    const int64_t slices = chunk == 0 ? 1 : (chunk + most_groups - 1) / most_groups;
    return {groups,  chunk,   (chunk + slices - 1) / slices, (slices - channel + channels - 1) / channels,
            channel, channels};
  }
  DPCOMM_HD Range chunk(int part) const {
    const int64_t begin = least(groups, part * chunk_groups);
    return {begin, least(groups, begin + chunk_groups) - begin};
  }
  DPCOMM_HD Range range(int64_t slice, int part) const {
    const Range all = chunk(part);
    const int64_t begin = least(all.groups, (channel + slice * channels) * slice_groups);
    return {all.first + begin, least(all.groups, begin + slice_groups) - begin};
  }

 private:
  DPCOMM_HD static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
};

// Groups that one slice may have: what the slot holds, or less where smaller slices keep more of them in flight.
DPCOMM_HD int64_t most_groups(int64_t slot_bytes, int64_t slice_bytes, int64_t bytes_of_a_group) {
  const int64_t fits = slot_bytes / bytes_of_a_group, wish = slice_bytes / bytes_of_a_group;
  return wish < 1 ? 1 : wish < fits ? wish : fits;
}

// How this schedule cuts a call's bucket into `parts` chunks.
template <class Codec>
DPCOMM_HD Chunks cut(const Team& t, const Bucket& bucket, int parts) {
  constexpr int64_t bytes = kGroup * sizeof(typename Codec::Code) + Codec::scaled;
  return Chunks::cut(bucket.groups, parts, most_groups(t.slot_bytes, t.slice_bytes, bytes), t.channel, t.channels);
}

}  // namespace DPCOMM_ISA
}  // namespace dpcomm
