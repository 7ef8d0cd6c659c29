#include "call_facts.h"

namespace dpcomm {

namespace {

uint64_t hash_counts(const std::vector<int64_t>& counts) {
  uint64_t h = 0xcbf29ce484222325;  // FNV-1a over whole words
  for (const int64_t n : counts) h = (h ^ uint64_t(n)) * 0x100000001b3;
  return h;
}

bool encodable(Dtype dtype) { return dtype == Dtype::float32 || dtype == Dtype::float16 || dtype == Dtype::bfloat16; }

}  // namespace

bool served(const Call& call) {
  return call.algorithm <= Algorithm::ring && call.codec != CodecKind::bf16 && served_natively(call);
}

bool served_natively(const Call& call) {
  return call.codec == CodecKind::none || (encodable(call.dtype) && call.op <= Op::mean);
}

int64_t fill_segments(const Call& call, std::vector<Segment>& table) {
  table.clear();
  int64_t groups = 0;
  for (size_t i = 0; i < call.counts.size(); ++i) {
    table.push_back({call.addresses[i], call.counts[i], groups});
    groups += groups_of(call.counts[i]);
  }
  if (table.empty()) table.push_back({nullptr, 0, 0});
  return groups;
}

Header header_of(const Call& call, int64_t groups, int nranks, Reach reach) {
  Header header{};
  for (const int64_t n : call.counts) header.numel += n;
  header.layout = hash_counts(call.counts);
  header.tensors = int32_t(call.counts.size());
  header.bucket = call.bucket;
  header.op = uint8_t(call.op);
  header.dtype = uint8_t(call.dtype);
  header.codec = uint8_t(call.codec);
  const bool open = call.algorithm == Algorithm::automatic;
  header.algorithm = uint8_t(open ? choose_algorithm(groups, call.dtype, call.codec, nranks, reach) : call.algorithm);
  return header;
}

int parts_of(const Header& header, int nranks) {
  return Algorithm(header.algorithm) == Algorithm::oneshot ? 1 : nranks;
}

int64_t wire_groups(const Header& header, int64_t groups, int rank, int nranks, Reach reach) {
  const Algorithm algorithm = Algorithm(header.algorithm);
  const int64_t copies = reach == Reach::memory ? 1 : nranks - 1;  // of what all peers get
  if (algorithm == Algorithm::oneshot) return groups * copies;
  const Chunks chunks = Chunks::cut(groups, nranks, 1);
  if (algorithm == Algorithm::direct) return groups + (copies - 1) * chunks.chunk(rank).groups;
  const auto ahead = [&](int by) { return chunks.chunk((rank + by) % nranks).groups; };
  return 2 * groups - ahead(1) - ahead(2);
}

int64_t wire_bytes(const Header& header, int64_t groups, int rank, int nranks, Reach reach) {
  const Dtype dtype = Dtype(header.dtype);
  const CodecKind codec = CodecKind(header.codec);
  if (Algorithm(header.algorithm) != Algorithm::native)
    return wire_groups(header, groups, rank, nranks, reach) * group_bytes(dtype, codec);
  const int64_t bytes = codec == CodecKind::none ? header.numel * element_bytes(dtype) : groups * kNativeGroupBytes;
  return 2 * (nranks - 1) * bytes / nranks;
}

void count_call(Stats& stats, const Header& header, int64_t wire_bytes) {
  ++stats.calls;
  stats.input_bytes += header.numel * element_bytes(Dtype(header.dtype));
  stats.wire_bytes += wire_bytes;
}

}  // namespace dpcomm
