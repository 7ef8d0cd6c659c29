// How large the parts of an arena are, and how a call is dealt to CTAs. From data that are equal on all ranks.
#pragma once
#include <cstdint>

#include "../core/header.h"

namespace dpcomm {

// What ranks ask for; equal on all of them.
struct P2pWish {
  int64_t arena_bytes;      // of one rank, at most
  int max_ctas = 0;         // of one rank; 0: what performs well
  int slots = 0;            // a power of two, at least 4; 0: what performs well
  int64_t slice_bytes = 0;  // 0: so that all CTAs have work
  bool pinned = false;      // arenas in host memory
};

struct P2pGeometry {
  int nranks, channels, slots;
  int64_t slot_bytes, slice_bytes;
  int64_t channel_bytes;  // mailbox and slots of one channel of one rank
  int64_t arena_bytes;    // of one rank, in whole pages of 2 MiB
  bool pinned;
};

// CTAs that a rank would like to have.
int wanted_ctas(const P2pWish& wish);
// Throws Error(argument) where arena_bytes cannot hold the smallest.
P2pGeometry p2p_geometry(int nranks, int channels, const P2pWish& wish);

struct P2pShare {
  int64_t slice_bytes;
  int channels;
};
// Large calls have slices as large as a slot; smaller ones smaller slices, so that every CTA has one or two.
P2pShare share_of(const P2pGeometry& geometry, const Header& header, int64_t groups);

}  // namespace dpcomm
