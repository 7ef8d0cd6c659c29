// What one CTA of a pass does (passes.h). On the GPU its lanes are threads; tests play it with host lanes.
#pragma once
#include "../core/codec_fp16.h"
#include "../core/codec_none.h"
#include "../core/tile.h"
#include "passes.h"

namespace dpcomm {
inline namespace DPCOMM_ISA {

constexpr int kMostMessages = 3;

// All that one launch is told.
struct PassArguments {
  const Segment* segments;
  int64_t count, groups;
  int64_t most_groups;            // of a slice
  int64_t stride;                 // bytes between the slices of a message
  char* messages[kMostMessages];  // as many as the pass has
};

// One pass over one slice.
template <PassKind kind, class Codec, class Lanes>
DPCOMM_HD void run_slice(Lanes& lanes, const Bucket& bucket, Range range, const Message<Codec> (&m)[kMostMessages]) {
  constexpr int vectors = Lanes::template vectors<Codec>;
  if constexpr (kind == PassKind::encode) put<Codec>(lanes, bucket, range, m[0]);
  if constexpr (kind == PassKind::decode) get<Codec>(lanes, bucket, range, m[0]);
  if constexpr (kind == PassKind::add)
    each_memory<Codec, false>(lanes, bucket, range, [&](const auto& memory, int64_t at) {
      Total<Codec, Lanes> total;
      total.start(Incoming<Codec>(m[0], at));
      total.fold(Op::sum, memory);
      push<Codec>(lanes, m[1], at, Codec::scale(lanes, total), total);
    });
  if constexpr (kind == PassKind::reduce) {
    const Team two{0, 2, nullptr, nullptr, 0, 0, 0, false};  // add_up() asks for the ranks only
    const auto nranks = Codec::Element::divisor(two.nranks);
    each_memory<Codec, true>(lanes, bucket, range, [&](const auto& memory, int64_t at) {
      Total<Codec, Lanes> total;
      add_up<Codec>(two, Op::mean, nranks, memory, at, [&](int r) { return m[r]; }, total);
      const auto scale = Codec::scale(lanes, total);
      push<Codec>(lanes, m[2], at, scale, total);
      const Rounded<Codec, Total<Codec, Lanes>> adopted{total, scale};
      DPCOMM_UNROLL
      for (int i = 0; i < vectors; ++i) memory.set(i, adopted(i));
    });
  }
}

// What CTA `channel` of `channels` does.
template <PassKind kind, class Codec, class Lanes>
DPCOMM_HD void run_channel(Lanes& lanes, const PassArguments& a, int channel, int channels) {
  const Bucket bucket{a.segments, a.count, a.groups};
  const Chunks chunks = Chunks::cut(a.groups, 1, a.most_groups, channel, channels);
  for (int64_t c = 0; c < chunks.slices; ++c) {
    const Range range = chunks.range(c, 0);
    const int64_t at = (channel + c * channels) * a.stride;
    const Message<Codec> messages[kMostMessages] = {
        {a.messages[0] + at, range.groups}, {a.messages[1] + at, range.groups}, {a.messages[2] + at, range.groups}};
    run_slice<kind, Codec>(lanes, bucket, range, messages);
  }
}

}  // namespace DPCOMM_ISA
}  // namespace dpcomm
