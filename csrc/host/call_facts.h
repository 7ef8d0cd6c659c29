// What follows from a call alone, for every engine: its header, its table of segments, what travels.
#pragma once
#include <vector>

#include "../core/chunks.h"
#include "../engine.h"

namespace dpcomm {

// Whether the codec serves the dtype and the operation; for algorithms of ours, and where a library adds up (native).
bool served(const Call& call);
bool served_natively(const Call& call);

// The call's segments in `table`, which keeps its capacity; returns their groups. At least one segment, if an empty
// one.
int64_t fill_segments(const Call& call, std::vector<Segment>& table);

// All but the sequence number. The algorithm is chosen where the call leaves it open.
Header header_of(const Call& call, int64_t groups, int nranks, Reach reach);

// Chunks that the algorithm cuts a bucket into.
int parts_of(const Header& header, int nranks);

// Groups that this rank writes for others, or sends. direct: every other rank's chunk and the result of its own;
// oneshot: its whole contribution; in memory both are written once for all, a network takes them to each peer. ring:
// all chunks on the way to the sum, all but two of them on the way back.
int64_t wire_groups(const Header& header, int64_t groups, int rank, int nranks, Reach reach);

// The same in bytes; of native, what a ring would take: a library does not say.
int64_t wire_bytes(const Header& header, int64_t groups, int rank, int nranks, Reach reach);

// One more call of this rank.
void count_call(Stats& stats, const Header& header, int64_t wire_bytes);

}  // namespace dpcomm
