#include "p2p_geometry.h"

#include <algorithm>
#include <string>

#include "../core/protocol.h"
#include "../error.h"
#include "../host/call_facts.h"
#include "p2p_call.h"

namespace dpcomm {

namespace {

// A CTA moves some 20 GB/s, so sixteen of them serve a link of 300 GB/s and leave a data-centre GPU seven eighths of
// its processors. No GPU has confirmed either (docs/gpu-status.md).
constexpr int kCtas = 16;
constexpr int kSlots = 4;
constexpr int64_t kMostSlotBytes = 129 * 1024;  // 128 KiB of codes and their exponents
constexpr int64_t kLeastSlotBytes = 4 * 1024;
constexpr int64_t kLeastSliceBytes = 16 * 1024;  // every lane of a CTA has a vector
constexpr int64_t kPage = int64_t{2} << 20;

int64_t rounded_up(int64_t bytes, int64_t to) { return (bytes + to - 1) / to * to; }

}  // namespace

int wanted_ctas(const P2pWish& wish) {
  if (wish.max_ctas < 0 || wish.max_ctas > kMostCtas)
    throw Error(Code::argument, "max_ctas must be 1 to " + std::to_string(kMostCtas));
  return wish.max_ctas > 0 ? wish.max_ctas : kCtas;
}

P2pGeometry p2p_geometry(int nranks, int channels, const P2pWish& wish) {
  if (wish.slots != 0 && (wish.slots < 4 || (wish.slots & (wish.slots - 1)) != 0))
    throw Error(Code::argument, "slots must be a power of two of at least 4");
  P2pGeometry g{};
  g.nranks = nranks, g.channels = channels, g.slots = wish.slots > 0 ? wish.slots : kSlots, g.pinned = wish.pinned;
  g.slice_bytes = wish.slice_bytes;
  const auto bytes = [&](int64_t slot) {
    return channels * rounded_up(arena_bytes(nranks, g.slots, slot, wish.pinned), 4096);
  };
  const int64_t lanes =
      (arena_bytes(nranks, g.slots, 128, wish.pinned) - arena_bytes(nranks, g.slots, 0, wish.pinned)) / 128;
  const int64_t room = wish.arena_bytes / kPage * kPage;
  const int64_t most =
      (room / channels / 4096 * 4096 - arena_bytes(nranks, g.slots, 0, wish.pinned)) / lanes / 128 * 128;
  if (most < kLeastSlotBytes)
    throw Error(Code::argument, "an arena of " + std::to_string(wish.arena_bytes) + " bytes is too small for " +
                                    std::to_string(nranks) + " ranks of " + std::to_string(channels) +
                                    " CTAs: at least " + std::to_string(rounded_up(bytes(kLeastSlotBytes), kPage)) +
                                    " are needed. Raise DPCOMM_ARENA_MB or lower max_ctas.");
  g.slot_bytes = std::min(most, kMostSlotBytes);
  g.channel_bytes = bytes(g.slot_bytes) / channels;
  g.arena_bytes = rounded_up(bytes(g.slot_bytes), kPage);
  return g;
}

P2pShare share_of(const P2pGeometry& g, const Header& header, int64_t groups) {
  const int parts = parts_of(header, g.nranks);
  const int64_t bytes = group_bytes(Dtype(header.dtype), CodecKind(header.codec));
  const int64_t chunk_bytes = (groups + parts - 1) / parts * bytes;
  const int64_t fair = chunk_bytes / (2 * g.channels);
  P2pShare share{};
  share.slice_bytes = g.slice_bytes > 0 ? std::min(g.slice_bytes, g.slot_bytes)
                                        : std::clamp(fair, std::min(kLeastSliceBytes, g.slot_bytes), g.slot_bytes);
  const int64_t slices = Chunks::cut(groups, parts, most_groups(g.slot_bytes, share.slice_bytes, bytes)).slices;
  share.channels = int(std::clamp<int64_t>(slices, 1, g.channels));
  return share;
}

}  // namespace dpcomm
